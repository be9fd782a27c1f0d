"""From distances between components to a selection: how many are kept, which, and in what order.

Letters: n components, D ``[n, n]`` distances, e ``[n]`` weights (1 by default), TD(S) = Σ_i e_i min_{j ∈ S} D_ij the
total deviation of a kept set S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from heapq import heapify, heappop, heapreplace

import numpy as np
import torch
from torch import Tensor

from tp_cosep.errors import InputError
from tp_cosep.functional.distances import check_distances
from tp_cosep.functional.elimination import Elimination
from tp_cosep.functional.kmedoids import KMedoids, check_point_weights
from tp_cosep.functional.knee import Knee, find_knee, guarded_count
from tp_cosep.functional.silhouette import SilhouetteCurve
from tp_cosep.functional.swap_table import Assignment, Floats, Indices, few_threads

__all__ = ["ChannelSelection", "check_n_keep", "nested_scores", "select_by_elimination", "select_channels"]

# Least retained variance at the guarded knee of an elimination.
_RETAINED = 0.98
# Least weighted coverage at the guarded knee of weighted medoids: where few components hold nearly all weight, the
# silhouette's knee is at a handful.
_COVERED = 0.95


@dataclass(frozen=True)
class ChannelSelection:
    """The channels of a group that are kept, and why.

    Attributes:
        n_channels: Number of channels of the group.
        keep_idxs: Channels kept, ascending.
        prune_idxs: Channels removed, ascending.
        medoids: The medoid of every cluster, ascending: the representatives themselves unless another rule chose them.
            These are indices of components: channels, or slots of channel groups.
        labels: For every component the position of its cluster in ``medoids``.
        k: Number of clusters, and of components kept. Where a pruner ranked several layers for one ratio,
            ``keep_idxs`` holds the channels kept by that ranking, and k the selector's own count.
        ks: Numbers of clusters that were tried, ascending. With a fixed count these are checkpoints alone, see
            :class:`tp_cosep.functional.kmedoids.GrowingPath`.
        mss: The criterion at each of ``ks``.
        knee_k: Number of clusters at the knee of ``mss``, whether or not it decided k; ``None`` if there is no knee.
            With a fixed count and more than 32 components it is a checkpoint.
        knee_strength: Height of the knee over the straight line, in [0, 1]; 0 if there is no knee.
        scores: ``[n_channels]`` float64 on the CPU, higher = keep, no two components equal. The ``k`` best are exactly
            the selection; any other number of the best is the selection nested around it.
        criterion: The quantity in ``mss``: ``"silhouette"``, the Mean Simplified Silhouette;
            ``"retained variance"``, the share of the consumers' outputs that is retained
            (:func:`select_by_elimination`); or ``"retained score"``, the share of an importance's scores
            (:func:`tp_cosep.functional.ranking.select_by_scores`), whose ``scores`` are the importance's own.
    """

    n_channels: int
    keep_idxs: tuple[int, ...]
    prune_idxs: tuple[int, ...]
    medoids: tuple[int, ...]
    labels: tuple[int, ...]
    k: int
    ks: tuple[int, ...]
    mss: tuple[float, ...]
    knee_k: int | None
    knee_strength: float
    scores: Tensor
    criterion: str = "silhouette"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelSelection):
            return NotImplemented
        names = (f.name for f in fields(self) if f.name != "scores")
        return all(getattr(self, n) == getattr(other, n) for n in names) and torch.equal(self.scores, other.scores)

    def __hash__(self) -> int:
        return hash((self.n_channels, self.keep_idxs, self.labels))

    def expanded(self, component_of: Tensor) -> ChannelSelection:
        """The selection of channels that a selection of components implies.

        Args:
            component_of: ``[channels]`` int64, the component of every channel.

        Returns:
            The same selection, in which a channel is kept if its component is; the selection itself if every channel
            is a component of its own.
        """
        components: list[int] = component_of.tolist()
        if components == list(range(self.n_channels)):
            return self
        kept = set(self.keep_idxs)
        return replace(
            self,
            n_channels=len(components),
            keep_idxs=tuple(i for i, c in enumerate(components) if c in kept),
            prune_idxs=tuple(i for i, c in enumerate(components) if c not in kept),
            scores=self.scores[component_of],
        )

    def first_channels(self, n: int) -> ChannelSelection:
        """The selection among the first n channels alone.

        Args:
            n: Number of channels; the selection is repeated in the channels after them, which were pruned.

        Returns:
            The selection; itself if it has n channels already.
        """
        if n == self.n_channels:
            return self
        return replace(
            self,
            n_channels=n,
            keep_idxs=tuple(i for i in self.keep_idxs if i < n),
            prune_idxs=tuple(i for i in self.prune_idxs if i < n),
            scores=self.scores[:n],
        )


def select_channels(
    distances: Tensor,
    *,
    weights: Tensor | None = None,
    losses: Callable[[Tensor], Tensor] | None = None,
    n_keep: int | None = None,
    knee: str = "guarded",
    backend: str = "native",
    preference: Tensor | Callable[[Tensor], Tensor] | None = None,
    round_to: int | None = None,
) -> ChannelSelection:
    """Cluster components by k-medoids and keep one of every cluster.

    Source: CoSeP (arXiv 2505.13225), section 3. Departures: the default knee is the guarded one, components may have
    weights, and any member of a cluster may represent it.

    Args:
        distances: ``[n, n]``, see :func:`tp_cosep.functional.distances.check_distances`.
        weights: ``[n]``, see :func:`tp_cosep.functional.kmedoids.k_medoids`; all 1 as published. With weights the
            guarded knee keeps at least as many components as cover 95 %, see
            :meth:`tp_cosep.functional.silhouette.SilhouetteCurve.coverage`.
        losses: What pruning costs, in place of deviations, for the scores: a function of the order ``[n]`` in which
            components are pruned, from the first, that returns the loss ``[n]`` of each after those before it, ≥ 0.
        n_keep: Number to keep, in 1 … n; by default the knee of the MSS curve decides.
        knee: How the knee is chosen, one of :data:`tp_cosep.functional.knee.KNEE_RULES`.
        backend: Solver, see :func:`tp_cosep.functional.kmedoids.k_medoids`.
        preference: ``[n]``, or a function of the labels ``[n]`` that returns it; the most preferred member of a
            cluster is kept (the lowest index on ties). By default the medoid is kept.
        round_to: A step ≥ 1. k moves to a multiple of the step: of the nearest multiples below and above k, within
            step … n, the one whose MSS differs least from MSS(k), the larger one on ties. All n are kept if n is
            less than the step.

    Returns:
        The selection, one component per channel. One is kept if all components
        coincide, and all are if the curve has no knee.

    Raises:
        InputError: If an argument is not valid.

    Example:
        >>> x = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 5.2, 9.0, 9.1, 9.2])
        >>> select_channels((x[:, None] - x).abs()).keep_idxs
        (1, 4, 7)
    """
    d = check_distances(distances)
    n = len(d)
    check_n_keep(n_keep, n)
    if round_to is not None and (not isinstance(round_to, int) or round_to < 1):
        raise InputError(f"selection: expected an integer round_to ≥ 1, got {round_to!r}.")
    with few_threads(d):
        e = None if weights is None else check_point_weights(weights, n)
        curve = SilhouetteCurve(d, weights=e, backend=backend)
        ks = curve.ks_for(knee, fine=n_keep is None)
        mss = [curve.mss(k) for k in ks]
        found = find_knee(ks, mss, knee)
        k = n_keep if n_keep is not None else _count(d, curve, found, knee, is_weighted=e is not None)
        if round_to is not None:
            k = _rounded(k, round_to, n, curve.mss)
        solution = curve.solution(k)
    keep = _representatives(solution, preference)
    kept = set(keep.tolist())
    return ChannelSelection(
        n_channels=n,
        keep_idxs=tuple(sorted(kept)),
        prune_idxs=tuple(i for i in range(n) if i not in kept),
        medoids=tuple(solution.medoids.tolist()),
        labels=tuple(solution.labels.tolist()),
        k=k,
        ks=tuple(ks),
        mss=tuple(mss),
        knee_k=found.k,
        knee_strength=found.strength,
        scores=nested_scores(d, keep, e, losses),
    )


def select_by_elimination(
    elimination: Elimination,
    distances: Tensor,
    *,
    n_keep: int | None = None,
    knee: str = "guarded",
    round_to: int | None = None,
) -> ChannelSelection:
    """Keep the components that are eliminated last.

    The curve in place of the Mean Simplified Silhouette is the *retained variance*,

        r(k) = 1 − Σ_{i ≤ n − k} cost_i / Σ_i cost_i,

    the share of the elimination's costs that is avoided when k components are kept; r(n) = 1. The guarded knee keeps at
    least as many components as retain 98 %.

    Args:
        elimination: Order and costs, see :func:`tp_cosep.functional.elimination.backward_elimination`.
        distances: ``[n, n]``; every pruned component gets the label of the nearest kept one.
        n_keep: Number to keep, in 1 … n; by default the knee of the retained variance decides.
        knee: How the knee is chosen, one of :data:`tp_cosep.functional.knee.KNEE_RULES`.
        round_to: A step ≥ 1; k moves to the multiple whose retained variance differs least, see
            :func:`select_channels`.

    Returns:
        The selection; its ``mss`` is the retained variance, its ``medoids`` are the kept components.

    Raises:
        InputError: If an argument is not valid.
    """
    n = len(elimination.order)
    check_n_keep(n_keep, n)
    total = float(elimination.costs.sum())
    lost = elimination.costs.cumsum(0).flip(0)  # at k = 0, 1, …, n − 1
    retained = [1 - float(x) / total if total > 0 else 1.0 for x in lost[1:]] + [1.0]
    ks = range(1, n + 1)
    found = find_knee(ks, retained, knee)
    k = n_keep if n_keep is not None else found.k or n
    if n_keep is None and knee == "guarded":
        k = max(k, next(i for i in ks if retained[i - 1] >= _RETAINED))
    if round_to is not None:
        k = _rounded(k, round_to, n, lambda i: retained[i - 1])
    order = elimination.order
    keep = order[n - k :].sort().values
    # Costs grow along the order, but for rounding and the constraint of clusters.
    shares = (elimination.costs / total if total > 0 else elimination.costs).cummax(0).values
    scores = torch.empty(n, dtype=torch.float64)
    scores[order] = shares + 1e-6 * torch.arange(1, n + 1, dtype=torch.float64) / n
    pruned = order[: n - k].sort().values
    labels = distances.cpu()[:, keep].argmin(1)
    labels[keep] = torch.arange(k)
    return ChannelSelection(
        n_channels=n,
        keep_idxs=tuple(keep.tolist()),
        prune_idxs=tuple(pruned.tolist()),
        medoids=tuple(keep.tolist()),
        labels=tuple(labels.tolist()),
        k=k,
        ks=tuple(ks),
        mss=tuple(retained),
        knee_k=found.k,
        knee_strength=found.strength,
        scores=scores,
        criterion="retained variance",
    )


def check_n_keep(n_keep: int | None, n: int) -> None:
    """Check a requested number of components.

    Args:
        n_keep: The number to keep, or ``None`` if it is not requested.
        n: The number of components.

    Raises:
        InputError: If it is not an integer in 1 … n.
    """
    if n_keep is not None and (not isinstance(n_keep, (int, np.integer)) or not 1 <= n_keep <= n):
        raise InputError(f"selection: expected n_keep in 1 … {n} (the number of components), got {n_keep}.")


def _count(d: Tensor, curve: SilhouetteCurve, knee: Knee, rule: str, *, is_weighted: bool) -> int:
    """Number to keep: the knee's k, all if there is no knee, one if all components coincide."""
    if not d.any():
        return 1
    if knee.k is None:
        return len(d)
    if rule != "guarded" or knee.k == len(d):
        return knee.k
    k = guarded_count(len(d), knee.k, curve.represented(knee.k))
    return _covering(curve, k, len(d)) if is_weighted else k


