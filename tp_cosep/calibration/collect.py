"""Collecting the statistics that a selection requires, in one pass over calibration data."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Size, nn

from tp_cosep.calibration import memory
from tp_cosep.calibration.attention_maps import collect_attention
from tp_cosep.calibration.class_observer import ClassObserver, DryRun, dry_run, measured_layers, most_cells
from tp_cosep.calibration.data_pass import Observer, run_pass
from tp_cosep.calibration.input_observer import InputObserver, InputStatistics
from tp_cosep.calibration.io import Checkpoint, fingerprint
from tp_cosep.calibration.labels import check_data, finished, guessed_classes
from tp_cosep.calibration.reduce import merged_classes, merged_inputs
from tp_cosep.calibration.statistics import Statistics, StatisticsSpec
from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.graph.consumers import patches_of_consumers, readable_groups
from tp_cosep.graph.groups import is_output, prunable_groups
from tp_cosep.graph.heads import attention_layers_of, head_parameters
from tp_cosep.graph.patches import Patches, patches_of, weight_shape
from tp_cosep.graph.tracing import ROOT_TYPES, trace
from tp_cosep.utils.data import EMPTY, CalibrationData, evaluating, n_samples, peek, run_model, take_samples
from tp_cosep.utils.distributed import agreed, all_samples, is_distributed, own_path, place

__all__ = ["collect", "estimate_memory", "weight_shapes"]


def collect(
    model: nn.Module,
    data: CalibrationData,
    spec: StatisticsSpec,
    *,
    layers: Iterable[str] | None = None,
    ignored: Iterable[nn.Module] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
) -> Statistics:
    """Collect statistics in one pass, in eval mode; the model stays as it is.

    Args:
        model: Any module that Torch-Pruning can trace on the first batch.
        data: The calibration data.
        spec: What is collected.
        layers: Names of layers that create channels; only these, and the consumers of their channels, are observed.
        ignored: Groups that contain one of these layers are left out.
        checkpoint: A file that keeps the pass on the way, and from which an interrupted pass goes on.
        checkpoint_every: Batches between two writes of it; after half a minute there is one in any case.

    Returns:
        The statistics.

    Raises:
        InputError: If the loader, the labels or the activations cannot be used, or memory does not suffice.
    """
    if spec.attention_maps:
        if not spec.num_heads:
            raise InputError(
                "fit: attention maps are those of heads, found none by name; pass num_heads= to the selector."
            )
        return Statistics(attention=collect_attention(model, data, spec.num_heads), fingerprint=fingerprint(model))
    check_data(data)
    adapter = data.adapter(model, with_labels=spec.with_labels)
    observers = _Observers()
    kept = None
    if checkpoint is not None:
        layers = None if layers is None else list(layers)
        how = [*spec.facts(), layers, data.labels, data.n_classes, *place()]
        header = {"model": fingerprint(model), "measured": how}
        kept = Checkpoint(own_path(checkpoint), checkpoint_every, header, adapter.device)

    def run() -> Counter[int]:
        nonlocal observers
        first, batches = peek(data.loader, may_be_empty=is_distributed())
        if first is None:
            return Counter()
        inputs, given = adapter.split(first, 0)
        observers = _observers(model, inputs, spec, list(ignored), layers)
        if not observers.all:
            raise InputError(
                "fit: found nothing to measure: no layer belongs to a group that can be pruned by this selector. The "
                "outputs of a model are left alone, and so are ignored_layers and what shares channels with them."
            )
        seen = observers.dry_run(model, inputs)
        n = guessed_classes(adapter, seen.outputs, given, data.n_classes) if spec.with_labels else 0
        shapes = observers.choose_cells(seen, spec, n)
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
            data,
            observers.all,
            "class moments" if spec.class_moments else "second moments",
            batches=batches,
            with_labels=spec.with_labels,
            may_be_empty=is_distributed(),
            checkpoint=kept,
        )

    samples = all_samples(agreed(run))
    moments, input_statistics = _of_all_processes(observers, samples, model, data, spec)
    return Statistics(
        moments=moments,
        inputs=input_statistics,
        weight_shapes=weight_shapes(model, moments),
        fingerprint=fingerprint(model),
    )


def weight_shapes(model: nn.Module, names: Iterable[str]) -> dict[str, Size]:
    """Shapes of the weights of some layers, by which pruned layers are told from those that were observed."""
    shapes = {name: weight_shape(model.get_submodule(name)) for name in names}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def estimate_memory(
    model: nn.Module, example_inputs: Any, spec: StatisticsSpec, n_classes: int, ignored: Iterable[nn.Module]
) -> memory.MemoryEstimate:
    """What :func:`collect` and a selection take.

    Args:
        model: The model.
        example_inputs: Of the size of the calibration data.
        spec: What is collected.
        n_classes: Number of classes.
        ignored: Groups that contain one of these layers are left out.

    Returns:
        The estimate.
    """
    inputs = CalibrationData([]).adapter(model).split((example_inputs, None), 0)[0]
    observers = _observers(model, inputs, spec, list(ignored), None)
    shapes = observers.choose_cells(observers.dry_run(model, inputs), spec, n_classes)
    return observers.memory(shapes, spec, n_classes)


@dataclass
class _Observers:
    """What collects statistics in this process.

    Attributes:
        layers: Class moments as the spec says, or of layers whose channels no layer consumes by weights.
        consumers: Second moments of consumers' inputs.
        inputs: Class moments of consumers' inputs.
    """

    layers: ClassObserver | None = None
    consumers: InputObserver | None = None
    inputs: ClassObserver | None = None

    @property
    def named(self) -> dict[str, Any]:
        """Those that there are, by name."""
        parts = {"layers": self.layers, "consumers": self.consumers, "inputs": self.inputs}
        return {name: observer for name, observer in parts.items() if observer is not None}

    @property
    def all(self) -> list[Observer]:
        """Those that there are."""
        return [*self.named.values()]

    @property
    def by_class(self) -> list[ClassObserver]:
        """Those that collect class moments."""
        return [observer for observer in (self.layers, self.inputs) if observer is not None]

    @property
    def n_features(self) -> dict[str, int]:
        """Features of the layers of which second moments are taken."""
        if self.consumers is None:
            return {}
        return {name: patches.n_features for name, patches in self.consumers.all_patches.items()}

    def dry_run(self, model: nn.Module, inputs: Any) -> DryRun:
        """Batch dimensions, shapes and the model's output, from one run on a few samples."""
        with evaluating(model):
            return dry_run(model, self.by_class, inputs)

    def choose_cells(self, seen: DryRun, spec: StatisticsSpec, n_classes: int) -> dict[str, tuple[int, ...]]:
        """Settle the number of cells of ``spatial="auto"``; returns the shapes of all tensors of class moments."""
        shapes: dict[str, tuple[int, ...]] = {}
        for observer, found in zip(self.by_class, seen.shapes, strict=True):
            if observer is self.layers and spec.spatial == "auto":
                second = memory.second_bytes(self.n_features.values())
                observer.n_cells = most_cells(found.values(), n_classes, spec.memory_budget, reserved=second)
            what = "inputs" if observer is self.inputs else "outputs"
            shapes |= {f"{name} ({what})": shape for name, shape in found.items()}
        return shapes

    def memory(
        self, shapes: Mapping[str, tuple[int, ...]], spec: StatisticsSpec, n_classes: int
    ) -> memory.MemoryEstimate:
        """What collecting these takes, and selecting by them."""
        cells = next((observer.n_cells for observer in self.by_class), None)
        return memory.estimate(shapes, self.n_features.values(), n_classes, cells, by_separability=spec.class_moments)


