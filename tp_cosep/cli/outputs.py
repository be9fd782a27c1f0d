"""Folders that results go to, in which nothing of somebody else is overwritten."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tp_cosep.errors import InputError

__all__ = ["check_free"]


def check_free(folder: Path, names: Iterable[str], replace: str) -> None:
    """Refuse a folder that holds what would be overwritten.

    Args:
        folder: Where results go to; it need not exist.
        names: Of the files that are written.
        replace: The option that allows it.

    Raises:
        InputError: If one of the files is there, or a file is where the folder or one above it would be.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise InputError(f"output {str(folder)!r}: expected a folder or a new name, but {str(nearest)!r} is a file.")
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise InputError(
            f"output {str(folder)!r}: has {', '.join(there)} already; choose another folder, or add {replace} to "
            "replace what is there."
        )
