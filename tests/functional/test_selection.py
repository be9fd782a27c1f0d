from dataclasses import fields

import numpy as np
import pytest
import torch
from models import seeded
from scipy.spatial.distance import cdist

from tp_cosep.errors import InputError
from tp_cosep.functional.kmedoids import k_medoids, k_medoids_path
from tp_cosep.functional.selection import ChannelSelection, nested_scores, select_channels
from tp_cosep.functional.silhouette import mean_simplified_silhouette


def points(n, dim=5, seed=0):
    return torch.randn(n, dim, generator=seeded(seed), dtype=torch.float64)


def planted(n_clusters, size, noise=0.05, seed=0):
    """Distances between noisy copies of a few points, in random order."""
    centres = points(n_clusters, 20, seed)
    x = centres.repeat(size, 1) + noise * points(n_clusters * size, 20, seed + 1)
    return distances(x[torch.randperm(len(x), generator=seeded(seed))])


def distances(x):
    return torch.as_tensor(cdist(x.numpy(), x.numpy()))


def deviation(d, kept):
    """TD: every point's distance to the nearest kept one, summed."""
    return float(d[sorted(kept)].min(0).values.sum())


def assert_greedy(d, keep, scores):
    """Follow the order of the scores step by step and try every other step there: none is better, but for rounding.

    The shares, too, are what the steps cost and gain. (Exact ties are common: of two components that are each
    other's nearest, either helps as much.)
    """
    n, single = len(d), min(deviation(d, {j}) for j in range(len(d)))
    order = scores.argsort(descending=True).tolist()
    left, taken, costs, gains = set(keep), set(keep), [single], []
    for j in order[1 : len(keep)][::-1]:
        loss = {i: deviation(d, left - {i}) - deviation(d, left) for i in left}
        assert loss[j] <= min(loss.values()) + 1e-9 * single
        costs.insert(1, loss[j])
        left -= {j}
    for j in order[len(keep) :]:
        gain = {i: deviation(d, taken) - deviation(d, taken | {i}) for i in range(n) if i not in taken}
        assert gain[j] >= max(gain.values()) - 1e-9 * single
        gains.append(gain[j])
        taken |= {j}
    shares = [min(share / single, 1.0) for share in costs + gains]
    expected = [max(shares[rank:]) + 1e-6 * (n - rank) / n for rank in range(n)]
    np.testing.assert_allclose(scores[order].numpy(), expected, rtol=1e-9, atol=1e-12)
    assert_orders(scores, keep)


def assert_orders(scores, keep):
    """The scores are distinct, in range, and the best of them are the kept ones."""
    assert scores.dtype == torch.float64
    assert len(set(scores.tolist())) == len(scores)
    assert scores.min() > 0
    assert scores.max() <= 1 + 1e-6
    assert set(scores.topk(len(keep)).indices.tolist()) == set(keep)


