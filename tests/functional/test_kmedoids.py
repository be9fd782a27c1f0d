import functools
import itertools
import sys

import numpy as np
import pytest
import torch

from tp_cosep.errors import InputError, MissingDependencyError
from tp_cosep.functional.distances import check_distances
from tp_cosep.functional.kmedoids import KMedoids, k_medoids, k_medoids_path
from tp_cosep.functional.swap_table import few_threads


def euclidean(x):
    return np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))


def random_matrix(n, seed=0):
    """Symmetric and generic, no metric: nothing in k-medoids needs the triangle inequality."""
    d = np.random.default_rng(seed).uniform(0.1, 1, size=(n, n))
    return (d + d.T) * (1 - np.eye(n))


def points_matrix(n, seed=0):
    return euclidean(np.random.default_rng(seed).normal(size=(n, 3)))


def clustered_matrix(n, seed=0, noise=0.1):
    rng = np.random.default_rng(seed)
    return euclidean(rng.normal(size=(8, 10))[np.arange(n) % 8] + noise * rng.normal(size=(n, 10)))


MATRICES = {"random": random_matrix, "points": points_matrix, "clustered": clustered_matrix}


def deviation(d, medoids):
    return d[:, list(medoids)].min(1).sum()


def first_best(d, candidates):
    deviations = np.array([deviation(d, c) for c in candidates])
    return candidates[np.flatnonzero(deviations <= deviations.min() * (1 + 1e-12))[0]]


def naive_path(d):
    """BUILD and the best swap of PAM, every candidate's total deviation computed from scratch."""
    n = len(d)
    medoids, path = [], []
    for k in range(1, n + 1):
        medoids = first_best(d, [[*medoids, c] for c in range(n) if c not in medoids])
        while k < n:
            others = [c for c in range(n) if c not in medoids]
            swaps = [[*medoids[:p], c, *medoids[p + 1 :]] for p in range(k) for c in others]
            best = first_best(d, swaps)
            if deviation(d, best) > deviation(d, medoids) * (1 - 1e-10):
                break
            medoids = best
        path.append(sorted(medoids))
    return path


def medoid_lists(path):
    return [s.medoids.tolist() for s in path]


