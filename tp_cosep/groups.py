"""Reading a Torch-Pruning group: which layers create its channels, and how their channels correspond.

A group is pruned along one dimension, its root's. The pruner averages scores over *channel groups*
(grouped convolution, GroupNorm), so that each of them keeps as many channels; what can be chosen
there is a *slot*, the channels at one position of every channel group. Components are slots; without
channel groups every channel is a slot of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_cosep.collect import evaluating
from tp_cosep.errors import InputError

__all__ = [
    "GroupView",
    "Member",
    "frozen_kept",
    "full_group",
    "l1_norms",
    "module_names",
    "prunable_groups",
    "read_group",
    "resolve_layers",
    "resolve_ratios",
    "trace",
    "tracing",
]


@dataclass(frozen=True)
class Member:
    """A layer that loses output channels with the group: one that creates them, or a normalisation behind it.

    Attributes:
        name: The module's name in the model.
        layer: The module.
        n_channels: Its output channels.
        rows: ``[m]`` int64, output channels of this layer that belong to the group.
        components: ``[m]`` int64, the component of each of them; one component may have several rows.
    """

    name: str
    layer: nn.Module
    n_channels: int
    rows: Tensor
    components: Tensor


@dataclass(frozen=True)
class GroupView:
    """What selection has to know of a group.

    Attributes:
        name: Name of the root module.
        root: The root module; the pruner takes ratios by it.
        n_channels: Prunable indices of the root.
        n_channel_groups: Number of channel groups; 1 if there are none.
        members: The layers that lose output channels, in the group's order.
    """

    name: str
    root: nn.Module
    n_channels: int
    n_channel_groups: int
    members: tuple[Member, ...]

    @property
    def n_components(self) -> int:
        """Number of slots to choose from."""
        return self.n_channels // self.n_channel_groups

    def channels_of(self, components: Iterable[int]) -> list[int]:
        """Root channels of some components, ascending."""
        return sorted(c + g * self.n_components for c in components for g in range(self.n_channel_groups))


@contextmanager
def tracing(model: nn.Module) -> Iterator[None]:
    """Let Torch-Pruning trace a model and get the model back as it was, also after an exception.

    It follows the graph that autograd records, in which frozen layers are missing; so everything requires a
    gradient meanwhile. The hooks that an interrupted trace leaves behind are removed.
    """
    hooks = {m: set(m._forward_hooks) for m in model.modules()}
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for m, before in hooks.items():
            for key in set(m._forward_hooks) - before:
                del m._forward_hooks[key]


def trace(model: nn.Module, example_inputs: Any, **options: Any) -> Any:
    """Torch-Pruning's dependency graph of a model, see :func:`tracing`."""
    with tracing(model):
        return tp.DependencyGraph().build_dependency(model, example_inputs=example_inputs, **options)


