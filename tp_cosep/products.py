"""Products of a matrix with itself."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["self_product"]


def self_product(x: Tensor) -> Tensor:
    """The product of a matrix and its transpose, x xᵀ, where possible at half the cost of that of two matrices.

    Args:
        x: ``[n, m]``, or a transposed matrix.

    Returns:
        ``[n, n]``, symmetric.
    """
    if x.device.type != "cpu":
        return x @ x.T
    rows = x.numpy()
    # NumPy sees that both factors are one matrix and computes half of the products.
    return torch.from_numpy(rows @ rows.T)
