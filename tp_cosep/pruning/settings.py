"""Options of the pruner, checked before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch_pruning as tp
from torch import nn

from tp_cosep.errors import InputError
from tp_cosep.graph.heads import attention_heads, head_parameters
from tp_cosep.graph.tracing import resolve_layers, resolve_ratios
from tp_cosep.pruning.costs import UNITS
from tp_cosep.selection.scored import name_of
from tp_cosep.utils.checks import is_count, is_number
from tp_cosep.utils.data import DataOptions

__all__ = [
    "PruneSettings",
    "check_fit_keywords",
    "check_heads",
    "check_pruner",
    "check_scored",
    "check_target",
    "own_options",
]


@dataclass(frozen=True)
class PruneSettings:
    """What a pruner was asked to do, checked and resolved.

    Attributes:
        automatic: Whether the selector decides the counts.
        is_ranked: Whether channels of several layers are ranked for one ratio.
        layerwise: Whether groups are pruned one after another, with statistics collected again for each.
        target: Unit and value of a user-specified size, or ``None``.
        on_failure: ``"raise"`` or ``"skip"``.
        verify: Whether outputs are compared after every group.
        embed: Whether the plan records an embedding of every group.
        adapt: Called on the model after every group, or ``None``.
        fine_tune: Called on the model after a step, or ``None``.
        n_steps: Number of steps that the ratios are spread over.
        round_to: Widths are multiples of this; ``None`` for any.
        max_pruning_ratio: The largest share of a group that may be removed.
        ratios: Share of channels to remove by step, from 0 on.
        fixed_ratios: The same by layer, of ``pruning_ratio_dict``.
        schedule: ``schedule(ratio, n_steps)`` gives the ratios of the steps.
        prune_num_heads: Whether whole heads are pruned.
        prune_head_dims: Whether dimensions of heads are pruned.
        head_ratios: Share of heads to remove by step; ``None`` if none was specified.
        fixed_head_ratios: The same by layer, of ``head_pruning_ratio_dict``.
        ignored_layers: Layers and parameters whose groups are left alone.
        ignored_params: Names of such parameters.
        root_module_types: Types of layers that groups start from.
        trace_options: Keywords for tracing.
    """

    automatic: bool
    is_ranked: bool
    layerwise: bool
    target: tuple[str, float] | None
    on_failure: str
    verify: bool
    embed: bool
    adapt: Callable[[nn.Module], object] | None
    fine_tune: Callable[[nn.Module], object] | None
    n_steps: int
    round_to: int | None
    max_pruning_ratio: float
    ratios: Sequence[float]
    fixed_ratios: Mapping[nn.Module, Sequence[float]]
    schedule: Callable[[float, int], Sequence[float]]
    prune_num_heads: bool
    prune_head_dims: bool
    head_ratios: Sequence[float] | None
    fixed_head_ratios: Mapping[nn.Module, Sequence[float]]
    ignored_layers: Sequence[Any]
    ignored_params: tuple[str, ...]
    root_module_types: Sequence[type]
    trace_options: Mapping[str, Any]

    @classmethod
    def of(cls, stock: tp.pruner.BasePruner, **own: Any) -> PruneSettings:
        """Settings of a pruner whose stock part is initialised.

        Args:
            stock: The pruner.
            **own: The settings that the stock part does not know.

        Returns:
            The settings.
        """
        names = {p: name for name, p in stock.model.named_parameters()}
        return cls(
            **own,
            n_steps=stock.iterative_steps,
            round_to=stock.round_to or None,
            max_pruning_ratio=stock.max_pruning_ratio,
            ratios=stock.per_step_pruning_ratio,
            fixed_ratios=dict(stock.pruning_ratio_dict),
            schedule=stock.iterative_pruning_ratio_scheduler,
            prune_num_heads=stock.prune_num_heads,
            prune_head_dims=stock.prune_head_dims,
            head_ratios=stock.per_step_head_pruning_ratio if stock.head_pruning_ratio > 0 else None,
            fixed_head_ratios=stock.head_pruning_ratio_dict,
            ignored_layers=stock.ignored_layers,
            ignored_params=tuple(names[p] for p in stock.ignored_params),
            root_module_types=stock.root_module_types,
        )


def own_options(model: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords for the stock pruner, resolved, with dictionaries of their own: it writes into them.

    Args:
        model: The model.
        options: The user's keywords.

    Returns:
        The keywords.

    Raises:
        InputError: If layers are unknown, or numbers of heads do not fit.
    """
    own = dict(options)
    if own.get("num_heads") is None:
        own["num_heads"] = attention_heads(model)
    for name in ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups"):
        own[name] = dict(own.get(name) or {})
    check_heads(model, own["num_heads"])
    own["ignored_layers"] = resolve_layers(model, own.get("ignored_layers"), "ignored_layers")
    own["ignored_layers"] += [model.get_parameter(name) for name in head_parameters(model, own["num_heads"])]
    own["pruning_ratio_dict"] = resolve_ratios(model, own.get("pruning_ratio_dict"))
    return own


