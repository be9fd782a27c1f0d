"""Second moments of rows: sums of products of all pairs of features, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tp_cosep.errors import InputError

__all__ = ["SecondMoments"]


class SecondMoments:
    """Σ z zᵀ over rows x, z = (x, 1): second moments, sums and the number of rows in one matrix.

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

    @property
    def n_rows(self) -> int:
        """Rows in both folds."""
        return int(self.folds[:, -1, -1].sum())

    def update(self, x: Tensor) -> None:
        """Add rows: one half to one fold, the other to the other, the larger half to the fold that has fewer.

        Args:
            x: ``[rows, n_features]``; of one batch, the rows of a sample next to each other.

        Raises:
            InputError: If a value is NaN or infinite; the sums stay as they were.
        """
        x = x.detach().to(torch.float64)
        z = torch.cat([x, x.new_ones(len(x), 1)], 1)
        behind = int(self.folds[1, -1, -1] < self.folds[0, -1, -1])
        half = (len(z) + 1) // 2
        grams = _gram(z[:half]), _gram(z[half:])
        if not all(bool(torch.isfinite(g.diagonal()).all()) for g in grams):
            raise InputError("got NaN or infinite inputs; check the data and the weights.")
        self.folds[behind] += grams[0]
        self.folds[1 - behind] += grams[1]

    def of(self, features: Tensor) -> SecondMoments:
        """The moments of some of the features, ``[n]`` int64."""
        idxs = torch.cat([features, features.new_tensor([self.n_features])]).to(self.folds.device)
        part = SecondMoments(0)
        part.folds = self.folds[:, idxs[:, None], idxs]
        return part


def _gram(z: Tensor) -> Tensor:
    if z.device.type != "cpu":
        return z.T @ z
    rows = z.numpy()
    # NumPy sees that both factors are one matrix and computes half of the products.
    return torch.from_numpy(rows.T @ rows)
