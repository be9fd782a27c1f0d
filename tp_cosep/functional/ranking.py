"""Selection by scores: the components with the highest ones are kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tp_cosep.errors import InputError
from tp_cosep.functional.selection import ChannelSelection, check_n_keep

__all__ = ["heads_by_scores", "select_by_scores"]


def select_by_scores(scores: Tensor, *, n_keep: int | None = None) -> ChannelSelection:
    """Keep the components with the highest scores, as most pruning methods do.

    The curve is the *retained score*, the share of the scores' sum that the k best hold,

        r(k) = Σ_{i ≤ k} max(s_(i), 0) / Σ_i max(s_i, 0),  s_(1) ≥ s_(2) ≥ …,

    for a report; no knee is read from it, since importances promise an order and no scale. Components are not
    clustered; each is a cluster of its own.

    Args:
        scores: ``[n]``, finite, higher = keep.
        n_keep: Number to keep, in 1 … n; all by default.

    Returns:
        The selection, with r(1) … r(n) as its ``mss``, all 1 if no score is positive. On ties the lowest index is kept.

    Raises:
        InputError: If scores are not finite, or the number is out of range.

    Example:
        >>> select_by_scores(torch.tensor([3.0, 1.0, 2.0, 2.0]), n_keep=2).keep_idxs
        (0, 2)
    """
    scores = scores.detach().to("cpu", torch.float64)
    if scores.ndim != 1 or not len(scores) or not torch.isfinite(scores).all():
        raise InputError(f"scores: expected finite numbers of shape [n], n ≥ 1, got {scores}.")
    n = len(scores)
    check_n_keep(n_keep, n)
    k = n if n_keep is None else n_keep
    order = scores.argsort(descending=True, stable=True)
    sums = scores[order].clamp(min=0).cumsum(0)
    retained = sums / sums[-1] if sums[-1] > 0 else torch.ones(n)
    each = tuple(range(n))
    return ChannelSelection(
        n_channels=n,
        keep_idxs=tuple(order[:k].sort().values.tolist()),
        prune_idxs=tuple(order[k:].sort().values.tolist()),
        medoids=each,
        labels=each,
        k=k,
        ks=tuple(range(1, n + 1)),
        mss=tuple(retained.tolist()),
        knee_k=None,
        knee_strength=0.0,
        scores=scores,
        criterion="retained score",
    )


def heads_by_scores(scores: Tensor, *, n_sharing: int = 1, n_keep: int | None = None) -> ChannelSelection:
    """Keep the attention heads with the highest scores.

    Args:
        scores: ``[heads]``, finite, higher = keep.
        n_sharing: Number of consecutive query heads that share keys and values. If several do, the same number is kept
            in every such block, as in :func:`tp_cosep.functional.head_selection.heads_of_layer`.
        n_keep: Number of heads to keep, in 1 … heads; all by default.

    Returns:
        The selection, one component per head.

    Raises:
        InputError: If an argument is not valid.
    """
    whole = select_by_scores(scores, n_keep=n_keep)
    n = whole.n_channels
    if n_sharing in (1, n):
        return whole
    n_blocks = n // n_sharing
    each = max(1, whole.k // n_blocks)
    best = whole.scores.view(n_blocks, n_sharing).argsort(dim=1, descending=True, stable=True)[:, :each]
    keep = (best + n_sharing * torch.arange(n_blocks)[:, None]).flatten().sort().values.tolist()
    kept = set(keep)
    pruned = tuple(i for i in range(n) if i not in kept)
    return replace(whole, keep_idxs=tuple(keep), prune_idxs=pruned, k=len(keep))
