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
from tp_cosep.calibration.class_observer import ClassCollector, measured_layers
from tp_cosep.calibration.data_pass import Collector, run_pass
from tp_cosep.calibration.input_observer import ReaderCollector, ReaderMoments
from tp_cosep.calibration.io import Checkpoint, fingerprint
from tp_cosep.calibration.labels import check_fit_options, finished, guessed_classes
from tp_cosep.calibration.reduce import merged_classes, merged_readers
from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.graph.consumers import readable, readings_of
from tp_cosep.graph.groups import is_output, prunable_groups
from tp_cosep.graph.heads import attention_layers_of, head_parameters
from tp_cosep.graph.patches import Reading, reading_of
from tp_cosep.graph.tracing import ROOT_TYPES, trace
from tp_cosep.utils.data import EMPTY, BatchReader, evaluating, n_samples, peek, run_model, take_samples
from tp_cosep.utils.distributed import agreed, all_samples, is_distributed, own_path, place

__all__ = ["Wanted", "estimate_memory", "measure"]


@dataclass(frozen=True)
class _Survey:
    """What there is to measure of a model.

    Attributes:
        layers: Layers that create channels which can be pruned, by name.
        readings: How layers read such channels, by name.
        unread: Of ``layers``, those whose channels no layer reads by weights alone: attention multiplies them.
    """

    layers: dict[str, nn.Module]
    readings: dict[str, Reading]
    unread: dict[str, nn.Module]


@dataclass(frozen=True)
class Wanted:
    """What is to be measured.

    Attributes:
        by_classes: Class moments of all layers that create channels, or, by ``tap``, read them.
        by_readers: Second moments of what layers read.
        reader_classes: With second moments also class means of the same, and class moments of the layers that create
            channels which nothing reads by weights alone.
        tap: Whose class moments, see :data:`tp_cosep.calibration.labels.TAPS`.
        spatial: Cells per dimension, as for ``collect_moments``; for class means of readers ``"auto"`` is 4.
        channel_dims: As for ``collect_moments``.
        num_heads: Number of heads by attention layer.
        memory_budget: As for ``collect_moments``; what is measured may not take more bytes.
    """

    by_classes: bool
    by_readers: bool
    reader_classes: bool
    tap: str
    spatial: int | str | None
    channel_dims: Mapping[type[nn.Module], int]
    num_heads: Mapping[nn.Module, int]
    memory_budget: int

    @property
    def with_labels(self) -> bool:
        """Whether labels are needed."""
        return self.by_classes or self.reader_classes

    def facts(self) -> list[Any]:
        """What a file of moments says of this."""
        return [self.by_classes, self.by_readers, self.reader_classes, self.tap, self.spatial]


