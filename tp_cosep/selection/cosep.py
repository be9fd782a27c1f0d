"""CoSeP as a Torch-Pruning importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.calibration.statistics import Measured
from tp_cosep.errors import InputError
from tp_cosep.functional.attention_distances import ATTENTION_JS
from tp_cosep.functional.elimination import Consumer, Elimination, backward_elimination
from tp_cosep.functional.knee import KneeMethod
from tp_cosep.functional.selection import ChannelSelection, select_by_elimination, select_channels
from tp_cosep.functional.separability import PairMetric
from tp_cosep.graph.groups import GroupView, full_group, prunable_groups, read_group
from tp_cosep.graph.heads import rerooted
from tp_cosep.graph.patches import patches_of
from tp_cosep.graph.tracing import ROOT_TYPES, resolve_layers, trace
from tp_cosep.selection.heads import with_head_scores
from tp_cosep.selection.input_space import INPUT_SPACES, consumers_of, correlation_distances, measured_consumers
from tp_cosep.selection.options import DEFAULT_METHODS, check_selector, default_space
from tp_cosep.selection.representatives import Preference, preference_of
from tp_cosep.selection.separability_space import Space

__all__ = ["CoSePSelector", "ratio_for"]


class CoSePSelector(Measured):
    """Choose complementary channels: those from which the layers behind can compute what they did.

    By default the channels of a group that its readers can best do without, once refitted, go one after the
    other (:mod:`tp_cosep.functional.elimination`), in the joint space of what readers see and of class means. As CoSeP was
    published (Levin & Singer, arXiv 2505.13225; :meth:`published`), every channel is described by how well it tells
    each pair of classes apart, channels are clustered in that space by k-medoids, and one of every cluster stays.
    The number to keep is a guarded knee: of the share of what readers see, or of the Mean Simplified Silhouette.
    ``docs/method.md`` has the reasons, and those for the departures of ``space="separability"`` from the papers: the
    strongest knee, guarded, instead of Kneedle's first, and maps pooled to 4 × 4 cells.

    It follows Torch-Pruning's importance protocol, so any pruner takes it. The scores of a group order
    its channels such that the best k are the selection, k being the selector's own count, and the best of any
    other number the selection nested around it.

    Args:
        metric: How classes are told apart: ``"jm"``, ``"hellinger"``, ``"wasserstein"`` or a function, see
            :data:`tp_cosep.functional.separability.PairMetric`. Or ``"attention-js"``: attention heads are compared by the
            Jensen-Shannon distance of their attention maps, without labels, and nothing but heads is selected.
        spatial: Cells per dimension that maps are pooled to; ``None`` for every pixel, ``"auto"`` for the
            largest number that fits ``memory_budget``.
        knee: ``"guarded"``, ``"strongest"``, ``"first"``, ``"paper"`` or a :class:`tp_cosep.functional.knee.KneeMethod`.
        mss_form: ``"paper"`` or ``"gb-afs"``, see :mod:`tp_cosep.functional.silhouette`.
        space: What channels are compared by. ``"joint"``, ``"reconstruction"`` (what linear combinations of kept
            channels can reproduce), ``"class-means"`` (the same for class means alone; joint is both) and
            ``"correlation"`` (1 − |ρ| of activations) look at what the layers that read a channel see, see
            :mod:`tp_cosep.selection.input_space`; ``"separability"``: JM distances between classes, the papers' own. By
            default joint, or separability if ``metric``, ``observe``, ``representative`` or ``method="k-medoids"`` are
            given, which are about clusters in it.
        method: ``"k-medoids"``, or ``"column-subset"``: take away, again and again, the channel that its readers can
            best do without once refitted (:mod:`tp_cosep.functional.elimination`). By default the first for separability and
            correlation, the second for the other spaces.
        representative: Which member of a cluster is kept: ``"medoid"``, ``"max_norm"`` (the largest L1 norm
            of the weights that create it), ``"reconstruction"`` (the members that together let the readers lose
            least) or an importance, whose best-scored member is. By default the medoid.
        n_keep: Keep exactly this many channels of every group (at most all it has), whatever the knee.
        keep_ratio: Keep this share of every group, in (0, 1], at least one channel; rounded to the nearest.
        backend: Of the k-medoids solver, see :func:`tp_cosep.functional.kmedoids.k_medoids`.
        memory_budget: Bytes that measuring may take, see :meth:`memory_estimate`; :meth:`fit` refuses to begin where it
            would take more, and ``spatial="auto"`` keeps to it.
        max_class_pairs: Where there are more class pairs, separability looks at a sample of about so many, in which
            every class is as often as any other; ``sampling_errors`` says how much that is worth.
        seed: Of that sample.
        observe: Whose view of a channel counts: ``"outputs"`` of the layers that create it, or ``"inputs"`` of the
            layers that read it, behind additions, normalisation and activations.
        num_heads: Number of heads by attention layer, as for the pruner. Give a stock pruner the same dictionary. By
            default :func:`tp_cosep.attention_heads` finds them when :meth:`fit` is called.
        scope: Where whole heads are selected: ``"layer"``, or ``"model"`` for one space of all heads of the
            model, with at least one kept in every layer (as CAHP does, arXiv 2606.19150).
        channel_dims: Further types of layers to measure, such as your own, and the dimension of their output
            (or, for consumers, input) that holds the channels.

    Attributes:
        moments: Class moments by layer name, of layers that are compared by separability; empty before :meth:`fit`.
        attention: Attention maps by layer name, with ``metric="attention-js"``.
        consumers: What layers read, by name, with a ``space`` or ``representative`` that needs it.
        sampling_errors: By layer, with ``max_class_pairs``, once a group of it was selected in: the relative standard
            error of its squared distances, see :func:`tp_cosep.functional.separability.pooled_gram`.

    Raises:
        InputError: If an option is unknown or out of range.

    Example:
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
    """

    def __init__(
        self,
        *,
        metric: str | PairMetric = "jm",
        spatial: int | str | None = 4,
        knee: str | KneeMethod = "guarded",
        mss_form: str = "paper",
        space: str | None = None,
        method: str | None = None,
        representative: str | Callable[[Any], Tensor | None] | None = None,
        n_keep: int | None = None,
        keep_ratio: float | None = None,
        backend: str = "native",
        memory_budget: int = 2**32,
        max_class_pairs: int | None = None,
        seed: int = 0,
        observe: str = "outputs",
        num_heads: dict[nn.Module, int] | None = None,
        scope: str = "layer",
        channel_dims: Mapping[type[nn.Module], int] | None = None,
    ) -> None:
        space = space or default_space(metric=metric, observe=observe, representative=representative, method=method)
        check_selector(
            metric=metric,
            observe=observe,
            scope=scope,
            mss_form=mss_form,
            backend=backend,
            representative=representative,
            space=space,
            method=method,
            n_keep=n_keep,
            keep_ratio=keep_ratio,
            max_class_pairs=max_class_pairs,
        )
        super().__init__(num_heads)
        self.metric = metric
        self.spatial = spatial
        self.knee = KneeMethod.named(knee)
        self.mss_form = mss_form
        self.representative = representative or "medoid"
        self.n_keep = n_keep
        self.keep_ratio = keep_ratio
        self.backend = backend
        self.memory_budget = memory_budget
        self.max_class_pairs = max_class_pairs
        self.seed = seed
        self.space_name = space
        self.method = method or DEFAULT_METHODS[space]
        self.observe = observe
        self.scope = scope
        self.channel_dims = dict(channel_dims or {})

    @classmethod
    def published(cls, **changed: Any) -> CoSePSelector:
        """CoSeP exactly as published (arXiv 2505.13225 v2).

        Every pixel is a cell of its own, JM distances of what layers make, k-medoids for every k, Kneedle's first
        knee of the Mean Simplified Silhouette, medoids kept.

        Args:
            **changed: Options that are to differ.

        Returns:
            A selector.
        """
        return cls(**{"space": "separability", "spatial": None, "knee": "paper", **changed})

    def select(
        self, group: Any, *, n_keep: int | None = None, view: GroupView | None = None, round_to: int | None = None
    ) -> ChannelSelection | None:
        """Choose the channels of a group.

        The profile of a channel joins those of all layers that create (or read) it: squared distances are summed
        over the layers, each divided by the length of its profiles.

        Args:
            group: A ``tp.Group``; a group with a part of the channels stands for the whole one.
            n_keep: Number of components to keep, in place of the selector's own rule.
            view: What :func:`tp_cosep.graph.groups.read_group` says of the group, for a pruner that was told of
                channel groups, or for a choice among heads; read here if not given.
            round_to: Keep a multiple of this many components.

        Returns:
            The selection among all channels of the group's root, or ``None`` if no layer of the group is of
            a type that is measured.

        Raises:
            NotFittedError: Before :meth:`fit`.
            InputError: If the moments do not fit the layers.
        """
        group = full_group(group)
        view = view or read_group(group, None, self.num_heads)
        n_keep = n_keep if n_keep is not None else self._fixed_count(view.n_components)
        if self.method == "column-subset" and self.compares_inputs(view):
            elimination, distances = self._eliminated(view)
            by_order = select_by_elimination(elimination, distances, n_keep=n_keep, knee=self.knee, round_to=round_to)
            return by_order.expanded(view.component_of)
        found = self.distances(group, view=view)
        if found is None:
            return None
        selection = select_channels(
            found,
            n_keep=n_keep,
            round_to=round_to,
            preference=self.preference(group, view),
            **self.rules,
        )
        return selection.expanded(view.component_of)

    def _eliminated(self, view: GroupView) -> tuple[Elimination, Tensor]:
        """The order in which a group's components go, and their distances; found once, whatever count is asked for."""
        known = self._known(view)
        if known is None:
            consumers = consumers_of(view, self.consumers, self.space_name)
            distances = correlation_distances(view, self.consumers, self.space_name)
            assert distances is not None
            known = backward_elimination(consumers, view.n_components), distances
            self._eliminations[view.name, view.side] = self._state_of(view), *known
        return known

    def _known(self, view: GroupView) -> tuple[Elimination, Tensor] | None:
        """What was found of a group before, if that still holds."""
        found = self._eliminations.get((view.name, view.side))
        return None if found is None or found[0] != self._state_of(view) else found[1:]

    def _state_of(self, view: GroupView) -> Any:
        """What the choice in a group depends on; the weights by what they are: those of a copy are as good."""
        read = measured_consumers(view, self.consumers, self.space_name)
        weights = [m.layer.get_parameter("weight").detach() for m in read]
        return view.component_of.numpy().tobytes(), [(w.shape, float(w.double().square().sum())) for w in weights]

    def distances(self, group: Any, *, view: GroupView | None = None) -> Tensor | None:
        """Distances between the components of a group in separability space; arguments as in :meth:`select`.

        Returns:
            ``[components, components]`` float64, or ``None`` if no layer of the group is measured.

        Raises:
            NotFittedError: Before :meth:`fit`.
            InputError: If the moments do not fit the layers.
        """
        self.check_fitted()
        view = view or read_group(group, None, self.num_heads)
        if self.metric == ATTENTION_JS:
            return None
        if self.compares_inputs(view):
            known = self._known(view)
            return correlation_distances(view, self.consumers, self.space_name) if known is None else known[1].clone()
        is_left = self.space_name in INPUT_SPACES and not any(m.name in self.moments for m in view.producers)
        if not is_left:
            return self.space.distances(view)
        missing = next((m.name for m in view.consumers if patches_of(m.layer)), None)
        if missing is not None:
            raise InputError(
                f"layer {missing!r}: what it reads was not measured: the calibration data never reached this layer, or "
                f"it is not part of the fitted model, the group of {view.name!r} was left out of the fit, or it goes "
                "through attention or a layer of your own, which this space does not follow ('separability' does, "
                f"the default through attention); put {view.name!r} into ignored_layers or fit again."
            )
        return None

    def compares_inputs(self, view: GroupView) -> bool:
        """Whether channels of a group are compared by what their readers see, or else by separability.

        Args:
            view: The group.

        Returns:
            False where attention multiplies channels with each other, for whole heads, and where nothing reads them
            by weights.
        """
        return (
            self.space_name in INPUT_SPACES
            and view.unit == "channel"
            and not any(m.layer in self.num_heads for m in view.producers)
            and bool(measured_consumers(view, self.consumers, self.space_name))
        )

    def layers_of(self, view: GroupView) -> tuple[str, ...]:
        """Names of the layers whose measurements describe a group; of all that create it if none is measured."""
        if self.metric == ATTENTION_JS:
            measured = [m.name for m in view.producers if m.name in self.attention]
        elif self.compares_inputs(view):
            measured = [m.name for m in measured_consumers(view, self.consumers, self.space_name)]
        else:
            measured = [m.name for m in self.space.layers_of(view)]
        return tuple(measured or (m.name for m in view.producers))

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Scores of a group's channels, as Torch-Pruning's pruners ask for them.

        For an attention group a score is that of the dimension plus that of the head, one of them centred: the
        pruner averages over heads to rank dimensions, and over dimensions to rank heads, and finds both.

        Returns:
            ``[len(group[0].idxs)]`` float64, higher = keep, on the device of the root's weights; ``None``
            if nothing in the group is measured, which leaves the group alone.
        """
        whole = full_group(group)
        selection = self.select(whole)
        scores = with_head_scores(self, whole, None if selection is None else selection.scores, self.num_heads)
        if scores is None:
            return None
        root = group[0].dep.target.module
        device = next((p.device for p in root.parameters()), None)
        return scores[list(group[0].idxs)].to(device)

    def pruning_ratio_dict(
        self,
        model: nn.Module,
        example_inputs: Any,
        ignored_layers: Iterable[Any] = (),
        *,
        root_module_types: Iterable[type] = ROOT_TYPES,
        **trace_options: Any,
    ) -> dict[nn.Module, float]:
        """CoSeP's own count for every layer, as ratios for a stock pruner.

        A stock pruner removes N − int(N (1 − ratio)) channels; ratio = 1 − (k + ½)/N makes that exactly
        N − k at every width. Give the pruner ``pruning_ratio=0.0`` beside it, so that layers without an entry
        stay whole.

        Args:
            model: The model that was fitted, unpruned.
            example_inputs: For tracing, as the pruner takes them.
            ignored_layers: As for the pruner; a group that contains one of them is left alone.
            root_module_types: As for the pruner.
            **trace_options: Passed to ``DependencyGraph.build_dependency``: ``forward_fn``,
                ``output_transform``, ``unwrapped_parameters``, ``customized_pruners``.

        Returns:
            Ratio by root layer of every group; a little below 0 where nothing is removed.

        Raises:
            NotFittedError: Before :meth:`fit`.
            InputError: If the moments do not fit the layers.
        """
        ignored = resolve_layers(model, ignored_layers, "ignored_layers")
        graph = trace(model, example_inputs, **trace_options)
        ratios = {}
        for group in prunable_groups(graph, ignored, root_module_types):
            seen = rerooted(group, self.num_heads, root_module_types)
            selection = None if seen is None else self.select(seen)
            if seen is not None and selection is not None:
                n_groups = read_group(seen, None, self.num_heads).n_channel_groups
                kept, n = len(selection.keep_idxs) // n_groups, selection.n_channels // n_groups
                ratios[group[0].dep.target.module] = ratio_for(kept, n)
        return ratios

    @property
    def is_automatic(self) -> bool:
        """Whether the knee decides the counts, rather than ``n_keep`` or ``keep_ratio``."""
        return self.n_keep is None and self.keep_ratio is None

    @property
    def rules(self) -> dict[str, Any]:
        """The options of :func:`tp_cosep.functional.selection.select_channels`."""
        return {"knee": self.knee, "mss_form": self.mss_form, "backend": self.backend}

    @property
    def space(self) -> Space:
        """What was measured."""
        return Space(
            self.moments,
            self._shapes,
            metric=self.metric,
            observe=self.observe,
            channel_dims=self.channel_dims,
            max_pairs=self.max_class_pairs,
            seed=self.seed,
            errors=self.sampling_errors if self.max_class_pairs is not None else None,
        )

    def _fixed_count(self, n: int) -> int | None:
        if self.n_keep is not None:
            return min(self.n_keep, n)
        return None if self.keep_ratio is None else max(1, round(self.keep_ratio * n))

    def preference(self, group: Any, view: GroupView) -> Preference:
        """What decides which member of a cluster is kept, see :func:`tp_cosep.selection.representatives.preference_of`."""
        consumers: list[Consumer] = []
        if self.representative == "reconstruction" and view.unit == "channel":
            space = "reconstruction" if self.space_name == "separability" else self.space_name
            consumers = consumers_of(view, self.consumers, space)
        return preference_of(self.representative, group, view, consumers)


def ratio_for(k: int, n: int) -> float:
    """The pruning ratio at which a stock pruner keeps exactly k of n channels."""
    return 1 - (k + 0.5) / n
