"""Mean Simplified Silhouette of a k-medoids solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tp_cosep.errors import InputError
from tp_cosep.medoids import KMedoids

__all__ = ["MSS_FORMS", "mean_simplified_silhouette", "mss_curve"]


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
    # Distances are symmetric, and whole rows are cheaper to gather.
    return _mss(distances, medoids, labels, distances[medoids].sum(0), 1e-12 * float(distances.max()), form)


def _mss(distances: Tensor, medoids: Tensor, labels: Tensor, to_all: Tensor, rounding: float, form: str) -> float:
    """MSS, given the sum ``[n]`` of every point's distances to all medoids; means below ``rounding`` are 0."""
    if form not in MSS_FORMS:
        raise InputError(f"silhouette: expected form of {sorted(MSS_FORMS)}, got {form!r}.")
    k = len(medoids)
    if k == 1:
        return 0.0
    a = distances.gather(1, medoids[labels][:, None])[:, 0]
    b = (to_all - a) / (k - 1)
    b = b.masked_fill(b <= rounding, 0)
    is_medoid = torch.zeros_like(a, dtype=torch.bool).index_fill_(0, medoids, True)
    return MSS_FORMS[form](a, b, is_medoid)


def _paper(a: Tensor, b: Tensor, is_medoid: Tensor) -> float:
    # b = 0 means that all medoids but the own one are at the point itself: nothing is told apart.
    width = torch.where(b > 0, 1 - a / b, torch.zeros_like(a))
    return float(torch.where(is_medoid, torch.ones_like(a), width).mean())


def _gb_afs(a: Tensor, b: Tensor, is_medoid: Tensor) -> float:
    a, b = a[~is_medoid], b[~is_medoid]
    if len(a) == 0:
        return 0.0
    larger = torch.maximum(a, b)
    return float(torch.where(larger > 0, (b - a) / larger, torch.zeros_like(a)).mean())


#: The two forms by name.
MSS_FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], float]] = {"paper": _paper, "gb-afs": _gb_afs}


def mss_curve(distances: Tensor, path: Sequence[KMedoids], *, form: str = "paper") -> Tensor:
    """MSS of every solution of a path, see :func:`mean_simplified_silhouette`.

    Returns:
        ``[len(path)]`` float64, on the CPU.
    """
    values = []
    rounding = 1e-12 * float(distances.max())
    to_all = distances.new_zeros(len(distances))
    is_medoid = torch.zeros(len(distances), dtype=torch.bool, device=distances.device)
    for solution in path:
        # Neighbours on a path share most medoids, so the sums are updated instead of taken anew.
        is_next = torch.zeros_like(is_medoid).index_fill_(0, solution.medoids, True)
        to_all = to_all + distances[is_next & ~is_medoid].sum(0) - distances[is_medoid & ~is_next].sum(0)
        is_medoid = is_next
        values.append(_mss(distances, solution.medoids, solution.labels, to_all, rounding, form))
    return torch.tensor(values, dtype=torch.float64)
