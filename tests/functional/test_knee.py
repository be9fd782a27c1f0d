import numpy as np
import pytest
import torch

from tp_cosep.cli.demo import train_net
from tp_cosep.errors import InputError
from tp_cosep.functional.knee import Knee, find_knee, guarded_count
from tp_cosep.functional.selection import select_channels
from tp_cosep.functional.separability import distances_from_gram, profile_gram
from tp_cosep.selection.cosep import CoSePSelector


def distances(x):
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return (d + d.T) / 2


def planted(r, n, n_dims, noise, seed):
    """n profiles in [0, 2], noisy copies of r distinct ones; noise as a share of the range."""
    g = torch.Generator().manual_seed(seed)
    originals = 2 * torch.rand(r, n_dims, generator=g, dtype=torch.float64)
    copies = originals[torch.arange(n) % r]
    return copies + 2 * noise * torch.randn(n, n_dims, generator=g, dtype=torch.float64)


def strongest_by_hand(ks, values):
    """Largest height of the curve over the chord between its ends, both axes scaled to [0, 1]."""
    heights = []
    for k, v in zip(ks, values, strict=True):
        x = (k - ks[0]) / (ks[-1] - ks[0])
        y = (v - min(values)) / (max(values) - min(values))
        heights.append(y - x)
    best = max(range(len(ks)), key=heights.__getitem__)
    return ks[best], heights[best]


@pytest.mark.parametrize("n", [10, 33, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_strongest_is_the_highest_point_over_the_chord(n, seed):
    g = np.random.default_rng(seed)
    ks = list(range(2, n + 1))
    values = np.sort(g.random(len(ks)) ** 0.5 * 0.85).tolist()
    found = find_knee(ks, values, "strongest")
    k, height = strongest_by_hand(ks, values)
    assert found.k == k
    assert found.strength == pytest.approx(height)


@pytest.mark.parametrize("n_dims", [45, 720])
@pytest.mark.parametrize("noise", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("r", [4, 7, 16, 24, 32])
def test_default_recovers_planted_redundancy(r, noise, n_dims):
    for seed in range(3):
        selection = select_channels(distances(planted(r, 64, n_dims, noise, seed)))
        assert abs(selection.k - r) <= 1


@pytest.mark.parametrize("n", [32, 64, 129])
@pytest.mark.parametrize("n_dims", [45, 450])
def test_default_keeps_independent_profiles(n, n_dims):
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        x = 2 * torch.rand(n, n_dims, generator=g, dtype=torch.float64)
        assert select_channels(distances(x)).k >= 0.7 * n


def test_first_and_strongest_differ_where_a_small_knee_comes_first():
    ks = list(range(2, 13))
    values = [0.0, 0.3, 0.25, 0.3, 0.5, 0.8, 0.82, 0.84, 0.85, 0.86, 0.87]
    assert find_knee(ks, values, "first").k == 3
    assert find_knee(ks, values, "strongest").k == 7


@pytest.mark.parametrize(
    ("ks", "values"),
    [([], []), ([2], [0.5]), ([2, 3], [0.2, 0.8]), ([2, 3, 4, 5], [0.5] * 4), ([2, 3, 4, 5], [0.1, 0.12, 0.2, 1.0])],
    ids=["none", "one", "two", "constant", "convex"],
)
@pytest.mark.parametrize("rule", ["strongest", "first"])
def test_curves_without_a_knee(ks, values, rule):
    assert find_knee(ks, values, rule) == Knee(None, 0.0)


def test_curve_that_starts_saturated_has_its_knee_there():
    assert find_knee([2, 3, 4, 5], [0.95, 0.96, 0.97, 1.0]).k == 2
    assert select_channels(distances(planted(2, 64, 45, 0.02, 0))).k == 2


def test_strength_is_a_share():
    found = find_knee([2, 3, 4, 5, 6], [0.0, 0.89, 0.9, 0.95, 1.0], "strongest")
    assert 0 < found.strength <= 1


@pytest.mark.parametrize(("represented", "expected"), [(0.9, 20), (0.6, 20), (0.35, 60), (0.1, 100), (-1.0, 100)])
def test_guarded_count_moves_linearly_between_its_bounds(represented, expected):
    assert guarded_count(100, 20, represented) == expected


def test_guard_only_ever_keeps_more():
    g = torch.Generator().manual_seed(5)
    d = distances(torch.rand(40, 6, generator=g, dtype=torch.float64))
    strongest = select_channels(d, knee="strongest")
    guarded = select_channels(d, knee="guarded")
    assert guarded.knee_k == strongest.knee_k == strongest.k
    assert strongest.k < guarded.k < 40


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: find_knee([2, 3, 4], [0.1, 0.2, 0.3], "elbow"),
            r"a rule of \['guarded', 'strongest', 'first'\], got 'elbow'",
        ),
        (lambda: find_knee([], [], "paper"), "knee: expected a rule of .* got 'paper'"),
        (lambda: find_knee([2, 3, 4], [0.1, 0.2]), "one finite value for each of 3 k"),
        (lambda: find_knee([2, 3, 4], [0.1, float("nan"), 0.3]), "one finite value"),
    ],
)
def test_errors(call, match):
    with pytest.raises(InputError, match=match):
        call()


@pytest.mark.slow
def test_default_is_stable_on_the_layers_of_the_demo():
    # Two disjoint halves of the calibration data: counts within a tenth of the layer.
    net, images = train_net("digits", seed=0)
    n = len(images.train_labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    moments = [
        CoSePSelector()
        .fit(net, [(images.train_images[half], images.train_labels[half])], progress=False)
        .statistics.moments
        for half in (order[: n // 2], order[n // 2 :])
    ]
    for name in ("conv1", "conv2", "conv3", "conv4"):
        one, two = (select_channels(distances_from_gram(profile_gram(half[name]))).k for half in moments)
        assert abs(one - two) <= 0.1 * moments[0][name].n_components, name
