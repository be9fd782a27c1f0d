"""k-medoids on a distance matrix: for one k, and for every k along one warm-started path.

Letters: D is the ``[n, n]`` distance matrix, TD(M) = Σ_i min_{m ∈ M} D_im the total deviation of a set
M of medoids.

Every step is a handful of tensor operations, so it runs on the device of D. Ties go to the
lowest index, and the result depends on nothing but D.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tp_cosep.assignment import TOLERANCE, Assignment, SwapTable, few_threads
from tp_cosep.errors import InputError, MissingDependencyError

__all__ = ["BACKENDS", "KMedoids", "check_distances", "k_medoids", "k_medoids_path"]


@dataclass(frozen=True)
class KMedoids:
    """A k-medoids solution.

    Attributes:
        k: Number of medoids.
        medoids: ``[k]`` int64, ascending.
        labels: ``[n]`` int64, position in ``medoids`` of each point's nearest medoid (the lowest on
            ties; a medoid always belongs to itself).
        total_deviation: Sum over all points of the distance to the nearest medoid.
    """

    k: int
    medoids: Tensor
    labels: Tensor
    total_deviation: float

    @classmethod
    def from_assignment(cls, assignment: Assignment) -> KMedoids:
        """The solution that an assignment stands for; as :meth:`from_medoids`, without computing it anew.

        Returns:
            The solution, its medoids sorted.
        """
        medoids, order = assignment.medoids.sort()
        labels = order.argsort()[assignment.own]
        tied = (assignment.d1 == assignment.d2).nonzero()[:, 0]
        labels[tied] = assignment.d[medoids[:, None], tied].argmin(0)
        labels[medoids] = torch.arange(len(medoids), device=labels.device)
        return cls(len(medoids), medoids, labels, float(assignment.d1.sum()))

    @classmethod
    def from_medoids(cls, distances: Tensor, medoids: Tensor) -> KMedoids:
        """The solution that a given set of medoids defines.

        Args:
            distances: ``[n, n]``.
            medoids: ``[k]``, distinct indices.

        Returns:
            The solution, its medoids sorted.
        """
        medoids = medoids.sort().values
        rows = distances[medoids]
        deviation, labels = rows.min(0)
        labels[medoids] = torch.arange(len(medoids), device=labels.device)
        return cls(len(medoids), medoids, labels, float(deviation.sum()))


def check_distances(distances: Tensor | np.ndarray) -> Tensor:
    """Validate a distance matrix.

    Args:
        distances: ``[n, n]`` tensor or array; square, symmetric (to 1e-6 of its largest entry),
            without negative or non-finite entries, with a zero diagonal.

    Returns:
        The matrix as a float64 tensor on its own device, made exactly symmetric.

    Raises:
        InputError: Saying which of these does not hold, and where.
    """
    # A copy of an array: torch takes neither read-only nor reversed ones.
    d = distances if isinstance(distances, Tensor) else torch.from_numpy(np.array(distances, dtype=np.float64))
    if d.dim() != 2 or d.shape[0] != d.shape[1] or d.shape[0] == 0:
        raise InputError(f"distances: expected a square matrix [n, n] with n ≥ 1, got shape {tuple(d.shape)}.")
    d = d.to(torch.float64)
    for is_bad, what in (
        (~torch.isfinite(d), "finite"),
        (d < 0, "non-negative"),
        ((d - d.T).abs() > 1e-6 * d.max(), "symmetric"),
        (torch.diag(d.diagonal() > 1e-6 * d.max()), "zero on the diagonal"),
    ):
        if is_bad.any():
            i, j = is_bad.nonzero()[0].tolist()
            raise InputError(
                f"distances: expected every entry to be {what}, got D[{i}, {j}] = {float(d[i, j]):g} and "
                f"D[{j}, {i}] = {float(d[j, i]):g}."
            )
    return (d + d.T).div_(2).fill_diagonal_(0)


def k_medoids(distances: Tensor | np.ndarray, k: int, *, backend: str = "native") -> KMedoids:
    """Cluster n points around k of them, with the smallest total deviation that is found.

    The native backend grows from one medoid to k by the best new medoid (the BUILD step of PAM) and
    swaps to convergence after every step, as :func:`k_medoids_path` does; so the result for a given k
    does not depend on which other k were asked for. The result is swap-optimal: no exchange of one
    medoid for one other point lowers TD.

    Args:
        distances: See :func:`check_distances`.
        k: Number of medoids, 1 … n.
        backend: ``"native"``; ``"kmedoids"``, FasterPAM of the package kmedoids (GPL, never required);
            ``"sklearn-extra"``, PAM of scikit-learn-extra's ``KMedoids``.

    Returns:
        The solution.

    Raises:
        InputError: If the matrix, k or the backend is not valid.
        MissingDependencyError: If the backend's package is not installed.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])
        >>> k_medoids((x[:, None] - x).abs(), 2).medoids
        tensor([1, 4])
    """
    return k_medoids_path(distances, [k], backend=backend)[0]


def k_medoids_path(
    distances: Tensor | np.ndarray, ks: Iterable[int] | None = None, *, backend: str = "native"
) -> list[KMedoids]:
    """k-medoids for many k, each warm-started from its neighbour.

    From the solution for k − 1 the point that lowers TD most becomes a medoid, then single swaps are
    made, the best first, until none lowers TD. All swaps are weighed at once, see
    :class:`tp_cosep.assignment.SwapTable`.

    Args:
        distances: See :func:`check_distances`.
        ks: The k wanted, each 1 … n, in any order; all of 2 … n if not given (1 if n is 1).
        backend: See :func:`k_medoids`.

    Returns:
        One solution per k, in the order of ``ks``.

    Raises:
        InputError: If the matrix, a k or the backend is not valid.
        MissingDependencyError: If the backend's package is not installed.
    """
    d = check_distances(distances)
    n = len(d)
    wanted = list(ks) if ks is not None else list(range(min(2, n), n + 1))
    for k in wanted:
        if not isinstance(k, (int, np.integer)) or not 1 <= k <= n:
            raise InputError(f"k_medoids: expected an integer k in 1 … {n} (the number of points), got {k!r}.")
    if backend not in BACKENDS:
        raise InputError(f"k_medoids: expected a backend of {sorted(BACKENDS)}, got {backend!r}.")
    return BACKENDS[backend](d, wanted)


def _native(d: Tensor, ks: Sequence[int]) -> list[KMedoids]:
    wanted = set(ks)
    found: dict[int, KMedoids] = {}
    last = max(ks, default=0)
    with few_threads(d):
        sums = d.sum(0)
        assignment = Assignment(d, (sums <= sums.min() * (1 + TOLERANCE)).nonzero()[0])
        table = SwapTable(assignment, last)
        for k in range(1, last + 1):
            _swap_to_convergence(assignment, table)
            if k in wanted:
                found[k] = KMedoids.from_assignment(assignment)
            if k < last:
                assignment.add(table.best_addition())
                table.update()
    return [found[k] for k in ks]


def _swap_to_convergence(assignment: Assignment, table: SwapTable) -> None:
    """Make the best swap until none lowers TD."""
    while len(assignment.medoids) < len(assignment.d):
        slot, point, change = table.best_swap()
        deviation = assignment.d1.sum()
        if not change < -TOLERANCE * deviation:
            return
        out = assignment.medoids[slot]
        assignment.replace(slot, point)
        if not assignment.d1.sum() < deviation:
            # The table's sums have drifted by rounding, or the gain is at its edge: nothing to gain here.
            assignment.replace(slot, out)
            return
        table.update()


def _kmedoids_package(d: Tensor, ks: Sequence[int]) -> list[KMedoids]:
    try:
        import kmedoids
    except ImportError as error:
        raise MissingDependencyError(
            "k_medoids: backend='kmedoids' needs the package kmedoids (licence GPL-3.0): pip install kmedoids."
        ) from error
    matrix = d.cpu().numpy()
    results = [kmedoids.fasterpam(matrix, int(k), random_state=0).medoids for k in ks]
    return _from_arrays(d, results)


def _sklearn_extra(d: Tensor, ks: Sequence[int]) -> list[KMedoids]:
    try:
        from sklearn_extra.cluster import KMedoids as SklearnKMedoids
    except ImportError as error:
        raise MissingDependencyError(
            "k_medoids: backend='sklearn-extra' needs scikit-learn-extra, which needs Python < 3.12 and "
            f"numpy < 2: pip install 'tp_cosep[sklearn-extra]' (import failed with: {error})."
        ) from error
    matrix = d.cpu().numpy()
    results = []
    for k in ks:
        # For one cluster BUILD is exact, and the package warns about any iteration after it.
        n_iterations = 0 if k == 1 else 300
        model = SklearnKMedoids(
            int(k), metric="precomputed", method="pam", init="build", max_iter=n_iterations, random_state=0
        )
        with warnings.catch_warnings():
            # "Cluster i is empty": several points at distance 0; the medoids are what we read.
            warnings.filterwarnings("ignore", message="Cluster .* is empty")
            results.append(model.fit(matrix).medoid_indices_)
    return _from_arrays(d, results)


def _from_arrays(d: Tensor, medoid_sets: Iterable[np.ndarray]) -> list[KMedoids]:
    tensors = (torch.as_tensor(np.asarray(m).astype(np.int64), device=d.device) for m in medoid_sets)
    return [KMedoids.from_medoids(d, medoids) for medoids in tensors]


#: Backends by name: ``backend(distances, ks) -> one solution per k``.
BACKENDS: dict[str, Callable[[Tensor, Sequence[int]], list[KMedoids]]] = {
    "native": _native,
    "kmedoids": _kmedoids_package,
    "sklearn-extra": _sklearn_extra,
}
