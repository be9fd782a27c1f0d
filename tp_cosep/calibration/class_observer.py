"""Class-conditional moments of a model's layers, collected while it runs.

Whatever happens on the way, the model comes back as it was: hooks removed, every submodule in its own mode,
no gradient and no buffer touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_cosep.calibration.batch_dim import Layout, find_layout, to_samples
from tp_cosep.calibration.io import moments_of, tensors_of
from tp_cosep.calibration.memory import class_bytes
from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments, to_cells
from tp_cosep.utils.data import n_samples, run_model, take_samples

__all__ = [
    "CHANNEL_DIMS",
    "ClassObserver",
    "DryRun",
    "channel_dim_of",
    "dry_run",
    "measured_layers",
    "most_cells",
]

# Finer cells than these tell selections little more, see docs/results.md.
_FINEST = 4

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
_Tensors = dict[str, list[Tensor]]


def channel_dim_of(layer: nn.Module, channel_dims: Mapping[type[nn.Module], int] | None = None) -> int | None:
    """The dimension of a layer's tensors that holds its channels; ``None`` for a layer that is not measured."""
    known = {**CHANNEL_DIMS, **(channel_dims or {})}
    return next((known[t] for t in type(layer).__mro__ if t in known), None)


def measured_layers(
    model: nn.Module, channel_dims: Mapping[type[nn.Module], int] | None = None
) -> dict[str, nn.Module]:
    """The layers of a model whose class moments can be taken, by name."""
    # An attention layer of torch computes its output projection itself: the projection never runs as a layer.
    inside = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {
        name: m for name, m in model.named_modules() if m not in inside and channel_dim_of(m, channel_dims) is not None
    }


class ClassObserver:
    """Gathers class moments of some layers while a model runs, see :func:`tp_cosep.calibration.data_pass.run_pass`.

    It finds out by itself where the layers' tensors hold the samples.

    Args:
        layers: By name.
        observe: What is measured of them, see :data:`tp_cosep.calibration.statistics.OBSERVED`.
        channel_dims: Further types of layers, and the dimension of their tensors that holds the channels.
        n_cells: Cells per dimension that maps are pooled to; ``None`` for every pixel.

    Attributes:
        moments: By layer name, in the order in which the layers first ran.
        unclear: Layers whose tensors cannot be told apart by sample; their moments stay empty.
        n_cells: As given; may be set before the first batch.
        has_layouts: Whether layouts were looked for.
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
        self.has_layouts = False
        self._records: dict[str, list[Tensor]] = {}

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
        """Find the layers' layouts with the first batch of several samples, unless a dry run has done so."""
        if not self.has_layouts and (n_samples(inputs) or 1) > 1:
            dry_run(model, [self], inputs)

    def find_layouts(self, more: _Tensors, fewer: _Tensors, n_more: int, n_fewer: int) -> None:
        """Find where the layers' tensors hold the samples, from their values for n samples and for the first of these.

        Args:
            more: By layer, one tensor per call, for ``n_more`` samples.
            fewer: By layer, one tensor per call, for ``n_fewer`` of them.
            n_more: Number of samples.
            n_fewer: Number of samples.
        """
        for name in more:
            found = {find_layout(a, b, n_more, n_fewer) for a, b in zip(more[name], fewer.get(name, []), strict=False)}
            layout = found.pop() if len(found) == 1 else None
            if layout is None or len(more[name]) != len(fewer.get(name, [])):
                self.unclear.add(name)
            else:
                self._layouts[name] = layout

    def shapes_of(self, tensors: _Tensors, n: int) -> dict[str, tuple[int, ...]]:
        """Components and positions of the layers' tensors for n samples, of those that can be told apart by sample."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, of_layer in tensors.items():
            for x in of_layer:
                samples = None if name in self.unclear else to_samples(x, self._layouts.get(name, Layout()), n)
                if samples is not None:
                    shapes[name] = tuple(samples.shape[1:])
        return shapes

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
            "has_looked": self.has_layouts,
        }

    def restore(self, part: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], device: torch.device) -> None:
        """The inverse of :meth:`state`."""
        self.moments = moments_of(tensors, part, facts["names"], device)
        self.unclear = set(facts["unclear"])
        self._layouts = {name: Layout(*layout) for name, layout in facts["layouts"].items()}
        self.has_layouts = facts["has_looked"]


@dataclass(frozen=True)
class DryRun:
    """What a run on a few samples shows.

    Attributes:
        shapes: Components and positions of each observer's tensors, by layer.
        outputs: The model's output.
    """

    shapes: list[dict[str, tuple[int, ...]]]
    outputs: Any


def dry_run(model: nn.Module, observers: Sequence[ClassObserver], inputs: Any) -> DryRun:
    """Run a model on three and on two of a batch's samples, for layouts and shapes together; on one if it has no more.

    Args:
        model: The model, in eval mode.
        observers: Their layouts are found, unless the batch has a single sample.
        inputs: Of a batch.

    Returns:
        What was seen. A model that does not run on a part of a batch is run on all of it, with a warning; the first
        dimension of every tensor is then taken to be the sample.
    """
    n = n_samples(inputs) or 1
    n_more = min(n, 3)

    def run(n_few: int) -> tuple[list[_Tensors], Any]:
        tensors: list[_Tensors] = [{} for _ in observers]
        with ExitStack() as stack:
            for observer, found in zip(observers, tensors, strict=True):
                stack.enter_context(observer.on_tensor(partial(_keep, found)))
            return tensors, run_model(model, inputs if n_few == n else take_samples(inputs, n_few, n))

    if n_more > 1:
        for observer in observers:
            observer.has_layouts = True
        try:
            (more, outputs), (fewer, _) = run(n_more), run(n_more - 1)
        except Exception as error:
            warnings.warn(
                f"fit: the model does not run on a part of a batch ({type(error).__name__}: {error}); the first "
                "dimension of every layer's output is taken to be the sample.",
                stacklevel=4,
            )
            (more, outputs), n_more = run(n), n
        else:
            for observer, a, b in zip(observers, more, fewer, strict=True):
                observer.find_layouts(a, b, n_more, n_more - 1)
    else:
        more, outputs = run(1)
    return DryRun([o.shapes_of(found, n_more) for o, found in zip(observers, more, strict=True)], outputs)


def _keep(tensors: _Tensors, name: str, x: Tensor) -> None:
    tensors.setdefault(name, []).append(x.clone())


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


def most_cells(shapes: Iterable[tuple[int, ...]], n_classes: int, memory_budget: int, *, reserved: int = 0) -> int:
    """The largest number of cells per dimension, up to 4, whose class moments fit, for ``spatial="auto"``.

    Args:
        shapes: Components and positions of every layer's tensors.
        n_classes: Number of classes.
        memory_budget: Bytes.
        reserved: Bytes of it that second moments take.

    Returns:
        The number.

    Raises:
        InputError: If even one cell takes more.
    """
    shapes = list(shapes)
    largest = max((max(shape[1:], default=1) for shape in shapes), default=1)
    fitting = [
        s for s in range(1, min(largest, _FINEST) + 1) if class_bytes(shapes, n_classes, s) + reserved <= memory_budget
    ]
    if not fitting:
        raise InputError(
            f"fit: the moments of {n_classes} classes need {class_bytes(shapes, n_classes, 1):,} bytes even with "
            f"spatial=1"
            + (f", second moments {reserved:,}" if reserved else "")
            + f"; the memory_budget is {memory_budget:,}; raise memory_budget."
        )
    return fitting[-1]
