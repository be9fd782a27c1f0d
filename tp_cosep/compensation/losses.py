"""The inputs and outputs that consumers lose with a group, and why some of its consumers are not refitted."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

from torch import nn

from tp_cosep.compensation.refit import ConsumerState, Refit
from tp_cosep.errors import InputError
from tp_cosep.graph.groups import DependencyGroup, graph_of, module_names
from tp_cosep.graph.patches import has_computed_weight, patches_of
from tp_cosep.graph.tying import tied_parameters

__all__ = ["check_measured", "with_lost_inputs", "with_lost_outputs"]


def check_measured(group: DependencyGroup, model: nn.Module, consumers: Mapping[nn.Module, ConsumerState]) -> None:
    """Refuse groups of other layers than those that were measured.

    Raises:
        InputError: If the group is of another model, or a measured layer was replaced.
    """
    if graph_of(group).model is not model:
        raise InputError(
            "Compensator: expected a group of the model that was measured, got one of another (a copy is another "
            "model); make a compensator of the model that is pruned."
        )
    layers = {name: layer for layer, name in module_names(group).items()}
    for layer, consumer in consumers.items():
        if layers.get(consumer.name) is not layer:
            raise InputError(f"layer {consumer.name!r}: it is not the one that was measured; call fit() again.")


def with_lost_outputs(
    group: DependencyGroup, consumers: Mapping[nn.Module, ConsumerState]
) -> dict[nn.Module, ConsumerState]:
    """All consumers, with the outputs that each of them loses with a group."""
    updated, graph = dict(consumers), graph_of(group)
    for dep, idxs in group:
        consumer = updated.get(dep.target.module)
        if consumer is not None and graph.is_out_channel_pruning_fn(dep.handler):
            updated[dep.target.module] = replace(consumer, losing_outputs=consumer.losing_outputs | set(idxs))
    return updated


def with_lost_inputs(
    group: DependencyGroup,
    model: nn.Module,
    consumers: Mapping[nn.Module, ConsumerState],
    attention: Set[nn.Module],
) -> tuple[dict[nn.Module, ConsumerState], list[Refit]]:
    """The consumers of a group, with the inputs that each of them loses.

    Args:
        group: A group of the model.
        model: The model.
        consumers: All consumers that were measured, by layer.
        attention: The query, key and value layers of the model.

    Returns:
        The consumers of the group that can be refitted, by layer; and a record of each one that cannot.

    Raises:
        InputError: If a layer was pruned without the compensator.
    """
    graph, names = graph_of(group), module_names(group)
    tied = {model.get_submodule(n.rpartition(".")[0]) for found in tied_parameters(model) for n in found}
    inputs: dict[nn.Module, set[int]] = {}
    left_alone = []
    for dep, idxs in group:
        layer = dep.target.module
        if layer not in names or not idxs:
            continue
        is_in, is_out = (f(dep.handler) for f in (graph.is_in_channel_pruning_fn, graph.is_out_channel_pruning_fn))
        consumer = consumers.get(layer)
        if is_out and layer in attention:
            reason = "products of queries and keys are not refitted, only consumers of the values"
            left_alone.append(Refit(names[layer], len(idxs), reason=reason))
        # A layer that loses both works channel by channel, except for attention.
        if not is_in or (is_out and not isinstance(layer, nn.MultiheadAttention)):
            continue
        if consumer is not None and consumer.moments.n_rows and layer not in tied:
            inputs.setdefault(layer, set()).update(idxs)
        elif reason := _why_not(layer, is_measured=consumer is not None, is_tied=layer in tied):
            left_alone.append(Refit(names[layer], len(idxs), reason=reason))
    return {layer: _losing(consumers[layer], idxs) for layer, idxs in inputs.items()}, left_alone


def _losing(consumer: ConsumerState, idxs: Set[int]) -> ConsumerState:
    """A consumer that is about to lose some of its layer's inputs."""
    patches = consumer.patches
    if patches.n_channels != len(consumer.inputs):
        raise InputError(
            f"layer {consumer.name!r}: measured with {len(consumer.inputs)} input channels, it has "
            f"{patches.n_channels}; call fit() again after pruning without the compensator."
        )
    return replace(consumer, losing_inputs=frozenset(i // patches.repeat for i in idxs))


def _why_not(layer: nn.Module, *, is_measured: bool, is_tied: bool) -> str:
    """Why a consumer is not refitted; empty for a layer that has no weights to refit."""
    if isinstance(layer, nn.Embedding) or next(layer.parameters(), None) is None:
        return ""
    if is_tied:
        return "another layer has the same weight"
    if is_measured:
        return "the calibration data never reached it"
    if patches_of(layer) is not None:
        return "not measured: it was not part of any group when fit() was called"
    if has_computed_weight(layer):
        return "its weight is computed from other parameters"
    return f"a {type(layer).__name__} is not refitted"
