"""Backward elimination by what refitted consumers lose."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from torch import nn

from tp_cosep.calibration.statistics import StatisticsSpec
from tp_cosep.errors import InputError
from tp_cosep.functional.selection import ChannelSelection, select_by_elimination, select_channels
from tp_cosep.graph.groups import GroupView
from tp_cosep.graph.protocols import DependencyGroup
from tp_cosep.selection.input_space import InputSpace, Known
from tp_cosep.selection.selector import Selector
from tp_cosep.selection.separability_space import SeparabilitySpace
from tp_cosep.utils.checks import is_number

__all__ = ["ReconstructionSelector"]


class ReconstructionSelector(Selector):
    """Keep the channels from which refitted consumers reconstruct their outputs best.

    A channel is a column of its consumers' inputs. Again and again the channel is eliminated whose loss the consumers,
    refitted by least squares to the rest, feel least (:mod:`tp_cosep.functional.elimination`). An error is measured by
    C + α B: the covariance of a consumer's input, plus α times that of its class means, so that no contrast between
    classes is lost for the sake of mere variance. The number to keep is the guarded knee of the retained variance.

    Attention groups, and channels that no layer consumes by weights, are selected by k-medoids in separability space,
    as :class:`tp_cosep.CoSePSelector` does.

    Args:
        class_weight: α ≥ 0. With 0 no labels are required, and attention groups cannot be selected.
        spatial: Cells per dimension that maps are pooled to for class means; ``None`` for every pixel.
        knee: ``"guarded"``, ``"strongest"`` or ``"first"``, see :func:`tp_cosep.functional.knee.find_knee`.
        keep: In place of the knee's count: an integer for that many channels of every group (at most all it has), or a
            float in (0, 1] for that share of it, rounded to the nearest and at least one channel.
        memory_budget: Bytes that the statistics may take; :meth:`fit` refuses to begin if it would take more.
        scope: Where whole heads are selected: ``"layer"``, or ``"model"`` for all heads of the model together, with at
            least one kept in every layer.
        channel_dims: Further types of layers to observe, such as your own, and the dimension of their output that holds
            the channels.

    Attributes:
        statistics: Second moments and class means of consumers' inputs; empty before :meth:`fit`.

    Raises:
        InputError: If an option is unknown or out of range.

    Example:
        >>> import torch
        >>> import torch_pruning as tp
        >>> model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 3))
        >>> x, y = torch.randn(40, 1, 8, 8), torch.arange(40) % 3
        >>> selector = ReconstructionSelector(keep=0.25).fit(model, [(x, y)])
        >>> group = tp.DependencyGraph().build_dependency(model, x[:1]).get_pruning_group(
        ...     model[0], tp.prune_conv_out_channels, list(range(12))
        ... )
        >>> len(selector.select(group).keep_idxs)
        3
    """

    def __init__(
        self,
        *,
        class_weight: float = 3.0,
        spatial: int | str | None = 4,
        knee: str = "guarded",
        keep: int | float | None = None,
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
        if not (is_number(class_weight) and 0 <= class_weight < inf):
            raise InputError(
                f"{type(self).__name__}: expected class_weight to be a finite number ≥ 0, got {class_weight!r}."
            )
        self.class_weight = class_weight
        self.spatial = spatial
        self._known: dict[tuple[str, str], Known] = {}

    @property
    def criterion(self) -> InputSpace:
        """The space of consumers' inputs, and separability space for what it does not cover."""
        fallback = SeparabilitySpace(self.statistics, channel_dims=self.channel_dims)
        return InputSpace(self.statistics, self.class_weight, self.num_heads, fallback, self._known)

    @property
    def _spec(self) -> StatisticsSpec:
        return StatisticsSpec(
            inputs=True,
            input_classes=self.class_weight > 0,
            spatial=self.spatial,
            channel_dims=self.channel_dims,
            num_heads=self.num_heads,
            memory_budget=self.memory_budget,
        )

    def _hold(self, statistics: Any) -> None:
        super()._hold(statistics)
        self._known.clear()

    def _select(
        self, group: DependencyGroup, view: GroupView, n_keep: int | None, round_to: int | None
    ) -> ChannelSelection | None:
        space = self.criterion
        if space.covers(view):
            elimination, distances = space.eliminated(view)
            return select_by_elimination(elimination, distances, n_keep=n_keep, knee=self.knee, round_to=round_to)
        found = space.distances(view)
        if found is None:
            return None
        return select_channels(found, n_keep=n_keep, round_to=round_to, **self._rules)
