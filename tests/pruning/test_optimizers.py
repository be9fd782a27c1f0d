"""Optimizers that are carried over a pruning.

State that equals the weights must equal the pruned weights afterwards; and training must go on as that of the unpruned
model with the pruned channels masked.
"""

import copy
import pickle

import pytest
import torch
from attention_models import transformer
from fitted import fitted
from models import Lambda, ResNetLike, RmsNorm, RmsNormPruner, build, images, initialise, pruned_state, vectors
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW

from tp_cosep import CoSePPruner, InputError, PruningError, PruningPlan, carry_over
from tp_cosep.graph.heads import attention_heads

OPTIMIZERS = {
    "sgd": (lambda params, **options: SGD(params, **{"lr": 0.01, "momentum": 0.9, **options}), ["momentum_buffer"]),
    "adam": (
        lambda params, **options: Adam(params, **{"amsgrad": True, **options}),
        ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    ),
    "adamw": (lambda params, **options: AdamW(params, **options), ["exp_avg", "exp_avg_sq"]),
}
PLAIN = {"compensate": False, "recalibrate": False}


class DenseLike(nn.Module):
    """Every layer reads all before it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(11, 7, 3, padding=1)
        self.bn, self.head = nn.BatchNorm2d(24), nn.Linear(24, 4)

    def forward(self, x):
        a = self.a(x)
        ab = torch.cat([a, self.b(F.relu(a))], 1)
        return self.head(self.bn(torch.cat([ab, self.c(ab), a], 1)).mean((2, 3)))


def indexed(layer, kept):
    layer.weight = nn.Parameter(layer.weight.data[kept].clone())


def convolutions(depth):
    """Depthwise, or in four groups."""
    layers = [nn.Conv2d(3, 16, 1, bias=False), nn.Conv2d(16, 16, 3, padding=1, groups=16 if depth else 4)]
    layers += [nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 9, 1), Lambda(lambda x: x.mean((2, 3))), nn.Linear(9, 4)]
    return initialise(nn.Sequential(*layers)), *images()


def encoder():
    layer = nn.TransformerEncoderLayer(12, 3, 10, batch_first=True)
    layers = [nn.Linear(5, 12), layer, Lambda(lambda x: x.mean(1)), nn.Linear(12, 4)]
    return initialise(nn.Sequential(*layers)), *vectors(shape=(3, 5))


def normalised(keep=indexed):
    model = initialise(nn.Sequential(nn.Linear(20, 12), RmsNorm(12), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)))
    return model, *vectors(), lambda model: {"customized_pruners": {RmsNorm: RmsNormPruner(keep)}}


def dimensions(model):
    return {"num_heads": attention_heads(model)}


def whole_heads(model):
    ratios = {"pruning_ratio": 0.0, "head_pruning_ratio": 0.5}
    return {**dimensions(model), "prune_num_heads": True, "prune_head_dims": False, **ratios}


MODELS = {
    "residual": lambda: build("resnet", 10),
    "flatten": lambda: build("vgg", 10),
    "depthwise": lambda: convolutions(depth=True),
    "grouped": lambda: convolutions(depth=False),
    "concatenation": lambda: (initialise(DenseLike()), *images()),
    "attention": lambda: (*transformer(fused=True), dimensions),
    "heads": lambda: (*transformer(per_head=True), whole_heads),
    "torch's attention": encoder,
    "a layer of the user's own": normalised,
}


def made(model, x, y, options=lambda model: {}, **more):
    """A pruner of half of the model."""
    found = options(model)
    selector = fitted(model, x, y, **({"channel_dims": {RmsNorm: -1}} if "customized_pruners" in found else {}))
    return CoSePPruner(model, x[:1], selector, **{"pruning_ratio": 0.5, **PLAIN, **found, **more})


def with_weights_as_state(optimizer, keys, n_steps=3):
    """Give an optimizer the weights as state; the number of steps as the class has it."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {key: p.detach().clone() for key in keys}
            if "exp_avg" in keys:
                optimizer.state[p]["step"] = torch.tensor(float(n_steps))
    return optimizer


