"""Measurements of models: parameters, multiply-accumulates, latency, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from tp_cosep.errors import InputError
from tp_cosep.utils.data import evaluating, run_model, tensors_in
from tp_cosep.utils.timing import median_times

__all__ = ["ModelStats", "measure", "measure_models"]


@dataclass(frozen=True)
class ModelStats:
    """Measurements of a model.

    Attributes:
        accuracy: Share of correct predictions, 0 … 1; ``None`` if it was not measured.
        n_parameters: Number of parameters.
        n_macs: Multiply-accumulates for one sample, as Torch-Pruning counts them: it adds the element-wise
            operations of normalisations, activations and poolings that are modules.
        latency: Seconds for one forward pass of ``batch_size`` samples.
        batch_size: Samples per forward pass that was timed.
    """

    accuracy: float | None
    n_parameters: int
    n_macs: int
    latency: float
    batch_size: int


def measure(
    model: nn.Module,
    example_inputs: Any,
    evaluate: Callable[[nn.Module], float] | None = None,
    *,
    n_runs: int = 30,
    n_warmup: int = 5,
) -> ModelStats:
    """Count and time a model; its mode, weights, buffers and hooks are unchanged afterwards.

    :func:`measure_models` compares several models fairly.

    Args:
        model: The model, on any device.
        example_inputs: Inputs on the model's device, batch first: a tensor, a tuple of arguments or a dict of keyword
            arguments. The whole batch is timed; operations are counted for its first sample.
        evaluate: ``evaluate(model) -> accuracy``, 0 … 1; by default accuracy is not measured.
        n_runs: Number of timed forward passes, at least 1.
        n_warmup: Number of forward passes before the timed ones, at least 0.

    Returns:
        The measurements.

    Raises:
        InputError: If there is no tensor with a batch dimension in ``example_inputs``, or ``n_runs`` or ``n_warmup`` is
            too small.
    """
    return measure_models({"": model}, example_inputs, evaluate, n_runs=n_runs, n_warmup=n_warmup)[""]


def measure_models(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    evaluate: Callable[[nn.Module], float] | None = None,
    *,
    n_runs: int = 30,
    n_warmup: int = 5,
) -> dict[str, ModelStats]:
    """Count and time several models on the same inputs; modes, weights, buffers and hooks are unchanged afterwards.

    Latency is the median of repeated forward passes in eval mode after a warm-up, with torch's current number of
    threads. The models take turns, so that a change in the machine's load favours none of them.

    Args:
        models: The models by name, on any device.
        example_inputs: Inputs on the models' device, batch first: a tensor, a tuple of arguments or a dict of keyword
            arguments. The whole batch is timed; operations are counted for its first sample.
        evaluate: ``evaluate(model) -> accuracy``, 0 … 1; by default accuracy is not measured.
        n_runs: Number of timed forward passes of each model, at least 1.
        n_warmup: Number of forward passes of each model before the timed ones, at least 0.

    Returns:
        The measurements by name, in the order of ``models``.

    Raises:
        InputError: If there is no tensor with a batch dimension in ``example_inputs``, or ``n_runs`` or ``n_warmup`` is
            too small.
    """
    if n_runs < 1 or n_warmup < 0:
        raise InputError(f"measure: expected n_runs ≥ 1 and n_warmup ≥ 0, got {n_runs} and {n_warmup}.")
    first = next(tensors_in(example_inputs), None)
    if first is None or not first.dim() or not len(first):
        raise InputError("measure: expected example_inputs with a tensor of at least one sample, found none.")
    times = median_times(
        models, lambda model: run_model(model, example_inputs), first.device, n_runs=n_runs, n_warmup=n_warmup
    )
    stats = {}
    for name, model in models.items():
        n_macs, n_parameters = tp.utils.count_ops_and_params(model, _first_sample(example_inputs))
        with evaluating(model):
            accuracy = None if evaluate is None else float(evaluate(model))
        stats[name] = ModelStats(accuracy, int(n_parameters), int(n_macs), times[name], len(first))
    return stats


def _first_sample(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[:1] if inputs.dim() else inputs
    if isinstance(inputs, Mapping):
        return {name: _first_sample(value) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_first_sample(value) for value in inputs)
    return inputs
