"""``tp-cosep demo``."""

from __future__ import annotations

import argparse

from tp_cosep.cli.demo import run_demo

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Run the demo."""
    run_demo(
        options.data,
        options.output,
        seed=options.seed,
        epochs=options.epochs,
        fine_tune_epochs=options.fine_tune_epochs,
        threads=options.threads,
    )
