"""How far apart two attention heads are, by their attention maps.

The way of CAHP (arXiv 2606.19150) to compare heads: it needs no labels.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

__all__ = ["ATTENTION_JS", "attention_distances"]

#: The metric that compares attention heads by their maps rather than by what they tell apart.
ATTENTION_JS = "attention-js"


def attention_distances(maps: Tensor) -> Tensor:
    """Root of the mean Jensen-Shannon divergence between the rows of attention maps.

    With P_r the distribution over keys in row r of a map,

        D²(P, Q) = 1/B Σ_r JS(P_r, Q_r),   JS(p, q) = H((p + q)/2) − (H(p) + H(q))/2,   H in bits.

    The root of JS is a metric, and so is D, in [0, 1].

    Args:
        maps: ``[heads, B, B]``, non-negative; rows are scaled to sum to one, a row of zeros to a uniform one.

    Returns:
        ``[heads, heads]`` float64, symmetric with a zero diagonal.

    Example:
        >>> attention_distances(torch.eye(2).repeat(2, 1, 1)[[0, 1]])
        tensor([[0., 0.],
                [0., 0.]], dtype=torch.float64)
    """
    p = maps.to(torch.float64)
    sums = p.sum(-1, keepdim=True)
    p = torch.where(sums > 0, p / sums.clamp(min=torch.finfo(p.dtype).tiny), torch.full_like(p, 1 / p.shape[-1]))
    own = _entropy(p)
    squared = torch.stack([_entropy((p + one) / 2) - (own + _entropy(one)) / 2 for one in p])
    return ((squared + squared.T) / 2).clamp(0, 1).fill_diagonal_(0).sqrt()


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(p, p).sum(-1).mean(-1) / log(2)
    return entropy
