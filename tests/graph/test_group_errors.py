"""Groups that cannot be chosen from: the error names the layer, and the model is as it was."""

import pytest
import torch
import torch_pruning as tp
from fitted import fitted, group_with
from models import assert_untouched, build, fingerprint, images, initialise, vectors
from torch import nn

from tp_cosep import CoSePPruner, CoSePSelector, InputError, PruningError
from tp_cosep.graph.groups import read_group
from tp_cosep.pruning import planner as planner


def assert_refused(model, message, use, error=InputError):
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        use()
    assert_untouched(model, before)
    model.train()(torch.randn_like(model.example)).sum().backward()


@pytest.fixture(params=[None, 0.5, "global", "interactive"])
def prune(request):
    """One step of a pruner, in every way in which it asks for choices."""

    def step(model, x, selector, **options):
        how = {None: {}, 0.5: {"pruning_ratio": 0.5}, "global": {"pruning_ratio": 0.5, "global_pruning": True}}
        pruner = CoSePPruner(model, x, selector, **how.get(request.param, {}), **options)
        if request.param == "interactive":
            for group in pruner.step(interactive=True):
                group.prune()
        else:
            pruner.step()

    return step


def with_example(model, x):
    model.example = x[:4]
    return model


class Attention(nn.Module):
    """Queries, keys and values by three layers, and the heads' number in the code."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.one, self.two, self.three = (nn.Linear(12, 12) for _ in range(3))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (layer(x).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (self.one, self.two, self.three))
        attention = (q @ k.transpose(2, 3)).softmax(-1)
        return self.head((attention @ v).transpose(1, 2).flatten(2).mean(1))


@pytest.fixture
def attention():
    x, y = vectors(24, shape=(3, 5))
    return with_example(initialise(Attention()), x), x, y


@pytest.mark.parametrize("n", [5, 24, 0, -3])
def test_a_number_of_heads_that_does_not_divide_the_channels(attention, n):
    model, x, y = attention
    selector = fitted(model, x, y)
    message = f"layer 'two': expected num_heads to divide its 12 channels, got {n}"
    heads = {model.one: 3, model.two: n}
    assert_refused(model, message, lambda: CoSePPruner(model, x[:1], selector, num_heads=heads))


def test_heads_of_a_layer_that_is_not_part_of_the_model(attention):
    model, x, y = attention
    selector = fitted(model, x, y)
    message = "num_heads: expected modules of the model, got a Linear that is not"
    assert_refused(model, message, lambda: CoSePPruner(model, x[:1], selector, num_heads={nn.Linear(12, 12): 3}))


def test_heads_that_a_selector_was_told_of_are_checked_where_a_stock_pruner_asks(attention):
    model, x, y = attention
    heads = {model.embed: 5}
    selector = CoSePSelector().fit(model, [(x, y)], num_heads=heads, progress=False)
    message = "layer 'embed': expected a number of channels divisible by its 5 channel groups, got 12"
    stock = tp.pruner.BasePruner(model, x[:1], importance=selector, ignored_layers=[model.head])
    assert_refused(model, message, stock.step)
    message = "layer 'embed': expected a number of channels divisible by its 5 heads, got 12"
    assert_refused(model, message, lambda: read_group(group_with(model, x, "embed"), n_heads=5))


@pytest.mark.parametrize("option", ["in_channel_groups", "out_channel_groups"])
def test_channel_groups_that_do_not_divide_the_channels(option, prune):
    model, x, y = build("vgg", 12)
    with_example(model, x)
    selector = fitted(model, x, y)
    layer = {"in_channel_groups": "conv2", "out_channel_groups": "conv1"}[option]
    groups = {model.get_submodule(layer): 5}
    message = f"layer '{layer}': expected a number of channels divisible by its 5 channel groups, got 12"
    assert_refused(model, message, lambda: prune(model, x[:1], selector, **{option: groups}))


class Normalised(nn.Module):
    """A GroupNorm over two layers' channels, whose groups fit neither of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.norm = nn.GroupNorm(4, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.norm(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3)))


def test_a_normalisation_whose_groups_cross_the_borders_of_layers(prune):
    x, y = images(24, size=6)
    model = with_example(initialise(Normalised()), x)
    selector = fitted(model, x, y)
    message = "layer 'norm': expected a number of channels divisible by its 4 channel groups, got 6"
    assert_refused(model, message, lambda: prune(model, x[:1], selector))


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_a_layer_in_two_groups(ratio, monkeypatch):
    # No model was found whose groups overlap: Torch-Pruning starts none at a layer that it has met. So the group of
    # the residual stream is shown twice, from either of the layers that make it.
    model, x, y = build("resnet", 10)
    with_example(model, x)
    selector = fitted(model, x, y)
    names = {"stem": model.stem, "conv2": model.conv2}

    def overlapping(graph, *_):
        for layer in names.values():
            prune = graph.get_pruner_of_module(layer).prune_out_channels
            yield graph.get_pruning_group(layer, prune, list(range(10)))

    monkeypatch.setattr(planner, "prunable_groups", overlapping)
    pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=ratio)
    message = (
        r"layer '(stem|bn0|conv2|bn2)': its channel 0 belongs to the groups of 'stem' and of 'conv2', which would be "
        "selected apart; put one of these into ignored_layers"
    )
    assert_refused(model, message, pruner.step)


