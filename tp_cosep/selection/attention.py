"""Attention heads compared by their attention maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.calibration.memory import MemoryEstimate
from tp_cosep.calibration.statistics import Statistics, StatisticsSpec
from tp_cosep.errors import InputError
from tp_cosep.functional.attention_distances import jensen_shannon_distances
from tp_cosep.functional.kmedoids import BACKENDS
from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.graph.groups import GroupView
from tp_cosep.graph.protocols import DependencyGroup
from tp_cosep.selection.criterion import LayerClasses
from tp_cosep.selection.selector import Selector
from tp_cosep.utils.checks import check_one_of

__all__ = ["AttentionMapSelector", "AttentionSpace"]


class AttentionSpace:
    """Heads compared by their average attention maps; a :class:`tp_cosep.selection.criterion.Criterion`.

    Args:
        statistics: Attention maps by layer.
    """

    def __init__(self, statistics: Statistics) -> None:
        self._maps = statistics.attention

    def sketched(self, n_pairs: int) -> AttentionSpace:
        """The same: there are no class pairs."""
        return self

    def distances(self, view: GroupView) -> Tensor | None:
        """Nothing: channels inside of heads are not compared."""
        return None

    def head_distances(self, views: Sequence[GroupView]) -> Tensor | None:
        """Jensen-Shannon distances between the heads of one or more attention groups.

        Args:
            views: Groups whose components are heads.

        Returns:
            ``[heads, heads]`` float64, the heads of all groups one after another; ``None`` if a group has no maps.

        Raises:
            InputError: If a group has another number of heads than its maps.
        """
        maps = []
        for view in views:
            of_layer = next((self._maps[m.name] for m in view.producers if m.name in self._maps), None)
            if of_layer is None:
                return None
            if len(of_layer) != view.n_components:
                raise InputError(
                    f"layer {view.name!r}: attention maps cover {len(of_layer)} heads, the layer has "
                    f"{view.n_components}; call fit() again after pruning (iterative_steps: pass loader= to "
                    "CoSePPruner)."
                )
            maps.append(of_layer)
        return jensen_shannon_distances(torch.cat(maps))

    def layers(self, view: GroupView) -> tuple[str, ...]:
        """Names of the attention layers with maps."""
        return tuple(m.name for m in view.producers if m.name in self._maps)

    def layer_classes(self, view: GroupView) -> list[LayerClasses]:
        """Nothing: classes are not observed."""
        return []


class AttentionMapSelector(Selector):
    """Select whole attention heads by their attention maps; everything else is left alone.

    A head is its average attention map over calibration data. Heads are clustered by k-medoids on the root of the mean
    Jensen-Shannon divergence between the rows of their maps, and the medoids are kept; the knee of the Mean Simplified
    Silhouette gives their number. No labels are required.

    Source: "Complementary Attention Head Pruning for Efficient Transformers", arXiv 2606.19150; departure: the guarded
    knee.

    Args:
        knee: ``"guarded"``, ``"strongest"`` or ``"first"``, see :func:`tp_cosep.functional.knee.find_knee`.
        keep: In place of the knee's count: an integer for that many heads of every layer (at most all it has), or a
            float in (0, 1] for that share of them, rounded to the nearest and at least one.
        backend: Of the k-medoids solver, see :func:`tp_cosep.functional.kmedoids.k_medoids`.
        scope: ``"layer"``, or ``"model"`` for all heads of the model together, with at least one kept in every layer.

    Attributes:
        statistics: Attention maps by layer; empty before :meth:`fit`.

    Raises:
        InputError: If an option is unknown or out of range.
    """

    ranks_channels = False

    def __init__(
        self,
        *,
        knee: str = "guarded",
        keep: int | float | None = None,
        backend: str = "native",
        scope: str = "layer",
    ) -> None:
        super().__init__(knee=knee, keep=keep, scope=scope)
        check_one_of("backend", backend, sorted(BACKENDS), type(self).__name__)
        self.backend = backend

    @property
    def criterion(self) -> AttentionSpace:
        """Distances between attention maps."""
        return AttentionSpace(self.statistics)

    @property
    def _spec(self) -> StatisticsSpec:
        return StatisticsSpec(attention_maps=True, num_heads=self.num_heads)

    @property
    def _rules(self) -> dict[str, Any]:
        return {"knee": self.knee, "backend": self.backend}

    def memory_estimate(
        self,
        model: nn.Module,
        example_inputs: Any,
        n_classes: int,
        *,
        ignored_layers: Iterable[Any] = (),
        num_heads: Mapping[nn.Module, int] | None = None,
    ) -> MemoryEstimate:
        """Attention maps take n_heads² · 8 bytes per sample, next to nothing.

        Raises:
            InputError: Always.
        """
        raise InputError("memory_estimate: attention maps take no moments, and next to no memory.")

    def _select(
        self, group: DependencyGroup, view: GroupView, n_keep: int | None, round_to: int | None
    ) -> ChannelSelection | None:
        return None
