"""Lines on the terminal: as they are, however long."""

from __future__ import annotations

from rich.console import Console

__all__ = ["say"]


def say(text: str, console: Console | None = None) -> None:
    """Print a line without markup, colours of its own or breaks.

    Args:
        text: The line.
        console: Where to; standard output by default.
    """
    (console or Console()).print(text, highlight=False, markup=False, soft_wrap=True)
