import copy
import dataclasses
import pickle
import re
from dataclasses import replace

import pytest
import torch
import torch_pruning as tp
from fitted import group_with
from models import Lambda, assert_untouched, build, fingerprint, images, initialise, seeded, vectors
from torch import nn
from torch.nn import functional as F

from tp_cosep import (
    Compensator,
    CoSePPruner,
    InputError,
    NotFittedError,
    PruningPlan,
    ReconstructionSelector,
    recalibrate,
)
from tp_cosep.compensation.compensator import MODES


class Chain(nn.Module):
    """A layer that makes 12 channels, something between, and a layer that reads them; then a head."""

    def __init__(self, make, between, read, head):
        super().__init__()
        self.make, self.between, self.read, self.head = make, between, read, head

    def forward(self, x):
        return self.head(self.read(self.between(self.make(x))))


class Stream(nn.Module):
    """A residual stream without normalisation, read by a branch, a 1 × 1 convolution and the head."""

    def __init__(self):
        super().__init__()
        self.make, self.inner = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 9, 3, padding=1)
        self.make2, self.read, self.head = (
            nn.Conv2d(9, 12, 3, padding=1),
            nn.Conv2d(12, 5, 1, stride=2),
            nn.Linear(17, 4),
        )

    def forward(self, x):
        x = self.make(x)
        x = x + self.make2(F.relu(self.inner(x)))
        return self.head(torch.cat([self.read(x).mean((2, 3)), x.mean((2, 3))], 1))


class Joined(nn.Module):
    """Two layers whose channels are concatenated, so that what one makes can replace what the other made."""

    def __init__(self):
        super().__init__()
        self.other, self.make = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.read, self.head = nn.Conv2d(19, 8, 3, padding=1), Pooled(8)

    def forward(self, x):
        return self.head(self.read(torch.cat([self.other(x), self.make(x)], 1)))


class Pooled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(F.relu(x).flatten(2).mean(2))


def conv(n_in=3, n_out=12, kernel=3, **options):
    return nn.Conv2d(n_in, n_out, kernel, **options)


KINDS = {
    "plain": lambda: Chain(conv(padding=1), nn.Identity(), conv(12, 8, padding=1), Pooled(8)),
    "normalised": lambda: Chain(
        conv(padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.Sequential(conv(12, 8, bias=False), nn.BatchNorm2d(8)),
        Pooled(8),
    ),
    "strided, dilated": lambda: Chain(
        conv(padding=1), nn.AvgPool2d(1), conv(12, 8, padding=2, stride=2, dilation=2), Pooled(8)
    ),
    "grouped": lambda: Chain(conv(padding=1), nn.Identity(), conv(12, 8, padding=1, groups=2), Pooled(8)),
    "depthwise": lambda: Chain(
        conv(padding=1), conv(12, 12, padding=1, groups=12, bias=False), conv(12, 8, 1), Pooled(8)
    ),
    "transposed": lambda: Chain(conv(), nn.Identity(), nn.ConvTranspose2d(12, 8, 3, stride=2), Pooled(8)),
    "flattened": lambda: Chain(conv(stride=2), nn.Flatten(), nn.Linear(12 * 9, 8), nn.Linear(8, 4)),
    "1-d": lambda: Chain(nn.Conv1d(3, 12, 3), nn.Identity(), nn.Conv1d(12, 8, 3, padding=1), Pooled(8)),
    "linear": lambda: Chain(nn.Linear(20, 12), nn.Identity(), nn.Linear(12, 8), nn.Linear(8, 4)),
    "stream": Stream,
    "joined": Joined,
}


def data_for(kind, n=96):
    if kind == "linear":
        return vectors(n)[0]
    return images(n)[0].flatten(2)[:, :, :21] if kind == "1-d" else images(n)[0]


# A copy, a scaled and flipped one, two sums. The halves of a grouped convolution lose as many: i and i + 6 go at once.
GONE = [4, 5, 10, 11]
MIXED = {4: {0: 1.0}, 5: {1: -2.5}, 10: {6: 0.5, 7: -1.0, 9: 3.0}, 11: {8: 1.0, 6: 1.0}}
COPIED = {4: {0: 1.0}, 5: {1: -2.5}, 10: {6: 0.5}, 11: {7: -0.7}}


@torch.no_grad()
def planted(kind):
    """A model in which the channels ``GONE`` of ``make`` are linear functions of those that stay."""
    model = initialise(KINDS[kind]())
    mixing = torch.zeros(12, 12)
    # What is filtered or normalised channel by channel stays a copy, but not a sum.
    for row, parts in (COPIED if kind in ("depthwise", "normalised") else MIXED).items():
        for channel, share in parts.items():
            mixing[row, channel] = share
    originals, share = mixing.abs().argmax(1)[GONE], mixing.sum(1)[GONE]
    if kind == "normalised":
        norm = model.between
        for p in (model.make.weight, norm.running_mean, norm.running_var):
            p[GONE] = p[originals]
        for p in (norm.weight, norm.bias):
            p[GONE] = p[originals] * share
        return model
    for layer in (getattr(model, name) for name in ("make", "make2") if hasattr(model, name)):
        for p in (layer.weight, layer.bias):
            p[GONE] = torch.einsum("gc,c...->g...", mixing, p)[GONE]
    if kind == "depthwise":
        model.between.weight[GONE] = model.between.weight[originals]
    if kind == "joined":  # what goes is made of what both layers make
        model.make.weight[GONE] += 0.3 * model.other.weight[:4]
        model.make.bias[GONE] += 0.3 * model.other.bias[:4]
    return model


def prune(model, x, name, gone, compensator=None):
    group = group_with(model, x, name)
    layer = model.get_submodule(name)
    graph = group._DG
    group = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, gone)
    refits = compensator(group) if compensator is not None else []
    group.prune()
    return refits


