"""The curve at some numbers of clusters against the full path: every k swapped to convergence, one after the other."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from kneed import KneeLocator

from tp_cosep.errors import InputError
from tp_cosep.functional.kmedoids import GrowingPath, checkpoints_for, k_medoids, k_medoids_path
from tp_cosep.functional.knee import difference_curve, find_knee
from tp_cosep.functional.selection import select_channels
from tp_cosep.functional.silhouette import mss_curve

SIZES = [33, 47, 100, 130, 257]


def euclidean(x):
    return np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))


def latent(n, seed=0):
    """Curved profiles over a few hidden causes, as those of trained layers are."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 6)) * rng.gamma(1.0, 1.0, size=(n, 1))
    return euclidean(2 * (1 - np.exp(-((z @ rng.normal(size=(6, 90))) ** 2) / 6)))


def planted(n, seed=0):
    rng = np.random.default_rng(seed)
    x = 2 * rng.random((n // 4, 45))[np.arange(n) % (n // 4)]
    return euclidean(x + 0.1 * rng.normal(size=(n, 45)))


def ties(n, seed=0):
    """Few distinct points on a grid, each several times."""
    return euclidean(np.random.default_rng(seed).integers(0, 4, size=(n, 3)).astype(float))


MATRICES = {"latent": latent, "planted": planted, "ties": ties}


def full_path(d):
    path = GrowingPath(torch.as_tensor(d), list(range(1, len(d) + 1)))
    return [path.solve(k) for k in range(2, len(d) + 1)]


def largest_gain_of_a_swap(d, medoids):
    others = np.setdiff1d(np.arange(len(d)), medoids)
    deviation = d[:, medoids].min(1).sum()
    best = -np.inf
    for out in medoids:
        left = d[:, medoids[medoids != out]].min(1, initial=np.inf)
        best = max(best, deviation - np.minimum(left[:, None], d[:, others]).sum(0).min())
    return best


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", MATRICES)
def test_knee_and_height_are_those_of_the_full_path(name, n):
    d = MATRICES[name](n)
    mss = mss_curve(torch.as_tensor(d), full_path(d)).tolist()
    found = find_knee(range(2, n + 1), mss, "strongest")
    selection = select_channels(torch.as_tensor(d))
    assert abs(selection.knee_k - found.k) <= max(0.02 * n, 1 if n <= 64 else 3)
    assert selection.knee_strength == pytest.approx(found.strength, abs=0.002)
    # At what was found, the whole curve is nowhere higher: also not beyond the last k tried.
    height = difference_curve(range(2, n + 1), mss)
    assert height.max() <= selection.knee_strength + 0.002
    # Every checkpoint at which the curve could be higher has been tried, and not much else.
    might_be = {k for k in checkpoints_for(n)[1:-1] if 1 - (k - 2) / (n - 2) >= selection.knee_strength}
    assert might_be <= set(selection.ks)
    if n > 64:
        assert len(selection.ks) < 0.6 * n


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.slow
def test_both_neighbours_of_the_knee_are_tried_and_lower(name, n):
    d = torch.as_tensor(MATRICES[name](n))
    selection = select_channels(d)
    k = selection.knee_k
    assert {k - 1, k, k + 1} <= set(selection.ks)
    lowest = selection.ks[int(np.argmin(selection.mss))]
    assert {max(lowest - 1, 2), lowest + 1} <= set(selection.ks)
    assert selection.ks == tuple(sorted(set(selection.ks)))
    assert (selection.ks[0], selection.ks[-1], selection.mss[-1]) == (2, n, 1)
    assert all(a < b for a, b in pairwise(selection.ks))
    own = [k_medoids(d, k) for k in selection.ks]
    assert selection.mss == pytest.approx(mss_curve(d, own).tolist(), rel=1e-9)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", MATRICES)
def test_where_the_count_is_given_only_checkpoints_are_tried(name, n):
    d = torch.as_tensor(MATRICES[name](n))
    automatic, fixed = select_channels(d), select_channels(d, n_keep=n // 2)
    assert set(fixed.ks) <= set(automatic.ks) & set(checkpoints_for(n))
    mss = dict(zip(automatic.ks, automatic.mss, strict=True))
    assert fixed.mss == pytest.approx([mss[k] for k in fixed.ks], rel=1e-9)
    found = find_knee(fixed.ks, fixed.mss, "strongest")
    assert (fixed.knee_k, fixed.knee_strength) == (found.k, found.strength)
    assert fixed.keep_idxs == tuple(k_medoids(d, n // 2).medoids.tolist())


@pytest.mark.parametrize("name", MATRICES)
def test_every_k_tried_is_swap_optimal(name):
    d = MATRICES[name](100)
    path = GrowingPath(torch.as_tensor(d))
    for k in select_channels(torch.as_tensor(d)).ks:
        solution = path.solve(k)
        assert solution.total_deviation == pytest.approx(d[:, solution.medoids].min(1).sum(), rel=1e-12, abs=1e-9)
        if k < 100:
            gain = largest_gain_of_a_swap(d, solution.medoids.numpy())
            assert gain <= 1e-10 * solution.total_deviation + 1e-12 * d.sum() / 100


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("n", [100, 131])
def test_a_solution_does_not_depend_on_what_was_asked_before(name, n):
    d = torch.as_tensor(MATRICES[name](n))
    ascending = {s.k: s for s in k_medoids_path(d)}
    path = GrowingPath(d)
    for k in np.random.default_rng(n).permutation(np.arange(2, n + 1))[:40].tolist():
        solution = path.solve(k)
        assert torch.equal(solution.medoids, ascending[k].medoids), k
        assert torch.equal(solution.labels, ascending[k].labels), k
        assert solution.total_deviation == pytest.approx(ascending[k].total_deviation, rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("n", [33, 130])
@pytest.mark.parametrize("name", ["latent", "planted"])
def test_total_deviation_is_as_low_as_fasterpams(name, n):
    kmedoids = pytest.importorskip("kmedoids")
    d = MATRICES[name](n)
    ratios = [
        s.total_deviation / kmedoids.fasterpam(d, s.k, random_state=0).loss for s in k_medoids_path(d, range(2, n))
    ]
    assert np.mean(ratios) <= 1.002


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 66, 100, 4096])
def test_checkpoints(n):
    ks = checkpoints_for(n)
    assert (ks[0], ks[-1]) == (1, n)
    assert all(0 < b - a <= (1 if n <= 32 or a == 1 else max(2, a / 3)) for a, b in pairwise(ks))
    assert len(ks) <= 32 if n <= 32 else len(ks) <= 7 + 3 * np.log2(n)


@pytest.mark.parametrize("n", [1, 2, 3, 33, 65, 100])
def test_all_components_at_one_place(n):
    selection = select_channels(torch.zeros(n, n))
    assert (selection.k, selection.keep_idxs) == (1, (0,))
    assert selection == select_channels(torch.zeros(n, n))


@pytest.mark.parametrize("n", [2, 3])
def test_two_and_three_components(n):
    for seed in range(3):
        d = latent(n, seed)
        selection = select_channels(torch.as_tensor(d))
        ks, mss = range(2, n + 1), mss_curve(torch.as_tensor(d), full_path(d)).tolist()
        assert selection.ks == tuple(ks)
        assert selection.mss == pytest.approx(mss)
        assert selection.knee_k == find_knee(ks, mss).k


def test_the_first_knee_requires_the_curve_at_every_k():
    assert select_channels(torch.as_tensor(latent(70)), knee="first").ks == tuple(range(2, 71))


def test_other_backends_are_asked_for_no_more_than_they_need():
    pytest.importorskip("kmedoids")
    d = torch.as_tensor(planted(100))
    native, other = select_channels(d), select_channels(d, backend="kmedoids")
    assert (native.knee_k, len(other.ks) < 60) == (other.knee_k, True)


@pytest.mark.parametrize("seed", range(3))
def test_difference_curve_is_kneeds_also_in_uneven_steps(seed):
    rng = np.random.default_rng(seed)
    ks = np.sort(rng.permutation(np.arange(2, 200))[:30])
    values = np.sort(rng.random(30))
    theirs = KneeLocator(ks, values, curve="concave", direction="increasing").y_difference
    np.testing.assert_allclose(difference_curve(ks, values), theirs, atol=1e-14)
    found = find_knee(ks.tolist(), values.tolist(), "strongest")
    assert (found.k, found.strength) == (ks[theirs.argmax()], pytest.approx(theirs.max()))
    assert not difference_curve([2, 3, 9], [0.5, 0.5, 0.5]).any()


def rounded_by_hand(k, step, n, mss):
    """Of the multiples next to k, the one with the MSS nearest to that of k; the larger one on ties."""
    if k % step == 0:
        return k
    candidates = [m for m in range(step, n + 1, step) if abs(m - k) < step]
    return min(candidates, key=lambda m: (abs(mss[m] - mss[k]), -m), default=n)


@pytest.mark.parametrize("n", [10, 33, 70])
@pytest.mark.parametrize("step", [1, 2, 4, 7, 8, 16, 33, 71])
@pytest.mark.slow
def test_counts_are_rounded_to_multiples_of_a_step(n, step):
    d = torch.as_tensor(latent(n))
    path = k_medoids_path(d, range(1, n + 1))
    mss = dict(enumerate(mss_curve(d, path).tolist(), start=1))
    for options in ({}, {"knee": "strongest"}, *({"n_keep": k} for k in range(1, n + 1, 1 + n // 12))):
        plain, rounded = select_channels(d, **options), select_channels(d, **options, round_to=step)
        assert rounded.k == len(rounded.keep_idxs) == rounded_by_hand(plain.k, step, n, mss)
        assert rounded.k % step == 0 or step > n
        assert (rounded.ks, rounded.mss, rounded.knee_k) == (plain.ks, plain.mss, plain.knee_k)


def test_the_larger_multiple_is_taken_on_ties():
    # Equidistant points: MSS(k) = k / n, so 4 and 8 are as far from 6 but for rounding.
    for n in (12, 20, 28):
        assert select_channels(1 - torch.eye(n, dtype=torch.float64), n_keep=n // 2, round_to=4).k == n // 2 + 2


@pytest.mark.parametrize("step", [0, -1, 2.0, "2"])
def test_steps_that_are_none_are_refused(step):
    with pytest.raises(InputError, match="selection: expected an integer round_to ≥ 1, got"):
        select_channels(torch.as_tensor(latent(10)), round_to=step)
