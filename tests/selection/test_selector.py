import copy

import numpy as np
import pytest
import torch
import torch_pruning as tp
from fitted import WIDTHS, fitted, group_with, groups_of, kept_of, prepared, widths
from models import (
    KINDS,
    PRODUCERS,
    assert_same_state,
    build,
    images,
    initialise,
    pruned_state,
    vectors,
)
from torch import nn

from tp_cosep import CoSePSelector, InputError
from tp_cosep.functional.kmedoids import k_medoids
from tp_cosep.functional.separability import distances_from_gram, profile_gram, profiles
from tp_cosep.graph.groups import read_group
from tp_cosep.graph.tracing import trace
from tp_cosep.selection.input_space import energies_of
from tp_cosep.selection.selector import ratio_for


def removed(n, ratio):
    """How many of n channels the stock pruner removes."""
    return n - int(n * (1 - ratio))


def joined_distances(selector, names):
    """Squared distances of the profiles, layer by layer, divided by their length and added."""
    squares = 0
    for name in names:
        x = profiles(selector.statistics.moments[name], selector.metric).numpy()
        squares = squares + ((x[:, None] - x[None]) ** 2).sum(-1) / x.shape[1]
    return np.sqrt(squares)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_pruner_keeps_exactly_what_was_selected(kind, width):
    model, x, _, selector, chosen = prepared(kind, width)
    ratios = selector.pruning_ratio_dict(model, x[:1], [model.head])
    names = {m: name for name, m in model.named_modules()}
    assert {names[m] for m in ratios} <= {name for layers in PRODUCERS[kind].values() for name in layers}
    assert len(ratios) == len(PRODUCERS[kind])
    pruned = copy.deepcopy(model)
    of_original = dict(zip(model.modules(), pruned.modules(), strict=True))
    pruner = tp.pruner.MetaPruner(
        pruned,
        x[:1],
        importance=selector,
        pruning_ratio=0.0,
        pruning_ratio_dict={of_original[m]: ratio for m, ratio in ratios.items()},
        ignored_layers=[pruned.head],
    )
    pruner.step()
    assert_same_state(pruned.state_dict(), pruned_state(model, model.state_dict(), kept_of(chosen)))
    pruned(x[:2])
    widths(pruned)


