"""The members of Torch-Pruning's graphs and groups that are used here; the library itself has no types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

__all__ = ["Dependency", "DependencyGraph", "DependencyGroup", "GroupItem", "Handler", "LayerPruner", "Node"]

#: A method of a :class:`LayerPruner` that removes channels of a layer; it also says on which side.
Handler = Callable[..., Any]


class Node(Protocol):
    """A layer, a parameter outside of layers, or an operation.

    Attributes:
        module: The layer or parameter.
        type: A member of ``torch_pruning.ops.OPTYPE``.
        inputs: The nodes whose outputs it reads.
        outputs: The nodes that read its output.
    """

    module: Any
    type: Any
    inputs: Sequence[Node]
    outputs: Sequence[Node]


class Dependency(Protocol):
    """One layer of a group.

    Attributes:
        target: The layer's node.
        handler: What prunes it.
        index_mapping: How its channels follow from those of the layer that entails it.
    """

    target: Node
    handler: Handler
    index_mapping: Sequence[Any]


class GroupItem(Protocol):
    """A pair ``(dep, idxs)``: one layer of a group, and the channels of it that are removed.

    Attributes:
        root_idxs: The root channel of each of them; ``None`` where there is none.
    """

    @property
    def dep(self) -> Dependency:
        """The layer."""
        ...

    @property
    def idxs(self) -> list[int]:
        """Its channels."""
        ...

    root_idxs: Sequence[int | None]


class DependencyGroup(Protocol):
    """A ``torch_pruning`` group: the layers that lose channels together, its root first.

    Attributes:
        prune: Removes the channels.
    """

    _DG: Any  # a DependencyGraph, or None if the group was made by hand
    prune: Callable[..., None]

    def __getitem__(self, i: int) -> GroupItem: ...

    def __setitem__(self, i: int, item: tuple[Dependency, list[int]]) -> None: ...

    def __iter__(self) -> Iterator[tuple[Dependency, list[int]]]: ...


class LayerPruner(Protocol):
    """What removes channels of one type of layer."""

    prune_out_channels: Handler
    prune_in_channels: Handler

    def get_out_channel_groups(self, layer: nn.Module) -> int:
        """Number of channel groups of a layer's outputs."""
        ...

    def get_in_channel_groups(self, layer: nn.Module) -> int:
        """Number of channel groups of a layer's inputs."""
        ...


class DependencyGraph(Protocol):
    """A ``torch_pruning.DependencyGraph`` that was built.

    Attributes:
        model: The model that was traced.
        module2node: Node by layer or parameter.
    """

    model: nn.Module
    module2node: Mapping[Any, Node]
    _module2name: Mapping[nn.Module, str]

    def get_pruner_of_module(self, layer: nn.Module) -> Any:
        """The :class:`LayerPruner` of a layer; ``None`` for operations and parameters."""
        ...

    def get_pruning_group(self, layer: nn.Module, handler: Handler, idxs: Sequence[int]) -> DependencyGroup:
        """The group that removes channels of a layer."""
        ...

    def get_all_groups(
        self, *, ignored_layers: list[nn.Module], root_module_types: list[type]
    ) -> Iterable[DependencyGroup]:
        """All groups of the model."""
        ...

    def check_pruning_group(self, group: DependencyGroup) -> bool:
        """Whether every layer of a group keeps a channel."""
        ...

    def get_out_channels(self, layer: nn.Module) -> int:
        """Number of output channels."""
        ...

    def get_in_channels(self, layer: nn.Module) -> int:
        """Number of input channels."""
        ...

    def is_out_channel_pruning_fn(self, handler: Handler) -> bool:
        """Whether a handler removes output channels."""
        ...

    def is_in_channel_pruning_fn(self, handler: Handler) -> bool:
        """Whether a handler removes input channels."""
        ...
