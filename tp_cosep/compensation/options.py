"""Options of the compensator, checked before anything is done."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from numbers import Integral
from typing import Any

from tp_cosep.errors import InputError
from tp_cosep.graph.tracing import TRACE_OPTIONS
from tp_cosep.utils.checks import check_one_of, is_count, is_number

__all__ = ["MODES", "check_compensator"]

#: How a compensator repairs: one fit per group on what was measured of the unpruned model, or another one on what the
#: pruned model computes.
MODES = ("one-shot", "sequential")


def check_compensator(
    *,
    mode: str,
    max_positions: int | None,
    max_features: int,
    ridge: float | None,
    memory_budget: int,
    seed: int,
    forward_fn: object,
    trace_options: Mapping[str, Any],
) -> None:
    """Check options of :class:`tp_cosep.Compensator`.

    Raises:
        InputError: If one is unknown or out of range.
    """
    check_one_of("mode", mode, MODES, "Compensator")
    if max_positions is not None and not is_count(max_positions):
        raise InputError(f"Compensator: expected max_positions ≥ 1 or None, got {max_positions!r}.")
    if not (is_count(max_features) or (isinstance(max_features, Integral) and max_features == 0)):
        raise InputError(f"Compensator: expected max_features ≥ 0, a whole number, got {max_features!r}.")
    if ridge is not None and not (is_number(ridge) and 0 < ridge < inf):
        raise InputError(f"Compensator: expected ridge > 0 or None, got {ridge!r}.")
    if not (is_number(memory_budget) and memory_budget > 0):
        raise InputError(f"Compensator: expected memory_budget > 0, in bytes, got {memory_budget!r}.")
    if not isinstance(seed, Integral):
        raise InputError(f"Compensator: expected seed to be a whole number, got {seed!r}.")
    if forward_fn is not None and not callable(forward_fn):
        raise InputError(f"Compensator: expected forward_fn to be a function or None, got {forward_fn!r}.")
    if unknown := set(trace_options) - set(TRACE_OPTIONS):
        raise InputError(
            f"Compensator: got unknown options {sorted(unknown)}; for tracing it takes {sorted(TRACE_OPTIONS)}."
        )
