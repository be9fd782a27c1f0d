"""Multiply-accumulates and parameters of a model, as functions of how much every group keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_cosep.graph.consumers import on_inputs
from tp_cosep.graph.groups import GroupView
from tp_cosep.graph.patches import Patches
from tp_cosep.utils.data import device_of, evaluating
from tp_cosep.utils.timing import layer_times

__all__ = ["UNITS", "Costs", "costs_beside", "layer_costs", "measure_costs"]

#: What costs are counted in.
UNITS = ("macs", "params", "latency")


@dataclass
class _Part:
    """Something that costs ``amount`` times the share of inputs and of outputs that is left."""

    amount: float
    inputs: dict[int, float] = field(default_factory=dict)
    outputs: dict[int, float] = field(default_factory=dict)


class Costs:
    """What a model costs while its groups lose components one by one.

    A layer that loses inputs and outputs costs ``amount · (1 − Σ_g r_g a_g) · (1 − Σ_g r_g b_g)``, with r_g the number
    of components that group g has lost and a_g, b_g the share of the layer's inputs and outputs that one of them is.

    Args:
        parts: What the cost is the sum of.
        n_groups: Number of groups.

    Attributes:
        total: The cost as it is now.
    """

    def __init__(self, parts: Sequence[_Part], n_groups: int) -> None:
        self._amounts = torch.tensor([p.amount for p in parts], dtype=torch.float64)
        # Inputs first, then outputs: shares that are left, and by group whom a component of it is a share of.
        self._left = torch.ones(2, len(parts), dtype=torch.float64)
        self._touched: list[tuple[Tensor, Tensor]] = []
        for g in range(n_groups):
            sides = [(p.inputs.get(g, 0.0), p.outputs.get(g, 0.0)) for p in parts]
            at = torch.tensor([i for i, share in enumerate(sides) if any(share)], dtype=torch.int64)
            self._touched.append((at, torch.tensor(sides, dtype=torch.float64).reshape(-1, 2)[at].T))
        self.total = float(self._amounts.sum())

    def saving(self, group: int, n: int = 1) -> float:
        """What would be saved if a group lost n components more."""
        at, shares = self._touched[group]
        left = self._left[:, at]
        return float((self._amounts[at] * (left.prod(0) - (left - n * shares).prod(0))).sum())

    def remove(self, group: int, n: int = 1) -> None:
        """Let a group lose n components more."""
        self.total -= self.saving(group, n)
        at, shares = self._touched[group]
        self._left[:, at] -= n * shares


def measure_costs(model: nn.Module, run: Callable[[], Any], views: Sequence[GroupView], unit: str) -> Costs:
    """The costs of a model, as it is, in terms of its groups.

    Args:
        model: The model.
        run: Runs it on example inputs.
        views: The groups that may lose components.
        unit: ``"macs"``: multiply-accumulates of convolutions, linear, attention and recurrent layers for one sample;
            products of activations with each other, normalisation and activation functions are not counted.
            ``"params"``: all parameters. ``"latency"``: seconds that layers take on ``run``'s inputs, measured one by
            one and taken to shrink as their inputs and outputs do: what a step saves beside others, not what is left.

    Returns:
        Costs, nothing removed yet.
    """
    shares: dict[Any, tuple[dict[int, float], dict[int, float]]] = {}
    for g, view in enumerate(views):
        for side, members in enumerate((view.consumers, view.producers)):
            for member in members:
                by_group = shares.setdefault(member.layer, ({}, {}))[side]
                by_group[g] = by_group.get(g, 0.0) + len(member.rows) / (member.n_channels * view.n_components)
    parts = _params(model, set(shares)) if unit == "params" else {"macs": _macs, "latency": _seconds}[unit](model, run)
    for layer, part, has_inputs in parts:
        inputs, outputs = shares.get(layer, ({}, {}))
        part.outputs = outputs
        if has_inputs and not _is_depthwise(layer):
            part.inputs = inputs
    return Costs([part for _, part, _ in parts], len(views))


def layer_costs(model: nn.Module, run: Callable[[], Any]) -> dict[str, dict[str, int]]:
    """What every layer of a model costs.

    Args:
        model: The model.
        run: Runs it on example inputs.

    Returns:
        By unit, see :data:`UNITS`: multiply-accumulates by the name of the layer, in the order in which the layers run;
        and parameters by the name of the module that has them, or by their own if that is the model itself.
    """
    names = {layer: name for name, layer in model.named_modules()}
    macs: dict[str, int] = {}
    for layer, part, _ in _macs(model, run):
        macs[names[layer]] = macs.get(names[layer], 0) + round(part.amount)
    params: dict[str, int] = {}
    for name, p in model.named_parameters():
        owner = name.rpartition(".")[0] or name
        params[owner] = params.get(owner, 0) + p.numel()
    return {"macs": macs, "params": params}


def costs_beside(
    known: Mapping[str, Mapping[str, tuple[int, int]]],
    before: Mapping[str, Mapping[str, int]],
    after: Mapping[str, Mapping[str, int]],
) -> dict[str, dict[str, tuple[int, int]]]:
    """Costs before and after side by side, by unit and layer.

    Args:
        known: What an earlier step found; what a layer cost before that step is kept.
        before: Of this step, see :func:`layer_costs`.
        after: What they cost after it; a layer that was removed costs nothing.

    Returns:
        Pairs of costs.
    """
    return {
        unit: {name: (known.get(unit, {}).get(name, (n, n))[0], after[unit].get(name, 0)) for name, n in layers.items()}
        for unit, layers in before.items()
    }


def _is_depthwise(layer: Any) -> bool:
    """Whether every output consumes a single input, so that its inputs cost nothing beside its outputs."""
    return isinstance(layer, _ConvNd) and layer.groups == layer.in_channels == layer.out_channels


def _macs(model: nn.Module, run: Callable[[], Any]) -> list[tuple[Any, _Part, bool]]:
    found: dict[nn.Module, float] = {}

    def count(layer: nn.Module, x: Tensor) -> None:
        if isinstance(layer, nn.MultiheadAttention):
            n_tokens = prod(x.shape[:-1]) // max(x.shape[0 if layer.batch_first else 1], 1) if x.dim() == 3 else len(x)
            n = n_tokens * sum(p.numel() for name, p in layer.named_parameters() if name.endswith("weight"))
        elif isinstance(layer, nn.RNNBase):
            n = prod(x.shape[:-1]) // max(x.shape[0 if layer.batch_first else 1], 1) if x.dim() == 3 else len(x)
        else:
            is_batch = not isinstance(layer, _ConvNd) or x.dim() == layer.weight.dim()
            n = Patches(layer).n_products(x.shape if is_batch else torch.Size([1, *x.shape]))
        found[layer] = found.get(layer, 0.0) + n

    inside = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    layers = [
        m
        for m in model.modules()
        if isinstance(m, (_ConvNd, nn.Linear, nn.MultiheadAttention, nn.RNNBase)) and m not in inside
    ]
    with evaluating(model), on_inputs(layers, count):
        run()
    parts: list[tuple[Any, _Part, bool]] = []
    for layer, n in found.items():
        if isinstance(layer, nn.RNNBase):  # n is the number of times; the first layer alone consumes what is pruned
            for name, p in layer.named_parameters():
                if name.startswith("weight"):
                    parts.append((layer, _Part(n * p.numel()), name.startswith("weight_ih_l0")))
        else:
            parts.append((layer, _Part(n), True))
    return parts


def _params(model: nn.Module, known: set[Any]) -> list[tuple[Any, _Part, bool]]:
    found: list[tuple[Any, _Part, bool]] = []
    attention = {id(p): m for m in model.modules() if isinstance(m, nn.MultiheadAttention) for p in m.parameters()}
    layer_of = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    for p in model.parameters():
        layer: Any = attention.get(id(p)) or layer_of[id(p)]
        # A parameter of the model's own is a layer to Torch-Pruning.
        is_layer = type(layer).__module__.startswith("torch.nn.") or layer in known
        is_table = isinstance(layer, nn.Embedding)  # [entries, out]: its inputs are numbers of words
        consumes = is_layer and p.dim() > 1 and not is_table
        if isinstance(layer, nn.RNNBase):
            consumes = any(p is q for name, q in layer.named_parameters() if name.startswith("weight_ih_l0"))
        found.append((layer if is_layer else p, _Part(p.numel()), consumes))
    return found


def _seconds(model: nn.Module, run: Callable[[], Any]) -> list[tuple[Any, _Part, bool]]:
    has_weights = (_ConvNd, nn.Linear, nn.MultiheadAttention, nn.RNNBase)
    times = layer_times(model, run, device_of(model))
    return [(layer, _Part(seconds), isinstance(layer, has_weights)) for layer, seconds in times.items()]
