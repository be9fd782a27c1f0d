"""From distances between components to a selection: how many are kept, which, and in what order.

Letters: D ``[n, n]`` distances, TD(S) = Σ_i min_{j ∈ S} D_ij the total deviation of a kept set S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tp_cosep.assignment import Assignment, few_threads, sum_by_cluster
from tp_cosep.errors import InputError
from tp_cosep.knee import Knee, KneeMethod, find_knee, guarded_count
from tp_cosep.medoids import KMedoids, check_distances, k_medoids_path
from tp_cosep.silhouette import mean_simplified_silhouette, mss_curve

__all__ = ["ChannelSelection", "select_channels"]


@dataclass(frozen=True)
class ChannelSelection:
    """What is kept of a group of channels, and why.

    Attributes:
        n_channels: Channels of the group.
        keep_idxs: Channels kept, ascending.
        prune_idxs: Channels removed, ascending.
        medoids: The medoid of every cluster, ascending: the representatives themselves unless another
            rule chose them. In components (see :mod:`tp_cosep.groups`): channels, or slots of channel groups.
        labels: For every component the position of its cluster in ``medoids``.
        k: Number of clusters, and of components kept; where a pruner ranked several layers for one ratio,
            ``keep_idxs`` has what that left, and k is CoSeP's own count.
        ks: The numbers of clusters that were tried, ascending.
        mss: Mean Simplified Silhouette of each of them.
        knee_k: Where the knee of ``mss`` is, whether or not it decided k; ``None`` if there is none.
        knee_strength: Height of the knee over the straight line, 0 … 1; 0 if there is none.
        scores: ``[n_channels]`` float64 on the CPU, higher = keep, no two components equal. The ``k`` best
            are exactly the selection; any other number of the best is the selection nested around it.
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
    preference: Tensor | None = None,
    round_to: int | None = None,
) -> ChannelSelection:
    """Cluster components by k-medoids and keep one of every cluster.

    Args:
        distances: ``[n, n]``, see :func:`tp_cosep.medoids.check_distances`.
        n_keep: Number to keep, 1 … n; by default the knee of the MSS curve decides.
        knee: How the knee is found.
        mss_form: See :func:`tp_cosep.silhouette.mean_simplified_silhouette`.
        backend: See :func:`tp_cosep.medoids.k_medoids`.
        preference: ``[n]``; the most preferred member of a cluster is kept (the lowest index on ties). By
            default the medoid is.

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
    if n_keep is not None and not 1 <= n_keep <= n:
        raise InputError(f"selection: expected n_keep in 1 … {n} (the number of components), got {n_keep}.")
    path = k_medoids_path(d, backend=backend)
    with few_threads(d):
        mss = mss_curve(d, path, form=mss_form)
    knee = knee or KneeMethod()
    found = find_knee([s.k for s in path], mss.tolist(), knee)
    k = n_keep if n_keep is not None else _count(d, path, found, knee)
    solution = next((s for s in path if s.k == k), None) or k_medoids_path(d, [k], backend=backend)[0]
    keep = _representatives(solution, preference)
    kept = set(keep.tolist())
    return ChannelSelection(
        n_channels=n,
        keep_idxs=tuple(sorted(kept)),
        prune_idxs=tuple(i for i in range(n) if i not in kept),
        medoids=tuple(solution.medoids.tolist()),
        labels=tuple(solution.labels.tolist()),
        k=k,
        ks=tuple(s.k for s in path),
        mss=tuple(mss.tolist()),
        knee_k=found.k,
        knee_strength=found.strength,
        scores=nested_scores(d, keep),
    )


def _count(d: Tensor, path: Sequence[KMedoids], knee: Knee, method: KneeMethod) -> int:
    """Number to keep: the knee's k, all where there is no knee, one where all components are alike."""
    if not d.any():
        return 1
    if knee.k is None:
        return len(d)
    if method.rule != "guarded" or knee.k == len(d):
        return knee.k
    at_knee = next(s for s in path if s.k == knee.k)
    # Over non-medoids alone the mean of 1 − a/b is GB-AFS's form of the silhouette (a ≤ b but for ties).
    represented = mean_simplified_silhouette(d, at_knee.medoids, at_knee.labels, form="gb-afs")
    return guarded_count(len(d), knee.k, represented)


def _representatives(solution: KMedoids, preference: Tensor | None) -> Tensor:
    if preference is None:
        return solution.medoids
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
    with few_threads(d):
        dropped, costs = _drop_order(d, keep)
        added, gains = _add_order(d, keep)
    order = torch.cat([dropped.flip(0), added])
    shares = torch.cat([costs.flip(0), gains])
    single = float(d.sum(0).min())
    if single > 0:
        shares = (shares / single).clamp(max=1)
    # Falling from the front: every share is at least the largest one behind it.
    shares = shares.flip(0).cummax(0).values.flip(0)
    scores = torch.empty(n, dtype=torch.float64)
    scores[order.cpu()] = shares.cpu() + 1e-6 * torch.arange(n, 0, -1, dtype=torch.float64) / n
    return scores


def _drop_order(d: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Kept components from the cheapest to lose to the dearest, and what each loss costs."""
    left = Assignment(d, keep)
    order, costs = [], []
    while len(left.medoids) > 1:
        loss = sum_by_cluster((left.d2 - left.d1)[:, None], left.own, len(left.medoids))[:, 0]
        cheapest = loss.argmin()
        order.append(left.medoids[cheapest])
        costs.append(loss[cheapest])
        left.remove(cheapest)
    # Nothing stands in for the last one: losing it costs everything.
    order.append(left.medoids[0])
    costs.append(d.sum(0).min())
    return torch.stack(order), torch.stack(costs)


def _add_order(d: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Other components from the most to the least helpful, and what each gains when it is added."""
    nearest = d[keep].amin(0)
    gain = (nearest[:, None] - d).clamp_(min=0).sum(0)
    is_taken = torch.zeros(len(d), dtype=torch.bool, device=d.device).index_fill_(0, keep, True)
    order, gains = [], []
    for _ in range(len(d) - len(keep)):
        best = gain.masked_fill(is_taken, -torch.inf).argmax()
        order.append(best)
        gains.append(gain[best].clamp(min=0))
        is_taken[best] = True
        # Only points that are now nearer to a kept one change the gains: few, late in the order.
        moved = (d[best] < nearest).nonzero()[:, 0]
        before, rows = nearest[moved], d[moved]
        nearest[moved] = rows[:, best]
        gain -= (before[:, None] - rows).clamp_(min=0).sum(0)
        gain += (nearest[moved][:, None] - rows).clamp_(min=0).sum(0)
    if not order:
        return keep[:0], d.new_zeros(0)
    return torch.stack(order), torch.stack(gains)