@pytest.mark.parametrize("max_features", [0, 2304])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_a_linear_combination_of_what_stays_is_not_missed(kind, mode, max_features):
    model, x = planted(kind), data_for(kind, 400 if kind == "flattened" else 96)
    before = model(x).detach()
    plain = copy.deepcopy(model)
    prune(plain, x, "make", GONE)
    compensator = Compensator(model, x[:1], mode=mode, max_features=max_features, max_positions=64)
    compensator.fit([x[: len(x) // 2], x[len(x) // 2 :]], progress=False)
    refits = prune(model, x, "make", GONE, compensator)
    scale = float(before.abs().max())
    assert float((plain(x) - before).detach().abs().max()) > 0.01 * scale  # or nothing had to be repaired
    assert float((model(x) - before).detach().abs().max()) < 1e-4 * scale
    consumers = {"stream": {"inner", "read", "head"}, "normalised": {"read.0"}}.get(kind, {"read"})
    assert {r.name for r in refits} == consumers
    assert all(r.reason == "" and r.error < 1e-6 for r in refits)
    assert compensator.refits == refits


@pytest.mark.parametrize("mode", MODES)
def test_a_constant_goes_into_the_bias(mode):
    torch.manual_seed(0)
    model = initialise(Chain(conv(), nn.Identity(), conv(12, 8, bias=False), Pooled(8)))
    with torch.no_grad():
        model.make.weight[4:] = 0  # eight channels that only hold a constant
        model.make.bias[4:] = torch.arange(8.0) - 3
    x = data_for("plain")
    before = model(x).detach()
    compensator = Compensator(model, x[:1], mode=mode).fit([x], progress=False)
    prune(model, x, "make", [*range(5, 12)], compensator)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert model.read.bias.shape == (8,)
    assert compensator.new_biases == ["read"]


@pytest.mark.parametrize("mode", MODES)
def test_a_constant_goes_into_the_running_mean_behind(mode):
    model = initialise(
        Chain(conv(), nn.Identity(), nn.Sequential(conv(12, 8, bias=False), nn.BatchNorm2d(8)), Pooled(8))
    )
    with torch.no_grad():
        model.make.weight[4:] = 0
        model.make.bias[4:] = torch.arange(8.0) - 3
    x = data_for("plain")
    before = model(x).detach()
    compensator = Compensator(model, x[:1], mode=mode).fit([x], progress=False)
    prune(model, x, "make", [*range(5, 12)], compensator)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert model.read[0].bias is None
    assert compensator.new_biases == []


def test_not_pruning_leaves_a_model_that_computes_what_the_pruned_one_would():
    model, x, _ = build("vgg", 12)
    compensator = Compensator(model, x[:1]).fit([x], progress=False)
    for name, gone in (("conv1", [1, 2, 7]), ("fc", [0, 11])):
        group = group_with(model, x, name)
        layer = model.get_submodule(name)
        prune_out = group._DG.get_pruner_of_module(layer).prune_out_channels
        compensator(group._DG.get_pruning_group(layer, prune_out, gone))
        before = model(x).detach()
        prune(model, x, name, gone)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def half_pruned(model, x, **options):
    """Outputs after half of every layer went by L1 norm, with a compensator of these options or none."""
    model = copy.deepcopy(model)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    importance = tp.importance.GroupMagnitudeImportance(p=1)
    pruner = tp.pruner.BasePruner(model, x[:1], importance, pruning_ratio=0.5, ignored_layers=[head])
    compensator = Compensator(model, x[:1], **options).fit([x], progress=False) if options else None
    for group in pruner.step(interactive=True):
        if compensator is not None:
            compensator(group)
        group.prune()
    return model(x).detach(), compensator


@pytest.mark.parametrize("kind", ["vgg", "resnet", "mlp"])
@pytest.mark.slow
def test_repair_helps_and_sequential_repair_helps_more(kind):
    modes = ({}, {"mode": "one-shot", "max_features": 0}, {"mode": "one-shot"}, {"mode": "sequential"})
    errors = [0.0] * len(modes)
    for seed in range(3):  # what is drawn for one model may favour either
        model, x, _ = build(kind, 24, seed=seed)
        x = torch.cat([x + 0.1 * torch.randn(x.shape, generator=seeded(i)) for i in range(8)])
        expected = model(x).detach()
        for i, options in enumerate(modes):
            outputs, compensator = half_pruned(model, x, **options)
            errors[i] += float((outputs - expected).square().mean() / expected.var())
            assert compensator is None or all(0 <= r.error <= 1 for r in compensator.refits)
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] <= 1.05 * errors[1]
    # Errors pile up along a residual stream; a short chain has little to gain.
    assert errors[3] < (0.9 if kind == "resnet" else 1.01) * errors[2]


def test_several_steps_are_one_step():
    """Least squares on what is left of what was left: without ridge the same as at once."""
    model, x, _ = build("mlp", 12)
    x = torch.randn(400, 20, generator=seeded())
    states = []
    for parts in ([[1, 2, 3, 4, 7]], [[3, 7], [1, 2, 3]]):  # of what is left, the second time
        pruned = copy.deepcopy(model)
        compensator = Compensator(pruned, x[:1], ridge=1e-12).fit([x], progress=False)
        for gone in parts:
            prune(pruned, x, "fc1", gone, compensator)
        states.append(pruned.fc2)
    torch.testing.assert_close(states[0].weight, states[1].weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(states[0].bias, states[1].bias, rtol=1e-3, atol=1e-4)


def test_layers_that_are_left_alone_are_named():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention, self.head = nn.Linear(20, 16), nn.MultiheadAttention(16, 2), nn.Linear(16, 4)

        def forward(self, x):
            x = self.embed(x)
            return self.head(self.attention(x, x, x)[0].mean(0))

    model, x = Attention().eval(), torch.randn(5, 8, 20, generator=seeded())
    compensator = Compensator(model, x[:, :1]).fit([x], progress=False)
    refits = {r.name: r for r in prune(model, x, "embed", [0, 1, 8, 9], compensator)}
    assert refits["attention"].reason == "a MultiheadAttention is not refitted"
    assert refits["attention"].error is None
    model(x)


def test_failures_leave_the_model_as_it_was():
    model, x, _ = build("resnet", 12)
    before = fingerprint(model)
    compensator = Compensator(model, x[:1])
    with pytest.raises(NotFittedError, match=re.escape("call fit(loader)")):
        compensator(group_with(model, x, "conv1"))
    for loader, message in (([], "gave none"), ([x * float("nan")], "layer 'stem'|layer 'conv1'.*NaN")):
        with pytest.raises(InputError, match=message):
            Compensator(model, x[:1]).fit(loader, progress=False)
    with pytest.raises(InputError, match="can be read once"):
        Compensator(model, x[:1], mode="sequential").fit(iter([x]), progress=False)
    with pytest.raises(InputError, match=r"need .* MiB, the memory_budget is .* MiB \(the largest: 'conv"):
        Compensator(model, x[:1], memory_budget=1000).fit([x], progress=False)
    assert_untouched(model, before)
    for options, message in (
        ({"mode": "often"}, "expected mode"),
        ({"max_positions": 0}, "max_positions ≥ 1"),
        ({"ridge": 0.0}, "ridge > 0"),
    ):
        with pytest.raises(InputError, match=message):
            Compensator(model, x[:1], **options)


def test_data_that_turns_bad_between_two_groups():
    model, x, _ = build("resnet", 12)
    loader = [x]
    compensator = Compensator(model, x[:1], mode="sequential").fit(loader, progress=False)
    loader[0] = x * float("nan")
    before = fingerprint(model)
    with pytest.raises(InputError, match="NaN or infinite"):
        compensator(group_with(model, x, "conv1"))
    assert_untouched(model, before)


def test_a_model_that_was_pruned_without_it():
    model, x, _ = build("vgg", 12)
    compensator = Compensator(model, x[:1]).fit([x], progress=False)
    prune(model, x, "conv1", [0, 5])
    with pytest.raises(InputError, match="layer 'conv2': measured with 12 input channels, it has 10"):
        prune(model, x, "conv1", [1], compensator)


def test_a_fitted_compensator_can_be_copied_and_pickled():
    model, x, _ = build("vgg", 12)
    compensator = Compensator(model, x[:1], mode="sequential").fit([x], progress=False)
    for other in (copy.deepcopy(compensator), pickle.loads(pickle.dumps(compensator))):
        refits = other(group_with(other.model, x, "conv1"))
        assert [r.name for r in refits] == ["conv2"]


def test_fitting_changes_nothing():
    model, x, y = build("vgg", 12)
    model.train()
    before = fingerprint(model)
    Compensator(model, x[:1], mode="sequential").fit([(x, y)], progress=False)
    assert_untouched(model, before)
    assert model.training


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["vgg", "resnet", "mlp"])
def test_the_pruner_does_it_by_itself(kind, mode):
    model, x, y = build(kind, 12)
    by_hand = copy.deepcopy(model)
    options = {"pruning_ratio": 0.5, "loader": [(x, y)], "fit_options": {"progress": False}}
    pruner = CoSePPruner(model, x[:1], ReconstructionSelector(spatial=2), compensate=mode, **options)
    pruner.step()
    compensator = Compensator(by_hand, x[:1], mode=mode).fit([(x, y)], progress=False)
    other = CoSePPruner(by_hand, x[:1], ReconstructionSelector(spatial=2), **options)
    for group in other.step(interactive=True):
        compensator(group)
        group.prune()
    assert pruner.compensator.refits == compensator.refits
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), by_hand.state_dict().values(), strict=True)
    )
    # A plan applied to a fresh copy has a place for every weight.
    fresh, _, _ = build(kind, 12)
    pruner.plan.apply(fresh, x[:1]).load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_a_plan_remembers_new_biases(tmp_path):
    model = initialise(Chain(conv(), nn.ReLU(), conv(12, 8, bias=False), Pooled(8)))
    fresh, x = copy.deepcopy(model), data_for("plain")
    y = torch.arange(len(x)) % 4
    pruner = CoSePPruner(
        model,
        x[:1],
        ReconstructionSelector(spatial=2),
        pruning_ratio=0.5,
        loader=[(x, y)],
        compensate=True,
        ignored_layers=["head"],
    )
    pruner.step()
    assert pruner.plan.new_biases == ("read",)
    pruner.plan.save(tmp_path / "plan.json")
    PruningPlan.load(tmp_path / "plan.json").apply(fresh, x[:1]).load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    unchecked = dataclasses.replace(pruner.plan, structure={})
    with pytest.raises(InputError, match=r"layer 'read': the plan gives it a bias.*got Identity"):
        unchecked.apply(Chain(conv(), nn.ReLU(), nn.Identity(), Pooled(12)), x[:1])


