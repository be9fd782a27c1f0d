"""Distances between attention heads by their attention maps, without labels, as in CAHP (arXiv 2606.19150)."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

__all__ = ["jensen_shannon_distances"]


def jensen_shannon_distances(maps: Tensor) -> Tensor:
    """Root of the mean Jensen-Shannon divergence between the rows of attention maps.

    With P_r the distribution over keys in row r of a map, and B rows,

        D²(P, Q) = 1/B Σ_r JS(P_r, Q_r),   JS(p, q) = H((p + q)/2) − (H(p) + H(q))/2,   H in bits.

    The root of JS is a metric, and so is D.

    Source: CAHP (arXiv 2606.19150).

    Args:
        maps: ``[heads, B, B]``, non-negative; rows are scaled to sum to one, and a row of zeros counts as uniform.

    Returns:
        ``[heads, heads]`` float64 in [0, 1], symmetric with a zero diagonal.

    Example:
        >>> jensen_shannon_distances(torch.eye(2).repeat(2, 1, 1)[[0, 1]])
        tensor([[0., 0.],
                [0., 0.]], dtype=torch.float64)
    """
    p = maps.to(torch.float64)
    sums = p.sum(-1, keepdim=True)
    p = torch.where(sums > 0, p / sums.clamp(min=torch.finfo(p.dtype).tiny), torch.full_like(p, 1 / p.shape[-1]))
    entropy = _entropy(p)
    squared = torch.stack([_entropy((p + one) / 2) - (entropy + _entropy(one)) / 2 for one in p])
    return ((squared + squared.T) / 2).clamp(0, 1).fill_diagonal_(0).sqrt()


def _entropy(p: Tensor) -> Tensor:
    """Mean entropy of the rows, in bits."""
    entropy: Tensor = -torch.special.xlogy(p, p).sum(-1).mean(-1) / log(2)
    return entropy
