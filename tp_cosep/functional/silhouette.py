"""The Mean Simplified Silhouette (MSS) of clusterings around medoids, and its curve over the number of clusters.

Letters: n points with weights e ``[n]`` (1 by default), k medoids; a ``[n]`` is the distance of every point to its own
medoid, b ``[n]`` its *mean* distance to all other medoids (not to the nearest one); lo is the lowest MSS found. The
*height* of a curve at k is that of Kneedle's difference curve, (MSS(k) − lo) / (1 − lo) − (k − 2) / (n − 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tp_cosep.functional.kmedoids import GrowingPath, KMedoids, check_backend, check_point_weights, checkpoints_for
from tp_cosep.functional.knee import difference_curve
from tp_cosep.functional.swap_table import Floats, Indices

__all__ = ["SilhouetteCurve", "mean_simplified_silhouette", "mss_curve", "non_medoid_silhouette"]

# Rows of D that are summed at once: a few stay in a core's cache.
_ROWS = 32
# Near heights less than the key below the highest, gaps are halved until they are no wider than n divided by the value.
_PLATEAUS = {0.002: 50, 0.02: 16}


def mean_simplified_silhouette(
    distances: Tensor, medoids: Tensor, labels: Tensor, weights: Tensor | None = None
) -> float:
    """Mean Simplified Silhouette (MSS) of a clustering around medoids.

        MSS = Σ_i e_i (1 − a_i / b_i) / Σ_i e_i

    A medoid counts 1, so MSS(n) = 1. A point with a_i = b_i = 0 (it coincides with every medoid) counts 1 if it is a
    medoid and 0 if not. MSS is 0 for a single medoid, which has no others to compare with.

    Source: CoSeP (arXiv 2505.13225), after GB-AFS (arXiv 2309.02272).

    Args:
        distances: ``[n, n]``.
        medoids: ``[k]`` int64 indices.
        labels: ``[n]`` int64, position in ``medoids`` of each point's own medoid.
        weights: e, ``[n]``, see :func:`tp_cosep.functional.kmedoids.k_medoids`; all 1 as published.

    Returns:
        MSS, at most 1; at least 0 where every point belongs to its nearest medoid.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 4.0])  # the point at 1: a = 1, b = 3
        >>> round(mean_simplified_silhouette((x[:, None] - x).abs(), torch.tensor([0, 2]), torch.tensor([0, 0, 1])), 4)
        0.8889
    """
    return _mss(*_terms(distances, medoids, labels), _weights_of(distances, weights))


def non_medoid_silhouette(distances: Tensor, medoids: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Mean silhouette of the points that are no medoids: how well the medoids represent the pruned components.

        s = Σ_{i no medoid} e_i (b_i − a_i) / max(a_i, b_i) / Σ_{i no medoid} e_i

    A summand is 1 − a_i/b_i where a point belongs to its nearest medoid, and 0 where a_i = b_i = 0. s is 0 for a
    single medoid, and if every point is a medoid; it is 1 if only medoids have weight.

    Source: the silhouette of GB-AFS's code (arXiv 2309.02272); here it guards the knee,
    :func:`tp_cosep.functional.knee.guarded_count`.

    Args:
        distances: ``[n, n]``.
        medoids: ``[k]`` int64 indices.
        labels: ``[n]`` int64, position in ``medoids`` of each point's own medoid.
        weights: e, ``[n]``; all 1 by default.

    Returns:
        s, in [−1, 1].
    """
    return _non_medoid(*_terms(distances, medoids, labels), _weights_of(distances, weights))


def mss_curve(distances: Tensor, path: Sequence[KMedoids]) -> Tensor:
    """MSS of every solution of a path, see :func:`mean_simplified_silhouette`.

    Args:
        distances: ``[n, n]``.
        path: Solutions, as of :func:`tp_cosep.functional.kmedoids.k_medoids_path`.

    Returns:
        ``[len(path)]`` float64, on the CPU.
    """
    values = [mean_simplified_silhouette(distances, s.medoids, s.labels) for s in path]
    return torch.tensor(values, dtype=torch.float64)


