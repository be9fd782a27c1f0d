"""What all selectors share: fitting, scores for Torch-Pruning, counts as ratios, statistics in files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_cosep.errors import InputError
from tp_cosep.functional.knee import KNEE_RULES
from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.graph.groups import GroupView, full_group, prunable_groups, read_group
from tp_cosep.graph.heads import rerooted
from tp_cosep.graph.patches import patches_of
from tp_cosep.graph.protocols import DependencyGroup
from tp_cosep.graph.tracing import ROOT_TYPES, resolve_layers, trace
from tp_cosep.selection.calibrated import Calibrated
from tp_cosep.selection.criterion import Criterion
from tp_cosep.selection.embedding import GroupEmbedding, embed_group
from tp_cosep.selection.heads import HeadOptions, add_head_scores, select_heads
from tp_cosep.utils.checks import check_one_of, is_count

__all__ = ["Selector", "ratio_for"]


class Selector(Calibrated, tp.importance.Importance):  # type: ignore[misc]
    """A Torch-Pruning importance that selects the channels of a group together.

    Any pruner takes it. The scores of a group order its channels such that the best k are the selection, k being the
    selector's own count, and the best of any other number the selection nested around it.

    Args:
        knee: How the count is read from a curve, one of :data:`tp_cosep.functional.knee.KNEE_RULES`.
        keep: In place of the knee's count: an integer for that many channels of every group (at most all it has), or a
            float in (0, 1] for that share of it, rounded to the nearest and at least one channel.
        memory_budget: Bytes that the statistics may take, see :meth:`memory_estimate`; :meth:`fit` refuses to begin if
            it would take more.
        scope: Where whole heads are selected: ``"layer"``, or ``"model"`` for all heads of the model together, with at
            least one kept in every layer (as CAHP does, arXiv 2606.19150).
        channel_dims: Further types of layers to observe, such as your own, and the dimension of their output (or input)
            that holds the channels.

    Attributes:
        statistics: What was collected of the model; empty before :meth:`fit`.

    Raises:
        InputError: If an option is unknown or out of range.
    """

    #: Which tensors of a group's layers are observed, see :data:`tp_cosep.calibration.statistics.OBSERVED`.
    observe = "outputs"
    #: Whether channels are scored, so that several layers can be ranked for one ratio.
    ranks_channels = True
    #: Why a group has no selection.
    unmeasured = "none of its layers could be measured"

    def __init__(
        self,
        *,
        knee: str = "guarded",
        keep: int | float | None = None,
        memory_budget: int = 2**32,
        scope: str = "layer",
        channel_dims: Mapping[type[nn.Module], int] | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_one_of("knee", knee, KNEE_RULES, where)
        check_one_of("scope", scope, ("layer", "model"), where)
        _check_keep(where, keep)
        self.knee = knee
        self.keep = keep
        self.memory_budget = memory_budget
        self.scope = scope
        self.channel_dims = dict(channel_dims or {})

    @property
    @abstractmethod
    def criterion(self) -> Criterion:
        """How the components of groups compare, by the statistics."""

    @abstractmethod
    def _select(
        self, group: DependencyGroup, view: GroupView, n_keep: int | None, round_to: int | None
    ) -> ChannelSelection | None:
        """The selection among a group's components; ``None`` if no statistics describe it."""

    def _head_preference(self, group: DependencyGroup, view: GroupView) -> Tensor | None:
        """``[heads]``, the most preferred head of a cluster being kept; ``None`` for the medoid."""
        return None

    def _weights(self, group: DependencyGroup, view: GroupView) -> Tensor | None:
        """``[components]``, how much each counts in a clustering; ``None`` for all alike."""
        return None

    def losses(self, view: GroupView, selection: ChannelSelection) -> Tensor:
        """What removing components loses, for the allocation of a target.

        A loss is the score, the share of the group's retained variance that a component holds, times the number of the
        group's consumers.

        Args:
            view: The group.
            selection: What :meth:`select` gave for it.

        Returns:
            ``[components]`` float64 ≥ 0, ascending.
        """
        scores = torch.empty(view.n_components, dtype=torch.float64)
        scores[view.component_of] = selection.scores
        n_consumers = sum(patches_of(m.layer) is not None for m in view.consumers)
        return scores.sort().values * max(n_consumers, 1)

    def embedding(self, view: GroupView, selection: ChannelSelection) -> GroupEmbedding | None:
        """What a report draws of a group; ``None`` if its components cannot be compared.

        Args:
            view: The group, unpruned.
            selection: What :meth:`select` gave for it.

        Returns:
            The embedding.
        """
        return embed_group(self.criterion, view, selection)

    def remark(self, view: GroupView) -> str:
        """What is to be known of the selection in a group, for the plan; empty if nothing is.

        Args:
            view: The group.

        Returns:
            A clause.
        """
        return ""

    @property
    def _rules(self) -> dict[str, Any]:
        """The options of :func:`tp_cosep.functional.selection.select_channels`."""
        return {"knee": self.knee}

    def select(
        self, group: Any, *, n_keep: int | None = None, view: GroupView | None = None, round_to: int | None = None
    ) -> ChannelSelection | None:
        """Select the channels of a group.

        Args:
            group: A ``tp.Group``; a group with a part of the channels stands for the whole one.
            n_keep: Number of components to keep, in place of the selector's own rule.
            view: The group as :func:`tp_cosep.graph.groups.read_group` describes it, for a pruner that was given
                channel groups, or for a selection among heads; read here if not given.
            round_to: Keep a multiple of this many components.

        Returns:
            The selection among all channels of the group's root, or ``None`` if no statistics describe the group.

        Raises:
            NotFittedError: Before :meth:`fit`.
            InputError: If the statistics do not fit the layers.
        """
        group = full_group(group)
        self.check_fitted()
        self.refresh(group[0].dep.target.module)
        view = view or read_group(group, None, self.num_heads)
        n_keep = n_keep if n_keep is not None else self._fixed_count(view.n_components)
        selection = self._select(group, view, n_keep, round_to)
        return None if selection is None else selection.expanded(view.component_of)

    def select_heads(
        self,
        groups: Sequence[Any],
        num_heads: Mapping[nn.Module, int],
        *,
        n_keep: Sequence[int] | int | None = None,
    ) -> list[ChannelSelection | None]:
        """Select whole attention heads, see :func:`tp_cosep.selection.heads.select_heads`.

        Args:
            groups: Attention groups with all their channels, rooted at the layer that consumes them.
            num_heads: Number of heads by attention layer.
            n_keep: Heads to keep of each group; with ``scope="model"`` of all together. The knee decides if not given.

        Returns:
            For every group the selection among the channels of its root, or ``None`` if it has no statistics.

        Raises:
            NotFittedError: Before :meth:`fit`.
            InputError: If the statistics do not fit the layers.
        """
        self.check_fitted()
        if groups:
            self.refresh(groups[0][0].dep.target.module)
        options = HeadOptions(self.scope, self._rules, self._head_preference, self._weights)
        return select_heads(self.criterion, groups, num_heads, options, n_keep=n_keep)

    def scores(
        self, group: Any, num_heads: Mapping[nn.Module, int], selection: ChannelSelection | None
    ) -> Tensor | None:
        """Scores of a group's channels that rank them, and for an attention group its heads too.

        For an attention group a score is that of the dimension plus that of the head, one of them centred: a pruner
        averages over heads to rank dimensions, and over dimensions to rank heads, and finds both.

        Args:
            group: A ``tp.Group`` with all channels.
            num_heads: Number of heads by attention layer.
            selection: What :meth:`select` gave for it.

        Returns:
            ``[channels]`` float64, higher = keep; ``None`` if no statistics describe the group.
        """
        scores = None if selection is None else selection.scores
        return add_head_scores(group, scores, num_heads, self.scope, self.select_heads)

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Scores of a group's channels, as Torch-Pruning's pruners ask for them, see :meth:`scores`.

        Returns:
            ``[len(group[0].idxs)]`` float64, higher = keep, on the device of the root's weights; ``None`` if no
            statistics describe the group, which leaves it alone.
        """
        whole = full_group(group)
        scores = self.scores(whole, self.num_heads, self.select(whole))
        if scores is None:
            return None
        root = group[0].dep.target.module
        device = next((p.device for p in root.parameters()), None)
        return scores[list(group[0].idxs)].to(device)

    def distances(self, group: Any, *, view: GroupView | None = None) -> Tensor | None:
        """Distances between the components of a group.

        Args:
            group: A ``tp.Group``.
            view: The group as :func:`tp_cosep.graph.groups.read_group` describes it; read here if not given.

        Returns:
            ``[components, components]`` float64, or ``None`` if no statistics describe the group.

        Raises:
            NotFittedError: Before :meth:`fit`.
            InputError: If the statistics do not fit the layers.
        """
        self.check_fitted()
        if group is not None:
            self.refresh(group[0].dep.target.module)
        return self.criterion.distances(view or read_group(group, None, self.num_heads))

    def layers_of(self, view: GroupView) -> tuple[str, ...]:
        """Names of the layers whose statistics describe a group; of its producers if it has none."""
        return self.criterion.layers(view) or tuple(m.name for m in view.producers)

    def pruning_ratio_dict(
        self,
        model: nn.Module,
        example_inputs: Any,
        ignored_layers: Iterable[Any] = (),
        *,
        root_module_types: Iterable[type] = ROOT_TYPES,
        **trace_options: Any,
    ) -> dict[nn.Module, float]:
        """The selector's own count for every layer, as ratios for a stock pruner.

        A stock pruner removes N − int(N (1 − ratio)) channels; ratio = 1 − (k + ½)/N makes that exactly N − k at every
        width. Give the pruner ``pruning_ratio=0.0`` beside it, so that layers without an entry stay whole.

        Args:
            model: The model that was fitted, unpruned.
            example_inputs: For tracing, as the pruner takes them.
            ignored_layers: As for the pruner; a group that contains one of them is left alone.
            root_module_types: As for the pruner.
            **trace_options: Passed to ``DependencyGraph.build_dependency``: ``forward_fn``, ``output_transform``,
                ``unwrapped_parameters``, ``customized_pruners``.

        Returns:
            Ratio by root layer of every group; a little below 0 where nothing is removed.

        Raises:
            NotFittedError: Before :meth:`fit`.
            InputError: If the statistics do not fit the layers.
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
        """Whether the knee decides the counts, rather than ``keep``."""
        return self.keep is None

    def _fixed_count(self, n: int) -> int | None:
        if self.keep is None:
            return None
        return max(1, round(self.keep * n)) if isinstance(self.keep, float) else min(self.keep, n)


def ratio_for(k: int, n: int) -> float:
    """The pruning ratio at which a stock pruner keeps exactly k of n channels."""
    return 1 - (k + 0.5) / n


def _check_keep(where: str, keep: Any) -> None:
    is_share = isinstance(keep, float) and 0 < keep <= 1
    if keep is not None and not is_share and not is_count(keep):
        raise InputError(
            f"{where}: expected keep to be a number of channels (an integer ≥ 1), a share (a float in (0, 1]) or None, "
            f"got {keep!r}."
        )