def assert_state_is_the_weights(optimizer, keys, params, n_steps=3):
    found = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(params)
    for p, q in zip(found, params, strict=True):
        assert p is q
        state = optimizer.state[p]
        assert {*state} - {"step"} == {*keys}
        for key in keys:
            assert torch.equal(state[key], p), key
        assert state.get("step", n_steps) == n_steps


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
def test_state_is_that_of_the_kept_entries(name, kind):
    model, *rest = MODELS[name]()
    make, keys = OPTIMIZERS[kind]
    old = with_weights_as_state(make(model.parameters()), keys)
    before = list(model.parameters())
    pruner = made(model, *rest)
    pruner.step()
    assert name != "heads" or model.layers[1].logit_scale.shape == (2, 1, 1)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * sum(p.numel() for p in before)
    new = carry_over(old, pruner.plan, model)
    assert type(new) is type(old)
    assert new.defaults == old.defaults
    assert_state_is_the_weights(new, keys, list(model.parameters()))
    # The old one is left as it was.
    assert_state_is_the_weights(old, keys, before)
    for p in before:
        for key in keys:
            assert all(old.state[p][key] is not state[key] for state in new.state.values())
    model(rest[0]).sum().backward()
    new.step()


def masked(model, kept):
    """Zero the weights for pruned channels in all consumers, so that nothing reads them."""
    for layer, wires in model.wiring.items():
        weight = model.get_submodule(layer).weight
        if wires.into is not None:
            removed = sorted(set(range(weight.shape[1])) - set(kept[wires.into]))
            weight.data[:, removed] = 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_as_that_of_the_masked_model(kind):
    model, x, y = build("resnet", 10)
    model, x = model.double(), x.double()
    make, _ = OPTIMIZERS[kind]
    optimizer = make(model.parameters(), lr=0.02, weight_decay=0.01)

    def train(model, optimizer, after=lambda: None):
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            after()

    train(model, optimizer)
    whole = copy.deepcopy(model)
    reference = make(whole.parameters(), lr=0.02, weight_decay=0.01)
    reference.load_state_dict(optimizer.state_dict())
    pruner = made(model.eval(), x, y)
    pruner.step()
    by_layer = {name: group.selection.keep_idxs for group in pruner.plan if group.selection for name in group.layers}
    kept = {wires.out: by_layer[layer] for layer, wires in ResNetLike.wiring.items() if layer in by_layer}
    optimizer = carry_over(optimizer, pruner.plan, model)
    masked(whole, kept)
    start = pruned_state(whole, copy.deepcopy(whole.state_dict()), kept)
    train(whole, reference, lambda: masked(whole, kept))
    train(model, optimizer)
    expected = pruned_state(whole, whole.state_dict(), kept)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10)
        assert not torch.allclose(value.double(), start[name].double(), rtol=1e-3)


def test_groups_keep_their_options_and_order():
    model, x, y = build("resnet", 10)
    model.conv3.weight.requires_grad_(False)
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m is not model.conv1]
    old = SGD([{"params": convolutions, "weight_decay": 0.1}], lr=0.3, momentum=0.9, nesterov=True)
    old.add_param_group({"params": [model.head.bias, model.head.weight], "lr": 0.7, "name": "head"})
    schedule = torch.optim.lr_scheduler.ExponentialLR(old, 0.5)
    with_weights_as_state(old, ["momentum_buffer"])
    old.step()
    schedule.step()
    settings = [{key: x for key, x in group.items() if key != "params"} for group in old.param_groups]
    assert settings[1]["initial_lr"] == 0.7
    pruner = made(model, x, y)
    pruner.step()
    new = carry_over(old, pruner.plan, model)
    assert [{key: x for key, x in group.items() if key != "params"} for group in new.param_groups] == settings
    first, second = (group["params"] for group in new.param_groups)
    expected = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m is not model.conv1]
    assert list(map(id, first)) == list(map(id, expected))
    assert second == [model.head.bias, model.head.weight]
    assert_state_is_the_weights(new, ["momentum_buffer"], [*first, *second])
    again = torch.optim.lr_scheduler.ExponentialLR(new, 0.5, last_epoch=schedule.last_epoch)
    assert again.base_lrs == schedule.base_lrs
    new.param_groups[0]["lr"] = 5.0
    assert old.param_groups[0]["lr"] == settings[0]["lr"]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_without_any_state(kind):
    model, x, y = build("vgg", 10)
    old = OPTIMIZERS[kind][0](model.parameters())
    pruner = made(model, x, y)
    pruner.step()
    new = carry_over(old, pruner.plan, model)
    assert not new.state
    assert new.param_groups[0]["params"] == list(model.parameters())
    if kind == "sgd":
        plain = carry_over(SGD(model.parameters(), lr=1.0), pruner.plan, model)
        assert plain.defaults["momentum"] == 0


