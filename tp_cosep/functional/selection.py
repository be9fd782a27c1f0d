"""From distances between components to a selection: how many are kept, which, and in what order.

Letters: D ``[n, n]`` distances, TD(S) = Σ_i min_{j ∈ S} D_ij the total deviation of a kept set S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from heapq import heapify, heappop, heapreplace

import numpy as np
import torch
from torch import Tensor

from tp_cosep.errors import InputError
from tp_cosep.functional.elimination import Elimination
from tp_cosep.functional.kmedoids import KMedoids, check_distances
from tp_cosep.functional.knee import Knee, KneeMethod, find_knee, guarded_count
from tp_cosep.functional.silhouette_curve import Curve
from tp_cosep.functional.swap_table import Assignment, Floats, Indices, few_threads

__all__ = ["ChannelSelection", "select_by_elimination", "select_channels"]

# Column subsets: the knee is taken at its word where what is kept covers this share of the readers' outputs.
_RETAINED = 0.98


@dataclass(frozen=True)
class ChannelSelection:
    """What is kept of a group of channels, and why.

    Attributes:
        n_channels: Channels of the group.
        keep_idxs: Channels kept, ascending.
        prune_idxs: Channels removed, ascending.
        medoids: The medoid of every cluster, ascending: the representatives themselves unless another
            rule chose them. In components (see :mod:`tp_cosep.graph.groups`): channels, or slots of channel groups.
        labels: For every component the position of its cluster in ``medoids``.
        k: Number of clusters, and of components kept; where a pruner ranked several layers for one ratio,
            ``keep_idxs`` has what that left, and k is CoSeP's own count.
        ks: The numbers of clusters that were tried, ascending: fewer, and none between checkpoints (see
            :class:`tp_cosep.functional.kmedoids.GrowingPath`), where the count was given.
        mss: The criterion at each of them.
        knee_k: Where the knee of ``mss`` is, whether or not it decided k (then it is a checkpoint, for more than 32
            components); ``None`` if there is none.
        knee_strength: Height of the knee over the straight line, 0 … 1; 0 if there is none.
        scores: ``[n_channels]`` float64 on the CPU, higher = keep, no two components equal. The ``k`` best
            are exactly the selection; any other number of the best is the selection nested around it.
        criterion: What ``mss`` holds: ``"silhouette"``, the Mean Simplified Silhouette, or ``"retained variance"``, the share of
            what readers see that is kept (:func:`select_by_elimination`).
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
        """The selection among the channels behind the components.

        Args:
            component_of: ``[channels]``, the component of every channel.

        Returns:
            The same selection, a channel being kept if its component is; the selection itself if every channel is
            a component of its own.
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
        """The selection among the first n channels, after others behind them went that it is repeated in."""
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
    n_keep: int | None = None,
    knee: KneeMethod | None = None,
    mss_form: str = "paper",
    backend: str = "native",
    preference: Tensor | Callable[[Tensor], Tensor] | None = None,
    round_to: int | None = None,
) -> ChannelSelection:
    """Cluster components by k-medoids and keep one of every cluster.

    Args:
        distances: ``[n, n]``, see :func:`tp_cosep.functional.kmedoids.check_distances`.
        n_keep: Number to keep, 1 … n; by default the knee of the MSS curve decides.
        knee: How the knee is found.
        mss_form: See :func:`tp_cosep.functional.silhouette.mean_simplified_silhouette`.
        backend: See :func:`tp_cosep.functional.kmedoids.k_medoids`.
        preference: ``[n]``; the most preferred member of a cluster is kept (the lowest index on ties). By
            default the medoid is.
        round_to: A step ≥ 1. Whatever decided k, it moves to a multiple of the step: of the next below and the
            next above k, within step … n, the one whose MSS differs least from MSS(k), the larger one if both
            differ as much. All n are kept if n is less than the step.

    Returns:
        The selection, one component per channel.

    Raises:
        InputError: If an argument is not valid.

    Example:
        >>> x = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 5.2, 9.0, 9.1, 9.2])
        >>> select_channels((x[:, None] - x).abs()).keep_idxs
        (1, 4, 7)
    """
    d = check_distances(distances)
    n = len(d)
    if n_keep is not None and (not isinstance(n_keep, (int, np.integer)) or not 1 <= n_keep <= n):
        raise InputError(f"selection: expected n_keep in 1 … {n} (the number of components), got {n_keep}.")
    if round_to is not None and (not isinstance(round_to, int) or round_to < 1):
        raise InputError(f"selection: expected an integer round_to ≥ 1, got {round_to!r}.")
    knee = knee or KneeMethod()
    with few_threads(d):
        curve = Curve(d, form=mss_form, backend=backend)
        ks = curve.ks_for(knee, fine=n_keep is None)
        mss = [curve.mss(k) for k in ks]
        found = find_knee(ks, mss, knee)
        k = n_keep if n_keep is not None else _count(d, curve, found, knee)
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
        scores=nested_scores(d, keep),
    )


def select_by_elimination(
    elimination: Elimination,
    distances: Tensor,
    *,
    n_keep: int | None = None,
    knee: KneeMethod | None = None,
    round_to: int | None = None,
) -> ChannelSelection:
    """Choose by the order in which components can be done without.

    The curve in place of the Mean Simplified Silhouette is the *coverage*: the share of all costs that is avoided when
    k are kept, 1 at k = n. A knee rule of ``"guarded"`` keeps at least as many as cover 98 %.

    Args:
        elimination: See :func:`tp_cosep.functional.elimination.backward_elimination`.
        distances: ``[n, n]``, to say which kept component stands for one that goes.
        n_keep: Keep exactly this many; the knee of the coverage decides if not given.
        knee: How the knee is found.
        round_to: As for :func:`select_channels`.

    Returns:
        The selection, its ``mss`` the coverage and its ``medoids`` what is kept.

    Raises:
        InputError: If an argument is not valid.
    """
    n = len(elimination.order)
    if n_keep is not None and not 1 <= n_keep <= n:
        raise InputError(f"selection: expected n_keep in 1 … {n} (the number of components), got {n_keep}.")
    knee = knee or KneeMethod()
    total = float(elimination.costs.sum())
    lost = elimination.costs.cumsum(0).flip(0)  # at k = 0, 1, …, n − 1
    retained_variance = [1 - float(x) / total if total > 0 else 1.0 for x in lost[1:]] + [1.0]
    ks = range(1, n + 1)
    found = find_knee(ks, retained_variance, knee)
    k = n_keep if n_keep is not None else found.k or n
    if n_keep is None and knee.rule == "guarded":
        k = max(k, next(i for i in ks if retained_variance[i - 1] >= _RETAINED))
    if round_to is not None:
        k = _rounded(k, round_to, n, lambda i: retained_variance[i - 1])
    order = elimination.order
    keep = order[n - k :].sort().values
    # Costs only grow as less is left; where rounding or the constraint of clusters says otherwise, they are made to.
    shares = (elimination.costs / total if total > 0 else elimination.costs).cummax(0).values
    scores = torch.empty(n, dtype=torch.float64)
    scores[order] = shares + 1e-6 * torch.arange(1, n + 1, dtype=torch.float64) / n
    gone = order[: n - k].sort().values
    labels = distances.cpu()[:, keep].argmin(1)
    labels[keep] = torch.arange(k)
    return ChannelSelection(
        n_channels=n,
        keep_idxs=tuple(keep.tolist()),
        prune_idxs=tuple(gone.tolist()),
        medoids=tuple(keep.tolist()),
        labels=tuple(labels.tolist()),
        k=k,
        ks=tuple(ks),
        mss=tuple(retained_variance),
        knee_k=found.k,
        knee_strength=found.strength,
        scores=scores,
        criterion="retained variance",
    )


def _count(d: Tensor, curve: Curve, knee: Knee, method: KneeMethod) -> int:
    """Number to keep: the knee's k, all where there is no knee, one where all components are alike."""
    if not d.any():
        return 1
    if knee.k is None:
        return len(d)
    if method.rule != "guarded" or knee.k == len(d):
        return knee.k
    return guarded_count(len(d), knee.k, curve.represented(knee.k))


