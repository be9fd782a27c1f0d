"""Statistics of consumers' inputs: second moments, and class moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.functional.second_moments import SecondMoments
from tp_cosep.graph.consumers import sampling_inputs
from tp_cosep.graph.patches import Patches
from tp_cosep.utils.sampling import PositionSampler

__all__ = ["InputObserver", "InputStatistics"]


@dataclass
class InputStatistics:
    """Statistics of one consumer's input; a feature is a channel.

    Attributes:
        patches: Patches of the input.
        shape: Shape of the layer's weight.
        second: Second moments over positions.
        classes: Class moments; empty if they were not measured.
        precisions: Cached inverses, see :func:`tp_cosep.selection.input_space.consumers_of`.
    """

    patches: Patches
    shape: torch.Size
    second: SecondMoments
    classes: ClassMoments = field(default_factory=ClassMoments)
    precisions: dict[float, tuple[int, list[Tensor]]] = field(default_factory=dict, repr=False)

    @property
    def covariance(self) -> Tensor:
        """Of the features over positions and samples, ``[features, features]``."""
        total = self.second.folds.sum(0)
        n = total[-1, -1].clamp(min=1)
        mean = total[:-1, -1] / n
        return total[:-1, :-1] / n - torch.outer(mean, mean)

    @property
    def between_classes(self) -> Tensor:
        """Covariance of class means, each class counting once, averaged over cells, ``[features, features]``.

        Zero if classes were not measured.
        """
        means, n = self.classes.mean, self.second.n_features
        if self.classes.is_empty:
            return torch.zeros_like(self.covariance)
        # The inputs of a linear layer that belong to one channel are its cells.
        means = means.reshape(len(means), n, -1)
        means = means - means.mean(0)
        return torch.einsum("cfs,cgs->fg", means, means) / (means.shape[0] * means.shape[2])


class InputObserver:
    """Accumulates second moments of consumers' inputs, see :func:`tp_cosep.calibration.data_pass.run_pass`.

    Args:
        all_patches: Patches of the consumers by name.
        seed: Seed of the sampled positions.

    Attributes:
        all_patches: Patches of the consumers by name.
        found: Statistics by name, in the order in which the layers first ran.
    """

    def __init__(self, all_patches: Mapping[str, Patches], *, seed: int = 0) -> None:
        self.found: dict[str, InputStatistics] = {}
        self.all_patches = all_patches
        self._seed = seed

    def prepare(self, model: nn.Module, inputs: Any) -> None:
        """Does nothing: no preparation is required."""

    @contextmanager
    def watching(self, inputs: Any) -> Iterator[None]:
        """Measure the consumers' inputs while the model runs on a batch."""
        with sampling_inputs(self.all_patches, PositionSampler(inputs, self._seed), self._add_rows):
            yield

    def add(self, labels: Tensor, i: int) -> None:
        """Does nothing: second moments do not depend on labels."""

    def state(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The statistics so far, see :class:`tp_cosep.calibration.io.Part`."""
        tensors = {f"{part}/{name}": m.second.folds for name, m in self.found.items()}
        return tensors, {"names": [*self.found]}

    def restore(self, part: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], device: torch.device) -> None:
        """The inverse of :meth:`state`."""
        for name in facts["names"]:
            patches = self.all_patches[name]
            second = SecondMoments.from_sums(tensors[f"{part}/{name}"].to(device))
            self.found[name] = InputStatistics(patches, patches.layer.weight.shape, second)  # type: ignore[arg-type]

    def _add_rows(self, name: str, rows: Tensor) -> None:
        if name not in self.found:
            patches = self.all_patches[name]
            second = SecondMoments(patches.n_features, rows.device, n_folds=1)
            self.found[name] = InputStatistics(patches, patches.layer.weight.shape, second)  # type: ignore[arg-type]
        self.found[name].second.update(rows)
