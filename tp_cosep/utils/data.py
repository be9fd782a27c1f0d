"""Running a model on the batches of a loader: the loop, the forms of batches, inputs and outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from tqdm.auto import tqdm

from tp_cosep.errors import InputError

__all__ = [
    "EMPTY",
    "BatchAdapter",
    "CalibrationData",
    "DataOptions",
    "check_loader",
    "described",
    "device_of",
    "evaluating",
    "logits_of",
    "n_samples",
    "peek",
    "progress_bar",
    "run_model",
    "take_samples",
    "tensors_in",
]

#: Message for a loader without samples.
EMPTY = (
    "fit: expected at least one batch, the loader gave none; a generator can be read only once, and a loader "
    "with drop_last=True gives nothing from fewer samples than one batch."
)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients, and restore the mode of every submodule after the block.

    A caller's autocast is disabled in the block: statistics and comparisons are in the model's own precision.
    """
    modes = {m: m.training for m in model.modules()}
    kind = device_of(model).type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext():
            yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model.

    Args:
        model: The model.
        inputs: A tensor, a tuple or list of arguments, or a dict of keyword arguments.

    Returns:
        The model's outputs.

    Raises:
        InputError: If the model's ``forward`` has other parameters.
        TypeError: If the model raises one itself.
    """
    args: Sequence[Any] = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    kwargs: Mapping[str, Any] = {}
    if isinstance(inputs, Mapping):
        args, kwargs = [], inputs
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        if _accepts(model, args, kwargs):
            raise
        raise InputError(
            f"inputs: expected those that the model's forward takes, got {described(inputs)} ({error}); if batches "
            "hold more than inputs and labels, pass target_fn=, a function that turns a batch into (inputs, labels)."
        ) from error


def _accepts(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the signature of a model's ``forward`` accepts the arguments; true if it is unknown."""
    try:
        parameters = signature(model.forward)
    except (TypeError, ValueError):
        return True
    try:
        parameters.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def n_samples(inputs: Any) -> int | None:
    """Number of samples in a model's inputs: the length of the first tensor, ``None`` if there is no tensor."""
    return next((len(x) for x in tensors_in(inputs) if x.dim()), None)


def tensors_in(inputs: Any) -> Iterator[Tensor]:
    """The tensors of a model's inputs, in order, from nested mappings, tuples and lists."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, (Mapping, tuple, list)):
        for value in inputs.values() if isinstance(inputs, Mapping) else inputs:
            yield from tensors_in(value)


def described(x: object) -> str:
    """A short description of an unexpected value, for error messages."""
    if isinstance(x, str):
        return f"the string {x!r}"
    if isinstance(x, type):
        return f"the type {x.__name__}"
    if x is None or isinstance(x, (int, float)):
        return repr(x)
    return f"a {type(x).__name__}" + (f" of {len(x)}" if isinstance(x, (tuple, list)) else "")


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's first parameter or buffer; the CPU if it has none."""
    return next((x.device for x in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))


def take_samples(inputs: Any, n: int, of: int) -> Any:
    """The first n of a batch's ``of`` samples: every tensor of this length is cut, anything else is kept."""
    if isinstance(inputs, Tensor):
        return inputs[:n] if inputs.dim() and len(inputs) == of else inputs
    if isinstance(inputs, Mapping):
        return {key: take_samples(value, n, of) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return [take_samples(value, n, of) for value in inputs]
    return inputs


def progress_bar(batches: Iterable[Any], loader: Iterable[Any], what: str, *, shown: bool) -> Iterable[Any]:
    """Wrap batches in a progress bar, shown on a terminal alone.

    Args:
        batches: The batches.
        loader: The loader that they come from, whose length is that of the bar, if it has one.
        what: Description in front of the bar.
        shown: Whether to show the bar.

    Returns:
        The same batches.
    """
    try:
        total = len(loader)  # type: ignore[arg-type]
    except TypeError:  # an iterable without a length
        total = None
    bar: Iterable[Any] = tqdm(
        batches, desc=what, unit="batch", total=total, disable=None if shown else True, leave=False
    )
    return bar


class BatchAdapter:
    """Turns the batches of a loader into inputs on the model's device and checked labels.

    Inputs of floating-point type are cast to the model's, if all its parameters share one.

    Args:
        model: The model.
        target_fn: Reads batches that are no pair: ``target_fn(batch) -> (inputs, labels)``.
        predicted: Whether the model's own predictions are the labels; a batch may then be inputs alone.
    """

    def __init__(self, model: nn.Module, target_fn: Callable[[Any], tuple[Any, Any]] | None, *, predicted: bool):
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        self.device = device_of(model)
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.target_fn = target_fn
        self.predicted = predicted

    def split(self, batch: Any, i: int) -> tuple[Any, Any]:
        """Split a batch.

        Args:
            batch: The batch.
            i: Its position in the loader, for messages.

        Returns:
            Inputs on the model's device, and the labels as given; ``None`` for a batch of inputs alone.

        Raises:
            InputError: If the batch is not of an expected form.
        """
        if self.target_fn is not None:
            batch = self.target_fn(batch)
        is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not is_pair and not (self.predicted and self.target_fn is None):
            raise InputError(
                f"batch {i}: expected a pair (inputs, labels), got {described(batch)}; pass target_fn=, a function "
                "that turns a batch into such a pair."
            )
        inputs, labels = batch if is_pair else (batch, None)
        return self._to_model(inputs), labels

    def labels(self, outputs: Any, given: Any, i: int) -> Tensor:
        """Labels of a batch: those given, or the model's own predictions.

        Args:
            outputs: The model's outputs for the batch.
            given: Labels as given, ``[samples]`` or ``[samples, 1]`` integers, at least 0.
            i: Position of the batch in the loader, for messages.

        Returns:
            ``[samples]`` int64, on the model's device.

        Raises:
            InputError: If the labels are not of this form, or the outputs hold no class scores to predict from.
        """
        if self.predicted:
            try:
                return logits_of(outputs).argmax(1)
            except InputError as error:
                raise InputError(f"batch {i}: labels='predicted': {error}") from error
        try:
            labels = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"batch {i}: expected integer labels, got {type(given).__name__} ({error}); pass target_fn= to turn "
                "other targets into class numbers, or labels='predicted'."
            ) from error
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise InputError(
                f"batch {i}: expected integer labels, got {labels.dtype}; if they are class numbers convert them with "
                ".long(), else pass target_fn=."
            )
        if labels.dim() == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.dim() != 1:
            raise InputError(
                f"batch {i}: expected one label per sample, shape [samples], got shape {tuple(labels.shape)}; "
                "pass target_fn= to turn other targets into class labels."
            )
        labels = labels.to(self.device, torch.int64)
        if len(labels) and int(labels.min()) < 0:
            raise InputError(f"batch {i}: expected labels ≥ 0, got {int(labels.min())}; drop such samples first.")
        return labels

    def _to_model(self, inputs: Any) -> Any:
        if isinstance(inputs, Tensor):
            cast = self.dtype if inputs.is_floating_point() else None
            return inputs.to(self.device, cast)
        if isinstance(inputs, Mapping):
            return {key: self._to_model(value) for key, value in inputs.items()}
        if isinstance(inputs, (tuple, list)):
            return [self._to_model(value) for value in inputs]
        return inputs


