"""The Mean Simplified Silhouette over the number of clusters, at no more of them than its knee needs.

Letters: n points, k clusters; lo is the lowest MSS found. The *height* of a curve at k is that of Kneedle's difference
curve, (MSS(k) − lo) / (1 − lo) − (k − 2) / (n − 2).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tp_cosep.functional.kmedoids import GrowingPath, KMedoids, check_backend, checkpoints_for
from tp_cosep.functional.knee import KneeMethod, difference_curve
from tp_cosep.functional.silhouette import row_sum, silhouette_of
from tp_cosep.functional.swap_table import Floats, Indices

__all__ = ["Curve"]

# Beside heights that are by less below the highest, gaps are halved until they are no wider than a share of n.
_PLATEAUS = {0.002: 50, 0.02: 16}


class Curve:
    """Solutions and their silhouettes, found when they are asked for.

    Args:
        d: ``[n, n]``, as :func:`tp_cosep.functional.kmedoids.check_distances` returns it.
        form: See :func:`tp_cosep.functional.silhouette.mean_simplified_silhouette`.
        backend: See :func:`tp_cosep.functional.kmedoids.k_medoids`.
    """

    def __init__(self, d: Tensor, *, form: str, backend: str) -> None:
        self._d = d
        self._matrix = d.cpu().numpy()
        self._form = form
        self._backend = check_backend(backend)
        self._path = GrowingPath(d) if backend == "native" else None
        self._found: dict[int, tuple[Indices, Floats]] = {}
        self._mss: dict[int, float] = {}
        self._summed, self._sum = np.zeros(len(d), dtype=bool), np.zeros(len(d))

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
        """The mean of 1 − a/b of those that are no medoids in the solution for k, see :mod:`tp_cosep.functional.silhouette`."""
        # Over non-medoids alone it is GB-AFS's form of the silhouette (a ≤ b but for ties).
        return self._silhouette(k, "gb-afs")

    def _silhouette(self, k: int, form: str) -> float:
        medoids, nearest = self._solved(k)
        # The sum over the medoids' rows is that of the k before, but for the medoids in which they differ.
        now = np.zeros(len(nearest), dtype=bool)
        now[medoids] = True
        come, gone = (now & ~self._summed).nonzero()[0], (self._summed & ~now).nonzero()[0]
        if len(come) + len(gone) < k:
            self._sum += row_sum(self._matrix, come)
            self._sum -= row_sum(self._matrix, gone)
        else:
            self._sum = row_sum(self._matrix, medoids)
        self._summed = now
        return silhouette_of(self._matrix, medoids, nearest, self._sum, form=form)

    def ks_for(self, knee: KneeMethod, *, fine: bool = True) -> list[int]:
        """The k at which the curve has to be known for a knee.

        All of 2 … n (1 if n is 1) for n ≤ 32, for Kneedle's first knee and for a polynomial through the curve.
        Otherwise the checkpoints of :class:`tp_cosep.functional.kmedoids.GrowingPath`, up to the k where even MSS = 1 would be
        lower over the diagonal than the highest found, and n, the end of the curve. Then gaps are halved: those beside
        the highest and the lowest point until both k next to it have been tried; those beside points that are less
        than 0.002 lower than the highest until they are no wider than n/50, less than 0.02 lower until n/16.

        Args:
            knee: How it is found.
            fine: Whether gaps are halved.

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
        highest = at = 0.0
        for k in checkpoints_for(n)[1:-1]:
            # One more beyond the highest, so that the gap behind it ends at a checkpoint.
            if 1 - (k - 2) / (n - 2) < highest and at < tried[-1]:
                break
            tried.append(k)
            height = difference_curve([*tried, n], [*map(self.mss, tried), 1.0])[:-1]
            highest, at = height.max(), tried[int(height.argmax())]
        return [*tried, n]

    def _gaps(self, tried: list[int]) -> list[int]:
        """The middles of the gaps that are to be halved; the next checkpoint where there is one in a gap."""
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
