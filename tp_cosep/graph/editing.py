"""Editing a model: building groups, pruning them, and updating the attributes of modules that state their sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tp_cosep.errors import InputError
from tp_cosep.graph.edits import ParameterEdit, recorded_edits
from tp_cosep.graph.groups import DependencyGraph, DependencyGroup
from tp_cosep.graph.heads import head_parameters, update_owners
from tp_cosep.graph.patches import n_outputs, patches_of
from tp_cosep.graph.tracing import frozen_kept
from tp_cosep.graph.tying import kept_tied

__all__ = ["add_biases", "build_group", "prune_group"]


def build_group(
    graph: DependencyGraph, layer: nn.Module, side: str, idxs: Iterable[int], heads: Mapping[str, tuple[int, int]]
) -> DependencyGroup:
    """Build the group that removes channels of a layer.

    Args:
        graph: A dependency graph.
        layer: The root.
        side: The side of the root that is pruned, ``"out"`` or ``"in"``.
        idxs: The channels to remove.
        heads: Number of heads before and after by attention layer, see :class:`tp_cosep.GroupPlan`. Where heads are
            pruned, keys and values that several query heads share are kept whole.

    Returns:
        The group.
    """
    pruner = graph.get_pruner_of_module(layer)
    prune = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels
    group = graph.get_pruning_group(layer, prune, list(idxs))
    for i, (dep, found) in enumerate(group):
        if len(set(found)) < len(found):  # listed once per query head that shares a key, but removed once
            group[i] = (dep, sorted(set(found)))
    if any(before != after for before, after in heads.values()):
        names = graph._module2name
        for i, (dep, _) in enumerate(group):
            before, after = heads.get(names.get(dep.target.module, ""), (0, 1))
            if before == after:
                group[i] = (dep, [])
    return group


def add_biases(model: nn.Module, names: Iterable[str]) -> None:
    """Give layers a bias of zeros.

    Raises:
        InputError: If a layer is missing, or is neither a convolution nor a linear layer.
    """
    modules = dict(model.named_modules())
    for name in names:
        layer: Any = modules.get(name)
        if patches_of(layer) is None:
            raise InputError(
                f"layer {name!r}: the plan gives it a bias; expected a convolution or linear layer of this name, got "
                f"{type(layer).__name__}; apply the plan to the model it was made for."
            )
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(n_outputs(layer)), layer.weight.requires_grad)


def prune_group(
    model: nn.Module,
    prune: Callable[[], object],
    n_channels: int,
    prune_idxs: Iterable[int],
    heads: Mapping[str, tuple[int, int]],
) -> list[ParameterEdit]:
    """Prune a group; frozen parameters stay frozen, tied ones tied, and attention modules get their new sizes.

    Args:
        model: The model.
        prune: Removes the group's channels, such as the ``prune`` of a ``tp.Group``.
        n_channels: Number of channels of the group's root before.
        prune_idxs: The root's channels that it removes.
        heads: Number of heads before and after by attention layer; empty if the group has none.

    Returns:
        The parameters that were replaced.
    """
    with recorded_edits(model) as edits, frozen_kept(model), kept_tied(model):
        prune()
        if heads:
            _update_heads(model, n_channels, prune_idxs, heads)
    return edits


def _update_heads(
    model: nn.Module, n_channels: int, prune_idxs: Iterable[int], heads: Mapping[str, tuple[int, int]]
) -> None:
    """Write new numbers and sizes of heads into attention modules, and prune the parameters with an entry per head."""
    kept = sorted(set(range(n_channels)) - set(prune_idxs))
    n_before, n_after = (max(numbers) for numbers in zip(*heads.values(), strict=True))
    sizes = n_channels // n_before, len(kept) // n_after
    if n_before != n_after:
        _prune_head_parameters(model, heads, sorted({channel // sizes[0] for channel in kept}))
    before = {name: (n, sizes[0]) for name, (n, _) in heads.items()}
    after = {name: (n, sizes[1]) for name, (_, n) in heads.items()}
    update_owners(model, before, after)


def _prune_head_parameters(model: nn.Module, heads: Mapping[str, tuple[int, int]], kept: list[int]) -> None:
    """Remove the entries of pruned heads from parameters with one entry per head."""
    layers = {model.get_submodule(name): before for name, (before, _) in heads.items()}
    for name, dim in head_parameters(model, layers).items():
        path, _, attribute = name.rpartition(".")
        old = model.get_parameter(name)
        idxs = torch.tensor(kept, device=old.device)
        new = nn.Parameter(old.detach().index_select(dim, idxs))
        if old.grad is not None:
            new.grad = old.grad.index_select(dim, idxs)
        setattr(model.get_submodule(path), attribute, new)