def _weights_of(distances: Tensor, weights: Tensor | None) -> Floats:
    return np.ones(len(distances)) if weights is None else check_point_weights(weights, len(distances)).numpy()


def _terms(distances: Tensor, medoids: Tensor, labels: Tensor) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    d, own, slots = distances.cpu().numpy(), medoids.cpu().numpy(), labels.cpu().numpy()
    return _a_and_b(d, own, d[np.arange(len(d)), own[slots]], _row_sum(d, own))


def _a_and_b(d: Floats, medoids: Indices, a: Floats, total: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """a, b and which points are medoids, from a and the sum of every point's distances to all medoids."""
    is_medoid = np.zeros(len(d), dtype=bool)
    is_medoid[medoids] = True
    b = (total - a) / max(len(medoids) - 1, 1)
    b[b <= 1e-12 * d[medoids[0]].max()] = 0
    return a, b, is_medoid


def _mss(a: Floats, b: Floats, is_medoid: NDArray[np.bool_], e: Floats) -> float:
    if is_medoid.sum() == 1:
        return 0.0
    # b = 0: all other medoids coincide with the point, which then belongs to none more than to another.
    width = 1 - np.divide(a, b, out=np.ones_like(a), where=b > 0)
    width[is_medoid] = 1
    return float((e * width).sum() / e.sum())


def _non_medoid(a: Floats, b: Floats, is_medoid: NDArray[np.bool_], e: Floats) -> float:
    a, b, e = a[~is_medoid], b[~is_medoid], e[~is_medoid]
    if len(a) == 0 or is_medoid.sum() == 1:
        return 0.0
    if not e.any():
        return 1.0
    larger = np.maximum(a, b)
    return float((e * np.divide(b - a, larger, out=np.zeros_like(a), where=larger > 0)).sum() / e.sum())


def _row_sum(d: Floats, rows: Indices) -> Floats:
    """Sum of some rows of D ``[n, n]``: every point's distance to them, since D is symmetric.

    Returns:
        ``[n]``.
    """
    total = np.zeros(len(d))
    for start in range(0, len(rows), _ROWS):
        total += d.take(rows[start : start + _ROWS], 0).sum(0)
    return total


class SilhouetteCurve:
    """k-medoids solutions and their silhouettes, each found when it is first requested.

    Args:
        d: ``[n, n]``, as :func:`tp_cosep.functional.distances.check_distances` returns it.
        weights: ``[n]``, as :func:`tp_cosep.functional.kmedoids.check_point_weights` returns them.
        backend: Solver, see :func:`tp_cosep.functional.kmedoids.k_medoids`.

    Raises:
        InputError: If the backend is unknown.
    """

    def __init__(self, d: Tensor, *, weights: Tensor | None = None, backend: str = "native") -> None:
        self._d = d
        self._weights = weights
        self._matrix = d.cpu().numpy()
        self._e = _weights_of(d, weights)
        self._backend = check_backend(backend)
        self._path = GrowingPath(d, weights=weights) if backend == "native" else None
        self._found: dict[int, tuple[Indices, Floats]] = {}
        self._mss: dict[int, float] = {}
        self._summed, self._sum = np.zeros(len(d), dtype=bool), np.zeros(len(d))

    def solution(self, k: int) -> KMedoids:
        """The k-medoids solution for k clusters.

        Args:
            k: Number of clusters, in 1 … n.

        Returns:
            The solution, on the device of the matrix.
        """
        medoids = torch.from_numpy(self._solved(k)[0]).to(self._d.device)
        return KMedoids.from_medoids(self._d, medoids, self._weights)

    def mss(self, k: int) -> float:
        """MSS of the solution for k clusters, see :func:`mean_simplified_silhouette`."""
        if k not in self._mss:
            self._mss[k] = _mss(*self._terms(k), self._e)
        return self._mss[k]

    def represented(self, k: int) -> float:
        """Mean silhouette of the non-medoids in the solution for k clusters, see :func:`non_medoid_silhouette`."""
        return _non_medoid(*self._terms(k), self._e)

    def coverage(self, k: int) -> float:
        """Weighted coverage of the solution for k clusters.

            1 − Σ_i e_i a_i / (max D · Σ_i e_i)

        Returns:
            In [0, 1]: 1 where every point with weight coincides with a medoid, 0 where all are as far from theirs as
            any two points are.
        """
        widest = float(self._matrix.max())
        return 1 - float((self._e * self._solved(k)[1]).sum() / (widest * self._e.sum())) if widest > 0 else 1.0

    def _solved(self, k: int) -> tuple[Indices, Floats]:
        """Medoids, ascending, and the distance of every point to its own."""
        if k not in self._found:
            if self._path is not None:
                self._found[k] = self._path.medoids(k)
            else:
                medoids = self._backend(self._d, [k], self._weights)[0].medoids.cpu().numpy()
                self._found[k] = medoids, self._matrix[medoids].min(0)
        return self._found[k]

    def _terms(self, k: int) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        medoids, nearest = self._solved(k)
        # The sum of the medoids' rows differs from that of the previous k by the medoids that differ.
        is_medoid = np.zeros(len(nearest), dtype=bool)
        is_medoid[medoids] = True
        added, removed = (is_medoid & ~self._summed).nonzero()[0], (self._summed & ~is_medoid).nonzero()[0]
        if len(added) + len(removed) < k:
            self._sum += _row_sum(self._matrix, added)
            self._sum -= _row_sum(self._matrix, removed)
        else:
            self._sum = _row_sum(self._matrix, medoids)
        self._summed = is_medoid
        return _a_and_b(self._matrix, medoids, nearest, self._sum)

    def ks_for(self, rule: str, *, fine: bool = True) -> list[int]:
        """The k at which the curve has to be known to find its knee.

        All of 2 … n (1 if n is 1) for n ≤ 32 and for Kneedle's first knee. Otherwise the checkpoints of
        :class:`tp_cosep.functional.kmedoids.GrowingPath`, up to the k where even MSS = 1 would be lower over the
        diagonal than the highest point found, and n, the end of the curve. Then gaps are halved: those beside the
        highest and the lowest point until both neighbouring k have been tried; those beside points less than 0.002
        below the highest until they are no wider than n/50, less than 0.02 below until n/16.

        Args:
            rule: One of :data:`tp_cosep.functional.knee.KNEE_RULES`.
            fine: Whether gaps are halved.

        Returns:
            The k, ascending.
        """
        n = len(self._d)
        if n <= 32 or rule == "first":
            return list(range(min(2, n), n + 1))
        tried = self._coarse(n)
        while fine and (middles := self._middles(tried)):
            tried = sorted({*tried, *middles})
        return tried

    def _coarse(self, n: int) -> list[int]:
        tried: list[int] = []
        highest = at = 0.0
        for k in checkpoints_for(n)[1:-1]:
            # One more beyond the highest, so that the gap after it ends at a checkpoint.
            if 1 - (k - 2) / (n - 2) < highest and at < tried[-1]:
                break
            tried.append(k)
            height = difference_curve([*tried, n], [*map(self.mss, tried), 1.0])[:-1]
            highest, at = height.max(), tried[int(height.argmax())]
        return [*tried, n]

    def _middles(self, tried: list[int]) -> list[int]:
        """Where to divide the gaps that are too wide: at the next checkpoint within a gap, or else at its middle."""
        mss = [self.mss(k) for k in tried]
        height = difference_curve(tried, mss)
        ends = {int(height.argmax()), int(np.argmin(mss))}
        checkpoints, middles = checkpoints_for(tried[-1]), []
        for i, (a, b) in enumerate(pairwise(tried)):
            below = height.max() - height[i : i + 2].max()
            widths = [tried[-1] // share for plateau, share in _PLATEAUS.items() if below <= plateau]
            narrow = 1 if ends & {i, i + 1} else max(1, min(widths, default=b))
            if b - a > narrow:
                checkpoint = next(k for k in checkpoints if k > a)
                middles.append(checkpoint if checkpoint < b else (a + b) // 2)
        return middles
