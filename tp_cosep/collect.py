"""From a model and a loader to class-conditional moments of its layers.

The only module that runs the model on data. Whatever happens on the way, the model comes back as it
was: hooks removed, every submodule in its own mode, no gradient and no buffer touched.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from tqdm.auto import tqdm

from tp_cosep.errors import InputError
from tp_cosep.moments import ClassMoments, to_cells

__all__ = ["MEASURED_TYPES", "channel_dim_of", "collect_moments", "evaluating", "measured_layers", "run_model"]

#: Layers whose outputs are measured: those that create channels. Normalisation and activations
#: follow them, and JM distances do not change under a normalisation's affine map.
MEASURED_TYPES: tuple[type[nn.Module], ...] = (_ConvNd, nn.Linear)

_BYTES_PER_MOMENT = 2 * 8  # mean and squared deviation, float64


def channel_dim_of(layer: nn.Module) -> int:
    """The dimension of a layer's output that holds its channels: last for linear layers, else 1."""
    return -1 if isinstance(layer, nn.Linear) else 1


def measured_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that :func:`collect_moments` measures, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MEASURED_TYPES)}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients, and every submodule back in its own mode after."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model on a tensor, on a tuple or list of arguments, or on a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def collect_moments(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    spatial: int | str | None = 4,
    target_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    labels: str = "given",
    rare_classes: str = "error",
    n_classes: int | None = None,
    memory_budget: int = 2**30,
    progress: bool = True,
) -> dict[str, ClassMoments]:
    """Measure every convolutional and linear layer of a model, class by class, in one pass.

    Args:
        model: Any module; runs in eval mode on its own device. Inputs are moved there, and floating
            inputs are cast to the model's floating type if it has just one.
        loader: Batches ``(inputs, labels)``; inputs a tensor, a tuple of arguments or a dict of keyword
            arguments; labels integers ≥ 0, one per sample.
        spatial: Maps are average-pooled to ``spatial`` cells along each dimension; ``None`` keeps every
            pixel (the papers' form); ``"auto"`` takes the largest value whose moments fit
            ``memory_budget``.
        target_fn: Reads any other kind of batch: ``target_fn(batch) -> (inputs, labels)``.
        labels: ``"given"``, or ``"predicted"`` for the arg max of the model's own output; a batch may then
            be the inputs alone.
        rare_classes: What to do about a class with fewer than two samples: ``"error"``, or ``"drop"`` to
            leave it out with a warning.
        n_classes: Number of classes, for ``spatial="auto"`` only; by default the width of the model's
            output or the largest label of the first batch, whichever is larger.
        memory_budget: Bytes that ``spatial="auto"`` may plan for; classes × components × cells × 16 bytes
            over all layers.
        progress: Show a progress bar on a terminal.

    Returns:
        Moments by layer name, in the order in which the layers first ran. A layer that never ran is
        not in it; one that folds other dimensions into the batch, as window attention does, has empty ones.

    Raises:
        InputError: If the loader is empty, a batch or a label is not as described, an activation is NaN
            or infinite, there are fewer than two classes, or a class has too few samples.
    """
    _check_options(spatial, labels, rare_classes)
    layers = measured_layers(model)
    if not layers:
        raise InputError("fit: expected a model with convolutional or linear layers, found none.")
    reader = _BatchReader(model, target_fn, predicted=labels == "predicted")
    moments: dict[str, ClassMoments] = {}
    samples: Counter[int] = Counter()
    batches = iter(loader)
    with evaluating(model):
        n_cells = None if isinstance(spatial, str) else spatial
        if spatial == "auto":
            batches, n_cells = _fit_spatial(model, layers, reader, batches, n_classes, memory_budget)
        bar = tqdm(
            batches,
            desc="class moments",
            unit="batch",
            total=_length(loader),
            disable=None if progress else True,
            leave=False,
        )
        for i, batch in enumerate(bar):
            inputs, given = reader.split(batch, i)
            with _recording(layers, n_cells) as records:
                outputs = run_model(model, inputs)
            targets = reader.labels(outputs, given, i)
            if len(targets) == 0:
                continue
            samples.update(targets.tolist())
            _leave_out_folded(records, moments, len(targets), i)
            for name, activations in records.items():
                layer_moments = moments.setdefault(name, ClassMoments())
                for x in activations:
                    _update(layer_moments, x, targets, name)
    folded = [name for name, m in moments.items() if m.is_empty]
    if folded and samples:
        warnings.warn(
            f"fit: cannot measure {', '.join(folded)}: these layers fold other dimensions into the batch, so their "
            "outputs do not belong to single samples; groups of such layers alone are left alone.",
            stacklevel=3,
        )
    return _drop_rare_classes(moments, samples, rare_classes)


