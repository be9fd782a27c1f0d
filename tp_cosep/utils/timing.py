"""Forward-pass times of models and layers, on the device that they are on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tp_cosep.utils.data import evaluating

__all__ = ["layer_times", "median_times"]

_N_WARMUP, _N_RUNS = 3, 15


def _stopwatch(device: torch.device) -> Callable[[], float]:
    """Start a clock that waits for an accelerator, whose calls return before they are finished.

    Args:
        device: Device of the model.

    Returns:
        A function that returns the seconds since the start.
    """
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", lambda: None)
    synchronize()
    start = time.perf_counter()

    def elapsed() -> float:
        synchronize()
        return time.perf_counter() - start

    return elapsed


def median_times(
    models: Mapping[str, nn.Module],
    run: Callable[[nn.Module], object],
    device: torch.device,
    *,
    n_runs: int = _N_RUNS,
    n_warmup: int = _N_WARMUP,
) -> dict[str, float]:
    """Median seconds of a forward pass in eval mode.

    The models take turns, so that a changing load of the machine favours none of them.

    Args:
        models: Models by name.
        run: Runs a model once.
        device: Device of the models.
        n_runs: Number of timed passes of each model.
        n_warmup: Number of untimed passes of each model before them.

    Returns:
        Seconds by name.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(n_warmup + n_runs):
        for name, model in models.items():
            with evaluating(model):
                elapsed = _stopwatch(device)
                run(model)
                times[name].append(elapsed())
    return {name: statistics.median(found[n_warmup:]) for name, found in times.items()}


def layer_times(model: nn.Module, run: Callable[[], object], device: torch.device) -> dict[nn.Module, float]:
    """Median seconds of every leaf layer in a forward pass in eval mode, summed over its calls.

    Leaf layers are modules without children, and ``nn.MultiheadAttention``, which uses the weights of its children.

    Args:
        model: The model.
        run: Runs the model once.
        device: Device of the model.

    Returns:
        Seconds by layer, of the layers that ran.
    """
    leaves = [m for m in model.modules() if not any(True for _ in m.children()) or isinstance(m, nn.MultiheadAttention)]
    times: dict[nn.Module, list[float]] = {}
    now: dict[nn.Module, float] = {}
    handles = []
    elapsed = _stopwatch(device)

    def begin(layer: nn.Module, _args: Any) -> None:
        now[layer] = now.get(layer, 0.0) - elapsed()

    def end(layer: nn.Module, _args: Any, _output: Any) -> None:
        now[layer] += elapsed()

    try:
        for layer in leaves:
            handles += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
        with evaluating(model):
            for i in range(_N_WARMUP + _N_RUNS):
                now.clear()
                run()
                if i >= _N_WARMUP:
                    for layer, seconds in now.items():
                        times.setdefault(layer, []).append(seconds)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: statistics.median(found) for layer, found in times.items()}
