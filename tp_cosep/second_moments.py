"""Second moments of what a layer reads: sums of products of all pairs of its inputs, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tp_cosep.errors import InputError

__all__ = ["SecondMoments"]


class SecondMoments:
    """Σ w z zᵀ over rows, z = (x, 1): second moments, sums and the weight of all rows in one matrix.

    Rows are kept apart in two folds, so that whatever is fitted to one can be tried on the other.

    Args:
        n_features: Length of x.
        device: Of the sums.

    Attributes:
        folds: ``[2, n_features + 1, n_features + 1]`` float64.

    Example:
        >>> moments = SecondMoments(2)
        >>> moments.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> moments.folds.sum(0)
        tensor([[10., 14.,  4.],
                [14., 20.,  6.],
                [ 4.,  6.,  2.]], dtype=torch.float64)
    """

    def __init__(self, n_features: int, device: torch.device | str = "cpu") -> None:
        self.folds = torch.zeros(2, n_features + 1, n_features + 1, dtype=torch.float64, device=device)

    @property
    def n_features(self) -> int:
        """Length of a row."""
        return self.folds.shape[1] - 1

    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add rows: the first half to one fold, the second half to the other, in turns where the number is odd.

        Args:
            x: ``[rows, n_features]``; of one batch, so that a sample's rows lie together.
            weights: ``[rows]``, how often each counts; once by default.

        Raises:
            InputError: If a value is NaN or infinite, or so large that its square is.
        """
        x = x.detach().to(torch.float64)
        z = torch.cat([x, x.new_ones(len(x), 1)], 1)
        scaled = z if weights is None else z * weights[:, None]
        # The fold that has seen less gets the larger half.
        behind = int(self.folds[1, -1, -1] < self.folds[0, -1, -1])
        half = (len(z) + 1) // 2
        for fold, rows in ((behind, slice(0, half)), (1 - behind, slice(half, None))):
            self.folds[fold].addmm_(scaled[rows].T, z[rows])
        if not torch.isfinite(self.folds.diagonal(dim1=1, dim2=2)).all():
            raise InputError("expected finite inputs, got NaN or infinite ones")

    def add_zeros(self, weight: float) -> None:
        """Add rows of zeros, half of the weight to each fold: what a convolution reads outside of its map."""
        self.folds[:, -1, -1] += weight / 2

    def of(self, features: Sequence[int] | Tensor) -> SecondMoments:
        """The moments of some of the features."""
        kept = torch.as_tensor(features, device=self.folds.device)
        idxs = torch.cat([kept, kept.new_tensor([self.n_features])])
        part = SecondMoments(0)
        part.folds = self.folds[:, idxs[:, None], idxs]
        return part
