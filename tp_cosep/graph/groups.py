"""Views of Torch-Pruning groups: the producers and consumers of a group's channels, and the components to select from.

A group is pruned along one dimension, that of its root. Selection is among *components*, usually single channels.
Pruners average scores over *channel groups* (grouped convolution, GroupNorm, attention heads) so that all of them
keep the same number of channels; a component is then a *slot*, the channels at one position of every channel group.
Channels that Torch-Pruning removes together since a ``chunk`` or ``split`` joined them (gated units) are one
component, too. Where whole heads are pruned, a component is a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_pruning.dependency.group import Group
from torch_pruning.dependency.index_mapping import _ConcatIndexMapping, _SliceIndexMapping, _SplitIndexMapping
from torch_pruning.ops import OPTYPE

from tp_cosep.errors import InputError
from tp_cosep.graph.protocols import DependencyGraph, DependencyGroup
from tp_cosep.utils.data import described

__all__ = [
    "DependencyGraph",
    "DependencyGroup",
    "GroupView",
    "Member",
    "full_group",
    "graph_of",
    "is_output",
    "l1_norms",
    "module_names",
    "prunable_groups",
    "read_group",
    "side_of",
]


@dataclass(frozen=True)
class Member:
    """A layer that loses channels with the group.

    Attributes:
        name: The module's name in the model.
        layer: The module.
        n_channels: Number of its channels, on the side that the group is on.
        rows: ``[m]`` int64, ascending: the channels of this layer that belong to the group.
        channels: ``[m]`` int64, the root channel of each row.
        components: ``[m]`` int64, the component of each row; a component may have several rows.
    """

    name: str
    layer: nn.Module
    n_channels: int
    rows: Tensor
    channels: Tensor
    components: Tensor


@dataclass(frozen=True)
class GroupView:
    """A group as selection sees it.

    Attributes:
        name: Name of the root module.
        root: The root module; pruning ratios are given by it.
        side: Side of the root that is pruned: its ``"out"`` or its ``"in"`` channels.
        component_of: ``[n_channels]`` int64, the component of every channel of the root.
        n_channel_groups: Number of channel groups; 1 if there are none.
        producers: The layers that lose output channels, in the group's order, and the normalisations that follow them.
        consumers: The layers that lose input channels, depthwise convolutions included.
        unit: ``"channel"``, or ``"head"`` if components are whole attention heads. A component's profile
            concatenates those of its channels; a head's is their mean.
    """

    name: str
    root: nn.Module
    side: str
    component_of: Tensor
    n_channel_groups: int
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    unit: str = "channel"

    @property
    def n_channels(self) -> int:
        """Number of channels of the root."""
        return len(self.component_of)

    @property
    def n_components(self) -> int:
        """Number of components to select from."""
        return int(self.component_of.max()) + 1

    def observed(self, observe: str) -> tuple[Member, ...]:
        """The layers whose moments describe the channels, see :data:`tp_cosep.calibration.statistics.OBSERVED`."""
        return self.producers if observe == "outputs" else self.consumers

    def channels_of(self, components: Iterable[int]) -> list[int]:
        """Root channels of the given components, ascending."""
        selected = torch.tensor([*components], dtype=torch.int64)
        channels: list[int] = torch.isin(self.component_of, selected).nonzero()[:, 0].tolist()
        return channels


def graph_of(group: DependencyGroup) -> DependencyGraph:
    """The dependency graph of a group.

    Returns:
        The graph.

    Raises:
        InputError: If the argument is no group, or a group made by hand.
    """
    graph: DependencyGraph | None = getattr(group, "_DG", None)
    if graph is None:
        came = "one made by hand" if isinstance(group, Group) else described(group)
        raise InputError(
            f"group: expected a group of a DependencyGraph (get_pruning_group, get_all_groups), got {came}."
        )
    return graph


def module_names(group: DependencyGroup) -> Mapping[nn.Module, str]:
    """Names of all modules of a group's model.

    Returns:
        Name by module.

    Raises:
        InputError: If the argument is no group, or a group made by hand.
    """
    return graph_of(group)._module2name


def full_group(group: DependencyGroup) -> DependencyGroup:
    """The group with all channels of its root, for a group with any of them."""
    graph = graph_of(group)
    dep = group[0].dep
    get = graph.get_out_channels if graph.is_out_channel_pruning_fn(dep.handler) else graph.get_in_channels
    n = get(dep.target.module)
    if len(group[0].idxs) == n:
        return group
    return graph.get_pruning_group(dep.target.module, dep.handler, list(range(n)))


def prunable_groups(
    graph: DependencyGraph, ignored_layers: Iterable[nn.Module], root_module_types: Iterable[type]
) -> Iterable[DependencyGroup]:
    """All groups that a pruner with these ``ignored_layers`` and ``root_module_types`` visits."""
    ignored = [m for layer in ignored_layers if isinstance(layer, nn.Module) for m in layer.modules()]
    return graph.get_all_groups(ignored_layers=ignored, root_module_types=list(root_module_types))


def is_output(group: DependencyGroup) -> bool:
    """Whether the model returns channels of the group: one of its producers has no downstream layer."""
    return any(
        dep.target.type == OPTYPE.OUTPUT or not dep.target.outputs
        for dep, _ in group
        if group._DG.is_out_channel_pruning_fn(dep.handler)
    )


def side_of(group: DependencyGroup) -> str:
    """The side of its root that a group prunes: ``"out"`` or ``"in"``."""
    return "out" if group._DG.is_out_channel_pruning_fn(group[0].dep.handler) else "in"


def read_group(
    group: DependencyGroup,
    in_channel_groups: Mapping[nn.Module, int] | None = None,
    out_channel_groups: Mapping[nn.Module, int] | None = None,
    n_heads: int | None = None,
) -> GroupView:
    """View a group: its producers, its consumers, and how their channels correspond.

    Args:
        group: A ``tp.Group``; one with some of the root's channels stands for all of them.
        in_channel_groups: User-specified channel groups of inputs by layer, besides those of convolutions, GroupNorms
            and attention layers.
        out_channel_groups: User-specified channel groups of outputs by layer.
        n_heads: Number of attention heads to select from, each a block of consecutive channels of the root; by
            default the selection is among channels.

    Returns:
        The view.

    Raises:
        InputError: If the number of channels is not a multiple of the number of channel groups or heads, or a layer
            has fewer channels than the group removes from it.
    """
    names = module_names(group)
    group = full_group(group)
    root, n_channels = group[0].dep.target.module, len(group[0].idxs)
    channels = torch.arange(n_channels)
    if n_heads is None:
        n_groups, whose = _n_channel_groups(group, in_channel_groups or {}, out_channel_groups or {})
        _check_divides(n_channels, n_groups, names.get(whose, "?"), "channel groups")
        component_of = _joined(group, channels % (n_channels // n_groups))
    else:
        n_groups = 1
        _check_divides(n_channels, n_heads, names.get(root, "?"), "heads")
        component_of = channels // (n_channels // n_heads)
    producers, consumers = [], []
    for i, (dep, idxs) in enumerate(group):
        layer = dep.target.module
        if layer not in names:
            continue
        is_out, is_in = (
            f(dep.handler) for f in (group._DG.is_out_channel_pruning_fn, group._DG.is_in_channel_pruning_fn)
        )
        member = _member(group, layer, names[layer], idxs, group[i].root_idxs, component_of, is_out=is_out)
        if is_out:
            producers.append(member)
        if is_in and not isinstance(layer, nn.Embedding):  # an embedding's inputs are indices of words
            consumers.append(member)
    unit = "channel" if n_heads is None else "head"
    name = names.get(root, "?")
    return GroupView(name, root, side_of(group), component_of, n_groups, tuple(producers), tuple(consumers), unit)


def _check_divides(n: int, n_parts: int, name: str, what: str) -> None:
    if n_parts < 1 or n % n_parts:
        raise InputError(f"layer {name!r}: expected a number of channels divisible by its {n_parts} {what}, got {n}.")


def _member(
    group: DependencyGroup,
    layer: nn.Module,
    name: str,
    idxs: Sequence[int],
    root_idxs: Sequence[int | None],
    component_of: Tensor,
    *,
    is_out: bool,
) -> Member:
    graph = group._DG
    name = getattr(graph, "_param_to_name", {}).get(layer, name) if isinstance(layer, nn.Parameter) else name
    n = (graph.get_out_channels if is_out else graph.get_in_channels)(layer)
    if n is not None and len(idxs):
        _check_within(max(idxs), n, name)
    # A root index of None marks a position that no root channel maps to.
    pairs = sorted((row, root) for row, root in zip(idxs, root_idxs, strict=True) if root is not None)
    rows = torch.tensor([row for row, _ in pairs], dtype=torch.int64)
    channels = torch.tensor([root for _, root in pairs], dtype=torch.int64)
    return Member(name, layer, n or len(idxs), rows, channels, component_of[channels])


def _check_within(highest: int, n: int, name: str) -> None:
    if highest >= n:
        raise InputError(
            f"layer {name!r}: expected {highest + 1} channels or more, as the layers joined with it have, got {n}: "
            "something is broadcast between them, or reshaped in a way that Torch-Pruning misreads; put one of them "
            "into ignored_layers, or let CoSePPruner skip such groups with on_failure='skip'."
        )


def _n_channel_groups(
    group: DependencyGroup,
    in_channel_groups: Mapping[nn.Module, int],
    out_channel_groups: Mapping[nn.Module, int],
) -> tuple[int, nn.Module]:
    """The largest number of channel groups of the group's layers, and the layer that has it."""
    graph, n_groups, whose = group._DG, 1, group[0].dep.target.module
    for dep, _ in group:
        layer = dep.target.module
        is_out = graph.is_out_channel_pruning_fn(dep.handler)
        n = (out_channel_groups if is_out else in_channel_groups).get(layer)
        if n is None:
            n = _own_channel_groups(graph, layer, is_out=is_out)
        if n > n_groups:
            n_groups, whose = n, layer
    return n_groups, whose


