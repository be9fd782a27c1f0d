"""What a plan remembers of its groups, against the activations themselves."""

import copy
import json
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from attention_models import transformer
from fitted import fitted
from models import build, images, initialise, vectors
from torch import nn
from torch.nn import functional as F

from tp_cosep import CoSePPruner, InputError, PruningPlan, ReconstructionSelector
from tp_cosep.functional.selection import select_channels
from tp_cosep.pruning.costs import layer_costs
from tp_cosep.selection.embedding import GroupEmbedding, cluster_colours, kept_components, plane


def distances_of(x):
    return torch.cdist(x, x)


def gaussian(n, dims, seed=0):
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jm(a, b):
    """Of two samples of one value each per row, from the textbook formula, without floors."""
    (mu_a, var_a), (mu_b, var_b) = ((x.mean(0), x.var(0, unbiased=False)) for x in (a, b))
    of_means = (mu_a - mu_b) ** 2 / (4 * (var_a + var_b))
    of_spreads = 0.5 * torch.log((var_a + var_b) / (2 * (var_a * var_b).sqrt()))
    return 2 * (1 - torch.exp(-of_means - of_spreads))


def best_pairs(activations, y, selection):
    """By cluster the pairs in order, from activations ``[samples, components, cells]``."""
    values = {
        (a, b): jm(activations[y == a].double(), activations[y == b].double()).mean(1)
        for a, b in combinations(sorted(set(y.tolist())), 2)
    }
    for j in range(len(selection.medoids)):
        members = [i for i, label in enumerate(selection.labels) if label == j]
        means = {pair: float(of[members].mean()) for pair, of in values.items()}
        yield sorted(means.items(), key=lambda item: -item[1])[:3]


def assert_pairs(embedding, expected):
    expected = list(expected)
    assert len(embedding.pairs) == len(expected)
    for ours, theirs in zip(embedding.pairs, expected, strict=True):
        assert [pair[:2] for pair in ours] == [pair for pair, _ in theirs]
        assert [pair.distance for pair in ours] == pytest.approx([value for _, value in theirs], abs=1e-3)


class TestPlane:
    def test_landmarks_place_all_others(self):
        """Points of a plane keep their distances, although most of them were no landmarks."""
        x = gaussian(700, 2)
        points, shares = plane(distances_of(x))
        torch.testing.assert_close(distances_of(points), distances_of(x))
        assert sum(shares) == pytest.approx(1)

    def test_what_landmarks_show_is_near_what_all_do(self):
        x = gaussian(600, 6) * torch.tensor([5.0, 4, 1, 1, 1, 1])
        points, shares = plane(distances_of(x))
        centred = x - x.mean(0)
        exact = torch.linalg.svd(centred)
        for axis in range(2):
            both = torch.stack([points[:, axis], centred @ exact.Vh[axis]])
            assert abs(float(torch.corrcoef(both)[0, 1])) > 0.99
            share = float(exact.S[axis] ** 2 / (exact.S**2).sum())
            assert shares[axis] == pytest.approx(share, abs=0.03)

    @pytest.mark.parametrize("n", [1, 2, 5])
    def test_equal_components_are_one_point(self, n):
        points, shares = plane(torch.zeros(n, n))
        assert torch.equal(points, torch.zeros(n, 2, dtype=torch.float64))
        assert shares == (0, 0)


class TestPairs:
    def test_of_layers_that_make_the_channels(self):
        model, x, y = build("mlp", 10)
        pruner = CoSePPruner(copy.deepcopy(model), x[:1], fitted(model, x, y), pruning_ratio=0.5)
        pruner.step()
        with torch.no_grad():
            made = model.fc1(x)
            activations = {"fc1": made, "fc2": model.fc2(F.relu(made))}
        for name, activation in activations.items():
            (group_plan,) = [group_plan for group_plan in pruner.plan if group_plan.name == name]
            assert len(group_plan.selection.medoids) == 5
            assert group_plan.embedding.n_classes == (4, 4)
            assert_pairs(group_plan.embedding, best_pairs(activation[:, :, None], y, group_plan.selection))

    def test_of_layers_that_read_a_flattened_map(self):
        """In the default space; inputs of a linear layer that belong to one channel are cells of it."""
        x, y = images()
        # Leaky, so that no variance is 0: the formula here has no floor.
        layers = [nn.Conv2d(3, 10, 3, padding=1), nn.LeakyReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(40, 4)]
        model = initialise(nn.Sequential(*layers))
        with torch.no_grad():
            read = model[:4](x)
        pruner = CoSePPruner(model, x[:1], ReconstructionSelector().fit(model, [(x, y)]), pruning_ratio=0.5)
        pruner.step()
        group_plan = pruner.plan.groups[0]
        assert len(group_plan.selection.medoids) == 5
        assert_pairs(group_plan.embedding, best_pairs(read.reshape(len(x), 10, 4), y, group_plan.selection))

    @pytest.mark.slow
    def test_among_some_of_many_classes(self):
        """As many classes as can be compared in a moment, evenly spaced, the first and the last among them."""
        n = 600
        x, y = vectors(2 * n, n)
        model = initialise(nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, n)))
        pruner = CoSePPruner(model, x[:1], fitted(model, x, 3 * y), pruning_ratio=0.5)
        pruner.step()
        embedding = pruner.plan.groups[0].embedding
        compared, there = embedding.n_classes
        assert there == n
        assert 100 < compared < 200
        labels = {label for pairs in embedding.pairs for pair in pairs for label in pair[:2]}
        assert labels <= {3 * round(i * (n - 1) / (compared - 1)) for i in range(compared)}
        assert all(len(pairs) == 3 for pairs in embedding.pairs)

    def test_not_known_where_classes_were_not_measured(self):
        model, x, y = build("mlp", 10)
        selector = ReconstructionSelector(class_weight=0).fit(model, [(x, y)])
        pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=0.5)
        pruner.step()
        embedding = pruner.plan.groups[0].embedding
        assert embedding.pairs == ()
        assert embedding.note == "classes were not observed where its channels are compared"


