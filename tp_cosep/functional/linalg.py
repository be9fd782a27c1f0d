"""Matrix products that are symmetric, at half the cost."""

from __future__ import annotations

from torch import Tensor

__all__ = ["add_upper", "mirror", "self_product"]

# Blocks on the diagonal that are not halved any more: smaller ones cost more in calls than they save in products.
_BLOCK = 128


def self_product(x: Tensor) -> Tensor:
    """The product of a matrix and its transpose, x xᵀ; on a CPU of little more than half of its entries.

    NumPy's own symmetric product is as fast, but its threads go on spinning for a while after it, and slow down
    whatever torch computes next: a ResNet-50 that was measured in between, by three quarters.

    Args:
        x: ``[n, m]``, or a transposed matrix, which is not copied.

    Returns:
        ``[n, n]``, symmetric.
    """
    out = x.new_zeros(len(x), len(x))
    add_upper(out, x)
    mirror(out)
    return out


def add_upper(out: Tensor, x: Tensor) -> None:
    """Add x xᵀ in place, to what is above the diagonal and on it; what is below is undefined until :func:`mirror`.

    A matrix that many products are added to is so gone through once for each of them.

    Args:
        out: ``[n, n]``, changed.
        x: ``[n, m]``, or a transposed matrix.
    """
    if _is_whole(out):
        out.addmm_(x, x.T)
        return
    half = len(x) // 2
    upper, lower = x[:half], x[half:]
    add_upper(out[:half, :half], upper)
    add_upper(out[half:, half:], lower)
    out[:half, half:].addmm_(upper, lower.T)


def mirror(out: Tensor) -> None:
    """Make a square matrix symmetric in place, by what is above its diagonal.

    Args:
        out: ``[n, n]``, changed.
    """
    if _is_whole(out):
        out.copy_(out.triu() + out.triu(1).T)
        return
    half = len(out) // 2
    mirror(out[:half, :half])
    mirror(out[half:, half:])
    out[half:, :half] = out[:half, half:].T


def _is_whole(out: Tensor) -> bool:
    """Whether a matrix is not halved: on other devices a single call costs less than the products that are saved."""
    return len(out) <= _BLOCK or out.device.type != "cpu"
