"""Refitting one layer that reads, and putting the result into the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tp_cosep.functional.least_squares import LinearFit, refit_to_kept, refit_to_others
from tp_cosep.functional.second_moments import SecondMoments
from tp_cosep.graph.editing import add_biases
from tp_cosep.graph.patches import Patches, n_outputs

__all__ = ["ConsumerState", "Solution", "apply", "refit_to_original", "refit_without"]


@dataclass(frozen=True)
class Refit:
    """What became of one layer that read channels of a group.

    Attributes:
        name: The layer.
        n_removed: Inputs that it lost.
        error: The share of what these inputs contributed to its outputs that could not be made up for, in
            [0, 1], estimated on data that was not fitted to; in sequential mode the share of its outputs that is
            lost. ``None`` if it was left alone.
        ridge: The ridge strength that was chosen, the largest of all channel groups.
        reason: Why it was left alone.
    """

    name: str
    n_removed: int
    error: float | None = None
    ridge: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class ConsumerState:
    """A layer that reads, and what is known of it.

    Attributes:
        name: Its name.
        patches: How it reads.
        moments: Of the features that it has left.
        inputs: Original indices of the channels that it has left.
        outputs: Original indices of its outputs that are left.
        losing_inputs: Positions in ``inputs`` of what a group is about to remove.
        losing_outputs: Positions in ``outputs``, likewise.
    """

    name: str
    patches: Patches
    moments: SecondMoments
    inputs: Tensor
    outputs: Tensor
    losing_inputs: frozenset[int] = field(default_factory=frozenset)
    losing_outputs: frozenset[int] = field(default_factory=frozenset)

    @classmethod
    def whole(cls, name: str, patches: Patches) -> ConsumerState:
        """A layer that has lost nothing, and of which nothing is known yet."""
        device = next(patches.layer.parameters()).device
        moments = SecondMoments(patches.n_features, device)
        return cls(name, patches, moments, torch.arange(patches.n_channels), torch.arange(n_outputs(patches.layer)))

    def staying(self) -> Tensor:
        """Positions in ``inputs`` of what stays."""
        return torch.tensor([i for i in range(len(self.inputs)) if i not in self.losing_inputs], dtype=torch.int64)

    def settled(self) -> ConsumerState:
        """What it is after the group was pruned, or was not: the layer itself shows it."""
        inputs, outputs, moments = self.inputs, self.outputs, self.moments
        staying = self.staying()
        if self.losing_inputs and self.patches.n_channels == len(staying):
            inputs, moments = inputs[staying], moments.of(self.patches.features_of(staying))
        left = torch.tensor([i for i in range(len(outputs)) if i not in self.losing_outputs], dtype=torch.int64)
        if self.losing_outputs and n_outputs(self.patches.layer) == len(left):
            outputs = outputs[left]
        return ConsumerState(self.name, self.patches, moments, inputs, outputs)


@dataclass(frozen=True)
class Solution:
    """New weights of a layer.

    Attributes:
        known: The layer.
        maps: Its weights, see :mod:`tp_cosep.graph.patches`.
        constant: ``[outputs]``, what its outputs have to have added.
        fits: One per channel group.
        original: The layer of the unpruned model that it was fitted to, if it was.
    """

    known: ConsumerState
    maps: Tensor
    constant: Tensor
    fits: Sequence[LinearFit]
    original: nn.Module | None = None

    @property
    def refit(self) -> Refit:
        """For the record."""
        lost, energy = sum(fit.lost for fit in self.fits), sum(fit.energy for fit in self.fits)
        error = min(lost / energy, 1.0) if energy > 0 else 0.0
        n_removed = len(self.known.losing_inputs) * self.known.patches.repeat
        return Refit(self.known.name, n_removed, error, max(fit.ridge for fit in self.fits))


def refit_without(known: ConsumerState, ridge: float | None) -> Solution:
    """Fit a layer to its own outputs, from what it keeps of its inputs.

    Returns:
        Weights that are zero where inputs go.
    """
    patches = known.patches
    maps = patches.maps(_weight(patches.layer))
    n_local = maps.shape[1]
    gone = patches.features_of(sorted(known.losing_inputs)).to(maps.device)
    constants, fits = [], []
    for i in range(patches.groups):
        block = torch.arange(i * n_local, (i + 1) * n_local)
        here = gone[(gone >= block[0]) & (gone <= block[-1])] - i * n_local
        folds = known.moments.of(block).folds
        maps[i], constant, fit = refit_to_kept(maps[i], folds, here, constant=patches.takes_constant, ridge=ridge)
        constants.append(constant)
        fits.append(fit)
    return Solution(known, maps, torch.cat(constants), fits)


def refit_to_original(
    known: ConsumerState, original: nn.Module, sums: Sequence[SecondMoments], ridge: float | None
) -> Solution:
    """Fit a layer of a pruned model to the outputs of the original one, from what it sees in the pruned model.

    Args:
        known: The layer.
        original: The same layer of the unpruned model.
        sums: For every channel group moments of rows (original features, features that stay).
        ridge: The strength, if it is given.

    Returns:
        Weights that are zero where inputs go; the constant is what is to be added to the original's.
    """
    patches = known.patches
    maps0, maps = patches.maps(_weight(original)), torch.zeros_like(patches.maps(_weight(patches.layer)))
    staying = patches.features_of(known.staying()).to(maps.device).chunk(patches.groups)
    outputs = known.outputs.to(maps.device).chunk(patches.groups)
    n_features, n_out = maps.shape[1], maps0.shape[2]
    constants, fits = [], []
    for i, moments in enumerate(sums):
        new, constant, fit = refit_to_others(
            maps0[i][:, outputs[i] - i * n_out], moments.folds, constant=patches.takes_constant, ridge=ridge
        )
        maps[i, staying[i] - i * n_features] = new
        constants.append(constant)
        fits.append(fit)
    return Solution(known, maps, torch.cat(constants), fits, original)


def apply(solution: Solution, model: nn.Module, graph: Any, original_norm: dict[nn.Module, nn.Module]) -> bool:
    """Write new weights into a layer, and its constant into its bias or the running mean of a BatchNorm behind it.

    Args:
        solution: The weights.
        model: The model that the layer is part of.
        graph: A dependency graph of it.
        original_norm: Layers of the unpruned model by those of this one; looked at if the layer was fitted to it.

    Returns:
        Whether the layer had to be given a bias.
    """
    known = solution.known
    layer: Any = known.patches.layer
    _weight(layer).copy_(known.patches.weight(solution.maps, _weight(layer)))
    norm: Any = None if layer.bias is not None else _norm_behind(graph, layer)
    if solution.original is not None:
        outputs = known.outputs.to(solution.maps.device)
        if norm is not None:
            for name in ("running_mean", "running_var"):
                getattr(norm, name).copy_(getattr(original_norm[norm], name)[outputs])
        elif layer.bias is not None:
            bias: Any = solution.original.bias
            layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias[outputs])
    if norm is not None:
        norm.running_mean.sub_(solution.constant.to(norm.running_mean.dtype))
        return False
    is_new = layer.bias is None
    if is_new and not solution.constant.any():
        return False
    add_biases(model, [known.name])
    layer.bias.add_(solution.constant.to(layer.bias.dtype))
    return is_new


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _norm_behind(graph: Any, layer: nn.Module) -> _BatchNorm | None:
    """A BatchNorm with running statistics that is all that follows a layer, and that nothing else precedes."""
    behind = graph.module2node[layer].outputs
    if len(behind) != 1 or len(behind[0].inputs) != 1:
        return None
    norm = behind[0].module
    return norm if isinstance(norm, _BatchNorm) and norm.running_mean is not None else None
