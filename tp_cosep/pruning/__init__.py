"""The pruner: settings, planner, budget, costs, the plan, saved models and optimizers."""