def _observers(
    model: nn.Module, inputs: Any, spec: StatisticsSpec, ignored: list[nn.Module], layers: Iterable[str] | None
) -> _Observers:
    """What is to observe the layers that matter, which a trace of the model on a few samples shows."""
    discovered = _discover(model, inputs, spec, ignored, None if layers is None else set(layers))
    found = _Observers()
    chosen = discovered.layers if spec.class_moments else discovered.unconsumed if spec.input_classes else {}
    cells = 4 if isinstance(spec.spatial, str) else spec.spatial
    if chosen:
        found.layers = ClassObserver(
            chosen,
            observe=spec.observe,
            channel_dims=spec.channel_dims,
            n_cells=None if isinstance(spec.spatial, str) else spec.spatial,
        )
    if spec.inputs and discovered.all_patches:
        found.consumers = InputObserver(discovered.all_patches, seed=0)
        if spec.input_classes:
            consumers = {name: patches.layer for name, patches in discovered.all_patches.items()}
            found.inputs = ClassObserver(consumers, observe="inputs", n_cells=cells)
    return found


def _of_all_processes(
    observers: _Observers, samples: Counter[int], model: nn.Module, data: CalibrationData, spec: StatisticsSpec
) -> tuple[dict[str, ClassMoments], dict[str, InputStatistics]]:
    """What all processes collected together, checked."""
    device = data.adapter(model).device
    moments, unclear = merged_classes(observers.layers, device)
    of_inputs, unclear_inputs = merged_classes(observers.inputs, device)
    found = merged_inputs({} if observers.consumers is None else observers.consumers.found, model, device)
    if not (moments or found):
        raise InputError(EMPTY)
    if of_inputs:
        # A class mean needs no second sample: what is rare is rare for variances alone.
        consequence = "there class means do not count"
        of_inputs = finished(
            of_inputs, unclear_inputs, samples, observe="inputs", rare_classes="keep", consequence=consequence
        )
        for name, class_moments in of_inputs.items():
            found[name].classes = class_moments
    if moments:
        moments = finished(moments, unclear, samples, observe=spec.observe, rare_classes=data.rare_classes)
    return moments, found


