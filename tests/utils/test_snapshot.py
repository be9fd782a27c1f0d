import copy
import weakref

import pytest
import torch
import torch_pruning as tp
from models import assert_same_state, assert_untouched, build, fingerprint, images, initialise, vectors
from torch import nn

from tp_cosep import CoSePPruner, PruningError, ReconstructionSelector
from tp_cosep.utils.snapshot import restored_on_error


def trained(kind="vgg", width=10):
    """A model in mixed modes with gradients, and an optimizer with state made for it."""
    model, x, y = build(kind, width)
    model.train()
    model.head.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return model, x, optimizer


def train_on(model, zero_grad=None):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    if zero_grad is not None:
        optimizer.zero_grad(set_to_none=zero_grad)
    with torch.enable_grad():
        nn.functional.cross_entropy(model(images()[0]), images()[1]).backward()
    optimizer.step()


CHANGES = {
    "nothing": lambda m: None,
    "values": lambda m: m.fc.weight.data.zero_(),
    "values in place": lambda m: torch.nn.init.zeros_(m.fc.weight),
    "parameter": lambda m: setattr(m.fc, "weight", nn.Parameter(m.fc.weight[:3].detach())),
    "no parameter": lambda m: m.conv2.register_parameter("bias", None),
    "new parameter": lambda m: m.conv1.register_parameter("bias", nn.Parameter(torch.zeros(10))),
    "data of another shape": lambda m: setattr(m.fc.bias, "data", torch.zeros(3)),
    "data of another type": lambda m: setattr(m.fc.bias, "data", m.fc.bias.data.double()),
    "the whole type": lambda m: m.half(),
    "buffer": lambda m: setattr(m.bn1, "running_mean", m.bn1.running_mean[:3]),
    "buffer in place": lambda m: m.bn1.running_var.add_(1),
    "new buffer": lambda m: m.bn1.register_buffer("scale", torch.ones(3)),
    "batch statistics": lambda m: m(images()[0]),
    "attributes": lambda m: (
        setattr(m.conv1, "out_channels", 3),
        setattr(m.fc, "note", "pruned"),
        delattr(m.bn1, "eps"),
    ),
    "mode": lambda m: m.train(not m.training),
    "modes": lambda m: m.eval(),
    "a layer": lambda m: setattr(m, "fc", nn.Identity()),
    "a new layer": lambda m: m.add_module("extra", nn.Linear(2, 2)),
    "no layer": lambda m: delattr(m, "head"),
    "requires_grad": lambda m: m.conv2.requires_grad_(False),
    "no gradients": lambda m: m.zero_grad(set_to_none=True),
    "gradients of zero": lambda m: m.zero_grad(set_to_none=False),
    "more gradients": lambda m: m(images()[0]).sum().backward(),
    "training": train_on,
    "training from no gradients": lambda m: train_on(m, True),
    "training from zero gradients": lambda m: train_on(m, False),
}


def change_and_fail(model, change, error):
    with restored_on_error(model):
        change(model)
        raise error("boom")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_model_is_put_back(change, error):
    model, x, optimizer = trained()
    before = fingerprint(model)
    with torch.no_grad():
        outputs = copy.deepcopy(model).eval()(x)
    with pytest.raises(error, match="boom"):
        change_and_fail(model, change, error)
    assert_untouched(model, before)
    # The optimizer holds the same parameters: it continues to train this model.
    optimizer.step()
    assert not torch.equal(model.fc.weight, before[0]["fc.weight"][2])
    assert not torch.equal(model.eval()(x), outputs)


@pytest.mark.parametrize("change", [c for name, c in CHANGES.items() if name != "nothing"])
def test_the_comparison_sees_every_change(change):
    model, *_ = trained()
    before = fingerprint(model)
    change(model)
    with pytest.raises(AssertionError):
        assert_untouched(model, before)


def test_without_an_error_the_change_stays():
    model, *_ = trained()
    with restored_on_error(model):
        model.fc.weight.data.zero_()
        model.fc.out_features = 3
    assert not model.fc.weight.any()
    assert model.fc.out_features == 3