def _own_channel_groups(graph: DependencyGraph, layer: nn.Module, *, is_out: bool) -> int:
    if isinstance(layer, nn.MultiheadAttention):
        return int(layer.num_heads)  # its heads are blocks of the embedding, all of which lose the same number
    pruner = graph.get_pruner_of_module(layer)
    is_depthwise = getattr(layer, "groups", 1) == getattr(layer, "out_channels", None)
    if pruner is None or is_depthwise:
        return 1
    n: int = pruner.get_out_channel_groups(layer) if is_out else pruner.get_in_channel_groups(layer)
    return n


def _joined(group: DependencyGroup, component_of: Tensor) -> Tensor:
    """Merge the components of channels that Torch-Pruning removes together only, numbered in order of appearance.

    The group of all channels does not show which of them are joined. A group of some of them does: it contains more
    channels of the root than requested.

    Returns:
        ``[channels]``, the component of every channel of the root.
    """
    if not _may_join(group):
        return component_of
    n = len(component_of)
    generator = torch.Generator().manual_seed(0)
    # A random half separates two joined channels with probability ½, and a chunk joins dozens of pairs.
    halves = (range(n // 2), torch.randperm(n, generator=generator)[: n // 2].sort().values.tolist())
    if all(_removed_with(group, half) == set(half) for half in halves):
        return component_of
    label = component_of.tolist()
    for channel in range(n):
        with_it = _removed_with(group, [channel]) if label[channel] == component_of[channel] else {channel}
        merged = {label[other] for other in with_it}
        if len(merged) > 1:
            lowest = min(merged)
            label = [lowest if x in merged else x for x in label]
    joined: Tensor = torch.unique(torch.tensor(label), return_inverse=True)[1]
    return joined


def _may_join(group: DependencyGroup) -> bool:
    """Whether a group splits or slices channels, or reverses a concatenation, so that its paths may join channels."""
    for dep, _ in group:
        for mapping in dep.index_mapping:
            is_cut = isinstance(mapping, (_SplitIndexMapping, _SliceIndexMapping))
            if is_cut or (isinstance(mapping, _ConcatIndexMapping) and mapping.reverse):
                return True
    return False


def _removed_with(group: DependencyGroup, channels: Iterable[int]) -> set[int]:
    """Channels of the root that are removed with the given ones."""
    dep, n = group[0].dep, len(group[0].idxs)
    removed = set(group._DG.get_pruning_group(dep.target.module, dep.handler, list(channels))[0].idxs)
    _check_within(max(removed), n, module_names(group).get(dep.target.module, "?"))
    return removed


def l1_norms(view: GroupView) -> Tensor:
    """L1 norm of the weights that produce each component, summed over the producers.

    Returns:
        ``[components]`` float64, on the CPU.
    """
    norms = torch.zeros(view.n_components, dtype=torch.float64)
    for member in view.producers:
        weight = getattr(member.layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2:
            continue
        weight = weight.detach()
        if isinstance(member.layer, nn.Embedding):  # [entries, out]
            weight = weight.T
        if getattr(member.layer, "transposed", False):  # [in, out / groups, ...] instead of [out, ...]
            groups = getattr(member.layer, "groups", 1)
            weight = weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
        per_row = weight.flatten(1).abs().sum(1, dtype=torch.float64).cpu()
        norms.index_add_(0, member.components, per_row[member.rows])
    return norms
