import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_samples

from tp_cosep.functional.kmedoids import KMedoids, k_medoids_path
from tp_cosep.functional.silhouette import mean_simplified_silhouette, mss_curve, non_medoid_silhouette

SIZES = [3, 7, 12, 16, 33]
BOTH = pytest.mark.parametrize("silhouette", [mean_simplified_silhouette, non_medoid_silhouette])


def points_matrix(n, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, 3))
    return torch.as_tensor(np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1)))


def random_solutions(d, seed=0):
    """Any medoids with any labels, so that a > b occurs too, and the medoids in any order."""
    rng = np.random.default_rng(seed)
    for k in range(2, len(d) + 1):
        medoids = torch.as_tensor(rng.permutation(len(d))[:k])
        labels = torch.as_tensor(rng.integers(0, k, size=len(d)))
        labels[medoids] = torch.arange(k)
        yield medoids, labels


def naive(silhouette, d, medoids, labels):
    medoids, terms = medoids.tolist(), []
    for i, label in enumerate(labels.tolist()):
        a = float(d[i, medoids[label]])
        others = [float(d[i, m]) for position, m in enumerate(medoids) if position != label]
        b = sum(others) / len(others)
        if silhouette is mean_simplified_silhouette:
            terms.append(1 - a / b)
        elif i not in medoids:
            terms.append((b - a) / max(a, b))
    return sum(terms) / len(terms) if terms else 0.0


def by_sklearn(silhouette, d, solution):
    """For one point, all the other medoids put in one cluster make silhouette's b their mean distance."""
    medoids, terms = solution.medoids.tolist(), []
    for i, label in enumerate(solution.labels.tolist()):
        if i in medoids:
            continue
        own = medoids[label]
        some = [i, own, *(m for m in medoids if m != own)]
        labels = [0, 0] + [1] * (len(medoids) - 1)
        terms.append(silhouette_samples(d[np.ix_(some, some)], labels, metric="precomputed")[0])
    if silhouette is mean_simplified_silhouette:
        return (sum(terms) + len(medoids)) / len(d)
    return np.mean(terms)


@BOTH
@pytest.mark.parametrize("n", SIZES)
def test_mss_agrees_with_a_loop_for_any_labels(n, silhouette):
    d = points_matrix(n)
    for medoids, labels in random_solutions(d):
        value = silhouette(d, medoids, labels)
        assert isinstance(value, float)
        assert value == pytest.approx(naive(silhouette, d, medoids, labels), rel=1e-10, abs=1e-12)


@BOTH
@pytest.mark.parametrize("n", [3, 7, 12, 16])
def test_mss_agrees_with_scikit_learn_for_nearest_medoids(n, silhouette):
    d = points_matrix(n)
    for solution in k_medoids_path(d, range(2, n)):
        value = silhouette(d, solution.medoids, solution.labels)
        # With nearest medoids a <= b, and 1 - a/b is scikit-learn's (b - a) / max(a, b).
        assert value == pytest.approx(by_sklearn(silhouette, d.numpy(), solution), rel=1e-10)


def test_mss_by_hand():
    # Points 0, 1, 4, 9 on a line, medoids 0, 4 and 9: the point at 1 has a = 1, b = (3 + 8) / 2.
    x = torch.tensor([0.0, 1.0, 4.0, 9.0])
    d, medoids, labels = (x[:, None] - x).abs(), torch.tensor([0, 2, 3]), torch.tensor([0, 0, 1, 2])
    assert mean_simplified_silhouette(d, medoids, labels) == pytest.approx((3 + 1 - 1 / 5.5) / 4)
    assert non_medoid_silhouette(d, medoids, labels) == pytest.approx(4.5 / 5.5)


@pytest.mark.parametrize("n", [2, 7, 10, 96])
def test_every_point_its_own_medoid(n):
    d = points_matrix(n)
    everything = torch.arange(n)
    assert mean_simplified_silhouette(d, everything, everything) == 1
    assert non_medoid_silhouette(d, everything, everything) == 0


