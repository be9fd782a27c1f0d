"""Files that are replaced in one step, and tensors with a header in a file of safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tp_cosep.errors import InputError

__all__ = ["read_safetensors", "replacing"]


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


def read_safetensors(path: str | os.PathLike[str], device: str = "cpu") -> tuple[dict[str, Tensor], Any]:
    """Read tensors, and what this library wrote beside them as JSON; nothing in the file is executed.

    Args:
        path: Of the file.
        device: Where the tensors go.

    Returns:
        Tensors by name, and the header; ``None`` if there is none of ours.

    Raises:
        ValueError: If the file is damaged or none of safetensors.
    """
    try:
        with safe_open(str(path), "pt", device=device) as file:
            header = json.loads((file.metadata() or {}).get("tp_cosep", "null"))
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 -- not a dict
    except SafetensorError as error:
        raise ValueError(str(error)) from error
