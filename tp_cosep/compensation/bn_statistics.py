"""BatchNorm re-estimation: running statistics of the activations that the layers have after pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tp_cosep.errors import InputError
from tp_cosep.utils.data import CalibrationData, check_loader, evaluating, run_model
from tp_cosep.utils.distributed import agreed, averaged
from tp_cosep.utils.snapshot import restored_on_error

__all__ = ["has_statistics", "recalibrate", "saved_statistics"]


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    target_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    progress: bool = True,
) -> int:
    """Re-estimate the running statistics of all BatchNorm layers, as averages over the batches of a loader.

    Pruning and refitting change the activations that a BatchNorm normalises, so that its running mean and variance
    no longer fit. As in training, activations are normalised by the statistics of their batch. The averages are
    cumulative with equal weight for every batch, independent of the layers' momentum. Use the batch size of training.

    Args:
        model: The model; weights, momentum and modes are unchanged, and dropout is off.
        loader: Batches of inputs, or of inputs and labels.
        target_fn: Reads any other kind of batch: ``target_fn(batch) -> (inputs, labels)``.
        progress: Show a progress bar on a terminal.

    Returns:
        Number of layers that were re-estimated; 0, without a pass over the data, if no layer tracks statistics. A
        layer that no batch reaches keeps its statistics.

    Raises:
        InputError: If the loader gives no batch, a batch has a single value per channel, or the new statistics are NaN
            or infinite; the model then keeps its statistics.
        ValueError: If the model itself raises one.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> recalibrate(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        1
        >>> model.running_mean, model.running_var, model.momentum
        (tensor([4.]), tensor([2.]), 0.1)
    """
    check_loader(loader, "recalibrate")
    norms = _norms(model)
    if not norms:
        return 0
    data = CalibrationData(loader, target_fn, progress=progress)
    momenta = {m: m.momentum for m in norms.values()}
    before = _buffers(norms)
    with restored_on_error(model), evaluating(model):
        try:
            for m in norms.values():
                m.reset_running_stats()
                m.momentum = None  # a cumulative average
                m.training = True
            n_batches = agreed(lambda: _run_all(model, data))
        finally:
            for m, momentum in momenta.items():
                m.momentum = momentum
        reached = _reached(norms, before, n_batches)
        if not reached:
            raise InputError("recalibrate: expected at least one batch that reaches a BatchNorm, the loader gave none.")
        for name, m in reached.items():
            statistics = [x for x in (m.running_mean, m.running_var) if x is not None]
            if not all(bool(torch.isfinite(x).all()) for x in statistics):
                raise InputError(
                    f"layer {name!r}: its statistics came out NaN or infinite; check the inputs and the weights, and "
                    "use batches with more than one value per channel."
                )
    return len(reached)


def _reached(
    norms: Mapping[str, _BatchNorm], before: Mapping[_BatchNorm, Mapping[str, Tensor]], n_batches: int
) -> dict[str, _BatchNorm]:
    """The layers that batches reached in any process, with the average of all processes; others are restored."""
    reached = {}
    for name, m in norms.items():
        tracked = m.num_batches_tracked
        statistics = [x for x in (m.running_mean, m.running_var) if x is not None]
        n_seen = averaged(statistics, n_batches if tracked is None else int(tracked))
        if n_seen:
            reached[name] = m
        for buffer_name, x in m.named_buffers(recurse=False):
            if not n_seen:
                x.copy_(before[m][buffer_name])
            elif x is tracked:
                x.fill_(n_seen)
    return reached


def _run_all(model: nn.Module, data: CalibrationData) -> int:
    """Run a model on all batches; returns the number of batches with samples."""
    n_batches = 0
    for i, inputs, _ in data.batches(data.adapter(model), "BatchNorm statistics"):
        try:
            run_model(model, inputs)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"batch {i}: expected more than one value per channel for every BatchNorm, got a single one "
                f"({error}); use larger batches, and drop a last batch of a single sample."
            ) from error
        n_batches += 1
    return n_batches


def has_statistics(model: nn.Module) -> bool:
    """Whether a model has BatchNorm layers that track statistics."""
    return bool(_norms(model))


def saved_statistics(model: nn.Module) -> Callable[[], None]:
    """Save the running statistics of all BatchNorm layers.

    Args:
        model: The model.

    Returns:
        A function that restores them.
    """
    saved = _buffers(_norms(model))

    def restore() -> None:
        with torch.no_grad():
            for m, buffers in saved.items():
                for name, x in buffers.items():
                    m.get_buffer(name).copy_(x)

    return restore


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorm layers that track statistics, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


def _buffers(norms: Mapping[str, _BatchNorm]) -> dict[_BatchNorm, dict[str, Tensor]]:
    return {m: {n: x.clone() for n, x in m.named_buffers(recurse=False)} for m in norms.values()}
