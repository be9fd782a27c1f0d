"""Parsers of option values; each raises ``argparse.ArgumentTypeError`` with what it expects."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from typing import Any

__all__ = ["any_number", "count", "number", "pair", "part", "positive", "share", "target", "whole"]


def pair(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``, the value a Python literal if it is one, else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def target(text: str) -> tuple[str, float] | None:
    """``UNIT=VALUE``, or ``None`` for ``none``."""
    if text == "none":
        return None
    unit, equals, value = text.partition("=")
    if unit not in ("macs", "params", "latency") or not equals:
        raise argparse.ArgumentTypeError(f"expected macs=VALUE, params=VALUE, latency=VALUE or none, got {text!r}")
    return unit, positive(value)


def _checked(convert: Callable[[str], Any], is_good: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def check(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not is_good(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return check


whole = _checked(int, lambda n: n >= 0, "a whole number from 0")
count = _checked(int, lambda n: n >= 1, "a whole number from 1")
number = _checked(float, lambda x: 0 <= x < float("inf"), "a number from 0")
any_number = _checked(float, lambda x: abs(x) < float("inf"), "a number")
positive = _checked(float, lambda x: 0 < x < float("inf"), "a number above 0")
share = _checked(float, lambda x: 0 <= x <= 1, "a share between 0 and 1")
part = _checked(float, lambda x: 0 < x <= 1, "a share above 0, up to 1")
