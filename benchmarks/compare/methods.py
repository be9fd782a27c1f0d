"""Selections to compare. Each is a Torch-Pruning importance, so that all run in the same pruner."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tp_cosep import ChannelSelection, CoSePSelector, ReconstructionSelector
from tp_cosep.functional import select_channels
from tp_cosep.graph.groups import GroupView, read_group
from tp_cosep.selection.input_space import energies_of

__all__ = [
    "ALLOCATED",
    "GLOBAL",
    "LAYER_BY_LAYER",
    "METHODS",
    "RETIRED",
    "RETIRED_VARIANTS",
    "VARIANTS",
    "importance",
]

_Batches = list[tuple[Tensor, Tensor]]


class _PerMember(tp.importance.Importance):
    """Scores of a group's producers, each scaled to mean 1, averaged."""

    def score(self, layer: nn.Module) -> Tensor | None:
        """Scores ``[channels]`` of one layer; ``None`` if it has none."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor:
        view = read_group(group)
        total, n = torch.zeros(view.n_channels, dtype=torch.float64), torch.zeros(view.n_channels)
        for member in view.producers:
            scores = self.score(member.layer)
            if scores is None:
                continue
            scores = scores.double() / scores.double().mean().clamp(min=1e-30)
            total.index_add_(0, member.channels, scores[member.rows])
            n.index_add_(0, member.channels, torch.ones(len(member.rows)))
        return total / n.clamp(min=1)


class Fpgm(_PerMember):
    """Distance to the geometric median of a layer's filters (He et al. 2019): the sum of distances to all others.

    Torch-Pruning's own takes distances between powers of absolute weights, which cannot tell w from −w.
    """

    def score(self, layer: nn.Module) -> Tensor | None:
        """Sum of the distances between a filter and all others."""
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            return None
        filters = layer.weight.flatten(1)
        return torch.cdist(filters, filters).sum(1)


class DiagonalHessian(_PerMember):
    """½ Σ w² E[g²] over a filter's weights: Optimal Brain Damage with the empirical Fisher diagonal.

    Torch-Pruning's own uses the last sample alone.
    """

    def __init__(self, model: nn.Module, batches: _Batches, n_samples: int = 200) -> None:
        names = {m: name for name, m in model.named_modules()}
        squares: dict[nn.Module, Tensor] = {}
        x, y = torch.cat([b[0] for b in batches])[:n_samples], torch.cat([b[1] for b in batches])[:n_samples]
        for a, b in zip(x.split(1), y.split(1), strict=True):
            model.zero_grad()
            cross_entropy(model(a), b).backward()
            for m in names:
                if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and m.weight.grad is not None:
                    squares[m] = squares.get(m, 0) + m.weight.grad**2 / n_samples
        model.zero_grad()
        self._squares = squares

    def score(self, layer: nn.Module) -> Tensor | None:
        """½ Σ w² E[g²] by filter."""
        if layer not in self._squares:
            return None
        return (layer.weight**2 * self._squares[layer]).flatten(1 if layer.weight.dim() > 1 else 0).reshape(
            len(layer.weight), -1
        ).sum(1) / 2


def _taylor(model: nn.Module, batches: _Batches) -> Any:
    model.zero_grad()
    for x, y in batches:
        cross_entropy(model(x), y).backward()
    return tp.importance.GroupTaylorImportance()


class CorrelationSelector(ReconstructionSelector):
    """k-medoids on 1 − |ρ|, ρ the correlation of two channels in their consumers' inputs; no labels are used.

    A user's own criterion takes as much: a subclass that selects by other distances.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(class_weight=0, **options)

    def _select(self, group: Any, view: GroupView, n_keep: int | None, round_to: int | None) -> ChannelSelection | None:
        distances = self.criterion.distances(view)
        if distances is None:
            return None
        return select_channels(distances, n_keep=n_keep, knee=self.knee, round_to=round_to)


