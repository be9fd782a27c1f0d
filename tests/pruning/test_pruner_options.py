import copy
import inspect

import pytest
import torch
import torch_pruning as tp
from fitted import fitted, widths
from models import (
    PRODUCERS,
    Lambda,
    assert_same_state,
    assert_untouched,
    build,
    fingerprint,
    images,
    initialise,
    vectors,
)
from torch import nn

from tp_cosep import CoSePPruner, CoSePSelector, InputError, NotFittedError, ReconstructionSelector
from tp_cosep.graph.tracing import trace


def own_counts(model, x, selector):
    """CoSeP's count of every layer that creates channels."""
    counts = {}
    for group in trace(model, x[:1]).get_all_groups(ignored_layers=[model.head]):
        k = selector.select(group).k
        counts |= dict.fromkeys((name for name, m in model.named_modules() if has_output(m, group)), k)
    return counts


def has_output(module, group):
    is_layer = isinstance(module, (nn.Conv2d, nn.Linear))
    return is_layer and any(
        d.target.module is module and group._DG.is_out_channel_pruning_fn(d.handler) for d, _ in group
    )


def told_by_plan(plan):
    """The last word of the plan on every layer, of the layers that it prunes."""
    return {name: len(e.selection.keep_idxs) for e in plan if e.selection for name in e.layers}


@pytest.mark.parametrize("ratio", [None, 0.5])
@pytest.mark.parametrize("width", [10, 12])
def test_pruning_ratio_dict_is_respected(width, ratio):
    model, x, y = build("vgg", width)
    selector = fitted(model, x, y)
    expected = own_counts(model, x, selector)
    if ratio is not None:
        expected = dict.fromkeys(expected, width // 2)
    ratios = {model.conv2: 0.72, model.fc: 0.0}
    CoSePPruner(model, x[:1], selector, pruning_ratio=ratio, pruning_ratio_dict=ratios).step()
    assert widths(model) == expected | {"conv2": int(width * 0.28), "fc": width, "head": 4}
    assert list(ratios.values()) == [0.72, 0.0]


def test_pruning_ratio_dict_of_a_layer_that_is_not_the_root():
    for name in PRODUCERS["resnet"]["a"]:
        model, x, y = build("resnet", 10)
        ratios = {model.get_submodule(name): 0.6}
        CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.0, pruning_ratio_dict=ratios).step()
        changed = {n: w for n, w in widths(model).items() if w == 4}
        assert changed == {"stem": 4, "conv2": 4, "head": 4}


@pytest.mark.parametrize("ratio", [None, 0.9])
@pytest.mark.parametrize("limit", [0.2, 0.5])
def test_max_pruning_ratio(ratio, limit):
    model, x, y = build("mlp", 12)
    selector = fitted(model, x, y)
    own = own_counts(model, x, selector)
    CoSePPruner(model, x[:1], selector, pruning_ratio=ratio, max_pruning_ratio=limit).step()
    lowest = {"fc1": int(12 * (1 - limit)), "fc2": int(13 * (1 - limit)), "fc3": int(12 * (1 - limit))}
    expected = lowest if ratio else {name: max(own[name], n) for name, n in lowest.items()}
    assert widths(model) == expected | {"head": 4}


@pytest.mark.parametrize("ratio", [None, 0.5, 0.95])
@pytest.mark.parametrize("round_to", [1, 4, 5, 16])
def test_round_to(round_to, ratio):
    model, x, y = build("mlp", 12)
    selector, before = fitted(model, x, y), widths(model)
    twin = copy.deepcopy(model)
    own = own_counts(model, x, selector)
    pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=ratio, round_to=round_to)
    pruner.step()
    for name, n in own.items():
        kept, spec = widths(model)[name], n if ratio is None else max(1, int(before[name] * (1 - ratio)))
        assert kept > 0
        assert kept % round_to == 0 or kept == before[name]
        assert abs(kept - spec) <= round_to / 2 or kept in (round_to, before[name])
    assert told_by_plan(pruner.plan) == {name: n for name, n in widths(model).items() if name != "head"}
    for group_plan in pruner.plan:
        if group_plan.selection:
            group = next(
                g for g in trace(twin, x[:1]).get_all_groups() if has_output(twin.get_submodule(group_plan.name), g)
            )
            expected = selector.select(group, n_keep=len(group_plan.selection.keep_idxs))
            assert group_plan.selection.keep_idxs == expected.keep_idxs