class TestPruner:
    def test_positions_are_those_of_the_selectors_distances(self):
        model, x, y = build("mlp", 10)
        selector = fitted(model, x, y)
        pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=0.5)
        planner = pruner.planner()
        distances = {planner.view(g).name: selector.distances(g) for g in planner.groups()}
        pruner.step()
        for group_plan in pruner.plan:
            if group_plan.selection is not None:
                points, shares = plane(distances[group_plan.name])
                torch.testing.assert_close(
                    group_plan.embedding.points, points, atol=6e-4 * float(points.abs().max()), rtol=0
                )
                assert group_plan.embedding.shares == pytest.approx(shares, abs=1e-4)

    @pytest.mark.parametrize("options", [{"pruning_ratio": 0.5, "global_pruning": True}, {"target": {"macs": 0.5}}, {}])
    def test_every_choice_has_a_picture_and_can_do_without(self, options, tmp_path):
        model, x, y = build("resnet", 12)
        for embed in (True, False):
            pruned = copy.deepcopy(model)
            pruner = CoSePPruner(pruned, x[:1], ReconstructionSelector().fit(model, [(x, y)]), embed=embed, **options)
            pruner.step()
            assert {e.embedding is not None for e in pruner.plan if e.selection} == {embed}
            assert all(e.embedding is None for e in pruner.plan if not e.selection)
            pruner.plan.save(tmp_path / "plan.json")
            assert PruningPlan.load(tmp_path / "plan.json") == pruner.plan

    def test_costs_are_those_of_the_layers_before_and_after(self):
        model, x, y = build("vgg", 10)
        pruned = copy.deepcopy(model)
        pruner = CoSePPruner(pruned, x[:1], fitted(model, x, y), pruning_ratio=0.5)
        pruner.step()
        for i, net in enumerate((model, pruned)):
            expected = {
                "conv1": 64 * net.conv1.weight.numel(),
                "conv2": 64 * net.conv2.weight.numel(),
                "conv3": 16 * net.conv3.weight.numel(),
                "fc": net.fc.weight.numel(),
                "head": net.head.weight.numel(),
            }
            assert {name: n[i] for name, n in pruner.plan.costs["macs"].items()} == expected
            assert sum(n[i] for n in pruner.plan.costs["params"].values()) == sum(p.numel() for p in net.parameters())
        assert list(pruner.plan.costs["macs"]) == ["conv1", "conv2", "conv3", "fc", "head"]

    def test_costs_before_are_those_before_the_first_of_several_steps(self):
        model, x, y = build("mlp", 12)
        before = layer_costs(model, lambda: model(x[:1]))
        options = {"loader": [(x, y)], "iterative_steps": 2, "fit_options": {"progress": False}}
        pruner = CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5, **options)
        pruner.step()
        pruner.step()
        after = layer_costs(model, lambda: model(x[:1]))
        for unit in ("macs", "params"):
            assert pruner.plan.costs[unit] == {name: (n, after[unit][name]) for name, n in before[unit].items()}
        assert sum(1 for group_plan in pruner.plan if group_plan.embedding) == 6

    def test_maps_without_a_batch_dimension_are_counted(self):
        model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 2, 1))
        assert layer_costs(model, lambda: model(torch.zeros(3, 8, 8))) == layer_costs(
            model, lambda: model(torch.zeros(1, 3, 8, 8))
        )

    def test_parameters_of_the_model_itself_are_counted(self):
        model = nn.Sequential(nn.Linear(3, 2, bias=False))
        model.scale = nn.Parameter(torch.ones(7))
        assert layer_costs(model, lambda: model(torch.zeros(1, 3)))["params"] == {"scale": 7, "0": 6}