def measure(
    model: nn.Module,
    loader: Iterable[Any],
    wanted: Wanted,
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
) -> tuple[dict[str, ClassMoments], dict[str, ReaderMoments]]:
    """Measure layers in one pass, in eval mode; the model stays as it is.

    Args:
        model: Any module that Torch-Pruning can trace on the first batch.
        loader: As for :func:`tp_cosep.calibration.class_observer.collect_moments`.
        wanted: What is measured.
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
    check_fit_options(wanted.spatial, labels, rare_classes, wanted.tap)
    reader = BatchReader(model, target_fn, predicted=labels == "predicted" or not wanted.with_labels)
    collectors = _Collectors()
    kept = None
    if checkpoint is not None:
        layers = None if layers is None else list(layers)
        how = [*wanted.facts(), layers, labels, n_classes, *place()]
        header = {"model": fingerprint(model), "measured": how}
        kept = Checkpoint(own_path(checkpoint), checkpoint_every, header, reader.device)

    def run() -> Counter[int]:
        nonlocal collectors
        first, batches = peek(loader, may_be_empty=is_distributed())
        if first is None:
            return Counter()
        inputs, given = reader.split(first, 0)
        collectors = _collectors(model, reader, first, wanted, list(ignored), layers, n_classes)
        if not collectors.all:
            raise InputError(
                "fit: found nothing to measure: no layer belongs to a group that can be pruned by this space. The "
                "outputs of a model are left alone, and so are ignored_layers and what shares channels with them."
            )
        shapes, outputs = collectors.shapes(model, inputs)
        n = guessed_classes(reader, outputs, given, n_classes) if wanted.with_labels else 0
        memory.check(
            collectors.memory(shapes, wanted, n),
            shapes,
            collectors.n_features,
            memory_budget=wanted.memory_budget,
            n_classes=n,
        )
        if kept is not None:
            kept.parts = collectors.named
        return run_pass(
            model,
            reader,
            batches,
            collectors.all,
            loader=loader,
            what="class moments" if wanted.by_classes else "what layers read",
            progress=progress,
            with_labels=wanted.with_labels,
            may_be_empty=is_distributed(),
            checkpoint=kept,
        )

    samples = all_samples(agreed(run))
    return _of_all_processes(collectors, samples, model, reader, tap=wanted.tap, rare_classes=rare_classes)


def estimate_memory(
    model: nn.Module, example_inputs: Any, wanted: Wanted, n_classes: int, ignored: Iterable[nn.Module]
) -> memory.MemoryEstimate:
    """What :func:`measure` and a selection take.

    Args:
        model: The model.
        example_inputs: Of the size of the calibration data.
        wanted: What is measured.
        n_classes: Number of classes.
        ignored: Groups that contain one of these are left out.

    Returns:
        The estimate.
    """
    reader = BatchReader(model, None, predicted=True)
    first = (example_inputs, None)
    collectors = _collectors(model, reader, first, wanted, list(ignored), None, n_classes)
    shapes, _ = collectors.shapes(model, reader.split(first, 0)[0])
    return collectors.memory(shapes, wanted, n_classes)


def _collectors(
    model: nn.Module,
    reader: BatchReader,
    first: Any,
    wanted: Wanted,
    ignored: list[nn.Module],
    layers: Iterable[str] | None,
    n_classes: int | None,
) -> _Collectors:
    """Whatever is to measure the layers that are worth it, from a trace of the model on a few samples."""
    inputs = reader.split(first, 0)[0]
    survey = _survey(
        model, inputs, ignored, wanted.channel_dims, wanted.num_heads, layers, with_readings=wanted.by_readers
    )
    found = _Collectors()
    chosen = survey.layers if wanted.by_classes else survey.unread if wanted.reader_classes else {}
    cells = 4 if isinstance(wanted.spatial, str) else wanted.spatial
    if chosen:
        found.made = ClassCollector(chosen, tap=wanted.tap, channel_dims=wanted.channel_dims)
        found.made.choose_cells(
            model, reader, first, wanted.spatial, n_classes=n_classes, memory_budget=wanted.memory_budget
        )
    if wanted.by_readers and survey.readings:
        found.readers = ReaderCollector(survey.readings, seed=0)
        if wanted.reader_classes:
            layers_read = {name: r.layer for name, r in survey.readings.items()}
            found.read = ClassCollector(layers_read, tap="consumers", n_cells=cells)
    return found


@dataclass
class _Collectors:
    """Whatever measures in this process.

    Attributes:
        made: Class moments by ``tap``, or of what no layer reads by weights.
        readers: Second moments of what layers read.
        read: Class moments of the same.
    """

    made: ClassCollector | None = None
    readers: ReaderCollector | None = None
    read: ClassCollector | None = None

    @property
    def named(self) -> dict[str, Any]:
        """Those that there are, by name."""
        parts = {"made": self.made, "readers": self.readers, "read": self.read}
        return {name: c for name, c in parts.items() if c is not None}

    @property
    def all(self) -> list[Collector]:
        """Those that there are."""
        return [*self.named.values()]

    @property
    def n_features(self) -> dict[str, int]:
        """Features of the layers of which second moments are taken."""
        return {} if self.readers is None else {name: r.n_features for name, r in self.readers.readings.items()}

    def shapes(self, model: nn.Module, inputs: Any) -> tuple[dict[str, tuple[int, ...]], Any]:
        """The tensors of which class moments are taken, and the model's output, from a run on a few samples."""
        few = take_samples(inputs, 3, n_samples(inputs) or 1)
        shapes: dict[str, tuple[int, ...]] = {}
        outputs = None
        with evaluating(model):
            for what, collector in (("outputs", self.made), ("inputs", self.read)):
                if collector is not None:
                    found, outputs = collector.shapes(model, few)
                    shapes |= {f"{name} ({what})": shape for name, shape in found.items()}
        return shapes, outputs

    def memory(self, shapes: Mapping[str, tuple[int, ...]], wanted: Wanted, n_classes: int) -> memory.MemoryEstimate:
        """What measuring these takes, and choosing by it."""
        cells = next((c.n_cells for c in (self.made, self.read) if c is not None), None)
        n_features = self.n_features.values()
        return memory.estimate(shapes, n_features, n_classes, cells, by_separability=wanted.by_classes)


