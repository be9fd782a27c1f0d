"""Files that are replaced in one step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tp_cosep.errors import InputError

__all__ = ["replacing"]


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
