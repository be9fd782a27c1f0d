"""Points and their nearest medoids, kept current while medoids come, go and swap.

The searches in :mod:`tp_cosep.functional.kmedoids` and :mod:`tp_cosep.functional.selection` change one medoid at a time, which
moves few points when there are many medoids. Updating those alone makes a path over all k of n points cost
about n² log n instead of n³ operations, but for one scan of a ``[k, n]`` table per swap.

Everything here is float64 on the CPU. Steps on vectors of n use numpy, whose calls are several times cheaper
than torch's; steps on ``[points, n]`` use torch, which broadcasts faster, on the same memory.

Letters as in :mod:`tp_cosep.functional.kmedoids`: D ``[n, n]`` distances, d1 and d2 the distances of a point to its
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
# Up to so many points the sums are counted anew each time: for few, following them costs more.
_SMALL = 256


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

    def best_swap(self, point: int, deviation: float) -> tuple[int, float]:
        """The slot to swap a point into, and by how much that changes the total deviation, which is given.

        Returns:
            Slot, that of the lowest medoid on ties; change.
        """
        row = self.d[point]
        kept = np.minimum(row, self.d1)
        rise = np.bincount(self.own, np.minimum(row, self.d2) - kept, len(self.medoids))
        slots = (rise <= rise.min() + TOLERANCE * deviation).nonzero()[0]
        slot = slots[0] if len(slots) == 1 else slots[self.medoids[slots].argmin()]
        return int(slot), float(np.add.reduce(kept - self.d1) + rise[slot])

    def add(self, point: int) -> None:
        """Make a point a medoid, in a new last slot."""
        self.medoids = np.concatenate((self.medoids, (point,)))
        self._offer(point, len(self.medoids) - 1)

    def replace(self, slot: int, point: int) -> None:
        """Put another point into a slot."""
        lost = ((self.own == slot) | (self.second == slot)).nonzero()[0]
        self.medoids = self.medoids.copy()
        self.medoids[slot] = point
        self._offer(point, slot)
        self._reassign(lost)

    def _offer(self, point: int, slot: int) -> None:
        """Assign points to a new medoid where it is nearer than the second nearest."""
        row = self.d[point]
        is_second, is_nearest = row < self.d2, row < self.d1
        self.is_touched |= is_second
        self.second[is_second] = slot
        np.copyto(self.second, self.own, where=is_nearest)
        self.own[is_nearest] = slot
        np.minimum(self.d2, row, out=self.d2)
        np.maximum(self.d2, self.d1, out=self.d2)
        np.minimum(self.d1, row, out=self.d1)

    def _reassign(self, points: Indices) -> None:
        """Find the nearest two of given points anew."""
        self.is_touched[points] = True
        if len(points) == len(self.d):
            distances = self.d.take(self.medoids, 0).T.copy()
        else:
            distances = self.d.take(points, 0).take(self.medoids, 1)
        at = np.arange(len(points))
        for own, nearest in ((self.own, self.d1), (self.second, self.d2)):
            best = distances.argmin(1)
            own[points], nearest[points] = best, distances[at, best]
            distances[at, best] = np.inf


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
        self._is_small = n <= _SMALL
        # Room for what is counted anew each time: to allocate it takes as long as to fill it.
        self._kept, self._to_second = torch.empty(2, *((n, n) if self._is_small else (0, 0)), dtype=torch.float64)
        self._counted_for: Floats | None = None
        # Lower bounds of the least rise of every point, but for the slots in which it has changed (None: all).
        self._least = np.zeros(n)
        self._changed: Indices | None = None

    def move_to(self, assignment: Assignment) -> None:
        """Go over to other medoids; cheaper than a new table where they share most slots with those of now."""
        self.assignment = state = assignment.copy()
        if not self._is_small:
            state.is_touched = (state.own != self._own) | (state.d1 != self._near[0]) | (state.d2 != self._near[1])

    def _follow_shared(self) -> Floats:
        now = self.assignment.d1
        if self._is_small:
            return self._counted_anew(now)
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

    def _counted_anew(self, d1: Floats) -> Floats:
        """What adding every point would change; leaves min(D, d1) behind."""
        if self._counted_for is None or not np.array_equal(self._counted_for, d1):
            torch.minimum(self._distances, torch.from_numpy(d1)[:, None], out=self._kept)
            self._shared = self._kept.numpy().sum(0)
            self._shared -= d1.sum()
            self._counted_for = d1.copy()
        return self._shared

    def _make_room(self) -> None:
        while len(self._rise) < len(self.assignment.medoids):
            self._rise = torch.cat([self._rise, torch.zeros_like(self._rise)])

    def _follow_rise(self) -> Tensor:
        state = self.assignment
        self._make_room()
        points = state.is_touched.nonzero()[0]
        state.is_touched[points] = False
        if 2 * len(points) > len(self._own):
            # Cheaper than to follow them, and nothing of what rounding has left so far stays.
            self._changed = None
            self._own, self._near = state.own.copy(), np.array((state.d1, state.d2))
            self._rise.zero_()
            for block in self._blocks(len(self._own)):
                self._count(self._distances[block], self._own[block], self._near[:, None, block])
            return self._rise
        # Both what these points counted for so far and what they count for now: [2, points].
        own = np.array((self._own[points], state.own[points]))
        near = np.array((self._near[:, points], (state.d1[points], state.d2[points]))).swapaxes(0, 1)
        self._own[points], self._near[:, points] = own[1], near[:, 1]
        if self._changed is not None:
            self._changed = np.union1d(self._changed, own)
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

    def add(self, n_points: int) -> None:
        """Make those points medoids that lower TD most.

        Args:
            n_points: How many at most, at least one. The first lowers TD most (the lowest index on ties); others at
                least half as much as they would have alone.
        """
        state, tolerance = self.assignment, self._tolerance()
        shared = self._follow_shared().copy()
        shared[state.medoids] = np.inf
        first = _first_smallest(shared, tolerance)
        state.add(first)
        if n_points == 1:
            return
        shared[first] = np.inf
        for point in _ascending(shared, (shared < -tolerance).nonzero()[0], tolerance)[: 4 * n_points].tolist():
            if np.add.reduce(np.minimum(state.d[point] - state.d1, 0)) <= shared[point] / 2:
                state.add(point)
                n_points -= 1
                if n_points == 1:
                    return

    def promising(self, least: float) -> Indices:
        """The points that would lower TD if they were swapped for the right medoid.

        Args:
            least: What a swap must lower TD by.

        Returns:
            The best first; by index on ties.
        """
        change = self._changes_of_few() if self._is_small else self._changes(least)
        change[self.assignment.medoids] = np.inf
        return _ascending(change, (change < -least).nonzero()[0], self._tolerance())

    def _changes_of_few(self) -> Floats:
        """What the best swap of every point would change."""
        state = self.assignment
        change: Floats = self._counted_anew(state.d1).copy()
        torch.minimum(self._distances, torch.from_numpy(state.d2)[:, None], out=self._to_second).sub_(self._kept)
        self._make_room()
        rise = self._rise[: len(state.medoids)].zero_()
        rise.index_add_(0, torch.from_numpy(state.own), self._to_second)
        change += rise.numpy().min(0)
        return change

    def _changes(self, least: float) -> Floats:
        """What the best swap of every point would change, exact where it lowers TD by more than least."""
        self._follow_rise()
        shared = self._follow_shared()
        return self._least_rises(-least - shared) + shared

    def _least_rises(self, enough: Floats) -> Floats:
        """The least rise of every point over all slots, exact where it is less than enough; else a lower bound."""
        rise = self._rise.numpy()[: len(self.assignment.medoids)]
        if self._changed is None:
            self._least = rise.min(0)
        else:
            changed = self._changed[self._changed < len(rise)]
            if len(changed):
                np.minimum(self._least, rise.take(changed, 0).min(0), out=self._least)
            points = (self._least < enough).nonzero()[0]
            if 4 * len(points) > len(enough):
                self._least = rise.min(0)
            else:
                self._least[points] = rise.take(points, 1).min(0)
        self._changed = np.zeros(0, np.int64)
        return self._least

    def _tolerance(self) -> float:
        return max(TOLERANCE * float(self.assignment.d1.sum()), self._drift)


def _first_smallest(values: Floats, tolerance: float) -> int:
    """Index of the first value that is the smallest but for rounding, so that every machine agrees."""
    return int((values <= values.min() + tolerance).argmax())


def _ascending(values: Floats, indices: Indices, tolerance: float) -> Indices:
    """Indices by ascending value; by index where values differ by rounding alone."""
    if len(indices) < 2:
        return indices
    at = values[indices]
    order = at.argsort(kind="stable")
    at = at[order]
    is_more = at[1:] - at[:-1] > tolerance
    if not is_more.all():
        rank = np.zeros(len(indices), np.int64)
        is_more.cumsum(out=rank[1:])
        order = order[np.lexsort((indices[order], rank))]
    return indices[order]
