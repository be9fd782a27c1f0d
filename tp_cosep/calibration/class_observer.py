"""From a model and a loader to class-conditional moments of its layers.

Whatever happens on the way, the model comes back as it was: hooks removed, every submodule in its own mode,
no gradient and no buffer touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_cosep.calibration.batch_dim import Layout, find_layout, to_samples
from tp_cosep.calibration.data_pass import run_pass
from tp_cosep.calibration.io import moments_of, tensors_of
from tp_cosep.calibration.labels import check_fit_options, finished, guessed_classes
from tp_cosep.calibration.memory import class_bytes
from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments, to_cells
from tp_cosep.utils.data import BatchAdapter, evaluating, n_samples, peek, run_model, take_samples

__all__ = [
    "CHANNEL_DIMS",
    "ClassObserver",
    "channel_dim_of",
    "collect_moments",
    "measured_layers",
]

#: Layers that are measured, and the dimension of their tensors that holds the channels. They are those that
#: create channels. Normalisation and activations follow them, and JM distances do not change under a
#: normalisation's affine map.
CHANNEL_DIMS: dict[type[nn.Module], int] = {
    _ConvNd: 1,
    nn.Linear: -1,
    nn.Embedding: -1,
    nn.MultiheadAttention: -1,
}

_Record = Callable[[str, Tensor], None]


def channel_dim_of(layer: nn.Module, channel_dims: Mapping[type[nn.Module], int] | None = None) -> int | None:
    """The dimension of a layer's tensors that holds its channels; ``None`` for a layer that is not measured."""
    known = {**CHANNEL_DIMS, **(channel_dims or {})}
    return next((known[t] for t in type(layer).__mro__ if t in known), None)


def measured_layers(
    model: nn.Module, channel_dims: Mapping[type[nn.Module], int] | None = None
) -> dict[str, nn.Module]:
    """The layers of a model that :func:`collect_moments` can measure, by name."""
    # An attention layer of torch computes its output projection itself: the projection never runs as a layer.
    inside = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {
        name: m for name, m in model.named_modules() if m not in inside and channel_dim_of(m, channel_dims) is not None
    }


def collect_moments(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    spatial: int | str | None = 4,
    observe: str = "outputs",
    layers: Iterable[str] | Callable[[Any], Iterable[str]] | None = None,
    channel_dims: Mapping[type[nn.Module], int] | None = None,
    target_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    labels: str = "given",
    rare_classes: str = "error",
    n_classes: int | None = None,
    memory_budget: int = 2**30,
    progress: bool = True,
) -> dict[str, ClassMoments]:
    """Measure the convolutional, linear, embedding and attention layers of a model, class by class, in one pass.

    Args:
        model: Any module; runs in eval mode on its own device. Inputs are moved there, and floating
            inputs are cast to the model's floating type if it has just one.
        loader: Batches ``(inputs, labels)``; inputs a tensor, a tuple of arguments or a dict of keyword
            arguments; labels integers ≥ 0, one per sample.
        spatial: Maps are average-pooled to ``spatial`` cells along each dimension; ``None`` keeps every
            pixel (the papers' form); ``"auto"`` takes the largest value whose moments fit
            ``memory_budget``.
        observe: ``"outputs"`` measures what layers make, ``"inputs"`` what they read.
        layers: Names of the layers to measure, or a function of the first batch's inputs that returns them; all of
            the known types if not given.
        channel_dims: Further types of layers, and the dimension of their tensors that holds the channels.
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
        not in it; one whose tensors cannot be told apart by sample has empty ones.

    Raises:
        InputError: If the loader is empty, a batch or a label is not as described, an activation is NaN
            or infinite, there are fewer than two classes, or a class has too few samples.
    """
    check_fit_options(spatial, labels, rare_classes, observe)
    known = measured_layers(model, channel_dims)
    if not known:
        raise InputError("fit: expected a model with convolutional or linear layers, found none.")
    adapter = BatchAdapter(model, target_fn, predicted=labels == "predicted")
    first, batches = peek(loader)
    if callable(layers):
        layers = layers(adapter.split(first, 0)[0])
    chosen = known if layers is None else {name: known[name] for name in layers if name in known}
    if not chosen:
        raise InputError("fit: expected layers to measure, found none that belong to a group that can be pruned.")
    observer = ClassObserver(chosen, observe=observe, channel_dims=channel_dims)
    observer.choose_cells(model, adapter, first, spatial, n_classes=n_classes, memory_budget=memory_budget)
    samples = run_pass(model, adapter, batches, [observer], loader=loader, what="class moments", progress=progress)
    return finished(observer.moments, observer.unclear, samples, observe=observe, rare_classes=rare_classes)


