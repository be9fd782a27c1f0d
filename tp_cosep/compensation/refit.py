"""Refitting one consumer, and writing the solution into the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tp_cosep.functional.least_squares import LinearFit, refit_to_kept, refit_to_others
from tp_cosep.functional.second_moments import SecondMoments
from tp_cosep.graph.editing import add_biases
from tp_cosep.graph.groups import DependencyGraph
from tp_cosep.graph.patches import Patches, n_outputs

__all__ = ["ConsumerState", "Refit", "Solution", "apply", "refit_to_original", "refit_without"]


@dataclass(frozen=True)
class Refit:
    """The record of one consumer of a pruned group.

    Attributes:
        name: Name of the layer.
        n_removed: Number of inputs that it lost.
        error: Share of the removed inputs' contribution to its outputs that is not compensated, in [0, 1], estimated
            on held-out data; in sequential mode the share of its outputs that is lost. ``None`` if it was not
            refitted.
        ridge: The selected ridge strength, the largest of all channel groups; ``None`` if it was not refitted.
        reason: Why it was not refitted; empty if it was.
    """

    name: str
    n_removed: int
    error: float | None = None
    ridge: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class ConsumerState:
    """A consumer as pruned so far, with the moments of its inputs.

    Attributes:
        name: Name of the layer.
        patches: Patches of its input.
        moments: Second moments of the features that it still has, measured in the unpruned model.
        inputs: Original indices of the input channels that it still has.
        outputs: Original indices of the output channels that it still has.
        losing_inputs: Positions in ``inputs`` that a group is about to remove.
        losing_outputs: Positions in ``outputs`` that a group is about to remove.
    """

    name: str
    patches: Patches
    moments: SecondMoments
    inputs: Tensor
    outputs: Tensor
    losing_inputs: frozenset[int] = field(default_factory=frozenset)
    losing_outputs: frozenset[int] = field(default_factory=frozenset)

    @classmethod
    def unpruned(cls, name: str, patches: Patches) -> ConsumerState:
        """An unpruned layer, without any data yet."""
        device = next(patches.layer.parameters()).device
        moments = SecondMoments(patches.n_features, device)
        return cls(name, patches, moments, torch.arange(patches.n_channels), torch.arange(n_outputs(patches.layer)))

    def kept_inputs(self) -> Tensor:
        """Positions in ``inputs`` that are kept."""
        return _without(self.losing_inputs, len(self.inputs))

    def settled(self) -> ConsumerState:
        """The state after the last group, whether it was pruned or not, which the layer's sizes tell."""
        inputs, outputs, moments = self.inputs, self.outputs, self.moments
        kept = self.kept_inputs()
        if self.losing_inputs and self.patches.n_channels == len(kept):
            inputs, moments = inputs[kept], moments.of(self.patches.features_of(kept))
        kept = _without(self.losing_outputs, len(outputs))
        if self.losing_outputs and n_outputs(self.patches.layer) == len(kept):
            outputs = outputs[kept]
        return ConsumerState(self.name, self.patches, moments, inputs, outputs)


@dataclass(frozen=True)
class Solution:
    """New weights of a consumer.

    Attributes:
        consumer: The consumer.
        matrix: Its new weight matrix, see :mod:`tp_cosep.graph.patches`; zero for the removed inputs.
        constant: ``[outputs]``, to be added to its outputs.
        fits: The regressions, one per channel group.
        original: The layer of the unpruned model that it was fitted to; ``None`` in one-shot mode.
    """

    consumer: ConsumerState
    matrix: Tensor
    constant: Tensor
    fits: Sequence[LinearFit]
    original: nn.Module | None = None

    @property
    def refit(self) -> Refit:
        """The record of the refit."""
        lost, energy = sum(fit.lost for fit in self.fits), sum(fit.energy for fit in self.fits)
        error = min(lost / energy, 1.0) if energy > 0 else 0.0
        n_removed = len(self.consumer.losing_inputs) * self.consumer.patches.repeat
        return Refit(self.consumer.name, n_removed, error, max(fit.ridge for fit in self.fits))


