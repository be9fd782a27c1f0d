"""Checks of option values."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real

from tp_cosep.errors import InputError

__all__ = ["check_one_of", "is_count", "is_number"]


def check_one_of(name: str, value: object, allowed: Collection[str], where: str) -> None:
    """Check an option with a fixed set of values.

    Args:
        name: The option.
        value: Its value.
        allowed: All values that it may have, in the order in which the message lists them.
        where: The class or function that has the option.

    Raises:
        InputError: If the value is none of them.

    Example:
        >>> check_one_of("mode", "fast", ["one-shot", "sequential"], "Compensator")
        Traceback (most recent call last):
        tp_cosep.errors.InputError: Compensator: expected mode of ['one-shot', 'sequential'], got 'fast'.
    """
    if value not in allowed:
        raise InputError(f"{where}: expected {name} of {list(allowed)}, got {value!r}.")


def is_count(value: object) -> bool:
    """Whether a value is an integer ≥ 1, of Python or NumPy; booleans are not.

    Returns:
        Whether it is.

    Example:
        >>> is_count(3), is_count(0), is_count(3.0), is_count(True)
        (True, False, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def is_number(value: object) -> bool:
    """Whether a value is a real number, of Python or NumPy, NaN and infinity included; booleans are not.

    Returns:
        Whether it is.

    Example:
        >>> is_number(0.5), is_number(2), is_number("2"), is_number(True)
        (True, True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)
