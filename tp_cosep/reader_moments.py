"""What the readers of a model see on labelled data: second moments of their inputs, and the means of every class."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.batches import BatchReader, evaluating, n_samples, progress_bar, run_model
from tp_cosep.errors import InputError
from tp_cosep.moments import to_cells
from tp_cosep.readers import affordable, find_readings, named, on_inputs
from tp_cosep.reading import Reading
from tp_cosep.second_moments import SecondMoments

__all__ = ["ReaderMoments", "collect_reader_moments"]


@dataclass
class ReaderMoments:
    """Of one reader, taps together: a feature is a channel.

    Attributes:
        reading: How it reads.
        shape: Of its weights.
        second: Second moments over positions.
        sums: ``[classes, features, cells]`` float64, sums over the samples of a class.
        counts: ``[classes]`` samples, times calls of the layer.
    """

    reading: Reading
    shape: torch.Size
    second: SecondMoments
    sums: Tensor
    counts: Tensor

    @property
    def covariance(self) -> Tensor:
        """Of the features over positions and samples, ``[features, features]``."""
        total = self.second.folds.sum(0)
        n = total[-1, -1].clamp(min=1)
        mean = total[:-1, -1] / n
        return total[:-1, :-1] / n - torch.outer(mean, mean)

    @property
    def between_classes(self) -> Tensor:
        """Covariance of class means, each class counting once, averaged over cells, ``[features, features]``."""
        seen = self.counts > 0
        means = self.sums[seen] / self.counts[seen, None, None]
        means = means - means.mean(0)
        return torch.einsum("cfs,cgs->fg", means, means) / (means.shape[0] * means.shape[2])

    def add(self, x: Tensor, labels: Tensor, spatial: int | None) -> None:
        """Add the class sums of one batch of inputs."""
        is_linear = isinstance(self.reading.layer, nn.Linear)
        x = x.movedim(-1, 1) if is_linear else x
        if len(x) != len(labels):
            raise InputError(
                f"expected one label per row of its input, got {len(labels)} labels for {len(x)} rows; the first "
                "dimension has to be the sample; space='reconstruction' works without."
            )
        if self.reading.repeat > 1:
            x = x.reshape(len(x), -1, self.reading.repeat, *x.shape[2:]).flatten(2)
        cells = to_cells(x, spatial=spatial).to(torch.float64)
        n = int(labels.max()) + 1
        if self.sums.numel() == 0:
            self.sums = cells.new_zeros(0, *cells.shape[1:])
        if cells.shape[1:] != self.sums.shape[1:]:
            raise InputError(
                f"expected {tuple(self.sums.shape[1:])} channels and cells as before, got {tuple(cells.shape[1:])}"
            )
        if n > len(self.sums):
            more = n - len(self.sums)
            self.sums = torch.cat([self.sums, self.sums.new_zeros(more, *self.sums.shape[1:])])
            self.counts = torch.cat([self.counts, self.counts.new_zeros(more)])
        self.sums.index_add_(0, labels, cells)
        self.counts += torch.bincount(labels, minlength=len(self.counts))


def collect_reader_moments(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    spatial: int | None = 4,
    ignored: Iterable[nn.Module] = (),
    layers: Iterable[str] | None = None,
    target_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    labels: str | None = "given",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, ReaderMoments]:
    """Measure what the layers of a model read, in one pass and in eval mode.

    Args:
        model: Any module that Torch-Pruning can trace on the first batch.
        loader: As for :func:`tp_cosep.collect.collect_moments`; the first dimension of inputs is the sample.
        spatial: Cells per dimension that maps are pooled to for class means; ``None`` keeps every pixel.
        ignored: Groups that contain one of these are left out.
        layers: Names of the layers to measure, of those that can be.
        target_fn: As for ``collect_moments``.
        labels: ``"given"`` or ``"predicted"``; ``None`` for no class means, so that batches may be inputs alone and
            samples may be in any dimension.
        seed: Of the positions at which second moments are taken.
        progress: Show a progress bar on a terminal.

    Returns:
        Moments by layer name, of the layers that ran, in the order in which they first did.

    Raises:
        InputError: If the loader is empty, a batch is not as described, there are fewer than two classes, or inputs
            are NaN or infinite.
    """
    reader = BatchReader(model, target_fn, predicted=labels != "given")
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise InputError("fit: expected at least one batch, the loader gave none.")
    readings = find_readings(model, reader.split(first, 0)[0], max_features=0, ignored=ignored)
    if layers is not None:
        wanted = set(layers)
        readings = {name: r for name, r in readings.items() if name in wanted}
    taps = _Taps(readings, seed, keep_inputs=labels is not None)
    classes: set[int] = set()
    with evaluating(model), on_inputs(taps.names, taps.take):
        shown = progress_bar(itertools.chain([first], batches), loader, "what layers read", shown=progress)
        for i, batch in enumerate(shown):
            inputs, given = reader.split(batch, i)
            if n_samples(inputs) == 0:
                continue
            outputs = run_model(model, inputs)
            if labels is not None:
                targets = reader.labels(outputs, given, i)
                classes.update(targets.tolist())
                taps.add_classes(targets, spatial)
    if labels is not None and len(classes) < 2:
        raise InputError(
            f"fit: expected samples of at least two classes, got {sorted(classes)}: class means differ between "
            "classes; space='reconstruction' needs no labels."
        )
    if not taps.found:
        raise InputError("fit: expected layers that read prunable channels by weights, found none that ran.")
    return taps.found


class _Taps:
    """What goes into some layers while a model runs.

    Attributes:
        names: Of the layers.
        found: What was measured, by name.
    """

    def __init__(self, readings: Mapping[str, Reading], seed: int, *, keep_inputs: bool) -> None:
        self.names = {r.layer: name for name, r in readings.items()}
        self.found: dict[str, ReaderMoments] = {}
        self._readings = readings
        self._generator = torch.Generator().manual_seed(seed)
        self._keep_inputs = keep_inputs
        self._inputs: dict[str, list[Tensor]] = {}

    def take(self, layer: nn.Module, x: Tensor) -> None:
        """Measure an input of a layer."""
        name = self.names[layer]
        reading = self._readings[name]
        if name not in self.found:
            second = SecondMoments(reading.n_features, x.device)
            empty = torch.zeros(0, dtype=torch.int64, device=x.device)
            self.found[name] = ReaderMoments(reading, layer.weight.shape, second, empty.double(), empty)  # type: ignore[arg-type]
        with named(name):
            sampler = reading.sampler(x.shape, affordable(reading, x.shape), self._generator)
            self.found[name].second.update(sampler(x))
        if self._keep_inputs:  # a copy: the next layer may work in place
            self._inputs.setdefault(name, []).append(x.clone())

    def add_classes(self, labels: Tensor, spatial: int | None) -> None:
        """Add what went in since the last call to the sums of the samples' classes."""
        for name, inputs in self._inputs.items():
            for x in inputs:
                with named(name):
                    self.found[name].add(x, labels, spatial)
        self._inputs.clear()