def _covering(curve: SilhouetteCurve, k: int, n: int) -> int:
    """The least number from k on at which the coverage suffices, by bisection."""
    if curve.coverage(k) >= _COVERED:
        return k
    low, high = k, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if curve.coverage(middle) >= _COVERED else (middle, high)
    return high


def _rounded(k: int, step: int, n: int, mss: Callable[[int], float]) -> int:
    """The multiple of the step next to k whose MSS differs least from MSS(k); n if there is none within n."""
    multiples = [m for m in (k // step * step, -(-k // step) * step) if step <= m <= n]
    # The larger one first, so that it is taken on ties; rounded, so that rounding errors do not decide them.
    return min(reversed(multiples), key=lambda m: round(abs(mss(m) - mss(k)), 12), default=n)


def _representatives(solution: KMedoids, preference: Tensor | Callable[[Tensor], Tensor] | None) -> Tensor:
    if preference is None:
        return solution.medoids
    if callable(preference):
        preference = preference(solution.labels)
    preference = preference.detach().to("cpu", torch.float64)
    if preference.shape != (len(solution.labels),):
        raise InputError(
            f"selection: expected one preference per component, shape ({len(solution.labels)},), "
            f"got {tuple(preference.shape)}."
        )
    if torch.isnan(preference).any():
        raise InputError("selection: got NaN preferences; check the importance that chooses the representatives.")
    labels = solution.labels.cpu()
    chosen = [
        members[preference[members].argmax()] for members in ((labels == j).nonzero()[:, 0] for j in range(solution.k))
    ]
    return torch.stack(chosen).sort().values


def nested_scores(
    d: Tensor,
    keep: Tensor,
    weights: Tensor | None = None,
    losses: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Scores that order all components around a kept set.

    Kept components are dropped in the order of their cost TD(S ∖ j) − TD(S), smallest first; the others are added in
    the order of their gain TD(S) − TD(S ∪ j), largest first. A score is that cost or gain as a share of TD of the best
    single medoid, so that scores of different groups are comparable. Costs grow as the set shrinks and gains shrink as
    it grows, so shares fall along the order (they are clipped to do so where a representative is not its cluster's
    medoid). A tie-break that falls by less than 1e-6 over the whole order makes all scores distinct.

    If ``losses`` are given, a score is the share of the sum of losses instead, in the same order; losses that fall
    along it are pooled to their mean (isotonic regression), which leaves the loss of the whole group as it is.

    Args:
        d: ``[n, n]`` distances.
        keep: ``[k]`` indices of the kept set, k ≥ 1.
        weights: ``[n]`` float64 on the CPU, of the components.
        losses: See :func:`select_channels`.

    Returns:
        ``[n]`` float64 on the CPU, in (0, 1 + 1e-6].
    """
    n = len(d)
    by_point, kept = d.cpu().numpy(), keep.cpu().numpy()
    by_medoid = by_point
    if weights is not None:
        e = weights.numpy()
        by_point, by_medoid = by_point * e[:, None], by_medoid * e
    dropped, costs = _drop_order(by_medoid, by_point, kept)
    added, gains = _add_order(by_medoid, by_point, kept)
    order = np.concatenate([dropped[::-1], added])
    shares = np.concatenate([costs[::-1], gains])
    single = by_point.sum(0).min()
    if single > 0:
        shares = np.minimum(shares / single, 1)
    # Made to fall along the order: every share is at least the largest after it.
    shares = np.maximum.accumulate(shares[::-1])[::-1]
    if losses is not None:
        shares = _pooled(losses(torch.from_numpy(order[::-1].copy())).cpu().numpy())[::-1]
    scores = np.empty(n)
    scores[order] = shares + 1e-6 * np.arange(n, 0, -1) / n
    return torch.from_numpy(scores)


def _pooled(losses: Floats) -> Floats:
    """Losses as shares of their sum, pooled so that they never fall."""
    from scipy.optimize import isotonic_regression  # takes a fifth of a second

    total = losses.sum()
    pooled: Floats = isotonic_regression(losses / total if total > 0 else losses).x
    return pooled


def _drop_order(by_medoid: Floats, by_point: Floats, keep: Indices) -> tuple[Indices, Floats]:
    """Kept components in the order in which they are dropped, and the cost of each."""
    kept, k = Assignment(by_medoid, keep, by_point), len(keep)
    own, second, d1, d2 = kept.own, kept.second, kept.d1, kept.d2
    distances, dropped = by_medoid.take(keep, 0).T.copy(), np.zeros(k)  # dropped: infinite for slots dropped already
    order, costs = np.empty(k, np.int64), np.empty(k)
    for i in range(k - 1):
        loss = np.bincount(own, d2 - d1, k) + dropped
        cheapest = int(loss.argmin())
        order[i], costs[i] = cheapest, loss[cheapest]
        dropped[cheapest] = np.inf
        lost = ((own == cheapest) | (second == cheapest)).nonzero()[0]
        rows, at = distances.take(lost, 0) + dropped, np.arange(len(lost))
        for slots, nearest in ((own, d1), (second, d2)):
            best = rows.argmin(1)
            slots[lost], nearest[lost] = best, rows[at, best]
            rows[at, best] = np.inf
    # Nothing represents the last one: its cost is the whole deviation.
    order[-1], costs[-1] = dropped.argmin(), by_point.sum(0).min()
    return keep[order], costs


def _add_order(by_medoid: Floats, by_point: Floats, keep: Indices) -> tuple[Indices, Floats]:
    """Other components in the order in which they are added, and the gain of each."""
    nearest = by_medoid.take(keep, 0).min(0)
    gain = np.zeros(len(nearest))
    for start in range(0, len(nearest), 32):
        further = nearest[start : start + 32, None] - by_point[start : start + 32]
        gain += np.maximum(further, 0, out=further).sum(0)
    is_kept = np.zeros(len(nearest), dtype=bool)
    is_kept[keep] = True
    # Gains only shrink as components are added: one that is still the largest after an update is the largest of all.
    heap = [(-g, i) for i, g in enumerate(gain.tolist()) if not is_kept[i]]
    heapify(heap)
    order, gains = [], []
    newest = -1  # the component whose gain was updated after the last addition
    while heap:
        negative, best = heap[0]
        further = nearest - by_medoid[best]
        if best != newest and negative < 0:
            newest = best
            heapreplace(heap, (-float(np.maximum(further, 0).sum()), best))
            continue
        heappop(heap)
        order.append(best)
        gains.append(-negative)
        nearest -= np.maximum(further, 0)
        newest = -1
    return np.array(order, np.int64), np.array(gains)