def _of_all_processes(
    collectors: _Collectors,
    samples: Counter[int],
    model: nn.Module,
    reader: BatchReader,
    *,
    tap: str,
    rare_classes: str,
) -> tuple[dict[str, ClassMoments], dict[str, ReaderMoments]]:
    """What all processes gathered together, checked."""
    made, unclear_made = merged_classes(collectors.made, reader.device)
    read, unclear = merged_classes(collectors.read, reader.device)
    found = merged_readers({} if collectors.readers is None else collectors.readers.found, model, reader.device)
    if not (made or found):
        raise InputError(EMPTY)
    if read:
        # A class mean needs no second sample: what is rare is rare for variances alone.
        consequence = "there class means do not count"
        read = finished(read, unclear, samples, tap="consumers", rare_classes="keep", consequence=consequence)
        for name, moments in read.items():
            found[name].classes = moments
    if made:
        made = finished(made, unclear_made, samples, tap=tap, rare_classes=rare_classes)
    return made, found


def _survey(
    model: nn.Module,
    inputs: Any,
    ignored: list[nn.Module],
    channel_dims: Mapping[type[nn.Module], int],
    num_heads: Mapping[nn.Module, int],
    layers: Iterable[str] | None,
    *,
    with_readings: bool,
) -> _Survey:
    """Find out what there is to measure, from a trace of the model on a few samples."""
    known, wanted = measured_layers(model, channel_dims), None if layers is None else set(layers)
    if wanted is not None and not with_readings:
        return _Survey({name: m for name, m in known.items() if name in wanted}, {}, {})
    few = take_samples(inputs, 2, n_samples(inputs) or 1)
    try:
        kept = [model.get_parameter(name) for name in head_parameters(model, num_heads)]
        graph = trace(model, few, forward_fn=run_model, verbose=False, ignored_params=kept)
        groups = list(prunable_groups(graph, ignored, ROOT_TYPES)) if ignored or with_readings else []
    except Exception as error:
        cause = error.__cause__ or error
        warnings.warn(
            f"fit: Torch-Pruning cannot trace the model on the first batch ({type(cause).__name__}: {cause}); every "
            "layer is measured, also those that cannot be pruned. Name them with layers= to save time.",
            stacklevel=4,
        )
        found = {name: reading_of(m) for name, m in known.items()} if with_readings else {}
        return _Survey(known, {name: r for name, r in found.items() if r is not None}, known)
    reached = {dep.target.module for g in groups for dep, _ in g} if ignored else set(graph.module2node)
    made = {name: m for name, m in known.items() if m in reached or isinstance(m, tuple(channel_dims))}
    if wanted is not None:
        made = {name: m for name, m in made.items() if name in wanted}
    if not with_readings:
        return _Survey(made, {}, {})
    views, unread = [], set[str]()
    for group, view in readable(groups):
        members = {m.name for m in view.members}
        if is_output(group) or (wanted is not None and not members & wanted):
            continue
        views.append(view)
        if attention_layers_of(group, num_heads) or not any(reading_of(m.layer) for m in view.readers):
            unread |= members
    readings = readings_of(views, max_features=0)
    return _Survey(made, readings, {name: m for name, m in made.items() if name in unread})
