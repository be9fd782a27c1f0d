"""What a selector measures of a model, whatever it is told to look at, in one pass over the data."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tp_cosep.calibration import memory
from tp_cosep.calibration.class_observer import ClassObserver, measured_layers
from tp_cosep.calibration.data_pass import Observer, run_pass
from tp_cosep.calibration.input_observer import InputObserver, InputStatistics
from tp_cosep.calibration.io import Checkpoint, fingerprint
from tp_cosep.calibration.labels import check_fit_options, finished, guessed_classes
from tp_cosep.calibration.reduce import merged_classes, merged_inputs
from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.graph.consumers import patches_of_consumers, readable_groups
from tp_cosep.graph.groups import is_output, prunable_groups
from tp_cosep.graph.heads import attention_layers_of, head_parameters
from tp_cosep.graph.patches import Patches, patches_of
from tp_cosep.graph.tracing import ROOT_TYPES, trace
from tp_cosep.utils.data import EMPTY, BatchAdapter, evaluating, n_samples, peek, run_model, take_samples
from tp_cosep.utils.distributed import agreed, all_samples, is_distributed, own_path, place

__all__ = ["StatisticsSpec", "estimate_memory", "measure"]


@dataclass(frozen=True)
class _Layers:
    """What there is to measure of a model.

    Attributes:
        layers: Layers that create channels which can be pruned, by name.
        all_patches: How layers read such channels, by name.
        unconsumed: Of ``layers``, those whose channels no layer reads by weights alone: attention multiplies them.
    """

    layers: dict[str, nn.Module]
    all_patches: dict[str, Patches]
    unconsumed: dict[str, nn.Module]


@dataclass(frozen=True)
class StatisticsSpec:
    """What is to be measured.

    Attributes:
        by_classes: Class moments of all layers that create channels, or, by ``observe``, read them.
        by_inputs: Second moments of what layers read.
        input_classes: With second moments also class means of the same, and class moments of the layers that create
            channels which nothing reads by weights alone.
        observe: Whose class moments, see :data:`tp_cosep.calibration.labels.OBSERVED`.
        spatial: Cells per dimension, as for ``collect_moments``; for class means of readers ``"auto"`` is 4.
        channel_dims: As for ``collect_moments``.
        num_heads: Number of heads by attention layer.
        memory_budget: As for ``collect_moments``; what is measured may not take more bytes.
    """

    by_classes: bool
    by_inputs: bool
    input_classes: bool
    observe: str
    spatial: int | str | None
    channel_dims: Mapping[type[nn.Module], int]
    num_heads: Mapping[nn.Module, int]
    memory_budget: int

    @property
    def with_labels(self) -> bool:
        """Whether labels are needed."""
        return self.by_classes or self.input_classes

    def facts(self) -> list[Any]:
        """What a file of moments says of this."""
        return [self.by_classes, self.by_inputs, self.input_classes, self.observe, self.spatial]


def measure(
    model: nn.Module,
    loader: Iterable[Any],
    spec: StatisticsSpec,
    *,
    layers: Iterable[str] | None,
    ignored: Iterable[nn.Module],
    target_fn: Callable[[Any], tuple[Any, Any]] | None,
    labels: str,
    rare_classes: str,
    n_classes: int | None,
    progress: bool,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
) -> tuple[dict[str, ClassMoments], dict[str, InputStatistics]]:
    """Measure layers in one pass, in eval mode; the model stays as it is.

    Args:
        model: Any module that Torch-Pruning can trace on the first batch.
        loader: As for :func:`tp_cosep.calibration.class_observer.collect_moments`.
        spec: What is measured.
        layers: Names of layers that create channels; nothing but these, and what reads their channels, is measured.
        ignored: Groups that contain one of these are left out.
        target_fn: As for ``collect_moments``.
        labels: As for ``collect_moments``.
        rare_classes: As for ``collect_moments``.
        n_classes: As for ``collect_moments``.
        progress: Show a progress bar on a terminal.
        checkpoint: A file that keeps the pass on the way, and from which one that was interrupted goes on.
        checkpoint_every: Batches between two writes of it; after half a minute there is one in any case.

    Returns:
        Class moments of layers, and what readers see, by name.

    Raises:
        InputError: If the loader, the labels or the activations cannot be used, or memory does not suffice.
    """
    check_fit_options(spec.spatial, labels, rare_classes, spec.observe)
    adapter = BatchAdapter(model, target_fn, predicted=labels == "predicted" or not spec.with_labels)
    observers = _Observers()
    kept = None
    if checkpoint is not None:
        layers = None if layers is None else list(layers)
        how = [*spec.facts(), layers, labels, n_classes, *place()]
        header = {"model": fingerprint(model), "measured": how}
        kept = Checkpoint(own_path(checkpoint), checkpoint_every, header, adapter.device)

    def run() -> Counter[int]:
        nonlocal observers
        first, batches = peek(loader, may_be_empty=is_distributed())
        if first is None:
            return Counter()
        inputs, given = adapter.split(first, 0)
        observers = _observers(model, adapter, first, spec, list(ignored), layers, n_classes)
        if not observers.all:
            raise InputError(
                "fit: found nothing to measure: no layer belongs to a group that can be pruned by this space. The "
                "outputs of a model are left alone, and so are ignored_layers and what shares channels with them."
            )
        shapes, outputs = observers.shapes(model, inputs)
        n = guessed_classes(adapter, outputs, given, n_classes) if spec.with_labels else 0
        memory.check(
            observers.memory(shapes, spec, n),
            shapes,
            observers.n_features,
            memory_budget=spec.memory_budget,
            n_classes=n,
        )
        if kept is not None:
            kept.parts = observers.named
        return run_pass(
            model,
            adapter,
            batches,
            observers.all,
            loader=loader,
            what="class moments" if spec.by_classes else "what layers read",
            progress=progress,
            with_labels=spec.with_labels,
            may_be_empty=is_distributed(),
            checkpoint=kept,
        )

    samples = all_samples(agreed(run))
    return _of_all_processes(observers, samples, model, adapter, observe=spec.observe, rare_classes=rare_classes)


def estimate_memory(
    model: nn.Module, example_inputs: Any, spec: StatisticsSpec, n_classes: int, ignored: Iterable[nn.Module]
) -> memory.MemoryEstimate:
    """What :func:`measure` and a selection take.

    Args:
        model: The model.
        example_inputs: Of the size of the calibration data.
        spec: What is measured.
        n_classes: Number of classes.
        ignored: Groups that contain one of these are left out.

    Returns:
        The estimate.
    """
    adapter = BatchAdapter(model, None, predicted=True)
    first = (example_inputs, None)
    observers = _observers(model, adapter, first, spec, list(ignored), None, n_classes)
    shapes, _ = observers.shapes(model, adapter.split(first, 0)[0])
    return observers.memory(shapes, spec, n_classes)


def _observers(
    model: nn.Module,
    adapter: BatchAdapter,
    first: Any,
    spec: StatisticsSpec,
    ignored: list[nn.Module],
    layers: Iterable[str] | None,
    n_classes: int | None,
) -> _Observers:
    """Whatever is to measure the layers that are worth it, from a trace of the model on a few samples."""
    inputs = adapter.split(first, 0)[0]
    discovered = _discover(
        model, inputs, ignored, spec.channel_dims, spec.num_heads, layers, with_consumers=spec.by_inputs
    )
    found = _Observers()
    chosen = discovered.layers if spec.by_classes else discovered.unconsumed if spec.input_classes else {}
    cells = 4 if isinstance(spec.spatial, str) else spec.spatial
    if chosen:
        found.made = ClassObserver(chosen, observe=spec.observe, channel_dims=spec.channel_dims)
        found.made.choose_cells(
            model, adapter, first, spec.spatial, n_classes=n_classes, memory_budget=spec.memory_budget
        )
    if spec.by_inputs and discovered.all_patches:
        found.consumers = InputObserver(discovered.all_patches, seed=0)
        if spec.input_classes:
            measured_consumers = {name: r.layer for name, r in discovered.all_patches.items()}
            found.read = ClassObserver(measured_consumers, observe="inputs", n_cells=cells)
    return found


@dataclass
class _Observers:
    """Whatever measures in this process.

    Attributes:
        made: Class moments by ``observe``, or of what no layer reads by weights.
        consumers: Second moments of what layers read.
        read: Class moments of the same.
    """

    made: ClassObserver | None = None
    consumers: InputObserver | None = None
    read: ClassObserver | None = None

    @property
    def named(self) -> dict[str, Any]:
        """Those that there are, by name."""
        parts = {"outputs": self.made, "consumers": self.consumers, "inputs": self.read}
        return {name: c for name, c in parts.items() if c is not None}

    @property
    def all(self) -> list[Observer]:
        """Those that there are."""
        return [*self.named.values()]

    @property
    def n_features(self) -> dict[str, int]:
        """Features of the layers of which second moments are taken."""
        return {} if self.consumers is None else {name: r.n_features for name, r in self.consumers.all_patches.items()}

    def shapes(self, model: nn.Module, inputs: Any) -> tuple[dict[str, tuple[int, ...]], Any]:
        """The tensors of which class moments are taken, and the model's output, from a run on a few samples."""
        few = take_samples(inputs, 3, n_samples(inputs) or 1)
        shapes: dict[str, tuple[int, ...]] = {}
        outputs = None
        with evaluating(model):
            for what, observer in (("outputs", self.made), ("inputs", self.read)):
                if observer is not None:
                    found, outputs = observer.shapes(model, few)
                    shapes |= {f"{name} ({what})": shape for name, shape in found.items()}
        return shapes, outputs

    def memory(
        self, shapes: Mapping[str, tuple[int, ...]], spec: StatisticsSpec, n_classes: int
    ) -> memory.MemoryEstimate:
        """What measuring these takes, and choosing by it."""
        cells = next((c.n_cells for c in (self.made, self.read) if c is not None), None)
        n_features = self.n_features.values()
        return memory.estimate(shapes, n_features, n_classes, cells, by_separability=spec.by_classes)


