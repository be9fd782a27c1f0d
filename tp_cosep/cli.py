"""The command ``tp-cosep``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import tp_cosep
from tp_cosep.demo import DATA, run_demo
from tp_cosep.errors import CoSePError

__all__ = ["main"]

_FAILED, _INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the command's name; those of the process by default.

    Returns:
        0, or 1 if something failed (the reason is one line on stderr), or 130 after Ctrl-C. Wrong usage, as
        well as ``--help`` and ``--version``, leave through ``SystemExit``, with 2 and 0.

    Raises:
        CoSePError: With ``--debug``, what failed.
        OSError: Likewise.
    """
    options = _parser().parse_args(argv)
    try:
        run_demo(
            options.data,
            options.output,
            seed=options.seed,
            epochs=options.epochs,
            fine_tune_epochs=options.fine_tune_epochs,
            threads=options.threads,
        )
    except KeyboardInterrupt:
        print("\ntp-cosep: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except (CoSePError, OSError) as error:
        if options.debug:
            raise
        print(f"tp-cosep: {' '.join(str(error).split())}", file=sys.stderr)
        return _FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tp-cosep", description="Class-separability channel pruning for Torch-Pruning."
    )
    parser.add_argument("--version", action="version", version=f"tp-cosep {tp_cosep.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = "train a small network, prune it, fine-tune it, and show what that did"
    demo = commands.add_parser("demo", help=about, description=f"{about[0].upper()}{about[1:]}.")
    demo.add_argument(
        "--data", choices=DATA, default=DATA[0], help="digits (default, seconds) or fashion-mnist (minutes)"
    )
    demo.add_argument(
        "--output",
        metavar="FOLDER",
        default="tp_cosep_demo",
        help="where model, plan and plots go (default: %(default)s)",
    )
    demo.add_argument("--seed", type=_whole_number, default=0, metavar="N", help="of weights and data (default: 0)")
    demo.add_argument("--epochs", type=_whole_number, metavar="N", help="of training (default: by data set)")
    demo.add_argument(
        "--fine-tune-epochs", type=_whole_number, metavar="N", help="of fine-tuning (default: by data set)"
    )
    demo.add_argument("--threads", type=_whole_number, metavar="N", help="for torch (default: by data set)")
    demo.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _whole_number(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return value
