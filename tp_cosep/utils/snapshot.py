"""Snapshots that restore a model exactly after pruning or training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["restored_on_error"]

_CONTAINERS = ("_parameters", "_buffers", "_modules")


class _Value:
    """A tensor: its storage by reference, its values and those of its gradient by copy."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._data, self._copy = tensor.data, tensor.detach().clone()
        self._requires_grad = tensor.requires_grad
        self._grad = _Value(tensor.grad) if tensor.is_leaf and tensor.grad is not None else None

    def restore(self) -> Tensor:
        tensor = self._tensor
        if tensor.is_leaf:
            tensor.grad = None  # a tensor cannot change its type while it has a gradient of another type
            tensor.requires_grad_(self._requires_grad)
        tensor.data = self._data
        self._data.copy_(self._copy)
        if self._grad is not None:
            tensor.grad = self._grad.restore()
        return tensor


class _Snapshot:
    """The attributes of every module by reference, and the values of every tensor by copy.

    Pruning replaces parameters and sets attributes; training changes values in place. Restoring puts back the same
    parameter objects, so optimizers that hold them stay valid.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes: list[tuple[nn.Module, dict[str, Any]]] = []
        for module in model.modules():
            attributes = dict(module.__dict__)
            for name in _CONTAINERS:
                attributes[name] = attributes[name].copy()
            self._attributes.append((module, attributes))
        # Lists may be changed in place, such as an LSTM's list of its weights.
        lists = (v for module in model.modules() for v in vars(module).values() if isinstance(v, list))
        self._lists = [(value, value.copy()) for value in lists]
        self._values = [_Value(tensor) for tensor in chain(model.parameters(), model.buffers())]

    def restore(self) -> None:
        for module, attributes in self._attributes:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for changed, items in self._lists:
            changed[:] = items
        with torch.no_grad():
            for value in self._values:
                value.restore()


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Run a block; if it raises, restore the model to its state before the block.

    Requires memory for one copy of the weights. Closing a generator early is no failure: nothing is restored.
    """
    snapshot = _Snapshot(model)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, GeneratorExit):
            snapshot.restore()
        raise
