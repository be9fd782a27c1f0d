"""Pruned models in folders: what comes back, and what is refused."""

import copy
import json
import os
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from models import KINDS, assert_same_state, build, images, initialise
from processes import ViT
from safetensors.torch import load_file
from saved_models import pruned_by, saved
from torch import nn

import tp_cosep
from tp_cosep import CoSePPruner, InputError, PruningPlan
from tp_cosep.graph.structure import describe_inputs, zeros_for
from tp_cosep.pruning.saving import MANIFEST, PLAN, WEIGHTS
from tp_cosep.utils.files import write_safetensors

FILES = [MANIFEST, PLAN, WEIGHTS]


def assert_same_model(model, again, *inputs):
    assert not again.training
    assert_same_state(again.state_dict(), model.state_dict())
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        y = again.get_parameter(name) if isinstance(x, nn.Parameter) else again.get_buffer(name)
        assert y.dtype == x.dtype, name
        assert y.stride() == x.stride(), name
        assert y.data_ptr() % 64 == 0, name  # as torch allocates; kernels differ elsewhere
    with torch.no_grad():
        assert torch.equal(again(*inputs), model.eval()(*inputs))
        one = [x[:1] if isinstance(x, torch.Tensor) else x for x in inputs]
        assert torch.equal(again(*one), model(*one))


@pytest.mark.parametrize("refit", [{}, {"compensate": True, "recalibrate": True}], ids=["plain", "repaired"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back(kind, refit, tmp_path):
    make, model, plan, x = saved(kind, tmp_path / "new", **refit)
    again = tp_cosep.load(tmp_path / "new", make)
    assert_same_model(model, again, x)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(FILES)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in make().parameters())
    assert PruningPlan.load(tmp_path / "new" / PLAN) == plan


def test_layers_that_were_given_a_bias(tmp_path):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
    ]
    model, (x, y) = initialise(nn.Sequential(*layers, nn.Linear(12, 4))), images(n=100)
    fresh = copy.deepcopy(model)
    plan = pruned_by(model, x, y, loader=[(x, y)], compensate=True)
    assert plan.new_biases == ("2",)
    tp_cosep.save(model, plan, tmp_path)
    assert_same_model(model, tp_cosep.load(tmp_path, lambda: fresh), x)


def test_attention_with_fewer_heads(tmp_path):
    torch.manual_seed(0)
    model, x, y = ViT().eval(), torch.randn(40, 5, 6), torch.arange(40) % 4
    plan = pruned_by(model, x, y, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.3)
    assert model.num_heads == 2
    tp_cosep.save(model, plan, tmp_path)
    again = tp_cosep.load(tmp_path, ViT)
    assert again.num_heads == 2
    assert_same_model(model, again, x)


class Tied(nn.Module):
    """Two heads with one weight, a buffer that is not saved and one that another layer shares."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 8))
        self.head, self.other = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
        self.other.weight = self.head.weight
        self.register_buffer("scale", torch.linspace(0.5, 2, 8))
        self.register_buffer("table", torch.linspace(1, 3, 8) / 3, persistent=False)

    def forward(self, x):
        x = self.body(x) * self.scale * self.table
        return self.head(x) + self.other(x.sin())


def tied(**options):
    torch.manual_seed(0)
    model, x, y = Tied().eval(), torch.randn(40, 20), torch.arange(40) % 4
    plan = pruned_by(model, x, y, ignored_layers=[model.head, model.other, model.body[2]], **options)
    return model, plan, x


def test_a_tied_weight_is_kept_once_and_stays_tied(tmp_path):
    model, plan, x = tied()
    tp_cosep.save(model, plan, tmp_path)
    assert "other.weight" not in load_file(tmp_path / WEIGHTS)
    again = tp_cosep.load(tmp_path, Tied)
    assert again.head.weight is again.other.weight
    assert_same_model(model, again, x)


def test_weights_that_are_tied_no_longer(tmp_path):
    """A factory that ties what the saved model has apart must not give both the same values."""
    model, plan, x = tied()
    model.other.weight = nn.Parameter(2 * model.head.weight.detach())
    tp_cosep.save(model, plan, tmp_path)
    assert_same_model(model, tp_cosep.load(tmp_path, Tied), x)


def test_types_are_those_of_the_saved_model(tmp_path):
    model, plan, x = tied()
    model.bfloat16()
    tp_cosep.save(model, plan, tmp_path)
    again = tp_cosep.load(tmp_path, Tied)
    assert again.table.dtype == torch.bfloat16
    assert_same_model(model, again, x.bfloat16())


def test_the_order_in_memory_is_kept(tmp_path):
    make, model, plan, x = saved("resnet", tmp_path)
    model.to(memory_format=torch.channels_last)
    model.head.weight = nn.Parameter(model.head.weight.detach().T.contiguous().T)
    assert not model.conv1.weight.is_contiguous()
    tp_cosep.save(model, plan, tmp_path)
    assert_same_model(model, tp_cosep.load(tmp_path, make), x)


def test_the_order_in_memory_of_a_single_tap_is_kept(tmp_path):
    """It can be read in two ways, and kernels are chosen by it."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 9, 1), nn.ReLU(), nn.Conv2d(9, 4, 3))

    model, (x, y) = make().eval(), images(n=60)
    plan = pruned_by(model, x, y, ignored_layers=[model[4]])
    model.to(memory_format=torch.channels_last)
    assert model[2].weight.is_contiguous()
    assert model[2].weight.stride() != make()[2].weight.stride()
    tp_cosep.save(model, plan, tmp_path)
    assert_same_model(model, tp_cosep.load(tmp_path, make), x)


