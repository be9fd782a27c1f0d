"""One small member of each classifier family of torchvision and timm, and what Torch-Pruning can prune of it.

Everything here is data: weights are random and seeded, inputs are as small as each family allows, and the layers
to leave alone are named by patterns. timm is imported only where one of its models is built.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

N_CLASSES = 7  # of no other layer's width, so that a head is told by it

Heads = Callable[[nn.Module], dict[nn.Module, int]]


@dataclass(frozen=True)
class Architecture:
    """A family's smallest member, the side of its input, and how Torch-Pruning 1.6.1 is to treat it."""

    name: str
    library: str
    build: Callable[[], nn.Module]  # random weights, always the same
    size: int  # side of the square input
    ignored: tuple[str, ...]  # fnmatch patterns of modules to leave alone: the head first, then what cannot be pruned
    heads: Heads | None = None  # query, key and value layers of a model → their number of heads
    unprunable: str | None = None  # why Torch-Pruning cannot prune the family at all, whatever is left alone

    def ignored_layers(self, model: nn.Module) -> list[nn.Module]:
        """The modules of the model that the patterns name."""
        return [m for n, m in model.named_modules() if n and any(fnmatch(n, p) for p in self.ignored)]


def qkv_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Every layer that makes queries, keys or values, fused or not, with the number of heads of its owner."""
    heads: dict[nn.Module, int] = {}
    for owner in model.modules():
        n_heads = getattr(owner, "num_heads", None)
        for name in ("qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj"):
            layer = getattr(owner, name, None)
            if isinstance(n_heads, int) and isinstance(layer, nn.Linear | nn.Conv2d):
                heads[layer] = n_heads
    return heads


def _seeded(build: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """A builder of the same model every time; torch's global generator is left as it was."""

    def seeded() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build(*args, **options)

    return seeded


def _from_torchvision(model: str, **options: Any) -> nn.Module:
    from torchvision import models

    return models.get_model(model, weights=None, num_classes=N_CLASSES, **options)


def _from_timm(model: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(model, pretrained=False, num_classes=N_CLASSES, **options)
