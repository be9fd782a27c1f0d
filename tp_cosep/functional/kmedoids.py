"""k-medoids on a distance matrix: for one k, and for every k along one warm-started path.

Letters: D is the ``[n, n]`` distance matrix, e_i ≥ 0 the weight of point i (1 by default), and
TD(M) = Σ_i e_i min_{m ∈ M} D_im the total deviation of a set M of medoids.

The search runs on the CPU; results are on the device of D. It is deterministic: ties go to the lowest index.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tp_cosep.errors import InputError, MissingDependencyError
from tp_cosep.functional.distances import check_distances
from tp_cosep.functional.swap_table import TOLERANCE, Assignment, Floats, Indices, SwapTable, few_threads

__all__ = [
    "BACKENDS",
    "GrowingPath",
    "KMedoids",
    "check_backend",
    "check_point_weights",
    "checkpoints_for",
    "k_medoids",
    "k_medoids_path",
]

# Up to this number of points every number of medoids is a checkpoint, and every swap is the best of all.
_FEW = 32
# The number of points added at once is the number of medoids divided by this.
_SHARE = 4
# After swaps the table's gains are out of date: after this number of candidates that gain nothing it is updated.
_MOST_FAILURES = 6

Backend = Callable[[Tensor, Sequence[int], Tensor | None], "list[KMedoids]"]


@dataclass(frozen=True)
class KMedoids:
    """A k-medoids solution.

    Attributes:
        k: Number of medoids.
        medoids: ``[k]`` int64, ascending.
        labels: ``[n]`` int64, position in ``medoids`` of each point's nearest medoid (the lowest on ties; a medoid
            always belongs to itself).
        total_deviation: TD, the weighted sum over all points of the distance to the nearest medoid.
    """

    k: int
    medoids: Tensor
    labels: Tensor
    total_deviation: float

    @classmethod
    def from_assignment(cls, assignment: Assignment, distances: Floats) -> KMedoids:
        """The solution of a search; equals :meth:`from_medoids`, without computing the nearest medoids again.

        Args:
            assignment: The final state of the search.
            distances: ``[n, n]``, without weights: points of weight 0 belong to their nearest medoid too.

        Returns:
            The solution, its medoids sorted, on the CPU.
        """
        order = assignment.medoids.argsort()
        medoids, k = assignment.medoids[order], len(order)
        place = np.empty(k, np.int64)
        place[order] = np.arange(k)
        labels = place[assignment.own]
        tied = np.flatnonzero(assignment.d1 == assignment.d2)
        if len(tied):
            labels[tied] = distances[tied[:, None], medoids].argmin(1)
        labels[medoids] = np.arange(k)
        return cls(k, torch.from_numpy(medoids), torch.from_numpy(labels), float(assignment.d1.sum()))

    @classmethod
    def from_medoids(cls, distances: Tensor, medoids: Tensor, weights: Tensor | None = None) -> KMedoids:
        """The solution that a given set of medoids defines.

        Args:
            distances: ``[n, n]``.
            medoids: ``[k]``, distinct indices.
            weights: ``[n]``, of the points.

        Returns:
            The solution, its medoids sorted.
        """
        medoids = medoids.sort().values
        rows = distances[medoids]
        deviation, labels = rows.min(0)
        labels[medoids] = torch.arange(len(medoids), device=labels.device)
        if weights is not None:
            deviation = deviation * weights.to(deviation.device)
        return cls(len(medoids), medoids, labels, float(deviation.sum()))

    def to(self, device: torch.device) -> KMedoids:
        """The same solution on another device.

        Args:
            device: Of the tensors.

        Returns:
            The solution; itself if it is on that device already.
        """
        if self.medoids.device == device:
            return self
        return replace(self, medoids=self.medoids.to(device), labels=self.labels.to(device))


def k_medoids(
    distances: Tensor | np.ndarray, k: int, *, weights: Tensor | None = None, backend: str = "native"
) -> KMedoids:
    """Cluster n points around k of them: minimise TD(M) over sets M of k medoids.

    The native backend grows from one medoid to k, see :class:`GrowingPath`, as in :func:`k_medoids_path`; so the result
    for one k is the same whichever other k are requested. The result is a local optimum: no exchange of one medoid for
    one other point lowers TD.

    Args:
        distances: ``[n, n]``, see :func:`tp_cosep.functional.distances.check_distances`.
        k: Number of medoids, in 1 … n.
        weights: ``[n]``, finite, ≥ 0, at least one positive: how much the deviation of a point counts. A point of
            weight 0 has no say, but may become a medoid.
        backend: ``"native"``; ``"kmedoids"``, FasterPAM of the package kmedoids (GPL, never required);
            ``"sklearn-extra"``, PAM of scikit-learn-extra's ``KMedoids``. The latter two know no weights.

    Returns:
        The solution.

    Raises:
        InputError: If the matrix, k, the weights or the backend is not valid.
        MissingDependencyError: If the backend's package is not installed.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])
        >>> k_medoids((x[:, None] - x).abs(), 2).medoids
        tensor([1, 4])
    """
    return k_medoids_path(distances, [k], weights=weights, backend=backend)[0]


def k_medoids_path(
    distances: Tensor | np.ndarray,
    ks: Iterable[int] | None = None,
    *,
    weights: Tensor | None = None,
    backend: str = "native",
) -> list[KMedoids]:
    """k-medoids for many k, all from one sequence of warm starts.

    The points that lower TD most become medoids, then single swaps are made, the best first, until none lowers
    TD; see :class:`GrowingPath`. All swaps are evaluated at once with FastPAM's decomposition (Schubert & Rousseeuw,
    Information Systems 101, 2021), see :class:`tp_cosep.functional.swap_table.SwapTable`.

    Args:
        distances: ``[n, n]``, see :func:`tp_cosep.functional.distances.check_distances`.
        ks: Numbers of medoids, each in 1 … n, in any order; by default all of 2 … n (1 if n is 1).
        weights: ``[n]``, of the points, see :func:`k_medoids`.
        backend: Solver, see :func:`k_medoids`.

    Returns:
        One solution per k, in the order of ``ks``.

    Raises:
        InputError: If the matrix, a k, the weights or the backend is not valid.
        MissingDependencyError: If the backend's package is not installed.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])
        >>> [solution.total_deviation for solution in k_medoids_path((x[:, None] - x).abs(), [1, 2, 3])]
        [30.0, 4.0, 3.0]
    """
    d = check_distances(distances)
    n = len(d)
    requested = list(ks) if ks is not None else list(range(min(2, n), n + 1))
    for k in requested:
        if not isinstance(k, (int, np.integer)) or not 1 <= k <= n:
            raise InputError(f"k_medoids: expected an integer k in 1 … {n} (the number of points), got {k!r}.")
    return check_backend(backend)(d, requested, None if weights is None else check_point_weights(weights, n))


def check_backend(backend: str) -> Backend:
    """Look up a solver by name.

    Args:
        backend: One of :data:`BACKENDS`.

    Returns:
        A function ``solve(distances, ks, weights)`` that finds one solution per k.

    Raises:
        InputError: If the name is unknown.
    """
    if backend not in BACKENDS:
        raise InputError(f"k_medoids: expected a backend of {sorted(BACKENDS)}, got {backend!r}.")
    return BACKENDS[backend]


def check_point_weights(weights: Tensor, n: int) -> Tensor:
    """Check the weights of n points.

    Args:
        weights: ``[n]``.
        n: Number of points.

    Returns:
        The weights in float64 on the CPU.

    Raises:
        InputError: If the number differs, a weight is negative or not finite, or all are 0.
    """
    e = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    if e.shape != (n,):
        raise InputError(f"k_medoids: expected one weight per point, shape ({n},), got {tuple(e.shape)}.")
    if not torch.isfinite(e).all() or (e < 0).any() or not e.any():
        raise InputError(
            "k_medoids: expected finite weights ≥ 0, at least one of them positive, got "
            f"{[round(x, 4) for x in e.tolist()[:10]]}."
        )
    return e


class GrowingPath:
    """k-medoids for any k of one matrix, each found from the same sequence of solutions.

    *Checkpoints* are numbers of medoids that depend on n alone. The solution at a checkpoint grows from that at the
    previous one: points that lower TD most become medoids (PAM's BUILD, several at a time), then swaps are made until
    none lowers TD. Between two checkpoints every k has a place in the tree of halved gaps: the middle of a gap grows
    from the gap's lower end in the same way. So the solution for k is the same whichever other k are requested.

    Args:
        d: ``[n, n]``, as :func:`tp_cosep.functional.distances.check_distances` returns it.
        checkpoints: Numbers of medoids, ascending from 1; those of :func:`checkpoints_for` by default.
        weights: ``[n]``, as :func:`check_point_weights` returns them.
    """

    def __init__(self, d: Tensor, checkpoints: Sequence[int] | None = None, *, weights: Tensor | None = None) -> None:
        self._d = d.cpu().contiguous()
        self._device = d.device
        self._weights = weights
        self._checkpoints = checkpoints or checkpoints_for(len(d))
        by_point = self._d if weights is None else self._d * weights[:, None]
        by_medoid = self._d if weights is None else self._d * weights
        sums = by_point.sum(0).numpy()
        first = np.flatnonzero(sums <= sums.min() * (1 + TOLERANCE))[:1]
        self._table = SwapTable(Assignment(by_medoid.numpy(), first, by_point.numpy()), 1)
        self._at = 1
        self._states = {1: self._table.assignment.copy()}  # converged, by k

    def solve(self, k: int) -> KMedoids:
        """The solution for one k.

        Args:
            k: Number of medoids, in 1 … n.

        Returns:
            The solution, on the device of the matrix.
        """
        if k == len(self._d):
            return KMedoids.from_medoids(self._d, torch.arange(k)).to(self._device)
        return KMedoids.from_assignment(self._solved(k), self._d.numpy()).to(self._device)

    def medoids(self, k: int) -> tuple[Indices, Floats]:
        """The medoids for one k, and every point's distance to the nearest.

        Args:
            k: Number of medoids, in 1 … n.

        Returns:
            The medoids ``[k]``, ascending; the distances ``[n]``, without weights.
        """
        if k == len(self._d):
            return np.arange(k), np.zeros(k)
        state = self._solved(k)
        medoids = np.sort(state.medoids)
        if self._weights is None:
            return medoids, state.d1
        return medoids, self._d.numpy().take(medoids, 0).min(0)

    def _solved(self, k: int) -> Assignment:
        if k not in self._states:
            with few_threads(self._d):
                for before, after in pairwise(self._steps_to(k)):
                    if after not in self._states:
                        self._extend(before, after)
        return self._states[k]

    def _steps_to(self, k: int) -> list[int]:
        """The numbers of medoids that the solution for k grows through, ending with k."""
        ks = self._checkpoints
        position = bisect_right(ks, k) - 1
        steps = [*ks[: position + 1]]
        if steps[-1] != k:
            low, high = ks[position], ks[position + 1]
            while low != k:
                middle = (low + high) // 2
                if middle <= k:
                    low = middle
                    steps.append(middle)
                else:
                    high = middle
        return steps

    def _extend(self, before: int, k: int) -> None:
        """Solve for k, starting from the solution for fewer medoids."""
        if self._at != before:
            self._table.move_to(self._states[before])
        _grow(self._table, k)
        self._at = k
        self._states[k] = self._table.assignment.copy()


def checkpoints_for(n: int) -> list[int]:
    """Numbers of medoids at which :class:`GrowingPath` swaps to convergence.

    Args:
        n: Number of points.

    Returns:
        All of 1 … n for n ≤ 32; otherwise 1, 2 and from there in steps of k/3, at least 2, up to n.
    """
    if n <= _FEW:
        return list(range(1, n + 1))
    ks = [1, 2]
    while ks[-1] < n:
        ks.append(min(ks[-1] + max(2, ks[-1] // 3), n))
    return ks


def _grow(table: SwapTable, k: int) -> None:
    """Add points until there are k medoids, then swap until no swap lowers TD."""
    state = table.assignment
    while len(state.medoids) < k:
        at_once = max(1, len(state.medoids) // _SHARE)
        table.add(min(at_once, k - len(state.medoids)))
    while k < len(state.by_medoid) and _swap(table):
        pass


def _swap(table: SwapTable) -> bool:
    """Make swaps that lower TD, the candidates with the largest gains first.

    Returns:
        Whether any swap was made.
    """
    state = table.assignment
    deviation = float(state.d1.sum())
    n_failures, has_swapped = 0, False
    for point in table.promising(TOLERANCE * deviation).tolist():
        slot, change = state.best_swap(point, deviation)
        if change < -TOLERANCE * deviation:
            before = int(state.medoids[slot])
            state.replace(slot, point)
            now = float(state.d1.sum())
            if now < deviation:
                deviation, n_failures, has_swapped = now, 0, True
                if len(state.by_medoid) <= _FEW:
                    return True
                continue
            state.replace(slot, before)  # a gain at the edge of rounding
        n_failures += 1
        if n_failures >= _MOST_FAILURES and has_swapped:
            break
    return has_swapped


def _native(d: Tensor, ks: Sequence[int], weights: Tensor | None) -> list[KMedoids]:
    path = GrowingPath(d, weights=weights)
    found = {k: path.solve(k) for k in sorted(set(ks))}
    return [found[k] for k in ks]


def _kmedoids_package(d: Tensor, ks: Sequence[int], weights: Tensor | None) -> list[KMedoids]:
    _refuse_weights("kmedoids", weights)
    try:
        import kmedoids
    except ImportError as error:
        raise MissingDependencyError(
            "k_medoids: backend='kmedoids' requires the package kmedoids (licence GPL-3.0): pip install kmedoids."
        ) from error
    matrix = d.cpu().numpy()
    results = [kmedoids.fasterpam(matrix, int(k), random_state=0).medoids for k in ks]
    return _from_arrays(d, results)


def _sklearn_extra(d: Tensor, ks: Sequence[int], weights: Tensor | None) -> list[KMedoids]:
    _refuse_weights("sklearn-extra", weights)
    try:
        from sklearn_extra.cluster import KMedoids as SklearnKMedoids
    except ImportError as error:
        raise MissingDependencyError(
            "k_medoids: backend='sklearn-extra' requires scikit-learn-extra, which requires Python < 3.12 and "
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
            # "Cluster i is empty": several points at distance 0. Only the medoids are used.
            warnings.filterwarnings("ignore", message="Cluster .* is empty")
            results.append(model.fit(matrix).medoid_indices_)
    return _from_arrays(d, results)


def _refuse_weights(backend: str, weights: Tensor | None) -> None:
    if weights is not None:
        raise InputError(f"k_medoids: backend={backend!r} knows no weights; use backend='native', or weights=None.")


def _from_arrays(d: Tensor, medoid_sets: Iterable[np.ndarray]) -> list[KMedoids]:
    tensors = (torch.as_tensor(np.asarray(m).astype(np.int64), device=d.device) for m in medoid_sets)
    return [KMedoids.from_medoids(d, medoids) for medoids in tensors]


#: Backends by name: ``backend(distances, ks, weights) -> one solution per k``.
BACKENDS: dict[str, Backend] = {
    "native": _native,
    "kmedoids": _kmedoids_package,
    "sklearn-extra": _sklearn_extra,
}
