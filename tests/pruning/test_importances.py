"""``CoSePPruner`` with importances of Torch-Pruning and of users, against stock pruners with the same."""

import copy

import pytest
import torch
import torch_pruning as tp
from attention_models import transformer
from models import assert_untouched, build, fingerprint, images, initialise
from torch import nn
from torch.nn import functional as F

import tp_cosep
from tp_cosep import CoSePPruner, InputError, attention_heads
from tp_cosep.pruning.costs import layer_costs

IMPORTANCES = {
    "magnitude": tp.importance.MagnitudeImportance,
    "group magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "taylor": tp.importance.GroupTaylorImportance,
    "bn scale": tp.importance.BNScaleImportance,
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "random": tp.importance.RandomImportance,
    "a user's": lambda: biases,
}


def biases(group):
    """A user's own: the size of the root's biases, or of its kernels."""
    root = group[0].dep.target.module
    scores = root.weight.flatten(1).norm(dim=1) if root.bias is None else root.bias.abs()
    return scores[group[0].idxs] + 0.01


def with_gradients(kind):
    model, x, y = build(kind, 12)
    F.cross_entropy(model(x), y).backward()
    return model, x, y


def copied(model):
    """A copy with gradients of its own."""
    other = copy.deepcopy(model)
    for theirs, p in zip(other.parameters(), model.parameters(), strict=True):
        theirs.grad = None if p.grad is None else p.grad.clone()
    return other


def n_params(model):
    return sum(p.numel() for p in model.parameters())


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)


RANKINGS = {
    "in layers": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("name", IMPORTANCES)
def test_a_ratio_gives_what_a_stock_pruner_gives(name, ranking):
    model, x, _ = with_gradients("resnet")
    stock = copied(model)
    options = {"pruning_ratio": 0.4, **RANKINGS[ranking]}
    pruner = CoSePPruner(model, x[:1], IMPORTANCES[name](), ignored_layers=[model.head], **options)
    theirs = tp.pruner.BasePruner(stock, x[:1], IMPORTANCES[name](), ignored_layers=[stock.head], **options)
    for each in (pruner, theirs):
        torch.manual_seed(3)
        each.step()
    assert n_params(model) < 0.8 * n_params(build("resnet", 12)[0])
    assert equal_states(model, stock)
    assert {g.selection.criterion for g in pruner.plan if g.selection} == {"retained score"}


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["separate", "fused"])
def test_heads_and_their_dimensions_as_a_stock_pruner(options):
    model, x, _ = transformer(**options)
    stock = copied(model)
    ratios = {"pruning_ratio": 1 / 3, "head_pruning_ratio": 0.5, "prune_num_heads": True, "prune_head_dims": True}
    for m, pruner in ((model, CoSePPruner), (stock, tp.pruner.BasePruner)):
        importance = tp.importance.GroupMagnitudeImportance()
        # Residual streams are left out: a stock pruner takes a layer's outputs and inputs for one scope, and drops one.
        options = ratios | {"ignored_layers": [m.embed, m.head], "num_heads": attention_heads(m)}
        pruner(m, x[:1], importance, **options).step()
    assert equal_states(model, stock)
    assert model.layers[0].proj.in_features == 2 * 4


def test_channel_groups_and_multiples_as_a_stock_pruner():
    def grouped():
        layers = [nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=3), nn.ReLU(), nn.Conv2d(24, 5, 3)]
        return initialise(nn.Sequential(*layers))

    model, stock, x = grouped(), grouped(), images(4)[0]
    for m, pruner in ((model, CoSePPruner), (stock, tp.pruner.BasePruner)):
        pruner(m, x[:1], tp.importance.LAMPImportance(), pruning_ratio=0.3, round_to=4, ignored_layers=[m[4]]).step()
    assert equal_states(model, stock)
    assert model[0].out_channels == 12


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("name", IMPORTANCES)
def test_a_target_is_met_by_the_lowest_scores_of_every_layer(name, unit):
    model, x, _ = with_gradients("vgg")
    whole = tp.utils.count_ops_and_params(model, x[:1])
    pruner = CoSePPruner(model, x[:1], IMPORTANCES[name](), target={unit: 0.5}, ignored_layers=[model.head])
    pruner.step()
    left = tp.utils.count_ops_and_params(model, x[:1])[unit == "params"]
    assert 0.4 < left / whole[unit == "params"] < 0.53  # Torch-Pruning counts biases and BatchNorm, too
    pruned = [group.selection for group in pruner.plan if group.selection is not None]
    assert len(pruned) == (2 if name == "bn scale" else 4)  # two layers have no BatchNorm
    for selection in pruned:
        kept, removed = (selection.scores[list(i)] for i in (selection.keep_idxs, selection.prune_idxs))
        assert kept.min() >= max(removed.tolist(), default=0)


def test_heads_that_share_keys_and_values():
    model, x, _ = transformer(kv_heads=2)
    weights = [layer.proj.weight.detach().clone() for layer in model.layers]
    options = {
        "head_pruning_ratio": 0.5,
        "prune_num_heads": True,
        "prune_head_dims": False,
        "num_heads": attention_heads(model),
    }

    def importance(group):
        root = group[0].dep.target.module
        return root.weight.abs().sum(0)[group[0].idxs] if len(group[0].idxs) == 24 else None

    CoSePPruner(model, x[:1], importance, pruning_ratio=0.0, **options).step()
    for layer, before in zip(model.layers, weights, strict=True):
        heads = before.abs().sum(0).view(2, 2, 6).mean(2).argmax(1)  # of each pair that shares keys and values
        assert torch.equal(layer.proj.weight, before.view(20, 2, 2, 6)[:, [0, 1], heads].flatten(1))


