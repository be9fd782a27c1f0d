import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.spatial.distance import cdist
from scipy.stats import norm

from tp_cosep.errors import InputError
from tp_cosep.functional import separability
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.functional.separability import (
    METRICS,
    distances_from_gram,
    pooled_gram,
    profile_gram,
    profiles,
)

# mean a, std a, mean b, std b
GAUSSIANS = [
    (0.0, 1.0, 0.0, 1.0),
    (0.0, 1.0, 2.0, 1.0),
    (1.0, 0.5, -1.0, 2.0),
    (3.0, 0.1, 3.0, 4.0),
    (-5.0, 1.5, 5.0, 0.7),
    (1e3, 2.0, 1003.0, 2.001),
]


def random_statistics(components=7, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    mean = torch.as_tensor(rng.normal(size=(components, classes)))
    return mean, torch.as_tensor(rng.uniform(0.05, 3, size=(components, classes)))


def random_moments(components=7, classes=5, cells=4, n=100, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    shift = rng.normal(size=(classes, components, cells))
    spread = rng.uniform(0.3, 2, size=(classes, components, cells))
    x = shift[y] + spread[y] * rng.normal(size=(n, components, cells))
    return ClassMoments.from_batch(torch.as_tensor(x), torch.as_tensor(y))


def separability_of(mean, var, metric):
    """Profiles of one cell from statistics [components, classes]."""
    classes = torch.arange(mean.shape[1])
    return profiles(ClassMoments(classes, torch.ones_like(classes), mean.T[..., None], var.T[..., None]), metric)


def by_formula(metric, mean_a, var_a, mean_b, var_b):
    """The metrics as the papers print them, but for 1/4 in place of 1/8."""
    if callable(metric):
        return metric(mean_a, var_a, mean_b, var_b)
    if metric == "wasserstein":
        return ((mean_a - mean_b) ** 2 + (var_a.sqrt() - var_b.sqrt()) ** 2).sqrt()
    b = (mean_a - mean_b) ** 2 / (var_a + var_b) / 4 + ((var_a + var_b) / (2 * (var_a * var_b).sqrt())).log() / 2
    return 2 * (1 - (-b).exp()) if metric == "jm" else (1 - (-b).exp()).sqrt()


def overlap(mean_a, std_a, mean_b, std_b):
    """Bhattacharyya coefficient as the integral of sqrt(p q)."""
    p, q, width = norm(mean_a, std_a), norm(mean_b, std_b), 12 * max(std_a, std_b)
    low, high = min(mean_a, mean_b) - width, max(mean_a, mean_b) + width
    return quad(lambda x: np.sqrt(p.pdf(x) * q.pdf(x)), low, high, points=(mean_a, mean_b), limit=500)[0]


def transport(mean_a, std_a, mean_b, std_b):
    """2-Wasserstein distance of one-dimensional laws: the quantile functions' L2 distance."""
    p, q = norm(mean_a, std_a), norm(mean_b, std_b)
    return np.sqrt(quad(lambda u: (p.ppf(u) - q.ppf(u)) ** 2, 0, 1, limit=500)[0])


def pair_statistics(mean_a, std_a, mean_b, std_b):
    mean = torch.tensor([[mean_a, mean_b]], dtype=torch.float64)
    return mean, torch.tensor([[std_a, std_b]], dtype=torch.float64) ** 2


@pytest.mark.parametrize("gaussians", GAUSSIANS, ids=str)
def test_distances_agree_with_numeric_integration(gaussians):
    mean, var = pair_statistics(*gaussians)
    coefficient = overlap(*gaussians)
    jm, hellinger, wasserstein = (separability_of(mean, var, m).item() for m in ("jm", "hellinger", "wasserstein"))
    assert jm == pytest.approx(2 * (1 - coefficient), rel=1e-8, abs=1e-9)
    # Squared, because the root of the integral's rounding error would be 1e-5 where both densities are equal.
    assert hellinger**2 == pytest.approx(1 - coefficient, rel=1e-8, abs=1e-9)
    assert wasserstein == pytest.approx(transport(*gaussians), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_moments_are_left_alone(metric):
    moments = random_moments()
    before = moments.mean.clone(), moments.m2.clone()
    profiles(moments, metric)
    profile_gram(moments, metric)
    assert torch.equal(moments.mean, before[0])
    assert torch.equal(moments.m2, before[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_pairs_are_in_triu_order(metric, classes):
    mean, var = random_statistics(classes=classes)
    result = separability_of(mean, var, metric)
    pairs = list(itertools.combinations(range(classes), 2))
    assert torch.triu_indices(classes, classes, 1).T.tolist() == [list(p) for p in pairs]
    assert result.shape == (len(mean), len(pairs))
    for column, pair in enumerate(pairs):
        for order in (pair, pair[::-1]):
            torch.testing.assert_close(result[:, [column]], separability_of(mean[:, order], var[:, order], metric))


def test_distances_stay_in_their_ranges():
    mean, var = random_statistics(components=96, classes=10)
    mean[:32], var[32:48] = mean[:32] * 1e4, 0
    jm, hellinger, wasserstein = (separability_of(mean, var, m) for m in ("jm", "hellinger", "wasserstein"))
    assert 0 <= jm.min() < 0.1
    assert jm.max() == 2
    assert 0 <= hellinger.min() < 0.2
    assert hellinger.max() == 1
    assert wasserstein.min() >= 0


@pytest.mark.parametrize("metric", ["jm", "hellinger"])
@pytest.mark.parametrize(
    ("scale", "shift"), [(-1, 0), (1e-6, 0), (3e5, 0), (1e-100, 0), (1e100, 0), (0.3, 100), (-7, 1e4)]
)
def test_jm_and_hellinger_ignore_affine_maps(metric, scale, shift):
    mean, var = random_statistics()
    mapped = separability_of(scale * mean + shift, scale**2 * var, metric)
    torch.testing.assert_close(mapped, separability_of(mean, var, metric), rtol=1e-8, atol=1e-8)


def test_wasserstein_is_in_units_of_the_activation():
    mean, var = random_statistics()
    mapped = separability_of(-3 * mean + 5, 9 * var, "wasserstein")
    torch.testing.assert_close(mapped, 3 * separability_of(mean, var, "wasserstein"))


@pytest.mark.parametrize("metric", [*METRICS, lambda ma, va, mb, vb: (ma - mb).abs() * (va + vb)])
def test_profile_is_every_pair_in_every_cell(metric):
    moments = random_moments(components=7, classes=5, cells=4)
    rows = profiles(moments, metric)
    assert rows.shape == (7, 10 * 4)
    assert rows.dtype == torch.float64
    pairs = enumerate(itertools.combinations(range(5), 2))
    for (p, (a, b)), j, s in itertools.product(pairs, range(7), range(4)):
        arguments = moments.mean[a, j, s], moments.var[a, j, s], moments.mean[b, j, s], moments.var[b, j, s]
        expected = by_formula(metric, *arguments)
        assert rows[j, p * 4 + s].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_components_are_independent_of_each_other(metric):
    moments = random_moments(components=12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    rows = profiles(moments, metric)
    moments = ClassMoments(moments.classes, moments.count, moments.mean[:, order], moments.m2[:, order])
    assert torch.equal(profiles(moments, metric), rows[order])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_constant_component_is_at_the_origin(metric, value):
    x = torch.randn(60, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    x[:, 1] = value
    rows = profiles(ClassMoments.from_batch(x, torch.arange(60) % 7), metric)
    # Class means of one constant differ by rounding, 1e-16; under Hellinger's root that is 1e-8.
    assert rows[1].abs().max() < 1e-7
    assert rows[[0, 2]].max() > 0.1


def test_constant_within_classes_separates_almost_perfectly():
    y = torch.arange(60) % 3
    x = (y == 2).double().view(-1, 1, 1)
    jm = profiles(ClassMoments.from_batch(x, y))
    # Floor 1e-6 of the whole variance 2/9: B is about 1 / (8 · 2.2e-7), so all the pairs with class 2 give 2.
    torch.testing.assert_close(jm, torch.tensor([[0.0, 2.0, 2.0]], dtype=torch.float64))


@pytest.mark.parametrize("metric", METRICS)
def test_class_without_variance_is_floored(metric):
    mean = torch.tensor([[0.0, 0.0, 0.1]], dtype=torch.float64)
    var = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    result = separability_of(mean, var, metric)
    assert torch.isfinite(result).all()
    whole = var.mean() + mean.var(unbiased=False)
    floored, m = torch.tensor([1e-6 * whole, 1.0, 2.0], dtype=torch.float64), mean[0]
    by_hand = by_formula(metric, m[[0, 0, 1]], floored[[0, 0, 1]], m[[1, 2, 2]], floored[[1, 2, 2]])[None]
    torch.testing.assert_close(result, by_hand, rtol=1e-12, atol=0)
    if metric == "jm":
        assert 1.8 < result[0, 0] < 2


def test_variance_below_float32_rounding_is_floored():
    # The same signal, a class distance of 1e-4, is real at 0 and within float32's rounding at 1e4.
    mean, var = torch.tensor([[0.0, 1e-4]]).double(), torch.full((1, 2), 1e-14).double()
    assert separability_of(mean, var, "jm").item() == pytest.approx(2)
    assert separability_of(mean + 1e4, var, "jm").item() < 0.1


def test_fewer_than_two_classes_are_refused():
    for call in (profiles, profile_gram):
        for moments in (random_moments(classes=1), ClassMoments()):
            with pytest.raises(InputError, match=f"expected moments of at least two classes, got {len(moments.count)}"):
                call(moments)


@pytest.mark.parametrize("call", [profiles, profile_gram])
@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("L2", r"metric: expected one of \['hellinger', 'jm', 'wasserstein'\] or a callable .* got 'L2'"),
        (lambda ma, va, mb, vb: (ma - mb).sum(), r"the inputs' shape \(7, 4, 4\), got \(\); .* elementwise"),
        (lambda ma, va, mb, vb: (ma - mb) / 0, "metric: got NaN or infinite separabilities"),
        (lambda ma, va, mb, vb: ma.fill_(torch.nan), "metric: got NaN or infinite separabilities"),
    ],
    ids=["name", "shape", "infinite", "nan"],
)
def test_metrics_that_cannot_be_used_are_refused(call, metric, message):
    with pytest.raises(InputError, match=message):
        call(random_moments(), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("components", "classes", "cells"), [(7, 5, 4), (10, 12, 1), (96, 2, 3), (1, 3, 2)])
# None leaves one chunk; 1 byte gives one pair per chunk; 3 pairs per chunk leave a last chunk of one (of 10).
@pytest.mark.parametrize("chunk_pairs", [None, 0, 3])
def test_gram_is_the_mean_product_of_profiles(monkeypatch, metric, components, classes, cells, chunk_pairs):
    if chunk_pairs is not None:
        monkeypatch.setattr(separability, "_CHUNK_BYTES", max(1, chunk_pairs * 8 * components * cells))
    moments = random_moments(components, classes, cells)
    x = profiles(moments, metric)
    gram = profile_gram(moments, metric)
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, x @ x.T / x.shape[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("n_bytes", "sizes"), [(3 * 8 * 7 * 4, [3, 3, 3, 1]), (1, [1] * 10)])
def test_gram_never_sees_more_pairs_than_a_chunk_holds(monkeypatch, n_bytes, sizes):
    monkeypatch.setattr(separability, "_CHUNK_BYTES", n_bytes)
    seen, product = [], separability.self_product
    monkeypatch.setattr(separability, "self_product", lambda x: seen.append(x.shape) or product(x))
    profile_gram(random_moments())
    assert seen == [(7, 4 * n) for n in sizes]


@pytest.mark.parametrize("shape", [(1, 3), (7, 40), (12, 1), (96, 450)], ids=str)
def test_distances_from_gram_are_euclidean(shape):
    x = np.random.default_rng(0).normal(size=shape)
    gram = torch.as_tensor(x @ x.T)
    before = gram.clone()
    d = distances_from_gram(gram)
    np.testing.assert_allclose(d.numpy(), cdist(x, x), rtol=1e-7, atol=1e-7)
    assert torch.equal(d, d.T)
    assert not d.diagonal().any()
    assert torch.equal(gram, before)
    assert torch.equal(distances_from_gram(gram.float()), distances_from_gram(gram.float().double()))


@pytest.mark.parametrize("scale", [1e-8, 1, 1e8])
def test_copies_are_at_distance_exactly_zero(scale):
    rng = np.random.default_rng(0)
    x = np.tile(scale * rng.normal(size=(5, 3000)), (2, 1))
    x[[4, 9]] = 0
    # The rounding of long sums, and a matrix product need not even return a symmetric matrix.
    gram = x @ x.T * (1 + 1e-14 * rng.uniform(-1, 1, size=(10, 10)))
    d = distances_from_gram(torch.as_tensor(gram))
    assert not d.diagonal(5).any()
    assert (d == 0).sum() == 10 + 10
    assert torch.equal(d, d.T)
    # Close neighbours are no copies.
    x[7, 0] += scale * 1e-3
    assert distances_from_gram(torch.as_tensor(x @ x.T))[2, 7] == pytest.approx(scale * 1e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("classes", "max_pairs", "n_shifts"), [(41, 100, 3), (40, 1, 1), (12, 60, None), (9, 27, None)]
)
def test_a_sample_of_pairs_has_every_class_as_often(monkeypatch, classes, max_pairs, n_shifts):
    """The mean of a class's number, and of the product with its partner's, say which pairs were looked at."""
    seen = []

    def metric(mean_a, var_a, mean_b, var_b):
        seen.extend(zip(mean_a[0, :, 0].tolist(), mean_b[0, :, 0].tolist(), strict=True))
        return (mean_a - mean_b).abs()

    moments = random_moments(1, classes, 1)
    moments.mean[:, 0, 0] = torch.arange(classes)
    profile_gram(moments, metric, max_pairs=max_pairs, seed=3)
    pairs = {frozenset(pair) for pair in seen}
    assert len(pairs) == len(seen)
    counts = [sum(c in pair for pair in pairs) for c in range(classes)]
    if n_shifts is None:  # nearly all, so all are taken
        assert len(pairs) == classes * (classes - 1) // 2
    else:
        assert counts == [2 * n_shifts] * classes
    first, seen[:] = pairs, []
    profile_gram(moments, metric, max_pairs=max_pairs, seed=4)
    assert (first == {frozenset(pair) for pair in seen}) == (n_shifts is None)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.slow
def test_a_sample_of_pairs_estimates_the_mean_over_all(metric):
    moments = random_moments(6, 31, 2)
    exact = profile_gram(moments, metric)
    samples = torch.stack([profile_gram(moments, metric, max_pairs=62, seed=s) for s in range(300)])
    error = samples.std(0) / len(samples) ** 0.5
    assert bool(((samples.mean(0) - exact).abs() < 5 * error).all())
    one_shift = torch.stack([profile_gram(moments, metric, max_pairs=31, seed=s) for s in range(300)])
    assert float(samples.std(0).mean()) < float(one_shift.std(0).mean())


@pytest.mark.slow
def test_the_error_of_a_sample_is_that_of_many_samples():
    moments = random_moments(classes=61, components=9, n=300)
    exact, nothing = pooled_gram([moments], [None])
    assert nothing == 0
    squared = distances_from_gram(exact).square()
    errors, said = [], []
    for seed in range(200):
        gram, error = pooled_gram([moments], [None], max_pairs=6 * 61, seed=seed)
        errors.append((distances_from_gram(gram).square() - squared).square().sum() / squared.square().sum())
        said.append(error)
    measured = float(torch.stack(errors).mean().sqrt())
    assert 0.85 < float(np.mean(said)) / measured < 1.15
    assert np.isnan(pooled_gram([moments], [None], max_pairs=5)[1])
    few, most = (pooled_gram([moments], [None], max_pairs=n * 61)[1] for n in (3, 28))
    assert most < few / 5  # 28 of 30 cycles