def test_groups_that_share_no_channel_may_share_a_layer():
    # The other side of the check: rows 0 … 4 and 5 … 10 of ``both`` go with one layer each.
    class Sides(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.both = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 11, 1)
            self.aside, self.head = nn.Linear(5, 4), nn.Linear(11, 4)

        def forward(self, x):
            a = self.a(x)
            x = torch.cat([a, self.b(x)], 1) + self.both(x)
            return self.head(x.mean((2, 3))) + self.aside(a.mean((2, 3)))

    model, (x, y) = initialise(Sides()), images(24, size=6)
    selector, weight = fitted(model, x, y), model.both.weight.detach().clone()
    pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=0.5)
    pruner.step()
    kept = {e.name: e.selection.keep_idxs for e in pruner.plan if e.selection}
    assert kept.keys() == {"a", "b"}
    assert torch.equal(model.both.weight, weight[[*kept["a"], *(5 + i for i in kept["b"])]])


class Gate(nn.Module):
    """A layer with one channel, multiplied onto all channels of another."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 1, 1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head((self.conv(x) * self.gate(x).sigmoid()).mean((2, 3)))


class Tokens(nn.Module):
    """A parameter with a number for each of three tokens, which a trace takes for channels."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 4)
        self.gain = nn.Parameter(torch.ones(1, 3, 1))

    def forward(self, x):
        return self.head((self.embed(x) * self.gain).mean(1))


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected:UserWarning")
@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (
            Gate,
            (3, 6, 6),
            r"layer '(conv|gate|head)': expected \d+ channels or more, as the layers joined with it have",
        ),
        (Tokens, (3, 5), "layer 'gain': expected 8 channels or more, as the layers joined with it have, got 3"),
    ],
)
@pytest.mark.parametrize("ratio", [None, 0.5])
def test_members_that_disagree_on_the_number_of_channels(make, shape, message, ratio):
    x, y = vectors(24, shape=shape)
    model = with_example(initialise(make()), x)
    selector = fitted(model, x, y)
    pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=ratio)
    assert_refused(model, f"{message}.*ignored_layers", pruner.step)


def test_a_stock_pruner_passes_over_a_layer_with_one_channel_and_all_that_goes_with_it():
    x, y = images(24, size=6)
    model = initialise(Gate())
    selector, before = fitted(model, x, y), fingerprint(model)
    tp.pruner.BasePruner(model, x[:1], importance=selector, pruning_ratio=0.5, ignored_layers=[model.head]).step()
    CoSePPruner(model, x[:1], selector, pruning_ratio=0.5, global_pruning=True).step()
    assert_untouched(model, before)


@pytest.mark.parametrize("layer", ["stem", "conv2"])
def test_moments_of_one_member_are_missing(layer, prune):
    model, x, y = build("resnet", 10)
    with_example(model, x)
    selector = fitted(model, x, y)
    del selector.statistics.moments[layer]
    message = f"layer '{layer}': expected class moments, got none: .*ignored_layers or fit again"
    assert_refused(model, message, lambda: prune(model, x[:1], selector))


def test_moments_of_one_member_are_missing_where_a_stock_pruner_asks():
    model, x, y = build("resnet", 10)
    with_example(model, x)
    selector = fitted(model, x, y).fit(model, [(x, y)], layers=["stem", "conv1", "conv3", "conv4"], progress=False)
    stock = tp.pruner.BasePruner(model, x[:1], importance=selector, ignored_layers=[model.head])
    assert_refused(model, r"layer '(conv2|shortcut)': expected class moments, got none", stock.step)


@pytest.mark.parametrize("layer", ["stem", "conv2"])
def test_moments_of_one_member_are_of_another_width(layer, prune):
    model, x, y = build("resnet", 10)
    with_example(model, x)
    selector = fitted(model, x, y)
    selector.statistics.moments[layer] = selector.statistics.moments["conv3"]
    message = f"layer '{layer}': class moments cover 12 channels, the layer has 10; call fit\\(\\) again"
    assert_refused(model, message, lambda: prune(model, x[:1], selector))


def test_moments_of_one_reader_are_missing():
    model, x, y = build("resnet", 10)
    with_example(model, x)
    selector = fitted(model, x, y, observe="inputs")
    del selector.statistics.moments["conv3"]
    pruner = CoSePPruner(model, x[:1], selector)
    assert_refused(model, "layer 'conv3': expected class moments, got none", pruner.step)


class Refusing(tp.pruner.BasePruningFunc):
    """A layer's pruner that fails when it is asked to, after it has changed something."""

    def prune_out_channels(self, layer, idxs):
        layer.weight = self._prune_parameter_and_grad(layer.weight, list(range(len(layer.weight) - len(idxs))), 0)
        raise ValueError("no")

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer):
        return len(layer.weight)

    get_in_channels = get_out_channels


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_a_users_own_pruner_that_fails_half_way(ratio):
    x, y = vectors(24, shape=(5,))
    model = with_example(initialise(nn.Sequential(nn.Linear(5, 8), Scale(8), nn.Linear(8, 4))), x)
    selector = fitted(model, x, y, keep=3)
    options = {"pruning_ratio": ratio, "customized_pruners": {Scale: Refusing()}}
    pruner = CoSePPruner(model, x[:1], selector, **options)
    assert_refused(model, "layer '0': .*ValueError: no", pruner.step, PruningError)