def check_pruner(
    pruning_ratio: float | None,
    *,
    global_pruning: bool,
    is_ranked: bool,
    automatic: bool,
    ranks_channels: bool,
    on_failure: str,
    calls: Mapping[str, object],
    options: Mapping[str, Any],
) -> None:
    """Check options of :class:`tp_cosep.CoSePPruner` against each other.

    Raises:
        InputError: If one is unknown or out of range, or two contradict each other.
    """
    for name, is_on in (("global_pruning", global_pruning), ("isomorphic", options.get("isomorphic"))):
        if automatic and is_on:
            raise InputError(
                f"CoSePPruner: {name} compares layers for one overall ratio, so it needs a pruning_ratio, got None; "
                "without it every layer has its own count, and target={'macs': 0.5} allocates over all layers."
            )
    if pruning_ratio is not None and not (is_number(pruning_ratio) and 0 <= pruning_ratio <= 1):
        raise InputError(f"CoSePPruner: expected pruning_ratio in [0, 1] or None, got {pruning_ratio!r}.")
    if options.get("isomorphic") and not global_pruning:
        raise InputError(
            "CoSePPruner: isomorphic=True ranks the channels of layers that are alike, so it needs "
            "global_pruning=True; without it Torch-Pruning prunes the channels of one layer by the ranks of another."
        )
    if is_ranked and not ranks_channels:
        raise InputError(
            "CoSePPruner: attention maps compare heads only, they cannot rank channels of several layers; "
            "use head_pruning_ratio= without global_pruning or isomorphic."
        )
    if on_failure not in ("raise", "skip"):
        raise InputError(f"CoSePPruner: expected on_failure 'raise' or 'skip', got {on_failure!r}.")
    for name, call in calls.items():
        if call is not None and not callable(call):
            raise InputError(f"CoSePPruner: expected {name} to be a function of the model or None, got {call!r}.")
    _check_numbers(options)


def check_scored(importance: object, *, has_count: bool, layerwise: bool) -> None:
    """Check options of :class:`tp_cosep.CoSePPruner` for an importance that is no selector.

    Args:
        importance: The importance.
        has_count: Whether a ratio or a target says how many channels are removed.
        layerwise: Whether statistics are to be collected again for each group.

    Raises:
        InputError: If it cannot do what is asked of it.
    """
    name = name_of(importance)
    if not has_count:
        raise InputError(
            f"CoSePPruner: expected pruning_ratio= or target= with {name}, got neither: scores rank channels, but do "
            "not say how many to keep; CoSePSelector has counts of its own."
        )
    if layerwise:
        raise InputError(
            f"CoSePPruner: layerwise=True collects a selector's statistics again before every group, {name} has none; "
            "use iterative_steps= with fine_tune=, or a selector."
        )


