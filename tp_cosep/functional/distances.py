"""Validation of distance matrices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tp_cosep.errors import InputError
from tp_cosep.functional.swap_table import few_threads

__all__ = ["check_distances"]


def check_distances(distances: Tensor | np.ndarray) -> Tensor:
    """Validate a distance matrix.

    Args:
        distances: ``[n, n]`` tensor or array; square, symmetric (to 1e-6 of its largest entry),
            without negative or non-finite entries, with a zero diagonal (to 1e-6 of its largest entry).

    Returns:
        The matrix as a float64 tensor on its own device, made exactly symmetric.

    Raises:
        InputError: If a requirement does not hold; the message names it and the first offending entry.
    """
    # A copy of an array: torch takes neither read-only nor reversed ones.
    d = distances if isinstance(distances, Tensor) else torch.from_numpy(np.array(distances, dtype=np.float64))
    if d.dim() != 2 or d.shape[0] != d.shape[1] or d.shape[0] == 0:
        raise InputError(f"distances: expected a square matrix [n, n] with n ≥ 1, got shape {tuple(d.shape)}.")
    d = d.to(torch.float64)
    with few_threads(d):
        if _is_clean(d):
            return d.clone().fill_diagonal_(0)
        _raise_for_entries(d)
        return (d + d.T).div_(2).fill_diagonal_(0)


def _is_clean(d: Tensor) -> bool:
    """Whether all entries are valid and the matrix is exactly symmetric already."""
    low, high = (float(x) for x in d.aminmax())  # NaN if any entry is
    return low >= 0 and high < np.inf and _is_symmetric(d) and float(d.diagonal().max()) <= 1e-6 * high


def _is_symmetric(d: Tensor) -> bool:
    if d.is_cuda:
        return torch.equal(d, d.T)
    # Tiles that stay in a core's cache: a whole transposed matrix does not.
    a, size = d.numpy(), 128
    starts = range(0, len(a), size)
    return all(
        np.array_equal(a[i : i + size, j : j + size], a[j : j + size, i : i + size].T)
        for i in starts
        for j in starts
        if i <= j
    )


def _raise_for_entries(d: Tensor) -> None:
    for is_bad, what in (
        (~torch.isfinite(d), "finite"),
        (d < 0, "non-negative"),
        ((d - d.T).abs() > 1e-6 * d.max(), "symmetric"),
        (torch.diag(d.diagonal() > 1e-6 * d.max()), "zero on the diagonal"),
    ):
        if is_bad.any():
            i, j = is_bad.nonzero()[0].tolist()
            raise InputError(
                f"distances: expected every entry to be {what}, got D[{i}, {j}] = {float(d[i, j]):g} and "
                f"D[{j}, {i}] = {float(d[j, i]):g}."
            )
