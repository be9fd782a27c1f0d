"""Points and their nearest medoids, kept current while medoids come, go and swap.

The searches in :mod:`tp_cosep.medoids` and :mod:`tp_cosep.selection` change one medoid at a time, which
moves few points when there are many medoids. Updating those alone makes a path over all k of n points cost
about n² log n instead of n³ operations, but for one scan of a ``[k, n]`` table per swap.

Everything here is float64 on the CPU. Steps on vectors of n use numpy, whose calls are several times cheaper
than torch's; steps on ``[points, n]`` use torch, which broadcasts faster, on the same memory.

Letters as in :mod:`tp_cosep.medoids`: D ``[n, n]`` distances, d1 and d2 the distances of a point to its
nearest and second nearest medoid. A *slot* is a position in the list of medoids.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["TOLERANCE", "Assignment", "SwapTable", "few_threads"]

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

#: Differences of total deviations below this share of the whole are rounding.
TOLERANCE = 1e-11
#: What updating the sums of a SwapTable again and again may add up to, as a share of the first total deviation.
_DRIFT = 1e-14
# Elements of D that are worked on at once.
_BLOCK = 2**16


@contextmanager
def few_threads(d: Tensor) -> Iterator[None]:
    """One CPU thread while a matrix is small: handing out its short operations costs more than it saves.

    On a machine whose cores are busy it costs a hundred times more, since every operation waits for a
    thread that is not scheduled.
    """
    before = torch.get_num_threads()
    if len(d) > 2048 or d.is_cuda or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Assignment:
    """Nearest and second nearest medoid of every point.

    Args:
        d: ``[n, n]`` distances, symmetric.
        medoids: ``[k]`` distinct points, k ≥ 1.

    Attributes:
        medoids: ``[k]``, by slot.
        own: ``[n]``, slot of the nearest medoid.
        second: ``[n]``, slot of the second nearest; meaningless if k is 1.
        d1: ``[n]``, distance to the nearest.
        d2: ``[n]``, distance to the second nearest; ∞ if k is 1.
        is_touched: ``[n]``, points for which any of these was set since somebody last unset this.
    """

    def __init__(self, d: Floats, medoids: Indices) -> None:
        self.d = d
        self.medoids = medoids.copy()
        n = len(d)
        self.own, self.second = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.d1, self.d2 = np.full(n, np.inf), np.full(n, np.inf)
        self.is_touched = np.zeros(n, dtype=bool)
        self._reassign(np.arange(n))

    def copy(self) -> Assignment:
        """Another one in the same state.

        Returns:
            The copy; it shares D.
        """
        other = object.__new__(Assignment)
        other.d, other.medoids = self.d, self.medoids  # neither is ever changed in place
        other.own, other.second = self.own.copy(), self.second.copy()
        other.d1, other.d2 = self.d1.copy(), self.d2.copy()
        other.is_touched = self.is_touched.copy()
        return other

    def add(self, point: int) -> None:
        """Make a point a medoid, in a new last slot."""
        self.medoids = np.concatenate((self.medoids, np.array([point])))
        self._offer(point, len(self.medoids) - 1)

    def replace(self, slot: int, point: int) -> None:
        """Put another point into a slot."""
        lost = ((self.own == slot) | (self.second == slot)).nonzero()[0]
        self.medoids = self.medoids.copy()
        self.medoids[slot] = point
        self._offer(point, slot)
        self._reassign(lost)

    def remove(self, slot: int) -> None:
        """Take a slot away; later ones move up."""
        lost = ((self.own == slot) | (self.second == slot)).nonzero()[0]
        self.medoids = np.concatenate((self.medoids[:slot], self.medoids[slot + 1 :]))
        self.own -= self.own > slot
        self.second -= self.second > slot
        self.is_touched[:] = True
        self._reassign(lost)

    def _offer(self, point: int, slot: int) -> None:
        row = self.d[point]
        moved = (row < self.d2).nonzero()[0]
        self.is_touched[moved] = True
        to, before = row[moved], self.d1[moved]
        is_nearest = to < before
        nearest = moved[is_nearest]
        self.second[moved] = slot
        self.second[nearest] = self.own[nearest]
        self.own[nearest] = slot
        self.d1[moved] = np.minimum(to, before)
        self.d2[moved] = np.maximum(to, before)

    def _reassign(self, points: Indices) -> None:
        """Find the nearest two of given points anew."""
        self.is_touched[points] = True
        are_all = len(points) == len(self.d)
        rows = self.d[self.medoids].T.copy() if are_all else self.d[points[:, None], self.medoids]
        at = np.arange(len(points))
        own = rows.argmin(1)
        self.own[points], self.d1[points] = own, rows[at, own]
        rows[at, own] = np.inf
        second = rows.argmin(1)
        self.second[points], self.d2[points] = second, rows[at, second]


class SwapTable:
    """What every addition and every swap would change in the total deviation TD.

    Adding point c changes TD by shared_c, swapping it for the medoid in slot m by shared_c + rise_mc:

        shared_c = Σ_i min(D_ic − d1_i, 0),   rise_mc = Σ_{i nearest to m} clamp(D_ic − d1_i, 0, d2_i − d1_i)

    (FastPAM's decomposition: Schubert & Rousseeuw, Information Systems 101, 2021). Computed as
    min(D_ic, d1_i) − d1_i and min(D_ic, d2_i) − min(D_ic, d1_i). They follow the assignment when they are asked for,
    and count only those points anew whose nearest medoids have changed.

    Args:
        assignment: The medoids; change them as you like.
        capacity: A number of medoids to make room for; there may be more.
    """

    def __init__(self, assignment: Assignment, capacity: int) -> None:
        n = len(assignment.d)
        self.assignment = assignment
        self._distances = torch.from_numpy(assignment.d)
        self._drift = _DRIFT * float(assignment.d1.sum())
        # The sums, and what they stand for: at d1 = d2 = 0 all are 0.
        self._shared, self._shared_d1 = np.zeros(n), np.zeros(n)
        self._rise = torch.zeros(capacity, n, dtype=torch.float64)
        self._own = np.zeros(n, np.int64)
        self._near = np.zeros((2, n))

    def copy(self, capacity: int) -> SwapTable:
        """A table, with an assignment of its own, in the same state.

        Returns:
            The copy.
        """
        other = SwapTable.__new__(SwapTable)
        other.__dict__.update(self.__dict__)
        other.assignment = self.assignment.copy()
        other._shared, other._shared_d1 = self._shared.copy(), self._shared_d1.copy()
        other._own, other._near = self._own.copy(), self._near.copy()
        other._rise = torch.zeros(capacity, len(self._shared), dtype=torch.float64)
        k = len(self.assignment.medoids)
        other._rise[:k] = self._rise[:k]
        return other

    def move_to(self, medoids: Indices) -> None:
        """Go over to other medoids; cheaper than a new table where they share most slots with those of now."""
        state = Assignment(self.assignment.d, medoids)
        state.is_touched = (state.own != self._own) | (state.d1 != self._near[0]) | (state.d2 != self._near[1])
        self.assignment = state
        self._follow_rise()

    def _follow_shared(self) -> Floats:
        now = self.assignment.d1
        points = (now != self._shared_d1).nonzero()[0]
        if len(points):
            before, after = self._shared_d1[points], now[points]
            self._shared_d1[points] = after
            self._shared += before.sum() - after.sum()
            for block in self._blocks(len(points)):
                rows = self._distances.index_select(0, torch.from_numpy(points[block]))
                change = torch.minimum(rows, torch.from_numpy(after[block])[:, None])
                change -= torch.minimum(rows, torch.from_numpy(before[block])[:, None], out=rows)
                self._shared += change.numpy().sum(0)
        return self._shared

    def _follow_rise(self) -> Tensor:
        state = self.assignment
        while len(self._rise) < len(state.medoids):
            self._rise = torch.cat([self._rise, torch.zeros_like(self._rise)])
        points = state.is_touched.nonzero()[0]
        state.is_touched[points] = False
        if 2 * len(points) > len(self._own):
            # Cheaper than to follow them, and nothing of what rounding has left so far stays.
            self._own, self._near = state.own.copy(), np.array((state.d1, state.d2))
            self._rise.zero_()
            for block in self._blocks(len(self._own)):
                self._count(self._distances[block], self._own[block], self._near[:, None, block])
            return self._rise
        # Both what these points counted for so far and what they count for now: [2, points].
        own = np.array((self._own[points], state.own[points]))
        near = np.array((self._near[:, points], (state.d1[points], state.d2[points]))).swapaxes(0, 1)
        self._own[points], self._near[:, points] = own[1], near[:, 1]
        for block in self._blocks(len(points)):
            rows = self._distances.index_select(0, torch.from_numpy(points[block]))
            self._count(rows, own[:, block].ravel(), near[:, :, block])
        return self._rise

    def _count(self, rows: Tensor, own: Indices, near: Floats) -> None:
        """Add rises ``[points, n]`` to the slots; with two sets of d1 and d2, take off the first set's."""
        to_nearest, to_second = torch.from_numpy(near)[..., None]
        rise = torch.minimum(rows, to_second).sub_(torch.minimum(rows, to_nearest))
        if len(rise) == 2:
            rise[0].neg_()
        self._rise.index_add_(0, torch.from_numpy(own), rise.view(-1, rise.shape[2]))

    def _blocks(self, n_points: int) -> list[slice]:
        """Slices of so many points that their rows of D stay in a core's cache."""
        size = max(1, _BLOCK // len(self._own))
        return [slice(i, i + size) for i in range(0, n_points, size)]

    def best_addition(self) -> int:
        """The point whose addition lowers TD most; the lowest index on ties."""
        shared = self._follow_shared().copy()
        shared[self.assignment.medoids] = np.inf
        return self._first_smallest(shared)

    def best_swap(self) -> tuple[int, int, float]:
        """Slot and point of the swap that lowers TD most, and the change it makes.

        Returns:
            Slot, point and change; on ties the lowest point, and for it the lowest medoid.
        """
        medoids, rise = self.assignment.medoids, self._follow_rise().numpy()
        change = rise[: len(medoids)].min(0)
        change += self._follow_shared()
        change[medoids] = np.inf
        point = self._first_smallest(change)
        by_index = medoids.argsort()
        slot = int(by_index[self._first_smallest(rise[by_index, point])])
        return slot, point, float(change[point])

    def _first_smallest(self, values: Floats) -> int:
        """Index of the first value that is the smallest but for rounding, so that every machine agrees."""
        tolerance = max(TOLERANCE * float(self.assignment.d1.sum()), self._drift)
        return int((values <= values.min() + tolerance).argmax())