def _check_numbers(options: Mapping[str, Any]) -> None:
    step, n_steps = options.get("round_to"), options.get("iterative_steps", 1)
    if step is not None and not is_count(step):
        raise InputError(f"CoSePPruner: expected round_to to be an integer ≥ 1 or None, got {step!r}.")
    if not is_count(n_steps):
        raise InputError(f"CoSePPruner: expected iterative_steps to be an integer ≥ 1, got {n_steps!r}.")
    most = options.get("max_pruning_ratio", 1.0)
    if not (is_number(most) and 0 < most <= 1):
        raise InputError(f"CoSePPruner: expected max_pruning_ratio in (0, 1], got {most!r}.")
    ratios = options.get("pruning_ratio_dict")
    if not isinstance(ratios, Mapping | None):
        raise InputError(f"CoSePPruner: expected pruning_ratio_dict to map layers to ratios, got {ratios!r}.")
    for layers, ratio in (ratios or {}).items():
        # A ratio a little below 0 means a count to stock pruners, see Selector.pruning_ratio_dict.
        if not (is_number(ratio) and -1 < ratio <= 1):
            raise InputError(f"CoSePPruner: expected pruning_ratio_dict of {layers!r} in [0, 1], got {ratio!r}.")


def check_fit_keywords(options: Mapping[str, Any] | None, fit: Callable[..., object]) -> dict[str, Any]:
    """Check ``fit_options=`` of :class:`tp_cosep.CoSePPruner` before anything is measured with them.

    Returns:
        The options, a copy.

    Raises:
        InputError: If they are no keywords of ``fit``.
    """
    if options is None:
        return {}
    known = [name for name, p in signature(fit).parameters.items() if p.kind is Parameter.KEYWORD_ONLY]
    known += DataOptions.__annotations__
    if not isinstance(options, Mapping):
        raise InputError(f"CoSePPruner: expected fit_options to map keywords to values, got {options!r}.")
    if unknown := [name for name in options if name not in known]:
        raise InputError(f"CoSePPruner: expected fit_options of {known}, got {unknown}.")
    return dict(options)


def check_target(
    target: Mapping[str, float] | None, *, automatic: bool, options: Mapping[str, Any]
) -> tuple[str, float] | None:
    """Check ``target=`` of :class:`tp_cosep.CoSePPruner`.

    Returns:
        The unit and the value.

    Raises:
        InputError: If it names no known unit or not one alone, is out of range, or contradicts another option.
    """
    if target is None:
        return None
    if not isinstance(target, Mapping) or len(target) != 1 or not target.keys() <= set(UNITS):
        raise InputError(
            f"CoSePPruner: expected target with one of {list(UNITS)}, such as {{'macs': 0.5}}, got {target!r}."
        )
    ((unit, value),) = target.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf") or value == 1:
        raise InputError(
            f"CoSePPruner: expected a target in {unit} between 0 and 1, a share of the model as it is, or above, the "
            f"number itself (of a latency milliseconds), got {value!r}."
        )
    for name, is_given in (("pruning_ratio", not automatic), ("prune_num_heads", options.get("prune_num_heads"))):
        if is_given:
            raise InputError(f"CoSePPruner: target= decides how many channels are removed; leave out {name}.")
    return unit, float(value)


def check_heads(model: nn.Module, num_heads: Mapping[nn.Module, int]) -> None:
    """Check numbers of heads by layer.

    Raises:
        InputError: If a layer is not one of the model's that can have heads, or its channels do not divide.
    """
    names = {m: name for name, m in model.named_modules()}
    for layer, n in num_heads.items():
        if layer not in names:
            raise InputError(f"num_heads: expected modules of the model, got a {type(layer).__name__} that is not.")
        if isinstance(layer, nn.MultiheadAttention):
            raise InputError(
                f"layer {names[layer]!r}: expected layers that make queries, keys and values, got a "
                "MultiheadAttention, whose heads Torch-Pruning cannot take apart; leave it out of num_heads: the same "
                "dimensions go in each of them."
            )
        width = getattr(layer, "out_features", getattr(layer, "out_channels", None))
        if n < 1 or (width is not None and width % n):
            raise InputError(f"layer {names[layer]!r}: expected num_heads to divide its {width} channels, got {n}.")