def test_a_target_in_milliseconds(monkeypatch):
    model, x, _ = with_gradients("vgg")
    whole = layer_costs(model, lambda: model(x[:1]))["macs"]
    # A clock that ticks with every multiply-accumulate.
    monkeypatch.setattr("tp_cosep.pruning.targets.median_times", ticks)
    pruner = CoSePPruner(model, x[:1], tp.importance.LAMPImportance(), target={"latency": 0.6}, ignored_layers=["head"])
    pruner.step()
    share = sum(layer_costs(model, lambda: model(x[:1]))["macs"].values()) / sum(whole.values())
    assert 0.5 < share <= 0.6


def ticks(models, run, device):
    return {n: sum(layer_costs(m, lambda m=m: run(m))["macs"].values()) for n, m in models.items()}


def test_several_steps_towards_a_target():
    model, x, _ = with_gradients("resnet")
    whole = sum(layer_costs(model, lambda: model(x[:1]))["macs"].values())
    importance = tp.importance.GroupTaylorImportance()
    pruner = CoSePPruner(model, x[:1], importance, target={"macs": 0.4}, iterative_steps=2, ignored_layers=["head"])
    shares = []
    for _ in range(2):
        pruner.step()
        shares.append(sum(layer_costs(model, lambda: model(x[:1]))["macs"].values()) / whole)
        model.zero_grad()
        model(x).square().mean().backward()
    assert 0.6 < shares[0] <= 0.7
    assert 0.33 < shares[1] <= 0.4


def test_compensation_is_on_with_a_loader_and_helps():
    errors = {}
    for loader in (None, [images(200)]):
        model, x, _ = with_gradients("vgg")
        whole = model(x).detach()
        importance = tp.importance.GroupTaylorImportance()
        pruner = CoSePPruner(model, x[:1], importance, target={"macs": 0.6}, loader=loader, ignored_layers=["head"])
        pruner.step()
        errors[loader is None] = float((model(x) - whole).detach().square().mean() / whole.var(0).mean())
    assert pruner.compensator.refits
    assert pruner.plan.options["recalibrated"] in (True, False)
    assert pruner.importance is importance
    assert errors[False] < 0.8 * errors[True]


def test_a_plan_is_saved_loaded_and_drawn(tmp_path):
    model, x, _ = with_gradients("resnet")
    whole = copy.deepcopy(model)
    options = {"target": {"macs": 0.5}, "loader": [images()], "ignored_layers": ["head"]}
    pruner = CoSePPruner(model, x[:1], tp.importance.GroupTaylorImportance(), **options)
    pruner.step()
    tp_cosep.save(model, pruner.plan, tmp_path / "pruned")
    loaded = tp_cosep.load(tmp_path / "pruned", lambda: whole)
    assert equal_states(loaded, model)
    pruner.plan.report(tmp_path / "page.html")
    assert "Retained score" in (tmp_path / "page.html").read_text()
    assert pruner.plan.options["importance"] == "GroupTaylorImportance"


@pytest.mark.parametrize(
    ("importance", "options", "message"),
    [
        (tp.importance.LAMPImportance, {}, "expected a selector, such as .* got the type LAMPImportance"),
        ("l2", {}, "expected a selector, .* got the string 'l2'"),
        (biases, {}, r"pruning_ratio= or target= with biases, got neither: .* CoSePSelector has counts"),
        (biases, {"pruning_ratio": 0.5, "layerwise": True, "loader": [1]}, "layerwise=True collects a selector's"),
        (biases, {"pruning_ratio": 0.5, "isomorphic": True}, "isomorphic=True .* needs global_pruning=True"),
    ],
)
def test_what_an_importance_cannot_do(importance, options, message):
    model, x, _ = build("vgg", 10)
    with pytest.raises(InputError, match=message):
        CoSePPruner(model, x[:1], importance, **options)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (
            tp.importance.GroupTaylorImportance(),
            r"layer 'fc': GroupTaylorImportance failed .* needs a loss.backward\(\)",
        ),
        (
            lambda group: torch.ones(3),
            r"layer 'fc': expected <lambda> to give finite scores of shape \(10,\), got shape \(3,\)",
        ),
        (lambda group: biases(group) / 0, r"layer 'fc': expected <lambda> .* got NaN or infinite ones"),
        (lambda group: [1.0] * 10, r"layer 'fc': expected <lambda> .* got a list of 10"),
    ],
)
def test_scores_that_cannot_be_used(importance, message):
    model, x, _ = build("vgg", 10)
    untouched = fingerprint(model)
    with pytest.raises(InputError, match=message):
        CoSePPruner(model, x[:1], importance, pruning_ratio=0.5).step()
    assert_untouched(model, untouched)


def test_groups_without_scores_are_left_alone():
    model, x, _ = with_gradients("vgg")
    pruner = CoSePPruner(model, x[:1], tp.importance.BNScaleImportance(), pruning_ratio=0.5, ignored_layers=["head"])
    pruner.step()
    assert (model.conv2.out_channels, model.fc.out_features) == (12, 12)
    assert {g.reason for g in pruner.plan if g.name in ("conv2", "fc")} == {"BNScaleImportance gives it no scores"}
