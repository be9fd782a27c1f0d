"""The knee of a Mean Simplified Silhouette curve: how many representatives are worth having.

Kneedle (Satopaa et al., 2011; the package ``kneed``) scales the curve to the unit square and looks at
its height over the diagonal, the *difference curve*. Its local maxima are the candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from kneed import KneeLocator
from numpy.typing import NDArray

from tp_cosep.errors import InputError

__all__ = ["RULES", "Knee", "KneeMethod", "difference_curve", "find_knee", "guarded_count"]

RULES = ("guarded", "strongest", "first")
_INTERP_METHODS = ("interp1d", "polynomial")
# From this MSS on the very first k counts as the knee: Kneedle cannot return a curve's first point.
_SATURATED = 0.9


@dataclass(frozen=True)
class KneeMethod:
    """How a knee is chosen; see ``docs/method.md`` for what each choice does to planted and real layers.

    Attributes:
        rule: ``"first"`` takes Kneedle's first knee, as the papers do. ``"strongest"`` takes the highest
            point of the difference curve. ``"guarded"`` (default) takes the strongest and then keeps more
            than its k where the pruned channels would be badly represented, see :func:`guarded_count`.
        interp_method: ``"interp1d"`` follows the data; ``"polynomial"`` fits one first.
        polynomial_degree: Its degree. Degree 2 puts the knee at the middle of any curve.
    """

    rule: str = "guarded"
    interp_method: str = "interp1d"
    polynomial_degree: int = 7

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InputError(f"knee: expected a rule of {list(RULES)}, got {self.rule!r}.")
        if self.interp_method not in _INTERP_METHODS:
            raise InputError(f"knee: expected interp_method of {list(_INTERP_METHODS)}, got {self.interp_method!r}.")
        if not isinstance(self.polynomial_degree, int) or self.polynomial_degree < 1:
            raise InputError(f"knee: expected an integer polynomial_degree ≥ 1, got {self.polynomial_degree!r}.")

    @classmethod
    def named(cls, knee: str | KneeMethod) -> KneeMethod:
        """A method by name: a rule, or ``"paper"`` for Kneedle's first knee as published.

        Returns:
            The method.

        Raises:
            InputError: If the name is unknown.
        """
        if isinstance(knee, KneeMethod):
            return knee
        if knee == "paper":
            return cls(rule="first")
        if knee not in RULES:
            raise InputError(f"knee: expected one of {[*RULES, 'paper']} or a KneeMethod, got {knee!r}.")
        return cls(rule=knee)


@dataclass(frozen=True)
class Knee:
    """A knee.

    Attributes:
        k: Where it is; ``None`` if the curve has none.
        strength: Height of the difference curve there, 0 … 1; 0 if there is none.
    """

    k: int | None
    strength: float


def difference_curve(ks: Sequence[int], values: Sequence[float]) -> NDArray[np.float64]:
    """Kneedle's difference curve: the height of a curve over the diagonal once both axes are scaled to [0, 1].

    Args:
        ks: Ascending, at least two; in any steps.
        values: The curve at each of them.

    Returns:
        The height at each k; zeros for a constant curve.
    """
    x, y = np.asarray(ks, dtype=float), np.asarray(values, dtype=float)
    span = np.ptp(y)
    if span == 0:
        return np.zeros(len(y))
    height: NDArray[np.float64] = (y - y.min()) / span - (x - x[0]) / (x[-1] - x[0])
    return height


def find_knee(ks: Sequence[int], values: Sequence[float], method: KneeMethod | None = None) -> Knee:
    """Find the knee of an increasing, concave curve.

    Args:
        ks: Ascending numbers of clusters.
        values: The curve at each of them, at most 1.
        method: Which knee; ``"guarded"`` and ``"strongest"`` find the same one.

    Returns:
        The knee. A curve that starts at 0.9 or higher has it at its first k (one that starts so high needs
        no more clusters). A curve of fewer than three points, a constant one, and one that never rises over
        its diagonal has none.

    Raises:
        InputError: If ``ks`` and ``values`` differ in length or hold NaN.

    Example:
        >>> find_knee([2, 3, 4, 5, 6, 7, 8], [0.1, 0.5, 0.9, 0.92, 0.95, 0.97, 1.0]).k
        4
    """
    method = method or KneeMethod()
    x, y = np.asarray(ks, dtype=float), np.asarray(values, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not np.isfinite(y).all():
        raise InputError(f"knee: expected one finite value for each of {x.size} k, got {y.tolist()[:10]}.")
    if len(x) and y[0] >= _SATURATED:
        return Knee(int(x[0]), float(y[0]))
    if len(x) < 3 or np.ptp(y) == 0:
        return Knee(None, 0.0)
    if method.rule != "first" and method.interp_method == "interp1d":
        height = difference_curve(ks, values)
        at = int(height.argmax())
    else:
        locator = KneeLocator(
            x,
            y,
            curve="concave",
            direction="increasing",
            interp_method=method.interp_method,
            polynomial_degree=min(method.polynomial_degree, len(x) - 1),
        )
        height = np.asarray(locator.y_difference)
        if method.rule == "first" and locator.knee is None:
            return Knee(None, 0.0)
        at = int(np.flatnonzero(x == locator.knee)[0]) if method.rule == "first" else int(height.argmax())
    # The ends of the difference curve are 0 by construction, and so, but for rounding, is a straight line.
    if height[at] <= 1e-9:
        return Knee(None, 0.0)
    return Knee(int(x[at]), float(min(height[at], 1.0)))


def guarded_count(n: int, k: int, represented: float, *, low: float = 0.1, high: float = 0.6) -> int:
    """How many of n components to keep when the knee is at k.

    Where the components that would go are well represented by their medoids, the knee is taken at its
    word; where they are hardly nearer to their own medoid than to any other, nothing is redundant and all
    are kept; in between the count moves linearly:

        n_keep = n − g (n − k),     g = clamp((s − low) / (high − low), 0, 1),

    with s the mean silhouette 1 − a/b of the non-medoids at the knee. This also damps the knee's own
    uncertainty, which is largest where s is small.

    Args:
        n: Number of components.
        k: The knee, 1 … n.
        represented: s, at most 1. Measured: 0.03 to 0.13 for independent random profiles in 45 dimensions
            or more, 0.2 to 0.8 in trained layers, 0.65 and more for planted copies with up to 20 % noise.
        low: s at which all components are kept.
        high: s from which on the knee decides alone.

    Returns:
        k … n.

    Example:
        >>> guarded_count(64, 16, 0.85), guarded_count(64, 16, 0.35), guarded_count(64, 16, 0.05)
        (16, 40, 64)
    """
    trust = min(max((represented - low) / (high - low), 0.0), 1.0)
    return round(n - trust * (n - k))
