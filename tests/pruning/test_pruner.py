import copy

import pytest
import torch
import torch_pruning as tp
from fitted import WIDTHS, fitted, group_with, kept_of, prepared, widths
from models import KINDS, PRODUCERS, assert_same_state, build, images, initialise, pruned_state
from torch import nn

from tp_cosep import CoSePPruner, CoSePSelector, ReconstructionSelector
from tp_cosep.functional.kmedoids import k_medoids
from tp_cosep.graph.groups import read_group
from tp_cosep.selection.input_space import energies_of


def assert_plan_tells_the_truth(plan, before, after):
    """The channels that the plan says are kept are those that are there; whatever is missing is in the plan."""
    fixed = {}
    for group_plan in plan:
        for name in group_plan.layers:
            if name in before and group_plan.side == "out":
                fixed[name] = (
                    len(group_plan.selection.keep_idxs) if group_plan.selection else fixed.get(name, before[name])
                )
    assert {name: fixed.get(name, n) for name, n in before.items()} == after


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_automatic_counts(kind, width):
    model, x, _, selector, chosen = prepared(kind, width)
    state, before = copy.deepcopy(model.state_dict()), widths(model)
    pruner = CoSePPruner(model, x[:1], selector)
    assert pruner.step() is None
    assert_same_state(model.state_dict(), pruned_state(model, state, kept_of(chosen)))
    assert model(x[:3]).shape == (3, 4)
    assert_plan_tells_the_truth(pruner.plan, before, widths(model))
    planned = {frozenset(n for n in e.layers if n in before): e for e in pruner.plan}
    for c, names in PRODUCERS[kind].items():
        group_plan = planned[frozenset(names)]
        assert group_plan.selection.keep_idxs == chosen[c].keep_idxs
        assert group_plan.reason.startswith("knee at ") or group_plan.reason in ("no knee", "all alike")
        torch.testing.assert_close(group_plan.selection.scores, chosen[c].scores, rtol=1e-12, atol=0)
    assert planned[frozenset(["head"])].selection is None
    assert "model's output" in planned[frozenset(["head"])].reason


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_interactive(kind, width):
    model, x, _, selector, chosen = prepared(kind, width)
    state, before = copy.deepcopy(model.state_dict()), widths(model)
    pruner, skipped = CoSePPruner(model, x[:1], selector), PRODUCERS[kind]["a"]
    for group in pruner.step(interactive=True):
        assert isinstance(group, tp.dependency.Group)
        if {m.name for m in read_group(group).producers}.isdisjoint(skipped):
            group.prune()
    kept = kept_of(chosen) | {"a": range(chosen["a"].n_channels)}
    assert_same_state(model.state_dict(), pruned_state(model, state, kept))
    group_plans = [e for e in pruner.plan if skipped[0] in e.layers]
    assert [e.selection and e.selection.prune_idxs for e in group_plans] in ([None], [()])
    assert_plan_tells_the_truth(pruner.plan, before, widths(model))


