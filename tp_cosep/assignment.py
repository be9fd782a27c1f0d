"""Points and their nearest medoids, kept current while medoids come, go and swap.

The searches in :mod:`tp_cosep.medoids` and :mod:`tp_cosep.selection` change one medoid at a time, which
moves few points when there are many medoids. Updating those alone makes a path over all k of n points cost
about n² log n instead of n³ operations, but for one scan of a ``[k, n]`` table per k.

Letters as in :mod:`tp_cosep.medoids`: D ``[n, n]`` distances, d1 and d2 the distances of a point to its
nearest and second nearest medoid. A *slot* is a position in the list of medoids.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "Assignment", "SwapTable", "few_threads", "sum_by_cluster"]

#: Differences of total deviations below this share of the whole are rounding.
TOLERANCE = 1e-11
#: What updating the sums of a SwapTable again and again may add up to, as a share of the first total deviation.
_DRIFT = 1e-14


@contextmanager
def few_threads(d: Tensor) -> Iterator[None]:
    """One CPU thread while a matrix is small: handing out its short operations costs more than it saves.

    On a machine whose cores are busy it costs a hundred times more, since every operation waits for a
    thread that is not scheduled.
    """
    before = torch.get_num_threads()
    if len(d) <= 2048 and not d.is_cuda:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sum_by_cluster(rows: Tensor, labels: Tensor, k: int) -> Tensor:
    """Sum the rows ``[n, m]`` of each of k clusters: ``[k, m]``, in a fixed order on every device."""
    if rows.is_cuda:  # index_add_ is not deterministic there
        one_hot = torch.nn.functional.one_hot(labels, k).to(rows.dtype)
        return one_hot.T @ rows
    return rows.new_zeros(k, rows.shape[1]).index_add_(0, labels, rows)


class Assignment:
    """Nearest and second nearest medoid of every point.

    Args:
        d: ``[n, n]`` distances.
        medoids: ``[k]`` distinct points, k ≥ 1.

    Attributes:
        medoids: ``[k]``, by slot.
        own: ``[n]``, slot of the nearest medoid.
        second: ``[n]``, slot of the second nearest; meaningless if k is 1.
        d1: ``[n]``, distance to the nearest.
        d2: ``[n]``, distance to the second nearest; ∞ if k is 1.
    """

    def __init__(self, d: Tensor, medoids: Tensor) -> None:
        self.d = d
        self.medoids = medoids.clone()
        self.own, self.second, self.d1, self.d2 = self._nearest_two(slice(None))

    def _nearest_two(self, points: Tensor | slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = self.d[self.medoids] if isinstance(points, slice) else self.d[self.medoids[:, None], points]
        d1, own = rows.min(0)
        d2, second = rows.scatter(0, own[None], torch.inf).min(0)
        return own, second, d1, d2

    def add(self, point: Tensor) -> None:
        """Make a point a medoid, in a new last slot."""
        self.medoids = torch.cat([self.medoids, point.view(1)])
        self._offer(point, len(self.medoids) - 1)

    def replace(self, slot: Tensor, point: Tensor) -> None:
        """Put another point into a slot."""
        is_lost = (self.own == slot) | (self.second == slot)
        self.medoids = self.medoids.clone()
        self.medoids[slot] = point
        self._offer(point, slot)
        self._reassign(is_lost)

    def remove(self, slot: Tensor) -> None:
        """Take a slot away; later ones move up."""
        is_lost = (self.own == slot) | (self.second == slot)
        self.medoids = torch.cat([self.medoids[:slot], self.medoids[slot + 1 :]])
        self.own = self.own - (self.own > slot).long()
        self.second = self.second - (self.second > slot).long()
        self._reassign(is_lost)

    def _offer(self, point: Tensor, slot: int | Tensor) -> None:
        row = self.d[point]
        is_nearest, is_second = row < self.d1, row < self.d2
        slots = torch.full_like(self.own, int(slot))
        self.second = torch.where(is_nearest, self.own, torch.where(is_second, slots, self.second))
        self.d2 = torch.where(is_nearest, self.d1, torch.minimum(self.d2, row))
        self.own = torch.where(is_nearest, slots, self.own)
        self.d1 = torch.minimum(self.d1, row)

    def _reassign(self, is_lost: Tensor) -> None:
        points = is_lost.nonzero()[:, 0]
        found = self._nearest_two(points)
        self.own[points], self.second[points], self.d1[points], self.d2[points] = found


class SwapTable:
    """What every addition and every swap would change in the total deviation TD.

    Adding point c changes TD by shared_c, swapping it for the medoid in slot m by shared_c + rise_mc:

        shared_c = Σ_i min(D_ic − d1_i, 0),   rise_mc = Σ_{i nearest to m} clamp(D_ic − d1_i, 0, d2_i − d1_i)

    (FastPAM's decomposition: Schubert & Rousseeuw, Information Systems 101, 2021).

    Args:
        assignment: The medoids; change them as you like and call :meth:`update`.
        capacity: The largest number of medoids there will be.

    Attributes:
        shared: ``[n]``.
        rise: ``[capacity, n]``, by slot.
    """

    def __init__(self, assignment: Assignment, capacity: int) -> None:
        self.assignment = assignment
        self.shared = assignment.d1.new_zeros(len(assignment.d1))
        self._drift = _DRIFT * assignment.d1.sum()
        self.rise = assignment.d1.new_zeros(capacity, len(assignment.d1))
        everything = torch.arange(len(assignment.d1), device=assignment.d1.device)
        self._seen = (assignment.own, assignment.d1, assignment.d2)
        self._account(everything, self._seen, 1)

    def update(self) -> None:
        """Follow the assignment: only points whose nearest medoids changed are counted anew."""
        now = (self.assignment.own, self.assignment.d1, self.assignment.d2)
        is_moved = torch.stack([a != b for a, b in zip(now, self._seen, strict=True)]).any(0)
        points = is_moved.nonzero()[:, 0]
        self._account(points, self._seen, -1)
        self._account(points, now, 1)
        self._seen = (now[0].clone(), now[1].clone(), now[2].clone())

    def _account(self, points: Tensor, state: tuple[Tensor, Tensor, Tensor], sign: int) -> None:
        own, d1, d2 = (values[points] for values in state)
        change = self.assignment.d[points] - d1[:, None]
        self.shared.add_(change.clamp(max=0).sum(0), alpha=sign)
        rise = torch.minimum(change.clamp_(min=0), (d2 - d1)[:, None])
        if rise.is_cuda:
            self.rise.add_(sum_by_cluster(rise, own, len(self.rise)), alpha=sign)
        else:
            self.rise.index_add_(0, own, rise, alpha=sign)

    def best_addition(self) -> Tensor:
        """The point whose addition lowers TD most; the lowest index on ties."""
        return self._first_smallest(self.shared.index_fill(0, self.assignment.medoids, torch.inf))

    def best_swap(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slot and point of the swap that lowers TD most, and the change it makes.

        Returns:
            Slot, point and change; on ties the lowest point, and for it the lowest medoid.
        """
        medoids = self.assignment.medoids
        shared = self.shared.index_fill(0, medoids, torch.inf)
        change = (self.rise[: len(medoids)] + shared).amin(0)
        point = self._first_smallest(change)
        by_index = medoids.argsort()
        slot = by_index[self._first_smallest(self.rise[by_index, point])]
        return slot, point, change[point]

    def _first_smallest(self, values: Tensor) -> Tensor:
        """Index of the first value that is the smallest but for rounding, so that every machine agrees."""
        tolerance = torch.maximum(TOLERANCE * self.assignment.d1.sum(), self._drift)
        return (values <= values.min() + tolerance).to(torch.uint8).argmax()
