"""Selecting whole attention heads by a criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.errors import InputError
from tp_cosep.functional.head_selection import heads_of_layer, heads_of_model
from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.graph.groups import GroupView, read_group, side_of
from tp_cosep.graph.heads import attention_groups, attention_layers_of, heads_of
from tp_cosep.graph.protocols import DependencyGroup
from tp_cosep.graph.tracing import ROOT_TYPES
from tp_cosep.selection.criterion import Criterion

__all__ = ["HeadOptions", "add_head_scores", "select_heads"]


@dataclass(frozen=True)
class HeadOptions:
    """How heads are selected.

    Attributes:
        scope: ``"layer"``, or ``"model"`` for one space of all heads of the model, with at least one kept in every
            layer.
        rules: Options of :func:`tp_cosep.functional.selection.select_channels`.
        preference: ``preference(group, view)`` gives ``[heads]``, the most preferred head of a cluster being kept, or
            ``None`` for the medoid.
        weights: ``weights(group, view)`` gives ``[heads]``, how much each counts, or ``None`` for all alike.
    """

    scope: str
    rules: Mapping[str, Any]
    preference: Callable[[DependencyGroup, GroupView], Tensor | None]
    weights: Callable[[DependencyGroup, GroupView], Tensor | None]


def select_heads(
    criterion: Criterion,
    groups: Sequence[DependencyGroup],
    num_heads: Mapping[nn.Module, int],
    options: HeadOptions,
    *,
    n_keep: Sequence[int] | int | None = None,
) -> list[ChannelSelection | None]:
    """Select whole attention heads.

    If several query heads share keys and values, the same number of query heads is kept for each key-value head.

    Args:
        criterion: How heads compare.
        groups: Attention groups with all their channels, rooted at the layer that consumes them, see
            :func:`tp_cosep.graph.heads.rerooted`.
        num_heads: Number of heads by attention layer.
        options: How they are selected.
        n_keep: Heads to keep of each group; with ``scope="model"`` of all together. The knee decides if not given.

    Returns:
        For every group the selection among the channels of its root, or ``None`` if it has no statistics.

    Raises:
        InputError: If the statistics do not fit the layers, or ``scope="model"`` meets layers that cannot be compared.
    """
    numbers = [heads_of(group, num_heads) for group in groups]
    views = [read_group(group, n_heads=n) for group, (n, _) in zip(groups, numbers, strict=True)]
    if options.scope == "model":
        if any(n != n_shared for n, n_shared in numbers):
            raise InputError(
                "scope='model': expected as many key-value heads as query heads, got fewer; use scope='layer'."
            )
        return _select_in_model(criterion, groups, views, options, n_keep if isinstance(n_keep, int) else None)
    counts = n_keep if isinstance(n_keep, Sequence) else [n_keep] * len(groups)
    selections: list[ChannelSelection | None] = []
    for group, view, count, (n, n_shared) in zip(groups, views, counts, numbers, strict=True):
        distances = criterion.head_distances([view])
        if distances is None:
            selections.append(None)
            continue
        selection = heads_of_layer(
            distances,
            n_sharing=n // n_shared,
            n_keep=count,
            weights=options.weights(group, view),
            preference=options.preference(group, view),
            **options.rules,
        )
        selections.append(selection.expanded(view.component_of))
    return selections


def _select_in_model(
    criterion: Criterion,
    groups: Sequence[DependencyGroup],
    views: Sequence[GroupView],
    options: HeadOptions,
    n_keep: int | None,
) -> list[ChannelSelection | None]:
    # Layers without statistics have no place in the common space.
    known = [i for i, view in enumerate(views) if criterion.head_distances([view]) is not None]
    selections: list[ChannelSelection | None] = [None] * len(views)
    distances = criterion.head_distances([views[i] for i in known]) if known else None
    if distances is None:
        return selections
    preferences = [p for i in known if (p := options.preference(groups[i], views[i])) is not None]
    weights = [e for i in known if (e := options.weights(groups[i], views[i])) is not None]
    parts = heads_of_model(
        distances,
        [views[i].n_components for i in known],
        n_keep=n_keep,
        weights=torch.cat(weights) if len(weights) == len(known) else None,
        preference=torch.cat(preferences) if len(preferences) == len(known) else None,
        **options.rules,
    )
    for i, part in zip(known, parts, strict=True):
        selections[i] = part.expanded(views[i].component_of)
    return selections


def add_head_scores(
    group: DependencyGroup,
    scores: Tensor | None,
    num_heads: Mapping[nn.Module, int],
    scope: str,
    select: Callable[[Sequence[DependencyGroup], Mapping[nn.Module, int]], list[ChannelSelection | None]],
) -> Tensor | None:
    """Scores of an attention group's channels that rank its heads too; those of any other group as they are.

    A score is that of the dimension plus that of the head, one of them centred: the heads', so that averages over heads
    are the dimensions' scores, or with ``scope="model"`` the dimensions'.

    Args:
        group: A ``tp.Group`` with all channels.
        scores: ``[channels]`` of its dimensions, if they have statistics.
        num_heads: Number of heads by attention layer.
        scope: ``"layer"`` or ``"model"``.
        select: ``select(groups, num_heads)`` selects whole heads.

    Returns:
        ``[channels]``, or ``None`` if neither has statistics.
    """
    if side_of(group) != "in" or not attention_layers_of(group, num_heads):
        return scores
    groups, mine = [group], 0
    if scope == "model":
        groups = attention_groups(group._DG, num_heads, ROOT_TYPES)
        mine = [g[0].dep.target.module for g in groups].index(group[0].dep.target.module)
    heads = select(groups, num_heads)[mine]
    if heads is None or scores is None:
        return scores if heads is None else heads.scores
    if scope == "model":
        return heads.scores + scores - scores.mean()
    return scores + heads.scores - heads.scores.mean()