@pytest.mark.parametrize(("round_to", "slots"), [(4, 4), (8, 8), (5, 5)])
def test_round_to_with_channel_groups(round_to, slots):
    layers = [nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(24 * 64, 4)]
    model, (x, y) = initialise(nn.Sequential(*layers)), images()
    selector, weight = fitted(model, x, y), model[0].weight.detach().clone()
    group = next(g for g in trace(model, x[:1]).get_all_groups() if has_output(model[0], g))
    expected = selector.select(group, n_keep=slots)
    CoSePPruner(model, x[:1], selector, pruning_ratio=1 - slots / 12, round_to=round_to).step()
    assert torch.equal(model[0].weight, weight[list(expected.keep_idxs)])


def test_round_to_with_channel_groups_narrower_than_it():
    layers = [nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=4), nn.Flatten(), nn.Linear(24 * 64, 4)]
    model, (x, y) = initialise(nn.Sequential(*layers)), images()
    CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5, round_to=8).step()
    # Of 6 channels in each of 4 groups 3 would be kept, 12 in all: a multiple of 8 is 2 or 4 in each.
    assert model[0].out_channels in (8, 16)


@pytest.mark.parametrize(
    ("ratio", "more"),
    [(0.1, {}), (0.5, {}), (0.8, {"max_pruning_ratio": 0.9}), (0.5, {"isomorphic": True}), (0.5, {"round_to": 4})],
    ids=str,
)
@pytest.mark.parametrize("kind", ["vgg", "mlp"])
def test_global_pruning_is_that_of_the_stock_pruner(kind, ratio, more):
    model, x, y = build(kind, 12)
    selector, twin = fitted(model, x, y), copy.deepcopy(model)
    options = more | {"global_pruning": True, "pruning_ratio": ratio}
    pruner = CoSePPruner(model, x[:1], selector, **options)
    pruner.step()
    tp.pruner.MetaPruner(twin, x[:1], selector, ignored_layers=[twin.head], **options).step()
    if "round_to" in more:
        assert all(n % 4 == 0 for n in widths(model).values())
    elif not more and ratio == 0.5:
        assert len(set(widths(model).values())) > 2
    assert_same_state(model.state_dict(), twin.state_dict())
    assert {n: w for n, w in told_by_plan(pruner.plan).items() if n in widths(model)}.items() <= widths(model).items()
    assert all("caller" not in e.reason for e in pruner.plan)


@pytest.mark.parametrize("in_common", [True, False])
def test_global_pruning_with_a_pruning_ratio_dict(in_common):
    model, x, y = build("vgg", 12)
    pair = model.conv2, model.conv3
    ratios = {pair: 0.3} if in_common else {pair[0]: 0.3, pair[1]: 0.7}
    pruner = CoSePPruner(
        model, x[:1], fitted(model, x, y), global_pruning=True, pruning_ratio=0.5, pruning_ratio_dict=ratios
    )
    pruner.step()
    now = widths(model)
    if in_common:
        assert now["conv2"] + now["conv3"] == int(24 * 0.7)
    else:
        assert (now["conv2"], now["conv3"]) == (int(12 * 0.7), int(12 * 0.3))
    assert now["conv1"] + now["fc"] == 12
    assert told_by_plan(pruner.plan).items() >= {n: w for n, w in now.items() if n != "head"}.items()


def test_the_plan_of_a_global_ratio_of_zero():
    model, x, y = build("mlp", 12)
    before = widths(model)
    pruner = CoSePPruner(model, x[:1], fitted(model, x, y), global_pruning=True, pruning_ratio=0.0)
    pruner.step()
    assert widths(model) == before
    assert all(n == before[name] for name, n in told_by_plan(pruner.plan).items())


