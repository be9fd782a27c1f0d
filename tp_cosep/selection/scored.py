"""Any importance of Torch-Pruning in a selector's place: the components with the highest scores are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.errors import InputError
from tp_cosep.functional.ranking import heads_by_scores, select_by_scores
from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.graph.groups import GroupView, module_names, read_group
from tp_cosep.graph.heads import heads_of
from tp_cosep.graph.protocols import DependencyGroup
from tp_cosep.utils.data import described

__all__ = ["ScoreSelector", "name_of"]


class ScoreSelector:
    """What :class:`tp_cosep.CoSePPruner` asks of a selector, answered by an importance.

    Components are scored by the mean over their channels, and heads by the mean over theirs, as stock pruners do; those
    with the highest scores are kept. Scores are compared between groups as they come, so with the normalisation that
    the importance itself applies, as a stock pruner does with ``global_pruning``. There is no count of its own.

    Args:
        importance: ``importance(group)`` gives ``[len(group[0].idxs)]`` scores, higher = keep, or ``None`` to leave the
            group alone.

    Attributes:
        importance: The importance.

    Raises:
        InputError: If it cannot be called.
    """

    observe = "outputs"
    ranks_channels = True
    is_fitted = True
    is_automatic = False
    scope = "layer"
    layers: Sequence[str] = ()
    channel_dims: Mapping[type[nn.Module], int] = {}

    def __init__(self, importance: Callable[[Any], Tensor | None]) -> None:
        if not callable(importance) or isinstance(importance, type):
            raise InputError(
                "CoSePPruner: expected a selector, such as CoSePSelector(), or a Torch-Pruning importance, such as "
                f"tp.importance.GroupMagnitudeImportance(), got {described(importance)}."
            )
        self.importance = importance

    @property
    def unmeasured(self) -> str:
        """Why a group has no selection."""
        return f"{name_of(self.importance)} gives it no scores"

    def select(
        self, group: DependencyGroup, *, view: GroupView, n_keep: int | None = None, round_to: int | None = None
    ) -> ChannelSelection | None:
        """Keep the components of a group with the highest scores.

        Args:
            group: A ``tp.Group`` with all its channels.
            view: The group as :func:`tp_cosep.graph.groups.read_group` describes it.
            n_keep: Number of components to keep; all by default.
            round_to: Keep a multiple of this many, rounded down as by stock pruners, but not to none.

        Returns:
            The selection among all channels of the group's root, with the scores of the importance; ``None`` if it
            gives none.

        Raises:
            InputError: If the importance fails, or gives no finite scores for all channels.
        """
        scores = self._scores(group)
        if scores is None:
            return None
        n = view.n_components
        k = n if n_keep is None else n_keep
        if round_to is not None:
            k = max(k // round_to * round_to, min(round_to, n))
        selection = select_by_scores(_means(scores, view), n_keep=k)
        return replace(selection.expanded(view.component_of), scores=scores)

    def select_heads(
        self,
        groups: Sequence[DependencyGroup],
        num_heads: Mapping[nn.Module, int],
        *,
        n_keep: Sequence[int] | int | None = None,
    ) -> list[ChannelSelection | None]:
        """Keep the attention heads with the highest mean scores.

        Where several query heads share keys and values, the same number is kept for each key-value head.

        Args:
            groups: Attention groups with all their channels, rooted at the layer that consumes them.
            num_heads: Number of heads by attention layer.
            n_keep: Heads to keep of each group; all by default.

        Returns:
            For every group the selection among the channels of its root, or ``None`` if it has no scores.
        """
        counts = n_keep if isinstance(n_keep, Sequence) else [n_keep] * len(groups)
        found: list[ChannelSelection | None] = []
        for group, count in zip(groups, counts, strict=True):
            n, n_shared = heads_of(group, num_heads)
            scores = self._scores(group)
            if scores is None:
                found.append(None)
                continue
            view = read_group(group, n_heads=n)
            selection = heads_by_scores(_means(scores, view), n_sharing=n // n_shared, n_keep=count)
            found.append(replace(selection.expanded(view.component_of), scores=scores))
        return found

    def scores(
        self, group: DependencyGroup, num_heads: Mapping[nn.Module, int], selection: ChannelSelection | None
    ) -> Tensor | None:
        """Scores of a group's channels, as the importance gives them; ``None`` if it gives none."""
        return None if selection is None else selection.scores

    def losses(self, view: GroupView, selection: ChannelSelection) -> Tensor:
        """What removing components loses, for the allocation of a target.

        Args:
            view: The group.
            selection: What :meth:`select` gave for it.

        Returns:
            ``[components]`` float64 ≥ 0, ascending: the scores; 0 for those below.
        """
        return _means(selection.scores, view).clamp(min=0).sort().values

    def layers_of(self, view: GroupView) -> tuple[str, ...]:
        """Names of the layers that create a group's channels."""
        return tuple(m.name for m in view.producers)

    def embedding(self, view: GroupView, selection: ChannelSelection) -> None:
        """Nothing: scores place no channel beside another."""

    def remark(self, view: GroupView) -> str:
        """Nothing."""
        return ""

    def _scores(self, group: DependencyGroup) -> Tensor | None:
        """``[channels]`` float64 on the CPU."""
        name, which = module_names(group).get(group[0].dep.target.module, "?"), name_of(self.importance)
        try:
            scores = self.importance(group)
        except Exception as error:
            raise InputError(
                f"layer {name!r}: {which} failed to score its group ({type(error).__name__}: {error}); an importance "
                "that reads gradients needs a loss.backward() before every step()."
            ) from error
        if scores is None:
            return None
        n = len(group[0].idxs)
        if not isinstance(scores, Tensor):
            came = described(scores)
        elif scores.shape != (n,):
            came = f"shape {tuple(scores.shape)}"
        elif not torch.isfinite(scores).all():
            came = "NaN or infinite ones"
        else:
            return scores.detach().to("cpu", torch.float64)
        raise InputError(f"layer {name!r}: expected {which} to give finite scores of shape ({n},), got {came}.")


def _means(scores: Tensor, view: GroupView) -> Tensor:
    """``[components]``, the mean scores of their channels."""
    sums = torch.zeros(view.n_components, dtype=torch.float64).index_add_(0, view.component_of, scores)
    return sums / view.component_of.bincount()


def name_of(importance: object) -> str:
    """The name of an importance: that of its class, or of the function."""
    return getattr(importance, "__name__", None) or type(importance).__name__