@pytest.mark.parametrize("n", [2, 3, 10, 17])
@pytest.mark.parametrize("of_medoids", [True, False])
def test_scores_are_a_greedy_order_around_the_kept_set(n, of_medoids):
    for seed in range(4):
        d = distances(points(n, seed=seed))
        for k in {1, 2, n // 2, n - 1, n}:
            anything = torch.randperm(n, generator=seeded(seed))[:k].sort().values
            keep = k_medoids(d, k).medoids if of_medoids else anything
            assert_greedy(d, keep.tolist(), nested_scores(d, keep))


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_scores_are_distinct_where_all_components_are_alike(n):
    d = torch.zeros(n, n, dtype=torch.float64)
    assert_orders(nested_scores(d, torch.arange(min(3, n))), list(range(min(3, n))))


def test_the_shares_say_what_the_loss_of_a_component_costs():
    # Two points far apart with a copy each, and one in the middle that no other represents.
    d = distances(torch.tensor([[0.0], [0.0], [4.0], [9.0], [9.0]], dtype=torch.float64))
    # The best single one is the middle one: 4 + 4 + 5 + 5 = 18.
    scores = nested_scores(d, torch.tensor([0, 2, 3]))
    # Dropping 2 costs 4 (to 0); then of 0 and 3 either is worth more than 18, hence 1.
    assert scores[[0, 3]].min() >= 1
    assert scores.argsort(descending=True).tolist()[-2:] == [1, 4]
    assert float(scores[2]) == pytest.approx(4 / 18, abs=2e-6)
    assert scores[[1, 4]].max() < 1e-6


@pytest.mark.parametrize("n", [1, 2, 3, 10, 12, 21])
def test_a_fixed_count_is_the_k_medoids_solution_of_that_size(n):
    d = distances(points(n))
    for k in range(1, n + 1):
        selection = select_channels(d, n_keep=k)
        medoids = k_medoids(d, k).medoids.tolist()
        assert list(selection.keep_idxs) == medoids == list(selection.medoids)
        assert selection.k == k == len(selection.keep_idxs)
        assert sorted(selection.keep_idxs + selection.prune_idxs) == list(range(n))
        assert list(selection.prune_idxs) == sorted(selection.prune_idxs)
        nearest = d[medoids].argmin(0)
        assert list(selection.labels) == nearest.tolist()
        assert_orders(selection.scores, medoids)


@pytest.mark.parametrize(("n", "n_keep"), [(10, 0), (10, 11), (10, -1), (1, 2)])
def test_an_impossible_count(n, n_keep):
    with pytest.raises(InputError, match=rf"expected n_keep in 1 … {n} \(the number of components\), got {n_keep}"):
        select_channels(distances(points(n)), n_keep=n_keep)


def test_a_count_that_is_no_integer():
    with pytest.raises(InputError, match=r"2\.5"):
        select_channels(distances(points(10)), n_keep=2.5)


def test_one_component():
    selection = select_channels(torch.zeros(1, 1))
    assert selection.keep_idxs == (0,)
    assert selection.prune_idxs == ()
    assert (selection.k, selection.knee_k, selection.knee_strength) == (1, None, 0.0)
    assert_orders(selection.scores, [0])


@pytest.mark.parametrize("knee", ["guarded", "strongest", "first"])
@pytest.mark.parametrize("n", [2, 3, 12, 40])
def test_of_components_that_are_all_alike_one_is_kept(n, knee):
    selection = select_channels(torch.zeros(n, n), knee=knee)
    assert selection.k == len(selection.keep_idxs) == 1
    assert_orders(selection.scores, selection.keep_idxs)


def test_two_components_that_differ_are_both_kept():
    selection = select_channels(distances(points(2)))
    assert selection.keep_idxs == (0, 1)


def naive_mss(d, medoids):
    """1 − a/b, a to the nearest medoid and b the mean distance to the others; 1 for a medoid."""
    widths = []
    for i in range(len(d)):
        to = sorted(float(d[i, m]) for m in medoids)
        widths.append(1.0 if i in medoids else 1 - to[0] / np.mean(to[1:]))
    return widths


@pytest.mark.parametrize("n", [10, 12, 21])
def test_the_curve_is_that_of_all_numbers_of_clusters(n):
    d = distances(points(n))
    selection = select_channels(d)
    assert selection.ks == tuple(range(2, n + 1))
    expected = [np.mean(naive_mss(d, k_medoids(d, k).medoids.tolist())) for k in selection.ks]
    np.testing.assert_allclose(selection.mss, expected, rtol=1e-9)
    # A fixed count changes which is kept, not what the curve and its knee are.
    fixed = select_channels(d, n_keep=4)
    assert (fixed.mss, fixed.knee_k, fixed.knee_strength) == (selection.mss, selection.knee_k, selection.knee_strength)


@pytest.mark.parametrize(("n_clusters", "size"), [(4, 6), (7, 5), (12, 8)])
@pytest.mark.parametrize("rule", ["guarded", "strongest"])
def test_planted_copies_are_found_and_one_of_each_kept(n_clusters, size, rule):
    for seed in range(3):
        d = planted(n_clusters, size, seed=seed)
        selection = select_channels(d, knee=rule)
        assert selection.k == selection.knee_k == n_clusters
        assert 0 < selection.knee_strength <= 1
        kept = list(selection.keep_idxs)
        # Everything has a kept one close by, and the kept ones are far from each other.
        assert float(d[kept].min(0).values.max()) < 1 < float((d[kept][:, kept] + torch.eye(len(kept)) * 9).min())


def test_the_guard_keeps_more_where_nothing_is_redundant():
    d = distances(points(40, dim=60))
    guarded, strongest = (select_channels(d, knee=rule) for rule in ("guarded", "strongest"))
    assert strongest.k == strongest.knee_k == guarded.knee_k < 40
    widths = naive_mss(d, k_medoids(d, guarded.knee_k).medoids.tolist())
    represented = np.mean([w for w in widths if w < 1])
    trust = min(max((represented - 0.1) / 0.5, 0.0), 1.0)
    assert guarded.k == round(40 - trust * (40 - guarded.knee_k)) > guarded.knee_k


def test_a_curve_without_a_knee_keeps_everything():
    # Equidistant points: MSS(k) is the straight line k/n, and nothing stands for anything else.
    d = 1 - torch.eye(12)
    for rule in ("guarded", "strongest", "first"):
        selection = select_channels(d, knee=rule)
        assert selection.knee_k is None
        assert selection.k == 12
        assert selection.prune_idxs == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_a_preference_chooses_the_best_of_each_cluster(dtype):
    d = distances(points(20))
    preference = (100 * torch.rand(20, generator=seeded(3))).to(dtype).requires_grad_(dtype.is_floating_point)
    plain, selection = select_channels(d, n_keep=6), select_channels(d, n_keep=6, preference=preference)
    assert selection.labels == plain.labels
    assert selection.medoids == plain.medoids
    values = preference.detach().tolist()
    best = [max((i for i in range(20) if plain.labels[i] == j), key=lambda i: (values[i], -i)) for j in range(6)]
    assert selection.keep_idxs == tuple(sorted(best))
    assert selection.keep_idxs != plain.keep_idxs
    assert_greedy(d, best, selection.scores)


def test_equal_preferences_go_to_the_lowest_index():
    d = planted(3, 4)
    selection = select_channels(d, n_keep=3, preference=torch.zeros(12))
    assert selection.keep_idxs == tuple(sorted(selection.labels.index(j) for j in range(3)))


def test_infinite_preferences_are_preferences():
    d = planted(2, 5)
    preference = torch.full((10,), -torch.inf)
    preference[7] = torch.inf
    assert 7 in select_channels(d, n_keep=2, preference=preference).keep_idxs


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        (torch.zeros(9), r"one preference per component, shape \(10,\), got \(9,\)"),
        (torch.zeros(10, 1), r"one preference per component, shape \(10,\), got \(10, 1\)"),
        (torch.full((10,), torch.nan), "got NaN preferences"),
    ],
)
def test_bad_preferences(preference, message):
    with pytest.raises(InputError, match=message):
        select_channels(distances(points(10)), n_keep=3, preference=preference)