def test_fine_tuning_makes_it_measure_anew():
    model, x, y = build("vgg", 12)
    measured = []
    compensator = Compensator(model, x[:1])
    fit = compensator.fit
    compensator.fit = lambda *args, **options: measured.append(model.conv1.out_channels) or fit(*args, **options)
    pruner = CoSePPruner(
        model, x[:1], ReconstructionSelector(spatial=2), pruning_ratio=0.5, loader=[(x, y)], compensate=compensator,
        layerwise=True, recalibrate=True, fine_tune=lambda m: m.conv2.weight.data.mul_(1.1), ignored_layers=["head"],
        fit_options={"progress": False},
    )  # fmt: skip
    pruner.step()
    assert measured == [12, 6, 6, 6]


def test_a_failure_later_on_puts_everything_back():
    model, x, y = build("vgg", 12)
    before = fingerprint(model)

    def fail(_model):
        raise RuntimeError("no")

    pruner = CoSePPruner(
        model,
        x[:1],
        ReconstructionSelector(spatial=2),
        pruning_ratio=0.5,
        loader=[(x, y)],
        compensate=True,
        fine_tune=fail,
    )
    with pytest.raises(RuntimeError, match="no"):
        pruner.step()
    assert_untouched(model, before)
    assert pruner.compensator.refits == []
    assert not pruner.compensator.is_fitted
    pruner.settings = replace(pruner.settings, fine_tune=None)
    pruner.step()
    assert [r.reason for r in pruner.compensator.refits] == [""] * 4


