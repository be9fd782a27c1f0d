"""Components compared by their consumers' inputs: covariances, and what a refit of the consumers would lose.

With C the covariance of a consumer's input over positions and samples (what can be computed from what) and B that of
the class means alone (what tells classes apart), the space is that of

    C + α B,

so that no contrast between classes is lost for the sake of mere variance. α is the class weight; 0 leaves classes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tp_cosep.calibration.input_observer import InputStatistics
from tp_cosep.calibration.statistics import Statistics
from tp_cosep.errors import InputError
from tp_cosep.functional.elimination import Consumer, Elimination, backward_elimination, precision_of
from tp_cosep.graph.groups import GroupView, Member
from tp_cosep.graph.patches import patches_of
from tp_cosep.selection.criterion import LayerClasses, check_weights
from tp_cosep.selection.separability_space import SeparabilitySpace

__all__ = ["InputSpace", "Known", "consumers_of", "correlation_distances", "energies_of", "observed_consumers"]


@dataclass(frozen=True)
class Known:
    """What was computed of a group, and the state of the model that it holds for.

    Attributes:
        state: Components of the group, and shapes and norms of its consumers' weights.
        elimination: The order in which its components are eliminated.
        distances: ``[components, components]`` float64.
    """

    state: object
    elimination: Elimination
    distances: Tensor


class InputSpace:
    """Components compared by their consumers' inputs; a :class:`tp_cosep.selection.criterion.Criterion`.

    Channels that attention multiplies with each other, whole heads, and channels that no layer consumes by weights are
    compared by separability.

    Args:
        statistics: Second moments and class means of consumers' inputs, and class moments for the rest.
        class_weight: α ≥ 0.
        num_heads: Number of heads by attention layer.
        fallback: The separability space of the same statistics.
        known: Receives what is computed of each group, by name and side; found once, whatever count is requested.
    """

    def __init__(
        self,
        statistics: Statistics,
        class_weight: float,
        num_heads: Mapping[nn.Module, int],
        fallback: SeparabilitySpace,
        known: dict[tuple[str, str], Known],
    ) -> None:
        self.statistics = statistics
        self.class_weight = class_weight
        self._num_heads = num_heads
        self._fallback = fallback
        self._known = known

    def sketched(self, n_pairs: int) -> InputSpace:
        """The same with at most so many class pairs where channels are compared by separability."""
        space = copy(self)
        space._fallback = self._fallback.sketched(n_pairs)
        return space

    def covers(self, view: GroupView) -> bool:
        """Whether a group's channels are compared by their consumers' inputs."""
        return (
            view.unit == "channel"
            and not any(m.layer in self._num_heads for m in view.producers)
            and bool(observed_consumers(view, self.statistics.inputs))
        )

    def eliminated(self, view: GroupView) -> tuple[Elimination, Tensor]:
        """The order in which a group's components are eliminated, and their distances.

        Args:
            view: A group that :meth:`covers` covers.

        Returns:
            The elimination, and ``[components, components]`` float64.
        """
        known, state = self._known.get((view.name, view.side)), self._state_of(view)
        if known is None or known.state != state:
            consumers = consumers_of(view, self.statistics.inputs, self.class_weight)
            distances = correlation_distances(view, self.statistics.inputs, self.class_weight)
            assert distances is not None
            known = Known(state, backward_elimination(consumers, view.n_components), distances)
            self._known[view.name, view.side] = known
        return known.elimination, known.distances

    def _state_of(self, view: GroupView) -> object:
        """What the choice in a group depends on; the weights by what they are: those of a copy are as good."""
        consumers = observed_consumers(view, self.statistics.inputs)
        weights = [m.layer.get_parameter("weight").detach() for m in consumers]
        return view.component_of.numpy().tobytes(), [(w.shape, float(w.double().square().sum())) for w in weights]

    def distances(self, view: GroupView) -> Tensor | None:
        """Distances between a group's components, see :func:`correlation_distances`.

        Args:
            view: The group.

        Returns:
            ``[components, components]`` float64; ``None`` if no statistics describe the group.

        Raises:
            InputError: If the statistics do not fit the layers, or a consumer was not observed.
        """
        if self.covers(view):
            known = self._known.get((view.name, view.side))
            if known is not None and known.state == self._state_of(view):
                return known.distances.clone()
            return correlation_distances(view, self.statistics.inputs, self.class_weight)
        if any(m.name in self.statistics.moments for m in view.producers):
            return self._fallback.distances(view)
        missing = next((m.name for m in view.consumers if patches_of(m.layer)), None)
        if missing is not None:
            raise InputError(
                f"layer {missing!r}: its input was not observed: the calibration data never reached this layer, or "
                f"it is not part of the fitted model, the group of {view.name!r} was left out of the fit, or it goes "
                "through attention or a layer of your own, which this selector does not follow (CoSePSelector does, "
                f"and ReconstructionSelector with classes through attention); put {view.name!r} into ignored_layers or "
                "fit again."
            )
        return None

    def head_distances(self, views: Sequence[GroupView]) -> Tensor | None:
        """Distances between attention heads, by separability.

        Args:
            views: Groups whose components are heads.

        Returns:
            ``[heads, heads]`` float64; ``None`` if a group has no statistics.
        """
        return self._fallback.head_distances(views)

    def layers(self, view: GroupView) -> tuple[str, ...]:
        """Names of the layers whose statistics describe a group."""
        if not self.covers(view):
            return self._fallback.layers(view)
        return tuple(m.name for m in observed_consumers(view, self.statistics.inputs))

    def layer_classes(self, view: GroupView) -> list[LayerClasses]:
        """Class moments that describe a group, one entry per layer."""
        if not self.covers(view):
            return self._fallback.layer_classes(view)
        found = []
        for member in observed_consumers(view, self.statistics.inputs):
            of_layer = self.statistics.inputs[member.name]
            # The inputs of a linear layer that belong to one channel are its cells.
            repeat = of_layer.patches.repeat
            is_first = member.rows % repeat == 0
            rows, components = member.rows[is_first] // repeat, member.components[is_first]
            if not of_layer.classes.is_empty:
                found.append(LayerClasses(of_layer.classes, rows, components, of_layer.second.n_features))
        return found


def observed_consumers(view: GroupView, inputs: Mapping[str, InputStatistics]) -> list[Member]:
    """The consumers of a group whose inputs were observed and whose channels are the group's."""
    return [m for m in view.consumers if m.name in inputs and len(m.rows)]