@BOTH
def test_single_medoid_has_nothing_to_compare_with(silhouette):
    for n in (1, 7):
        medoids, labels = torch.tensor([n // 2]), torch.zeros(n, dtype=torch.int64)
        assert silhouette(points_matrix(n), medoids, labels) == 0


@BOTH
@pytest.mark.parametrize("n", [7, 12, 96])
def test_mss_is_between_zero_and_one_for_nearest_medoids(n, silhouette):
    d = points_matrix(n)
    curve = [silhouette(d, s.medoids, s.labels) for s in k_medoids_path(d)]
    assert 0 <= min(curve) < max(curve) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_silhouette_of_non_medoids_is_above_minus_one_for_any_labels(seed):
    d = points_matrix(12, seed)
    for medoids, labels in random_solutions(d, seed):
        assert -1 < non_medoid_silhouette(d, medoids, labels) <= 1


@pytest.mark.parametrize("k", [2, 4, 6])
def test_points_that_coincide_count_one_as_medoid_and_zero_otherwise(k):
    d = torch.zeros(7, 7, dtype=torch.float64)
    solution = KMedoids.from_medoids(d, torch.arange(k))
    assert mean_simplified_silhouette(d, solution.medoids, solution.labels) == pytest.approx(k / 7)
    assert non_medoid_silhouette(d, solution.medoids, solution.labels) == 0


def test_points_that_coincide_with_every_medoid_beside_points_that_do_not():
    # Three copies, two of them the medoids, and a point at distance 2: a = b for all, no point is told apart.
    d = torch.zeros(4, 4, dtype=torch.float64)
    d[3, :3] = d[:3, 3] = 2
    medoids, labels = torch.tensor([0, 1]), torch.tensor([0, 1, 0, 0])
    assert mean_simplified_silhouette(d, medoids, labels) == pytest.approx(2 / 4)
    assert non_medoid_silhouette(d, medoids, labels) == 0


@BOTH
def test_neither_scale_nor_order_of_points_or_medoids_matters(silhouette):
    d = points_matrix(10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    inverse = order.argsort()
    for medoids, labels in random_solutions(d):
        value = silhouette(d, medoids, labels)
        expected = pytest.approx(value, rel=1e-10, abs=1e-12)
        assert silhouette(1e6 * d, medoids, labels) == expected
        moved = d[order][:, order], inverse[medoids], labels[order]
        assert silhouette(*moved) == expected
        flipped = d, medoids.flip(0), len(medoids) - 1 - labels
        assert silhouette(*flipped) == expected


def test_planted_clusters_have_a_high_silhouette_only_at_their_number():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 20))
    x = centres[np.arange(42) % 6] + 0.01 * rng.normal(size=(42, 20))
    d = torch.as_tensor(np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1)))
    curve = mss_curve(d, k_medoids_path(d))
    assert curve[6 - 2] > 0.98
    assert curve[5 - 2] < 0.95


def one_by_one(d, path):
    return [mean_simplified_silhouette(d, s.medoids, s.labels) for s in path]


@pytest.mark.parametrize(("n", "ks"), [(10, [7, 1, 10, 2]), (96, None), (33, range(33, 0, -1)), (7, [3, 3])], ids=str)
def test_curve_is_the_mss_of_each_solution(n, ks):
    d = points_matrix(n)
    path = k_medoids_path(d, ks)
    curve = mss_curve(d, path)
    assert curve.dtype == torch.float64
    assert curve.tolist() == pytest.approx(one_by_one(d, path), rel=1e-10)
    assert mss_curve(d, []).shape == (0,)


def test_curve_of_solutions_with_little_in_common():
    d = points_matrix(20)
    path = [KMedoids.from_medoids(d, medoids) for medoids, _ in random_solutions(d)]
    assert mss_curve(d, path).tolist() == pytest.approx(one_by_one(d, path), rel=1e-10)


def test_curve_at_points_that_coincide_with_every_medoid():
    # Three copies at 0: once 0.3 and then 0.1 and 0.2 are no medoids any more, the copies' b is 0 again, where updated
    # sums leave a residue of 1e-17.
    x = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.2, 0.3], dtype=torch.float64)
    d = (x[:, None] - x).abs()
    path = [KMedoids.from_medoids(d, torch.tensor(m)) for m in ([0, 1, 3, 4, 5], [0, 1, 3, 4], [0, 1, 3], [0, 1])]
    assert mss_curve(d, path).tolist() == pytest.approx(one_by_one(d, path), rel=1e-10)


@BOTH
@pytest.mark.parametrize("n", [7, 12])
def test_a_weight_counts_a_point_so_many_times(n, silhouette):
    d, times = points_matrix(n), torch.as_tensor(np.random.default_rng(n).integers(0, 5, size=n))
    for medoids, labels in random_solutions(d):
        if silhouette is non_medoid_silhouette:
            counted = times.clone()
            counted[medoids] = 0
            terms = [(naive_term(d, medoids, labels, i), int(counted[i])) for i in range(n)]
        else:
            terms = [
                (1.0 if i in medoids.tolist() else naive_mss(d, medoids, labels, i), int(times[i])) for i in range(n)
            ]
        total = sum(count for _, count in terms)
        expected = sum(value * count for value, count in terms) / total if total else float(len(medoids) < n)
        assert silhouette(d, medoids, labels, times) == pytest.approx(expected, abs=1e-12)


def a_and_b(d, medoids, labels, i):
    own = int(medoids[labels[i]])
    others = [float(d[i, m]) for m in medoids.tolist() if m != own]
    return float(d[i, own]), sum(others) / len(others)


def naive_mss(d, medoids, labels, i):
    a, b = a_and_b(d, medoids, labels, i)
    return 1 - a / b


def naive_term(d, medoids, labels, i):
    a, b = a_and_b(d, medoids, labels, i)
    return (b - a) / max(a, b)


@BOTH
def test_unit_weights_change_nothing(silhouette):
    d = points_matrix(33)
    for medoids, labels in random_solutions(d):
        assert silhouette(d, medoids, labels, torch.ones(33)) == silhouette(d, medoids, labels)
