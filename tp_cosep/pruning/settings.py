"""Options of the pruner, checked before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

from torch import nn

from tp_cosep.errors import InputError
from tp_cosep.pruning.costs import UNITS
from tp_cosep.utils.checks import is_count, is_number

__all__ = ["check_fit_keywords", "check_heads", "check_pruner", "check_target"]


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
                "without it every layer has its own count, and target={'macs': 0.5} shares out over all layers."
            )
    if pruning_ratio is not None and not (is_number(pruning_ratio) and 0 <= pruning_ratio <= 1):
        raise InputError(f"CoSePPruner: expected pruning_ratio in [0, 1] or None, got {pruning_ratio!r}.")
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
        # Counts are told to stock pruners by ratios a little below 0, see CoSePSelector.pruning_ratio_dict.
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
            raise InputError(f"CoSePPruner: target= decides how much goes, and of channels; leave out {name}.")
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
