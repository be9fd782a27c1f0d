"""Profiles of class pairs, computed piece by piece while they are in the processor's cache.

Everything here is ``[components, classes, cells]``: the pairs of one class with those behind it are then
slices, and whatever depends on a single class is computed once. All pairs come in the order of
``torch.triu_indices(C, C, 1)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Kernel", "affinity_kernel", "all_pairs", "elementwise_kernel", "sampled_pairs"]

# Values that are computed at once: some tensors of them stay in the cache of a core.
_PIECE = 2**16
_Stats = tuple[Tensor, ...]


@dataclass(frozen=True)
class Kernel:
    """A function of the statistics of two classes.

    Attributes:
        stats: Of every class, ``[components, classes, cells]`` each.
        write: ``write(first, second, out)`` computes values from the statistics of first and second classes, which
            broadcast to the shape of ``out``.
    """

    stats: _Stats
    write: Callable[[_Stats, _Stats, Tensor], None]

    def values(self, first: _Stats, second: _Stats, out: Tensor) -> None:
        """Compute values for all components, some of them at a time."""
        n_rows = max(1, _PIECE // max(out[0].numel(), 1))
        for i in range(0, len(out), n_rows):
            rows = slice(i, i + n_rows)
            self.write(tuple(x[rows] for x in first), tuple(x[rows] for x in second), out[rows])


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

    def write(first: _Stats, second: _Stats, out: Tensor) -> None:
        (mean_a, var_a, root_a), (mean_b, var_b, root_b) = first, second
        var_sum = var_a + var_b
        torch.sub(mean_a, mean_b, out=out)
        out.square_().div_(var_sum).mul_(-0.25).exp_()
        out.mul_(var_sum.rsqrt_()).mul_(root_a).mul_(root_b)
        finish(out)

    return Kernel((mean, var, root), write)


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

    def write(first: _Stats, second: _Stats, out: Tensor) -> None:
        mean_a, var_a, mean_b, var_b = (x.expand_as(out).contiguous() for x in (*first, *second))
        values = metric(mean_a, var_a, mean_b, var_b)
        check(values, out.shape)
        out.copy_(values)

    return Kernel((mean, var), write)


def all_pairs(kernel: Kernel, n_columns: int | None) -> Iterator[Tensor]:
    """Profiles, some class pairs at a time.

    Args:
        kernel: What computes values.
        n_columns: At most so many values of a component at once, but at least one pair; by default all.

    Yields:
        ``[components, pairs × cells]``.
    """
    _, n_classes, n_cells = kernel.stats[0].shape
    most = max((n_columns or n_classes * n_classes * n_cells) // n_cells, 1)
    segments: list[tuple[int, slice]] = []
    n = 0
    for a in range(n_classes - 1):
        start = a + 1
        while start < n_classes:
            stop = min(n_classes, start + most - n)
            segments.append((a, slice(start, stop)))
            n += stop - start
            start = stop
            if n == most:
                yield _chunk(kernel, segments)
                segments, n = [], 0
    if segments or n_classes < 2:
        yield _chunk(kernel, segments)


def _chunk(kernel: Kernel, segments: list[tuple[int, slice]]) -> Tensor:
    n_components, _, n_cells = kernel.stats[0].shape
    n = sum(b.stop - b.start for _, b in segments)
    chunk = kernel.stats[0].new_empty(n_components, n, n_cells)
    at = 0
    for a, b in segments:
        out = chunk[:, at : at + b.stop - b.start]
        kernel.values(tuple(x[:, a : a + 1] for x in kernel.stats), tuple(x[:, b] for x in kernel.stats), out)
        at += b.stop - b.start
    return chunk.flatten(1)


def sampled_pairs(kernel: Kernel, n_pairs: int, seed: int) -> Iterator[Tensor]:
    """Profiles of some class pairs, in which every class is as often as any other.

    The classes are put on a circle in an order drawn by chance, and paired with those that are δ places further, for
    some δ drawn without replacement from 1 … ⌊(C − 1)/2⌋. Any two classes are paired with equal probability, since the
    order is drawn, so a mean over the sample is an unbiased estimate of that over all pairs.

    Args:
        kernel: What computes values.
        n_pairs: Number of pairs, rounded up to a multiple of the number of classes.
        seed: Of the draw, which depends on the number of classes alone besides.

    Yields:
        ``[components, classes × cells]`` for every δ.
    """
    n_classes = kernel.stats[0].shape[1]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n_classes, generator=generator).to(kernel.stats[0].device)
    shifts = torch.randperm((n_classes - 1) // 2, generator=generator)[: -(-n_pairs // n_classes)] + 1
    stats = tuple(x[:, order] for x in kernel.stats)
    for shift in shifts.tolist():
        out = torch.empty_like(stats[0])
        kernel.values(stats, tuple(x.roll(-shift, 1) for x in stats), out)
        yield out.flatten(1)
