"""The Mean Simplified Silhouette over the number of clusters, at no more of them than its knee needs.

Letters: n points, k clusters; lo is the lowest MSS found. The *height* of a curve at k is that of Kneedle's difference
curve, (MSS(k) − lo) / (1 − lo) − (k − 2) / (n − 2).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tp_cosep.assignment import Floats, Indices
from tp_cosep.knee import KneeMethod, difference_curve
from tp_cosep.medoids import GrowingPath, KMedoids, check_backend, checkpoints_for
from tp_cosep.silhouette import silhouette_of

__all__ = ["Curve"]

# Heights that differ by less are all looked at more closely.
_PLATEAU = 0.002
_CLOSE = 0.02


class Curve:
    """Solutions and their silhouettes, found when they are asked for.

    Args:
        d: ``[n, n]``, as :func:`tp_cosep.medoids.check_distances` returns it.
        form: See :func:`tp_cosep.silhouette.mean_simplified_silhouette`.
        backend: See :func:`tp_cosep.medoids.k_medoids`.
    """

    def __init__(self, d: Tensor, *, form: str, backend: str) -> None:
        self._d = d
        self._matrix = d.cpu().numpy()
        self._form = form
        self._backend = check_backend(backend)
        self._path = GrowingPath(d) if backend == "native" else None
        self._found: dict[int, tuple[Indices, Floats]] = {}
        self._mss: dict[int, float] = {}

    def solution(self, k: int) -> KMedoids:
        """The k-medoids solution for k.

        Returns:
            It, on the device of the matrix.
        """
        return KMedoids.from_medoids(self._d, torch.from_numpy(self._solved(k)[0]).to(self._d.device))

    def _solved(self, k: int) -> tuple[Indices, Floats]:
        """Medoids, ascending, and the distance of every point to its own."""
        if k not in self._found:
            if self._path is not None:
                self._found[k] = self._path.medoids(k)
            else:
                medoids = self._backend(self._d, [k])[0].medoids.cpu().numpy()
                self._found[k] = medoids, self._matrix[medoids].min(0)
        return self._found[k]

    def mss(self, k: int) -> float:
        """MSS of the solution for k.

        Returns:
            It, at most 1.
        """
        if k not in self._mss:
            self._mss[k] = self._silhouette(k, self._form)
        return self._mss[k]

    def represented(self, k: int) -> float:
        """The mean of 1 − a/b of those that are no medoids in the solution for k, see :mod:`tp_cosep.silhouette`."""
        # Over non-medoids alone it is GB-AFS's form of the silhouette (a ≤ b but for ties).
        return self._silhouette(k, "gb-afs")

    def _silhouette(self, k: int, form: str) -> float:
        return silhouette_of(self._matrix, *self._solved(k), form=form)

    def ks_for(self, knee: KneeMethod, *, fine: bool = True) -> list[int]:
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
        while fine and (gaps := self._gaps(tried)):
            tried = sorted({*tried, *gaps})
        return tried

    def _coarse(self, n: int) -> list[int]:
        tried: list[int] = []
        lowest, highest, best = 1.0, 0.0, 0
        for k in checkpoints_for(n)[1:-1]:
            room = 1 - (k - 2) / (n - 2)
            if room < highest and best != tried[-1]:
                break
            tried.append(k)
            mss = self.mss(k)
            if mss < lowest:
                lowest = mss
                heights = difference_curve([*tried, n], [*map(self.mss, tried), 1.0])
                highest, best = heights.max(), tried[min(int(heights.argmax()), len(tried) - 1)]
            elif lowest < 1:
                height = (mss - lowest) / (1 - lowest) - 1 + room
                if height > highest:
                    highest, best = height, k
        return [*tried, n]

    def _gaps(self, tried: list[int]) -> list[int]:
        """The middles of the gaps beside the highest point, and of wider ones beside points almost as high."""
        height = difference_curve(tried, [self.mss(k) for k in tried])
        highest = height.max()
        middles = []
        for i, (a, b) in enumerate(pairwise(tried)):
            nearest = height[i : i + 2].max()
            if nearest == highest:
                narrow = 1
            elif nearest >= highest - _PLATEAU:
                narrow = max(1, tried[-1] // 100)
            elif nearest >= highest - _CLOSE:
                narrow = max(1, tried[-1] // 16)
            else:
                continue
            if b - a > narrow:
                middles.append((a + b) // 2)
        return middles
