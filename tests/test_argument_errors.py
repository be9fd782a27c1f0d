"""Arguments of another kind, and models that cannot be measured: refused with what was expected and what came."""

import re

import pytest
import torch
from fitted import fitted, make_selector, widths
from models import assert_untouched, build, fingerprint
from torch import nn

from tp_cosep import (
    Compensator,
    CoSePPruner,
    InputError,
    PruningError,
    ReconstructionSelector,
    recalibrate,
)
from tp_cosep.graph.tracing import trace


def assert_refused(use, message, error=InputError):
    with pytest.raises(error, match=re.escape(message)):
        use()


@pytest.mark.parametrize("which", ["name", "type", "module", "parameter", "number"])
def test_layers_that_are_no_list(which):
    model, x, y = build("vgg", 10)
    selector = fitted(model, x, y)
    layers, message = {
        "name": ("conv1", "got the string 'conv1'; write ['conv1'], in brackets"),
        "type": (nn.Conv2d, "got the type Conv2d; write [layer], in brackets"),
        "module": (model.conv1, "got a Conv2d; write [layer]"),
        "parameter": (model.conv1.weight, "got a Parameter; write [layer]"),
        "number": (5, "got 5; write [layer]"),
    }[which]
    for use in (
        lambda: CoSePPruner(model, x[:1], selector, ignored_layers=layers),
        lambda: ReconstructionSelector().fit(model, [(x, y)], ignored_layers=layers),
        lambda: selector.pruning_ratio_dict(model, x[:1], layers),
    ):
        assert_refused(use, f"ignored_layers: expected a list of layers, {message}")


def test_things_that_are_no_model_and_no_loader():
    model, x, y = build("vgg", 10)
    selector = fitted(model, x, y)
    no_model = "model: expected an nn.Module, got "
    assert_refused(
        lambda: ReconstructionSelector().fit(None, [(x, y)]), f"{no_model}None; the model is the first argument"
    )
    assert_refused(lambda: ReconstructionSelector().fit([(x, y)], model), f"{no_model}a list of 1")
    assert_refused(lambda: CoSePPruner("m", x[:1], selector), f"{no_model}the string 'm'")
    no_loader = "expected a loader that gives batches, got "
    assert_refused(
        lambda: ReconstructionSelector().fit(model, 5), f"fit: {no_loader}5; pass a DataLoader or a list of batches"
    )
    assert_refused(lambda: ReconstructionSelector().fit(model, None), f"fit: {no_loader}None")
    assert_refused(lambda: CoSePPruner(model, x[:1], selector, loader=5), f"CoSePPruner: {no_loader}5")
    assert_refused(lambda: recalibrate(model, model.conv1), f"recalibrate: {no_loader}a Conv2d")
    for mode in ("one-shot", "sequential"):
        assert_refused(lambda m=mode: Compensator(model, x[:1], mode=m).fit(5), f"Compensator: {no_loader}5")


@pytest.mark.parametrize("name", ["adapt", "fine_tune"])
def test_things_that_are_no_function(name):
    model, x, y = build("mlp", 10)
    message = f"CoSePPruner: expected {name} to be a function of the model or None, got 'foo'"
    assert_refused(lambda: CoSePPruner(model, x[:1], fitted(model, x, y), **{name: "foo"}), message)


@pytest.mark.parametrize("inputs", [None, torch.zeros(3)], ids=["none", "shape"])
def test_example_inputs_that_the_model_does_not_take(inputs):
    model, x, y = build("vgg", 10)
    selector, before = fitted(model, x, y), fingerprint(model)
    message = "example_inputs: Torch-Pruning cannot follow the model on them ("
    assert_refused(lambda: CoSePPruner(model, inputs, selector), message, PruningError)
    assert_untouched(model, before)
    # What is no matter of the trace keeps its own message.
    assert_refused(lambda: CoSePPruner(model, inputs, selector, rounding=8), "keyword argument 'rounding'", TypeError)


@pytest.mark.parametrize("kind", ["reconstruction", "cosep", "reconstruction without classes"])
def test_a_single_class(kind):
    model, x, y = build("vgg", 10)
    selector = make_selector(kind=kind)
    if kind == "reconstruction without classes":
        assert selector.fit(model, [(x, 0 * y)]).is_fitted
        return
    message = (
        "got 1 (class 0), 0 of them with a single sample; every selector but ReconstructionSelector(class_weight=0)"
    )
    assert_refused(lambda: selector.fit(model, [(x, 0 * y)]), message)


def test_a_model_without_values():
    model, x, y = build("vgg", 10)
    selector, model = fitted(model, x, y), model.to("meta")
    message = "model: expected weights with values, got 'conv1.weight' on the meta device; load the weights first"
    assert_refused(lambda: ReconstructionSelector().fit(model, [(x, y)]), message)
    assert_refused(lambda: CoSePPruner(model, x[:1], selector), message)
    assert selector.memory_estimate(model, x[:2], 4).total > 0


def test_a_lazy_model():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4))
    _, x, y = build("vgg", 10)
    assert ReconstructionSelector().fit(model, [(x, y)]).is_fitted


def test_inference_mode():
    model, x, y = build("vgg", 10)
    selector = fitted(model, x, y)
    pruner, before = CoSePPruner(model, x[:1], selector), fingerprint(model)
    with torch.inference_mode():
        for use in (
            lambda: ReconstructionSelector().fit(model, [(x, y)]),
            lambda: CoSePPruner(model, x[:1], selector),
            lambda: trace(model, x[:1]),
            pruner.step,
        ):
            assert_refused(use, "torch.inference_mode: expected it to be off")
        made, _, _ = build("vgg", 10)
    assert_untouched(model, before)
    message = "model: expected weights that can have gradients, got 'conv1.weight', which was made under"
    assert_refused(lambda: ReconstructionSelector().fit(made, [(x, y)]), message)


def test_autocast_changes_nothing():
    model, x, y = build("vgg", 10)
    twin, _, _ = build("vgg", 10)
    CoSePPruner(twin, x[:1], fitted(twin, x, y, kind="reconstruction"), pruning_ratio=0.5).step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        CoSePPruner(model, x[:1], fitted(model, x, y, kind="reconstruction"), pruning_ratio=0.5).step()
        assert model(x[:1]).dtype == torch.bfloat16
    assert widths(model) == widths(twin)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