def assert_consistent(d, solution):
    medoids, labels = solution.medoids, solution.labels
    assert (medoids.dtype, labels.dtype, len(labels)) == (torch.int64, torch.int64, len(d))
    assert medoids.tolist() == sorted(set(medoids.tolist()))
    assert labels[medoids].tolist() == list(range(len(medoids))) == list(range(solution.k))
    for i, row in enumerate(d[:, medoids.numpy()]):
        if i not in medoids.tolist():
            assert labels[i] == int(np.flatnonzero(row == row.min())[0])
    assert solution.total_deviation == pytest.approx(deviation(d, medoids.tolist()), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("scale", [1, 1e-12])
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("n", [3, 7, 10, 16])
def test_path_makes_the_moves_of_naive_pam(name, n, scale):
    d = MATRICES[name](n, seed=n) * scale
    assert medoid_lists(k_medoids_path(d, range(1, n + 1))) == naive_path(d)


def test_small_problems_are_close_to_exhaustive_search():
    hits = []
    for n, seed, matrix in itertools.product([3, 5, 8], range(5), MATRICES.values()):
        d = matrix(n, seed=seed)
        for s in k_medoids_path(d, range(1, n + 1)):
            optimum = min(deviation(d, m) for m in itertools.combinations(range(n), s.k))
            assert s.total_deviation >= optimum * (1 - 1e-12)
            hits.append(s.total_deviation <= optimum * (1 + 1e-12) + 1e-15)
            assert hits[-1] or s.k not in (1, n)
    assert np.mean(hits) >= 0.95


@pytest.mark.parametrize("n", [12, 33])
# In tight clusters TD falls by orders of magnitude along the path: a sum that is kept current loses its digits.
@pytest.mark.parametrize("matrix", [*MATRICES.values(), functools.partial(clustered_matrix, noise=1e-6)])
def test_no_single_swap_improves_a_solution(matrix, n):
    d = matrix(n, seed=1)
    for s in k_medoids_path(d):
        medoids = set(s.medoids.tolist())
        for out, new in itertools.product(medoids, set(range(n)) - medoids):
            assert deviation(d, medoids - {out} | {new}) >= s.total_deviation * (1 - 1e-10)


@pytest.mark.parametrize("n", [64, 45])
@pytest.mark.parametrize("name", MATRICES)
def test_total_deviation_is_as_low_as_fasterpams(name, n):
    kmedoids = pytest.importorskip("kmedoids")
    d = MATRICES[name](n, seed=2)
    oracle = [kmedoids.fasterpam(d, k, random_state=0).loss for k in range(1, n)]
    ratios = [s.total_deviation / loss for s, loss in zip(k_medoids_path(d, range(1, n)), oracle, strict=True)]
    assert np.mean(ratios) <= 1.005


@pytest.mark.parametrize("backend", ["native", "kmedoids"])  # sklearn-extra has its own file
@pytest.mark.parametrize("n", [1, 2, 7, 12])
@pytest.mark.parametrize("name", MATRICES)
def test_solutions_are_consistent(name, n, backend):
    if backend != "native":
        pytest.importorskip(backend)
    d = MATRICES[name](n)
    path = k_medoids_path(d, range(1, n + 1), backend=backend)
    assert [s.k for s in path] == list(range(1, n + 1))
    for s in path:
        assert_consistent(d, s)
    assert (path[-1].total_deviation, path[-1].labels.tolist()) == (0, list(range(n)))


def test_kmedoids_backend_comes_close_to_the_native_one_and_repeats():
    pytest.importorskip("kmedoids")
    d = clustered_matrix(40)
    native, other = k_medoids_path(d), k_medoids_path(d, backend="kmedoids")
    for a, b in zip(native[:-1], other[:-1], strict=True):
        assert b.total_deviation == pytest.approx(a.total_deviation, rel=0.1)
    assert medoid_lists(other) == medoid_lists(k_medoids_path(d, backend="kmedoids"))


@pytest.mark.parametrize("ks", [[5, 2, 9], [12, 1], [3, 3], range(4, 7), np.array([6, 2]), []], ids=str)
def test_each_k_is_independent_of_the_other_ks(ks):
    d, ks = points_matrix(12), list(ks)
    full = {s.k: s for s in k_medoids_path(d, range(1, 13))}
    path = k_medoids_path(d, iter(ks))
    assert [s.k for s in path] == ks
    assert medoid_lists(path) == medoid_lists(full[k] for k in ks)
    for k in ks:
        assert torch.equal(k_medoids(d, k).labels, full[k].labels)


@pytest.mark.parametrize(("n", "first"), [(1, 1), (2, 2), (3, 2), (10, 2)])
def test_default_path_covers_every_k_from_two(n, first):
    assert [s.k for s in k_medoids_path(points_matrix(n))] == list(range(first, n + 1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MATRICES)
def test_permuted_points_give_permuted_medoids(name, seed):
    d = MATRICES[name](33, seed)
    order = np.random.default_rng(seed + 5).permutation(33)
    ks = range(1, 7)  # no more: in a cluster of two points either may be the medoid, and the index decides
    for s, p in zip(k_medoids_path(d, ks), k_medoids_path(d[np.ix_(order, order)], ks), strict=True):
        assert sorted(order[p.medoids.numpy()]) == s.medoids.tolist()
        own = order[p.medoids[p.labels].numpy()]
        assert own.tolist() == s.medoids[s.labels][order].tolist()


def test_all_points_at_one_place():
    for s in k_medoids_path(torch.zeros(7, 7), range(1, 8)):
        assert (s.medoids.tolist(), s.total_deviation) == (list(range(s.k)), 0)  # ties go to the lowest index
        # Points that are no medoid belong to the first one, medoids to themselves.
        assert s.labels.tolist() == list(range(s.k)) + [0] * (7 - s.k)


@pytest.mark.parametrize("seed", range(10))
def test_duplicates(seed):
    x = np.random.default_rng(seed).normal(size=(6, 2))
    d = euclidean(np.concatenate([x, x]))
    for s in k_medoids_path(d, range(1, 13)):
        assert_consistent(d, s)
        assert (s.total_deviation == 0) == (s.k >= 6)
        # Of two copies the lowest index is added first; at k = 6 TD is 0 and every further addition a tie.
        assert s.medoids.max() < max(6, s.k)


@pytest.mark.parametrize("n", [7, 10])
def test_ties_everywhere_end_and_repeat(n):
    # Points on a line with unit steps, and the simplex: swaps that gain nothing must not cycle.
    x = np.arange(n, dtype=float)[:, None]
    for d in (euclidean(x), 1 - np.eye(n), euclidean(x % 3) * 0.1):
        path = k_medoids_path(d, range(1, n + 1))
        assert medoid_lists(path) == medoid_lists(k_medoids_path(d.copy(), range(1, n + 1)))
        for s in path:
            assert_consistent(d, s)
    assert k_medoids(1 - np.eye(n), 3).medoids.tolist() == [0, 1, 2]
    assert k_medoids(euclidean(np.array([[0.0], [1], [2], [3]])), 1).medoids.tolist() == [1]


@pytest.mark.parametrize("seed", range(20))
def test_tie_in_a_cluster_of_two_goes_to_the_lowest_index(seed):
    # Two points far from all others: TD is the same with either as medoid, but for rounding.
    rng = np.random.default_rng(seed)
    x, pair = rng.normal(size=(12, 3)), np.sort(rng.permutation(12)[:2])
    x[pair] += 50
    assert set(pair) & set(k_medoids(euclidean(x), 2).medoids.tolist()) == {pair[0]}


def test_labels_of_given_medoids_go_to_the_lowest_on_ties():
    s = KMedoids.from_medoids(torch.tensor(euclidean(np.arange(5.0)[:, None])), torch.tensor([4, 0]))
    assert (s.k, s.medoids.tolist(), s.labels.tolist(), s.total_deviation) == (2, [0, 4], [0, 0, 0, 1, 1], 4)


@pytest.mark.parametrize("kind", ["list", "float32", "numpy float32", "read-only", "reversed", "integers"])
def test_any_kind_of_matrix_is_accepted_and_left_alone(kind):
    d = np.round(points_matrix(10) * 50)
    given = {
        "list": d.tolist(),
        "float32": torch.tensor(d, dtype=torch.float32),
        "numpy float32": d.astype(np.float32),
        "read-only": d.copy(),
        "reversed": d[::-1, ::-1].copy()[::-1, ::-1],
        "integers": d.astype(np.int64),
    }[kind]
    if kind == "read-only":
        given.setflags(write=False)
    assert medoid_lists(k_medoids_path(given)) == medoid_lists(k_medoids_path(d))
    assert np.array_equal(given, d)


def test_checked_matrix_is_exactly_symmetric_and_new():
    d = points_matrix(7)
    noisy = torch.tensor(d + 1e-8 * np.random.default_rng(0).uniform(size=(7, 7)))
    before = noisy.clone()
    checked = check_distances(noisy)
    assert torch.equal(noisy, before)
    assert torch.equal(checked, checked.T)
    torch.testing.assert_close(checked, ((before + before.T) / 2).fill_diagonal_(0), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("i", "j", "value", "what"),
    [
        (1, 2, np.nan, r"finite, got D\[1, 2\] = nan and D\[2, 1\] = "),
        (4, 0, np.inf, r"finite, got D\[4, 0\] = inf"),
        (3, 2, -1.0, r"non-negative, got D\[3, 2\] = -1"),
        (0, 4, 9.0, r"symmetric, got D\[0, 4\] = 9"),
        (2, 2, 0.1, r"zero on the diagonal, got D\[2, 2\] = 0.1"),
        (2, 2, -0.1, r"non-negative, got D\[2, 2\] = -0.1"),
    ],
)
def test_matrices_that_are_no_distances_are_refused(i, j, value, what):
    d = random_matrix(5)
    d[i, j] = value
    with pytest.raises(InputError, match=f"distances: expected every entry to be {what}"):
        k_medoids(d, 2)


@pytest.mark.parametrize("shape", [(3, 4), (4,), (0, 0), (2, 2, 2), ()], ids=str)
def test_matrices_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(InputError, match=r"expected a square matrix \[n, n\] with n ≥ 1, got shape \("):
        k_medoids(torch.zeros(shape), 1)


@pytest.mark.parametrize("k", [0, -1, 6, 2.0, "2", None], ids=repr)
def test_ks_out_of_range_are_refused(k):
    with pytest.raises(InputError, match=r"expected an integer k in 1 … 5 \(the number of points\), got"):
        k_medoids_path(random_matrix(5), [2, k])


def test_unknown_backend_is_refused():
    with pytest.raises(InputError, match=r"backend of \['kmedoids', 'native', 'sklearn-extra'\], got 'pam'"):
        k_medoids(random_matrix(5), 2, backend="pam")


@pytest.mark.parametrize(
    ("backend", "advice"),
    [("kmedoids", r"licence GPL-3.0.*pip install kmedoids"), ("sklearn-extra", r"tp_cosep\[sklearn-extra\]")],
)
def test_missing_package_is_named(monkeypatch, backend, advice):
    for module in ("kmedoids", "sklearn_extra.cluster"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=advice):
        k_medoids(random_matrix(5), 2, backend=backend)


@pytest.mark.parametrize(("n", "inside"), [(2048, 1), (2049, 2)])
def test_few_threads_gives_back_what_it_took(n, inside):
    @few_threads(torch.zeros(n, 1))
    def fail():
        raise RuntimeError(f"on {torch.get_num_threads()} threads")

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(RuntimeError, match=f"on {inside} threads"):
            fail()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def random_weights(n, seed=0):
    """Spread over orders of magnitude, some of them 0."""
    rng = np.random.default_rng(seed)
    e = np.exp(2 * rng.normal(size=n)) * (rng.uniform(size=n) > 0.2)
    e[0] = 1
    return e


def weighted(d, e):
    """Rows scaled: the deviation of a set of medoids is then the weighted one."""
    return d * np.asarray(e)[:, None]


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("n", [1, 12, 33, 97, 300])
def test_unit_weights_change_nothing(name, n):
    d = MATRICES[name](n, seed=4)
    ks = sorted({1, min(2, n), -(-n // 3), max(n - 1, 1), n})
    for a, b in zip(k_medoids_path(d, ks), k_medoids_path(d, ks, weights=torch.ones(n)), strict=True):
        assert a.medoids.tolist() == b.medoids.tolist()
        assert a.labels.tolist() == b.labels.tolist()
        assert a.total_deviation == b.total_deviation


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("n", [3, 7, 10, 16])
def test_the_weighted_path_makes_the_moves_of_naive_pam(name, n):
    d, e = MATRICES[name](n, seed=n), random_weights(n, n) + 0.01
    assert medoid_lists(k_medoids_path(d, range(1, n + 1), weights=torch.tensor(e))) == naive_path(weighted(d, e))


def test_small_weighted_problems_are_close_to_exhaustive_search():
    hits = []
    for n, seed, matrix in itertools.product([3, 5, 9], range(5), MATRICES.values()):
        d, e = matrix(n, seed=seed), random_weights(n, seed)
        for s in k_medoids_path(d, range(1, n + 1), weights=torch.tensor(e)):
            optimum = min(deviation(weighted(d, e), m) for m in itertools.combinations(range(n), s.k))
            assert s.total_deviation == pytest.approx(deviation(weighted(d, e), s.medoids.tolist()), abs=1e-14)
            assert s.total_deviation >= optimum * (1 - 1e-12)
            hits.append(s.total_deviation <= optimum * (1 + 1e-12) + 1e-14)
            assert hits[-1] or s.k not in (1, n)
    assert np.mean(hits) >= 0.95


@pytest.mark.parametrize("n", [12, 33, 290])  # tables of few points, and of many, are updated in different ways
@pytest.mark.parametrize("name", MATRICES)
def test_no_single_swap_improves_a_weighted_solution(name, n):
    d, e = MATRICES[name](n, seed=1), random_weights(n, 3)
    costs = weighted(d, e)
    for s in k_medoids_path(d, [2, 3, 7, n // 2], weights=torch.tensor(e)):
        medoids = s.medoids.numpy()
        assert s.total_deviation == pytest.approx(deviation(costs, medoids), rel=1e-10)
        for out in range(s.k):
            kept = costs[:, np.delete(medoids, out)]
            nearest = kept.min(1) if s.k > 1 else np.full(n, np.inf)
            swapped = np.minimum(nearest[:, None], costs).sum(0)
            assert swapped.min() >= s.total_deviation * (1 - 1e-10)


@pytest.mark.parametrize("name", MATRICES)
def test_a_weight_is_a_number_of_points_at_one_place(name):
    d, times = MATRICES[name](9, seed=6), np.array([1, 3, 1, 2, 5, 1, 1, 4, 2])
    place = np.repeat(np.arange(9), times)
    for s in k_medoids_path(d, range(1, 5), weights=torch.tensor(times)):
        repeated = k_medoids(d[np.ix_(place, place)], s.k)
        assert s.total_deviation == pytest.approx(repeated.total_deviation)
        assert s.medoids.tolist() == sorted(place[repeated.medoids.numpy()])


def test_a_point_of_no_weight_belongs_to_its_nearest_medoid():
    x = np.array([[0.0], [1], [9], [10], [8]])
    s = k_medoids(euclidean(x), 2, weights=torch.tensor([1.0, 0, 0, 1, 0]))
    assert (s.medoids.tolist(), s.labels.tolist(), s.total_deviation) == ([0, 3], [0, 0, 1, 1, 1], 0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2], r"expected one weight per point, shape \(3,\), got \(2,\)"),
        ([1.0, -1, 2], r"expected finite weights ≥ 0, at least one of them positive, got \[1\.0, -1\.0, 2\.0\]"),
        ([0.0, 0, 0], "at least one of them positive"),
        ([1.0, float("nan"), 2], "expected finite weights"),
        ([1.0, float("inf"), 2], "expected finite weights"),
    ],
)
def test_weights_that_cannot_be_used(weights, message):
    with pytest.raises(InputError, match=message):
        k_medoids(points_matrix(3), 2, weights=torch.tensor(weights))


@pytest.mark.parametrize("backend", ["kmedoids", "sklearn-extra"])
def test_other_backends_know_no_weights(backend):
    with pytest.raises(InputError, match=f"backend='{backend}' knows no weights"):
        k_medoids(points_matrix(3), 2, weights=torch.ones(3), backend=backend)