def test_state_of_some_parameters():
    model, x, y = build("vgg", 10)
    old = SGD(model.parameters(), lr=0.1, momentum=0.9)
    old.state[model.conv2.weight]["momentum_buffer"] = model.conv2.weight.detach().clone()
    old.state[model.conv2.bias]["momentum_buffer"] = None  # as torch leaves it where there was no gradient
    pruner = made(model, x, y)
    pruner.step()
    new = carry_over(old, pruner.plan, model)
    assert new.state[model.conv2.weight]["momentum_buffer"].equal(model.conv2.weight)
    assert new.state[model.conv2.bias] == {"momentum_buffer": None}
    assert len(new.state) == 2


def test_names_of_parameters():
    model, x, y = build("vgg", 10)
    try:
        old = Adam(model.named_parameters())
    except TypeError:
        pytest.skip("this torch has no names in optimizers")
    pruner = made(model, x, y)
    pruner.step()
    (group,) = carry_over(old, pruner.plan, model).param_groups
    assert dict(zip(group["param_names"], group["params"], strict=True)) == dict(model.named_parameters())


@pytest.mark.parametrize("layerwise", [False, True])
def test_compensation(layerwise):
    """Refitted weights keep the state of kept entries, and new biases join their weights' group."""
    layers = [nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3, bias=False), nn.ReLU(), nn.Conv2d(12, 10, 1)]
    model = initialise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(160, 4))).train()
    x, y = images(n=100)
    early = [p for layer in layers[:3] for p in layer.parameters()]
    late = [p for layer in (model[4], model[6]) for p in layer.parameters()]
    old = with_weights_as_state(SGD([{"params": late}, {"params": early, "lr": 0.5}], 0.1, 0.9), ["momentum_buffer"])
    twin = copy.deepcopy(model)
    seen = []

    def look(model):
        seen.append(carry_over(old, pruner.plan, model).param_groups)

    pruner = made(model, x, y, loader=[(x, y)], compensate=True, layerwise=layerwise, fine_tune=look)
    pruner.step()
    assert pruner.plan.new_biases == ("2",)
    new = carry_over(old, pruner.plan, model)
    assert list(map(id, seen[-1][1]["params"])) == list(map(id, new.param_groups[1]["params"]))
    first, second = (group["params"] for group in new.param_groups)
    assert list(map(id, first)) == [id(p) for layer in (model[4], model[6]) for p in layer.parameters()]
    assert list(map(id, second)) == [id(p) for layer in model[:3] for p in layer.parameters()]
    assert second[-1] is model[2].bias
    assert model[2].bias not in new.state
    pruner.plan.apply(twin, x[:1])  # the weights without a refit
    assert not torch.equal(twin[6].weight, model[6].weight)
    for name, q in twin.named_parameters():
        if name != "2.bias":
            assert new.state[model.get_parameter(name)]["momentum_buffer"].equal(q), name


def test_a_new_bias_of_a_layer_that_is_not_trained():
    layers = [nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 10, bias=False), nn.ReLU(), nn.Linear(10, 4)]
    model, (x, y) = initialise(nn.Sequential(*layers)), vectors(100)
    old = SGD(model[4].parameters(), lr=0.1)
    pruner = made(model, x, y, loader=[(x, y)], compensate=True)
    pruner.step()
    assert "2" in pruner.plan.new_biases
    assert carry_over(old, pruner.plan, model).param_groups[0]["params"] == list(model[4].parameters())