def _rounded(k: int, step: int, n: int, mss: Callable[[int], float]) -> int:
    """The multiple of a step next to k whose MSS differs least from that of k; all n if there is none within n."""
    multiples = [m for m in (k // step * step, -(-k // step) * step) if step <= m <= n]
    # The larger one first, so that it is taken on ties, which rounding must not decide.
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


def nested_scores(d: Tensor, keep: Tensor) -> Tensor:
    """Scores that order all components around a kept set.

    Kept ones are dropped in the order in which losing them costs least, TD(S ∖ j) − TD(S) smallest first;
    the others are added in the order in which they help most, TD(S) − TD(S ∪ j) largest first. A score is
    that cost or gain as a share of TD of the best single medoid, so that scores of different groups
    compare: what the loss of a channel costs its layer. Costs grow as the set shrinks and gains shrink as
    it grows, so shares fall along the order (they are clipped to do so where a representative is not its
    cluster's medoid). A tie-break that falls by less than 1e-6 over the whole order makes all scores
    distinct.

    Args:
        d: ``[n, n]`` distances.
        keep: ``[k]`` indices of the kept set, k ≥ 1.

    Returns:
        ``[n]`` float64 on the CPU, in (0, 1 + 1e-6].
    """
    n = len(d)
    matrix, kept = d.cpu().numpy(), keep.cpu().numpy()
    dropped, costs = _drop_order(matrix, kept)
    added, gains = _add_order(matrix, kept)
    order = np.concatenate([dropped[::-1], added])
    shares = np.concatenate([costs[::-1], gains])
    single = matrix.sum(0).min()
    if single > 0:
        shares = np.minimum(shares / single, 1)
    # Falling from the front: every share is at least the largest one behind it.
    shares = np.maximum.accumulate(shares[::-1])[::-1]
    scores = np.empty(n)
    scores[order] = shares + 1e-6 * np.arange(n, 0, -1) / n
    return torch.from_numpy(scores)


def _drop_order(d: Floats, keep: Indices) -> tuple[Indices, Floats]:
    """Kept components from the cheapest to lose to the dearest, and what each loss costs."""
    left, k = Assignment(d, keep), len(keep)
    own, second, d1, d2 = left.own, left.second, left.d1, left.d2
    distances, gone = d.take(keep, 0).T.copy(), np.zeros(k)
    order, costs = np.empty(k, np.int64), np.empty(k)
    for i in range(k - 1):
        loss = np.bincount(own, d2 - d1, k) + gone
        cheapest = int(loss.argmin())
        order[i], costs[i] = cheapest, loss[cheapest]
        gone[cheapest] = np.inf
        lost = ((own == cheapest) | (second == cheapest)).nonzero()[0]
        rows, at = distances.take(lost, 0) + gone, np.arange(len(lost))
        for slots, nearest in ((own, d1), (second, d2)):
            best = rows.argmin(1)
            slots[lost], nearest[lost] = best, rows[at, best]
            rows[at, best] = np.inf
    # Nothing stands in for the last one: losing it costs everything.
    order[-1], costs[-1] = gone.argmin(), d.sum(0).min()
    return keep[order], costs


def _add_order(d: Floats, keep: Indices) -> tuple[Indices, Floats]:
    """Other components from the most to the least helpful, and what each gains when it is added."""
    nearest = d.take(keep, 0).min(0)
    gain = np.zeros(len(d))
    for start in range(0, len(d), 32):
        further = nearest[start : start + 32, None] - d[start : start + 32]
        gain += np.maximum(further, 0, out=further).sum(0)
    is_kept = np.zeros(len(d), dtype=bool)
    is_kept[keep] = True
    # Gains only shrink as components are added: one that is still the largest after it was counted anew is the largest.
    heap = [(-g, i) for i, g in enumerate(gain.tolist()) if not is_kept[i]]
    heapify(heap)
    order, gains = [], []
    newest = -1  # the one whose gain has been counted since the last addition
    while heap:
        negative, best = heap[0]
        further = nearest - d[best]
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