class Energy(tp.importance.Importance):
    """The energies of weighted CoSeP, without clustering: what a channel's consumers draw from it."""

    def __init__(self, model: nn.Module, batches: _Batches) -> None:
        self._selector = CoSePSelector(spatial=1).fit(model, batches, progress=False)

    def __call__(self, group: Any) -> Tensor | None:
        view = read_group(group)
        energies = energies_of(view, self._selector.statistics.inputs)
        return None if energies is None else energies[view.component_of]


def _fitted(make: Callable[..., Any], labels: str = "given", **options: Any) -> Callable[[nn.Module, _Batches], Any]:
    return lambda model, batches: make(**options).fit(model, batches, labels=labels, progress=False)


_cosep, _joint = partial(_fitted, CoSePSelector), partial(_fitted, ReconstructionSelector)
_unweighted = partial(_cosep, weights=None)


#: Importances by name: ``f(model, calibration batches)``.
METHODS: dict[str, Callable[[nn.Module, _Batches], Any]] = {
    "random": lambda model, batches: tp.importance.RandomImportance(),
    "l1": lambda model, batches: tp.importance.GroupMagnitudeImportance(p=1),
    "l2": lambda model, batches: tp.importance.GroupMagnitudeImportance(p=2),
    "bn-scale": lambda model, batches: tp.importance.BNScaleImportance(),
    "lamp": lambda model, batches: tp.importance.LAMPImportance(p=2),
    "fpgm": lambda model, batches: Fpgm(),
    "taylor": _taylor,
    "hessian": DiagonalHessian,
    "correlation": _fitted(CorrelationSelector),
    "energy": Energy,
    "unweighted cosep": _unweighted(),
    "unweighted cosep, max-norm": _unweighted(representative="max_norm"),
    "unweighted cosep, consumers": _unweighted(observe="inputs"),
    "unweighted cosep, reconstruction": _unweighted(representative="reconstruction"),
    "cosep, as published": lambda model, batches: CoSePSelector.published().fit(model, batches, progress=False),
    "cosep": _cosep(),
    "reconstruction": _joint(class_weight=0),
    "joint": _joint(),
}
#: Selections over all layers together: channels are ranked for one ratio.
GLOBAL = {"l2, global": "l2", "lamp, global": "lamp", "bn-scale, global": "bn-scale", "taylor, global": "taylor"}
#: The papers' schedule: group by group, statistics collected again and fine-tuning in between; allocated counts.
LAYER_BY_LAYER = ("joint, layer by layer", "unweighted cosep, layer by layer")
#: Selections with the counts that a selector allocates to layers for a target in MACs, and that selector.
ALLOCATED = {"joint, allocated": "joint", "cosep, allocated": "cosep", "l2, counts of joint": "joint"}
#: Changes of one option.
VARIANTS: dict[str, Callable[[nn.Module, _Batches], Any]] = {
    "unweighted cosep, 1 cell": _unweighted(spatial=1),
    "unweighted cosep, 8 × 8 cells": _unweighted(spatial=8),
    "unweighted cosep, strongest knee": _unweighted(knee="strongest"),
    "unweighted cosep, first knee": _unweighted(knee="first"),
    "joint, 2 × 2 cells": _joint(spatial=2),
    "joint, 8 × 8 cells": _joint(spatial=8),
    "joint, strongest knee": _joint(knee="strongest"),
    "unweighted cosep, Hellinger": _unweighted(metric="hellinger"),
    "unweighted cosep, Wasserstein": _unweighted(metric="wasserstein"),
    "unweighted cosep, labels predicted": _unweighted(labels="predicted"),
    "joint, labels predicted": _joint(labels="predicted"),
    "joint, 1 cell": _joint(spatial=1),
}


#: Former selections and variants, of which the tables show the records.
RETIRED = ("class-means",)
RETIRED_VARIANTS = (
    "unweighted cosep, GB-AFS silhouette",
    "joint, k-medoids",
    "class-means, k-medoids",
    "correlation, column subset",
)


def importance(name: str, model: nn.Module, batches: _Batches) -> Any:
    """An importance for a model, fitted to calibration data."""
    name = GLOBAL.get(name, name)
    for suffix in (", allocated", ", counts of joint", ", layer by layer"):
        name = name.removesuffix(suffix)
    return {**METHODS, **VARIANTS}[name](model, batches)
