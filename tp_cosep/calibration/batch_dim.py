"""Where the samples of a batch are in a layer's tensor.

Not always in the first dimension: recurrent and older transformer layers put time first, window attention folds its
windows into the batch. Which it is can be seen: run the model on a few samples and on some of them, and
compare. Tensors here have their channels in the last dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout", "find_layout", "to_samples"]


@dataclass(frozen=True)
class Layout:
    """How a tensor holds samples.

    Attributes:
        dim: The dimension they are in.
        is_minor: Where a sample has several rows of that dimension: whether they are n rows apart (rows
            sorted by position, then by sample) rather than next to each other.
    """

    dim: int = 0
    is_minor: bool = False


def find_layout(more: Tensor, fewer: Tensor, n_more: int, n_fewer: int) -> Layout | None:
    """The layout of a layer's tensor, from its values for n samples and for the first few of these.

    Args:
        more: ``[..., channels]`` for ``n_more`` samples.
        fewer: The same for the first ``n_fewer`` < ``n_more`` of them.
        n_more: Number of samples.
        n_fewer: Number of samples.

    Returns:
        The layout; ``None`` if no dimension grows with the number of samples, or more than one does, or the
        rows of the first samples are neither the first ones nor every n-th.
    """
    if more.dim() != fewer.dim() or more.shape[-1] != fewer.shape[-1]:
        return None
    grown = [i for i in range(more.dim() - 1) if more.shape[i] != fewer.shape[i]]
    if len(grown) != 1:
        return None
    dim = grown[0]
    n_rows, rest = divmod(more.shape[dim], n_more)
    if rest or fewer.shape[dim] != n_rows * n_fewer:
        return None
    if n_rows == 1:
        return Layout(dim)
    for layout in (Layout(dim), Layout(dim, is_minor=True)):
        a, b = to_samples(more, layout, n_more), to_samples(fewer, layout, n_fewer)
        assert a is not None
        assert b is not None
        a = a[:n_fewer]
        scale = 1e-3 * float(a.float().nan_to_num(posinf=0, neginf=0).abs().max())
        # The same numbers but for the order of summation, which may depend on the batch.
        if torch.allclose(a.float(), b.float(), rtol=1e-3, atol=scale, equal_nan=True):
            return layout
    return None


def to_samples(x: Tensor, layout: Layout, n_samples: int) -> Tensor | None:
    """A layer's tensor with one row per sample: ``[samples, channels, ...]``.

    Where a sample had several rows, all its positions become one dimension.

    Args:
        x: ``[..., channels]``.
        layout: See :func:`find_layout`.
        n_samples: Number of samples.

    Returns:
        The tensor, a view where possible; ``None`` if its rows are not a multiple of the samples.
    """
    x = x.movedim(layout.dim, 0)
    n_rows, rest = divmod(len(x), n_samples)
    if rest or n_rows == 0:
        return None
    if n_rows == 1:
        return x.movedim(-1, 1)
    shape = (n_rows, n_samples) if layout.is_minor else (n_samples, n_rows)
    x = x.reshape(*shape, *x.shape[1:])
    if layout.is_minor:
        x = x.transpose(0, 1)
    return x.flatten(1, -2).transpose(1, 2)
