import copy
import itertools

import pytest
import torch
import torch_pruning as tp
from counting import macs_by_hooks, n_params
from fitted import fitted, group_with, widths
from models import KINDS, PRODUCERS, assert_untouched, build, fingerprint
from torch import nn

from tp_cosep import CoSePPruner, CoSePSelector, InputError, ReconstructionSelector
from tp_cosep.graph.groups import read_group
from tp_cosep.pruning.budget import allocate
from tp_cosep.pruning.costs import Costs, measure_costs
from tp_cosep.pruning.targets import budget_of

COUNTS = {"macs": macs_by_hooks, "params": n_params}


@pytest.mark.parametrize("unit", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_those_of_the_pruned_model(kind, unit):
    model, x, _ = build(kind, 12)
    names = [names[0] for names in PRODUCERS[kind].values()]
    views = [read_group(group_with(model, x, name)) for name in names]
    costs = measure_costs(model, lambda: model(x[:1]), views, unit)
    assert costs.total == pytest.approx(COUNTS[unit](model, x))
    for i, n in [(0, 3), (len(names) - 1, 5), (0, 1), (1, 2)]:
        saving, before = costs.saving(i, n), costs.total
        costs.remove(i, n)
        assert before - costs.total == pytest.approx(saving)
        group = group_with(model, x, names[i])
        gone = views[i].channels_of(range(n)) if views[i].n_channel_groups > 1 else [*range(n)]
        layer = group[0].dep.target.module
        group._DG.get_pruning_group(layer, group[0].dep.handler, gone).prune()
        views[i] = read_group(group_with(model, x, names[i]))
        assert costs.total == pytest.approx(COUNTS[unit](model, x))


class Shared(nn.Module):
    """Depthwise, flattened, transposed, a layer that runs twice, torch's own attention, an embedding."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.depthwise, self.bn = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.fc, self.head = nn.Linear(6 * 16, 10), nn.Linear(10, 4)

    def forward(self, x):
        x = self.up(torch.relu(self.bn(self.depthwise(self.stem(x)))))
        x = nn.functional.adaptive_avg_pool2d(self.twice(torch.relu(self.twice(x))), 4)
        return self.head(torch.relu(self.fc(x.flatten(1))))


@pytest.mark.parametrize("unit", COUNTS)
def test_costs_of_other_layers(unit):
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(2, 3, 8, 8)
    names = ["stem", "up", "fc"]
    costs = measure_costs(model, lambda: model(x[:1]), [read_group(group_with(model, x, n)) for n in names], unit)
    for i, n in [(0, 3), (1, 2), (2, 4), (1, 1)]:
        costs.remove(i, n)
        group = group_with(model, x, names[i])
        group._DG.get_pruning_group(model.get_submodule(names[i]), group[0].dep.handler, [*range(n)]).prune()
        assert costs.total == pytest.approx(COUNTS[unit](model, x))


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_costs_of_attention_and_of_parameters_of_a_model():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.position = nn.Embedding(20, 12), nn.Parameter(torch.randn(1, 5, 12))
            self.attention, self.head = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 4)

        def forward(self, x):
            x = self.embedding(x) + self.position
            return self.head((x + self.attention(x, x, x)[0]).mean(1))

    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.arange(10).reshape(2, 5)
    group = group_with(model, x, "attention")
    view = read_group(group)
    params, macs = (measure_costs(model, lambda: model(x), [view], unit) for unit in ("params", "macs"))
    assert params.total == n_params(model, x)
    assert macs.total == 5 * 4 * 12 * 12 + 12 * 4
    for costs in (params, macs):
        costs.remove(0, view.n_components // 2)  # half of every head
    n = int(12 - len(view.channels_of(range(view.n_components // 2))))
    assert n == 6
    assert macs.total == pytest.approx(5 * 4 * n * n + n * 4)
    assert params.total == pytest.approx(20 * n + 5 * n + 4 * n * n + 4 * n + n * 4 + 4)


def best_by_brute_force(losses, make_costs, target):
    best = (float("inf"), None)
    for kept in itertools.product(*(range(1, len(x) + 1) for x in losses)):
        costs = make_costs()
        for g, k in enumerate(kept):
            costs.remove(g, len(losses[g]) - k)
        if costs.total <= target:
            loss = sum(float(x[: len(x) - k].sum()) for x, k in zip(losses, kept, strict=True))
            best = min(best, (loss, kept))
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.slow
def test_allocation_against_all_allocations(seed):
    model, x, _ = build("vgg", 6)
    torch.manual_seed(seed)
    views = [read_group(group_with(model, x, names[0])) for names in PRODUCERS["vgg"].values()]
    losses = [torch.rand(v.n_components, dtype=torch.float64).pow(2).cumsum(0) for v in views]

    def make():
        return measure_costs(model, lambda: model(x[:1]), views, "macs")

    whole = make().total
    for share in (0.8, 0.4):
        costs = make()
        kept = allocate(losses, costs, share * whole, least=[1] * len(views), steps=[1] * len(views))
        assert costs.total <= share * whole
        loss = sum(float(x[: len(x) - k].sum()) for x, k in zip(losses, kept, strict=True))
        best, _ = best_by_brute_force(losses, make, share * whole)
        # Steepest descent stops at the first step beyond the target, which the best one may meet better.
        largest = max(float(x[len(x) - k - 1]) for x, k in zip(losses, kept, strict=True) if k < len(x))
        assert best - 1e-12 <= loss <= best + largest


def test_allocation_in_steps_and_its_bounds():
    model, x, _ = build("mlp", 10)
    views = [read_group(group_with(model, x, names[0])) for names in PRODUCERS["mlp"].values()]
    losses = [torch.arange(v.n_components).double() for v in views]

    def allocated(share, **options):
        costs = measure_costs(model, lambda: model(x[:1]), views, "macs")
        options = {"least": [1] * len(views), "steps": [1] * len(views), **options}
        return allocate(losses, costs, share * costs.total, **options)

    assert allocated(1.0) == [len(v) for v in losses]
    rounded = allocated(0.5, steps=[4] * len(views))
    assert all(k % 4 == 0 or k == len(x) for k, x in zip(rounded, losses, strict=True))
    assert min(allocated(0.3, least=[4] * len(views))) == 4
    with pytest.raises(
        InputError, match=r"target: expected one that can be reached, got .* with every group at its least"
    ):
        allocated(0.1, least=[8] * len(views))
    assert Costs([], 0).total == 0


@pytest.mark.parametrize("selects", ["reconstruction", "cosep"])
@pytest.mark.parametrize("unit", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_pruner_meets_a_target(kind, unit, selects):
    model, x, y = build(kind, 21 if kind == "mlp" else 24)
    selector = fitted(model, x, y, kind=selects)
    whole = COUNTS[unit](model, x)
    for target, share in (({unit: 0.6}, 0.6), ({unit: 0.3 * whole}, 0.3)):
        pruned = copy.deepcopy(model)
        pruner = CoSePPruner(pruned, x[:1], selector, target=target)
        pruner.step()
        assert share * 0.9 < COUNTS[unit](pruned, x) / whole <= share + 1e-9
        assert pruned(x).shape == (len(x), 4)
        chosen = [e for e in pruner.plan if e.selection]
        assert {e.reason for e in chosen} == {f"target in {unit}"}
        assert pruner.plan.options["target"] == target
        for e in chosen:
            group = group_with(model, x, e.name)
            assert e.selection.keep_idxs == selector.select(group, n_keep=e.selection.k).keep_idxs


@pytest.mark.slow
def test_target_with_other_options():
    model, x, y = build("vgg", 24)
    whole, selector = macs_by_hooks(model, x), fitted(model, x, y, kind="reconstruction")
    fixed = copy.deepcopy(model)
    CoSePPruner(fixed, x[:1], selector, target={"macs": 0.25}, pruning_ratio_dict={fixed.conv2: 0.75}).step()
    assert fixed.conv2.out_channels == 6
    assert 0.22 < macs_by_hooks(fixed, x) / whole <= 0.25
    rounded = copy.deepcopy(model)
    CoSePPruner(rounded, x[:1], selector, target={"macs": 0.5}, round_to=4).step()
    assert all(n % 4 == 0 for n in widths(rounded).values())
    assert macs_by_hooks(rounded, x) / whole <= 0.5
    guarded = copy.deepcopy(model)
    CoSePPruner(guarded, x[:1], selector, target={"macs": 0.5}, max_pruning_ratio=0.4).step()
    assert min(n for name, n in widths(guarded).items() if name != "head") >= 15 * 24 // 25
    options = {"loader": [(x, y)], "fit_options": {"progress": False}, "target": {"macs": 0.4}}
    gradual = copy.deepcopy(model)
    pruner, shares = CoSePPruner(gradual, x[:1], ReconstructionSelector(), iterative_steps=3, **options), []
    for _ in range(3):
        pruner.step()
        shares.append(macs_by_hooks(gradual, x) / whole)
    assert shares == pytest.approx([0.8, 0.6, 0.4], abs=0.04)
    assert max(shares[2] - 0.4, 0) == 0
    one_by_one = copy.deepcopy(model)
    CoSePPruner(one_by_one, x[:1], ReconstructionSelector(), layerwise=True, **options).step()
    assert 0.36 < macs_by_hooks(one_by_one, x) / whole <= 0.4


def test_refusals():
    model, x, y = build("vgg", 10)
    selector, before = fitted(model, x, y), fingerprint(model)
    for target, message in (
        ({}, "expected target with one of"),
        ({"flops": 0.5}, r"expected target with one of \['macs', 'params', 'latency'\]"),
        ({"macs": 0.5, "params": 0.5}, "expected target with one of"),
        ({"macs": 0}, "between 0 and 1"),
        ({"macs": 1}, "between 0 and 1"),
        ({"macs": float("nan")}, "between 0 and 1"),
        ({"macs": "half"}, "between 0 and 1"),
        (0.5, "expected target with one of"),
    ):
        with pytest.raises(InputError, match=message):
            CoSePPruner(model, x[:1], selector, target=target)
    for options in ({"pruning_ratio": 0.5}, {"prune_num_heads": True}):
        with pytest.raises(InputError, match=f"leave out {next(iter(options))}"):
            CoSePPruner(model, x[:1], selector, target={"macs": 0.5}, **options)
    pruner = CoSePPruner(model, x[:1], selector, target={"macs": 1e-6})
    with pytest.raises(InputError, match="target: expected one that can be reached"):
        pruner.step()
    assert_untouched(model, before)


def test_a_stock_count_is_close():
    model, x, y = build("resnet", 24)
    whole = tp.utils.count_ops_and_params(model, x[:1])[0]
    CoSePPruner(model, x[:1], fitted(model, x, y, kind="reconstruction"), target={"macs": 0.5}).step()
    assert tp.utils.count_ops_and_params(model, x[:1])[0] / whole == pytest.approx(0.5, abs=0.05)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.lstm = nn.Linear(6, 24), nn.LSTM(24, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.lstm(torch.relu(self.stem(x)))[0][:, -1])


def test_recurrent_layers_count_and_keep_their_outputs():
    torch.manual_seed(0)
    model, x, y = Recurrent(), torch.randn(40, 5, 6), torch.arange(40) % 4
    view = read_group(group_with(model, x, "stem"))
    for unit, whole, per_channel in (
        ("macs", 5 * (6 * 24 + 32 * 24 + 3 * 32 * 8) + 8 * 4, 5 * (6 + 32)),
        ("params", sum(p.numel() for p in model.parameters()), 6 + 1 + 32),
    ):
        costs = measure_costs(model, lambda: model(x[:2]), [view], unit)
        assert costs.total == whole
        costs.remove(0, 4)
        assert costs.total == pytest.approx(whole - 4 * per_channel)
    pruner = CoSePPruner(
        model, x[:1], ReconstructionSelector().fit(model, [(x, y)], progress=False), target={"macs": 0.7}
    )
    pruner.step()
    assert (model.lstm.hidden_size, model.lstm.input_size) == (8, model.stem.out_features)
    assert model.stem.out_features < 24
    (group_plan,) = [e for e in pruner.plan if e.name == "lstm"]
    assert group_plan.reason == "Torch-Pruning cannot prune the outputs of a recurrent layer"


def test_a_target_that_is_missed_is_said_to_be():
    model, x, y = build("vgg", 24)
    pruner = CoSePPruner(model, x[:1], fitted(model, x, y, kind="reconstruction"), target={"macs": 0.5})

    def prune_one():
        for group in pruner.step(interactive=True):
            if group[0].dep.target.module is model.conv1:
                group.prune()

    with pytest.warns(UserWarning, match=r"step: the target of .* macs was missed, .* see the plan"):
        prune_one()


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_a_target_that_asks_for_nothing_is_said_to_do_so(unit):
    model, x, y = build("vgg", 24)
    before = sum(p.numel() for p in model.parameters())
    pruner = CoSePPruner(
        model, x[:1], fitted(model, x, y, kind="reconstruction"), target={unit: 1e12}, iterative_steps=2
    )
    message = rf"step: the target of 1e\+12 {unit} asks for nothing, the model is at [\d.e+]+; shares are below 1"
    with pytest.warns(UserWarning, match=message) as found:
        pruner.step()
    assert len(found) == 1
    pruner.step()  # says it once
    assert sum(p.numel() for p in model.parameters()) == before


class Own(nn.Module):
    """A linear layer of the user's own, its weight the other way round."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out) / 3), nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class PruneOwn(tp.pruner.function.BasePruningFunc):
    def prune_out_channels(self, layer, idxs):
        kept = [i for i in range(layer.weight.shape[1]) if i not in set(idxs)]
        layer.weight, layer.bias = nn.Parameter(layer.weight.data[:, kept]), nn.Parameter(layer.bias.data[kept])
        return layer

    def prune_in_channels(self, layer, idxs):
        kept = [i for i in range(layer.weight.shape[0]) if i not in set(idxs)]
        layer.weight = nn.Parameter(layer.weight.data[kept])
        return layer

    def get_out_channels(self, layer):
        return layer.weight.shape[1]

    def get_in_channels(self, layer):
        return layer.weight.shape[0]


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_layers_of_the_users_own_count_and_are_credited(share):
    torch.manual_seed(0)
    layers = nn.Linear(16, 32), nn.ReLU(), Own(32, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5)
    model, x, y = nn.Sequential(*layers), torch.randn(80, 16), torch.arange(80) % 5
    whole = sum(p.numel() for p in model.parameters())
    selector = CoSePSelector(channel_dims={Own: -1}).fit(model, [(x, y)], progress=False)
    CoSePPruner(
        model,
        x[:2],
        selector,
        target={"params": share},
        customized_pruners={Own: PruneOwn()},
        root_module_types=[nn.Linear, Own],
    ).step()
    assert layers[2].weight.shape < (32, 24)
    assert share - 0.05 < sum(p.numel() for p in model.parameters()) / whole <= share


def test_what_fits_comes_back():
    model, x, _ = build("mlp", 30)
    views = [read_group(group_with(model, x, names[0])) for names in PRODUCERS["mlp"].values()]
    losses = [torch.rand(v.n_components, dtype=torch.float64).sort().values for v in views]
    costs = measure_costs(model, lambda: model(x[:1]), views, "macs")
    target = 0.5 * costs.total
    kept = allocate(losses, costs, target, least=[1] * len(views), steps=[1] * len(views))
    assert costs.total <= target
    for g, k in enumerate(kept):
        assert k == len(losses[g]) or costs.total - costs.saving(g, -1) > target


@pytest.mark.parametrize("kind", ["vgg", "resnet"])
def test_a_loss_counts_once_for_every_consumer(kind):
    model, x, y = build(kind, 12)
    selector = fitted(model, x, y)
    planner = CoSePPruner(model, x[:1], selector, ignored_layers=[model.head], target={"macs": 0.5}).planner()
    budget = budget_of(planner)
    numbers = []
    for view, losses in zip(budget.views, budget.losses, strict=True):
        group = group_with(model, x, view.name)
        consumers = [
            d
            for d, _ in group
            if group._DG.is_in_channel_pruning_fn(d.handler) and getattr(d.target.module, "weight", None) is not None
        ]
        numbers.append(len({d.target.module for d in consumers if d.target.module.weight.dim() > 1}))
        expected = selector.select(group).scores.sort().values * numbers[-1]
        assert losses.tolist() == pytest.approx(expected.tolist())
    assert (max(numbers) > 1) == (kind == "resnet")
