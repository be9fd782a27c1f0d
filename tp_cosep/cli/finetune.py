"""Fine-tuning through Accelerate: one process or several, in any precision, continued after an interruption."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from tp_cosep.cli.data import Data
from tp_cosep.cli.processes import Processes
from tp_cosep.errors import InputError
from tp_cosep.pruning.saving import read_tensors
from tp_cosep.utils.data import BatchAdapter, evaluating, logits_of, run_model
from tp_cosep.utils.distributed import agreed
from tp_cosep.utils.files import replacing, write_safetensors

__all__ = ["Training", "accuracy", "fine_tune"]


@dataclass(frozen=True)
class Training:
    """How a model is trained: cross-entropy, with a learning rate that decays to 0 along half a cosine.

    Attributes:
        epochs: Number of epochs.
        optimizer: ``"sgd"``, with Nesterov momentum 0.9, or ``"adamw"``.
        learning_rate: The initial learning rate.
        weight_decay: Weight decay of the optimizer.
        seed: Seed of the order of the data and of all else that is random.
    """

    epochs: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    seed: int

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new optimizer of the parameters that are not frozen."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        common: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, **common)
        return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **common)

    def rate(self, epoch: int, progress: float) -> float:
        """The learning rate after a share ``progress`` of an epoch."""
        return self.learning_rate * (1 + math.cos(math.pi * (epoch + progress) / self.epochs)) / 2


def fine_tune(
    model: nn.Module, data: Data, training: Training, processes: Processes, *, kept: Path | None = None
) -> None:
    """Train a model in place.

    Args:
        model: The model on the device of this process; it is in eval mode afterwards.
        data: Batches for training.
        training: Epochs, optimizer and seed.
        processes: The processes that train together.
        kept: Checkpoint file, written after every epoch. If it exists, training continues from it, with the same result
            as without the interruption.

    Raises:
        InputError: If the loss is not finite, there are no batches, or the checkpoint is of another training.
    """
    accelerator = processes.accelerator
    optimizer = training.optimizer_of(model)
    first = 0 if kept is None or not kept.is_file() else _restore(kept, model, optimizer, accelerator)
    adapter = BatchAdapter(model, None, predicted=False)
    own = set(vars(model))
    wrapped, prepared = accelerator.prepare(model, optimizer)
    try:
        for epoch in range(first, training.epochs):
            start = time.perf_counter()
            loss = _epoch(wrapped, prepared, data, training, processes, adapter, epoch)
            agreed(partial(_check_finite, loss, epoch))
            # BatchNorm statistics differ between processes.
            processes.share(model.buffers())
            took = time.perf_counter() - start
            if kept is not None and processes.is_first:
                _keep(kept, model, optimizer, accelerator, epoch + 1)
            processes.wait()
            processes.say(f"  epoch {epoch + 1} of {training.epochs}: loss {loss:.4f}, {took:.1f} s")
    finally:
        # Mixed precision wraps the model's forward; pruning and saving require the model itself.
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        for name in vars(model).keys() - own:
            del vars(model)[name]
        accelerator.free_memory()
        model.eval()


def accuracy(model: nn.Module, data: Data, processes: Processes) -> float:
    """Accuracy on the test samples of all processes.

    Args:
        model: The model; its mode is preserved.
        data: Batches for testing.
        processes: The processes that share the test samples.

    Returns:
        Share of correct predictions, in [0, 1].

    Raises:
        InputError: If there are no test samples, or labels without a score.
    """
    n_right, n = processes.sum(agreed(lambda: _counted(model, data, processes)))
    if not n:
        raise InputError("data: expected samples for testing, found none.")
    return n_right / n


def _counted(model: nn.Module, data: Data, processes: Processes) -> list[int]:
    """Correct predictions and samples of this process."""
    adapter = BatchAdapter(model, None, predicted=False)
    n_right, n = 0, 0
    with evaluating(model):
        for i, batch in enumerate(_bar(data.test, "accuracy", processes)):
            inputs, given = adapter.split(batch, i)
            scores = logits_of(run_model(model, inputs))
            labels = adapter.labels(scores, given, i)
            if len(labels) and int(labels.max()) >= scores.shape[1]:
                raise InputError(
                    f"model: it has scores for {scores.shape[1]} classes, the data has a label {int(labels.max())}; "
                    "set the model's arguments with --model-args, such as num_classes=10."
                )
            n_right += int((scores.argmax(1) == labels).sum())
            n += len(labels)
    return [n_right, n]


def _epoch(
    model: nn.Module,
    optimizer: Any,
    data: Data,
    training: Training,
    processes: Processes,
    adapter: BatchAdapter,
    epoch: int,
) -> float:
    """Train for one epoch, and return the mean loss of this process."""
    torch.manual_seed(training.seed + epoch)
    batches = data.train(epoch)
    n_batches = _length(batches)
    model.train()
    total, n = torch.zeros((), device=processes.device), 0
    for i, batch in enumerate(_bar(batches, f"epoch {epoch + 1}", processes)):
        for group in optimizer.param_groups:
            group["lr"] = training.rate(epoch, i / n_batches if n_batches else 0)
        inputs, given = adapter.split(batch, i)
        scores = logits_of(run_model(model, inputs))
        loss = cross_entropy(scores.float(), adapter.labels(scores, given, i))
        processes.accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        n += 1
    if not n:
        raise InputError("data: expected batches for training, found none; lower --batch-size.")
    return float(total) / n


def _check_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise InputError(f"fine-tuning: the loss is {loss} in epoch {epoch + 1}; lower --learning-rate.")


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:  # loaders need not have a length
        return None


def _bar(batches: Any, what: str, processes: Processes) -> Any:
    shown = None if processes.is_first else True
    return tqdm(batches, desc=what, unit="batch", total=_length(batches), disable=shown, leave=False)


def _keep(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Any, n_epochs: int) -> None:
    """Write weights, optimizer state and number of epochs, as tensors and JSON."""
    tensors = {f"model/{name}": x for name, x in model.state_dict().items()}
    for name, p in model.named_parameters():
        tensors |= {f"optimizer/{name}/{k}": torch.as_tensor(x) for k, x in _state_of(optimizer, p).items()}
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    with replacing(path, "fine-tuning") as temporary:
        write_safetensors(temporary, tensors, {"n_epochs": n_epochs, "scaler": scaler})


def _state_of(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Any]:
    return {key: x for key, x in optimizer.state.get(p, {}).items() if x is not None}


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Any) -> int:
    """The inverse of :func:`_keep`; returns the number of finished epochs."""
    tensors, header = read_tensors(path, next(model.parameters()).device)
    try:
        model.load_state_dict({k.removeprefix("model/"): x for k, x in tensors.items() if k.startswith("model/")})
        parameters = dict(model.named_parameters())
        for name, x in tensors.items():
            part, _, rest = name.partition("/")
            if part == "optimizer":
                parameter, _, key = rest.rpartition("/")
                # AdamW counts its steps on the CPU.
                optimizer.state[parameters[parameter]][key] = x.cpu() if key == "step" else x
        if accelerator.scaler is not None and header["scaler"]:
            accelerator.scaler.load_state_dict(header["scaler"])
        return int(header["n_epochs"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"fine-tuning {str(path)!r}: of another training ({error}); add --restart.") from error