@pytest.mark.parametrize(("width", "ratio"), [(10, 0.3), (10, 0.77), (12, 0.5), (64, 0.35), (96, 0.4)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_ratio_keeps_the_best_scored(kind, width, ratio):
    model, x, _, selector, _ = prepared(kind, width)
    state, kept = copy.deepcopy(model.state_dict()), {}
    for channels, group in groups_of(kind, model, x).items():
        scores = selector(group)
        order = sorted(range(len(scores)), key=lambda i: -float(scores[i]))
        kept[channels] = sorted(order[: len(order) - removed(len(order), ratio)])
    pruner = tp.pruner.MetaPruner(
        model, x[:1], importance=selector, pruning_ratio=ratio, ignored_layers=[model.head], global_pruning=False
    )
    pruner.step()
    assert_same_state(model.state_dict(), pruned_state(model, state, kept))
    model(x[:2])
    widths(model)


def test_the_ratio_for_a_count_is_the_count_at_every_width():
    for n in range(3, 201):
        for k in range(1, n + 1):
            assert n - removed(n, ratio_for(k, n)) == k


class Descending(tp.importance.Importance):
    def __call__(self, group):
        return torch.arange(len(group[0].idxs), 0, -1.0)


@pytest.mark.parametrize("n", [3, 7, 10, 49])
def test_the_stock_pruner_keeps_the_count_of_the_ratio(n):
    for k in range(1, n + 1):
        model = nn.Sequential(nn.Linear(2, n), nn.Linear(n, 2))
        row = model[0].weight.detach().clone()
        tp.pruner.MetaPruner(
            model,
            torch.zeros(1, 2),
            importance=Descending(),
            pruning_ratio=0.0,
            pruning_ratio_dict={model[0]: ratio_for(k, n)},
            ignored_layers=[model[1]],
        ).step()
        assert torch.equal(model[0].weight, row[:k])


@pytest.mark.parametrize("metric", ["jm", "hellinger", "wasserstein"])
@pytest.mark.parametrize("kind", KINDS)
def test_distances_add_up_over_the_layers_that_create_the_channels(kind, metric):
    model, x, y = build(kind, 12)
    selector = fitted(model, x, y, metric=metric)
    for channels, group in groups_of(kind, model, x).items():
        expected = joined_distances(selector, PRODUCERS[kind][channels])
        d = selector.distances(group)
        np.testing.assert_allclose(d.numpy(), expected, rtol=1e-6, atol=1e-7 * expected.max())
        assert d.dtype == torch.float64


class Branches(nn.Module):
    """Layers that create a part of the channels each, one of them of two classes' data only."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 5, 1)
        self.b = nn.Conv2d(3, 6, 1)
        self.both = nn.Conv2d(3, 11, 1)
        self.head = nn.Linear(11, 4)

    def forward(self, x):
        return self.head((torch.cat([self.a(x), self.b(x)], 1) + self.both(x)).relu().mean((2, 3)))


def test_a_channel_that_a_layer_does_not_create_has_no_profile_there():
    model, (x, y) = initialise(Branches()), images()
    selector = fitted(model, x, y)
    (group,) = trace(model, x[:1]).get_all_groups(ignored_layers=[model.head])
    table = []
    for name, rows in (("both", slice(0, 11)), ("a", slice(0, 5)), ("b", slice(5, 11))):
        part = profiles(selector.statistics.moments[name]).numpy()
        full = np.zeros((11, part.shape[1]))
        full[rows] = part / np.sqrt(part.shape[1])
        table.append(full)
    table = np.concatenate(table, 1)
    expected = np.linalg.norm(table[:, None] - table[None], axis=-1)
    np.testing.assert_allclose(selector.distances(group).numpy(), expected, rtol=1e-6, atol=1e-7)


def channel_group_net(kind):
    norm = nn.GroupNorm(3, 12) if kind == "norm" else nn.BatchNorm2d(12)
    inner = nn.Conv2d(12, 12, 3, padding=1, groups={"grouped": 2, "depthwise": 12}.get(kind, 1))
    layers = [nn.Conv2d(3, 12, 1), norm, nn.ReLU(), inner, nn.ReLU(), nn.Flatten(), nn.Linear(64 * 12, 4)]
    return initialise(nn.Sequential(*layers))


@pytest.mark.parametrize(("kind", "n_groups"), [("norm", 3), ("grouped", 2), ("depthwise", 1)])
def test_every_channel_group_keeps_as_many(kind, n_groups):
    model, (x, y) = channel_group_net(kind), images()
    selector = fitted(model, x, y)
    n_slots = 12 // n_groups
    for group in trace(model, x[:1]).get_all_groups(ignored_layers=[model[6]]):
        root = group[0].dep.target.module
        is_split = n_groups > 1 and (kind == "grouped" or root is model[0])
        slots = n_slots if is_split else 12
        selection = selector.select(group, n_keep=max(1, slots // 2))
        per_group = np.bincount(np.array(selection.keep_idxs) // slots, minlength=12 // slots)
        assert set(per_group) == {max(1, slots // 2)}
        assert len(selection.labels) == slots
        scores = selector(group).view(-1, slots)
        assert torch.equal(scores, scores[:1].expand_as(scores))


def test_distances_of_slots_add_up_over_the_channel_groups():
    model, (x, y) = channel_group_net("norm"), images()
    selector = fitted(model, x, y)
    group = next(g for g in trace(model, x[:1]).get_all_groups() if g[0].dep.target.module is model[0])
    p = profiles(selector.statistics.moments["0"]).numpy().reshape(3, 4, -1)
    squares = sum(((p[g][:, None] - p[g][None]) ** 2).sum(-1) for g in range(3)) / p.shape[-1]
    np.testing.assert_allclose(selector.distances(group).numpy(), np.sqrt(squares), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["norm", "grouped", "depthwise"])
def test_the_stock_pruner_prunes_channel_groups_alike(kind):
    model, (x, y) = channel_group_net(kind), images()
    selector, weight = fitted(model, x, y, keep=2), model[0].weight.detach().clone()
    group = next(g for g in trace(model, x[:1]).get_all_groups() if model[0] in [d.target.module for d, _ in g])
    kept = list(selector.select(group).keep_idxs)
    ratios = selector.pruning_ratio_dict(model, x[:1], [model[6]])
    options = {name: {} for name in ("in_channel_groups", "out_channel_groups", "num_heads")}
    tp.pruner.MetaPruner(
        model, x[:1], selector, pruning_ratio=0.0, pruning_ratio_dict=ratios, ignored_layers=[model[6]], **options
    ).step()
    assert torch.equal(model[0].weight, weight[kept])
    assert model(x[:2]).shape == (2, 4)


def best_of_clusters(values, selection):
    """The member with the largest value in each of the selection's clusters."""
    clusters = [[i for i, label in enumerate(selection.labels) if label == j] for j in range(selection.k)]
    return sorted(max(members, key=lambda i: values[i]) for members in clusters)


@pytest.mark.parametrize("n_keep", [None, 5])
def test_max_norm_keeps_the_largest_of_every_cluster(n_keep):
    model, x, y = build("resnet", 12)
    plain, selector = (fitted(model, x, y, keep=n_keep, representative=r) for r in ("medoid", "max_norm"))
    for channels, group in groups_of("resnet", model, x).items():
        norms = sum(model.get_submodule(m).weight.detach().abs().sum((1, 2, 3)) for m in PRODUCERS["resnet"][channels])
        clusters, selection = plain.select(group), selector.select(group)
        assert selection.labels == clusters.labels
        expected = best_of_clusters(norms.tolist(), clusters)
        assert selection.keep_idxs == tuple(expected)
        assert set(selector(group).topk(clusters.k).indices.tolist()) == set(expected)


@pytest.mark.parametrize(
    "importance", [tp.importance.MagnitudeImportance(p=1), tp.importance.GroupMagnitudeImportance(p=2)]
)
def test_an_importance_keeps_its_best_of_every_cluster(importance):
    model, x, y = build("resnet", 12)
    plain, selector = (fitted(model, x, y, keep=4, representative=r) for r in ("medoid", importance))
    for group in groups_of("resnet", model, x).values():
        clusters = plain.select(group)
        assert selector.select(group).keep_idxs == tuple(best_of_clusters(importance(group).tolist(), clusters))


def test_an_importance_is_averaged_over_channel_groups():
    model, (x, y) = channel_group_net("norm"), images()
    values = torch.tensor([5.0, 0, 1, 2] + [0, 0, 9, 8] * 2)
    selector = fitted(model, x, y, keep=1, representative=lambda group: values)
    group = next(g for g in trace(model, x[:1]).get_all_groups() if g[0].dep.target.module is model[0])
    assert selector.select(group).keep_idxs == (2, 6, 10)


def test_an_importance_without_an_opinion_leaves_the_medoids():
    model, x, y = build("mlp", 10)
    group = groups_of("mlp", model, x)["a"]
    chosen = [fitted(model, x, y, representative=r).select(group).keep_idxs for r in ("medoid", lambda group: None)]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"keep": 1}, (1, 1)),
        ({"keep": 11}, (10, 11)),
        ({"keep": 500}, (10, 11)),
        ({"keep": 0.01}, (1, 1)),
        ({"keep": 0.35}, (4, 4)),  # 3.5 and 3.85
        ({"keep": 1.0}, (10, 11)),
    ],
)
def test_keep_is_a_number_or_a_share(options, counts):
    model, x, y = build("mlp", 10)
    selector, groups = fitted(model, x, y, **options), groups_of("mlp", model, x)
    for group, count in zip((groups["a"], groups["b"]), counts, strict=True):
        selection = selector.select(group)
        energies = energies_of(read_group(group), selector.statistics.inputs)
        assert (
            list(selection.keep_idxs) == k_medoids(selector.distances(group), count, weights=energies).medoids.tolist()
        )
    assert len(selector.select(groups["a"], n_keep=7).keep_idxs) == 7


