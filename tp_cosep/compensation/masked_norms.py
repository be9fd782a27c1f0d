"""LayerNorm and GroupNorm as they will be after pruning: statistics over the kept channels only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, layer_norm

from tp_cosep.graph.groups import DependencyGroup

__all__ = ["normalised_without"]


@contextmanager
def normalised_without(group: DependencyGroup) -> Iterator[None]:
    """Mask the channels that a group is about to remove in its LayerNorms and GroupNorms.

    Their statistics are over channels, so their outputs for kept channels depend on the pruned ones. Inside the
    context, pruned channels are excluded from the statistics and are zero in the outputs.

    Args:
        group: A ``tp.Group`` that is not pruned yet.
    """
    pruned: dict[nn.Module, set[int]] = {}
    for dep, idxs in group:
        layer = dep.target.module
        if isinstance(layer, nn.GroupNorm) or (isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1):
            pruned.setdefault(layer, set()).update(idxs)
    handles = []
    try:
        for layer, channels in pruned.items():
            handles.append(layer.register_forward_hook(_without(channels)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without(prune_idxs: set[int]) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook that normalises over the other channels."""

    def hook(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        n = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.normalized_shape[0]
        kept = torch.tensor([i for i in range(n) if i not in prune_idxs], device=x.device)
        weight, bias = (None if p is None else p[kept] for p in (layer.weight, layer.bias))
        if isinstance(layer, nn.GroupNorm):
            y = group_norm(x.index_select(1, kept), layer.num_groups, weight, bias, layer.eps)
            return torch.zeros_like(output).index_copy_(1, kept, y.to(output.dtype))
        # timm's LayerNorm2d and similar layers have the channels in dimension 1.
        dim = 1 if "2d" in type(layer).__name__.lower() else -1
        y = layer_norm(x.index_select(dim, kept).movedim(dim, -1), (len(kept),), weight, bias, layer.eps)
        return torch.zeros_like(output).index_copy_(dim, kept, y.movedim(-1, dim).to(output.dtype))

    return hook
