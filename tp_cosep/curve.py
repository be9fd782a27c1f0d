"""The Mean Simplified Silhouette over the number of clusters, at no more of them than its knee needs.

Letters: n points, k clusters; lo is the lowest MSS found. The *height* of a curve at k is that of Kneedle's difference
curve, (MSS(k) − lo) / (1 − lo) − (k − 2) / (n − 2).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from tp_cosep.knee import KneeMethod, difference_curve
from tp_cosep.medoids import GrowingPath, KMedoids, check_backend, checkpoints_for
from tp_cosep.silhouette import mean_simplified_silhouette

__all__ = ["Curve"]

# Heights that differ by less are all looked at more closely.
_PLATEAU = 0.002


class Curve:
    """Solutions and their silhouettes, found when they are asked for.

    Args:
        d: ``[n, n]``, as :func:`tp_cosep.medoids.check_distances` returns it.
        form: See :func:`tp_cosep.silhouette.mean_simplified_silhouette`.
        backend: See :func:`tp_cosep.medoids.k_medoids`.
    """

    def __init__(self, d: Tensor, *, form: str, backend: str) -> None:
        self._d = d
        self._matrix = d.cpu()
        self._form = form
        self._solve: Callable[[int], KMedoids]
        solver = check_backend(backend)
        if backend == "native":
            self._solve = GrowingPath(d).solve
        else:
            self._solve = lambda k: solver(d, [k])[0]
        self._solutions: dict[int, KMedoids] = {}
        self._mss: dict[int, float] = {}

    def solution(self, k: int) -> KMedoids:
        """The k-medoids solution for k.

        Returns:
            It, the same one each time.
        """
        if k not in self._solutions:
            self._solutions[k] = self._solve(k)
        return self._solutions[k]

    def mss(self, k: int) -> float:
        """MSS of the solution for k.

        Returns:
            It, at most 1.
        """
        if k not in self._mss:
            solution = self.solution(k)
            self._mss[k] = mean_simplified_silhouette(
                self._matrix, solution.medoids.cpu(), solution.labels.cpu(), form=self._form
            )
        return self._mss[k]

    def ks_for(self, knee: KneeMethod) -> list[int]:
        """The k at which the curve has to be known for a knee.

        All of 2 … n (1 if n is 1) for n ≤ 32, for Kneedle's first knee and for a polynomial through the curve.
        Otherwise the checkpoints of :class:`tp_cosep.medoids.GrowingPath`, up to the k where even MSS = 1 would be
        lower over the diagonal than the highest found, and n, the end of the curve; then the gaps beside the
        highest are halved until both k next to it have been tried, and those beside points that are less than 0.002
        lower until they are no wider than a hundredth of n.

        Returns:
            Ascending.
        """
        n = len(self._d)
        is_any_needed = knee.rule == "first" or knee.interp_method != "interp1d" or self._form != "paper"
        if n <= 32 or is_any_needed:
            return list(range(min(2, n), n + 1))
        tried = self._coarse(n)
        while gaps := self._gaps(tried):
            tried = sorted({*tried, *gaps})
        return tried

    def _coarse(self, n: int) -> list[int]:
        tried: list[int] = []
        lowest, highest = 1.0, 0.0
        for k in checkpoints_for(n)[1:-1]:
            room = 1 - (k - 2) / (n - 2)
            if room < highest:
                break
            tried.append(k)
            mss = self.mss(k)
            if mss < lowest:
                lowest = mss
                highest = max(difference_curve([*tried, n], [*map(self.mss, tried), 1.0]))
            elif lowest < 1:
                highest = max(highest, (mss - lowest) / (1 - lowest) - 1 + room)
        return [*tried, n]

    def _gaps(self, tried: list[int]) -> list[int]:
        """The middles of the gaps beside the highest point, and of wider ones beside points almost as high."""
        height = difference_curve(tried, [self.mss(k) for k in tried])
        highest = height.max()
        is_high = height >= highest - _PLATEAU
        middles = []
        for i, (a, b) in enumerate(pairwise(tried)):
            narrow = 1 if highest in height[i : i + 2] else max(1, tried[-1] // 100)
            if b - a > narrow and is_high[i : i + 2].any():
                middles.append((a + b) // 2)
        return middles