class ClassObserver:
    """Gathers class moments of some layers while a model runs, see :func:`tp_cosep.calibration.data_pass.run_pass`.

    It finds out by itself where the layers' tensors hold the samples.

    Args:
        layers: By name.
        observe: What is measured of them, see :data:`tp_cosep.calibration.labels.OBSERVED`.
        channel_dims: Further types of layers, and the dimension of their tensors that holds the channels.
        n_cells: Cells per dimension that maps are pooled to; ``None`` for every pixel.

    Attributes:
        moments: By layer name, in the order in which the layers first ran.
        unclear: Layers whose tensors cannot be told apart by sample; their moments stay empty.
        n_cells: As given, or as :meth:`choose_cells` found.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        observe: str = "outputs",
        channel_dims: Mapping[type[nn.Module], int] | None = None,
        n_cells: int | None = None,
    ) -> None:
        self.layers = layers
        self.moments: dict[str, ClassMoments] = {}
        self.unclear: set[str] = set()
        self._observe = observe
        self.n_cells = n_cells
        self._dims = {name: channel_dim_of(m, channel_dims) for name, m in layers.items()}
        self._layouts: dict[str, Layout] = {}
        self._has_looked = False
        self._records: dict[str, list[Tensor]] = {}

    def choose_cells(
        self,
        model: nn.Module,
        adapter: BatchAdapter,
        first: Any,
        spatial: int | str | None,
        *,
        n_classes: int | None,
        memory_budget: int,
    ) -> None:
        """Set the number of cells; the arguments are those of :func:`collect_moments`."""
        self.n_cells = None if isinstance(spatial, str) else spatial
        if spatial == "auto":
            with evaluating(model):
                self.n_cells = _fit_spatial(model, self, adapter, first, n_classes, memory_budget)

    @contextmanager
    def on_tensor(self, record: _Record) -> Iterator[None]:
        """Call ``record(name, tensor)`` for every layer that runs; channels in the last dimension."""
        handles = []
        try:
            for name, layer in self.layers.items():
                handles.append(self._hook(name, layer, record))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, layer: nn.Module, record: _Record) -> Any:
        dim = self._dims[name]
        assert dim is not None

        def take(value: Any) -> None:
            x = value[0] if isinstance(value, (tuple, list)) and value else value
            if isinstance(x, Tensor) and x.dim() > max(dim, 0):
                record(name, x.movedim(dim, -1))

        if self._observe == "outputs":
            return layer.register_forward_hook(lambda _module, _args, output: take(output))
        return layer.register_forward_pre_hook(
            lambda _module, args, kwargs: take(args or list(kwargs.values())), with_kwargs=True
        )

    def prepare(self, model: nn.Module, inputs: Any) -> None:
        """Find the layers' layouts, from two short runs on a few of the samples of the first batch that has some."""
        n_more = min(n_samples(inputs) or 1, 3)
        if n_more < 2 or self._has_looked:
            return
        self._has_looked = True
        try:
            more, fewer = self._raw(model, inputs, n_more), self._raw(model, inputs, n_more - 1)
        except Exception as error:
            warnings.warn(
                f"fit: the model does not run on a part of a batch ({type(error).__name__}: {error}); the first "
                "dimension of every layer's output is taken to be the sample.",
                stacklevel=4,
            )
            return
        for name in more:
            found = {
                find_layout(a, b, n_more, n_more - 1) for a, b in zip(more[name], fewer.get(name, []), strict=False)
            }
            layout = found.pop() if len(found) == 1 else None
            if layout is None or len(more[name]) != len(fewer.get(name, [])):
                self.unclear.add(name)
            else:
                self._layouts[name] = layout

    def _raw(self, model: nn.Module, inputs: Any, n: int) -> dict[str, list[Tensor]]:
        tensors: dict[str, list[Tensor]] = {}
        with self.on_tensor(lambda name, x: tensors.setdefault(name, []).append(x.clone())):
            run_model(model, take_samples(inputs, n, n_samples(inputs) or 1))
        return tensors

    @contextmanager
    def watching(self, inputs: Any) -> Iterator[None]:
        """Pool and keep what the layers see of a batch, until :meth:`add` says the classes."""
        n = n_samples(inputs) or 1
        self._records = {}

        def record(name: str, x: Tensor) -> None:
            activations = self._records.setdefault(name, [])
            if name in self.unclear:
                return
            # Before two samples were seen at once, all of a tensor is of the one sample.
            samples = to_samples(x, self._layouts.get(name, Layout()), n)
            if samples is None:
                raise InputError(
                    f"layer {name!r}: expected a multiple of {n} rows for {n} samples, got {x.shape[0]}; the first "
                    "dimension of every input has to be the sample."
                )
            cells = to_cells(samples, spatial=self.n_cells)
            if cells.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                cells = cells.clone()  # the next layer may work in place, as ReLU(inplace=True) does
            activations.append(cells)

        with self.on_tensor(record):
            yield

    def add(self, labels: Tensor, i: int) -> None:
        """Add what was seen of the i-th batch to the moments of its samples' classes."""
        for name, activations in self._records.items():
            layer_moments = self.moments.setdefault(name, ClassMoments())
            for x in activations:
                _check_rows(x, labels, i)
                _update(layer_moments, x, labels, name)
        self._records = {}

    def state(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What was gathered so far, see :class:`tp_cosep.calibration.io.Part`."""
        return tensors_of(self.moments, part), {
            "names": [*self.moments],
            "unclear": sorted(self.unclear),
            "layouts": {name: [layout.dim, layout.is_minor] for name, layout in self._layouts.items()},
            "has_looked": self._has_looked,
        }

    def restore(self, part: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], device: torch.device) -> None:
        """The inverse of :meth:`state`."""
        self.moments = moments_of(tensors, part, facts["names"], device)
        self.unclear = set(facts["unclear"])
        self._layouts = {name: Layout(*layout) for name, layout in facts["layouts"].items()}
        self._has_looked = facts["has_looked"]

    def shapes(self, model: nn.Module, inputs: Any) -> tuple[dict[str, tuple[int, ...]], Any]:
        """Components and positions of every layer's tensors, and the model's output."""
        shapes: dict[str, tuple[int, ...]] = {}
        n = n_samples(inputs) or 1

        def record(name: str, x: Tensor) -> None:
            samples = None if name in self.unclear else to_samples(x, self._layouts.get(name, Layout()), n)
            if samples is not None:
                shapes[name] = tuple(samples.shape[1:])

        self.prepare(model, inputs)
        with self.on_tensor(record):
            outputs = run_model(model, inputs)
        return shapes, outputs


def _check_rows(x: Tensor, labels: Tensor, i: int) -> None:
    if len(x) != len(labels):
        raise InputError(
            f"batch {i}: expected one label per sample, got {len(labels)} labels where the layers' outputs have "
            f"{len(x)} rows; the first dimension of every input has to be the sample."
        )


def _update(moments: ClassMoments, x: Tensor, labels: Tensor, name: str) -> None:
    # The sum is finite if all of them are, and otherwise only if infinities cancel, which makes NaN.
    if not torch.isfinite(x.sum(dtype=torch.float64)):
        raise InputError(
            f"layer {name!r}: got NaN or infinite activations; check the inputs and the weights, or run the "
            "model in a wider floating-point type."
        )
    try:
        moments.update(x, labels)
    except InputError as error:
        raise InputError(f"layer {name!r}: {error}") from error


def _fit_spatial(
    model: nn.Module,
    observer: ClassObserver,
    adapter: BatchAdapter,
    first: Any,
    n_classes: int | None,
    memory_budget: int,
) -> int:
    """The largest number of cells per dimension whose moments fit."""
    inputs, given = adapter.split(first, 0)
    shapes, outputs = observer.shapes(model, inputs)
    n_classes = guessed_classes(adapter, outputs, given, n_classes)

    def n_bytes(s: int) -> int:
        return class_bytes(shapes.values(), n_classes, s)

    largest = max((max(shape[1:], default=1) for shape in shapes.values()), default=1)
    fitting = [s for s in range(1, largest + 1) if n_bytes(s) <= memory_budget]
    if not fitting:
        raise InputError(
            f"fit: the moments of {n_classes} classes need {n_bytes(1):,} bytes even with spatial=1, the "
            f"memory_budget is {memory_budget:,}; raise memory_budget."
        )
    return fitting[-1]
