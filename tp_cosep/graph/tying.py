"""Tied parameters: tensors that several layers share, such as an embedding table that is also the output weight."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["kept_tied", "tied_parameters"]


def tied_parameters(model: nn.Module) -> list[list[str]]:
    """Find tied parameters.

    Args:
        model: The model. A layer that is registered under several names is one layer, with no tied parameters.

    Returns:
        For each tensor that several layers share, the names of its parameters.

    Example:
        >>> model = nn.ModuleDict({"table": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
        >>> model["out"].weight = model["table"].weight
        >>> tied_parameters(model)
        [['table.weight', 'out.weight']]
    """
    names: dict[nn.Parameter, list[str]] = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(p, []).append(f"{path}.{name}" if path else name)
    return [found for found in names.values() if len(found) > 1]


@contextmanager
def kept_tied(model: nn.Module) -> Iterator[None]:
    """Tie parameters again after pruning has replaced them one by one.

    If different channels of them were removed they stay apart, with a warning; what the layers compute is not affected.
    """
    tied = tied_parameters(model)
    yield
    for names in tied:
        first, *others = (model.get_parameter(name) for name in names)
        if all(p is first for p in others):
            continue
        if all(p.shape == first.shape and torch.equal(p, first) for p in others):
            for name in names[1:]:
                path, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(path), attribute, first)
        else:
            warnings.warn(
                f"pruning: {' and '.join(map(repr, names))} were one tensor and no longer are, since different "
                "channels of them were removed, so fewer parameters are saved than reported; put one of these layers "
                "into ignored_layers to keep them tied.",
                stacklevel=2,
            )