def check_loader(loader: object, where: str) -> None:
    """Check that a loader is an iterable or a sequence.

    Args:
        loader: A loader of batches.
        where: The method that reads it, for messages.

    Raises:
        InputError: If it is neither.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise InputError(
            f"{where}: expected a loader that gives batches, got {described(loader)}; pass a DataLoader or a list of "
            "batches, such as [(x, y)]."
        )


class DataOptions(TypedDict, total=False):
    """The options of :class:`CalibrationData`, as keywords."""

    target_fn: Callable[[Any], tuple[Any, Any]] | None
    labels: str
    rare_classes: str
    n_classes: int | None
    progress: bool


@dataclass(frozen=True)
class CalibrationData:
    """A loader of calibration batches, and how its batches are read.

    Args:
        loader: Batches, each a pair ``(inputs, labels)``, or inputs alone if no labels are required.
        target_fn: Reads batches of any other form: ``target_fn(batch) -> (inputs, labels)``.
        labels: ``"given"``, or ``"predicted"`` for the model's own predictions in place of the loader's labels.
        rare_classes: What to do about a class with fewer than two samples: ``"error"``, or ``"drop"`` to leave it out
            with a warning.
        n_classes: Number of classes, to plan memory with; by default the width of the model's output or the largest
            label of the first batch, whichever is larger.
        progress: Whether to show a progress bar on a terminal.
    """

    loader: Iterable[Any]
    target_fn: Callable[[Any], tuple[Any, Any]] | None = None
    labels: str = "given"
    rare_classes: str = "error"
    n_classes: int | None = None
    progress: bool = True

    def adapter(self, model: nn.Module, *, with_labels: bool = False) -> BatchAdapter:
        """An adapter of the batches for a model.

        Args:
            model: The model.
            with_labels: Whether labels are required, unless they are predicted.

        Returns:
            The adapter.
        """
        return BatchAdapter(model, self.target_fn, predicted=self.labels == "predicted" or not with_labels)

    def batches(
        self, adapter: BatchAdapter, description: str, batches: Iterable[Any] | None = None, *, skip: int = 0
    ) -> Iterator[tuple[int, Any, Any]]:
        """Iterate over all batches that have samples.

        Args:
            adapter: The adapter for the model, see :meth:`adapter`.
            description: Description in front of the progress bar.
            batches: The batches, if the loader's first one was read already (:func:`peek`).
            skip: Number of batches at the beginning that are skipped.

        Yields:
            Position in the loader, inputs on the model's device, and labels as given (``None`` without labels).

        Raises:
            InputError: If a batch is not of a form that the adapter reads.
        """
        source = self.loader if batches is None else batches
        for i, batch in enumerate(progress_bar(source, self.loader, description, shown=self.progress)):
            if i < skip:
                continue
            inputs, labels = adapter.split(batch, i)
            if n_samples(inputs) != 0:
                yield i, inputs, labels


def peek(loader: Iterable[Any], *, may_be_empty: bool = False) -> tuple[Any, Iterator[Any]]:
    """Read the first batch of a loader without consuming it.

    Args:
        loader: A loader of batches.
        may_be_empty: Whether the loader may have no batches.

    Returns:
        The first batch, ``None`` if there is none, and an iterator over all batches, the first one included.

    Raises:
        InputError: If it is no loader, or has no batches and may not be empty.
    """
    check_loader(loader, "fit")
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        if may_be_empty:
            return None, batches
        raise InputError(EMPTY)
    return first, itertools.chain([first], batches)


def logits_of(outputs: Any) -> Tensor:
    """The class scores in a model's outputs.

    Args:
        outputs: A tensor, a tuple or list that begins with it, or a mapping or object with ``logits``.

    Returns:
        The scores, ``[samples, classes]``.

    Raises:
        InputError: If there are no scores of this shape.
    """
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    found = found[0] if isinstance(found, (tuple, list)) and found else found
    if not isinstance(found, Tensor) or found.dim() != 2:
        came = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise InputError(f"model: expected scores of shape [samples, classes], got {came}.")
    return found