def test_parameters_stay_trainable_or_frozen_as_the_factory_has_them(tmp_path):
    make, *_ = saved("vgg", tmp_path)

    def frozen():
        model = make()
        model.conv1.weight.requires_grad_(False)
        return model

    again = tp_cosep.load(tmp_path, frozen)
    assert [n for n, p in again.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    again(torch.randn(2, 3, 8, 8)).sum().backward()
    assert again.conv2.weight.grad is not None


def test_example_inputs_can_be_given(tmp_path):
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4))

        def forward(self, x, scale):
            return self.net(x) * float(scale)

    torch.manual_seed(0)
    x, y = torch.randn(40, 20), torch.arange(40) % 4
    one = Fraction(1)
    model = Any().eval()
    selector = tp_cosep.ReconstructionSelector(keep=5).fit(model, [((x, one), y)], progress=False)
    pruner = CoSePPruner(model, (x[:1], one), selector)
    pruner.step()
    assert pruner.plan.inputs is None
    tp_cosep.save(model, pruner.plan, tmp_path)
    with pytest.raises(InputError, match="does not say what inputs look like; pass example_inputs="):
        tp_cosep.load(tmp_path, Any)
    assert_same_model(model, tp_cosep.load(tmp_path, Any, example_inputs=(x[:1], one)), x, one)


def test_descriptions_of_inputs():
    inputs = (torch.ones(2, 3, dtype=torch.int64), {"mask": torch.ones(2, dtype=torch.bool), "n": 3, "no": None})
    described = json.loads(json.dumps(describe_inputs(inputs)))
    ids, rest = zeros_for(described, torch.device("cpu"))
    assert torch.equal(ids, torch.zeros(2, 3, dtype=torch.int64))
    assert torch.equal(rest["mask"], torch.zeros(2, dtype=torch.bool))
    assert (rest["n"], rest["no"]) == (3, None)
    assert describe_inputs([object()]) is None
    for bad in (
        {"tensor": "nothing [1]"},
        {"tensor": "float32 [-1]"},
        {"tensor": "load [1]"},
        {"value": []},
        {},
        3,
        None,
    ):
        with pytest.raises(ValueError, match="expected the description"):
            zeros_for(bad, torch.device("cpu"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "shorter", "changed", "empty"])
def test_damaged_folders(name, damage, tmp_path):
    make, *_ = saved("mlp", tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        other = bytes([content[middle] ^ 1])
        path.write_bytes(
            {"shorter": content[:-9], "empty": b""}.get(damage, content[:middle] + other + content[middle + 1 :])
        )
    with pytest.raises(InputError, match=rf"{name}|expected \{{'bytes'"):
        tp_cosep.load(tmp_path, make)


@pytest.mark.parametrize("name", FILES)
def test_a_mix_of_two_saves(name, tmp_path):
    make, *_ = saved("mlp", tmp_path / "a")
    saved("mlp", tmp_path / "b", compensate=True)
    model, x, y = build("mlp", 12, seed=3)
    tp_cosep.save(model, pruned_by(model, x, y, pruning_ratio=0.3), tmp_path / "b")
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(InputError, match="was changed or cut short, or belongs to another save"):
        tp_cosep.load(tmp_path / "a", make)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "expected JSON"),
        ("null", "expected a file written by tp_cosep.save"),
        ('{"format": "tp_cosep.plan"}', "expected a file written by tp_cosep.save"),
        ('{"format": "tp_cosep.model", "version": 2}', "expected version 1, got 2; update tp_cosep"),
        ('{"format": "tp_cosep.model", "version": 1}', "damaged, expected entries"),
        ('{"format": "tp_cosep.model", "version": 1, "files": {"../plan.json": {}}}', "damaged, expected entries"),
    ],
)
def test_foreign_manifests(text, message, tmp_path):
    make, *_ = saved("mlp", tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError, match=rf"{MANIFEST}.*{message}"):
        tp_cosep.load(tmp_path, make)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(InputError, match=r"expected a folder written by tp_cosep\.save, found no manifest\.json"):
        tp_cosep.load(tmp_path / "nowhere", nn.Identity)