def _leave_out_folded(
    records: dict[str, list[Tensor]], moments: dict[str, ClassMoments], n_samples: int, i: int
) -> None:
    """Empty the moments of layers whose outputs have not one row per sample, and drop what they recorded."""
    odd = {name for name, outputs in records.items() if any(len(x) != n_samples for x in outputs)}
    if odd and len(odd) == len(records):
        n_rows = len(next(iter(records.values()))[0])
        raise InputError(
            f"batch {i}: expected one label per sample, got {n_samples} labels where the layers' outputs have {n_rows} "
            "rows; the first dimension of every input has to be the sample."
        )
    for name in [*records]:
        if name in odd or (name in moments and moments[name].is_empty):
            moments[name] = ClassMoments()
            del records[name]


def _check_options(spatial: int | str | None, labels: str, rare_classes: str) -> None:
    is_count = isinstance(spatial, int) and not isinstance(spatial, bool) and spatial >= 1
    if not (is_count or spatial is None or spatial == "auto"):
        raise InputError(f"fit: expected spatial to be an integer ≥ 1, None or 'auto', got {spatial!r}.")
    if labels not in ("given", "predicted"):
        raise InputError(f"fit: expected labels='given' or 'predicted', got {labels!r}.")
    if rare_classes not in ("error", "drop"):
        raise InputError(f"fit: expected rare_classes='error' or 'drop', got {rare_classes!r}.")


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # an iterable without a length
        return None


