"""Meeting a user-specified size: budgets, allocation over all groups, and copies that are timed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn

from tp_cosep.errors import InputError
from tp_cosep.pruning.budget import Budget, counts_for_latency
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.pruning.planner import Planner
from tp_cosep.utils.data import device_of
from tp_cosep.utils.timing import median_times

__all__ = ["allocate_counts", "budget_of", "check_target"]


@torch.no_grad()
def budget_of(planner: Planner) -> Budget:
    """What the groups can lose, as the pruner's options allow.

    Args:
        planner: Of the step.

    Returns:
        The budget.
    """
    settings, budget = planner.settings, Budget()
    for group in planner.groups():
        try:
            view = planner.view(group)
            is_left_alone = bool(planner.unselected(group, view).reason)
            selection = None if is_left_alone else planner.selector.select(group, view=view)
        except InputError as error:
            planner.refused(group, error)
            continue
        if selection is None or (planner.num_heads_of(group) and not settings.prune_head_dims):
            continue
        n = planner.n_initial_of(view)
        fixed = planner.fixed_ratios_of(view)
        ratio = settings.max_pruning_ratio if fixed is None else fixed[planner.step]
        least = max(1, n - int(n * ratio))
        if fixed is not None:
            budget.fixed[len(budget.views)] = view.n_components - least
        budget.views.append(view)
        budget.losses.append(planner.selector.losses(view, selection))
        budget.least.append(least if fixed is None else view.n_components)
        budget.steps.append(planner.step_size(view) or 1)
    return budget


def allocate_counts(planner: Planner) -> None:
    """Decide how many components every group keeps, so that the model meets the target of this step.

    Args:
        planner: Of the step; its memory receives the counts.

    Raises:
        InputError: If the target is out of reach.
    """
    assert planner.settings.target is not None
    (unit, value), subject, memory = planner.settings.target, planner.subject, planner.memory
    budget = budget_of(planner)
    costs, whole = budget.costs(subject.model, subject.run, unit)
    if unit == "latency":
        whole = now = _seconds(planner, {"now": subject.model})["now"]
    is_first, memory.cost = memory.cost is None, memory.cost or whole
    if is_first and _goal(planner) >= whole:
        warnings.warn(
            f"step: the target of {value:.6g} {unit} asks for nothing, the model is at "
            f"{whole * (1000 if unit == 'latency' else 1):.6g}; shares are below 1.",
            stacklevel=7,
        )
    if unit == "latency":
        kept = counts_for_latency(
            budget, costs, lambda kept: _time_of_copy(planner, budget, kept), _goal_of_step(planner) / now
        )
    else:
        kept = budget.kept(costs, _goal_of_step(planner))
    _remember(planner, budget, kept)


def check_target(planner: Planner, costs: Mapping[str, Mapping[str, int]]) -> None:
    """Warn if the target was missed, because groups were skipped or not pruned by the caller.

    A latency is not measured again: a busy machine would make it miss by chance.

    Args:
        planner: Of the step.
        costs: Of the pruned model, see :func:`tp_cosep.pruning.costs.layer_costs`.
    """
    assert planner.settings.target is not None
    unit = planner.settings.target[0]
    if unit == "latency" or planner.memory.cost is None or planner.step > planner.settings.n_steps:
        return
    reached, goal = sum(costs[unit].values()), _goal_of_step(planner)
    if reached > 1.02 * goal:
        warnings.warn(
            f"step: the target of {goal:.4g} {unit} was missed, {reached:.4g} are left: groups that were to lose "
            "channels did not, see the plan.",
            stacklevel=5,
        )


def _remember(planner: Planner, budget: Budget, kept: Sequence[int]) -> None:
    planner.memory.counts = {(v.root, v.side): k for v, k in zip(budget.views, kept, strict=True)}


def _time_of_copy(planner: Planner, budget: Budget, kept: Sequence[int]) -> float:
    """The time of a copy that keeps so many components, as a share of the model's."""
    settings, subject = planner.settings, planner.subject
    memory = planner.memory.copy()
    memory.done.clear()
    trial = Planner(planner.selector, replace(settings, embed=False), subject, memory, planner.step)
    _remember(trial, budget, kept)
    groups = tuple(trial.group_plans())
    # Together, since trace options may name parameters of the model.
    model, options = deepcopy((subject.model, dict(settings.trace_options)))
    plan = PruningPlan(groups, ignored_params=settings.ignored_params)
    pruned = plan.apply(model, subject.example_inputs, adapt=settings.adapt, **options)
    times = _seconds(planner, {"now": subject.model, "then": pruned})
    return times["then"] / times["now"]


def _seconds(planner: Planner, models: dict[str, nn.Module]) -> dict[str, float]:
    return median_times(models, planner.subject.run, device_of(planner.subject.model))


def _goal(planner: Planner) -> float:
    """What the model may cost in the end, in the unit's own measure, seconds for a latency."""
    assert planner.settings.target is not None
    unit, value = planner.settings.target
    return value * (planner.memory.cost or 0.0) if value < 1 else value / (1000 if unit == "latency" else 1)


def _goal_of_step(planner: Planner) -> float:
    """What the model may cost after this step."""
    whole = planner.memory.cost or 0.0
    return whole - (whole - _goal(planner)) * planner.step / planner.settings.n_steps