@dataclass(frozen=True)
class _Layers:
    """What there is to observe of a model.

    Attributes:
        layers: Layers that create channels which can be pruned, by name.
        all_patches: How consumers unroll such channels, by name.
        unconsumed: Of ``layers``, those whose channels no layer consumes by weights alone: attention multiplies them.
    """

    layers: dict[str, nn.Module]
    all_patches: dict[str, Patches]
    unconsumed: dict[str, nn.Module]


def _discover(
    model: nn.Module, inputs: Any, spec: StatisticsSpec, ignored: list[nn.Module], requested: set[str] | None
) -> _Layers:
    """Find out what there is to observe, from a trace of the model on a few samples."""
    known = measured_layers(model, spec.channel_dims)
    if requested is not None and not spec.inputs:
        return _Layers({name: m for name, m in known.items() if name in requested}, {}, {})
    few = take_samples(inputs, 2, n_samples(inputs) or 1)
    try:
        kept = [model.get_parameter(name) for name in head_parameters(model, spec.num_heads)]
        graph = trace(model, few, forward_fn=run_model, verbose=False, ignored_params=kept)
        groups = list(prunable_groups(graph, ignored, ROOT_TYPES)) if ignored or spec.inputs else []
    except Exception as error:
        cause = error.__cause__ or error
        warnings.warn(
            f"fit: Torch-Pruning cannot trace the model on the first batch ({type(cause).__name__}: {cause}); every "
            "layer is measured, also those that cannot be pruned. Name them with layers= to save time.",
            stacklevel=4,
        )
        found = {name: patches_of(m) for name, m in known.items()} if spec.inputs else {}
        return _Layers(known, {name: patches for name, patches in found.items() if patches is not None}, known)
    reached = {dep.target.module for g in groups for dep, _ in g} if ignored else set(graph.module2node)
    layers = {name: m for name, m in known.items() if m in reached or isinstance(m, tuple(spec.channel_dims))}
    if requested is not None:
        layers = {name: m for name, m in layers.items() if name in requested}
    if not spec.inputs:
        return _Layers(layers, {}, {})
    views, unconsumed = [], set[str]()
    for group, view in readable_groups(groups):
        names = {m.name for m in view.producers}
        if is_output(group) or (requested is not None and not names & requested):
            continue
        views.append(view)
        if attention_layers_of(group, spec.num_heads) or not any(patches_of(m.layer) for m in view.consumers):
            unconsumed |= names
    all_patches = patches_of_consumers(views, max_features=0)
    return _Layers(layers, all_patches, {name: m for name, m in layers.items() if name in unconsumed})