@pytest.mark.parametrize("after_each", [False, True])
@pytest.mark.parametrize("name", ["residual", "flatten", "concatenation"])
def test_several_steps(name, after_each):
    model, x, y = MODELS[name]()
    keys = ["exp_avg", "exp_avg_sq"]
    optimizer = with_weights_as_state(AdamW(model.parameters()), keys)
    pruner = made(model, x, y, pruning_ratio=0.6, iterative_steps=3, loader=[(x, y)])
    for _ in range(3):
        pruner.step()
        if after_each:
            optimizer = carry_over(optimizer, pruner.plan, model)
    assert len({id(edit.selections) for edit in pruner.plan.history.edits if edit.name == "head.weight"}) >= 3
    optimizer = carry_over(optimizer, pruner.plan, model)
    assert_state_is_the_weights(optimizer, keys, list(model.parameters()))


def test_an_optimizer_that_was_made_between_two_steps():
    model, x, y = build("resnet", 10)
    pruner = made(model, x, y, pruning_ratio=0.6, iterative_steps=2, loader=[(x, y)])
    pruner.step()
    between = with_weights_as_state(SGD(model.parameters(), 0.1, 0.9), ["momentum_buffer"])
    pruner.step()
    new = carry_over(between, pruner.plan, model)
    assert_state_is_the_weights(new, ["momentum_buffer"], list(model.parameters()))


def test_groups_that_a_caller_prunes():
    model, x, y = build("resnet", 10)
    old = with_weights_as_state(SGD(model.parameters(), 0.1, 0.9), ["momentum_buffer"])
    pruner = made(model, x, y)
    for i, group in enumerate(pruner.step(interactive=True)):
        if i % 2:
            group.prune([1, 4])
    assert_state_is_the_weights(carry_over(old, pruner.plan, model), ["momentum_buffer"], list(model.parameters()))
    assert model.conv4.out_channels in (10, 12)


@pytest.mark.parametrize("on_failure", ["raise", "skip"])
def test_failures_leave_no_trace(on_failure):
    """Parameters that were put back are not taken for replaced ones."""
    model, x, y = build("resnet", 10)
    old = with_weights_as_state(SGD(model.parameters(), 0.1, 0.9), ["momentum_buffer"])
    fails = [False, True, False, False]

    def adapt(model):
        if fails and fails.pop(0):
            raise PruningError("no")

    pruner = made(model, x, y, adapt=adapt, on_failure=on_failure)
    if on_failure == "raise":
        with pytest.raises(PruningError, match="no"):
            pruner.step()
        assert carry_over(old, pruner.plan, model).param_groups[0]["params"] == list(model.parameters())
    pruner.step()
    new = carry_over(old, pruner.plan, model)
    assert any(a is b for a, b in zip(*(o.param_groups[0]["params"] for o in (old, new)), strict=True))
    assert_state_is_the_weights(new, ["momentum_buffer"], list(model.parameters()))


class Tied(nn.Module):
    """Two heads with one weight."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 8))
        self.other_body = nn.Linear(12, 8)
        self.head, self.other = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
        self.other.weight = self.head.weight

    def forward(self, x):
        x = self.body[:2](x)
        y = self.body[2](x) if self.is_joint else self.other_body(x)
        return self.head(self.body[2](x)) + self.other(y.sin())


@pytest.mark.parametrize("is_joint", [True, False])
@pytest.mark.filterwarnings("ignore:pruning. 'head.weight' and 'other.weight' were one tensor")
def test_tied_weights(is_joint):
    """One that is untied becomes two, both of which are trained."""
    Tied.is_joint = is_joint
    model, (x, y) = initialise(Tied()), vectors()
    if is_joint:
        del model.other_body
    old = with_weights_as_state(SGD(model.parameters(), 0.1, 0.9), ["momentum_buffer"])
    pruner = made(model, x, y, ignored_layers=[model.head, model.other], verify=False)
    pruner.step()
    assert model.head.in_features == 4
    assert (model.head.weight is model.other.weight) == is_joint
    new = carry_over(old, pruner.plan, model)
    assert_state_is_the_weights(new, ["momentum_buffer"], list(model.parameters()))


def test_a_model_in_another_type():
    model, x, y = build("resnet", 10)
    old = with_weights_as_state(Adam(model.parameters()), ["exp_avg", "exp_avg_sq"])
    pruner = made(model, x, y)
    pruner.step()
    model.double()
    new = carry_over(old, pruner.plan, model)
    assert_state_is_the_weights(new, ["exp_avg", "exp_avg_sq"], list(model.parameters()))
    model(x.double()).sum().backward()
    new.step()


class Own(SGD):
    """A class of the user's own."""