def test_bad_distances_and_options():
    with pytest.raises(InputError, match=r"square matrix .* got shape \(3, 4\)"):
        select_channels(torch.zeros(3, 4))
    with pytest.raises(InputError, match="expected a rule of"):
        select_channels(distances(points(5)), knee="none")
    with pytest.raises(InputError, match="expected a backend of"):
        select_channels(distances(points(5)), backend="none")


def test_a_selection_is_repeated_in_every_channel_group():
    d = planted(3, 4)
    selection = select_channels(d, n_keep=3)
    assert selection.expanded(torch.arange(12)) is selection
    tiled = selection.expanded(torch.arange(12).repeat(5))
    assert tiled.n_channels == 60
    kept = [c + 12 * g for g in range(5) for c in selection.keep_idxs]
    assert list(tiled.keep_idxs) == sorted(kept)
    assert sorted(tiled.keep_idxs + tiled.prune_idxs) == list(range(60))
    assert torch.equal(tiled.scores.view(5, 12), selection.scores.expand(5, 12))
    assert (tiled.labels, tiled.medoids, tiled.k) == (selection.labels, selection.medoids, 3)


@pytest.mark.parametrize("n", [10, 33])
def test_the_same_distances_give_the_same_selection(n):
    d = distances(points(n))
    first, again = select_channels(d), select_channels(d.clone())
    for f in fields(ChannelSelection):
        a, b = getattr(first, f.name), getattr(again, f.name)
        assert torch.equal(a, b) if f.name == "scores" else a == b, f.name
    order = torch.randperm(n, generator=seeded(1))
    permuted = select_channels(d[order][:, order])
    assert (permuted.k, permuted.knee_k) == (first.k, first.knee_k)
    kept = order[list(permuted.keep_idxs)].tolist()
    assert deviation(d, kept) == pytest.approx(deviation(d, first.keep_idxs))