@contextmanager
def _on_output(layers: Mapping[str, nn.Module], record: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Call ``record(name, layer, output)`` whenever one of the layers runs."""

    def make_hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            record(name, layer, output)

        return hook

    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(make_hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recording(layers: Mapping[str, nn.Module], spatial: int | None) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the pooled outputs of layers, ``[samples, components, cells]``, in the order of the calls."""
    records: dict[str, list[Tensor]] = {}

    def record(name: str, layer: nn.Module, output: Tensor) -> None:
        cells = to_cells(output, channel_dim=channel_dim_of(layer), spatial=spatial)
        if cells.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
            cells = cells.clone()  # the next layer may work in place, as ReLU(inplace=True) does
        records.setdefault(name, []).append(cells)

    with _on_output(layers, record):
        yield records


def _update(moments: ClassMoments, x: Tensor, labels: Tensor, name: str) -> None:
    batch = ClassMoments.from_batch(x, labels)
    if not torch.isfinite(batch.m2).all():
        raise InputError(
            f"layer {name!r}: got NaN or infinite activations; check the inputs and the weights, or run the "
            "model in a wider floating-point type."
        )
    try:
        moments.merge(batch)
    except InputError as error:
        raise InputError(f"layer {name!r}: {error}") from error


class _BatchReader:
    """Turns whatever the loader yields into model inputs and checked labels."""

    def __init__(self, model: nn.Module, target_fn: Callable[[Any], tuple[Any, Any]] | None, *, predicted: bool):
        tensors = list(itertools.chain(model.parameters(), model.buffers()))
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.target_fn = target_fn
        self.predicted = predicted

    def split(self, batch: Any, i: int) -> tuple[Any, Any]:
        """Inputs on the model's device, and the labels as they came."""
        if self.target_fn is not None:
            batch = self.target_fn(batch)
        is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not is_pair and not (self.predicted and self.target_fn is None):
            raise InputError(
                f"batch {i}: expected a pair (inputs, labels), got {_describe(batch)}; pass target_fn=, a function "
                "that turns a batch into such a pair."
            )
        inputs, labels = batch if is_pair else (batch, None)
        return self._to_model(inputs), labels

    def labels(self, outputs: Any, given: Any, i: int) -> Tensor:
        """Labels ``[samples]`` on the model's device: those given, or the model's own predictions."""
        if self.predicted:
            return _logits(outputs, i).argmax(1)
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


def _describe(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"


def _logits(outputs: Any, i: int) -> Tensor:
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits")
    elif hasattr(outputs, "logits"):
        outputs = outputs.logits
    if isinstance(outputs, (tuple, list)):
        outputs = outputs[0]
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        came = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"batch {i}: labels='predicted' needs a model output of shape [samples, classes], got {came}.")
    return outputs


def _fit_spatial(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    reader: _BatchReader,
    batches: Iterator[Any],
    n_classes: int | None,
    memory_budget: int,
) -> tuple[Iterator[Any], int]:
    """The largest number of cells per dimension whose moments fit; gives the first batch back."""
    first = next(batches, None)
    if first is None:
        raise InputError(_EMPTY)
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, layer: nn.Module, output: Tensor) -> None:
        shapes[name] = tuple(output.movedim(channel_dim_of(layer), 1).shape[1:])

    inputs, given = reader.split(first, 0)
    with _on_output(layers, record):
        outputs = run_model(model, inputs)
    if n_classes is None:
        labels = reader.labels(outputs, given, 0)
        seen = int(labels.max()) + 1 if len(labels) else 1
        n_classes = max(seen, outputs.shape[-1] if isinstance(outputs, Tensor) else 0)

    def n_bytes(s: int) -> int:
        cells = (n * prod(min(s, length) for length in spatial) for n, *spatial in shapes.values())
        return _BYTES_PER_MOMENT * n_classes * sum(cells)

    largest = max((max(shape[1:], default=1) for shape in shapes.values()), default=1)
    fitting = [s for s in range(1, largest + 1) if n_bytes(s) <= memory_budget]
    if not fitting:
        raise InputError(
            f"fit: the moments of {n_classes} classes need {n_bytes(1):,} bytes even with spatial=1, the "
            f"memory_budget is {memory_budget:,}; raise memory_budget."
        )
    return itertools.chain([first], batches), fitting[-1]


_EMPTY = (
    "fit: expected at least one batch, the loader gave none; a generator can be read only once, and a loader "
    "with drop_last=True gives nothing from fewer samples than one batch."
)


def _drop_rare_classes(
    moments: dict[str, ClassMoments], samples: Counter[int], rare_classes: str
) -> dict[str, ClassMoments]:
    if not samples:
        raise InputError(_EMPTY)
    rare = sorted(label for label, n in samples.items() if n < 2)
    if rare and rare_classes == "error":
        raise InputError(
            f"fit: expected at least two samples of every class, got one of class {_enumerate(rare)}; use more "
            "calibration data, or rare_classes='drop' to leave such classes out."
        )
    if len(samples) - len(rare) < 2:
        raise InputError(
            f"fit: expected samples of at least two classes, got {len(samples)} (class {_enumerate(sorted(samples))}), "
            f"{len(rare)} of them with a single sample; separability needs classes to tell apart."
        )
    if not rare:
        return moments
    warnings.warn(f"fit: left out class {_enumerate(rare)}, seen only once.", stacklevel=4)
    dropped = torch.tensor(rare)
    return {name: m.without(dropped) for name, m in moments.items()}


def _enumerate(labels: list[int], limit: int = 10) -> str:
    shown = ", ".join(map(str, labels[:limit]))
    return shown if len(labels) <= limit else f"{shown} and {len(labels) - limit} more"