def consumers_of(
    view: GroupView, inputs: Mapping[str, InputStatistics], class_weight: float, *, inverted: bool = True
) -> list[Consumer]:
    """The consumers of a group, as elimination takes them.

    An error of an output costs by the variance of that output, ``w_o / sqrt(w_oᵀ C w_o)``, so that layers and channels
    of all scales count alike.

    Args:
        view: The group.
        inputs: Statistics by layer name.
        class_weight: α ≥ 0.
        inverted: Whether covariances are inverted, as an elimination requires; losses along an order do not.

    Returns:
        One entry per consumer and channel group; none if no consumer was observed.

    Raises:
        InputError: If the statistics do not fit the layers.
    """
    found = []
    for member, covariance, of_layer, components in _parts(view, inputs, class_weight):
        weights = _scaled_weights(member, of_layer)
        precisions = _precisions(of_layer, covariance, class_weight, weights[0].shape[0]) if inverted else None
        for i, (block, w) in enumerate(_blocks(weights)):
            precision = None if precisions is None else precisions[i]
            found.append(Consumer(covariance[block, block], w @ w.T, components[block], precision))
    return found


def energies_of(view: GroupView, inputs: Mapping[str, InputStatistics]) -> Tensor | None:
    """What the consumers of a group draw from each of its components.

        e_i = Σ_f C_ff Σ_o w_fo² / var(y_o)

    over the consumers, the features f of component i, and outputs o with kernel positions: the share of an output's
    variance that a feature would account for if features did not depend on each other.

    Args:
        view: The group.
        inputs: Statistics by layer name.

    Returns:
        ``[components]`` float64 on the CPU, ≥ 0; ``None`` if no consumer was observed.

    Raises:
        InputError: If the statistics do not fit the layers.
    """
    energies: Tensor | None = None
    for member, covariance, of_layer, components in _parts(view, inputs, 0.0):
        if energies is None:
            energies = torch.zeros(view.n_components + 1, dtype=torch.float64)  # the last one: of no component
        drawn = [w.square().sum(1) for _, w in _blocks(_scaled_weights(member, of_layer))]
        of_features = covariance.diagonal().clamp(min=0) * torch.cat(drawn)
        energies.index_add_(0, torch.where(components < 0, view.n_components, components).cpu(), of_features.cpu())
    return None if energies is None else energies[:-1]


