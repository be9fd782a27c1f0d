"""Second moments of rows: sums of products of all pairs of features, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tp_cosep.errors import InputError
from tp_cosep.functional.linalg import add_upper, mirror

__all__ = ["SecondMoments"]


class SecondMoments:
    """Σ z zᵀ over rows x, z = (x, 1): second moments, sums and the number of rows in one matrix.

    With two folds, a fit to the rows of one can be validated on the other.

    Rows are collected until they are as many as features: adding few rows costs as much as adding many.

    Args:
        n_features: Length of a row x.
        device: Device of the sums.
        n_folds: Number of folds, 1 or 2.

    Example:
        >>> moments = SecondMoments(2)
        >>> moments.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> moments.folds.sum(0)
        tensor([[10., 14.,  4.],
                [14., 20.,  6.],
                [ 4.,  6.,  2.]], dtype=torch.float64)
    """

    def __init__(self, n_features: int, device: torch.device | str = "cpu", *, n_folds: int = 2) -> None:
        self._sums = torch.zeros(n_folds, n_features + 1, n_features + 1, dtype=torch.float64, device=device)
        self._collected: list[list[Tensor]] = [[] for _ in range(n_folds)]
        self._counts = [0] * n_folds
        self._is_upper = False  # whether the sums below the diagonals are out of date

    @classmethod
    def from_sums(cls, sums: Tensor) -> SecondMoments:
        """Moments that continue from given sums.

        Args:
            sums: ``[folds, n_features + 1, n_features + 1]`` float64, as in :attr:`folds`; copied.

        Returns:
            The moments, on the device of the sums.
        """
        moments = cls(0)
        moments._sums = sums.clone()
        moments._collected = [[] for _ in sums]
        moments._counts = [round(float(fold[-1, -1])) for fold in sums]
        return moments

    @property
    def folds(self) -> Tensor:
        """The sums of every fold, ``[folds, n_features + 1, n_features + 1]`` float64."""
        for fold in range(len(self._counts)):
            self._add_collected(fold)
        if self._is_upper:
            for sums in self._sums:
                mirror(sums)
            self._is_upper = False
        return self._sums

    @property
    def n_features(self) -> int:
        """Length of a row x."""
        return self._sums.shape[1] - 1

    @property
    def n_rows(self) -> int:
        """Number of rows in all folds."""
        return sum(self._counts)

    def update(self, x: Tensor) -> None:
        """Add rows. With two folds the larger half is added to the fold with fewer rows.

        Args:
            x: ``[rows, n_features]`` of one batch, the rows of a sample next to each other.

        Raises:
            InputError: If a value is NaN or infinite; the sums stay as they were.
        """
        x = x.detach().to(torch.float64)
        # A sum with NaN or infinite terms is never finite: opposite infinities sum to NaN.
        if not bool(torch.isfinite(x.sum())):
            raise InputError("got NaN or infinite inputs; check the data and the weights.")
        n_folds = len(self._counts)
        order = sorted(range(n_folds), key=self._counts.__getitem__)
        for fold, rows in zip(order, x.tensor_split(n_folds), strict=True):
            self._collected[fold].append(rows)
            self._counts[fold] += len(rows)
            if sum(map(len, self._collected[fold])) >= self.n_features:
                self._add_collected(fold)

    def sum_up(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by those over all processes.

        Args:
            summed: ``summed(x)`` is the sum of x over all processes.
        """
        self._sums = summed(self.folds)
        self._counts = [round(float(sums[-1, -1])) for sums in self._sums]

    def of(self, features: Tensor) -> SecondMoments:
        """Moments of a subset of the features, ``[n]`` int64 indices, in their order."""
        idxs = torch.cat([features, features.new_tensor([self.n_features])]).to(self.folds.device)
        part = SecondMoments(0)
        part._sums, part._counts = self.folds[:, idxs[:, None], idxs], [*self._counts]
        return part

    def _add_collected(self, fold: int) -> None:
        """Add the rows that a fold has collected to its sums."""
        if not self._collected[fold]:
            return
        collected = self._collected[fold]
        x = collected[0] if len(collected) == 1 else torch.cat(collected)
        collected.clear()
        sums = self._sums[fold]
        add_upper(sums[:-1, :-1], x.T)
        sums[:-1, -1] += x.sum(0)
        sums[-1, -1] += len(x)
        self._is_upper = True