def test_a_generator_that_is_closed_keeps_what_was_done():
    model, *_ = trained()

    def steps():
        with restored_on_error(model):
            model.fc.weight.data.zero_()
            yield

    generator = steps()
    next(generator)
    generator.close()
    assert not model.fc.weight.any()
    generator = steps()
    next(generator)
    model.fc.weight.data.fill_(1)
    with pytest.raises(OSError, match="boom"):
        generator.throw(OSError("boom"))
    assert not model.fc.weight.any()


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    before = fingerprint(model)
    with pytest.raises(OSError, match="boom"):
        change_and_fail(model, lambda m: setattr(m[1], "weight", nn.Parameter(torch.zeros(4, 4))), OSError)
    assert_untouched(model, before)
    assert model[1].weight is model[0].weight


def test_the_copy_is_let_go():
    model = nn.Linear(4, 4)
    with restored_on_error(model):
        pass
    reference = weakref.ref(model)
    del model
    assert reference() is None


class Fragile(nn.Module):
    """Breaks if ``flat`` does not fit, if ``scale`` cannot be pruned, while its switch is on."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 12)
        self.second = nn.Linear(12, 12)
        self.scale = Scale(12)
        self.third = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)
        self.is_hard_coded = False

    def forward(self, x):
        x = self.scale(self.second(self.first(x).relu()))
        if self.is_hard_coded:
            x = x.reshape(len(x), 12)
        return self.head(self.third(x).relu())


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.width = width

    def forward(self, x):
        return x * self.weight


class ScalePruner(tp.function.BasePruningFunc):
    """Fails half-way if its switch is on."""

    error = None

    def prune_out_channels(self, layer, idxs):
        kept = [i for i in range(layer.width) if i not in idxs]
        layer.weight = nn.Parameter(layer.weight.detach()[kept])
        if self.error:
            raise self.error("boom")
        layer.width = len(kept)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer):
        return layer.width

    get_in_channels = get_out_channels


class Loader:
    """Data that can be read any number of times, until it breaks."""

    error, reads_before_error = None, 2

    def __init__(self, *batch):
        self.batch, self.n_reads = batch, 0

    def __iter__(self):
        self.n_reads += 1
        yield self.batch
        if self.error and self.n_reads > self.reads_before_error:
            raise self.error("boom")


class FineTune:
    """Trains, and fails in its second call if its switch is on."""

    error = None

    def __init__(self):
        self.n_calls = 0

    def __call__(self, model):
        self.n_calls += 1
        x, y = vectors()
        was_training = model.training
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=False)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if self.error and self.n_calls >= 2:
            raise self.error("boom")
        model.train(was_training)


CAUSES = {
    "callback": (FineTune, ValueError),
    "interrupted callback": (FineTune, KeyboardInterrupt),
    "customized pruner": (ScalePruner, ZeroDivisionError),
    "interrupted pruning": (ScalePruner, KeyboardInterrupt),
    "loader": (Loader, OSError),
    "hard-coded shape": (Fragile, None),
}


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("cause", CAUSES)
def test_a_step_that_fails_changes_nothing_and_can_be_made_again(cause, layerwise):
    model, (x, y) = initialise(Fragile()), vectors()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model.second.eval()
    copied = copy.deepcopy(model)
    for p, q in zip(model.parameters(), copied.parameters(), strict=True):
        q.grad = p.grad.clone()

    def make(model):
        parts = Loader(x, y), FineTune(), ScalePruner()
        if layerwise is False:
            parts[0].reads_before_error, parts[1].n_calls = 0, 1
        selector = ReconstructionSelector(knee="strongest")
        return parts, CoSePPruner(
            model,
            x[:1],
            selector,
            pruning_ratio=0.5,
            loader=parts[0],
            layerwise=layerwise,
            fine_tune=parts[1],
            fit_options={"progress": False},
            customized_pruners={Scale: parts[2]},
        )

    parts, pruner = make(model)
    kind, error = CAUSES[cause]
    (culprit,) = [part for part in (*parts, model) if isinstance(part, kind)]
    if error:
        culprit.error = error
        expected = PruningError if error is ZeroDivisionError else error
        message = "boom"
    else:
        culprit.is_hard_coded = True
        expected, message = PruningError, "layer 'second': the model no longer runs on example_inputs after its group"
    before, plan = fingerprint(model), pruner.plan
    for _ in range(2):
        with pytest.raises(expected, match=message):
            pruner.step()
        assert_untouched(model, before)
        assert pruner.plan.groups == plan.groups == ()
        assert pruner.current_step == 0
        parts[0].n_reads = 0
        parts[1].n_calls = int(not layerwise)
    held = optimizer.param_groups[0]["params"]
    assert all(p is q for p, q in zip(held, model.parameters(), strict=True))
    # Once the cause is gone: as if nothing had happened.
    if error:
        culprit.error = None
    else:
        culprit.is_hard_coded = False
    pruner.step()
    make(copied)[1].step()
    assert model.second.out_features == 6
    assert_same_state(model.state_dict(), copied.state_dict())
    assert len(pruner.plan) > 0


def test_an_output_that_changes_is_an_error():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(20, 10), nn.Linear(10, 4)

        def forward(self, x):
            features = self.body(x)
            return self.head(features.relu()), features

    model, (x, y) = initialise(Features()), vectors()
    before = fingerprint(model)
    pruner = CoSePPruner(model, x[:1], ReconstructionSelector().fit(model, [(x, y)]), pruning_ratio=0.5)
    with pytest.raises(PruningError, match=r"layer 'body': pruning its group changed the output .* ignored_layers"):
        pruner.step()
    assert_untouched(model, before)


def test_a_failure_in_a_later_step_goes_back_to_the_step_before():
    model, (x, y) = initialise(Fragile()), vectors()
    tune = FineTune()
    tune.n_calls = -10
    options = {"customized_pruners": {Scale: ScalePruner()}, "loader": Loader(x, y), "fine_tune": tune}
    pruner = CoSePPruner(model, x[:1], ReconstructionSelector(), pruning_ratio=0.5, iterative_steps=2, **options)
    pruner.step()
    widths = [model.first.out_features, model.second.out_features, model.third.out_features]
    assert widths == [9, 9, 9]
    before, plan = fingerprint(model), pruner.plan
    tune.n_calls, tune.error = 5, KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        pruner.step()
    assert_untouched(model, before)
    assert (pruner.current_step, str(pruner.plan)) == (1, str(plan))
    tune.error = None
    pruner.step()
    assert [model.first.out_features, model.second.out_features, model.third.out_features] == [6, 6, 6]


def test_what_is_raised_into_an_interactive_step_puts_the_model_back():
    model, x, y = build("resnet", 10)
    before = fingerprint(model)
    pruner = CoSePPruner(model, x[:1], ReconstructionSelector(keep=0.5).fit(model, [(x, y)]))
    groups = pruner.step(interactive=True)
    next(groups).prune()
    next(groups).prune()
    with pytest.raises(KeyboardInterrupt):
        groups.throw(KeyboardInterrupt())
    assert_untouched(model, before)
    assert pruner.current_step == 0
    # Nothing is done before the first group is asked for.
    pruner.step(interactive=True)
    assert_untouched(model, before)
    pruner.step()
    assert model.stem.out_channels == 5


def test_a_part_that_the_caller_pruned_badly_puts_the_model_back():
    model, (x, y) = initialise(Fragile()), vectors()
    model.is_hard_coded = True
    before = fingerprint(model)
    selector = ReconstructionSelector(keep=0.5).fit(model, [(x, y)])
    pruner = CoSePPruner(model, x[:1], selector, customized_pruners={Scale: ScalePruner()})

    def prune_all():
        for group in pruner.step(interactive=True):
            group.prune()

    with pytest.raises(PruningError, match="layer 'second': the model no longer runs"):
        prune_all()
    assert_untouched(model, before)


def test_a_pruner_that_shrinks_a_parameter_in_place():
    class InPlace(ScalePruner):
        def prune_out_channels(self, layer, idxs):
            kept = [i for i in range(layer.width) if i not in idxs]
            layer.weight.data, layer.width = layer.weight.data[kept], len(kept)
            return layer

        prune_in_channels = prune_out_channels

    model, (x, y) = initialise(Fragile()), vectors()
    before = fingerprint(model)
    selector = ReconstructionSelector(keep=0.5).fit(model, [(x, y)])
    options = {"customized_pruners": {Scale: InPlace()}, "fine_tune": lambda m: m.no_such_layer}
    with pytest.raises(AttributeError, match="no_such_layer"):
        CoSePPruner(model, x[:1], selector, **options).step()
    assert_untouched(model, before)
