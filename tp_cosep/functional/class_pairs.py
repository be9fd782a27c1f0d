"""Separability of class pairs, computed in pieces that fit into the processor's cache.

Statistics are ``[components, classes, cells]``: the pairs of one class with those after it are then slices, and terms
of a single class are computed once. All pairs come in the order of ``torch.triu_indices(C, C, 1)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Kernel", "affinity_kernel", "all_pairs", "elementwise_kernel", "sampled_pairs"]

# Values that are computed at once: several tensors of this size fit into a core's cache.
_PIECE = 2**16
_Stats = tuple[Tensor, ...]


@dataclass(frozen=True)
class Kernel:
    """An elementwise function of the statistics of two classes.

    Attributes:
        stats: Statistics of all classes, ``[components, classes, cells]`` each.
        write: ``write(first, second, out)`` writes the values for pairs of classes into ``out``; the statistics of the
            first and of the second classes broadcast to its shape.
    """

    stats: _Stats
    write: Callable[[_Stats, _Stats, Tensor], None]

    def values(self, first: _Stats, second: _Stats, out: Tensor) -> None:
        """Write the values of all components into ``out``, some of them at a time."""
        n_rows = max(1, _PIECE // max(out[0].numel(), 1))
        for i in range(0, len(out), n_rows):
            rows = slice(i, i + n_rows)
            self.write(tuple(x[rows] for x in first), tuple(x[rows] for x in second), out[rows])


def affinity_kernel(mean: Tensor, var: Tensor, finish: Callable[[Tensor], object]) -> Kernel:
    """A kernel for functions of the Bhattacharyya coefficient e^−B between two Gaussians.

        e^−B = √(2 σ_a σ_b / (σ_a² + σ_b²)) · exp(−¼ (μ_a − μ_b)² / (σ_a² + σ_b²))

    The coefficient is invariant under affine maps. So every component is standardised first, and no scale is too large
    or too small.

    Args:
        mean: Class means μ, ``[components, classes, cells]``.
        var: Class variances σ², ``[components, classes, cells]``, positive.
        finish: Turns coefficients into the kernel's values, in place.

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
    """A kernel for any elementwise function of the means and variances of two classes.

    Args:
        metric: ``metric(mean_a, var_a, mean_b, var_b)``, on tensors of one shape.
        mean: Class means, ``[components, classes, cells]``.
        var: Class variances, ``[components, classes, cells]``, positive.
        check: ``check(values, shape)`` raises if the metric's values are not valid or not of that shape.

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
    """Profiles over all class pairs, in chunks of pairs.

    Args:
        kernel: The separability of two classes.
        n_columns: Largest number of values of a component in a chunk, which holds at least one pair; ``None`` for one
            chunk.

    Yields:
        ``[components, pairs × cells]`` for some pairs.
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
    """Profiles over a sample of class pairs, in which every class occurs equally often.

    The classes are put on a circle in random order, and paired with those δ places further, for some δ drawn without
    replacement from 1 … ⌊(C − 1)/2⌋. Any two classes are paired with equal probability, so a mean over the sample is an
    unbiased estimate of the mean over all pairs. The pairs of one δ are a *cycle*.

    Args:
        kernel: The separability of two classes.
        n_pairs: Number of pairs, rounded up to a multiple of the number of classes C.
        seed: Seed of the draw, which depends on nothing else but C.

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