def test_a_part_of_a_group_has_the_scores_of_the_whole():
    model, x, y = build("vgg", 10)
    selector, whole = fitted(model, x, y), groups_of("vgg", model, x)["c"]
    prune = whole[0].dep.handler
    part = whole._DG.get_pruning_group(model.conv3, prune, [7, 2, 3])
    assert torch.equal(selector(part), selector(whole)[[7, 2, 3]])
    assert selector.select(part).keep_idxs == selector.select(whole).keep_idxs


def test_scores_follow_the_protocol_of_torch_pruning():
    model, x, y = build("vgg", 10)
    selector = fitted(model, x, y)
    assert isinstance(selector, tp.importance.Importance)
    for group in groups_of("vgg", model, x).values():
        scores, selection = selector(group), selector.select(group)
        assert scores.shape == (len(group[0].idxs),)
        assert not scores.requires_grad
        assert set(scores.topk(selection.k).indices.tolist()) == set(selection.keep_idxs)
        assert torch.equal(scores, selector(group))


def test_a_layer_whose_channels_are_all_alike():
    model, x, y = build("vgg", 10)
    for p in (model.conv2.weight, model.conv2.bias):
        p.data[:] = p.data[:1].clone()
    selector = fitted(model, x, y)
    selection = selector.select(groups_of("vgg", model, x)["b"])
    assert len(selection.keep_idxs) == selection.k == 1
    assert len(set(selection.scores.tolist())) == 10


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_a_layer_whose_channels_are_constant(bias):
    model, x, y = build("vgg", 10)
    model.conv2.weight.data.zero_()
    model.conv2.bias.data.fill_(bias)
    assert fitted(model, x, y).select(groups_of("vgg", model, x)["b"]).k == 1