def test_pruner_options():
    model, x, y = build("vgg", 12)
    selector = ReconstructionSelector(spatial=2).fit(model, [(x, y)], progress=False)
    for options, message in (
        ({"compensate": True}, "pass loader="),
        ({"compensate": "now", "loader": [(x, y)]}, "expected mode"),
        ({"recalibrate": True}, "pass loader="),
        ({"compensate": Compensator(nn.Linear(2, 2), x)}, "of another"),
        ({"compensate": Compensator(model, x[:1])}, "a fitted Compensator"),
    ):
        with pytest.raises(InputError, match=message):
            CoSePPruner(model, x[:1], selector, **options)


def test_recalibration():
    model, x, _ = build("resnet", 12)
    model.bn1.momentum = None
    model.train()
    model.bn3.eval()
    expected = copy.deepcopy(model)
    batches = [x[:10], x[10:22], x[22:]]
    weights = {n: p.clone() for n, p in model.named_parameters()}
    assert recalibrate(model, batches, progress=False) == 6
    # Another route: the mean over batches of what each layer sees, all of them normalising by their batch.
    seen = {}
    for name, m in expected.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.train()
            m.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    for batch in batches:
        expected(batch)
    for name, inputs in seen.items():
        norm = model.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, torch.stack([a.mean((0, 2, 3)) for a in inputs]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([a.var((0, 2, 3)) for a in inputs]).mean(0))
    assert model.bn1.momentum is None
    assert model.bn0.momentum == 0.1
    assert model.training
    assert not model.bn3.training
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())


