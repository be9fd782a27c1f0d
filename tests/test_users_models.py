"""Models in the states in which users bring them: frozen in part, tied to hooks, named, pruned before."""

import copy

import pytest
import torch
import torch_pruning as tp
from fitted import fitted, group_with, widths
from models import assert_untouched, build, fingerprint, initialise, vectors
from torch import nn

from tp_cosep import CoSePPruner, CoSePSelector, InputError, PruningPlan
from tp_cosep.graph.tracing import trace


def frozen(model, names):
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(tuple(names)))
    return model


@pytest.mark.parametrize("names", [["conv1"], ["conv1", "conv2", "bn"], [""]], ids=["one", "some", "all"])
def test_frozen_layers_are_pruned_like_others_and_stay_frozen(names):
    model, x, y = build("vgg", 12)
    free = copy.deepcopy(model)
    CoSePPruner(free, x[:1], fitted(free, x, y), pruning_ratio=0.5).step()
    frozen(model, names)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not all(flags.values())
    pruner = CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5)
    pruner.step()
    assert widths(model) == widths(free)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    again = frozen(build("vgg", 12)[0], names)
    pruner.plan.apply(again, x[:1])
    assert {name: p.requires_grad for name, p in again.named_parameters()} == flags
    assert widths(again) == widths(free)


def test_a_trace_that_fails_leaves_neither_hooks_nor_gradients_behind():
    model, x, _ = build("mlp", 10)
    frozen(model, ["fc1"])
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trace(model, x[:1, :-1])
    assert_untouched(model, before)
    assert not any(m._forward_hooks for m in model.modules())
    assert [p.requires_grad for p in model.fc1.parameters()] == [False, False]


@pytest.mark.parametrize("order", [1, -1])
def test_groups_that_are_collected_first_and_pruned_later_are_recorded(order):
    model, x, y = build("vgg", 12)
    at_once = copy.deepcopy(model)
    pruner = CoSePPruner(at_once, x[:1], fitted(at_once, x, y), pruning_ratio=0.5)
    pruner.step()
    late = CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5)
    groups = list(late.step(interactive=True))
    assert {e.reason for e in late.plan if e.name in ("conv1", "conv2")} == {"the caller did not prune it"}
    for group in groups[::order]:
        group.prune()
    assert {e.name: e.selection for e in late.plan} == {e.name: e.selection for e in pruner.plan}
    again = late.plan.apply(build("vgg", 12)[0], x[:1])
    assert widths(again) == widths(model) == widths(at_once)


@pytest.mark.parametrize("ignored", [["conv2"], [nn.Linear], ["conv2", nn.Linear]], ids=str)
def test_ignored_layers_by_name_and_by_type(ignored):
    model, x, y = build("vgg", 12)
    twin, before = copy.deepcopy(model), widths(model)
    CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5, ignored_layers=ignored).step()
    meant = [m for n, m in twin.named_modules() for i in ignored if n == i or (isinstance(i, type) and type(m) is i)]
    CoSePPruner(twin, x[:1], fitted(twin, x, y), pruning_ratio=0.5, ignored_layers=meant).step()
    assert widths(model) == widths(twin) != before


def test_ratios_by_name():
    model, x, y = build("vgg", 12)
    ratios = {"conv1": 0.25, ("conv2", "conv3"): 0.5}
    CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.0, pruning_ratio_dict=ratios).step()
    assert [widths(model)[name] for name in ("conv1", "conv2", "conv3", "fc")] == [9, 6, 6, 12]


@pytest.mark.parametrize("layer", ["conv9", nn.Linear(2, 2), 7])
def test_layers_that_are_not_part_of_the_model(layer):
    model, x, y = build("vgg", 12)
    selector = fitted(model, x, y)
    message = "expected modules of the model, their names or types, got .* that is not part of it"
    with pytest.raises(InputError, match=f"ignored_layers: {message}"):
        CoSePPruner(model, x[:1], selector, ignored_layers=[layer])
    with pytest.raises(InputError, match=f"pruning_ratio_dict: {message}"):
        CoSePPruner(model, x[:1], selector, pruning_ratio_dict={layer: 0.5})


@pytest.mark.parametrize("ratio", [-0.1, 1.01, float("nan")])
def test_a_ratio_out_of_range(ratio):
    model, x, y = build("mlp", 10)
    with pytest.raises(InputError, match=r"expected pruning_ratio in \[0, 1\] or None, got"):
        CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=ratio)


def test_moments_from_before_the_layer_in_front_was_pruned():
    model, x, y = build("mlp", 10)
    selector = CoSePSelector(spatial=2).fit(model, [(x, y)], refit=False, progress=False)
    ignored = [model.fc2, model.fc3, model.head]
    tp.pruner.MetaPruner(model, x[:1], selector, pruning_ratio=0.5, ignored_layers=ignored).step()
    assert widths(model) == {"fc1": 5, "fc2": 11, "fc3": 10, "head": 4}
    message = r"layer 'fc2': observed with weights of shape \(11, 10\), they are \(11, 5\) now; call fit\(\) again"
    with pytest.raises(InputError, match=message):
        selector.select(group_with(model, x, "fc2"))


class Windows(nn.Module):
    """A layer between two others that sees the parts of all samples in an order of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.inside, self.head = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        z = self.first(x.reshape(len(x), 4, 5)).relu()
        order = (torch.arange(4 * len(x)) * 3 + 1) % (4 * len(x))
        z = self.inside(z.flatten(0, 1)[order])[order.argsort()].relu()
        return self.head(z.unflatten(0, (len(x), 4)).mean(1))


def test_a_layer_whose_samples_cannot_be_told_apart_is_left_alone():
    model, (x, y) = initialise(Windows()), vectors()
    with pytest.warns(UserWarning, match="cannot measure inside"):
        selector = fitted(model, x, y)
    pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=0.5)
    pruner.step()
    assert widths(model) == {"first": 6, "inside": 12, "head": 4}
    assert {e.name: e.reason for e in pruner.plan if e.selection is None} == {
        "inside": "none of its layers could be measured",
        "head": "its channels are the model's output",
    }
    assert widths(pruner.plan.apply(initialise(Windows()), x[:1])) == widths(model)


def test_layers_that_no_group_shows_are_in_the_plan():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.aside, self.head = nn.Linear(20, 12), nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, x):
            z = self.first(x).relu()
            with torch.no_grad():
                shift = self.aside(torch.ones(len(x), 12))
            return self.head(z + shift.detach())

    model, (x, y) = initialise(Detached()), vectors()
    pruner = CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5, ignored_layers=["first"])
    pruner.step()
    reasons = {e.name: e.reason for e in pruner.plan}
    assert reasons["first"] == "in ignored_layers, or pruned only together with a layer that is"
    assert reasons["aside"].startswith("Torch-Pruning's trace did not reach it")
    assert isinstance(pruner.plan, PruningPlan)