def test_a_group_with_one_channel():
    model, (x, y) = initialise(nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))), images()
    selector = fitted(model, x, y)
    group = next(g for g in trace(model, x[:1]).get_all_groups() if g[0].dep.target.module is model[0])
    assert selector.select(group).keep_idxs == (0,)
    assert selector(group).shape == (1,)
    ratios = selector.pruning_ratio_dict(model, x[:1], [model[3]])
    tp.pruner.MetaPruner(model, x[:1], selector, pruning_ratio=0.0, pruning_ratio_dict=ratios).step()
    assert model[0].out_channels == 1


def test_a_group_of_other_layers_is_left_alone():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True)
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.lstm(x)[0].mean(1))

    model, (x, y) = Recurrent().eval(), vectors(shape=(5, 6))
    selector = fitted(model, x, y)
    graph = trace(model, x[:1])
    group = next(iter(graph.get_all_groups(root_module_types=[nn.LSTM])))
    assert selector.select(group) is None
    assert selector.distances(group) is None
    assert selector(group) is None
    assert list(selector.pruning_ratio_dict(model, x[:1])) == [model.fc]


def test_fitting_again_replaces_what_was_measured_unless_it_fails():
    model, x, y = build("mlp", 10)
    selector = fitted(model, x, y)
    first = selector.statistics.moments
    with pytest.raises(InputError, match="at least one batch"):
        selector.fit(model, [])
    assert selector.statistics.moments is first
    assert selector.fit(model, [(x[:20], y[:20])]) is selector
    assert selector.statistics.moments["fc1"].count.tolist() == [5] * 4


def test_many_classes_by_a_sample_of_their_pairs():
    model, x, _ = build("mlp", 10, seed=4)
    x = torch.cat([x, x + torch.randn(x.shape), x + torch.randn(x.shape)])
    y = torch.arange(len(x)) % 30
    exact = CoSePSelector(spatial=2).fit(model, [(x, y)], progress=False)
    sampled = CoSePSelector(spatial=2, max_class_pairs=90).fit(model, [(x, y)], progress=False)
    group = group_with(model, x, "fc1")
    expected = distances_from_gram(profile_gram(exact.statistics.moments["fc1"], max_pairs=90))
    assert torch.equal(sampled.distances(group), expected)
    assert not torch.equal(sampled.distances(group), exact.distances(group))


def test_the_options_of_fit_reach_the_collection():
    model, x, y = build("mlp", 10, seed=4)
    selector = CoSePSelector()
    selector.fit(model, [{"in": x, "out": y}], target_fn=lambda batch: (batch["in"], batch["out"]))
    assert selector.statistics.moments["fc1"].count.tolist() == [10] * 4
    assert selector.fit(model, [x], labels="predicted").statistics.moments["fc1"].count.tolist() == [12, 21, 7]
    y[0] = 9
    with pytest.warns(UserWarning, match="left out class 9"):
        selector.fit(model, [(x, y)], rare_classes="drop")
    with pytest.raises(InputError, match="memory_budget is 5"):
        CoSePSelector(spatial="auto", memory_budget=5).fit(model, [(x, y)])
    with pytest.raises(InputError, match="moments of 1000 classes"):
        CoSePSelector(spatial="auto", memory_budget=5).fit(model, [(x, y)], n_classes=1000)
