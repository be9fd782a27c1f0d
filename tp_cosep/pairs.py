"""Profiles of class pairs, computed piece by piece while they are in the processor's cache.

Everything here is ``[components, classes, cells]``: the pairs of one class with those behind it are then
slices, and whatever depends on a single class is computed once. Pairs are in the order of
``torch.triu_indices(C, C, 1)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Kernel", "affinity_kernel", "elementwise_kernel", "pair_chunks"]

#: ``kernel(rows, a, b, out)`` writes the values of class ``a`` with the classes of the slice ``b``, for the components
#: of the slice ``rows``, to ``out``, ``[rows, classes, cells]``.
Kernel: TypeAlias = Callable[[slice, int, slice, Tensor], None]

# Values that are computed at once: some tensors of them stay in the cache of a core.
_PIECE = 2**16


def affinity_kernel(mean: Tensor, var: Tensor, finish: Callable[[Tensor], object]) -> Kernel:
    """A kernel for functions of the Bhattacharyya coefficient e^−B between two Gaussians.

    e^−B = √(2 σ_a σ_b / (σ_a² + σ_b²)) · exp(−¼ (μ_a − μ_b)² / (σ_a² + σ_b²)). It does not change under an affine map,
    so every component is brought to a common scale first, and no scale is too large or too small.

    Args:
        mean: ``[components, classes, cells]``.
        var: Same shape, positive.
        finish: Turns coefficients into the values, in place.

    Returns:
        The kernel.
    """
    scale = var.mean(1, keepdim=True).sqrt()
    mean, std = (mean - mean.mean(1, keepdim=True)) / scale, var.sqrt() / scale
    var, root = std.square(), (2**0.5 * std).sqrt()  # root_a root_b is √(2 σ_a σ_b)

    def kernel(rows: slice, a: int, b: slice, out: Tensor) -> None:
        var_sum = var[rows, b] + var[rows, a, None]
        torch.sub(mean[rows, b], mean[rows, a, None], out=out)
        out.square_().div_(var_sum).mul_(-0.25).exp_()
        out.mul_(var_sum.rsqrt_()).mul_(root[rows, b]).mul_(root[rows, a, None])
        finish(out)

    return kernel


def elementwise_kernel(
    metric: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], mean: Tensor, var: Tensor, check: Callable[..., object]
) -> Kernel:
    """A kernel for any function of two means and variances of one shape.

    Args:
        metric: ``metric(mean_a, var_a, mean_b, var_b)``.
        mean: ``[components, classes, cells]``.
        var: Same shape, positive.
        check: ``check(values, shape)`` refuses what is not as it should be.

    Returns:
        The kernel.
    """

    def kernel(rows: slice, a: int, b: slice, out: Tensor) -> None:
        mean_b, var_b = mean[rows, b], var[rows, b]
        mean_a, var_a = (x[rows, a, None].expand_as(mean_b).contiguous() for x in (mean, var))
        values = metric(mean_a, var_a, mean_b, var_b)
        check(values, out.shape)
        out.copy_(values)

    return kernel


def pair_chunks(kernel: Kernel, like: Tensor, n_columns: int | None) -> Iterator[Tensor]:
    """Profiles, some class pairs at a time.

    Args:
        kernel: What computes values.
        like: ``[components, classes, cells]``, of the shape, type and device of what the kernel reads.
        n_columns: At most so many values of a component at once, but at least one pair; by default all.

    Yields:
        ``[components, pairs × cells]``.
    """
    _, n_classes, n_cells = like.shape
    most = max((n_columns or n_classes * n_classes * n_cells) // n_cells, 1)
    waiting: list[tuple[int, slice]] = []
    n_waiting = 0
    for a in range(n_classes - 1):
        start = a + 1
        while start < n_classes:
            stop = min(n_classes, start + most - n_waiting)
            waiting.append((a, slice(start, stop)))
            n_waiting += stop - start
            start = stop
            if n_waiting == most:
                yield _chunk(kernel, waiting, like)
                waiting, n_waiting = [], 0
    if waiting or n_classes < 2:
        yield _chunk(kernel, waiting, like)


def _chunk(kernel: Kernel, segments: list[tuple[int, slice]], like: Tensor) -> Tensor:
    n_components, _, n_cells = like.shape
    widths = [(b.stop - b.start) * n_cells for _, b in segments]
    chunk = like.new_empty(n_components, sum(widths))
    at = 0
    for (a, b), width in zip(segments, widths, strict=True):
        n_rows = max(1, _PIECE // width)
        for i in range(0, n_components, n_rows):
            rows = slice(i, min(i + n_rows, n_components))
            kernel(rows, a, b, chunk[rows, at : at + width].view(-1, b.stop - b.start, n_cells))
        at += width
    return chunk
