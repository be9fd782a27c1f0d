"""From distances between attention heads to the heads that are kept, in one layer or over the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tp_cosep.errors import InputError
from tp_cosep.functional.selection import ChannelSelection, select_channels

__all__ = ["heads_of_layer", "heads_of_model"]


def heads_of_layer(
    distances: Tensor,
    *,
    n_sharing: int = 1,
    n_keep: int | None = None,
    weights: Tensor | None = None,
    preference: Tensor | None = None,
    **rules: Any,
) -> ChannelSelection:
    """Select heads of one layer.

    Args:
        distances: ``[heads, heads]``.
        n_sharing: Number of consecutive query heads that share keys and values. If several do, the same number of heads
            is kept in every such block, by a selection of its own; the layer's count is divided by the number of
            blocks and rounded down, as in Torch-Pruning's pruner.
        n_keep: Number of heads to keep, in 1 … heads; by default the knee decides.
        weights: ``[heads]``, how much each counts; by default all alike.
        preference: ``[heads]``; the most preferred head of a cluster is kept, by default the medoid.
        **rules: Further options of :func:`tp_cosep.functional.selection.select_channels`.

    Returns:
        The selection, one component per head.

    Raises:
        InputError: If an argument is not valid.
    """
    whole = select_channels(distances, n_keep=n_keep, weights=weights, preference=preference, **rules)
    if n_sharing == 1 or n_sharing == len(distances):
        return whole
    starts = range(0, len(distances), n_sharing)
    each = max(1, whole.k // len(starts))
    blocks = [
        select_channels(
            distances[at : at + n_sharing, at : at + n_sharing],
            n_keep=each,
            weights=None if weights is None else _in_block(weights[at : at + n_sharing]),
            preference=None if preference is None else preference[at : at + n_sharing],
            **rules,
        )
        for at in starts
    ]
    return replace(
        whole,
        keep_idxs=tuple(at + i for at, block in zip(starts, blocks, strict=True) for i in block.keep_idxs),
        prune_idxs=tuple(at + i for at, block in zip(starts, blocks, strict=True) for i in block.prune_idxs),
        medoids=tuple(at + i for at, block in zip(starts, blocks, strict=True) for i in block.medoids),
        labels=tuple(each * b + label for b, block in enumerate(blocks) for label in block.labels),
        k=each * len(blocks),
        scores=torch.cat([block.scores for block in blocks]),
    )


def heads_of_model(
    distances: Tensor,
    sizes: Sequence[int],
    *,
    n_keep: int | None = None,
    weights: Tensor | None = None,
    preference: Tensor | None = None,
    **rules: Any,
) -> list[ChannelSelection]:
    """Select heads of all layers together, at least one in each.

    The best-scored head of every layer is kept, and the best of all others up to the count: a selection over the whole
    model alone could leave a layer without heads.

    Source: CAHP (arXiv 2606.19150). Departure: at least one head is kept in every layer.

    Args:
        distances: ``[heads, heads]``, the heads of all layers one after another.
        sizes: Number of heads of every layer.
        n_keep: Number of heads to keep over all layers; at least one is kept in each. By default the knee decides.
        weights: ``[heads]``, how much each counts; by default all alike.
        preference: ``[heads]``; the most preferred head of a cluster is kept, by default the medoid.
        **rules: Further options of :func:`tp_cosep.functional.selection.select_channels`.

    Returns:
        The selection of every layer, one component per head. Curves and knees are those of the whole model; a layer's
        medoids are its kept heads, and its clusters the heads nearest to each.

    Raises:
        InputError: If an argument is not valid, or ``sizes`` do not add up to the number of heads.
    """
    if sum(sizes) != len(distances):
        raise InputError(f"heads: expected the sizes of the layers to add up to {len(distances)}, got {list(sizes)}.")
    whole = select_channels(distances, n_keep=n_keep, weights=weights, preference=preference, **rules)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    ranges = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    order: list[int] = whole.scores.argsort(descending=True).tolist()
    best = {max(heads, key=lambda h: float(whole.scores[h])) for heads in ranges}
    rest = [h for h in order if h not in best]
    kept = best | set(rest[: max(0, whole.k - len(best))])
    return [_in_layer(whole, distances, heads, kept) for heads in ranges]


def _in_block(weights: Tensor) -> Tensor | None:
    """Weights within a part of the heads; none, if all of them are 0."""
    return weights if weights.any() else None


def _in_layer(whole: ChannelSelection, distances: Tensor, heads: range, kept: set[int]) -> ChannelSelection:
    keep = tuple(i for i, head in enumerate(heads) if head in kept)
    block = distances[heads.start : heads.stop, heads.start : heads.stop].cpu()
    labels = block[:, list(keep)].argmin(1)
    labels[list(keep)] = torch.arange(len(keep))
    return replace(
        whole,
        n_channels=len(heads),
        keep_idxs=keep,
        prune_idxs=tuple(i for i in range(len(heads)) if i not in keep),
        medoids=keep,
        labels=tuple(labels.tolist()),
        k=len(keep),
        scores=whole.scores[heads.start : heads.stop],
    )