def _scaled_weights(member: Member, of_layer: InputStatistics) -> Tensor:
    """Weights ``[groups, features, outputs · positions]``, over the standard deviation of their output."""
    matrices = of_layer.patches.weight_matrix(member.layer.get_parameter("weight").detach())
    covariance, scaled = of_layer.covariance, []
    for i, w in enumerate(matrices):
        n = len(w)
        total = covariance[i * n : (i + 1) * n, i * n : (i + 1) * n]
        variance = torch.einsum("fop,fg,gop->o", w, total, w)
        # An output that never moves has nothing to lose.
        scaled.append((w * torch.where(variance > 0, variance.rsqrt(), 0)[:, None]).flatten(1))
    return torch.stack(scaled)


def _blocks(weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The features of each channel group, and their weights."""
    n = weights.shape[1]
    for i, w in enumerate(weights):
        yield slice(i * n, (i + 1) * n), w


def _precisions(of_layer: InputStatistics, covariance: Tensor, class_weight: float, n: int) -> list[Tensor]:
    """Of every channel group of a consumer; inverted once, however many groups of channels it consumes."""
    found = of_layer.precisions.get(class_weight)
    if found is None or found[0] != of_layer.second.n_rows:
        blocks = [covariance[i : i + n, i : i + n] for i in range(0, len(covariance), n)]
        found = of_layer.precisions[class_weight] = of_layer.second.n_rows, [precision_of(c) for c in blocks]
    return found[1]


def correlation_distances(view: GroupView, inputs: Mapping[str, InputStatistics], class_weight: float) -> Tensor | None:
    """``1 − |ρ|`` between components, ρ the correlation by C + α B, averaged over consumers.

    Where a component has several features of a consumer, |ρ| is the mean over pairs in turn.

    Args:
        view: The group.
        inputs: Statistics by layer name.
        class_weight: α ≥ 0.

    Returns:
        ``[components, components]`` float64; ``None`` if no consumer was observed.

    Raises:
        InputError: If the statistics do not fit the layers.
    """
    total: Tensor | None = None
    n_parts = 0
    for _, covariance, _, components in _parts(view, inputs, class_weight):
        scale = covariance.diagonal().clamp(min=torch.finfo(covariance.dtype).tiny).rsqrt()
        rho = (covariance * scale[:, None] * scale).abs().clamp(max=1)
        for features, of in _in_turns(components):
            if total is None:
                total = rho.new_zeros(view.n_components, view.n_components)
            total[of[:, None], of] += 1 - rho[features[:, None], features]
            n_parts += 1
    if total is None:
        return None
    return total.fill_diagonal_(0) / n_parts


def _parts(
    view: GroupView, inputs: Mapping[str, InputStatistics], class_weight: float
) -> Iterator[tuple[Member, Tensor, InputStatistics, Tensor]]:
    """Consumers, C + α B, statistics, and the component of every feature (−1 where it is not of the group)."""
    for member in observed_consumers(view, inputs):
        of_layer = inputs[member.name]
        check_weights(member, of_layer.shape)
        covariance = of_layer.covariance
        if class_weight:
            covariance = covariance + class_weight * of_layer.between_classes
        components = torch.full((len(covariance),), -1, dtype=torch.int64)
        components[member.rows // of_layer.patches.repeat] = member.components
        yield member, covariance, of_layer, components.to(covariance.device)


def _in_turns(components: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Features with their components, every component at most once at a time."""
    left = (components >= 0).nonzero()[:, 0]
    while len(left):
        of = components[left]
        is_first = torch.tensor([i == 0 or bool((of[:i] != c).all()) for i, c in enumerate(of)], device=of.device)
        yield left[is_first], of[is_first]
        left = left[~is_first]