def test_weights_of_something_else_with_a_good_manifest(tmp_path):
    """The manifest guards against mistakes; what it vouches for is checked all the same."""
    from tp_cosep.pruning.saving import _facts

    make, *_ = saved("mlp", tmp_path)
    for tensors, header, message in [
        ({"x": torch.ones(1)}, None, "expected a file written by tp_cosep"),
        ({"x": torch.ones(1)}, {}, "expected the weights of a model"),
        (
            {"x": torch.ones(1)},
            {"format": "tp_cosep.model", "names": {"x": "x"}, "strides": {}, "unsaved": []},
            "do not fit the model that the plan makes",
        ),
        (
            {"x": torch.ones(1)},
            {"format": "tp_cosep.model", "names": {"x": "y"}, "strides": {}, "unsaved": []},
            "do not fit the model that the plan makes",
        ),
        (
            {"x": torch.ones(2, 2)},
            {"format": "tp_cosep.model", "names": {"x": "x"}, "strides": {"x": [1, 2**40]}, "unsaved": []},
            r"strides \[1, 1099511627776\] do not fit the shape \(2, 2\)",
        ),
    ]:
        write_safetensors(tmp_path / WEIGHTS, tensors, header)
        manifest = json.loads((tmp_path / MANIFEST).read_text())
        manifest["files"][WEIGHTS] = _facts(tmp_path / WEIGHTS)
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=message):
            tp_cosep.load(tmp_path, make)


def test_the_factory_has_to_make_the_model(tmp_path):
    saved("vgg", tmp_path)
    for make, message in [
        (lambda: build("vgg", 10)[0], r"layer 'conv1': the plan is for a model with weight float32 \[12, 3, 3, 3\]"),
        (lambda: build("resnet", 12)[0], r"layer 'conv1': .* \[12, 3, 3, 3\], here it is float32 \[12, 12, 3, 3\]"),
        (lambda: build("vgg", 12)[0].double(), r"weight float32 \[12, 3, 3, 3\], here it is float64"),
        (lambda: nn.Sequential(build("vgg", 12)[0]), "layer 'conv1': .*, here it is missing"),
    ]:
        with pytest.raises(InputError, match=message):
            tp_cosep.load(tmp_path, make)


@pytest.mark.parametrize(
    ("factory", "message"),
    [(nn.Linear(2, 2), "got a Linear"), ("vgg", "got a str"), (lambda: "vgg", "got one that returns a str")],
)
def test_a_factory_is_a_function_that_returns_a_model(factory, message, tmp_path):
    saved("mlp", tmp_path)
    with pytest.raises(InputError, match=f"load: expected a function that makes the unpruned model .*{message}"):
        tp_cosep.load(tmp_path, factory)


def test_a_model_that_two_pruners_pruned_in_turn(tmp_path):
    model, x, y = build("vgg", 12)
    first, second = (pruned_by(model, x, y, pruning_ratio=0.25) for _ in range(2))
    tp_cosep.save(model, second, tmp_path)
    make = lambda: build("vgg", 12, seed=7)[0]  # noqa: E731
    with pytest.raises(InputError, match="if several pruners worked in turn, with the earlier plans applied"):
        tp_cosep.load(tmp_path, make)
    assert_same_model(model, tp_cosep.load(tmp_path, lambda: first.apply(make(), x[:1])), x)


def test_what_cannot_be_saved(tmp_path):
    make, model, plan, _ = saved("mlp", tmp_path / "good")
    old = {name: (tmp_path / "good" / name).read_bytes() for name in FILES}
    other, _, other_plan, _ = saved("vgg", tmp_path / "other")
    cases = [
        (model, other_plan, "layer 'conv1': its weight is in the plan, but not in the model"),
        (other(), plan, "but not in the model"),
        (make(), plan, "the plan removes channels, but the model has all of them"),
        (
            model.to("meta"),
            plan,
            r"expected dense tensors with values in the state_dict, got .* on meta as 'fc1.weight'",
        ),
    ]
    for wrong, by, message in cases:
        with pytest.raises(InputError, match=message):
            tp_cosep.save(wrong, by, tmp_path / "good")
    assert {name: (tmp_path / "good" / name).read_bytes() for name in FILES} == old


@pytest.mark.parametrize("at", range(8))
def test_an_interruption_leaves_the_old_model_or_a_refusal(at, tmp_path, monkeypatch):
    make, model, plan, x = saved("mlp", tmp_path)
    with torch.no_grad():
        model.head.weight.mul_(2)
    calls, replace, fsync = [], os.replace, os.fsync

    def failing(function):
        def call(*args):
            if len(calls) == at:
                raise KeyboardInterrupt
            calls.append(Path(args[-1]).name if function is replace else "")
            return function(*args)

        return call

    monkeypatch.setattr(os, "replace", failing(replace))
    monkeypatch.setattr(os, "fsync", failing(fsync))
    with pytest.raises(KeyboardInterrupt):
        tp_cosep.save(model, plan, tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES)
    if set(calls) & set(FILES):
        with pytest.raises(InputError, match="belongs to another save"):
            tp_cosep.load(tmp_path, make)
    else:
        assert not torch.equal(tp_cosep.load(tmp_path, make)(x), model(x))
    tp_cosep.save(model, plan, tmp_path)
    assert_same_model(model, tp_cosep.load(tmp_path, make), x)
