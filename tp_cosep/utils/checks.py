"""Checks of plain values."""

from __future__ import annotations

from numbers import Integral, Real

__all__ = ["is_count", "is_number"]


def is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