@pytest.mark.parametrize("ratio", [None, 0.37, 0.6])
@pytest.mark.parametrize(("kind", "width"), [("vgg", 10), ("resnet", 12), ("mlp", 21)])
@pytest.mark.slow
def test_iterative_steps_reach_the_counts_of_a_single_step(kind, width, ratio):
    model, x, y = build(kind, width)
    once, before = copy.deepcopy(model), widths(model)
    CoSePPruner(once, x[:1], fitted(once, x, y), pruning_ratio=ratio).step()
    selector = CoSePSelector(spatial=2, knee="strongest")
    options = {"loader": [(x, y)], "fit_options": {"progress": False}, "iterative_steps": 3}
    pruner, history = CoSePPruner(model, x[:1], selector, pruning_ratio=ratio, **options), [before]
    for _ in range(3):
        pruner.step()
        history.append(widths(model))
        model(x[:2])
    assert history[-1] == widths(once)
    for i in (1, 2):  # a third of the way at each step, rounded down
        for name, n in before.items():
            target = n - history[-1][name]
            assert n - history[i][name] - target * i / 3 == pytest.approx(0, abs=1.01)
    for e in pruner.plan:
        if e.selection:
            assert len(e.selection.scores) == e.selection.n_channels
    assert told_by_plan(pruner.plan).items() >= {n: w for n, w in widths(model).items() if n != "head"}.items()


@pytest.mark.parametrize("kind", ["reconstruction", "cosep"])
@pytest.mark.parametrize("how", [{}, {"target": {"macs": 0.4}}, {"pruning_ratio": 0.5}], ids=str)
def test_iterative_steps_without_a_loader_ask_for_one(kind, how):
    model, x, y = build("vgg", 12)
    selector = copy.copy(fitted(model, x, y, kind=kind))  # a copy keeps no data
    pruner = CoSePPruner(model, x[:1], selector, iterative_steps=2, **how)
    pruner.step()
    before = fingerprint(model)
    with pytest.raises(InputError, match=r"call fit\(\) again .*\(iterative_steps: pass loader= to CoSePPruner\)"):
        pruner.step()
    assert_untouched(model, before)


def test_iterative_steps_without_a_loader_take_new_moments():
    model, x, y = build("mlp", 10)
    selector = copy.copy(fitted(model, x, y))  # a copy keeps no data
    pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=0.5, iterative_steps=2)
    pruner.step()
    before = fingerprint(model)
    with pytest.raises(InputError, match=r"class moments cover 10 channels, the layer has 7; call fit\(\) again"):
        pruner.step()
    assert_untouched(model, before)
    pruner.importance.fit(model, [(x, y)])
    pruner.step()
    assert widths(model) == {"fc1": 5, "fc2": 5, "fc3": 5, "head": 4}


def test_ignored_layers():
    model, x, y = build("resnet", 10)
    before = widths(model)
    ignored = [nn.Sequential(model.conv1), model.shortcut]
    CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5, ignored_layers=ignored).step()
    assert widths(model) == before | {"stem": 5, "conv2": 5, "conv3": 6}
    assert len(ignored) == 2


@pytest.mark.parametrize("as_inputs", [lambda x: {"x": x}, lambda x: (x,), lambda x: [x]])
def test_example_inputs_as_keywords_and_as_arguments(as_inputs):
    model, x, y = build("vgg", 10)
    CoSePPruner(model, as_inputs(x[:1]), fitted(model, x, y), pruning_ratio=0.5).step()
    assert set(widths(model).values()) == {5, 4}


def test_forward_fn_runs_the_model():
    model, x, y = build("vgg", 10)
    calls = []

    def forward(m, inputs):
        calls.append(m.training)
        return m(inputs["image"])

    CoSePPruner(model, {"image": x[:1]}, fitted(model, x, y), pruning_ratio=0.5, forward_fn=forward).step()
    assert set(widths(model).values()) == {5, 4}
    assert calls == [False] * len(calls)
    assert len(calls) > 4


def test_repair_is_told_of_parameters_outside_of_layers():
    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 10, 1), nn.Linear(10, 4)
            self.position = nn.Parameter(torch.randn(1, 12, 8, 8))  # Torch-Pruning would take the last dimension

        def forward(self, x):
            return self.head(torch.relu(self.second(torch.relu(self.first(x) + self.position))).mean((2, 3)))

    model, (x, y) = initialise(Positioned()), images()
    pruner = CoSePPruner(
        model,
        x[:1],
        fitted(model, x, y),
        pruning_ratio=0.5,
        loader=[(x, y)],
        compensate=True,
        unwrapped_parameters=[(model.position, 1)],
    )
    pruner.step()
    assert model.position.shape == (1, 6, 8, 8)
    assert {refit.name for refit in pruner.compensator.refits if not refit.reason} == {"second", "head"}


