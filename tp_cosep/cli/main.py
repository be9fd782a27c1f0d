"""Entry point of the command line, ``tp-cosep``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module

from tp_cosep.cli.arguments import parser
from tp_cosep.cli.config import parse
from tp_cosep.errors import CoSePError, MissingDependencyError

__all__ = ["main"]

_FAILED, _INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the command's name; by default those of the process.

    Returns:
        The exit code: 0, 1 after an error (with one line about it on stderr), or 130 after Ctrl-C. Wrong usage raises
        ``SystemExit`` with 2, ``--help`` and ``--version`` with 0.

    Raises:
        Exception: With ``--debug``, the original error.
    """
    options = parse(parser(), sys.argv[1:] if argv is None else argv)
    try:
        with _short_warnings(is_on=not options.debug):
            if hasattr(options, "model"):
                _import_torchvision()
            import_module(options.run).run(options)
    except KeyboardInterrupt:
        print("\ntp-cosep: interrupted", file=sys.stderr)
        if options.command == "prune":
            print(f"tp-cosep: finished parts are in {options.output}; the same command continues", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        text = str(error)
        if text.startswith("Caught "):  # in a worker of a DataLoader: its traceback ends with the original error
            text = text.rpartition(f"{type(error).__name__}: ")[2]
        text = " ".join(text.split())
        if not isinstance(error, (CoSePError, OSError)):
            text = f"{type(error).__name__}: {text} (add --debug to see where)"
        print(f"tp-cosep: {text}", file=sys.stderr)
        return _FAILED
    return 0


@contextmanager
def _short_warnings(*, is_on: bool) -> Iterator[None]:
    """Show warnings as one line, without source code."""
    before = warnings.formatwarning
    if is_on:
        warnings.formatwarning = lambda message, *_, **__: f"tp-cosep: warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _import_torchvision() -> None:
    """Import torchvision, if installed, before Torch-Pruning looks for timm."""
    from tp_cosep.cli.torchvision_shim import import_torchvision

    with suppress(MissingDependencyError):
        import_torchvision()