@contextmanager
def frozen_kept(model: nn.Module) -> Iterator[None]:
    """Keep frozen parameters frozen while pruning replaces them by new ones."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    yield
    parameters = dict(model.named_parameters())
    for name in frozen:
        parameters[name].requires_grad_(False)


def resolve_layers(model: nn.Module, layers: Iterable[Any] | None, where: str) -> list[Any]:
    """Layers given as modules, names, module types or parameters, as modules and parameters of the model.

    A container of the caller's own that holds layers of the model stands for them.

    Returns:
        Modules and parameters.

    Raises:
        InputError: If one of them is not part of the model.
    """
    names = dict(model.named_modules())
    modules, found = set(names.values()), list[Any]()
    for layer in layers or ():
        if isinstance(layer, type):
            found.extend(m for m in modules if isinstance(m, layer))
        elif isinstance(layer, str) and layer in names:
            found.append(names[layer])
        elif isinstance(layer, nn.Parameter) or (isinstance(layer, nn.Module) and layer in modules):
            found.append(layer)
        elif isinstance(layer, nn.Module) and (inside := [m for m in layer.children() if m in modules]):
            found.extend(inside)
        else:
            came = repr(layer) if isinstance(layer, str) else f"a {type(layer).__name__}"
            raise InputError(
                f"{where}: expected modules of the model, their names or types, got {came} that is not part of it."
            )
    return found


def resolve_ratios(model: nn.Module, ratios: Mapping[Any, float] | None) -> dict[Any, float] | None:
    """A ``pruning_ratio_dict`` whose keys are layers or tuples of them, given as for :func:`resolve_layers`.

    Returns:
        The same ratios by module, or ``None`` for ``None``.

    Raises:
        InputError: If a key is not part of the model.
    """
    if ratios is None:
        return None
    resolved: dict[Any, float] = {}
    for layers, ratio in ratios.items():
        together = isinstance(layers, tuple)
        found = resolve_layers(model, layers if together else (layers,), "pruning_ratio_dict")
        resolved.update({tuple(found): ratio} if together else dict.fromkeys(found, ratio))
    return resolved


def module_names(group: Any) -> Mapping[nn.Module, str]:
    """Names of all modules of the model that a group was traced in.

    Returns:
        Name by module.

    Raises:
        InputError: If the group does not know its model.
    """
    graph = group._DG
    if graph is None:
        raise InputError(
            "group: expected a group of a DependencyGraph (get_pruning_group, get_all_groups), got one made by hand."
        )
    names: Mapping[nn.Module, str] = graph._module2name
    return names


def full_group(group: Any) -> Any:
    """The group with all channels of its root: groups may be asked for with a part of them."""
    graph, dep = group._DG, group[0].dep
    get = graph.get_out_channels if graph.is_out_channel_pruning_fn(dep.handler) else graph.get_in_channels
    n = get(dep.target.module)
    if len(group[0].idxs) == n:
        return group
    return graph.get_pruning_group(dep.target.module, dep.handler, list(range(n)))


def prunable_groups(
    graph: Any, ignored_layers: Iterable[nn.Module], root_module_types: Iterable[type]
) -> Iterable[Any]:
    """All groups that a pruner with these ``ignored_layers`` and ``root_module_types`` would visit."""
    ignored = [m for layer in ignored_layers if isinstance(layer, nn.Module) for m in layer.modules()]
    groups: Iterable[Any] = graph.get_all_groups(ignored_layers=ignored, root_module_types=list(root_module_types))
    return groups


def read_group(
    group: Any,
    in_channel_groups: Mapping[nn.Module, int] | None = None,
    out_channel_groups: Mapping[nn.Module, int] | None = None,
) -> GroupView:
    """Find the layers that create a group's channels.

    Args:
        group: A ``tp.Group`` with all channels of its root, see :func:`full_group`.
        in_channel_groups: Channel groups that a pruner was told of, by layer, beside those that
            convolutions and GroupNorms have by themselves.
        out_channel_groups: Likewise for outputs.

    Returns:
        The group's layers and how their channels correspond.

    Raises:
        InputError: If the number of channels is not a multiple of the number of channel groups.
    """
    names = module_names(group)
    graph = group._DG
    n_channels = len(group[0].idxs)
    n_groups = _n_channel_groups(group, in_channel_groups or {}, out_channel_groups or {})
    name = names.get(group[0].dep.target.module, "?")
    if n_channels % n_groups:
        raise InputError(
            f"layer {name!r}: expected a number of channels divisible by its {n_groups} channel groups, "
            f"got {n_channels}."
        )
    n_slots = n_channels // n_groups
    members = []
    for i, (dep, idxs) in enumerate(group):
        layer = dep.target.module
        if layer not in names or not graph.is_out_channel_pruning_fn(dep.handler):
            continue
        # A root index of None marks a position that no root channel maps to.
        pairs = [(row, root) for row, root in zip(idxs, group[i].root_idxs, strict=True) if root is not None]
        rows = torch.tensor([row for row, _ in pairs], dtype=torch.int64)
        components = torch.tensor([root % n_slots for _, root in pairs], dtype=torch.int64)
        members.append(Member(names[layer], layer, graph.get_out_channels(layer) or len(idxs), rows, components))
    return GroupView(name, group[0].dep.target.module, n_channels, n_groups, tuple(members))


def _n_channel_groups(
    group: Any, in_channel_groups: Mapping[nn.Module, int], out_channel_groups: Mapping[nn.Module, int]
) -> int:
    graph, n_groups = group._DG, 1
    for dep, _ in group:
        layer = dep.target.module
        pruner = graph.get_pruner_of_module(layer)
        is_out = graph.is_out_channel_pruning_fn(dep.handler)
        told = (out_channel_groups if is_out else in_channel_groups).get(layer)
        is_depthwise = getattr(layer, "groups", 1) == getattr(layer, "out_channels", None)
        if told is None and (pruner is None or is_depthwise):
            continue
        own = pruner.get_out_channel_groups(layer) if is_out else pruner.get_in_channel_groups(layer)
        n_groups = max(n_groups, told if told is not None else own)
    return n_groups


def l1_norms(view: GroupView) -> Tensor:
    """L1 norm of the weights that create each component, summed over the members.

    Returns:
        ``[components]`` float64, on the CPU.
    """
    norms = torch.zeros(view.n_components, dtype=torch.float64)
    for member in view.members:
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