def test_pruners_share_no_defaults():
    def grouped():
        layers = [nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=2), nn.Flatten(), nn.Linear(12 * 64, 4)]
        return initialise(nn.Sequential(*layers))

    (x, y), pruners, mine = images(), [], {}
    for _ in range(2):
        model = grouped()
        selector = fitted(model, x, y)
        pruners.append(CoSePPruner(model, x[:1], selector, pruning_ratio=0.5, out_channel_groups=mine))
    first, second = pruners
    for name in ("in_channel_groups", "out_channel_groups", "num_heads"):
        default = inspect.signature(tp.pruner.BasePruner.__init__).parameters[name].default
        assert default is not getattr(first, name) is not getattr(second, name)
        for pruner in pruners:
            assert default.keys().isdisjoint(pruner.model.modules())
        assert getattr(first, name).keys().isdisjoint(second.model.modules())
    assert first.in_channel_groups == {first.model[1]: 2}
    assert mine == {}


def test_a_layer_whose_channels_are_all_alike_keeps_one():
    model, x, y = build("vgg", 10)
    for p in (model.conv2.weight, model.conv2.bias):
        p.data[:] = p.data[:1].clone()
    CoSePPruner(model, x[:1], fitted(model, x, y)).step()
    assert widths(model)["conv2"] == 1
    assert model(x[:2]).shape == (2, 4)


def test_a_layer_with_one_channel_stays():
    model, x, y = build("mlp", 1)
    CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5).step()
    assert widths(model) == {"fc1": 1, "fc2": 1, "fc3": 1, "head": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"importance": tp.importance.MagnitudeImportance()},
            "expected pruning_ratio= or target= with MagnitudeImportance, got neither",
        ),
        ({"importance": None}, "expected an importance, or loader= to fit a CoSePSelector on"),
        ({"global_pruning": True}, "global_pruning .* needs a pruning_ratio, got None"),
        ({"isomorphic": True}, "isomorphic .* needs a pruning_ratio, got None"),
        ({"layerwise": True}, "layerwise=True collects statistics again before every group; pass loader="),
        ({"layerwise": True, "pruning_ratio": 0.5}, "layerwise=True .* pass loader="),
    ],
)
def test_options_that_contradict_each_other(options, message):
    model, x, _ = build("mlp", 10)
    before = fingerprint(model)
    with pytest.raises(InputError, match=f"CoSePPruner: {message}"):
        CoSePPruner(model, x[:1], **{"importance": ReconstructionSelector(), **options})
    assert_untouched(model, before)


def assert_step_refused(pruner, error, message):
    before, plan = fingerprint(pruner.model), pruner.plan
    for _ in range(2):
        with pytest.raises(error, match=message):
            pruner.step()
        assert_untouched(pruner.model, before)
    assert pruner.plan.groups == plan.groups
    assert pruner.current_step == 0


def test_an_unfitted_selector():
    model, x, _ = build("mlp", 10)
    assert_step_refused(
        CoSePPruner(model, x[:1], ReconstructionSelector()), NotFittedError, r"call fit\(model, loader\) first"
    )


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda x, y: [], "expected at least one batch"),
        (lambda x, y: [x], r"expected a pair \(inputs, labels\), got a Tensor"),
        (lambda x, y: [(x, y.float())], r"expected integer labels, got torch\.float32"),
        (lambda x, y: [(x, y * 0)], r"at least two classes, got 1 \(class 0\)"),
        (lambda x, y: [(x, y * (y > 1) + 5 * (torch.arange(40) == 7))], "got one of class 8"),
        (lambda x, y: [(x / 0, y)], r"layer 'fc\d': got NaN or infinite"),
    ],
)
def test_data_that_cannot_be_used(loader, message, layerwise):
    model, x, y = build("mlp", 10)
    selector = CoSePSelector()
    pruner = CoSePPruner(model, x[:1], selector, loader=loader(x, y), layerwise=layerwise)
    assert_step_refused(pruner, InputError, message)


def test_a_generator_is_too_short_for_layerwise():
    model, x, y = build("mlp", 10)
    pruner = CoSePPruner(
        model, x[:1], ReconstructionSelector(), pruning_ratio=0.5, loader=iter([(x, y)]), layerwise=True
    )
    assert_step_refused(pruner, InputError, "a generator can be read only once")