def _of_all_processes(
    observers: _Observers,
    samples: Counter[int],
    model: nn.Module,
    adapter: BatchAdapter,
    *,
    observe: str,
    rare_classes: str,
) -> tuple[dict[str, ClassMoments], dict[str, InputStatistics]]:
    """What all processes gathered together, checked."""
    made, unclear_made = merged_classes(observers.made, adapter.device)
    read, unclear = merged_classes(observers.read, adapter.device)
    found = merged_inputs({} if observers.consumers is None else observers.consumers.found, model, adapter.device)
    if not (made or found):
        raise InputError(EMPTY)
    if read:
        # A class mean needs no second sample: what is rare is rare for variances alone.
        consequence = "there class means do not count"
        read = finished(read, unclear, samples, observe="inputs", rare_classes="keep", consequence=consequence)
        for name, moments in read.items():
            found[name].classes = moments
    if made:
        made = finished(made, unclear_made, samples, observe=observe, rare_classes=rare_classes)
    return made, found


def _discover(
    model: nn.Module,
    inputs: Any,
    ignored: list[nn.Module],
    channel_dims: Mapping[type[nn.Module], int],
    num_heads: Mapping[nn.Module, int],
    layers: Iterable[str] | None,
    *,
    with_consumers: bool,
) -> _Layers:
    """Find out what there is to measure, from a trace of the model on a few samples."""
    known, spec = measured_layers(model, channel_dims), None if layers is None else set(layers)
    if spec is not None and not with_consumers:
        return _Layers({name: m for name, m in known.items() if name in spec}, {}, {})
    few = take_samples(inputs, 2, n_samples(inputs) or 1)
    try:
        kept = [model.get_parameter(name) for name in head_parameters(model, num_heads)]
        graph = trace(model, few, forward_fn=run_model, verbose=False, ignored_params=kept)
        groups = list(prunable_groups(graph, ignored, ROOT_TYPES)) if ignored or with_consumers else []
    except Exception as error:
        cause = error.__cause__ or error
        warnings.warn(
            f"fit: Torch-Pruning cannot trace the model on the first batch ({type(cause).__name__}: {cause}); every "
            "layer is measured, also those that cannot be pruned. Name them with layers= to save time.",
            stacklevel=4,
        )
        found = {name: patches_of(m) for name, m in known.items()} if with_consumers else {}
        return _Layers(known, {name: r for name, r in found.items() if r is not None}, known)
    reached = {dep.target.module for g in groups for dep, _ in g} if ignored else set(graph.module2node)
    made = {name: m for name, m in known.items() if m in reached or isinstance(m, tuple(channel_dims))}
    if spec is not None:
        made = {name: m for name, m in made.items() if name in spec}
    if not with_consumers:
        return _Layers(made, {}, {})
    views, unconsumed = [], set[str]()
    for group, view in readable_groups(groups):
        members = {m.name for m in view.producers}
        if is_output(group) or (spec is not None and not members & spec):
            continue
        views.append(view)
        if attention_layers_of(group, num_heads) or not any(patches_of(m.layer) for m in view.consumers):
            unconsumed |= members
    all_patches = patches_of_consumers(views, max_features=0)
    return _Layers(made, all_patches, {name: m for name, m in made.items() if name in unconsumed})
