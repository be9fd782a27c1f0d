"""Optimizers that outlive pruning: their settings and state, for the parameters of the pruned model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from tp_cosep.errors import InputError
from tp_cosep.graph.edits import ParameterEdit, Selections, selected
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.utils.data import described

__all__ = ["carry_over"]

_CLASSES: tuple[type[torch.optim.Optimizer], ...] = (SGD, Adam, AdamW)
#: Parameters that take the place of one of the old optimizer's, with the state of each.
_Carried = dict[nn.Parameter, dict[str, Any]]


def carry_over(optimizer: torch.optim.Optimizer, plan: PruningPlan, model: nn.Module) -> torch.optim.Optimizer:
    """Make an optimizer for a pruned model from one that was made before pruning, with the state of what was kept.

    Pruning replaces parameters, so an optimizer from before goes on updating the replaced ones. The new one has their
    successors, in the same groups with the same options. State with an entry per entry of a parameter (SGD's
    ``momentum_buffer``; Adam's ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``) is that of the kept entries; steps
    go on counting. For a weight that compensation has refitted that is the state from before the refit. A bias that
    compensation has added joins the group of its layer's weight, without state.

    The old optimizer is left as it was and shares no state with the new one. Learning-rate schedules and hooks stay
    with the old one; a new schedule takes over with ``last_epoch``, since the groups keep their ``initial_lr``.

    Args:
        optimizer: A ``torch.optim.SGD``, ``Adam`` or ``AdamW``, made before pruning or between two steps. It need not
            have all parameters of the model, nor any state.
        plan: The ``plan`` of the :class:`tp_cosep.CoSePPruner` that pruned the model, after its last step. It knows the
            replaced parameters in the process in which it was made; a plan that was loaded or copied does not.
        model: The model that the pruner pruned, not a copy.

    Returns:
        An optimizer of the same class. Floating-point state has the type and device of its parameter.

    Raises:
        InputError: If the optimizer is of another class, also a subclass; the plan is not the one that pruned the model
            here; or a parameter of the optimizer is not part of the model and was not replaced by a selection of its
            entries.

    Example:
        >>> from tp_cosep import CoSePPruner
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(60, 6), torch.arange(60) % 3
        >>> model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        >>> optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> nn.functional.cross_entropy(model(x), y).backward()
        >>> optimizer.step()
        >>> pruner = CoSePPruner(model, x[:1], loader=[(x, y)], pruning_ratio=0.5)
        >>> pruner.step()
        >>> optimizer = carry_over(optimizer, pruner.plan, model)
        >>> optimizer.state[model[0].weight]["momentum_buffer"].shape
        torch.Size([6, 6])
    """
    kind = type(optimizer)
    if kind not in _CLASSES:
        raise InputError(
            f"carry_over: expected an optimizer of class SGD, Adam or AdamW of torch.optim, got "
            f"{kind.__module__}.{kind.__qualname__}; make a new optimizer for the pruned model."
        )
    _check_plan(plan, model)
    carried = [[_carried(p, optimizer, plan, model) for p in group["params"]] for group in optimizer.param_groups]
    biases = _added_biases(plan, model, {q for parts in carried for part in parts for q in part})
    groups = [_group(old, parts, biases, model) for old, parts in zip(optimizer.param_groups, carried, strict=True)]
    accepted = inspect.signature(kind).parameters
    new = kind(groups, **{name: value for name, value in optimizer.defaults.items() if name in accepted})
    states: _Carried = {}
    for part in chain.from_iterable(carried):
        states |= part
    # Loading puts state where the optimizer's options require it.
    document = new.state_dict()
    numbers = enumerate(chain.from_iterable(group["params"] for group in new.param_groups))
    new.load_state_dict({**document, "state": {i: states[q] for i, q in numbers if states.get(q)}})
    return new


def _check_plan(plan: PruningPlan, model: nn.Module) -> None:
    if not isinstance(plan, PruningPlan):
        raise InputError(
            f"carry_over: expected the plan of a CoSePPruner, got {described(plan)}; pass pruner.plan as plan."
        )
    pruned = None if plan.history.model is None else plan.history.model()
    if pruned is None and any(group.selection and group.selection.prune_idxs for group in plan):
        raise InputError(
            "carry_over: expected a plan that knows the parameters that its pruner replaced, got one that was loaded "
            "or copied; pass pruner.plan of the CoSePPruner that pruned the model in this process, or make a new "
            "optimizer."
        )
    if pruned is not None and pruned is not model:
        raise InputError(
            f"carry_over: expected the model that the plan's pruner pruned, got another {type(model).__name__}; pass "
            "that model itself, not a copy or wrapper of it, with the plan of the pruner that pruned it."
        )


def _carried(p: nn.Parameter, optimizer: torch.optim.Optimizer, plan: PruningPlan, model: nn.Module) -> _Carried:
    """What the model has in the place of a parameter; more than one where parameters that were tied no longer are."""
    state = optimizer.state.get(p, {})
    found: _Carried = {}
    for name, edits in plan.history.edits_since(p).items():
        q = model.get_parameter(name)
        if q not in found:
            selections = _selections(name, edits, p.shape, q.shape)
            found[q] = {key: _of_kept(x, p.shape, selections) for key, x in state.items()}
    if p not in found and any(p is q for q in model.parameters()):
        found[p] = {key: _of_kept(x, p.shape, ()) for key, x in state.items()}
    if not found:
        raise InputError(
            f"carry_over: expected parameters of the model from before or after pruning, got one of shape "
            f"{tuple(p.shape)} in the optimizer that is neither in the model nor among those that the plan's pruner "
            "replaced; pass the plan as it is after the pruner's last step. If several pruners worked in turn, carry "
            "the optimizer over after each."
        )
    return found if len(found) == 1 else {q: found[q] for q in model.parameters() if q in found}


def _selections(name: str, edits: list[ParameterEdit], before: torch.Size, after: torch.Size) -> Selections:
    """What the model's parameter holds of an old one, checked against the shapes of both."""
    shape, selections = list(before), list[tuple[int, Tensor]]()
    for edit in edits:
        if edit.selections is None:
            raise InputError(
                f"parameter {name!r}: expected pruning to replace it by a selection of its entries, but its layer's "
                "pruner made it otherwise, so no state belongs to it; make a new optimizer for the pruned model."
            )
        selections += edit.selections
    for dim, idxs in selections:
        shape[dim] = len(idxs)
    if shape != list(after):
        raise InputError(
            f"parameter {name!r}: expected shape {tuple(shape)}, as the plan's pruner left it, got {tuple(after)}; "
            "carry the optimizer over before anything else changes the model's shapes."
        )
    return tuple(selections)


def _of_kept(x: Any, shape: torch.Size, selections: Selections) -> Any:
    """The state of the kept entries; a number of steps, which has no entries, as it is."""
    if not isinstance(x, Tensor):
        return x
    return selected(x, selections) if selections and x.shape == shape else x.clone()


def _added_biases(plan: PruningPlan, model: nn.Module, carried: set[nn.Parameter]) -> dict[nn.Parameter, str]:
    """Names of biases that were added since the plan was begun, by the weight of their layer."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[nn.Parameter, str] = {}
    for name, bias in parameters.items():
        layer, _, leaf = name.rpartition(".")
        weight = parameters.get(f"{layer}.weight" if layer else "weight")
        is_new = leaf == "bias" and plan.structure and name not in plan.structure and bias not in carried
        if is_new and weight is not None:
            found[weight] = name
    return found


def _group(
    old: Mapping[str, Any], carried: list[_Carried], biases: Mapping[nn.Parameter, str], model: nn.Module
) -> dict[str, Any]:
    """A parameter group with the options of an old one."""
    params: list[tuple[str, nn.Parameter]] = []
    names = {q: name for name, q in model.named_parameters()}
    for i, part in enumerate(carried):
        for q in part:
            is_alone = len(part) == 1 and "param_names" in old
            params.append((old["param_names"][i] if is_alone else names[q], q))
            if q in biases:
                params.append((biases[q], model.get_parameter(biases[q])))
    options = {key: value for key, value in old.items() if key not in ("params", "param_names")}
    return {**options, "params": params if "param_names" in old else [q for _, q in params]}
