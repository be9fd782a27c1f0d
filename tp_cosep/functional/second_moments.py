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

    Rows may be kept apart in two folds, so that whatever is fitted to one can be tried on the other.

    Args:
        n_features: Length of x.
        device: Of the sums.
        n_folds: 1 or 2.

    Rows wait until there are as many as features: sums of a few rows cost as much as those of many.

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
        self._waiting: list[list[Tensor]] = [[] for _ in range(n_folds)]
        self._counts = [0] * n_folds
        self._is_upper = False  # whether only what is above the diagonals is up to date

    @classmethod
    def from_sums(cls, sums: Tensor) -> SecondMoments:
        """Moments of what has been summed before, see :attr:`folds`."""
        moments = cls(0)
        moments._sums = sums.clone()
        moments._waiting = [[] for _ in sums]
        moments._counts = [round(float(fold[-1, -1])) for fold in sums]
        return moments

    @property
    def folds(self) -> Tensor:
        """The sums of every fold, ``[folds, n_features + 1, n_features + 1]`` float64."""
        for fold in range(len(self._counts)):
            self._add_up(fold)
        if self._is_upper:
            for sums in self._sums:
                mirror(sums)
            self._is_upper = False
        return self._sums

    @property
    def n_features(self) -> int:
        """Length of a row."""
        return self._sums.shape[1] - 1

    @property
    def n_rows(self) -> int:
        """Rows in all folds."""
        return sum(self._counts)

    def update(self, x: Tensor) -> None:
        """Add rows; of two folds the larger half goes to the one that has fewer.

        Args:
            x: ``[rows, n_features]``; of one batch, the rows of a sample next to each other.

        Raises:
            InputError: If a value is NaN or infinite; the sums stay as they were.
        """
        x = x.detach().to(torch.float64)
        # The sum is finite if all of them are, and otherwise only if infinities cancel, which makes NaN.
        if not bool(torch.isfinite(x.sum())):
            raise InputError("got NaN or infinite inputs; check the data and the weights.")
        n_folds = len(self._counts)
        order = sorted(range(n_folds), key=self._counts.__getitem__)
        for fold, rows in zip(order, x.tensor_split(n_folds), strict=True):
            self._waiting[fold].append(rows)
            self._counts[fold] += len(rows)
            if sum(map(len, self._waiting[fold])) >= self.n_features:
                self._add_up(fold)

    def sum_up(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Add what others have, ``summed(x)`` being the sum of x over everybody."""
        self._sums = summed(self.folds)
        self._counts = [round(float(sums[-1, -1])) for sums in self._sums]

    def of(self, features: Tensor) -> SecondMoments:
        """The moments of some of the features, ``[n]`` int64."""
        idxs = torch.cat([features, features.new_tensor([self.n_features])]).to(self.folds.device)
        part = SecondMoments(0)
        part._sums, part._counts = self.folds[:, idxs[:, None], idxs], [*self._counts]
        return part

    def _add_up(self, fold: int) -> None:
        if not self._waiting[fold]:
            return
        waiting = self._waiting[fold]
        x = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
        waiting.clear()
        sums = self._sums[fold]
        add_upper(sums[:-1, :-1], x.T)
        sums[:-1, -1] += x.sum(0)
        sums[-1, -1] += len(x)
        self._is_upper = True
