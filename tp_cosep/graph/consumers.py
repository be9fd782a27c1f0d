"""The layers of a model that read prunable channels by weights, and their inputs while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.errors import InputError
from tp_cosep.graph.groups import GroupView, Member, prunable_groups, read_group
from tp_cosep.graph.patches import Patches, patches_of
from tp_cosep.graph.tracing import ROOT_TYPES, trace

__all__ = ["affordable", "find_consumers", "named", "on_inputs", "patches_of_consumers", "readable_groups"]

# Positions per sample that are measured by default: a kernel's neighbours tell little that is new.
_FEWEST_POSITIONS, _MOST_POSITIONS = 3, 12


def find_consumers(
    model: nn.Module,
    example_inputs: Any,
    *,
    max_features: int,
    ignored: Iterable[nn.Module] = (),
    **trace_options: Any,
) -> dict[str, Patches]:
    """How every layer reads that reads channels of a group and can be refitted.

    Args:
        model: A model.
        example_inputs: For tracing.
        max_features: Taps of kernels, and positions of flattened maps, have features of their own up to this many.
        ignored: Groups that contain one of these are left out.
        **trace_options: As for ``DependencyGraph.build_dependency``.

    Returns:
        Readings by layer name.
    """
    graph = trace(model, example_inputs, **trace_options)
    views = [view for _, view in readable_groups(prunable_groups(graph, ignored, (*ROOT_TYPES, nn.Embedding)))]
    return patches_of_consumers(views, max_features=max_features)


def readable_groups(groups: Iterable[Any]) -> Iterator[tuple[Any, GroupView]]:
    """Groups with what there is to know of them, without those that cannot be read.

    Whoever is to prune such a group is told why not.

    Args:
        groups: Of a trace.

    Yields:
        The groups in turn.
    """
    for group in groups:
        try:
            view = read_group(group)
        except InputError:
            continue
        yield group, view


def patches_of_consumers(views: Iterable[GroupView], *, max_features: int) -> dict[str, Patches]:
    """How the readers of groups read, by layer name, as for :func:`find_consumers`."""
    found: dict[str, Patches] = {}
    for view in views:
        for member in view.consumers:
            patches = None if member.name in found else patches_of(member.layer)
            if patches is None:
                continue
            if patches.n_features_per_position <= max_features:
                patches = patches_of(member.layer, per_position=True)
            else:
                patches = patches_of(member.layer, repeat=_repeat(member))
            assert patches is not None
            found[member.name] = patches
    return found


def _repeat(member: Member) -> int:
    """Inputs of a linear layer that belong to one channel and lie next to each other; 1 if they do not."""
    n = len(member.rows)
    if not isinstance(member.layer, nn.Linear) or n != member.n_channels:
        return 1
    counts = torch.bincount(member.channels)
    in_order = torch.equal(member.channels, torch.arange(len(counts)).repeat_interleave(counts))
    return int(counts[0]) if in_order and bool((counts == counts[0]).all()) else 1


def affordable(patches: Patches, shape: torch.Size) -> int:
    """Positions per sample whose second moments cost a third of the layer's own products, within 3 … 12.

    A position costs n² / 2 products in double precision, as much as n² in single. With what it takes to gather them,
    all that is measured costs 0.1 to 0.7 forward passes (``benchmarks/refit.py``).

    Args:
        patches: How the layer reads.
        shape: Of its input.

    Returns:
        Number of positions.
    """
    n = patches.n_products(shape) // (3 * patches.n_features**2)
    return min(max(n, _FEWEST_POSITIONS), _MOST_POSITIONS)


@contextmanager
def on_inputs(layers: Iterable[nn.Module], take: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Call ``take(layer, input)`` whenever one of some layers is called."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(layer, args[0] if args else kwargs["input"])

    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def named(name: str) -> Iterator[None]:
    """Say in errors which layer they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"layer {name!r}: {error}") from error
