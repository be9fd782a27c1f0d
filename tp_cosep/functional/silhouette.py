"""Mean Simplified Silhouette of a k-medoids solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tp_cosep.errors import InputError
from tp_cosep.functional.kmedoids import KMedoids
from tp_cosep.functional.swap_table import Floats, Indices

__all__ = ["MSS_FORMS", "mean_simplified_silhouette", "mss_curve", "row_sum", "silhouette_of"]

_ROWS = 32


def mean_simplified_silhouette(distances: Tensor, medoids: Tensor, labels: Tensor, *, form: str = "paper") -> float:
    """Mean Simplified Silhouette (MSS) of a clustering around medoids.

    With a_i the distance of point i to its own medoid and b_i its *mean* distance to all the other
    medoids (not to the nearest one):

        form="paper"    MSS = 1/n Σ_i (1 − a_i / b_i)                              (CoSeP)
        form="gb-afs"   MSS = 1/(n−k) Σ_{i not a medoid} (b_i − a_i) / max(a_i, b_i)   (GB-AFS's code)

    In the paper's form a medoid counts 1, so MSS(n) = 1. A point with a_i = b_i = 0 (it coincides with
    every medoid) counts 1 if it is a medoid and 0 if not. A single medoid has no others to compare with:
    MSS is 0 then, and so is the second form when every point is a medoid.

    Args:
        distances: ``[n, n]``.
        medoids: ``[k]`` indices.
        labels: ``[n]``, position in ``medoids`` of each point's own medoid.
        form: ``"paper"`` or ``"gb-afs"``.

    Returns:
        MSS; at most 1, and for distances that satisfy the triangle inequality above −1.

    Raises:
        InputError: If the form is unknown.
    """
    d, own, slots = distances.cpu().numpy(), medoids.cpu().numpy(), labels.cpu().numpy()
    return silhouette_of(d, own, d[np.arange(len(d)), own[slots]], row_sum(d, own), form=form)


def silhouette_of(d: Floats, medoids: Indices, a: Floats, total: Floats, *, form: str = "paper") -> float:
    """As :func:`mean_simplified_silhouette`, from distances ``[n]`` to the own medoid, and summed over all.

    Returns:
        MSS.

    Raises:
        InputError: If the form is unknown.
    """
    if form not in MSS_FORMS:
        raise InputError(f"silhouette: expected form of {sorted(MSS_FORMS)}, got {form!r}.")
    n, k = len(d), len(medoids)
    if k == 1:
        return 0.0
    b = (total - a) / (k - 1)
    b[b <= 1e-12 * d[medoids[0]].max()] = 0
    is_medoid = np.zeros(n, dtype=bool)
    is_medoid[medoids] = True
    return MSS_FORMS[form](a, b, is_medoid)


def row_sum(d: Floats, rows: Indices) -> Floats:
    """The sum of some rows of D ``[n, n]``: the distance to these points, since D is symmetric.

    Returns:
        ``[n]``.
    """
    total = np.zeros(len(d))
    for start in range(0, len(rows), _ROWS):  # a few at a time stay in a core's cache
        total += d.take(rows[start : start + _ROWS], 0).sum(0)
    return total


def _paper(a: Floats, b: Floats, is_medoid: NDArray[np.bool_]) -> float:
    # b = 0 means that all medoids but the own one are at the point itself: nothing is told apart.
    width = 1 - np.divide(a, b, out=np.ones_like(a), where=b > 0)
    width[is_medoid] = 1
    return float(width.mean())


def _gb_afs(a: Floats, b: Floats, is_medoid: NDArray[np.bool_]) -> float:
    a, b = a[~is_medoid], b[~is_medoid]
    if len(a) == 0:
        return 0.0
    larger = np.maximum(a, b)
    return float(np.divide(b - a, larger, out=np.zeros_like(a), where=larger > 0).mean())


#: The two forms by name.
MSS_FORMS: dict[str, Callable[[Floats, Floats, NDArray[np.bool_]], float]] = {"paper": _paper, "gb-afs": _gb_afs}


def mss_curve(distances: Tensor, path: Sequence[KMedoids], *, form: str = "paper") -> Tensor:
    """MSS of every solution of a path, see :func:`mean_simplified_silhouette`.

    Returns:
        ``[len(path)]`` float64, on the CPU.
    """
    values = [mean_simplified_silhouette(distances, s.medoids, s.labels, form=form) for s in path]
    return torch.tensor(values, dtype=torch.float64)