def test_recalibration_of_nothing_and_of_nonsense():
    mlp, x, _ = build("mlp", 12)
    assert recalibrate(mlp, iter([]), progress=False) == 0
    model, x, _ = build("resnet", 12)
    before = fingerprint(model)
    with pytest.raises(InputError, match="gave none"):
        recalibrate(model, [], progress=False)
    with pytest.raises(InputError, match="batch 1: expected more than one value per channel"):
        recalibrate(nn.BatchNorm1d(4), [torch.randn(3, 4), torch.randn(1, 4)], progress=False)
    with pytest.raises(InputError, match="layer 'bn0': its statistics came out NaN"):
        recalibrate(model, [x * float("inf")], progress=False)
    assert_untouched(model, before)


def test_products_and_unusual_inputs():
    """A gate's product is refitted where it is read; keywords reach layers; a function may stand for a layer."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.make, self.gate, self.read = nn.Linear(20, 12), nn.Linear(20, 12), nn.Linear(12, 4)
            self.act = Lambda(torch.sigmoid)

        def forward(self, x):
            return self.read(input=self.make(x) * self.act(self.gate(x)))

    torch.manual_seed(0)
    model, x = Gated(), torch.randn(300, 20, generator=seeded())
    with torch.no_grad():
        for layer in (model.make, model.gate):
            layer.weight[6:], layer.bias[6:] = layer.weight[:6], layer.bias[:6]
        model.make.weight[6:] *= -3
        model.make.bias[6:] *= -3
    before = model(x).detach()
    compensator = Compensator(model, x[:1]).fit([x], progress=False)
    prune(model, x, "make", [*range(6, 12)], compensator)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "group", "2d"])
def test_sequential_repair_foresees_what_a_normalisation_over_channels_does(kind):
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    norm = {"layer": nn.LayerNorm(16), "group": nn.GroupNorm(4, 16), "2d": LayerNorm2d(16)}[kind]
    if kind == "layer":
        model = initialise(Chain(nn.Linear(20, 16), norm, nn.Linear(16, 9), nn.Linear(9, 4)))
        x = vectors(400)[0]
    else:
        model = initialise(Chain(conv(n_out=16), norm, conv(16, 9), Pooled(9)))
        x = images(200)[0]
    with torch.no_grad():  # what goes is large, so averages change
        model.make.weight[[3, 7, 11, 15]] *= 4
    expected, errors = model(x).detach(), []
    for mode in (None, *MODES):
        pruned = copy.deepcopy(model)
        compensator = None if mode is None else Compensator(pruned, x[:1], mode=mode).fit([x], progress=False)
        prune(pruned, x, "make", [3, 7, 11, 15], compensator)
        errors.append(float((pruned(x) - expected).detach().square().mean()))
    assert errors[2] < 0.7 * min(errors[:2])


def test_too_little_data_is_said_to_be():
    model, x, _ = build("vgg", 12)
    compensator = Compensator(model, x[:1], max_positions=4)
    with pytest.warns(
        UserWarning, match=r"few samples for the inputs of 4 layers \(.*'conv3' 4 for 108\); a refit may do"
    ):
        compensator.fit([x[:1]], progress=False)
