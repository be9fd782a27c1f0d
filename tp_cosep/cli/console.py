"""Lines on the terminal, and folders that results are written to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from tp_cosep.errors import InputError

__all__ = ["check_free", "say"]


def say(text: str, console: Console | None = None) -> None:
    """Print a line without markup, highlighting or line breaks.

    Args:
        text: The line.
        console: Where it is printed; standard output by default.
    """
    (console or Console()).print(text, highlight=False, markup=False, soft_wrap=True)


def check_free(folder: Path, names: Iterable[str], replace: str) -> None:
    """Refuse a folder in which files would be overwritten.

    Args:
        folder: Where results are written; it need not exist.
        names: Names of the files to write.
        replace: The option that allows overwriting.

    Raises:
        InputError: If one of the files exists, or the folder or one above it is a file.
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