@pytest.fixture(scope="module")
def pruned():
    model, x, y = build("resnet", 10)
    old = SGD(model.parameters(), lr=0.1)
    pruner = made(model, x, y)
    before = pruner.plan
    pruner.step()
    return old, pruner.plan, model, before, x, y


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: torch.optim.RMSprop(p), r"torch\.optim\.rmsprop\.RMSprop"),
        (lambda p: torch.optim.NAdam(p), r"torch\.optim\.nadam\.NAdam"),
        (lambda p: Own(p, lr=0.1), r"\.Own"),
        (lambda p: None, r"builtins\.NoneType"),
    ],
)
def test_other_optimizers_are_refused_by_name(make, name, pruned):
    _, plan, model, *_ = pruned
    with pytest.raises(InputError, match=rf"expected an optimizer of class SGD, Adam or AdamW .* got \S*{name}; make"):
        carry_over(make(list(model.parameters())), plan, model)


def test_plans_that_know_no_parameters_are_refused(pruned, tmp_path):
    old, plan, model, *_ = pruned
    plan.save(tmp_path / "plan.json")
    for other in (PruningPlan.load(tmp_path / "plan.json"), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == plan
        with pytest.raises(InputError, match=r"got one that was loaded or copied; pass pruner\.plan"):
            carry_over(old, other, model)
    with pytest.raises(InputError, match="expected the plan of a CoSePPruner, got a ResNetLike"):
        carry_over(old, model, plan)


def test_a_plan_from_before_the_step_is_refused(pruned):
    old, _, model, before, *_ = pruned
    message = r"got one of shape \(10, 3, 3, 3\) in the optimizer that is neither .* pass the plan as it is after"
    with pytest.raises(InputError, match=message):
        carry_over(old, before, model)


def test_other_models_and_optimizers_of_other_models_are_refused(pruned):
    old, plan, model, *_ = pruned
    for other in (copy.deepcopy(model), build("resnet", 10)[0], nn.DataParallel(model)):
        with pytest.raises(InputError, match=f"got another {type(other).__name__}; pass that model itself"):
            carry_over(old, plan, other)
    strange = SGD(build("resnet", 10)[0].parameters(), lr=0.1)
    with pytest.raises(InputError, match="is neither in the model nor among those"):
        carry_over(strange, plan, model)


def test_a_model_that_was_pruned_again_is_refused():
    model, x, y = build("vgg", 10)
    first_optimizer, first = SGD(model.parameters(), lr=0.1), made(model, x, y)
    first.step()
    second_optimizer = carry_over(first_optimizer, first.plan, model)
    second = made(model, x, y)
    second.step()
    message = (
        r"parameter 'conv1.weight': expected shape \(5, 3, 3, 3\), as the plan's pruner left it, got \(2, 3, 3, 3\)"
    )
    with pytest.raises(InputError, match=message):
        carry_over(first_optimizer, first.plan, model)
    with pytest.raises(InputError, match="If several pruners worked in turn, carry the optimizer over after each"):
        carry_over(first_optimizer, second.plan, model)
    assert carry_over(second_optimizer, second.plan, model).param_groups[0]["params"] == list(model.parameters())


def scaled_up(layer, kept):
    layer.weight = nn.Parameter(layer.weight.data[kept] * 1.0)


def in_place(layer, kept):
    layer.weight.data = layer.weight.data[kept]


@pytest.mark.parametrize("keep", [scaled_up, in_place])
def test_layers_whose_pruner_does_otherwise_are_refused(keep):
    model, *rest = normalised(keep)
    old = SGD(model.parameters(), lr=0.1)
    pruner = made(model, *rest)
    pruner.step()
    assert len(model[1].weight) == 6
    with pytest.raises(InputError, match=r"parameter '1\.weight': expected pruning to replace it by a selection"):
        carry_over(old, pruner.plan, model)
    old.param_groups[0]["params"] = [model[4].weight]
    carry_over(old, pruner.plan, model)
