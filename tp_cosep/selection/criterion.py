"""What a selector has to know of the groups of a model: how their components compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Size, Tensor

from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.graph.groups import GroupView, Member
from tp_cosep.graph.patches import weight_shape

__all__ = ["Criterion", "LayerClasses", "check_weights"]


@dataclass(frozen=True)
class LayerClasses:
    """The class moments of one layer that describe a group.

    Attributes:
        moments: Class moments of the layer.
        rows: ``[m]`` int64, the layer's features that belong to the group.
        components: ``[m]`` int64, the group's component of each of them.
        n_features: Number of the layer's features; several components of ``moments`` in a row may be one of them.
    """

    moments: ClassMoments
    rows: Tensor
    components: Tensor
    n_features: int


class Criterion(Protocol):
    """How the components of groups compare, by the statistics of a fitted selector."""

    def distances(self, view: GroupView) -> Tensor | None:
        """Distances between a group's components.

        Args:
            view: The group.

        Returns:
            ``[components, components]`` float64; ``None`` if no statistics describe the group.
        """

    def head_distances(self, views: Sequence[GroupView]) -> Tensor | None:
        """Distances between the heads of one or more attention groups.

        Args:
            views: Groups whose components are heads.

        Returns:
            ``[heads, heads]`` float64, the heads of all groups one after another; ``None`` if a group has no
            statistics.
        """

    def layers(self, view: GroupView) -> tuple[str, ...]:
        """Names of the layers whose statistics describe a group; none if it has no statistics."""

    def layer_classes(self, view: GroupView) -> list[LayerClasses]:
        """Class moments that describe a group, one entry per layer; none if classes were not observed."""

    def sketched(self, n_pairs: int) -> Criterion:
        """The same with at most so many class pairs, which is cheap and close enough to draw by."""


def check_weights(member: Member, shape: Size | None) -> None:
    """Refuse statistics of a layer that has been pruned since.

    Args:
        member: The layer.
        shape: Shape of its weights when it was observed; ``None`` if it has none.

    Raises:
        InputError: If its weights have another shape now.
    """
    now = weight_shape(member.layer)
    if shape is not None and now != shape:
        raise InputError(
            f"layer {member.name!r}: observed with weights of shape {tuple(shape)}, they are {tuple(now or ())} now; "
            "call fit() again after pruning (iterative_steps: pass loader= to CoSePPruner)."
        )
