"""Files that are replaced in one step, and tensors with a header in a file of safetensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tp_cosep.errors import InputError

__all__ = ["digest", "read_safetensors", "replacing", "write_safetensors"]

_HEADER, _DIGEST = "tp_cosep", "tp_cosep_digest"


@contextmanager
def replacing(path: str | os.PathLike[str], what: str) -> Iterator[Path]:
    """Write a file beside another one, and put it in its place when it is whole.

    Args:
        path: Of the file to be, in a folder that exists.
        what: What it holds, for errors.

    Yields:
        Where to write. If that fails, the old file stays as it was.

    Raises:
        InputError: If the folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"{what}: expected an existing folder to write to, got {str(target.parent)!r}.")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def digest(tensors: Mapping[str, Tensor], header: str = "") -> str:
    """A hash of names, shapes, types and values of tensors, in their order, and of a text."""
    found = hashlib.blake2b(header.encode(), digest_size=16)
    for name, x in tensors.items():
        found.update(f"{name} {tuple(x.shape)} {x.dtype} ".encode())
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Any) -> None:
    """Write tensors and whatever JSON can hold; the format itself would not notice a changed value.

    Args:
        path: Of the file.
        tensors: By name; they may be views of one storage, which the format refuses.
        header: The rest.
    """
    text, apart, storages = json.dumps(header), {}, set[int]()
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        storage = x.untyped_storage()
        if storage.nbytes() != x.nbytes or storage.data_ptr() in storages:
            x = x.clone()
        storages.add(x.untyped_storage().data_ptr())
        apart[name] = x
    save_file(apart, path, {_HEADER: text, _DIGEST: digest(apart, text)})


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`write_safetensors` wrote; nothing in the file is executed.

    Args:
        path: Of the file.

    Returns:
        Tensors by name, on the CPU, and the header; ``None`` if the file is one of safetensors that another program
        wrote.

    Raises:
        ValueError: If the file is damaged or none of safetensors.
    """
    try:
        with safe_open(str(path), "pt") as file:
            facts = file.metadata() or {}
            # Copied: in the file they begin anywhere, and torch rounds otherwise for some kernels where memory is not
            # aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 -- not a dict
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if _HEADER not in facts:
        return tensors, None
    if facts.get(_DIGEST) != digest(dict(sorted(tensors.items())), facts[_HEADER]):
        raise ValueError("its contents are not those that were written")
    return tensors, json.loads(facts[_HEADER])
