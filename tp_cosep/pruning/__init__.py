"""The pruner: settings, planner, budget, costs, the plan and saved models."""