@pytest.mark.parametrize(("width", "ratio"), [(10, 0.3), (10, 0.77), (12, 0.5), (12, 0.99), (64, 0.5), (96, 0.35)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_ratio_keeps_the_k_medoids_solution_of_that_size(kind, width, ratio):
    model, x, _, selector, _ = prepared(kind, width)
    state, kept = copy.deepcopy(model.state_dict()), {}
    for c, names in PRODUCERS[kind].items():
        group = group_with(model, x, names[0])
        d, e = selector.distances(group), energies_of(read_group(group), selector.statistics.inputs)
        kept[c] = k_medoids(d, max(1, int(len(d) * (1 - ratio))), weights=e).medoids.tolist()
    pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=ratio)
    pruner.step()
    assert_same_state(model.state_dict(), pruned_state(model, state, kept))
    widths(model)
    assert {e.reason for e in pruner.plan if e.selection} == {"pruning_ratio"}


@pytest.mark.parametrize("n", [3, 7, 10, 33])
def test_the_count_of_every_ratio_is_exact(n):
    x = torch.randn(30, 4)
    selector = ReconstructionSelector().fit(
        nn.Sequential(nn.Linear(4, n), nn.Linear(n, 3)), [(x, torch.arange(30) % 3)]
    )
    for ratio in [0.0, 0.05, 1 / 3, 0.5, 0.7, 0.9, 0.99, 1.0, *(k / n for k in range(0, n, 7))]:
        model = nn.Sequential(nn.Linear(4, n), nn.Linear(n, 3))
        CoSePPruner(model, x[:1], selector, pruning_ratio=ratio).step()
        assert model[0].out_features == max(1, int(n * (1 - ratio)))


def nudge(model):
    """Stands for training: changes every weight, each by its own value."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * p.sin())


@pytest.mark.parametrize(("width", "ratio"), [(10, None), (10, 0.4), (12, None), (12, 0.4), (64, None), (96, None)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_layerwise_is_fit_select_prune_and_tune_one_group_after_another(kind, width, ratio):
    model, x, y = build(kind, width)
    twin, twin_widths = copy.deepcopy(model), []
    for names in PRODUCERS[kind].values():
        group = group_with(twin, x, names[0])
        n_keep = None if ratio is None else int(len(group[0].idxs) * (1 - ratio))
        selection = fitted(twin, x, y).select(group, n_keep=n_keep)
        if selection.prune_idxs:
            group._DG.get_pruning_group(group[0].dep.target.module, group[0].dep.handler, selection.prune_idxs).prune()
            nudge(twin)
            twin_widths.append(widths(twin))
    seen = []
    selector = CoSePSelector(spatial=2, knee="strongest")
    pruner = CoSePPruner(
        model,
        x[:1],
        selector,
        pruning_ratio=ratio,
        loader=[(x, y)],
        compensate=False,
        recalibrate=False,
        layerwise=True,
        fine_tune=lambda m: (seen.append(widths(m)), nudge(m)),
        fit_options={"progress": False},
    )
    pruner.step()
    assert seen == twin_widths
    assert_same_state(model.state_dict(), twin.state_dict())
    assert len([e for e in pruner.plan if e.selection]) == len(PRODUCERS[kind])


def test_without_layerwise_fine_tune_runs_once_at_the_end():
    model, x, y = build("vgg", 10)
    seen = []
    pruner = CoSePPruner(
        model, x[:1], fitted(model, x, y), pruning_ratio=0.5, fine_tune=lambda m: seen.append(widths(m))
    )
    pruner.step()
    assert seen == [widths(model)]
    assert set(widths(model).values()) == {5, 4}


def test_a_selector_that_saw_no_data_is_fitted_from_the_loader():
    model, x, y = build("vgg", 10)
    twin = copy.deepcopy(model)
    CoSePPruner(model, x[:1], ReconstructionSelector(), loader=[(x, y)], compensate=False, recalibrate=False).step()
    CoSePPruner(twin, x[:1], ReconstructionSelector().fit(twin, [(x, y)])).step()
    assert_same_state(model.state_dict(), twin.state_dict())


def channel_group_net(kind):
    norm = nn.GroupNorm(3, 12) if kind == "norm" else nn.BatchNorm2d(12)
    inner = nn.Conv2d(12, 12, 3, padding=1, groups={"grouped": 2, "depthwise": 12}.get(kind, 1))
    layers = [nn.Conv2d(3, 12, 1), norm, nn.ReLU(), inner, nn.ReLU(), nn.Conv2d(12, 9, 3), nn.Flatten()]
    return initialise(nn.Sequential(*layers, nn.Linear(36 * 9, 4)))


@pytest.mark.parametrize("ratio", [None, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(("kind", "n_groups"), [("norm", 3), ("grouped", 2), ("depthwise", 1)])
def test_every_channel_group_keeps_as_many(kind, n_groups, ratio):
    model, (x, y) = channel_group_net(kind), images()
    selector, weight, bias = fitted(model, x, y), model[0].weight.detach().clone(), model[0].bias.detach().clone()
    chosen = selector.select(group_with(model, x, "0"))
    if ratio is not None:
        n_slots = 12 // n_groups
        chosen = selector.select(group_with(model, x, "0"), n_keep=max(1, int(n_slots * (1 - ratio))))
    kept = list(chosen.keep_idxs)
    pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=ratio)
    pruner.step()
    assert torch.equal(model[0].weight, weight[kept])
    assert torch.equal(model[0].bias, bias[kept])
    assert torch.bincount(torch.tensor(kept) // (12 // n_groups)).unique().numel() == 1
    assert model(x[:2]).shape == (2, 4)
    assert model[1].num_groups == 3 if kind == "norm" else True
    assert_plan_tells_the_truth(pruner.plan, {"0": 12}, {"0": widths(model)["0"]})


def attention_free_of_shortcuts(out):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(20, 36)
            self.proj = nn.Linear(12, out)
            self.head = nn.Linear(out, 4)

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
            x = (q @ k.transpose(-1, -2)).softmax(-1) @ v
            return self.head(self.proj(x.transpose(1, 2).flatten(2)).relu().mean(1))

    return initialise(Attention())


@pytest.mark.parametrize("out", [6, 10, 12])
def test_a_layer_whose_inputs_and_outputs_are_pruned(out):
    # The attention group has the inputs of proj as its root, another group the outputs of the same layer.
    model = attention_free_of_shortcuts(out)
    x, y = torch.randn(40, 5, 20, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    selector, before, weight = fitted(model, x, y), widths(model), model.proj.weight.detach().clone()
    rows = list(selector.select(group_with(model, x, "proj"), n_keep=out // 2).keep_idxs)
    pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=0.5, num_heads={model.qkv: 2})
    pruner.step()
    # Half of the six dimensions of each of two heads, and half of the outputs.
    assert widths(model) == before | {"qkv": 18, "proj": out // 2}
    columns = [e.selection.keep_idxs for e in pruner.plan if e.side == "in"]
    assert [len(c) for c in columns] == [6]
    assert torch.equal(model.proj.weight, weight[rows][:, list(columns[0])])
    assert model(x[:2]).shape == (2, 4)


@pytest.mark.parametrize("training", [True, False, "mixed"])
def test_modes_are_kept(training):
    model, x, y = build("resnet", 10)
    model.train(bool(training))
    if training == "mixed":
        model.bn1.eval()
        model.conv4.eval()
    modes = [m.training for m in model.modules()]
    running = model.bn0.running_mean.clone(), int(model.bn0.num_batches_tracked)
    pruner = CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5)
    assert [m.training for m in model.modules()] == modes
    pruner.step()
    assert [m.training for m in model.modules()] == modes
    kept = next(e.selection.keep_idxs for e in pruner.plan if "stem" in e.layers)
    assert torch.equal(model.bn0.running_mean, running[0][list(kept)])
    assert int(model.bn0.num_batches_tracked) == running[1]


def test_the_output_is_never_pruned_whatever_layer_makes_it():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(20, 10)
            self.classes = nn.Linear(10, 4)
            self.boxes = nn.Linear(10, 8)

        def forward(self, x):
            x = self.body(x).relu()
            return {"classes": self.classes(x).softmax(1), "boxes": (2 * self.boxes(x)).unflatten(1, (2, 4))}

    model = initialise(Heads())
    x, y = torch.randn(40, 20), torch.arange(40) % 4
    pruner = CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5)
    pruner.step()
    assert widths(model) == {"body": 5, "classes": 4, "boxes": 8}
    assert sorted(e.name for e in pruner.plan if e.selection is None) == ["boxes", "classes"]


def test_gradients_follow_the_channels_kept():
    model, x, y = build("mlp", 10)
    model(x).sum().backward()
    grad = model.fc1.weight.grad.clone()
    pruner = CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5)
    pruner.step()
    kept = next(e.selection.keep_idxs for e in pruner.plan if e.name == "fc1")
    assert torch.equal(model.fc1.weight.grad, grad[list(kept)])


def test_the_same_twice():
    states = []
    for _ in range(2):
        model, x, y = build("resnet", 12)
        CoSePPruner(model, x[:1], fitted(model, x, y)).step()
        states.append(model.state_dict())
    assert_same_state(*states)
