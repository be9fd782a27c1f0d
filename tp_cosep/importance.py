"""CoSeP as a Torch-Pruning importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_cosep.collect import MEASURED_TYPES, collect_moments, measured_layers
from tp_cosep.errors import InputError, NotFittedError
from tp_cosep.groups import GroupView, Member, full_group, l1_norms, prunable_groups, read_group, resolve_layers, trace
from tp_cosep.knee import KneeMethod
from tp_cosep.medoids import BACKENDS
from tp_cosep.moments import ClassMoments
from tp_cosep.selection import ChannelSelection, select_channels
from tp_cosep.separability import PairMetric, distances_from_gram, profile_gram, resolve_metric
from tp_cosep.silhouette import MSS_FORMS

__all__ = ["CoSePSelector"]


class CoSePSelector(tp.importance.Importance):  # type: ignore[misc]
    """Complementary separability: keep one representative of every cluster of like channels.

    Every channel is described by how well it tells each pair of classes apart, channels are clustered in
    that space by k-medoids, and the knee of the Mean Simplified Silhouette says how many clusters there
    are. Source: Levin & Singer, "CoSeP", arXiv 2505.13225. Departures: the strongest knee, guarded,
    instead of Kneedle's first (``knee="paper"`` is theirs), and maps pooled to 4 × 4 cells
    (``spatial=None`` is theirs); ``docs/method.md`` has the reasons.

    It follows Torch-Pruning's importance protocol, so any pruner takes it. The scores of a group order
    its channels such that the best k are the selection, k being CoSeP's own count, and the best of any
    other number the selection nested around it.

    Args:
        metric: How classes are told apart: ``"jm"``, ``"hellinger"``, ``"wasserstein"`` or a function, see
            :data:`tp_cosep.separability.PairMetric`.
        spatial: Cells per dimension that maps are pooled to; ``None`` for every pixel, ``"auto"`` for the
            largest number that fits ``memory_budget``.
        knee: ``"guarded"``, ``"strongest"``, ``"first"``, ``"paper"`` or a :class:`tp_cosep.knee.KneeMethod`.
        mss_form: ``"paper"`` or ``"gb-afs"``, see :mod:`tp_cosep.silhouette`.
        representative: Which member of a cluster is kept: ``"medoid"``, ``"max_norm"`` (the largest L1 norm
            of the weights that create it) or an importance, whose best-scored member is.
        n_keep: Keep exactly this many channels of every group (at most all it has), whatever the knee.
        keep_ratio: Keep this share of every group, in (0, 1], at least one channel; rounded to the nearest.
        backend: Of the k-medoids solver, see :func:`tp_cosep.medoids.k_medoids`.
        memory_budget: Bytes for ``spatial="auto"``.

    Attributes:
        moments: Class moments by layer name; empty before :meth:`fit`.

    Raises:
        InputError: If an option is unknown or out of range.

    Example:
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
        representative: str | Callable[[Any], Tensor | None] = "medoid",
        n_keep: int | None = None,
        keep_ratio: float | None = None,
        backend: str = "native",
        memory_budget: int = 2**30,
    ) -> None:
        resolve_metric(metric)
        if mss_form not in MSS_FORMS:
            raise InputError(f"CoSePSelector: expected mss_form of {sorted(MSS_FORMS)}, got {mss_form!r}.")
        if backend not in BACKENDS:
            raise InputError(f"CoSePSelector: expected backend of {sorted(BACKENDS)}, got {backend!r}.")
        if not callable(representative) and representative not in ("medoid", "max_norm"):
            raise InputError(
                f"CoSePSelector: expected representative 'medoid', 'max_norm' or an importance, got {representative!r}."
            )
        if n_keep is not None and keep_ratio is not None:
            raise InputError("CoSePSelector: expected n_keep or keep_ratio, got both.")
        if n_keep is not None and n_keep < 1:
            raise InputError(f"CoSePSelector: expected n_keep ≥ 1, got {n_keep}.")
        if keep_ratio is not None and not 0 < keep_ratio <= 1:
            raise InputError(f"CoSePSelector: expected keep_ratio in (0, 1], got {keep_ratio}.")
        self.metric = metric
        self.spatial = spatial
        self.knee = KneeMethod.named(knee)
        self.mss_form = mss_form
        self.representative = representative
        self.n_keep = n_keep
        self.keep_ratio = keep_ratio
        self.backend = backend
        self.memory_budget = memory_budget
        self.moments: dict[str, ClassMoments] = {}
        self._weight_shapes: dict[str, torch.Size] = {}

    def fit(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        target_fn: Callable[[Any], tuple[Any, Any]] | None = None,
        labels: str = "given",
        rare_classes: str = "error",
        n_classes: int | None = None,
        progress: bool = True,
    ) -> CoSePSelector:
        """Measure a model's layers on calibration data, in one pass and in eval mode.

        Mode, weights, buffers and gradients stay as they are, also after an exception. What an earlier
        call measured is replaced; it is kept if this one fails. The arguments are those of
        :func:`tp_cosep.collect.collect_moments`.

        Returns:
            The selector itself.

        Raises:
            InputError: If the loader, the labels or the activations cannot be used.
        """
        moments = collect_moments(
            model,
            loader,
            spatial=self.spatial,
            target_fn=target_fn,
            labels=labels,
            rare_classes=rare_classes,
            n_classes=n_classes,
            memory_budget=self.memory_budget,
            progress=progress,
        )
        self.moments = moments
        self._weight_shapes = {
            name: m.get_parameter("weight").shape for name, m in measured_layers(model).items() if name in moments
        }
        return self

    def select(
        self, group: Any, *, n_keep: int | None = None, view: GroupView | None = None
    ) -> ChannelSelection | None:
        """Choose the channels of a group.

        The profile of a channel joins those of all layers that create it: squared distances are summed
        over the members, each divided by the length of its profiles.

        Args:
            group: A ``tp.Group``; a group with a part of the channels stands for the whole one.
            n_keep: Number of components to keep, in place of the selector's own rule.
            view: What :func:`tp_cosep.groups.read_group` says of the group, for a pruner that was told of
                channel groups; read here if not given.

        Returns:
            The selection among all channels of the group's root, or ``None`` if no member of the group is of
            a type that is measured.

        Raises:
            NotFittedError: Before :meth:`fit`.
            InputError: If the moments do not fit the layers.
        """
        group = full_group(group)
        view = view or read_group(group)
        distances = self.distances(group, view=view)
        if distances is None:
            return None
        selection = select_channels(
            distances,
            n_keep=n_keep if n_keep is not None else self._fixed_count(view.n_components),
            knee=self.knee,
            mss_form=self.mss_form,
            backend=self.backend,
            preference=self._preference(group, view),
        )
        return selection.tiled(view.n_channel_groups)

    def distances(self, group: Any, *, view: GroupView | None = None) -> Tensor | None:
        """Distances between the components of a group in separability space; arguments as in :meth:`select`.

        Returns:
            ``[components, components]`` float64, or ``None`` if no member of the group is measured.

        Raises:
            NotFittedError: Before :meth:`fit`.
            InputError: If the moments do not fit the layers.
        """
        if not self.moments:
            raise NotFittedError("CoSePSelector: no data seen yet; call fit(model, loader) first.")
        view = view or read_group(full_group(group))
        members = [
            m
            for m in view.members
            if isinstance(m.layer, MEASURED_TYPES) and not (m.name in self.moments and self.moments[m.name].is_empty)
        ]
        return distances_from_gram(self._gram(view, members)) if members else None

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Scores of a group's channels, as Torch-Pruning's pruners ask for them.

        Returns:
            ``[len(group[0].idxs)]`` float64, higher = keep, on the device of the root's weights; ``None``
            if nothing in the group is measured, which leaves the group alone.
        """
        selection = self.select(group)
        if selection is None:
            return None
        root = group[0].dep.target.module
        device = next((p.device for p in root.parameters()), None)
        return selection.scores[list(group[0].idxs)].to(device)

    def pruning_ratio_dict(
        self,
        model: nn.Module,
        example_inputs: Any,
        ignored_layers: Iterable[nn.Module] = (),
        *,
        root_module_types: Iterable[type] = (nn.modules.conv._ConvNd, nn.Linear),
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
            selection = self.select(group)
            if selection is not None:
                n_components = len(selection.labels)
                ratios[group[0].dep.target.module] = ratio_for(selection.k, n_components)
        return ratios

    @property
    def is_automatic(self) -> bool:
        """Whether the knee decides the counts, rather than ``n_keep`` or ``keep_ratio``."""
        return self.n_keep is None and self.keep_ratio is None

    def _fixed_count(self, n: int) -> int | None:
        if self.n_keep is not None:
            return min(self.n_keep, n)
        return None if self.keep_ratio is None else max(1, round(self.keep_ratio * n))

    def _preference(self, group: Any, view: GroupView) -> Tensor | None:
        if self.representative == "medoid":
            return None
        if self.representative == "max_norm":
            return l1_norms(view)
        assert callable(self.representative)
        scores = self.representative(group)
        if scores is None:
            return None
        return scores.view(view.n_channel_groups, -1).mean(0)

    def _gram(self, view: GroupView, members: list[Member]) -> Tensor:
        """Inner products of the joined profiles; a component that a member does not create is 0 there."""
        total: Tensor | None = None
        for member in members:
            gram = profile_gram(self._moments_of(member), self.metric)
            if total is None:
                total = gram.new_zeros(view.n_components, view.n_components)
            for rows, components in _one_row_per_component(member):
                rows, components = rows.to(gram.device), components.to(gram.device)
                total[components[:, None], components] += gram[rows[:, None], rows]
        assert total is not None
        return total

    def _moments_of(self, member: Member) -> ClassMoments:
        moments = self.moments.get(member.name)
        if moments is None:
            raise InputError(
                f"layer {member.name!r}: expected class moments, got none: the calibration data never reached this "
                "layer, or it is not part of the fitted model; put it into ignored_layers or fit again."
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
        shape = self._weight_shapes.get(member.name)
        now = member.layer.get_parameter("weight").shape
        if shape is not None and now != shape:
            raise InputError(
                f"layer {member.name!r}: measured with weights of shape {tuple(shape)}, they are "
                f"{tuple(now)} now; call fit() again after pruning what is in front of it."
            )
        return moments


def _one_row_per_component(member: Member) -> Iterable[tuple[Tensor, Tensor]]:
    """Split a member's rows so that each part has every component at most once."""
    seen: dict[int, int] = {}
    parts: list[list[tuple[int, int]]] = []
    for row, component in zip(member.rows.tolist(), member.components.tolist(), strict=True):
        turn = seen.get(component, 0)
        seen[component] = turn + 1
        if turn == len(parts):
            parts.append([])
        parts[turn].append((row, component))
    return [(torch.tensor([r for r, _ in part]), torch.tensor([c for _, c in part])) for part in parts]


def ratio_for(k: int, n: int) -> float:
    """The pruning ratio at which a stock pruner keeps exactly k of n channels."""
    return 1 - (k + 0.5) / n
