"""Points and their nearest medoids, updated while medoids are added and swapped.

The searches in :mod:`tp_cosep.functional.kmedoids` and :mod:`tp_cosep.functional.selection` change one medoid at a
time, which moves few points when there are many medoids. Updating those points alone makes a path over all k of n
points cost about n² log n instead of n³ operations, apart from one scan of a ``[k, n]`` table per swap.

All values are float64 on the CPU. Steps on vectors of n use numpy, whose calls are several times cheaper than torch's;
steps on ``[points, n]`` use torch, which broadcasts faster, on the same memory.

Letters: D_ic is what it costs to have point i represented by point c, its distance times the weight of i; d1 and d2 are
the costs at the medoids nearest and second nearest to a point, TD = Σ d1 is the total deviation. A *slot* is a position
in the list of medoids. Weighted costs are not symmetric, so they are held twice: by point, D, and by medoid, Dᵀ.
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

#: Differences of total deviations below this share of the total deviation are rounding errors.
TOLERANCE = 1e-11
# Bound on the accumulated rounding errors of a SwapTable's sums, as a share of the first total deviation.
_DRIFT = 1e-14
# Elements of D that are processed at once.
_BLOCK = 2**16
# Up to this number of points the sums are recomputed each time: updating them costs more.
_SMALL = 256


@contextmanager
def few_threads(d: Tensor) -> Iterator[None]:
    """Use one CPU thread if a matrix is small: distributing its short operations costs more than it saves.

    On a machine with busy cores it costs a hundred times more, since every operation waits for a thread that is not
    scheduled.
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
        by_medoid: ``[n, n]``, row c holds the costs of all points at medoid c: Dᵀ.
        medoids: ``[k]`` distinct points, k ≥ 1.
        by_point: ``[n, n]``, row i holds the costs of point i at all medoids: D; ``by_medoid`` if that is symmetric.

    Attributes:
        by_medoid: Dᵀ.
        by_point: D.
        medoids: ``[k]``, by slot.
        own: ``[n]``, slot of the nearest medoid.
        second: ``[n]``, slot of the second nearest; meaningless if k is 1.
        d1: ``[n]``, cost at the nearest.
        d2: ``[n]``, cost at the second nearest; ∞ if k is 1.
        is_touched: ``[n]``, points whose nearest medoids were updated; reset by :class:`SwapTable`.
    """

    def __init__(self, by_medoid: Floats, medoids: Indices, by_point: Floats | None = None) -> None:
        self.by_medoid, self.by_point = by_medoid, by_medoid if by_point is None else by_point
        self.medoids = medoids.copy()
        n = len(by_medoid)
        self.own, self.second = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.d1, self.d2 = np.full(n, np.inf), np.full(n, np.inf)
        self.is_touched = np.zeros(n, dtype=bool)
        self._reassign(np.arange(n))

    def copy(self) -> Assignment:
        """Copy the state.

        Returns:
            The copy; it shares the costs.
        """
        other = object.__new__(Assignment)
        # None of these is ever changed in place.
        other.by_medoid, other.by_point, other.medoids = self.by_medoid, self.by_point, self.medoids
        other.own, other.second = self.own.copy(), self.second.copy()
        other.d1, other.d2 = self.d1.copy(), self.d2.copy()
        other.is_touched = self.is_touched.copy()
        return other

    def best_swap(self, point: int, deviation: float) -> tuple[int, float]:
        """The best slot to swap a point into.

        Args:
            point: The point that would become a medoid.
            deviation: TD of the current medoids.

        Returns:
            The slot, that of the lowest medoid on ties; the change of TD.
        """
        row = self.by_medoid[point]
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
        row = self.by_medoid[point]
        is_second, is_nearest = row < self.d2, row < self.d1
        self.is_touched |= is_second
        self.second[is_second] = slot
        np.copyto(self.second, self.own, where=is_nearest)
        self.own[is_nearest] = slot
        np.minimum(self.d2, row, out=self.d2)
        np.maximum(self.d2, self.d1, out=self.d2)
        np.minimum(self.d1, row, out=self.d1)

    def _reassign(self, points: Indices) -> None:
        """Recompute the two nearest medoids of some points."""
        self.is_touched[points] = True
        if len(points) == len(self.by_medoid):
            costs = self.by_medoid.take(self.medoids, 0).T.copy()
        else:
            costs = self.by_point.take(points, 0).take(self.medoids, 1)
        at = np.arange(len(points))
        for own, nearest in ((self.own, self.d1), (self.second, self.d2)):
            best = costs.argmin(1)
            own[points], nearest[points] = best, costs[at, best]
            costs[at, best] = np.inf


class SwapTable:
    """The change of the total deviation TD by every addition and every swap.

    Adding point c changes TD by shared_c, swapping it for the medoid in slot m by shared_c + rise_mc:

        shared_c = Σ_i min(D_ic − d1_i, 0),   rise_mc = Σ_{i nearest to m} clamp(D_ic − d1_i, 0, d2_i − d1_i)

    computed as min(D_ic, d1_i) − d1_i and min(D_ic, d2_i) − min(D_ic, d1_i). The sums are updated on request, and
    only for points whose nearest medoids have changed.

    Source: FastPAM's decomposition (Schubert & Rousseeuw, Information Systems 101, 2021).

    Args:
        assignment: The medoids; they may be changed between calls.
        capacity: Number of medoids to allocate for; grows as needed.
    """

    def __init__(self, assignment: Assignment, capacity: int) -> None:
        n = len(assignment.by_point)
        self.assignment = assignment
        self._costs = torch.from_numpy(assignment.by_point)
        self._drift = _DRIFT * float(assignment.d1.sum())
        # The sums, and the d1, slots and (d1, d2) that they were computed for: all are 0 at d1 = d2 = 0.
        self._shared, self._shared_d1 = np.zeros(n), np.zeros(n)
        self._rise = torch.zeros(capacity, n, dtype=torch.float64)
        self._own = np.zeros(n, np.int64)
        self._near = np.zeros((2, n))
        self._is_small = n <= _SMALL
        # Buffers for what is recomputed each time: allocating takes as long as filling.
        self._kept, self._to_second = torch.empty(2, *((n, n) if self._is_small else (0, 0)), dtype=torch.float64)
        self._computed_for: Floats | None = None
        # Lower bounds of the least rise of every point, except over slots that have changed since (None: all).
        self._least = np.zeros(n)
        self._changed: Indices | None = None

    def move_to(self, assignment: Assignment) -> None:
        """Switch to other medoids; cheaper than a new table if they share most slots with the current ones."""
        self.assignment = state = assignment.copy()
        if not self._is_small:
            state.is_touched = (state.own != self._own) | (state.d1 != self._near[0]) | (state.d2 != self._near[1])

    def _updated_shared(self) -> Floats:
        now = self.assignment.d1
        if self._is_small:
            return self._recomputed_shared(now)
        points = (now != self._shared_d1).nonzero()[0]
        if len(points):
            before, after = self._shared_d1[points], now[points]
            self._shared_d1[points] = after
            self._shared += before.sum() - after.sum()
            for block in self._blocks(len(points)):
                rows = self._costs.index_select(0, torch.from_numpy(points[block]))
                change = torch.minimum(rows, torch.from_numpy(after[block])[:, None])
                change -= torch.minimum(rows, torch.from_numpy(before[block])[:, None], out=rows)
                self._shared += change.numpy().sum(0)
        return self._shared

    def _recomputed_shared(self, d1: Floats) -> Floats:
        """The change of TD by adding every point; leaves min(D, d1) in its buffer."""
        if self._computed_for is None or not np.array_equal(self._computed_for, d1):
            torch.minimum(self._costs, torch.from_numpy(d1)[:, None], out=self._kept)
            self._shared = self._kept.numpy().sum(0)
            self._shared -= d1.sum()
            self._computed_for = d1.copy()
        return self._shared

    def _grow_rise(self) -> None:
        while len(self._rise) < len(self.assignment.medoids):
            self._rise = torch.cat([self._rise, torch.zeros_like(self._rise)])

    def _update_rise(self) -> None:
        state = self.assignment
        self._grow_rise()
        points = state.is_touched.nonzero()[0]
        state.is_touched[points] = False
        if 2 * len(points) > len(self._own):
            # Cheaper than updating, and free of the rounding errors accumulated so far.
            self._changed = None
            self._own, self._near = state.own.copy(), np.array((state.d1, state.d2))
            self._rise.zero_()
            for block in self._blocks(len(self._own)):
                self._add_rises(self._costs[block], self._own[block], self._near[:, None, block])
            return
        # Before and after the change: [2, points].
        own = np.array((self._own[points], state.own[points]))
        near = np.array((self._near[:, points], (state.d1[points], state.d2[points]))).swapaxes(0, 1)
        self._own[points], self._near[:, points] = own[1], near[:, 1]
        if self._changed is not None:
            self._changed = np.union1d(self._changed, own)
        for block in self._blocks(len(points)):
            rows = self._costs.index_select(0, torch.from_numpy(points[block]))
            self._add_rises(rows, own[:, block].ravel(), near[:, :, block])

    def _add_rises(self, rows: Tensor, own: Indices, near: Floats) -> None:
        """Add rises ``[points, n]`` to the slots; with two sets of d1 and d2, subtract those of the first."""
        to_nearest, to_second = torch.from_numpy(near)[..., None]
        rise = torch.minimum(rows, to_second).sub_(torch.minimum(rows, to_nearest))
        if len(rise) == 2:
            rise[0].neg_()
        self._rise.index_add_(0, torch.from_numpy(own), rise.view(-1, rise.shape[2]))

    def _blocks(self, n_points: int) -> list[slice]:
        """Slices of points whose rows of D fit into a core's cache."""
        size = max(1, _BLOCK // len(self._own))
        return [slice(i, i + size) for i in range(0, n_points, size)]

    def add(self, n_points: int) -> None:
        """Add the points that lower TD most as medoids.

        Args:
            n_points: Largest number to add; at least one is. The first lowers TD most (the lowest index on ties); every
                other one lowers it by at least half as much as it would have alone.
        """
        state, tolerance = self.assignment, self._tolerance()
        shared = self._updated_shared().copy()
        shared[state.medoids] = np.inf
        first = _first_smallest(shared, tolerance)
        state.add(first)
        if n_points == 1:
            return
        shared[first] = np.inf
        for point in _ascending(shared, (shared < -tolerance).nonzero()[0], tolerance)[: 4 * n_points].tolist():
            if np.add.reduce(np.minimum(state.by_medoid[point] - state.d1, 0)) <= shared[point] / 2:
                state.add(point)
                n_points -= 1
                if n_points == 1:
                    return

    def promising(self, least: float) -> Indices:
        """Candidates for a swap: points that lower TD if they replace the right medoid.

        Args:
            least: Least decrease of TD.

        Returns:
            The candidates, the best first; by index on ties.
        """
        change = self._changes_of_few() if self._is_small else self._changes(least)
        change[self.assignment.medoids] = np.inf
        return _ascending(change, (change < -least).nonzero()[0], self._tolerance())

    def _changes_of_few(self) -> Floats:
        """The change of TD by the best swap of every point."""
        state = self.assignment
        change: Floats = self._recomputed_shared(state.d1).copy()
        torch.minimum(self._costs, torch.from_numpy(state.d2)[:, None], out=self._to_second).sub_(self._kept)
        self._grow_rise()
        rise = self._rise[: len(state.medoids)].zero_()
        rise.index_add_(0, torch.from_numpy(state.own), self._to_second)
        change += rise.numpy().min(0)
        return change

    def _changes(self, least: float) -> Floats:
        """The change of TD by the best swap of every point, exact where it lowers TD by more than ``least``."""
        self._update_rise()
        shared = self._updated_shared()
        return self._least_rises(-least - shared) + shared

    def _least_rises(self, enough: Floats) -> Floats:
        """The least rise of every point over all slots, exact where it is below ``enough``; else a lower bound."""
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
    """Index of the first value that is smallest up to rounding, so that all machines agree."""
    return int((values <= values.min() + tolerance).argmax())


def _ascending(values: Floats, indices: Indices, tolerance: float) -> Indices:
    """Indices by ascending value; by index where values differ only by rounding."""
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
