"""What ``prune`` and ``preview`` share: the model, the data, a fitted selector and the pruner's options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tp_cosep.cli.arguments import DATA_KINDS
from tp_cosep.cli.data import Data, load_data
from tp_cosep.cli.models import make_model, pictures_of
from tp_cosep.cli.processes import Processes
from tp_cosep.errors import InputError
from tp_cosep.graph.tracing import resolve_layers
from tp_cosep.selection.cosep import CoSePSelector
from tp_cosep.selection.reconstruction import ReconstructionSelector
from tp_cosep.selection.selector import Selector
from tp_cosep.utils.data import BatchAdapter, evaluating, logits_of, n_samples, run_model, take_samples
from tp_cosep.utils.distributed import agreed

__all__ = ["Subject", "fit_options", "fitted", "prepare", "pruner_options", "selector_of"]


@dataclass(frozen=True)
class Subject:
    """What is pruned, and on what.

    Attributes:
        model: On the device of this process, in eval mode.
        data: The data.
        example: Inputs of one sample, on the same device.
    """

    model: nn.Module
    data: Data
    example: Any


def prepare(options: argparse.Namespace, processes: Processes) -> Subject:
    """Make the model, find the data, and see that one runs on the other.

    Args:
        options: Those of a command.
        processes: The processes.

    Returns:
        The subject.

    Raises:
        InputError: If the model or the data cannot be used, alone or together.
    """
    return agreed(lambda: _prepared(options, processes))


def _prepared(options: argparse.Namespace, processes: Processes) -> Subject:
    torch.manual_seed(options.seed)
    model = make_model(options)
    data = load_data(options, pictures_of(options, model))
    resolve_layers(model, options.ignored_layers, "ignored_layers")  # unknown names are found before anything long
    model.to(processes.device)
    inputs, _ = BatchAdapter(model, None, predicted=False).split(data.first, 0)
    n = n_samples(inputs)
    if not n:
        raise InputError("data: expected batches with samples, the first one has none.")
    example = take_samples(inputs, 1, n)
    try:
        with evaluating(model):
            outputs = run_model(model, example)
    except Exception as error:
        shape = tuple(example.shape) if isinstance(example, torch.Tensor) else type(example).__name__
        has_pictures = options.data.partition(":")[0] in DATA_KINDS
        raise InputError(
            f"model {options.model!r}: does not run on the data's inputs, {shape} ({type(error).__name__}: {error})"
            + ("; --input-size says how large pictures are to be." if has_pictures else ".")
        ) from error
    logits_of(outputs)
    processes.say(f"model  {options.model}: {sum(p.numel() for p in model.parameters()):,} parameters")
    processes.say(f"data   {data.about}")
    if options.weights is None and not options.pretrained and not options.model.startswith("hf:"):
        processes.say("note   no --weights: the weights are those that the model is made with")
    return Subject(model, data, example)


def selector_of(options: argparse.Namespace) -> Selector:
    """The selector that the options ask for, not fitted."""
    budget = options.memory_budget
    chosen = {
        "spatial": options.spatial,
        "memory_budget": None if budget is None else int(budget * 2**30),
        "max_class_pairs": options.max_class_pairs,
    }
    selectors: dict[str, Callable[..., Selector]] = {
        "reconstruction": ReconstructionSelector,
        "cosep": CoSePSelector,
        "published": CoSePSelector.published,
    }
    return selectors[options.selector](**{name: value for name, value in chosen.items() if value is not None})


def fit_options(options: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Keywords of :meth:`tp_cosep.Selector.fit`."""
    return {"labels": options.labels, "rare_classes": options.rare_classes, "progress": processes.is_first}


def fitted(options: argparse.Namespace, subject: Subject, processes: Processes, kept: Path | None) -> Selector:
    """Fit the selector; an interrupted pass goes on from the file that keeps it."""
    return selector_of(options).fit(
        subject.model,
        subject.data.calibration,
        ignored_layers=options.ignored_layers,
        checkpoint=kept,
        **fit_options(options, processes),
    )


def pruner_options(options: argparse.Namespace, target: tuple[str, float] | None) -> dict[str, Any]:
    """Keywords of :class:`tp_cosep.CoSePPruner`."""
    return {
        "target": None if target is None else dict([target]),
        "max_pruning_ratio": options.max_pruning_ratio,
        "round_to": options.round_to,
        "ignored_layers": options.ignored_layers,
        "on_failure": options.on_failure,
    }