def refit_without(consumer: ConsumerState, ridge: float | None) -> Solution:
    """Fit a consumer to its own outputs, from its kept inputs.

    Args:
        consumer: The consumer, with the inputs that it is about to lose.
        ridge: Ridge strength; ``None`` to select it.

    Returns:
        The solution, with zero weights for the removed inputs.
    """
    patches = consumer.patches
    matrix = patches.weight_matrix(_weight(patches.layer))
    n_local = matrix.shape[1]
    removed = patches.features_of(sorted(consumer.losing_inputs)).to(matrix.device)
    constants, fits = [], []
    for i in range(patches.groups):
        block = torch.arange(i * n_local, (i + 1) * n_local)
        here = removed[(removed >= block[0]) & (removed <= block[-1])] - i * n_local
        folds = consumer.moments.of(block).folds
        matrix[i], constant, fit = refit_to_kept(matrix[i], folds, here, constant=patches.takes_constant, ridge=ridge)
        constants.append(constant)
        fits.append(fit)
    return Solution(consumer, matrix, torch.cat(constants), fits)


def refit_to_original(
    consumer: ConsumerState, original: nn.Module, sums: Sequence[SecondMoments], ridge: float | None
) -> Solution:
    """Fit a consumer in the pruned model to its outputs in the original one, from its inputs in the pruned model.

    Args:
        consumer: The consumer, with the inputs that it is about to lose.
        original: The same layer of the unpruned model.
        sums: For every channel group the moments of rows (original features, kept features).
        ridge: Ridge strength; ``None`` to select it.

    Returns:
        The solution, with zero weights for the removed inputs; its constant adds to the original's.
    """
    patches = consumer.patches
    matrix0 = patches.weight_matrix(_weight(original))
    matrix = torch.zeros_like(patches.weight_matrix(_weight(patches.layer)))
    kept = patches.features_of(consumer.kept_inputs()).to(matrix.device).chunk(patches.groups)
    outputs = consumer.outputs.to(matrix.device).chunk(patches.groups)
    n_features, n_out = matrix.shape[1], matrix0.shape[2]
    constants, fits = [], []
    for i, moments in enumerate(sums):
        new, constant, fit = refit_to_others(
            matrix0[i][:, outputs[i] - i * n_out], moments.folds, constant=patches.takes_constant, ridge=ridge
        )
        matrix[i, kept[i] - i * n_features] = new
        constants.append(constant)
        fits.append(fit)
    return Solution(consumer, matrix, torch.cat(constants), fits, original)


def apply(
    solution: Solution, model: nn.Module, graph: DependencyGraph, originals: Mapping[nn.Module, nn.Module]
) -> bool:
    """Write new weights into a layer, and its constant into its bias or the running mean of the BatchNorm after it.

    Args:
        solution: The new weights.
        model: The model that the layer is part of.
        graph: A dependency graph of the model.
        originals: Layers of the unpruned model by those of this one; used in sequential mode only.

    Returns:
        Whether a bias was added to the layer.
    """
    consumer = solution.consumer
    layer: Any = consumer.patches.layer
    _weight(layer).copy_(consumer.patches.weight_from_matrix(solution.matrix, _weight(layer)))
    norm: Any = None if layer.bias is not None else _norm_after(graph, layer)
    if solution.original is not None:
        outputs = consumer.outputs.to(solution.matrix.device)
        if norm is not None:
            for name in ("running_mean", "running_var"):
                getattr(norm, name).copy_(getattr(originals[norm], name)[outputs])
        elif layer.bias is not None:
            bias: Any = solution.original.bias
            layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias[outputs])
    if norm is not None:
        norm.running_mean.sub_(solution.constant.to(norm.running_mean.dtype))
        return False
    is_new = layer.bias is None
    if is_new and not solution.constant.any():
        return False
    add_biases(model, [consumer.name])
    layer.bias.add_(solution.constant.to(layer.bias.dtype))
    return is_new


def _without(removed: Set[int], n: int) -> Tensor:
    return torch.tensor([i for i in range(n) if i not in removed], dtype=torch.int64)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _norm_after(graph: DependencyGraph, layer: nn.Module) -> _BatchNorm | None:
    """The BatchNorm with running statistics that is a layer's only consumer, and has no other input."""
    after = graph.module2node[layer].outputs
    if len(after) != 1 or len(after[0].inputs) != 1:
        return None
    norm = after[0].module
    return norm if isinstance(norm, _BatchNorm) and norm.running_mean is not None else None
