"""Distances between the components of Torch-Pruning groups, from the moments of their layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor, nn

from tp_cosep.calibration.class_observer import channel_dim_of
from tp_cosep.calibration.statistics import Statistics
from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.functional.separability import PairMetric, distances_from_gram, pooled_gram
from tp_cosep.graph.groups import GroupView, Member
from tp_cosep.selection.criterion import LayerClasses, check_weights

__all__ = ["SeparabilitySpace"]


class SeparabilitySpace:
    """Components compared by the classes that they tell apart; a :class:`tp_cosep.selection.criterion.Criterion`.

    Args:
        statistics: Class moments of the model's layers.
        metric: How two classes are told apart, see :data:`tp_cosep.functional.separability.PairMetric`.
        observe: Which tensors the moments describe: ``"outputs"`` of producers or ``"inputs"`` of consumers.
        channel_dims: Further types of layers that are observed.
        max_pairs: Number of class pairs in a sample, see :func:`tp_cosep.functional.separability.pooled_gram`.
        errors: Receives the relative standard errors of sampled distances, by layer.
    """

    def __init__(
        self,
        statistics: Statistics,
        *,
        metric: str | PairMetric = "jm",
        observe: str = "outputs",
        channel_dims: Mapping[type[nn.Module], int] | None = None,
        max_pairs: int | None = None,
        errors: dict[str, float] | None = None,
    ) -> None:
        self.statistics = statistics
        self._metric = metric
        self._observe = observe
        self._channel_dims = channel_dims
        self._max_pairs = max_pairs
        self._errors = {} if errors is None else errors

    def sketched(self, n_pairs: int) -> SeparabilitySpace:
        """The same with at most so many class pairs; errors of its samples are not reported."""
        space = copy(self)
        space._max_pairs = min(self._max_pairs or n_pairs, n_pairs)
        space._errors = {}
        return space

    def layers(self, view: GroupView) -> tuple[str, ...]:
        """Names of the layers whose class moments describe a group."""
        return tuple(m.name for m in self._layers(view))

    def layer_classes(self, view: GroupView) -> list[LayerClasses]:
        """Class moments that describe a group, one entry per layer."""
        found = [(m, self.statistics.moments.get(m.name)) for m in self._layers(view) if len(m.rows)]
        return [
            LayerClasses(moments, m.rows, m.components, moments.n_components)
            for m, moments in found
            if moments is not None
        ]

    def _layers(self, view: GroupView) -> list[Member]:
        """The layers that can describe a group: their moments are expected."""
        moments = self.statistics.moments
        return [
            m
            for m in view.observed(self._observe)
            if channel_dim_of(m.layer, self._channel_dims) is not None
            and not (m.name in moments and moments[m.name].is_empty)
        ]

    def distances(self, view: GroupView) -> Tensor | None:
        """Distances between a group's components.

        D² is the sum over the layers of ‖x_i − x_j‖² / d, x the profiles and d their length; a component that
        a layer does not have is at the origin there. Where a component has several channels of a layer, x joins
        their profiles, or for a head is their mean.

        Returns:
            ``[components, components]`` float64, or ``None`` if none of its layers can be measured.

        Raises:
            InputError: If the moments do not fit the layers.
        """
        layers = [m for m in self._layers(view) if len(m.rows)]
        if not layers:
            return None
        if view.unit == "head":
            return self.head_distances([view])
        total: Tensor | None = None
        for member in layers:
            gram, error = pooled_gram([self._moments_of(member)], [None], self._metric, max_pairs=self._max_pairs)
            self._errors[member.name] = error
            if total is None:
                total = gram.new_zeros(view.n_components, view.n_components)
            for rows, components in _turns(member, member.components):
                rows, components = rows.to(gram.device), components.to(gram.device)
                if len(components) == view.n_components and _is_counting(components):
                    total += gram if len(rows) == len(gram) and _is_counting(rows) else gram[rows[:, None], rows]
                else:
                    total[components[:, None], components] += gram[rows[:, None], rows]
        assert total is not None
        return distances_from_gram(total)

    def head_distances(self, views: Sequence[GroupView]) -> Tensor | None:
        """Distances between the heads of one or more attention groups, in one space.

        The profile of a head is the mean of its dimensions' profiles, in each of the projections that make it
        (queries, keys, values), so that their order inside the head does not matter.

        Args:
            views: Groups read with heads as components.

        Returns:
            ``[heads, heads]`` float64, the heads of all groups one after another; ``None`` if a group has no
            layer that can be measured.

        Raises:
            InputError: If the moments do not fit the layers, or the groups' projections differ in number.
        """
        parts = [list(self._projections(view)) for view in views]
        if not all(parts):
            return None
        if len({len(p) for p in parts}) > 1:
            raise InputError(
                "scope='model': expected attention layers with as many projections each, got "
                f"{', '.join(f'{v.name!r} with {len(p)}' for v, p in zip(views, parts, strict=True))}; use "
                "scope='layer'."
            )
        total: Tensor | None = None
        for layers in zip(*parts, strict=True):
            names, moments, pools = zip(*layers, strict=True)
            gram, error = pooled_gram(moments, pools, self._metric, max_pairs=self._max_pairs)
            for name in names:
                self._errors[name] = error
            total = gram if total is None else total + gram
        assert total is not None
        return distances_from_gram(total)

    def _projections(self, view: GroupView) -> Iterator[tuple[str, ClassMoments, Tensor]]:
        """Projections that make heads: name, moments, and ``[heads, channels]`` that averages a head's dimensions."""
        for member in self._layers(view):
            moments = self._moments_of(member)
            # A fused layer has the queries' channel first, then the keys' that goes with it, then the values'.
            for rows, channels in _turns(member, member.channels):
                pool = torch.zeros(view.n_components, member.n_channels, dtype=torch.float64)
                pool[view.component_of[channels], rows] = 1
                yield member.name, moments, pool / pool.sum(1, keepdim=True).clamp(min=1)

    def _moments_of(self, member: Member) -> ClassMoments:
        moments = self.statistics.moments.get(member.name)
        if moments is None:
            raise InputError(
                f"layer {member.name!r}: expected class moments, got none: the calibration data never reached this "
                "layer, it is not part of the fitted model or was left out of the fit, or the selector does without "
                "classes (class_weight=0) and attention needs them; put it into ignored_layers or fit again."
            )
        if moments.n_classes < 2:
            raise InputError(
                f"layer {member.name!r}: expected class moments of at least two classes, got {moments.n_classes}: only "
                "samples of these classes reached this layer; put it into ignored_layers."
            )
        if moments.n_components != member.n_channels:
            raise InputError(
                f"layer {member.name!r}: class moments cover {moments.n_components} channels, the layer has "
                f"{member.n_channels}; call fit() again after pruning (iterative_steps: pass loader= to CoSePPruner)."
            )
        check_weights(member, self.statistics.weight_shapes.get(member.name))
        return moments


def _is_counting(x: Tensor) -> bool:
    return bool((x == torch.arange(len(x), device=x.device)).all())


def _turns(member: Member, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split a member's rows so that each part has every target (a component, a channel) at most once."""
    if len(torch.unique(targets)) == len(targets):
        return [(member.rows, targets)]
    seen: dict[int, int] = {}
    parts: list[list[tuple[int, int]]] = []
    for row, target in zip(member.rows.tolist(), targets.tolist(), strict=True):
        turn = seen.get(target, 0)
        seen[target] = turn + 1
        if turn == len(parts):
            parts.append([])
        parts[turn].append((row, target))
    return [(torch.tensor([r for r, _ in part]), torch.tensor([t for _, t in part])) for part in parts]
