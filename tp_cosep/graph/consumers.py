"""Consumers: the layers with weights that read prunable channels, and samples of their inputs while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.errors import InputError
from tp_cosep.graph.groups import DependencyGroup, GroupView, Member, prunable_groups, read_group
from tp_cosep.graph.patches import Patches, patches_of
from tp_cosep.graph.tracing import ROOT_TYPES, trace
from tp_cosep.utils.sampling import PositionSampler

__all__ = [
    "affordable",
    "find_consumers",
    "named",
    "on_inputs",
    "patches_of_consumers",
    "readable_groups",
    "sampling_inputs",
]

# Positions per sample that are measured by default: neighbouring positions of a map are strongly correlated.
_FEWEST_POSITIONS, _MOST_POSITIONS = 3, 12


def find_consumers(
    model: nn.Module,
    example_inputs: Any,
    *,
    max_features: int,
    ignored: Iterable[nn.Module] = (),
    **trace_options: Any,
) -> dict[str, Patches]:
    """Trace a model and find all consumers of its groups that can be refitted.

    Args:
        model: The model.
        example_inputs: Inputs for tracing.
        max_features: Kernel positions, and positions of flattened maps, are features of their own in layers with at
            most this many features.
        ignored: Layers whose groups are left out.
        **trace_options: Options of ``DependencyGraph.build_dependency``.

    Returns:
        Patches by layer name.
    """
    graph = trace(model, example_inputs, **trace_options)
    views = [view for _, view in readable_groups(prunable_groups(graph, ignored, (*ROOT_TYPES, nn.Embedding)))]
    return patches_of_consumers(views, max_features=max_features)


def readable_groups(groups: Iterable[DependencyGroup]) -> Iterator[tuple[DependencyGroup, GroupView]]:
    """Groups with their views, without those that :func:`read_group` refuses.

    Its error is for whoever prunes such a group; measuring the others does not depend on it.

    Args:
        groups: Groups of one graph.

    Yields:
        A group and its view.
    """
    for group in groups:
        try:
            view = read_group(group)
        except InputError:
            continue
        yield group, view


def patches_of_consumers(views: Iterable[GroupView], *, max_features: int) -> dict[str, Patches]:
    """Patches of the groups' consumers that can be refitted.

    Args:
        views: Views of the groups.
        max_features: Kernel positions, and positions of flattened maps, are features of their own in layers with at
            most this many features.

    Returns:
        Patches by layer name, in the order of the groups.
    """
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
    """Consecutive inputs of a linear layer per channel (a flattened map); 1 if they are not arranged like that."""
    n = len(member.rows)
    if not isinstance(member.layer, nn.Linear) or n != member.n_channels:
        return 1
    counts = torch.bincount(member.channels)
    in_order = torch.equal(member.channels, torch.arange(len(counts)).repeat_interleave(counts))
    return int(counts[0]) if in_order and bool((counts == counts[0]).all()) else 1


def affordable(patches: Patches, shape: torch.Size) -> int:
    """Positions per sample whose second moments cost a third of the layer's own products, within 3 … 12.

    A position costs n² / 2 products in double precision, as much as n² in single. Gathering the rows included, all
    measurements together cost 0.1 to 0.7 forward passes (``benchmarks/refit.py``).

    Args:
        patches: Patches of the layer.
        shape: Shape of its input.

    Returns:
        Number of positions.
    """
    n = patches.n_products(shape) // (3 * patches.n_features**2)
    return min(max(n, _FEWEST_POSITIONS), _MOST_POSITIONS)


@contextmanager
def on_inputs(layers: Iterable[nn.Module], take: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Call ``take(layer, input)`` before every forward pass of the given layers."""

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
def sampling_inputs(
    consumers: Mapping[str, Patches],
    positions: PositionSampler,
    take: Callable[[str, Tensor], None],
    *,
    max_positions: int | None = None,
    sized_by: Mapping[str, Patches] | None = None,
) -> Iterator[None]:
    """Sample rows of the consumers' inputs while the model runs on one batch.

    Args:
        consumers: Patches by layer name.
        positions: Samples the positions of the batch.
        take: ``take(name, rows)`` is called before every forward pass of a consumer, with rows
            ``[rows, features]`` float64.
        max_positions: Positions per sample, at most; by default as many as are :func:`affordable`.
        sized_by: Patches by layer name that determine how many are affordable; by default those of ``consumers``.

    Yields:
        Nothing; run the model inside.
    """
    names = {patches.layer: name for name, patches in consumers.items()}
    sizes = consumers if sized_by is None else sized_by

    def sample(layer: nn.Module, x: Tensor) -> None:
        name = names[layer]
        with named(name):
            n = max_positions or affordable(sizes[name], x.shape)
            take(name, consumers[name].sampler(x.shape, n, positions.for_layer(name))(x))

    with on_inputs(names, sample):
        yield


@contextmanager
def named(name: str) -> Iterator[None]:
    """Prefix an :class:`InputError` with the layer that it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"layer {name!r}: {error}") from error
