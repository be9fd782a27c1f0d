"""The knee of a Mean Simplified Silhouette curve: how many representatives are worth keeping.

Kneedle (Satopaa et al., 2011; the package ``kneed``) scales the curve to the unit square and takes its height over
the diagonal, the *difference curve*. The local maxima of the difference curve are the candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tp_cosep.errors import InputError

__all__ = ["KNEE_RULES", "Knee", "difference_curve", "find_knee", "guarded_count"]

#: ``"first"`` is Kneedle's first knee, as published. ``"strongest"`` is the highest point of the difference curve.
#: ``"guarded"`` is the strongest knee, its count raised by :func:`guarded_count` where the pruned components would be
#: badly represented. ``docs/method.md`` compares them on planted and trained layers.
KNEE_RULES = ("guarded", "strongest", "first")
# From this MSS on the very first k counts as the knee: Kneedle cannot return a curve's first point.
_SATURATED = 0.9


@dataclass(frozen=True)
class Knee:
    """A knee of a curve.

    Attributes:
        k: Number of clusters at the knee; ``None`` if the curve has no knee.
        strength: Height of the difference curve at the knee, in [0, 1]; 0 if there is none.
    """

    k: int | None
    strength: float


def difference_curve(ks: Sequence[int], values: Sequence[float]) -> NDArray[np.float64]:
    """Kneedle's difference curve: the height of a curve over the diagonal of the unit square.

        h_i = (v_i − min v) / (max v − min v) − (k_i − k_1) / (k_n − k_1)

    Source: Satopaa et al. (2011), section III, steps 2 and 3, without smoothing.

    Args:
        ks: Numbers of clusters, ascending, at least two; steps may be uneven.
        values: The curve at each of ``ks``.

    Returns:
        ``[len(ks)]``, the heights; zeros for a constant curve.
    """
    x, y = np.asarray(ks, dtype=float), np.asarray(values, dtype=float)
    span = np.ptp(y)
    if span == 0:
        return np.zeros(len(y))
    height: NDArray[np.float64] = (y - y.min()) / span - (x - x[0]) / (x[-1] - x[0])
    return height


def find_knee(ks: Sequence[int], values: Sequence[float], rule: str = "guarded") -> Knee:
    """Find the knee of an increasing, concave curve.

    Args:
        ks: Numbers of clusters, ascending.
        values: The curve at each of ``ks``, at most 1.
        rule: One of :data:`KNEE_RULES`; ``"guarded"`` and ``"strongest"`` find the same knee.

    Returns:
        The knee. A curve that starts at 0.9 or higher has its knee at the first k: more clusters add little. A curve of
        fewer than three points, a constant curve, and one that never rises above its diagonal have no knee.

    Raises:
        InputError: If the rule is unknown, or ``ks`` and ``values`` differ in length or hold NaN.

    Example:
        >>> find_knee([2, 3, 4, 5, 6, 7, 8], [0.1, 0.5, 0.9, 0.92, 0.95, 0.97, 1.0]).k
        4
    """
    if rule not in KNEE_RULES:
        raise InputError(f"knee: expected a rule of {list(KNEE_RULES)}, got {rule!r}.")
    x, y = np.asarray(ks, dtype=float), np.asarray(values, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not np.isfinite(y).all():
        raise InputError(f"knee: expected one finite value for each of {x.size} k, got {y.tolist()[:10]}.")
    if len(x) and y[0] >= _SATURATED:
        return Knee(int(x[0]), float(y[0]))
    if len(x) < 3 or np.ptp(y) == 0:
        return Knee(None, 0.0)
    if rule == "first":
        return _first(x, y)
    height = difference_curve(ks, values)
    return _knee_at(x, height, int(height.argmax()))


def _first(x: NDArray[np.float64], y: NDArray[np.float64]) -> Knee:
    """Kneedle's first knee."""
    from kneed import KneeLocator  # imports matplotlib, which takes a second

    locator = KneeLocator(x, y, curve="concave", direction="increasing")
    if locator.knee is None:
        return Knee(None, 0.0)
    at = int(np.flatnonzero(x == locator.knee)[0])
    return _knee_at(x, np.asarray(locator.y_difference), at)


def _knee_at(x: NDArray[np.float64], height: NDArray[np.float64], at: int) -> Knee:
    # Both ends of the difference curve are 0 by construction, and so is all of it for a straight line, up to rounding.
    if height[at] <= 1e-9:
        return Knee(None, 0.0)
    return Knee(int(x[at]), float(min(height[at], 1.0)))


def guarded_count(n: int, k: int, represented: float, *, low: float = 0.1, high: float = 0.6) -> int:
    """How many of n components to keep when the knee is at k.

        n_keep = n − g (n − k),     g = clamp((s − low) / (high − low), 0, 1),

    with s the mean silhouette 1 − a/b of the non-medoids at the knee
    (:func:`tp_cosep.functional.silhouette.non_medoid_silhouette`). Where the pruned components are well represented by
    their medoids, the knee decides alone. Where they are hardly nearer to their own medoid than to any other, nothing
    is redundant and all components are kept. In between the count is linear in s, which also damps the uncertainty of
    the knee, largest where s is small.

    Args:
        n: Number of components.
        k: The knee, in 1 … n.
        represented: s, at most 1. Measured: 0.03 to 0.13 for independent random profiles in 45 dimensions or more,
            0.2 to 0.8 in trained layers, 0.65 and more for planted copies with up to 20 % noise.
        low: The s up to which all components are kept.
        high: The s from which on the knee decides alone.

    Returns:
        The count, in k … n.

    Example:
        >>> guarded_count(64, 16, 0.85), guarded_count(64, 16, 0.35), guarded_count(64, 16, 0.05)
        (16, 40, 64)
    """
    trust = min(max((represented - low) / (high - low), 0.0), 1.0)
    return round(n - trust * (n - k))
