"""PAM of scikit-learn-extra ends in a local optimum, and not always in the native backend's."""

import itertools

import pytest
import torch

from tp_cosep.functional.kmedoids import k_medoids, k_medoids_path

pytestmark = pytest.mark.sklearn_extra

pytest.importorskip("sklearn_extra.cluster", reason="needs scikit-learn-extra", exc_type=ImportError)


def distances_between(points):
    return (points[:, None] - points).norm(dim=2)


def random_points(n, seed):
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def total_deviation(distances, medoids):
    return float(distances[:, list(medoids)].amin(1).sum())


def best_deviation(distances, k):
    candidates = itertools.combinations(range(len(distances)), k)
    return min(total_deviation(distances, medoids) for medoids in candidates)


@pytest.mark.filterwarnings("ignore:n_clusters should be larger than 2:UserWarning")
@pytest.mark.parametrize("k", range(1, 8))
@pytest.mark.parametrize("seed", range(6))
def test_deviation_is_close_to_brute_force(k, seed):
    distances = distances_between(random_points(7, seed))
    solution = k_medoids(distances, k, backend="sklearn-extra")
    best = best_deviation(distances, k)
    assert solution.k == k
    assert solution.medoids.tolist() == sorted(set(solution.medoids.tolist()))
    assert len(solution.medoids) == k
    assert solution.total_deviation == pytest.approx(total_deviation(distances, solution.medoids))
    assert best - 1e-9 <= solution.total_deviation <= 1.07 * best + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_separated_clusters_give_the_optimum(seed):
    centres = torch.tensor([0.0, 0, 0, 50, 50, 100, 100], dtype=torch.float64)
    distances = distances_between(random_points(7, seed) + centres[:, None])
    solution = k_medoids(distances, 3, backend="sklearn-extra")
    assert solution.total_deviation == pytest.approx(best_deviation(distances, 3))
    assert solution.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("seed", range(3))
def test_deviation_is_close_to_the_native_backend(seed):
    distances = distances_between(random_points(40, seed))
    ks = [2, 5, 12, 39, 40]
    native = k_medoids_path(distances, ks)
    theirs = k_medoids_path(distances, ks, backend="sklearn-extra")
    assert [solution.k for solution in theirs] == ks
    for a, b in zip(theirs, native, strict=True):
        assert a.total_deviation == pytest.approx(b.total_deviation, rel=0.05, abs=1e-9)
