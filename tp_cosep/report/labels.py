"""Words that tables, plots and the page share."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CRITERIA", "NOT_KNOWN", "Criterion", "counted", "percent", "quantity", "signed"]

#: In place of a value that is not known.
NOT_KNOWN = "–"


class Criterion(NamedTuple):
    """How the curve of a selection is labelled.

    Attributes:
        name: The criterion in full.
        short: The criterion on an axis.
        x_label: What k counts.
    """

    name: str
    short: str
    x_label: str


#: By :attr:`tp_cosep.ChannelSelection.criterion`.
CRITERIA = {
    "silhouette": Criterion("Mean Simplified Silhouette (MSS)", "MSS", "number of clusters k"),
    "retained variance": Criterion("Retained variance", "retained variance", "number of channels kept k"),
    "retained score": Criterion("Retained score", "retained score", "number of channels kept k"),
}


def counted(n: int, unit: str) -> str:
    """A count with its unit.

    Args:
        n: The count.
        unit: The unit in the singular.

    Returns:
        The text, in the plural unless ``n`` is 1.

    Example:
        >>> counted(1, "channel"), counted(1024, "channel")
        ('1 channel', '1,024 channels')
    """
    return f"{n:,} {unit}" + ("" if n == 1 else "s")


def quantity(n: int) -> str:
    """A count in three digits and a unit.

    Args:
        n: The count.

    Returns:
        The text, exact below 1000.

    Example:
        >>> [quantity(n) for n in (950, 15_300, 4_089_184_256)]
        ['950', '15.3 k', '4.09 G']
    """
    value, units = float(n), ["", " k", " M", " G", " T"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    digits = 0 if value == n else max(0, 2 - len(str(int(value))) + 1)
    return f"{value:.{digits}f}{units[0]}"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage.

    Args:
        share: The share, 0 … 1.
        digits: Digits behind the decimal point.

    Returns:
        The text.

    Example:
        >>> percent(0.4166)
        '41.7%'
    """
    return f"{share:.{digits}%}"


def signed(value: float, spec: str) -> str:
    """A change, with a plus or a minus sign.

    Args:
        value: The change.
        spec: Its format without the sign, e.g. ``".1%"``.

    Returns:
        The text.

    Example:
        >>> signed(-0.25, ".1%"), signed(2.0, ".2f")
        ('−25.0%', '+2.00')
    """
    return format(value, f"+{spec}").replace("-", "−")
