"""``tp-cosep report``: a plan as tables, or as an HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from tp_cosep.cli.console import say
from tp_cosep.errors import InputError
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.pruning.saving import PLAN
from tp_cosep.report.tables import layer_table

__all__ = ["find_plan", "run"]


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        InputError: If there is no plan.
    """
    plan = find_plan(options.plan)
    console = Console()
    if len(plan):
        console.print("", layer_table(plan), "", sep="\n")
    else:
        say("the plan is empty: nothing was pruned", console)
    facts = {
        "options": ", ".join(f"{name}: {value}" for name, value in plan.options.items()),
        "versions": ", ".join(f"{name} {version}" for name, version in plan.versions.items()),
        "fingerprint of the model": plan.fingerprint,
        "biases added to": ", ".join(plan.new_biases),
    }
    for name, fact in facts.items():
        if fact:
            say(f"{name}: {fact}", console)
    if options.html is not None:
        plan.report(options.html)
        say(f"{options.html}", console)


def find_plan(path: Path) -> PruningPlan:
    """The plan in a file or in a folder.

    Args:
        path: A plan, or a folder with ``plan.json``.

    Returns:
        The plan.

    Raises:
        InputError: If there is no such file, or it is not a plan.
    """
    path = path / PLAN if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"plan {str(path)!r}: no such file.")
    return PruningPlan.load(path)
