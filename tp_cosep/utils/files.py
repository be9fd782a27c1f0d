"""Atomically replaced files, and safetensors files with a header and a checksum."""

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
    """Write a temporary file, and replace the target with it once it is complete.

    Args:
        path: Path of the target, in an existing folder.
        what: Content of the file, for messages.

    Yields:
        Path of the temporary file. If writing fails it is removed, and the target stays as it was.

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
    """A hash of a text and of the names, shapes, types and values of tensors, in their order."""
    found = hashlib.blake2b(header.encode(), digest_size=16)
    for name, x in tensors.items():
        found.update(f"{name} {tuple(x.shape)} {x.dtype} ".encode())
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Any) -> None:
    """Write tensors and a header, with a checksum of both: the format itself does not detect changed values.

    Args:
        path: Path of the file.
        tensors: Tensors by name. Views of one storage, which the format refuses, are copied.
        header: Any value that JSON can represent.
    """
    text, separate, storages = json.dumps(header), {}, set[int]()
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        storage = x.untyped_storage()
        if storage.nbytes() != x.nbytes or storage.data_ptr() in storages:
            x = x.clone()
        storages.add(x.untyped_storage().data_ptr())
        separate[name] = x
    save_file(separate, path, {_HEADER: text, _DIGEST: digest(separate, text)})


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Any]:
    """Read a file of :func:`write_safetensors`; nothing in the file is executed.

    Args:
        path: Path of the file.

    Returns:
        Tensors by name, on the CPU, and the header; ``None`` for the header of a safetensors file that another program
        wrote.

    Raises:
        ValueError: If the file is damaged or no safetensors file.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            # Copied, since tensors in a file are not aligned, and some of torch's kernels round differently for
            # unaligned memory.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 -- not a dict
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if _HEADER not in metadata:
        return tensors, None
    if metadata.get(_DIGEST) != digest(dict(sorted(tensors.items())), metadata[_HEADER]):
        raise ValueError("its contents are not those that were written")
    return tensors, json.loads(metadata[_HEADER])
