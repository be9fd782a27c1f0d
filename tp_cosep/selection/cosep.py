"""CoSeP: one medoid of every cluster of channels in separability space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from tp_cosep.calibration.statistics import OBSERVED, StatisticsSpec
from tp_cosep.errors import InputError
from tp_cosep.functional.elimination import refit_losses
from tp_cosep.functional.kmedoids import BACKENDS
from tp_cosep.functional.selection import ChannelSelection, select_channels
from tp_cosep.functional.separability import PairMetric, check_metric
from tp_cosep.graph.groups import GroupView
from tp_cosep.graph.protocols import DependencyGroup
from tp_cosep.selection.input_space import consumers_of, energies_of
from tp_cosep.selection.representatives import REPRESENTATIVES, Preference, preference_of, weights_of
from tp_cosep.selection.selector import Selector
from tp_cosep.selection.separability_space import SeparabilitySpace
from tp_cosep.utils.checks import check_one_of, is_count

__all__ = ["CoSePSelector"]


class CoSePSelector(Selector):
    """Complementary Separability Pruning: keep one medoid of every cluster of channels in separability space.

    A channel is described by its profile: how well it tells each pair of classes apart, by Jeffries-Matusita distances
    between class-conditional activations. Channels are clustered in that space by k-medoids, and one of every cluster
    is kept. Each channel counts by its energy, what its consumers draw from it
    (:func:`tp_cosep.selection.input_space.energies_of`), so that representatives speak for what matters. The number of
    clusters is the knee of the Mean Simplified Silhouette.

    Source: Levin & Singer, arXiv 2505.13225. Departures (``docs/method.md`` has the reasons): weights; the strongest
    knee, guarded, instead of Kneedle's first; maps pooled to 4 × 4 cells. :meth:`published` is the papers' form.

    Scores order the channels around the selection. With energies they are the shares of what the refitted consumers
    lose along that order, see :func:`tp_cosep.functional.elimination.refit_losses`, by which layers compare.

    The profile of a channel joins those of all layers that create (or consume) it: squared distances are summed over
    the layers, each divided by the length of its profiles.

    Args:
        metric: How classes are told apart: ``"jm"``, ``"hellinger"``, ``"wasserstein"`` or a function, see
            :data:`tp_cosep.functional.separability.PairMetric`.
        weights: How much a channel counts: ``"energy"``; ``None`` for all alike, as published; or a function of a
            ``tp.Group``, such as a Torch-Pruning importance, that gives ``[channels]`` numbers ≥ 0. In a group without
            consumers that have weights, all count alike.
        spatial: Cells per dimension that maps are pooled to; ``"auto"`` for the largest number up to 4 that fits
            ``memory_budget``, ``None`` for every pixel.
        knee: ``"guarded"``, ``"strongest"`` or ``"first"``, see :func:`tp_cosep.functional.knee.find_knee`.
        representative: Which member of a cluster is kept: ``"medoid"``, ``"max_norm"`` (the largest L1 norm of the
            weights that create it), ``"reconstruction"`` (the members that together let the refitted consumers lose
            least) or a Torch-Pruning importance, whose best-scored member is.
        keep: In place of the knee's count: an integer for that many channels of every group (at most all it has), or a
            float in (0, 1] for that share of it, rounded to the nearest and at least one channel.
        observe: ``"outputs"`` of the layers that create a channel, or ``"inputs"`` of the layers that consume it,
            behind additions, normalisation and activations.
        max_class_pairs: With more class pairs, profiles hold a sample of about so many, in which every class occurs
            equally often; ``sampling_errors`` says how precise that is.
        backend: Of the k-medoids solver, see :func:`tp_cosep.functional.kmedoids.k_medoids`.
        memory_budget: Bytes that the statistics may take; :meth:`fit` refuses to begin if it would take more.
        scope: Where whole heads are selected: ``"layer"``, or ``"model"`` for all heads of the model together, with at
            least one kept in every layer (as CAHP does, arXiv 2606.19150).
        channel_dims: Further types of layers to observe, such as your own, and the dimension of their output (or input)
            that holds the channels.

    Attributes:
        statistics: Class moments by layer, and for energies and ``representative="reconstruction"`` second moments of
            consumers' inputs; empty before :meth:`fit`.
        sampling_errors: By layer, with ``max_class_pairs``, once a group of it was selected in: the relative standard
            error of its squared distances, see :func:`tp_cosep.functional.separability.pooled_gram`.

    Raises:
        InputError: If an option is unknown or out of range.

    Example:
        >>> import torch
        >>> import torch_pruning as tp
        >>> model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 3))
        >>> x, y = torch.randn(40, 1, 8, 8), torch.arange(40) % 3
        >>> selector = CoSePSelector().fit(model, [(x, y)])
        >>> pruner = tp.pruner.MetaPruner(
        ...     model, x[:1], importance=selector, pruning_ratio=0.5, ignored_layers=[model[3]]
        ... )
        >>> pruner.step()
        >>> model[0].out_channels
        6
        >>> model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 3))
        >>> estimate = CoSePSelector().memory_estimate(model, torch.randn(2, 1, 8, 8), 1000)
        >>> estimate.class_moments  # 12 channels in 4 × 4 cells and 3 outputs, of 1000 classes
        3120000
    """

    def __init__(
        self,
        *,
        metric: str | PairMetric = "jm",
        weights: str | Callable[[Any], Tensor | None] | None = "energy",
        spatial: int | str | None = "auto",
        knee: str = "guarded",
        representative: str | Callable[[Any], Tensor | None] = "medoid",
        keep: int | float | None = None,
        observe: str = "outputs",
        max_class_pairs: int | None = None,
        backend: str = "native",
        memory_budget: int = 2**32,
        scope: str = "layer",
        channel_dims: Mapping[type[nn.Module], int] | None = None,
    ) -> None:
        super().__init__(
            knee=knee,
            keep=keep,
            memory_budget=memory_budget,
            scope=scope,
            channel_dims=channel_dims,
        )
        where = type(self).__name__
        check_metric(metric)
        check_one_of("observe", observe, OBSERVED, where)
        check_one_of("backend", backend, sorted(BACKENDS), where)
        if not callable(representative) and representative not in REPRESENTATIVES:
            raise InputError(
                f"{where}: expected representative of {list(REPRESENTATIVES)} or an importance, got {representative!r}."
            )
        if max_class_pairs is not None and not is_count(max_class_pairs):
            raise InputError(
                f"{where}: expected max_class_pairs to be an integer ≥ 1 or None, got {max_class_pairs!r}."
            )
        if weights is not None and weights != "energy" and not callable(weights):
            raise InputError(f"{where}: expected weights to be 'energy', None or an importance, got {weights!r}.")
        if weights is not None and backend != "native":
            raise InputError(f"{where}: backend={backend!r} knows no weights; pass weights=None with it.")
        self.metric = metric
        self.weights = weights
        self.spatial = spatial
        self.representative = representative
        self.observe = observe
        self.max_class_pairs = max_class_pairs
        self.backend = backend
        self.sampling_errors: dict[str, float] = {}

    @classmethod
    def published(cls, **changed: Any) -> CoSePSelector:
        """CoSeP exactly as published (arXiv 2505.13225 v2).

        All channels count alike, every pixel is a cell of its own, JM distances of layers' outputs, k-medoids for every
        k, Kneedle's first knee of the Mean Simplified Silhouette, medoids kept.

        Args:
            **changed: Options that are to differ.

        Returns:
            A selector.
        """
        return cls(**{"weights": None, "spatial": None, "knee": "first", **changed})

    @property
    def criterion(self) -> SeparabilitySpace:
        """Separability space."""
        return SeparabilitySpace(
            self.statistics,
            metric=self.metric,
            observe=self.observe,
            channel_dims=self.channel_dims,
            max_pairs=self.max_class_pairs,
            errors=self.sampling_errors if self.max_class_pairs is not None else None,
        )

    @property
    def layers(self) -> list[str]:
        """Names of the layers with class moments, in the order in which they ran."""
        return list(self.statistics.moments)

    @property
    def _spec(self) -> StatisticsSpec:
        return StatisticsSpec(
            class_moments=True,
            inputs=self.weights == "energy" or self.representative == "reconstruction",
            observe=self.observe,
            spatial=self.spatial,
            channel_dims=self.channel_dims,
            num_heads=self.num_heads,
            memory_budget=self.memory_budget,
        )

    def _hold(self, statistics: Any) -> None:
        super()._hold(statistics)
        self.sampling_errors.clear()

    @property
    def _rules(self) -> dict[str, Any]:
        return {"knee": self.knee, "backend": self.backend}

    def _select(
        self, group: DependencyGroup, view: GroupView, n_keep: int | None, round_to: int | None
    ) -> ChannelSelection | None:
        distances = self.criterion.distances(view)
        if distances is None:
            return None
        weights, losses = self._weights(group, view), None
        if self.weights == "energy" and weights is not None:
            losses = partial(refit_losses, consumers_of(view, self.statistics.inputs, 0, inverted=False))
        return select_channels(
            distances,
            weights=weights,
            losses=losses,
            n_keep=n_keep,
            round_to=round_to,
            preference=self._preference(group, view),
            **self._rules,
        )

    def _weights(self, group: DependencyGroup, view: GroupView) -> Tensor | None:
        if self.weights is None:
            return None
        if callable(self.weights):
            return weights_of(self.weights, group, view)
        energies = energies_of(view, self.statistics.inputs)
        return energies if energies is not None and energies.any() else None

    def remark(self, view: GroupView) -> str:
        """Whether channels count alike for want of consumers, see :meth:`tp_cosep.Selector.remark`."""
        if self.weights != "energy":
            return ""
        energies = energies_of(view, self.statistics.inputs)
        if energies is None:
            return "all channels count alike: no consumer with weights was observed"
        return "" if energies.any() else "all channels count alike: no consumer draws anything from them"

    def _preference(self, group: DependencyGroup, view: GroupView) -> Preference:
        needs_consumers = self.representative == "reconstruction" and view.unit == "channel"
        consumers = consumers_of(view, self.statistics.inputs, class_weight=0) if needs_consumers else []
        return preference_of(self.representative, group, view, consumers)

    def _head_preference(self, group: DependencyGroup, view: GroupView) -> Tensor | None:
        # Only clusters of channels can tell which of their members reconstruct best.
        preference = self._preference(group, view)
        return None if callable(preference) else preference
