"""Normalisation over channels as it will be when some of them are gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, layer_norm

__all__ = ["normalised_without"]


@contextmanager
def normalised_without(group: Any) -> Iterator[None]:
    """Let the LayerNorms and GroupNorms of a group look past the channels that it is about to remove.

    They average over channels, so what they compute for those that stay depends on those that go. Meanwhile these
    are left out of the averages, and are zero behind the layer.

    Args:
        group: A ``tp.Group`` that was not pruned yet.
    """
    gone: dict[nn.Module, set[int]] = {}
    for dep, idxs in group:
        layer = dep.target.module
        if isinstance(layer, nn.GroupNorm) or (isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1):
            gone.setdefault(layer, set()).update(idxs)
    handles = []
    try:
        for layer, channels in gone.items():
            handles.append(layer.register_forward_hook(_without(channels)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without(gone: set[int]) -> Any:
    def hook(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        n = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.normalized_shape[0]
        kept = torch.tensor([i for i in range(n) if i not in gone], device=x.device)
        weight, bias = (None if p is None else p[kept] for p in (layer.weight, layer.bias))
        if isinstance(layer, nn.GroupNorm):
            y = group_norm(x.index_select(1, kept), layer.num_groups, weight, bias, layer.eps)
            return torch.zeros_like(output).index_copy_(1, kept, y.to(output.dtype))
        # timm's LayerNorm2d and its like have the channels second.
        dim = 1 if "2d" in type(layer).__name__.lower() else -1
        y = layer_norm(x.index_select(dim, kept).movedim(dim, -1), (len(kept),), weight, bias, layer.eps)
        return torch.zeros_like(output).index_copy_(dim, kept, y.movedim(-1, dim).to(output.dtype))

    return hook
