"""Selecting whole attention heads with what a selector has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tp_cosep.errors import InputError
from tp_cosep.functional.attention_distances import ATTENTION_JS, jensen_shannon_distances
from tp_cosep.functional.head_selection import heads_of_layer, heads_of_model
from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.graph.groups import GroupView, read_group, side_of
from tp_cosep.graph.heads import attention_groups, attention_layers_of, heads_of
from tp_cosep.graph.tracing import ROOT_TYPES

if TYPE_CHECKING:
    from tp_cosep.selection.cosep import CoSePSelector

__all__ = ["head_distances", "select_heads", "with_head_scores"]


def select_heads(
    selector: CoSePSelector,
    groups: Sequence[Any],
    num_heads: Mapping[nn.Module, int],
    *,
    n_keep: Sequence[int] | int | None = None,
) -> list[ChannelSelection | None]:
    """Choose whole attention heads.

    A head's profile is the mean of its dimensions' profiles in each of its projections. Where several query
    heads share keys and values, as many are kept of each that do.

    Args:
        selector: A fitted selector.
        groups: Attention groups with all their channels, seen from the layer that reads them, see
            :func:`tp_cosep.graph.heads.rerooted`.
        num_heads: Number of heads by attention layer.
        n_keep: Heads to keep of each group; with the selector's ``scope="model"`` of all together. The knee decides
            if not given.

    Returns:
        For every group the selection among the channels of its root, or ``None`` if it was not measured.

    Raises:
        NotFittedError: If the selector was not fitted.
        InputError: If the moments do not fit the layers, or ``scope="model"`` meets layers that cannot be
            compared.
    """
    numbers = [heads_of(group, num_heads) for group in groups]
    views = [read_group(group, n_heads=n) for group, (n, _) in zip(groups, numbers, strict=True)]
    if selector.scope == "model":
        return _select_in_model(selector, groups, views, numbers, n_keep if isinstance(n_keep, int) else None)
    counts = n_keep if isinstance(n_keep, Sequence) else [n_keep] * len(groups)
    selections: list[ChannelSelection | None] = []
    for group, view, count, (n, n_shared) in zip(groups, views, counts, numbers, strict=True):
        distances = head_distances(selector, [view])
        if distances is None:
            selections.append(None)
            continue
        preference = _preference(selector, group, view)
        chosen = heads_of_layer(
            distances, n_sharing=n // n_shared, n_keep=count, preference=preference, **selector.rules
        )
        selections.append(chosen.expanded(view.component_of))
    return selections


def _preference(selector: CoSePSelector, group: Any, view: GroupView) -> Tensor | None:
    """What decides which head of a cluster is kept; the medoid where only clusters of channels can tell."""
    preference = selector.preference(group, view)
    return None if callable(preference) else preference


def _select_in_model(
    selector: CoSePSelector,
    groups: Sequence[Any],
    views: Sequence[GroupView],
    numbers: list[tuple[int, int]],
    n_keep: int | None,
) -> list[ChannelSelection | None]:
    if any(n != n_shared for n, n_shared in numbers):
        raise InputError(
            "scope='model': expected as many key-value heads as query heads, got fewer; use scope='layer'."
        )
    # Layers that were not measured have no place in the common space.
    known = [i for i, view in enumerate(views) if head_distances(selector, [view]) is not None]
    selections: list[ChannelSelection | None] = [None] * len(views)
    distances = head_distances(selector, [views[i] for i in known]) if known else None
    if distances is None:
        return selections
    preferences = [p for i in known if (p := _preference(selector, groups[i], views[i])) is not None]
    parts = heads_of_model(
        distances,
        [views[i].n_components for i in known],
        n_keep=n_keep,
        preference=torch.cat(preferences) if len(preferences) == len(known) else None,
        **selector.rules,
    )
    for i, part in zip(known, parts, strict=True):
        selections[i] = part.expanded(views[i].component_of)
    return selections


def head_distances(selector: CoSePSelector, views: Sequence[GroupView]) -> Tensor | None:
    """Distances between the heads of one or more attention groups, those of all groups one after another.

    Args:
        selector: A fitted selector.
        views: Groups read with heads as components.

    Returns:
        ``[heads, heads]`` float64, or ``None`` if a group was not measured.

    Raises:
        NotFittedError: If the selector was not fitted.
        InputError: If what was measured does not fit the layers.
    """
    selector.check_fitted()
    if selector.metric != ATTENTION_JS:
        return selector.space.head_distances(views)
    maps = []
    for view in views:
        of_layer = next((selector.attention[m.name] for m in view.producers if m.name in selector.attention), None)
        if of_layer is None:
            return None
        if len(of_layer) != view.n_components:
            raise InputError(
                f"layer {view.name!r}: attention maps cover {len(of_layer)} heads, the layer has "
                f"{view.n_components}; call fit() again after pruning (iterative_steps: pass loader= to CoSePPruner)."
            )
        maps.append(of_layer)
    return jensen_shannon_distances(torch.cat(maps))


def with_head_scores(
    selector: CoSePSelector, group: Any, scores: Tensor | None, num_heads: Mapping[nn.Module, int]
) -> Tensor | None:
    """Scores of an attention group's channels that rank its heads too; those of any other group as they are.

    A score is that of the dimension plus that of the head, one of them centred: the heads', so that averages
    over heads are the dimensions' scores, or with ``scope="model"`` the dimensions'.

    Args:
        selector: A fitted selector.
        group: A ``tp.Group`` with all channels.
        scores: ``[channels]`` of its dimensions, if they were measured.
        num_heads: Number of heads by attention layer.

    Returns:
        ``[channels]``, or ``None`` if neither was measured.
    """
    if side_of(group) != "in" or not attention_layers_of(group, num_heads):
        return scores
    groups, mine = [group], 0
    if selector.scope == "model":
        groups = attention_groups(group._DG, num_heads, ROOT_TYPES)
        mine = [g[0].dep.target.module for g in groups].index(group[0].dep.target.module)
    heads = select_heads(selector, groups, num_heads)[mine]
    if heads is None or scores is None:
        return scores if heads is None else heads.scores
    if selector.scope == "model":
        return heads.scores + scores - scores.mean()
    return scores + heads.scores - heads.scores.mean()