def test_moments_that_no_longer_fit():
    model, x, y = build("mlp", 10)
    selector = copy.copy(fitted(model, x, y))  # a copy keeps no data
    CoSePPruner(model, x[:1], selector, pruning_ratio=0.5).step()
    pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=0.5)
    assert_step_refused(pruner, InputError, r"layer 'fc.': class moments cover 1\d channels, the layer has 5")


def test_a_layer_that_the_data_never_reached():
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.extra, self.head = nn.Linear(20, 10), nn.Linear(20, 10), nn.Linear(10, 4)

        def forward(self, x):
            z = self.main(x)
            return self.head((z + self.extra(x) if x.numel() == 20 else z).relu())

    model, (x, y) = Switched().eval(), vectors()
    pruner = CoSePPruner(model, x[:1], fitted(model, x, y), pruning_ratio=0.5)
    assert_step_refused(
        pruner, InputError, "layer 'extra': expected class moments, got none: the calibration data never"
    )
    ignoring = CoSePPruner(model, x[:1], pruner.importance, pruning_ratio=0.5, ignored_layers=[model.extra])
    ignoring.step()
    assert widths(model) == {"main": 10, "extra": 10, "head": 4}


def test_a_model_without_anything_to_prune():
    model, (x, y) = initialise(nn.Sequential(nn.Linear(20, 4), Lambda(torch.relu))), vectors()
    before = fingerprint(model)
    pruner = CoSePPruner(model, x[:1], fitted(model, x, y))
    pruner.step()
    assert_untouched(model, before)
    assert str(pruner.plan) == "0: left alone (its channels are the model's output)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_to": -3}, r"expected round_to to be an integer ≥ 1 or None, got -3"),
        ({"round_to": 2.5}, r"expected round_to to be an integer"),
        ({"iterative_steps": 0}, r"expected iterative_steps to be an integer ≥ 1, got 0"),
        ({"round_to": 0}, r"expected round_to to be an integer ≥ 1 or None, got 0"),
        ({"max_pruning_ratio": 1.5}, r"expected max_pruning_ratio in \(0, 1\], got 1\.5"),
        ({"max_pruning_ratio": -0.5}, r"expected max_pruning_ratio in \(0, 1\], got -0\.5"),
        ({"max_pruning_ratio": "a"}, r"expected max_pruning_ratio in \(0, 1\], got 'a'"),
        ({"pruning_ratio": "a"}, r"expected pruning_ratio in \[0, 1\] or None, got 'a'"),
        ({"pruning_ratio_dict": 0.5}, r"expected pruning_ratio_dict to map layers to ratios, got 0\.5"),
        ({"pruning_ratio_dict": {"fc1": -1}}, r"expected pruning_ratio_dict of 'fc1' in \[0, 1\], got -1"),
        ({"pruning_ratio_dict": {nn.Linear: "half"}}, r"in \[0, 1\], got 'half'"),
    ],
)
def test_numbers_out_of_range(options, message):
    model, x, y = build("mlp", 10)
    with pytest.raises(InputError, match=message):
        CoSePPruner(model, x[:1], fitted(model, x, y), **options)


@pytest.mark.parametrize("on_failure", ["raise", "skip"])
def test_data_that_repair_cannot_read_is_no_failure_of_a_group(on_failure):
    model, x, y = build("vgg", 10)
    before, selector = fingerprint(model), fitted(model, x, y, kind="reconstruction")
    options = {"on_failure": on_failure, "compensate": True, "fit_options": {"progress": False}}
    for loader, error, message in (
        ([], InputError, "expected at least one batch"),
        ([{"image": x}], InputError, "forward takes, got a dict .*image.* pass target_fn="),
        ([(x * float("nan"), y)], InputError, "NaN"),
    ):
        pruner = CoSePPruner(model, x[:1], selector, target={"macs": 0.5}, loader=loader, **options)
        with pytest.raises(error, match=message):
            pruner.step()
        assert_untouched(model, before)
    options["fit_options"]["target_fn"] = lambda batch: (batch["image"], None)
    pruner = CoSePPruner(model, x[:1], selector, target={"macs": 0.5}, loader=[{"image": x}], **options)
    pruner.step()
    assert pruner.compensator.refits
