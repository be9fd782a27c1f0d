import copy
import json
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from fitted import fitted, widths
from models import KINDS, assert_same_state, assert_untouched, build, fingerprint, images, initialise, vectors
from torch import nn

from tp_cosep import ChannelSelection, CoSePPruner, GroupPlan, InputError, PruningError, PruningPlan
from tp_cosep.pruning import plan as plan_module


def planned(kind, width, **options):
    """A fresh model, its example inputs, the same model pruned, and the plan of it."""
    model, x, y = build(kind, width)
    pruned = copy.deepcopy(model)
    pruner = CoSePPruner(pruned, x[:1], fitted(pruned, x, y), **options)
    pruner.step()
    return model, x[:1], pruned, pruner.plan


@pytest.fixture(scope="module")
def plan():
    return planned("resnet", 10)[3]


@pytest.fixture
def plan_file(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    return path


def assert_equal_plans(plan, other):
    assert len(plan) == len(other)
    assert plan.options == other.options
    for a, b in zip(plan, other, strict=True):
        assert isinstance(b, GroupPlan)
        assert (a.name, a.side, a.layers, a.reason) == (b.name, b.side, b.layers, b.reason)
        assert (a.selection is None) == (b.selection is None)
        for f in fields(ChannelSelection) if a.selection else ():
            ours, theirs = getattr(a.selection, f.name), getattr(b.selection, f.name)
            assert type(ours) is type(theirs), f.name
            assert torch.equal(ours, theirs) if f.name == "scores" else ours == theirs, f.name


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_survives_saving_and_loading(kind, tmp_path):
    plan = planned(kind, 10, pruning_ratio=0.4)[3]
    plan.save(tmp_path / "plan.json")
    loaded = PruningPlan.load(str(tmp_path / "plan.json"))
    assert_equal_plans(plan, loaded)
    assert str(loaded) == str(plan)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_plans_can_be_compared(tmp_path):
    plan = planned("mlp", 10)[3]
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert PruningPlan(plan.groups[:2], plan.options) != plan


def test_a_plan_can_be_saved_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PruningPlan().save("plan.json")
    assert len(PruningPlan.load("plan.json")) == 0


@pytest.mark.parametrize(
    ("width", "options"),
    [(10, {}), (96, {}), (12, {"pruning_ratio": 0.5}), (12, {"pruning_ratio": 0.5, "global_pruning": True})],
    ids=["own", "own, wide", "ratio", "global"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_applied_to_a_fresh_copy_it_gives_the_pruned_model(kind, width, options, tmp_path):
    model, x, pruned, plan = planned(kind, width, **options)
    plan.save(tmp_path / "plan.json")
    model.train()
    model.head.eval()
    assert PruningPlan.load(tmp_path / "plan.json").apply(model, x) is model
    assert_same_state(model.state_dict(), pruned.state_dict())
    assert [m.training for m in model.modules()] == [m is not model.head for m in model.modules()]
    assert torch.equal(model.eval()(x), pruned(x))
    assert widths(model) == widths(pruned)


def test_a_plan_of_several_steps():
    model, x, y = build("resnet", 12)
    pruned = copy.deepcopy(model)
    options = {"loader": [(x, y)], "iterative_steps": 3, "compensate": False, "recalibrate": False}
    pruner = CoSePPruner(pruned, x[:1], fitted(pruned, x, y), pruning_ratio=0.6, **options)
    for _ in range(3):
        pruner.step()
    assert_same_state(pruner.plan.apply(model, x[:1]).state_dict(), pruned.state_dict())


def test_a_plan_made_layer_by_layer():
    model, x, y = build("vgg", 12)
    pruned = copy.deepcopy(model)
    pruner = CoSePPruner(
        pruned, x[:1], fitted(pruned, x, y), loader=[(x, y)], layerwise=True, compensate=False, recalibrate=False
    )
    pruner.step()
    assert [e.name for e in pruner.plan if e.selection] == ["conv1", "conv2", "conv3", "fc"]
    assert_same_state(pruner.plan.apply(model, x[:1]).state_dict(), pruned.state_dict())


def test_a_plan_of_some_groups():
    model, x, y = build("vgg", 12)
    pruned = copy.deepcopy(model)
    pruner = CoSePPruner(pruned, x[:1], fitted(pruned, x, y), pruning_ratio=0.5)
    for i, group in enumerate(pruner.step(interactive=True)):
        if i % 2:
            group.prune()
    assert [e.reason for e in pruner.plan].count("the caller did not prune it") == 2
    assert_same_state(pruner.plan.apply(model, x[:1]).state_dict(), pruned.state_dict())


@pytest.mark.parametrize("stop", ["break", "close"])
def test_what_an_interactive_caller_left_out_is_in_no_plan(stop):
    model, x, y = build("mlp", 12)
    pruned = copy.deepcopy(model)
    pruner = CoSePPruner(pruned, x[:1], fitted(pruned, x, y), pruning_ratio=0.5)
    groups = pruner.step(interactive=True)
    for group in groups:
        group.prune()
        if stop == "break":
            break
        groups.close()
    del groups
    assert len([m for m in pruned.modules() if isinstance(m, nn.Linear) and m.out_features == 6]) == 1
    assert_same_state(pruner.plan.apply(copy.deepcopy(model), x[:1]).state_dict(), pruned.state_dict())
    with pytest.warns(UserWarning, match="exceed the maximum iterative steps"):
        pruner.step()
    assert_same_state(pruner.plan.apply(model, x[:1]).state_dict(), pruned.state_dict())


def test_channel_groups():
    layers = [nn.Conv2d(3, 12, 1), nn.GroupNorm(3, 12), nn.Conv2d(12, 12, 1, groups=2), nn.Flatten()]
    model, (x, y) = (
        initialise(nn.Sequential(*layers[:2], nn.Conv2d(12, 10, 1), nn.Flatten(), nn.Linear(640, 4))),
        images(),
    )
    pruned = copy.deepcopy(model)
    pruner = CoSePPruner(pruned, x[:1], fitted(pruned, x, y), pruning_ratio=0.5)
    pruner.step()
    assert pruned[0].out_channels == 6
    assert_same_state(pruner.plan.apply(model, x[:1]).state_dict(), pruned.state_dict())


def assert_refused(plan, model, x, error, message, **options):
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        plan.apply(model, x, **options)
    assert_untouched(model, before)


def test_inputs_that_the_model_does_not_take():
    model, x, _, plan = planned("vgg", 10)
    message = (
        r"example_inputs: Torch-Pruning cannot follow the model on them \(RuntimeError: [\s\S]*\); expected inputs"
    )
    assert_refused(plan, model, x[:, :2], PruningError, message)
    assert_refused(plan, model, None, PruningError, message.replace("RuntimeError", "TypeError"))


def test_a_plan_is_not_applied_twice():
    model, x, _, plan = planned("resnet", 10)
    plan.apply(model, x)
    message = r"layer 'stem': the plan is for a model with weight float32 \[10, 3, 3, 3\], here it is float32 \[\d, 3,"
    assert_refused(plan, model, x, InputError, message)
    message = r"layer '\w+': the plan is for 1\d channels, the layer has \d+; apply it to an unpruned copy"
    assert_refused(replace(plan, structure={}), model, x, InputError, message)


@pytest.mark.parametrize("spoil", ["fc1", "fc3"])
def test_a_plan_is_for_its_own_model(spoil):
    model, x, _, plan = planned("mlp", 10, pruning_ratio=0.5)
    other = copy.deepcopy(model)
    setattr(other, spoil, nn.Linear(20 if spoil == "fc1" else 11, 13))
    setattr(other, {"fc1": "fc2", "fc3": "head"}[spoil], nn.Linear(13, 11 if spoil == "fc1" else 4))
    message = (
        rf"layer '{spoil}': the plan is for a model with weight float32 \[10, (\d+)\], here it is float32 \[13, \1\]"
    )
    assert_refused(plan, other, x, InputError, message)
    message = f"layer '{spoil}': the plan is for 10 channels, the layer has 13"
    assert_refused(replace(plan, structure={}), other, x, InputError, message)
    for groups in (plan.groups, plan.groups[::-1]):
        renamed = [replace(g, name="fc9") if g.name == spoil else g for g in groups]
        message = "layer 'fc9': in the plan, but not in the model"
        assert_refused(PruningPlan(tuple(renamed)), model, x, InputError, message)


def test_a_plan_that_would_remove_everything():
    model, x, _, plan = planned("mlp", 10, pruning_ratio=0.5)
    everything = replace(plan.groups[0].selection, keep_idxs=(), prune_idxs=tuple(range(10)))
    spoilt = PruningPlan((*plan.groups[1:], replace(plan.groups[0], selection=everything)))
    message = f"layer '{plan.groups[0].name}': Torch-Pruning refuses to remove 10 channels"
    assert_refused(spoilt, model, x, PruningError, message)


class Scale(nn.Module):
    """A factor per channel, which Torch-Pruning does not know how to prune."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, width))

    def forward(self, x):
        return x * self.weight


class ScalePruner(tp.function.BasePruningFunc):
    def __init__(self, works):
        super().__init__()
        self.works = works

    def prune_out_channels(self, layer, idxs):
        layer.weight = nn.Parameter(layer.weight.detach()[sorted(set(range(len(layer.weight))) - set(idxs))])
        if not self.works:
            raise ArithmeticError("cannot prune")
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer):
        return len(layer.weight)

    get_in_channels = get_out_channels


def test_trace_options_reach_torch_pruning_and_its_failures_leave_no_trace():
    model = initialise(nn.Sequential(nn.Linear(20, 12), Scale(12), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)))
    _, x, y = build("mlp", 10)
    pruned, options = copy.deepcopy(model), {"customized_pruners": {Scale: ScalePruner(works=True)}}
    pruner = CoSePPruner(pruned, x[:1], fitted(pruned, x, y), pruning_ratio=0.5, **options)
    pruner.step()
    assert len(pruned[1].weight) == 6
    broken = {Scale: ScalePruner(works=False)}
    assert_refused(pruner.plan, model, x[:1], PruningError, "layer '0': .*cannot prune", customized_pruners=broken)
    assert_same_state(pruner.plan.apply(model, x[:1], **options).state_dict(), pruned.state_dict())


def spoilt_documents():
    """A good document made bad in one place each, and what is to be said about it."""

    def change(*path, to):
        def spoil(document):
            for key in path[:-1]:
                document = document[key]
            if to is KeyError:
                del document[path[-1]]
            else:
                document[path[-1]] = to

        return spoil

    choice = ("groups", 0, "selection")
    return [
        (change("format", to="other"), "expected a file written by PruningPlan.save"),
        (change("format", to=KeyError), "expected a file written by PruningPlan.save"),
        (change("version", to=2), "expected version 1, got 2; update tp_cosep"),
        (change("version", to="1"), "expected version 1, got '1'"),
        (change("version", to=KeyError), "expected version 1, got None"),
        (change("groups", to=KeyError), "damaged, KeyError: 'groups'"),
        (change("groups", to=5), "damaged, TypeError"),
        (change("groups", 0, to=None), "damaged, TypeError"),
        (change("options", to=KeyError), "damaged, KeyError: 'options'"),
        (change("options", to=5), "damaged, TypeError"),
        *(
            (change("groups", 0, k, to=KeyError), f"damaged, KeyError: '{k}'")
            for k in ("name", "side", "layers", "reason")
        ),
        (change(*choice, to=KeyError), "damaged, KeyError: 'selection'"),
        (change("groups", 0, "side", to="sideways"), "damaged"),
        (change(*choice, to="text"), "damaged"),
        (change(*choice, to=[1, 2]), "damaged"),
        *(
            (change(*choice, f.name, to=KeyError), "damaged, .*")
            for f in fields(ChannelSelection)
            if f.default is MISSING
        ),
        (change(*choice, "surprise", to=1), "damaged, TypeError: .*surprise"),
        (change(*choice, "keep_idxs", to=[0]), "kept and pruned channels do not add up"),
        (change(*choice, "keep_idxs", to=None), "damaged, TypeError"),
        (change(*choice, "prune_idxs", to=[99]), "kept and pruned channels do not add up"),
        (change(*choice, "n_channels", to=9), "damaged, "),
        (change(*choice, "n_channels", to="x"), "damaged, "),
        (change(*choice, "k", to="<b>"), "damaged"),
        (change(*choice, "knee_strength", to="<b>"), "damaged"),
        (change(*choice, "knee_k", to="<b>"), "damaged"),
        (change(*choice, "mss", to=[0.5]), "expected a finite number for each k of its curve"),
        (change(*choice, "mss", 0, to=float("nan")), "expected a finite number for each k of its curve"),
        (change(*choice, "mss", 0, to="<b>"), "damaged"),
        (change(*choice, "ks", to=[]), "expected a finite number for each k of its curve"),
        (change(*choice, "labels", 0, to=99), "labels and medoids do not fit each other"),
        (change(*choice, "medoids", 0, to=99), "labels and medoids do not fit each other"),
        (change(*choice, "criterion", to="<b>"), "criterion is '<b>'"),
        (change(*choice, "scores", to=None), "damaged"),
        (change(*choice, "scores", to=["a"]), "damaged"),
        (change(*choice, "scores", to=[0.5]), "damaged"),
    ]


@pytest.mark.parametrize("case", range(len(spoilt_documents())))
def test_damaged_and_foreign_and_newer_files(plan_file, case):
    spoil, message = spoilt_documents()[case]
    document = json.loads(plan_file.read_text())
    spoil(document)
    plan_file.write_text(json.dumps(document))
    with pytest.raises(InputError, match=rf"plan '.*plan\.json': .*{message}"):
        PruningPlan.load(plan_file)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_file_that_breaks_off(plan_file, share):
    content = plan_file.read_bytes()
    plan_file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"plan '.*plan\.json': expected JSON, got"):
        PruningPlan.load(plan_file)


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", b"\xff\xfe", b"null", b"[]", b"3", b'"tp_cosep.plan"'])
def test_a_file_of_another_kind(plan_file, content):
    plan_file.write_bytes(content)
    with pytest.raises(InputError, match=r"plan '.*plan\.json': expected (JSON|a file written by PruningPlan)"):
        PruningPlan.load(plan_file)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"plan: expected an existing folder to write to, got '.*nowhere'"):
        PruningPlan().save(tmp_path / "nowhere" / "plan.json")


@pytest.mark.parametrize("where", ["write_text", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_save_leaves_the_old_file(plan_file, monkeypatch, where, error):
    old = plan_file.read_bytes()

    write_text = Path.write_text

    def fail(*args, **kwargs):
        if where == "write_text":
            write_text(args[0], args[1][:20], **kwargs)
        raise error("no space")

    monkeypatch.setattr(Path if where == "write_text" else plan_module.os, where, fail)
    with pytest.raises(error):
        planned("mlp", 10)[3].save(plan_file)
    monkeypatch.undo()
    assert plan_file.read_bytes() == old
    assert [p.name for p in plan_file.parent.iterdir()] == ["plan.json"]


def test_an_option_that_json_does_not_know_leaves_the_old_file(plan_file):
    old = plan_file.read_bytes()
    with pytest.raises(TypeError):
        PruningPlan(options={"loader": object()}).save(plan_file)
    assert plan_file.read_bytes() == old
    assert [p.name for p in plan_file.parent.iterdir()] == ["plan.json"]


def test_what_a_plan_says():
    plan = planned("mlp", 10, pruning_ratio=0.5)[3]
    assert sorted(str(plan).splitlines()) == [
        "fc1: 5/10 kept (pruning_ratio)",
        "fc2: 5/11 kept (pruning_ratio)",
        "fc3: 5/10 kept (pruning_ratio)",
        "head: left alone (its channels are the model's output)",
    ]
    assert str(PruningPlan()) == "empty plan"
    asked = {"importance": "CoSePSelector", "pruning_ratio": 0.5, "global_pruning": False, "layerwise": False}
    assert plan.options == asked
    assert {g.name: (g.side, g.layers) for g in plan} == {n: ("out", (n,)) for n in ("fc1", "fc2", "fc3", "head")}


def test_a_plan_that_needs_a_size_corrected_says_so():
    class Reshaping(nn.Module):
        def __init__(self):
            super().__init__()
            self.width, self.fc1, self.fc2 = 12, nn.Linear(20, 12), nn.Linear(12, 4)

        def forward(self, x):
            return self.fc2(self.fc1(x).reshape(len(x), self.width))

    def adapt(net):
        net.width = net.fc1.out_features

    model, (x, y) = initialise(Reshaping()), vectors()
    fresh = copy.deepcopy(model)
    pruner = CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5, adapt=adapt)
    pruner.step()
    before = fingerprint(fresh)
    with pytest.raises(PruningError, match=r"does not run on example_inputs after the plan was applied .*adapt="):
        pruner.plan.apply(fresh, x[:1])
    assert_untouched(fresh, before)
    assert_same_state(pruner.plan.apply(fresh, x[:1], adapt=adapt).state_dict(), model.state_dict())