class TestKept:
    def test_channels_slots_heads(self):
        chosen = select_channels(distances_of(gaussian(6, 3)), n_keep=2)
        assert kept_components(chosen) == list(chosen.keep_idxs)
        slots = chosen.expanded(torch.arange(6).repeat(4))
        assert kept_components(slots) == list(chosen.keep_idxs)
        heads = chosen.expanded(torch.arange(6).repeat_interleave(4))
        assert kept_components(heads) == list(chosen.keep_idxs)

    def test_a_picture_knows_better(self):
        """Two channels that go together, in no regular order."""
        chosen = select_channels(distances_of(gaussian(4, 3)), n_keep=2)
        component_of = torch.tensor([3, 0, 1, 2, 2, 0, 1, 3])
        embedding = GroupEmbedding(((0.0, 0.0),) * 4, 0.0, (0.0, 0.0), tuple(component_of.tolist()))
        assert kept_components(chosen.expanded(component_of), embedding) == list(chosen.keep_idxs)


def test_colours_of_neighbours_differ():
    x = torch.arange(12, dtype=torch.float64).repeat_interleave(2)[:, None] * torch.tensor([[10.0, 0.0]])
    x[1::2, 1] += 0.1
    selection = select_channels(distances_of(x), n_keep=12)
    colours = cluster_colours(x, selection)
    in_order = [colours[selection.labels[i]] for i in range(0, 24, 2)]
    assert all(a != b for a, b in pairwise(in_order))
    assert set(colours) == set(range(6))
    assert set(cluster_colours(x, select_channels(distances_of(x), n_keep=24))) == {-1}


@pytest.fixture
def plan_file(tmp_path):
    model, x, y = build("mlp", 10)
    pruner = CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5)
    pruner.step()
    pruner.plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("positions", [0.0] * 3, "expected 2 finite coordinates for each of 1"),
        ("positions", [float("nan")] * 20, "expected 2 finite coordinates for each of 10"),
        ("positions", ["<b>"] * 20, "damaged, ValueError"),
        ("scale", float("inf"), "expected 2 finite coordinates"),
        ("shares", [0.5], "damaged, ValueError"),
        ("component_of", [0], "expected one of 10 components for each of 10 channels"),
        ("component_of", [10] * 10, "expected one of 10 components for each of 10 channels"),
        ("pairs", [[0, 1, 0.5]], "expected class pairs of 5 clusters, got 1"),
        ("pairs", [[0, 1]] * 5, "damaged, ValueError"),
        ("pairs", [[0, 1, float("nan")]] * 5, "expected finite distances"),
        ("n_classes", [1, 2, 3], "damaged, ValueError"),
    ],
)
def test_damaged_pictures_are_refused(plan_file, key, value, message):
    document = json.loads(plan_file.read_text())
    document["groups"][0]["embedding"][key] = value
    plan_file.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        PruningPlan.load(plan_file)


@pytest.mark.parametrize("costs", [5, {"macs": 5}, {"macs": {"fc1": [1]}}, {"macs": {"fc1": ["<b>", 1]}}])
def test_damaged_costs_are_refused(plan_file, costs):
    document = json.loads(plan_file.read_text())
    document["costs"] = costs
    plan_file.write_text(json.dumps(document))
    with pytest.raises(InputError, match="damaged"):
        PruningPlan.load(plan_file)


def test_a_plan_without_pictures_and_costs_still_loads(plan_file):
    whole = PruningPlan.load(plan_file)
    document = json.loads(plan_file.read_text())
    del document["costs"]
    for group in document["groups"]:
        del group["embedding"]
    plan_file.write_text(json.dumps(document))
    plan = PruningPlan.load(plan_file)
    assert plan == replace(whole, costs={}, groups=tuple(replace(group, embedding=None) for group in whole))


def test_heads_are_components():
    model, x, y = transformer(fused=True)
    selector = ReconstructionSelector().fit(model, [(x, y)])
    pruner = CoSePPruner(
        model, x[:1], selector, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.5, pruning_ratio=0.0
    )
    pruner.step()
    group_plans = [group_plan for group_plan in pruner.plan if group_plan.unit == "head"]
    assert len(group_plans) == 2
    for group_plan in group_plans:
        assert len(group_plan.embedding.positions) == 4
        assert group_plan.embedding.component_of == tuple(i // 6 for i in range(24))
        kept = kept_components(group_plan.selection, group_plan.embedding)
        assert [c for c in range(24) if c // 6 in kept] == list(group_plan.selection.keep_idxs)
        assert len(kept) == 2
        assert all(len(pairs) == 3 for pairs in group_plan.embedding.pairs)
