"""The structure of a model and its inputs, without values: a plan recognises the model that it was made for by it.

The *structure* of a model is the names, types and shapes of the tensors in its ``state_dict``. Models of one
architecture have the same structure. Buffers that are not saved (caches, tables computed from the configuration) are
left out, since they differ between versions of libraries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep._version import __version__
from tp_cosep.errors import InputError

__all__ = ["check_structure", "describe_inputs", "fingerprint_of", "structure_of", "versions", "zeros_for"]


def structure_of(model: nn.Module) -> dict[str, str]:
    """The structure of a model, in the order of its ``state_dict``.

    Returns:
        Type and shape of every tensor by its name.

    Example:
        >>> structure_of(nn.Linear(3, 2))
        {'weight': 'float32 [2, 3]', 'bias': 'float32 [2]'}
    """
    return {name: _describe(x) for name, x in model.state_dict().items() if isinstance(x, Tensor)}


def fingerprint_of(structure: Mapping[str, str]) -> str:
    """A hash of a structure, equal for equal structures."""
    return hashlib.blake2b(json.dumps(sorted(structure.items())).encode(), digest_size=16).hexdigest()


def check_structure(model: nn.Module, expected: Mapping[str, str]) -> None:
    """Compare a model with the structure that a plan was made for.

    Raises:
        InputError: If they differ; it names the first layer with a difference.
    """
    found = structure_of(model)
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            layer, _, tensor = name.rpartition(".")
            raise InputError(
                f"layer {layer!r}: the plan is for a model with {tensor} {expected.get(name, 'missing')}, here it is "
                f"{found.get(name, 'missing')}; apply it to a copy of the model it was made for: unpruned, or, "
                "if several pruners worked in turn, with the earlier plans applied."
            )


def describe_inputs(inputs: Any) -> Any:
    """Describe example inputs by structure, shapes and types, in a form that JSON can hold.

    Args:
        inputs: Tensors, numbers, strings and ``None``, in tuples, lists and dicts.

    Returns:
        A description for :func:`zeros_for`, or ``None`` if the inputs contain other types.

    Example:
        >>> describe_inputs((torch.zeros(1, 3), {"mask": None}))
        {'list': [{'tensor': 'float32 [1, 3]'}, {'dict': {'mask': {'value': None}}}]}
    """
    try:
        return _described(inputs)
    except TypeError:
        return None


def zeros_for(description: Any, device: torch.device) -> Any:
    """Inputs of zeros with the structure, shapes and types of a description.

    Args:
        description: Result of :func:`describe_inputs`.
        device: Device of the tensors.

    Returns:
        The inputs, with lists in place of tuples.

    Raises:
        ValueError: If the description is invalid.
    """
    if not isinstance(description, dict) or len(description) != 1:
        raise ValueError(f"inputs: expected the description of a tensor, list, dict or value, got {description!r}")
    ((kind, value),) = description.items()
    if kind == "value" and (value is None or isinstance(value, (bool, int, float, str))):
        return value
    if kind == "list" and isinstance(value, list):
        return [zeros_for(part, device) for part in value]
    if kind == "dict" and isinstance(value, dict):
        return {key: zeros_for(part, device) for key, part in value.items()}
    if kind == "tensor" and isinstance(value, str):
        name, _, shape = value.partition(" ")
        dtype, sizes = getattr(torch, name, None), json.loads(shape)
        if isinstance(dtype, torch.dtype) and all(isinstance(n, int) and n >= 0 for n in sizes):
            return torch.zeros(sizes, dtype=dtype, device=device)
    raise ValueError(f"inputs: expected the description of a tensor, list, dict or value, got {description!r}")


def versions() -> dict[str, str]:
    """The versions of the libraries that determine a plan."""
    return {
        "tp_cosep": __version__,
        "torch": str(torch.__version__),
        "torch_pruning": metadata.version("torch-pruning"),
    }


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _described(inputs: Any) -> dict[str, Any]:
    if isinstance(inputs, Tensor):
        return {"tensor": _describe(inputs)}
    if isinstance(inputs, Mapping):
        return {"dict": {str(key): _described(value) for key, value in inputs.items()}}
    if isinstance(inputs, (tuple, list)):
        return {"list": [_described(value) for value in inputs]}
    if inputs is None or isinstance(inputs, (bool, int, float, str)):
        return {"value": inputs}
    raise TypeError(f"no description of a {type(inputs).__name__}")
