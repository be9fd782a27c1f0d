"""``tp-cosep apply``: prune another copy of a model by a plan."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tp_cosep.cli.console import check_free, say
from tp_cosep.cli.models import make_model
from tp_cosep.cli.report import find_plan
from tp_cosep.errors import InputError
from tp_cosep.graph.structure import zeros_for
from tp_cosep.pruning import saving

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        InputError: If the plan, the model or its weights cannot be used, or the folder holds a model already.
    """
    check_free(Path(options.output), () if options.overwrite else saving.FILES, "--overwrite")
    plan = find_plan(options.plan)
    if plan.inputs is None:
        raise InputError(f"plan {str(options.plan)!r}: has no description of the model's inputs; apply it in Python.")
    model = make_model(options)
    before = sum(p.numel() for p in model.parameters())
    try:
        plan.apply(model, zeros_for(plan.inputs, torch.device("cpu")))
    except ValueError as error:
        raise InputError(str(error)) from error
    saving.save(model, plan, options.output)
    after = sum(p.numel() for p in model.parameters())
    say(
        f"{before:,} parameters before, {after:,} after: {options.output}. Weights are those of the given model, "
        "neither compensated nor fine-tuned."
    )