def test_the_matrix_given_is_left_alone():
    d = distances(points(12))
    before = d.clone()
    select_channels(d, preference=torch.rand(12))
    assert torch.equal(d, before)


def skewed(n, seed=0):
    """Weights over three orders of magnitude."""
    return (1.5 * torch.randn(n, generator=seeded(seed + 7), dtype=torch.float64)).exp()


@pytest.mark.parametrize(
    "options", [{}, {"n_keep": 5}, {"knee": "strongest"}, {"knee": "strongest", "round_to": 4}], ids=str
)
@pytest.mark.parametrize("n", [7, 40])
def test_unit_weights_change_nothing_but_the_floor(n, options):
    d = planted(n // 4 + 1, 4, noise=0.3)
    plain, unit = (select_channels(d, weights=w, **options) for w in (None, torch.ones(len(d))))
    if options or unit.k == plain.k:
        assert plain == unit
    else:
        assert unit.k > plain.k


@pytest.mark.parametrize("n", [3, 10, 17])
def test_weighted_scores_are_a_greedy_order(n):
    for seed in range(4):
        d, e = distances(points(n, seed=seed)), skewed(n, seed)
        costs = d * e  # row: medoid, column: point
        for k in {1, 2, n // 2, n - 1, n}:
            keep = k_medoids(d, k, weights=e).medoids
            assert_greedy(costs, keep.tolist(), nested_scores(d, keep, e))


@pytest.mark.parametrize("n", [10, 33, 70])
def test_every_kept_component_is_the_weighted_medoid_of_its_cluster(n):
    d, e = distances(points(n)), skewed(n)
    for n_keep in (None, 2, n // 3, n - 2):
        selection = select_channels(d, weights=e, n_keep=n_keep)
        labels = torch.tensor(selection.labels)
        for j, medoid in enumerate(selection.keep_idxs):
            members = (labels == j).nonzero()[:, 0]
            deviations = (e[members, None] * d[members[:, None], members]).sum(0)
            assert members[deviations.argmin()] == medoid or deviations.min() >= deviations[members == medoid] - 1e-12


def test_the_curve_is_that_of_weighted_solutions():
    d, e = distances(points(20)), skewed(20)
    selection = select_channels(d, weights=e)
    path = k_medoids_path(d, selection.ks, weights=e)
    expected = [mean_simplified_silhouette(d, s.medoids, s.labels, e) for s in path]
    assert list(selection.mss) == pytest.approx(expected)


def test_the_guarded_knee_covers_most_of_the_weight():
    # Two heavy clusters and light points far from both: their silhouette alone would keep two or three.
    x = torch.cat([points(6, seed=1) * 0.02, points(6, seed=2) * 0.02 + 9, points(20, seed=3) * 10])
    e = torch.cat([torch.full((12,), 30.0), torch.full((20,), 3.0)])
    d = distances(x)
    strongest, guarded = (select_channels(d, weights=e, knee=knee).k for knee in ("strongest", "guarded"))
    covered = [
        1 - float((e * d[k_medoids(d, k, weights=e).medoids].min(0).values).sum() / (d.max() * e.sum()))
        for k in range(1, 33)
    ]
    least = next(k for k, c in enumerate(covered, 1) if c >= 0.95)
    assert strongest < least <= guarded


def test_losses_in_place_of_deviations():
    d, e = distances(points(12)), skewed(12)
    plain = select_channels(d, weights=e, n_keep=5)
    asked = []

    def losses(order):
        asked.append(order.tolist())
        return torch.tensor([1.0, 3, 1, 2, 4, 4, 5, 5, 5, 6, 6, 58])

    selection = select_channels(d, weights=e, n_keep=5, losses=losses)
    assert asked == [plain.scores.argsort().tolist()] == [selection.scores.argsort().tolist()]
    # 3, 1, 2 fall along the order: pooled to 2 each.
    shares = selection.scores[asked[0]] - 1e-6 * torch.arange(1, 13) / 12
    assert shares.tolist() == pytest.approx([v / 100 for v in [1, 2, 2, 2, 4, 4, 5, 5, 5, 6, 6, 58]])
    assert set(selection.scores.topk(5).indices.tolist()) == set(selection.keep_idxs) == set(plain.keep_idxs)
