"""What ``prune`` and ``preview`` share: model, data, fitted selector and options of the pruner."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tp_cosep.cli.arguments import DATA_KINDS, SELECTOR_OPTIONS
from tp_cosep.cli.data import Data, load_data
from tp_cosep.cli.models import image_spec, make_model
from tp_cosep.cli.processes import Processes
from tp_cosep.errors import InputError
from tp_cosep.graph.tracing import resolve_layers
from tp_cosep.selection.attention import AttentionMapSelector
from tp_cosep.selection.cosep import CoSePSelector
from tp_cosep.selection.reconstruction import ReconstructionSelector
from tp_cosep.selection.selector import Selector
from tp_cosep.utils.data import BatchAdapter, evaluating, logits_of, n_samples, run_model, take_samples
from tp_cosep.utils.distributed import agreed

__all__ = ["Subject", "fit_options", "fitted", "prepare", "pruner_options", "selector_of"]


@dataclass(frozen=True)
class Subject:
    """A model to prune, and its data.

    Attributes:
        model: The model on the device of this process, in eval mode.
        data: Batches for training, calibration and testing.
        example: Inputs of one sample, on the device of the model.
    """

    model: nn.Module
    data: Data
    example: Any


def prepare(options: argparse.Namespace, processes: Processes) -> Subject:
    """Make the model, find the data, and check that the model runs on it.

    Args:
        options: Options of the command.
        processes: The processes of the run.

    Returns:
        Model, data and an example.

    Raises:
        InputError: If the model or the data cannot be used, alone or together.
    """
    return agreed(lambda: _prepared(options, processes))


def _prepared(options: argparse.Namespace, processes: Processes) -> Subject:
    torch.manual_seed(options.seed)
    model = make_model(options)
    data = load_data(options, image_spec(options, model))
    resolve_layers(model, options.ignored_layers, "ignored_layers")  # report unknown names before a long run
    model.to(processes.device)
    inputs, _ = BatchAdapter(model, None, predicted=False).split(data.first, 0)
    n = n_samples(inputs)
    if not n:
        raise InputError("data: expected batches with samples, the first one is empty.")
    example = take_samples(inputs, 1, n)
    try:
        with evaluating(model):
            outputs = run_model(model, example)
    except Exception as error:
        shape = tuple(example.shape) if isinstance(example, torch.Tensor) else type(example).__name__
        has_images = options.data.partition(":")[0] in DATA_KINDS
        raise InputError(
            f"model {options.model!r}: does not run on the data's inputs, {shape} ({type(error).__name__}: {error})"
            + ("; set the size of images with --input-size." if has_images else ".")
        ) from error
    logits_of(outputs)
    processes.say(f"model  {options.model}: {sum(p.numel() for p in model.parameters()):,} parameters")
    processes.say(f"data   {data.about}")
    if options.weights is None and not options.pretrained and not options.model.startswith("hf:"):
        processes.say("note   no --weights: the model keeps its initial weights")
    return Subject(model, data, example)


def selector_of(options: argparse.Namespace) -> Selector:
    """The user-specified selector, not fitted."""
    selectors: dict[str, Callable[..., Selector]] = {
        "reconstruction": ReconstructionSelector,
        "cosep": CoSePSelector,
        "published": CoSePSelector.published,
        "attention": AttentionMapSelector,
    }
    chosen = {name: getattr(options, name) for name in SELECTOR_OPTIONS[options.selector]}
    given = {name: value for name, value in chosen.items() if value is not None}
    if "memory_budget" in given:
        given["memory_budget"] = int(given["memory_budget"] * 2**30)
    return selectors[options.selector](**given)


def fit_options(options: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Keywords of :meth:`tp_cosep.Selector.fit`."""
    return {"labels": options.labels, "rare_classes": options.rare_classes, "progress": processes.is_first}


def fitted(options: argparse.Namespace, subject: Subject, processes: Processes, checkpoint: Path | None) -> Selector:
    """Fit the user-specified selector; an interrupted pass continues from its checkpoint."""
    return selector_of(options).fit(
        subject.model,
        subject.data.calibration,
        ignored_layers=options.ignored_layers,
        checkpoint=checkpoint,
        **fit_options(options, processes),
    )


def pruner_options(options: argparse.Namespace, target: tuple[str, float] | None) -> dict[str, Any]:
    """Keywords of :class:`tp_cosep.CoSePPruner`."""
    chosen = {
        "target": None if target is None else dict([target]),
        "max_pruning_ratio": options.max_pruning_ratio,
        "round_to": options.round_to,
        "ignored_layers": options.ignored_layers,
        "on_failure": options.on_failure,
    }
    if options.selector == "attention":
        share = options.pruning_ratio or 0.0
        chosen |= {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": share}
    return chosen
