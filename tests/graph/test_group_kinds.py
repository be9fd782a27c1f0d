"""Every way in which layers share channels: what is compared, and what exactly is gone after pruning.

Each case has its answer written down by hand: which rows of which measured layers a component has, and what
becomes of every tensor when some components stay.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch_pruning as tp
from fitted import fitted, group_with
from models import (
    ResNetLike,
    RmsNorm,
    RmsNormPruner,
    assert_same_state,
    assert_untouched,
    build,
    fingerprint,
    images,
    initialise,
    seeded,
    vectors,
)
from torch import nn
from torch.nn import functional as F
from two_pass import assert_two_pass

from tp_cosep import CoSePPruner, InputError, PruningError
from tp_cosep.functional.kmedoids import k_medoids
from tp_cosep.functional.selection import select_channels
from tp_cosep.functional.separability import profiles
from tp_cosep.graph.groups import read_group
from tp_cosep.graph.tracing import trace
from tp_cosep.selection.input_space import energies_of

Kept = Mapping[str, list[int]]
Rows = Callable[[int], list[int]]
Wire = str | Callable[[Kept], list[int]] | None


def own(i):
    return [i]


@dataclass
class Channels:
    """A set of components: how many there are, and the rows of one of them in every layer that is measured."""

    n: int
    measured: dict[str, Rows]


@dataclass
class Case:
    """A model with what is to become of it.

    ``wires`` says by layer what stays of dimension 0 of all its tensors and of dimension 1 of its weights, and by
    tensor, where that is not enough, what stays of the dimensions it names.
    """

    model: nn.Module
    x: Any
    y: torch.Tensor
    sets: dict[str, Channels]
    wires: dict[str, Any]
    ignored: tuple[str, ...] = ("head",)
    options: Callable[[nn.Module], dict[str, Any]] = lambda model: {}
    selector: dict[str, Any] = field(default_factory=dict)
    trace_options: Callable[[nn.Module], dict[str, Any]] = lambda model: {}
    producers: list[list[str]] | None = None  # of every set, if they are not what is measured

    @property
    def example(self):
        return self.x[:2]

    def fit(self, **options):
        return fitted(self.model, self.x, self.y, **{"weights": None, **self.selector, **options})

    def fresh(self):
        model = copy.deepcopy(self.model)
        options = {"ignored_layers": [model.get_submodule(name) for name in self.ignored]}
        return model, {**options, **self.options(model), **self.trace_options(model)}

    def pruned(self, state, kept):
        """What a state becomes when every set keeps some components, from the wiring alone."""
        return {key: self._cut(key, value, kept) for key, value in state.items()}

    def _cut(self, key, value, kept):
        dims = self.wires.get(key)
        if dims is None:
            out, into = self.wires.get(key.rpartition(".")[0], (None, None))
            dims = {0: out, 1: into} if value.dim() > 1 else {0: out} if value.dim() else {}
        for dim, wire in dims.items():
            if wire is not None:
                rows = kept[wire] if isinstance(wire, str) else wire(kept)
                value = value.index_select(dim, torch.tensor(rows))
        return value


def distances_by_hand(selector, channels):
    """D² = Σ ‖x_i − x_j‖² / d over the rows that a component has in the measured layers."""
    squared = torch.zeros(channels.n, channels.n, dtype=torch.float64)
    for layer, rows in channels.measured.items():
        x = profiles(selector.statistics.moments[layer])
        for i in range(channels.n):
            for j in range(channels.n):
                a, b = rows(i), rows(j)
                assert len(a) == len(b)
                squared[i, j] += sum(((x[p] - x[q]) ** 2).sum() / x.shape[1] for p, q in zip(a, b, strict=True))
    return squared.sqrt()


CASES: dict[str, Callable[[], Case]] = {}


def case(build_case):
    CASES[build_case.__name__] = build_case
    return build_case


class Net(nn.Module):
    """Layers by name and the function that runs them."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def with_images(
    run, sets, wires, *, n=24, channels=3, size=6, ignored=("head",), options=None, selector=None, **layers
):
    x, y = images(n, channels, size)
    return Case(
        initialise(Net(run, **layers)), x, y, sets, wires, ignored, options or (lambda model: {}), selector or {}
    )


def mean(x):
    return x.flatten(2).mean(2)


@case
def residual():
    model, x, y = build("resnet", 10)
    sets = {
        "a": Channels(10, {"stem": own, "conv2": own}),
        "b": Channels(10, {"conv1": own}),
        "c": Channels(12, {"conv3": own}),
        "d": Channels(12, {"conv4": own, "shortcut": own}),
    }
    return Case(model, x, y, sets, {name: (w.out, w.into) for name, w in ResNetLike.wiring.items()})


@case
def residual_as_its_readers_see_it():
    plain = residual()
    plain.producers = [sorted(channels.measured) for channels in plain.sets.values()]
    consumers = {"a": ("conv1", "conv3", "shortcut"), "b": ("conv2",), "c": ("conv4",), "d": ("head",)}
    plain.sets = {name: Channels(plain.sets[name].n, dict.fromkeys(layers, own)) for name, layers in consumers.items()}
    plain.selector = {"observe": "inputs"}
    return plain


@case
def concatenation():
    """As in a DenseNet: every layer reads all before it; one layer is used twice."""

    def run(net, x):
        a = net.a(x)
        ab = torch.cat([a, net.b(F.relu(a))], 1)
        return net.head(mean(net.bn(torch.cat([ab, net.c(ab), a], 1))))

    sets = {"a": Channels(6, {"a": own}), "b": Channels(5, {"b": own}), "c": Channels(7, {"c": own})}

    def everything(k):
        return [*k["a"], *(6 + i for i in k["b"]), *(11 + i for i in k["c"]), *(18 + i for i in k["a"])]

    return with_images(
        run,
        sets,
        {
            "a": ("a", None),
            "b": ("b", "a"),
            "c": ("c", lambda k: [*k["a"], *(6 + i for i in k["b"])]),
            "bn": (everything, None),
            "head": (None, everything),
        },
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(6, 5, 3, padding=1),
        c=nn.Conv2d(11, 7, 3, padding=1),
        bn=nn.BatchNorm2d(24),
        head=nn.Linear(24, 4),
    )


def pairs(n):
    return lambda i: [i, i + n]


@case
def gated_unit():
    """Channel i is multiplied by the sigmoid of channel i + n, so both go together."""

    def run(net, x):
        a, b = net.bn(net.conv(x)).chunk(2, 1)
        return net.head(mean(net.after(a * b.sigmoid())))

    def both(k):
        return [*k["a"], *(10 + i for i in k["a"])]

    sets = {"a": Channels(10, {"conv": pairs(10)}), "b": Channels(7, {"after": own})}
    return with_images(
        run,
        sets,
        {"conv": (both, None), "bn": (both, None), "after": ("b", "a"), "head": (None, "b")},
        conv=nn.Conv2d(3, 20, 3),
        bn=nn.BatchNorm2d(20),
        after=nn.Conv2d(10, 7, 1),
        head=nn.Linear(7, 4),
    )


@case
def gated_linear_unit():
    def run(net, x):
        a, b = net.up(x).chunk(2, -1)
        return net.head(net.down(a * F.silu(b)).mean(1))

    def both(k):
        return [*k["a"], *(6 + i for i in k["a"])]

    x, y = vectors(24, shape=(3, 5))
    layers = {"up": nn.Linear(5, 12), "down": nn.Linear(6, 8), "head": nn.Linear(8, 4)}
    sets = {"a": Channels(6, {"up": pairs(6)}), "b": Channels(8, {"down": own})}
    wires = {"up": (both, None), "down": ("b", "a"), "head": (None, "b")}
    return Case(initialise(Net(run, **layers)), x, y, sets, wires)


@case
def depthwise():
    def run(net, x):
        return net.head(mean(net.point(F.relu(net.bn(net.depth(net.stem(x)))))))

    sets = {"a": Channels(10, {"stem": own, "depth": own}), "b": Channels(7, {"point": own})}
    return with_images(
        run,
        sets,
        {"stem": ("a", None), "depth": ("a", None), "bn": ("a", None), "point": ("b", "a"), "head": (None, "b")},
        stem=nn.Conv2d(3, 10, 1, bias=False),
        depth=nn.Conv2d(10, 10, 3, padding=1, groups=10),
        bn=nn.BatchNorm2d(10),
        point=nn.Conv2d(10, 7, 1),
        head=nn.Linear(7, 4),
    )


def slots(n_groups, size):
    """Rows of a slot: the channel at one position of every channel group."""
    return lambda i: [g * size + i for g in range(n_groups)]


def all_slots(name, n_groups, size):
    return lambda k: [g * size + i for g in range(n_groups) for i in k[name]]


@case
def grouped_convolution():
    """Its inputs and outputs are pruned apart, and each keep as many in all four groups; weights are [out, in / 4]."""

    def run(net, x):
        return net.head(mean(net.inner(F.relu(net.stem(x)))))

    rows, inner = all_slots("a", 4, 4), all_slots("b", 4, 4)
    sets = {"a": Channels(4, {"stem": slots(4, 4)}), "b": Channels(4, {"inner": slots(4, 4)})}
    return with_images(
        run,
        sets,
        {"stem": (rows, None), "inner.weight": {0: inner, 1: "a"}, "inner.bias": {0: inner}, "head": (None, inner)},
        stem=nn.Conv2d(3, 16, 1),
        inner=nn.Conv2d(16, 16, 3, padding=1, groups=4),
        head=nn.Linear(16, 4),
    )


@case
def group_norm():
    def run(net, x):
        return net.head(mean(net.after(F.relu(net.norm(net.conv(x))))))

    rows = all_slots("a", 3, 4)
    sets = {"a": Channels(4, {"conv": slots(3, 4)}), "b": Channels(7, {"after": own})}
    return with_images(
        run,
        sets,
        {"conv": (rows, None), "norm": (rows, None), "after": ("b", rows), "head": (None, "b")},
        conv=nn.Conv2d(3, 12, 1),
        norm=nn.GroupNorm(3, 12),
        after=nn.Conv2d(12, 7, 1),
        head=nn.Linear(7, 4),
    )


def pixels(n):
    return lambda i: [n * i + j for j in range(n)]


def all_pixels(name, n):
    return lambda k: [n * i + j for i in k[name] for j in range(n)]


@case
def flatten():
    def run(net, x):
        return net.head(F.relu(net.fc(net.conv(x).flatten(1))))

    return with_images(
        run,
        {"a": Channels(6, {"conv": own}), "b": Channels(9, {"fc": own})},
        {"conv": ("a", None), "fc": ("b", all_pixels("a", 16)), "head": (None, "b")},
        conv=nn.Conv2d(3, 6, 3),
        fc=nn.Linear(96, 9),
        head=nn.Linear(9, 4),
    )


@case
def flatten_as_its_readers_see_it():
    plain = flatten()
    plain.producers = [sorted(channels.measured) for channels in plain.sets.values()]
    plain.sets = {"a": Channels(6, {"fc": pixels(16)}), "b": Channels(9, {"head": own})}
    plain.selector = {"observe": "inputs"}
    return plain


@case
def transposed_convolutions():
    """Weights are [in, out, ...]."""

    def run(net, x):
        return net.head(mean(net.up2(F.relu(net.up(net.stem(x))))))

    return with_images(
        run,
        {
            "a": Channels(6, {"stem": own}),
            "b": Channels(5, {"up": own}),
            "c": Channels(7, {"up2": own}),
        },
        {
            "stem": ("a", None),
            "up.weight": {0: "a", 1: "b"},
            "up.bias": {0: "b"},
            "up2.weight": {0: "b", 1: "c"},
            "up2.bias": {0: "c"},
            "head": (None, "c"),
        },
        stem=nn.Conv2d(3, 6, 1),
        up=nn.ConvTranspose2d(6, 5, 2, stride=2),
        up2=nn.ConvTranspose2d(5, 7, 3),
        head=nn.Linear(7, 4),
    )


@case
def transposed_convolution_in_one_dimension():
    def run(net, x):
        return net.head(mean(net.up(F.relu(net.stem(x)))))

    x, y = vectors(24, shape=(3, 7))
    layers = {"stem": nn.Conv1d(3, 6, 3), "up": nn.ConvTranspose1d(6, 8, 2, stride=2), "head": nn.Linear(8, 4)}
    sets = {"a": Channels(6, {"stem": own}), "b": Channels(8, {"up": own})}
    wires = {"stem": ("a", None), "up.weight": {0: "a", 1: "b"}, "up.bias": {0: "b"}, "head": (None, "b")}
    return Case(initialise(Net(run, **layers)), x, y, sets, wires)


@case
def convolutions_in_one_dimension():
    def run(net, x):
        return net.head(mean(net.conv2(F.relu(net.bn(net.conv1(x))))))

    x, y = vectors(24, shape=(3, 9))
    layers = {
        "conv1": nn.Conv1d(3, 8, 3),
        "bn": nn.BatchNorm1d(8),
        "conv2": nn.Conv1d(8, 7, 3),
        "head": nn.Linear(7, 4),
    }
    sets = {"a": Channels(8, {"conv1": own}), "b": Channels(7, {"conv2": own})}
    wires = {"conv1": ("a", None), "bn": ("a", None), "conv2": ("b", "a"), "head": (None, "b")}
    return Case(initialise(Net(run, **layers)), x, y, sets, wires)


@case
def convolutions_in_three_dimensions():
    def run(net, x):
        return net.head(net.conv2(F.relu(net.bn(net.conv1(x)))).flatten(1))

    x, y = vectors(24, shape=(2, 4, 4, 4))
    layers = {
        "conv1": nn.Conv3d(2, 8, 2),
        "bn": nn.BatchNorm3d(8),
        "conv2": nn.Conv3d(8, 7, 2),
        "head": nn.Linear(56, 4),
    }
    sets = {"a": Channels(8, {"conv1": own}), "b": Channels(7, {"conv2": own})}
    wires = {"conv1": ("a", None), "bn": ("a", None), "conv2": ("b", "a"), "head": (None, all_pixels("b", 8))}
    return Case(initialise(Net(run, **layers)), x, y, sets, wires)


@case
def layer_norm():
    def run(net, x):
        x = net.embed(x)
        x = x + net.down(F.gelu(net.up(net.norm(x))))
        return net.head(net.last(x).mean(1))

    x, y = vectors(24, shape=(3, 5))
    layers = {
        "embed": nn.Linear(5, 8),
        "norm": nn.LayerNorm(8),
        "up": nn.Linear(8, 11),
        "down": nn.Linear(11, 8),
        "last": nn.LayerNorm(8),
        "head": nn.Linear(8, 4),
    }
    sets = {"a": Channels(8, {"embed": own, "down": own}), "b": Channels(11, {"up": own})}
    wires = {
        "embed": ("a", None),
        "norm": ("a", None),
        "up": ("b", "a"),
        "down": ("a", "b"),
        "last": ("a", None),
        "head": (None, "a"),
    }
    return Case(initialise(Net(run, **layers)), x, y, sets, wires)


@case
def a_normalisation_of_the_users_own():
    def run(net, x):
        return net.head(net.fc2(net.norm(net.fc1(x))))

    x, y = vectors(24, shape=(5,))
    layers = {"fc1": nn.Linear(5, 9), "norm": RmsNorm(9), "fc2": nn.Linear(9, 6), "head": nn.Linear(6, 4)}
    sets = {"a": Channels(9, {"fc1": own}), "b": Channels(6, {"fc2": own})}
    wires = {"fc1": ("a", None), "norm": ("a", None), "fc2": ("b", "a"), "head": (None, "b")}
    return Case(
        initialise(Net(run, **layers)),
        x,
        y,
        sets,
        wires,
        trace_options=lambda model: {"customized_pruners": {RmsNorm: RmsNormPruner()}},
    )


class Dense(nn.Module):
    """A linear layer written by hand, which neither torch nor Torch-Pruning knows."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_out, n_in))

    def forward(self, x):
        return x @ self.weight.T


class DensePruner(tp.pruner.BasePruningFunc):
    def prune_out_channels(self, layer, idxs):
        keep = [i for i in range(layer.weight.shape[0]) if i not in set(idxs)]
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
        return layer

    def prune_in_channels(self, layer, idxs):
        keep = [i for i in range(layer.weight.shape[1]) if i not in set(idxs)]
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 1)
        return layer

    def get_out_channels(self, layer):
        return layer.weight.shape[0]

    def get_in_channels(self, layer):
        return layer.weight.shape[1]


@case
def a_layer_of_the_users_own():
    def run(net, x):
        return net.head(net.dense2(F.relu(net.dense1(x)).flatten(1)))

    x, y = vectors(24, shape=(1, 5))
    layers = {"dense1": Dense(5, 8), "dense2": Dense(8, 7), "head": nn.Linear(7, 4)}
    sets = {"a": Channels(8, {"dense1": own}), "b": Channels(7, {"dense2": own})}
    wires = {"dense1": ("a", None), "dense2": ("b", "a"), "head": (None, "b")}
    return Case(
        initialise(Net(run, **layers)),
        x,
        y,
        sets,
        wires,
        options=lambda model: {"root_module_types": [nn.Linear, Dense]},
        selector={"channel_dims": {Dense: -1}},
        trace_options=lambda model: {"customized_pruners": {Dense: DensePruner()}},
    )


class Scaled(nn.Module):
    """Parameters outside of layers: one that scales the channels, one with a number for each channel and token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.position = nn.Parameter(torch.zeros(1, 3, 8))
        self.fc = nn.Linear(8, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, x):
        return self.head(self.fc(self.embed(x) * self.scale + self.position).mean(1))


def scaled(**options):
    x, y = vectors(24, shape=(3, 5))
    wires = {
        "scale": {0: "a"},
        "position": {2: "a"},
        "embed": ("a", None),
        "fc": ("b", "a"),
        "head": (None, "b"),
    }
    sets = {"a": Channels(8, {"embed": own}), "b": Channels(9, {"fc": own})}
    return Case(initialise(Scaled()), x, y, sets, wires, **options)


@case
def parameters_outside_of_layers():
    return scaled(trace_options=lambda m: {"unwrapped_parameters": [(m.scale, 0), (m.position, 2)]})


@case
def embedding():
    """Weights are [words, out]; the words are no channels."""

    def run(net, ids):
        x = net.words(ids)
        x = x + net.down(F.relu(net.up(x)))
        return net.head(x.mean(1))

    y = torch.arange(24) % 4
    ids = (torch.randint(7, (24, 5), generator=seeded()) + y[:, None]) % 11
    layers = {"words": nn.Embedding(11, 8), "up": nn.Linear(8, 6), "down": nn.Linear(6, 8), "head": nn.Linear(8, 4)}
    sets = {"a": Channels(8, {"words": own, "down": own}), "b": Channels(6, {"up": own})}
    wires = {"words.weight": {1: "a"}, "up": ("b", "a"), "down": ("a", "b"), "head": (None, "a")}
    return Case(initialise(Net(run, **layers)), ids, y, sets, wires)


def transformer(batch_first):
    def run(net, x):
        x = net.embed(x)
        x = net.layer(x if batch_first else x.transpose(0, 1))
        return net.head(x.mean(1 if batch_first else 0))

    x, y = vectors(24, shape=(3, 5))
    layers = {
        "embed": nn.Linear(5, 12),
        "layer": nn.TransformerEncoderLayer(12, 3, 10, batch_first=batch_first),
        "head": nn.Linear(12, 4),
    }
    # Heads are blocks of four: channel i of every head goes together.
    rows = all_slots("a", 3, 4)
    producers = dict.fromkeys(("embed", "layer.self_attn", "layer.linear2"), slots(3, 4))
    sets = {"a": Channels(4, producers), "b": Channels(10, {"layer.linear1": own})}

    def projections(k):
        return [12 * part + row for part in range(3) for row in rows(k)]

    wires = {
        "embed": (rows, None),
        "layer.self_attn.in_proj_weight": {0: projections, 1: rows},
        "layer.self_attn.in_proj_bias": {0: projections},
        "layer.self_attn.out_proj": (rows, rows),
        "layer.linear1": ("b", rows),
        "layer.linear2": (rows, "b"),
        "layer.norm1": (rows, None),
        "layer.norm2": (rows, None),
        "head": (None, rows),
    }
    return Case(initialise(Net(run, **layers)), x, y, sets, wires)


@case
def transformer_with_the_batch_first():
    return transformer(True)


@case
def transformer_with_the_time_first():
    return transformer(False)


@case
def linear_in_front_of_an_lstm():
    def run(net, x):
        return net.head(net.lstm(net.fc(x))[0].mean(1))

    x, y = vectors(24, shape=(3, 5))
    layers = {"fc": nn.Linear(5, 8), "lstm": nn.LSTM(8, 6, batch_first=True), "head": nn.Linear(6, 4)}
    wires = {"fc": ("a", None), "lstm.weight_ih_l0": {1: "a"}}
    return Case(initialise(Net(run, **layers)), x, y, {"a": Channels(8, {"fc": own})}, wires, ("head", "lstm"))


@pytest.fixture(params=CASES)
def one(request):
    return CASES[request.param]()


def half(n):
    return max(1, int(n * 0.5))


def assert_runs(model, x):
    outputs = model(x)
    assert outputs.shape == (len(x), 4)
    outputs.sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("ratio", [None, 0.5], ids=["knee", "half"])
def test_exactly_the_selected_components_go(one, ratio):
    selector = one.fit()
    distances = {name: distances_by_hand(selector, channels) for name, channels in one.sets.items()}
    if ratio is None:
        kept = {name: list(select_channels(d, knee=selector.knee).keep_idxs) for name, d in distances.items()}
    else:
        kept = {name: k_medoids(d, half(len(d))).medoids.tolist() for name, d in distances.items()}
    model, options = one.fresh()
    state = copy.deepcopy(model.state_dict())
    pruner = CoSePPruner(model, one.example, selector, pruning_ratio=ratio, **options)
    pruner.step()
    assert_same_state(model.state_dict(), one.pruned(state, kept))
    done = sorted(sorted(e.layers) for e in pruner.plan if e.selection)
    assert done == sorted(one.producers or [sorted(channels.measured) for channels in one.sets.values()])
    assert_runs(model, one.x[:3])
    again, _ = one.fresh()
    pruner.plan.apply(again, one.example, **one.trace_options(again))
    assert_same_state(again.state_dict(), model.state_dict())


def test_the_stock_pruner_keeps_the_best(one):
    selector = one.fit()
    kept = {}
    for name, channels in one.sets.items():
        scores = select_channels(distances_by_hand(selector, channels), knee=selector.knee).scores
        kept[name] = sorted(scores.topk(half(channels.n)).indices.tolist())
    model, options = one.fresh()
    state = copy.deepcopy(model.state_dict())
    tp.pruner.BasePruner(model, one.example, importance=selector, pruning_ratio=0.5, **options).step()
    assert_same_state(model.state_dict(), one.pruned(state, kept))
    assert_runs(model, one.x[:3])


def test_every_kept_component_is_the_medoid_of_its_cluster_by_energy(one):
    selector = one.fit(weights="energy", knee="guarded")
    model, options = one.fresh()
    pruner = CoSePPruner(model, one.example, selector, **options)
    planner, found = pruner.planner(), {}
    for view in map(planner.view, planner.groups()):
        found[view.name] = energies_of(view, selector.statistics.inputs), selector.distances(None, view=view)
    pruner.step()
    n_weighted = 0
    for plan in pruner.plan:
        if plan.selection is None or plan.unit == "head":
            continue
        e, d = found[plan.name]
        assert ("count alike" in plan.reason) == (e is None)
        e = torch.ones(len(d)) if e is None else e
        n_weighted += len(e.unique()) > 1
        labels = torch.tensor(plan.selection.labels)
        assert len(labels) == len(d)
        for j, medoid in enumerate(plan.selection.medoids):
            members = (labels == j).nonzero()[:, 0]
            deviations = (e[members, None] * d[members[:, None], members]).sum(0)
            assert deviations[members == medoid] <= deviations.min() * (1 + 1e-9)
    assert n_weighted or any("no consumer with weights was observed" in plan.reason for plan in pruner.plan)
    assert_runs(model, one.x[:3])


@pytest.mark.parametrize("k", range(1, 11))
def test_a_gated_unit_keeps_exactly_k_pairs(k):
    unit = CASES["gated_unit"]()
    unit.selector = {"keep": k}
    model, options = unit.fresh()
    CoSePPruner(model, unit.example, unit.fit(), **options).step()
    assert model.conv.out_channels == 2 * k
    assert model.after.in_channels == k
    assert_runs(model, unit.x[:3])


def test_readers_measure_what_addition_and_activation_make_of_the_channels():
    model, x, y = build("resnet", 10)
    model, x = model.double(), x.double()
    selector = fitted(model, x, y, observe="inputs")
    with torch.no_grad():
        a0 = F.relu(model.bn0(model.stem(x)))
        b = F.relu(model.bn1(model.conv1(a0)))
        a1 = F.relu(a0 + model.bn2(model.conv2(b)))
        c = F.relu(model.bn3(model.conv3(a1)))
        d = F.relu(model.bn4(model.conv4(c)) + model.bn5(model.shortcut(a1))).mean((2, 3))
    read = {"stem": x, "conv1": a0, "conv2": b, "conv3": a1, "shortcut": a1, "conv4": c, "head": d}
    assert set(selector.layers) == set(read)
    for name, tensor in read.items():
        assert_two_pass(selector.statistics.moments[name], tensor.numpy(), y, 2)


def joined_halves(net, x):
    """As in a ShuffleNet, but unshuffled: one half passes, the other goes through layers of its own."""
    a, b = net.stem(x).chunk(2, 1)
    return net.head(mean(torch.cat([a, net.conv2(F.relu(net.conv1(b)))], 1)))


def read_apart(net, x):
    a, b = net.stem(x).split([4, 7], 1)
    return net.head(mean(net.conv1(a) + net.conv2(b)))


SPLITS = {
    "joined halves": (
        joined_halves,
        {
            "stem": nn.Conv2d(3, 12, 1),
            "conv1": nn.Conv2d(6, 8, 3, padding=1),
            "conv2": nn.Conv2d(8, 6, 1),
            "head": nn.Linear(12, 4),
        },
    ),
    "unequal parts": (
        read_apart,
        {
            "stem": nn.Conv2d(3, 11, 1),
            "conv1": nn.Conv2d(4, 8, 1),
            "conv2": nn.Conv2d(7, 8, 1),
            "head": nn.Linear(8, 4),
        },
    ),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_a_split_whose_parts_go_separate_ways(kind):
    # The model's code says where to cut, so nothing can go in front of the cut, and the rest can.
    run, layers = SPLITS[kind]
    x, y = images(24, size=6)
    model = initialise(Net(run, **copy.deepcopy(layers)))
    before, weight = fingerprint(model), model.stem.weight
    with pytest.raises((InputError, PruningError), match=r"layer '\w+': .*ignored_layers"):
        CoSePPruner(model, x[:2], fitted(model, x, y), pruning_ratio=0.5).step()
    assert_untouched(model, before)
    CoSePPruner(model, x[:2], fitted(model, x, y), pruning_ratio=0.5, ignored_layers=[model.stem]).step()
    assert model.stem.weight is weight
    assert model.conv1.out_channels == 4
    assert_runs(model, x[:3])


def added_halves(net, x):
    a, b = net.stem(x).chunk(2, 1)
    return net.head(mean(net.conv1(a) + net.conv2(b)))


def shuffled(net, x):
    x = net.stem(x)
    x = x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
    return net.head(mean(net.conv(x)))


def channels_last(net, x):
    return net.head(F.relu(net.stem(x)).permute(0, 2, 3, 1).flatten(1))


@pytest.mark.parametrize(
    ("run", "consumers", "idxs"),
    [
        # Two of each half go, so that shapes fit whichever half each of the readers is taken to read.
        (
            added_halves,
            {"conv1": nn.Conv2d(6, 8, 1), "conv2": nn.Conv2d(6, 8, 1), "head": nn.Linear(8, 4)},
            [0, 1, 8, 9],
        ),
        # The first channel of both halves goes, so that what is left is still shuffled as before.
        (shuffled, {"conv": nn.Conv2d(12, 8, 1), "head": nn.Linear(8, 4)}, [0, 6]),
        # The channels of a pixel are next to each other, not the pixels of a channel.
        (channels_last, {"head": nn.Linear(12 * 36, 4)}, [0, 5]),
    ],
)
def test_what_shapes_do_not_show(run, consumers, idxs):
    x, y = images(24, size=6)
    model = initialise(Net(run, stem=nn.Conv2d(3, 12, 1), **copy.deepcopy(consumers)))
    masked, whole = copy.deepcopy(model), model(x).detach()
    masked.stem.weight.data[idxs], masked.stem.bias.data[idxs] = 0, 0
    with contextlib.suppress(InputError, PruningError):
        for group in CoSePPruner(model, x[:2], fitted(model, x, y)).step(interactive=True):
            if group[0].dep.target.module is model.stem:
                group.prune(idxs)
    # Either it is refused, or the model computes what it did without these channels.
    torch.testing.assert_close(model(x), whole if model.stem.out_channels == 12 else masked(x))


def halves_of_three(net, x):
    a, b = net.a(x), net.b(x)
    return net.head(mean(torch.cat([a, b], 1) + net.both(x))) + net.aside(mean(a))


def shared(net, x):
    return net.head(mean(torch.cat([net.c(net.a(x)), net.c(net.b(x))], 1)))


def reused(net, x):
    return net.head(mean(net.c(net.c(net.stem(x)))))


def crossed(net, x):
    return net.head(mean(torch.cat([net.a(x), net.b(x)], 1) + torch.cat([net.b(x), net.a(x)], 1)))


def borders_that_differ(net, x):
    return net.head(mean(torch.cat([net.a(x), net.b(x)], 1) + torch.cat([net.c(x), net.d(x)], 1)))


def nested(net, x):
    ab = torch.cat([net.a(x), net.b(x)], 1)
    return net.head(mean(torch.cat([ab, net.e(ab)], 1) + torch.cat([net.c(x), net.d(x)], 1)))


def in_both_orders(net, x):
    a, b = net.a(x), net.b(x)
    return net.head(mean(torch.cat([a, b, a], 1))) + net.aside(mean(torch.cat([b, a], 1)))


JOINS = [
    (halves_of_three, {"a": (3, 5), "b": (3, 6), "both": (3, 11)}, {"head": 11, "aside": 5}),
    (shared, {"a": (3, 6), "b": (3, 6), "c": (6, 5)}, {"head": 10}),
    (reused, {"stem": (3, 6), "c": (6, 6)}, {"head": 6}),
    (crossed, {"a": (3, 6), "b": (3, 6)}, {"head": 12}),
    (borders_that_differ, {"a": (3, 5), "b": (3, 6), "c": (3, 6), "d": (3, 5)}, {"head": 11}),
    (nested, {"a": (3, 5), "b": (3, 6), "e": (11, 4), "c": (3, 6), "d": (3, 9)}, {"head": 15}),
    (in_both_orders, {"a": (3, 5), "b": (3, 6)}, {"head": 16, "aside": 11}),
]


@pytest.mark.parametrize("ratio", [None, 0.3, 0.5])
@pytest.mark.parametrize(("run", "convs", "heads"), JOINS)
def test_a_pruned_model_computes_what_it_did_without_the_channels(run, convs, heads, ratio):
    x, y = images(24, size=6)
    layers = {name: nn.Conv2d(*shape, 1) for name, shape in convs.items()}
    model = initialise(Net(run, **layers, **{name: nn.Linear(n, 4) for name, n in heads.items()}))
    masked, fresh = copy.deepcopy(model), copy.deepcopy(model)
    pruner = CoSePPruner(model, x[:2], fitted(model, x, y), pruning_ratio=ratio)
    pruner.step()
    lost = lost_channels(fresh, x[:2], pruner.plan, {})["out"]
    for name, (_, n) in convs.items():
        layer, gone = masked.get_submodule(name), sorted(lost.get(name, ()))
        assert model.get_submodule(name).out_channels == n - len(gone)
        layer.weight.data[gone], layer.bias.data[gone] = 0, 0
    assert any(lost.values())
    torch.testing.assert_close(model(x), masked(x))
    assert_runs(model, x[:3])
    assert_same_state(pruner.plan.apply(fresh, x[:2]).state_dict(), model.state_dict())


@pytest.mark.slow
def test_a_shufflenet_is_pruned_or_left_as_it_was():
    models = pytest.importorskip("torchvision").models
    model, (x, y) = initialise(models.ShuffleNetV2([1, 1, 1], [8, 8, 16, 16, 32], num_classes=4)), images(16, size=16)
    before, whole = fingerprint(model), model(x).detach()
    try:
        CoSePPruner(model, x[:2], fitted(model, x, y), pruning_ratio=0.5).step()
    except (InputError, PruningError):
        assert_untouched(model, before)
        assert torch.equal(model(x), whole)
    assert_runs(model, x[:3])


@pytest.mark.parametrize("groups", [2, 3])
def test_a_transposed_convolution_with_groups_is_compared_by_slots_and_cannot_be_pruned(groups):
    def run(net, x):
        return net.head(mean(net.up(F.relu(net.stem(x)))))

    x, y = images(24, size=6)
    up = nn.ConvTranspose2d(12, 6, 2, groups=groups)
    model = initialise(Net(run, stem=nn.Conv2d(3, 12, 1), up=up, head=nn.Linear(6, 4)))
    selector, before = fitted(model, x, y), fingerprint(model)
    for name, n in (("stem", 12 // groups), ("up", 6 // groups)):
        by_hand = distances_by_hand(selector, Channels(n, {name: slots(groups, n)}))
        torch.testing.assert_close(selector.distances(group_with(model, x, name)), by_hand)
        # Torch-Pruning 1.6.1 takes its weights, [in, out / groups], for those of an ordinary grouped convolution.
        other = {"stem": "up", "up": "stem"}[name]
        pruner = CoSePPruner(model, x[:2], selector, pruning_ratio=0.5, pruning_ratio_dict={other: 0.0})
        with pytest.raises(PruningError, match=f"layer '{name}': .*model is as it was"):
            pruner.step()
        assert_untouched(model, before)


def lstm_net(run, **layers):
    x, y = vectors(24, shape=(3, 5))
    return initialise(Net(run, **layers)), x, y


def read_by_lstm(net, x):
    return net.head(net.lstm(net.fc(x))[0].mean(1))


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"num_layers": 2}, {"bias": False}], ids=lambda o: next(iter(o), "plain")
)
def test_an_lstm_loses_inputs_and_keeps_its_outputs(options):
    lstm = nn.LSTM(8, 6, batch_first=True, **options)
    model, x, y = lstm_net(read_by_lstm, fc=nn.Linear(5, 8), lstm=lstm, head=nn.Linear(6 * (1 + lstm.bidirectional), 4))
    selector, state = fitted(model, x, y), copy.deepcopy(model.state_dict())
    kept = k_medoids(distances_by_hand(selector, Channels(8, {"fc": own})), 4).medoids
    fresh = copy.deepcopy(model)
    pruner = CoSePPruner(model, x[:2], selector, pruning_ratio=0.5)
    pruner.step()
    for key, value in model.state_dict().items():
        dim = {"fc.weight": 0, "fc.bias": 0, "lstm.weight_ih_l0": 1, "lstm.weight_ih_l0_reverse": 1}.get(key)
        assert torch.equal(value, state[key] if dim is None else state[key].index_select(dim, kept)), key
    (group_plan,) = [e for e in pruner.plan if e.name == "lstm"]
    assert group_plan.selection is None
    assert group_plan.reason == "Torch-Pruning cannot prune the outputs of a recurrent layer"
    assert_runs(model, x[:3])
    assert_same_state(pruner.plan.apply(fresh, x[:2]).state_dict(), model.state_dict())


def test_a_linear_layer_that_is_added_to_an_lstms_outputs():
    # Torch-Pruning 1.6.1 breaks an LSTM whose outputs it prunes: its recurrent weights are [4 hidden, hidden].
    def run(net, x):
        return net.head((net.lstm(x)[0] + net.fc(x)).mean(1))

    model, x, y = lstm_net(run, fc=nn.Linear(5, 8), lstm=nn.LSTM(5, 8, batch_first=True), head=nn.Linear(8, 4))
    state, expected = copy.deepcopy(model.state_dict()), model(x).detach()
    with contextlib.suppress(PruningError):
        CoSePPruner(model, x[:2], fitted(model, x, y), pruning_ratio=0.5).step()
    if model.fc.out_features == 8:
        assert_same_state(model.state_dict(), state)
        assert torch.equal(model(x), expected)
    assert_runs(model.train(), x[:3])


def test_a_gate_of_one_channel():
    def run(net, x):
        return net.head(mean(net.conv(x) * net.gate(x).sigmoid()))

    x, y = images(24, size=6)
    layers = {"conv": nn.Conv2d(3, 8, 1), "gate": nn.Conv2d(3, 1, 1), "head": nn.Linear(8, 4)}
    model = initialise(Net(run, **layers))
    selector, before = fitted(model, x, y), fingerprint(model)
    with pytest.raises(InputError, match=r"layer '\w+': expected \d+ channels or more.*something is broadcast"):
        CoSePPruner(model, x[:2], selector, pruning_ratio=0.5).step()
    assert_untouched(model, before)
    for left_alone in ("gate", "conv"):
        pruner = CoSePPruner(model, x[:2], selector, pruning_ratio=0.5, ignored_layers=[left_alone])
        pruner.step()
        assert_untouched(model, before)
        assert {e.name: e.selection for e in pruner.plan} == dict.fromkeys(("conv", "gate", "head"))


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_a_group_in_which_nothing_is_measured(ratio):
    own_layer = CASES["a_layer_of_the_users_own"]()
    own_layer.selector = {}
    model, options = own_layer.fresh()
    before = fingerprint(model)
    pruner = CoSePPruner(model, own_layer.example, own_layer.fit(), pruning_ratio=ratio, **options)
    pruner.step()
    assert_untouched(model, before)
    reasons = {e.name: e.reason for e in pruner.plan if e.name != "head"}
    assert reasons == dict.fromkeys(("dense1", "dense2"), "none of its layers could be measured")
    assert {e.selection for e in pruner.plan} == {None}
    assert {e.name: e.layers for e in pruner.plan if e.name != "head"} == {"dense1": ("dense1",), "dense2": ("dense2",)}


class Tokens(nn.Module):
    """A parameter with a number for each token, which a trace takes for one for each channel."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.gain = nn.Parameter(torch.ones(1, 3, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head((self.embed(x) * self.gain).mean(1))


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected:UserWarning")
@pytest.mark.parametrize("name_it", [lambda m: "gain", lambda m: m.gain], ids=["by name", "itself"])
def test_an_ignored_parameter(name_it):
    x, y = vectors(24, shape=(3, 5))
    model = initialise(Tokens())
    fresh, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    selector = fitted(model, x, y)
    kept = k_medoids(distances_by_hand(selector, Channels(8, {"embed": own})), 4).medoids
    pruner = CoSePPruner(model, x[:2], selector, pruning_ratio=0.5, ignored_layers=[name_it(model)])
    pruner.step()
    state["embed.weight"], state["embed.bias"] = state["embed.weight"][kept], state["embed.bias"][kept]
    state["head.weight"] = state["head.weight"][:, kept]
    assert_same_state(model.state_dict(), state)
    assert pruner.plan.ignored_params == ("gain",)
    assert_runs(model, x[:3])
    assert_same_state(pruner.plan.apply(fresh, x[:2]).state_dict(), state)


def test_parameters_outside_of_layers_can_be_given_as_a_dict():
    plain = CASES["parameters_outside_of_layers"]()
    selector, states = plain.fit(), []
    for form in (list, dict):
        model, options = plain.fresh()
        options["unwrapped_parameters"] = form(options["unwrapped_parameters"])
        given = copy.copy(options["unwrapped_parameters"])
        pruner = CoSePPruner(model, plain.example, selector, pruning_ratio=0.5, **options)
        pruner.step()
        assert len(options["unwrapped_parameters"]) == len(given) == 2
        again, more = plain.fresh()
        pruner.plan.apply(again, plain.example, unwrapped_parameters=form(more["unwrapped_parameters"]))
        states += [model.state_dict(), again.state_dict()]
    for state in states:
        assert_same_state(state, states[0])
    assert states[0]["position"].shape == (1, 3, 4)


def small_densenet():
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=4)


def small_regnet(norm=None):
    from torchvision.models import RegNet
    from torchvision.models.regnet import BlockParams

    blocks = BlockParams([1, 2], [8, 16], [4, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return RegNet(blocks, num_classes=4, stem_width=8, norm_layer=norm)


def small_convnext():
    from torchvision.models import ConvNeXt
    from torchvision.models.convnext import CNBlockConfig

    return ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=4)


def small_mobilenet():
    from torchvision.models import MobileNetV2

    model = MobileNetV2(4, inverted_residual_setting=[[1, 8, 1, 1], [2, 8, 2, 2]], width_mult=0.25)
    model.features[-1] = nn.Conv2d(8, 10, 1)
    model.classifier = nn.Linear(10, 4)
    return model


def small_vgg():
    from torchvision.models.vgg import make_layers

    features = make_layers([8, "M", 10], batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(40, 9), nn.ReLU(), nn.Linear(9, 4))


def small_inception():
    from torchvision.models.googlenet import Inception

    blocks = [Inception(3, 6, 5, 7, 4, 5, 6), Inception(24, 5, 4, 6, 5, 5, 4)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 4))


def small_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 8, num_layers=1, num_heads=2, hidden_dim=12, mlp_dim=10, num_classes=4)


def adapt_vit(model):
    model.hidden_dim = model.conv_proj.out_channels


def layer_scales(model):
    return {"unwrapped_parameters": [(p, 0) for name, p in model.named_parameters() if "layer_scale" in name]}


def tokens_of_vit(model):
    return {"unwrapped_parameters": [(model.class_token, 2), (model.encoder.pos_embedding, 2)]}


REAL = {
    "densenet": (small_densenet, {}),
    "regnet": (small_regnet, {}),
    "regnet with group norm": (lambda: small_regnet(lambda width: nn.GroupNorm(2, width)), {}),
    "convnext": (small_convnext, {"trace_options": layer_scales}),
    "mobilenet": (small_mobilenet, {}),
    "vgg": (small_vgg, {}),
    "inception": (small_inception, {}),
    "vit": (small_vit, {"trace_options": tokens_of_vit, "adapt": adapt_vit}),
}


def lost_channels(model, example, plan, options):
    """Rows that a plan takes from every layer's outputs and inputs, from groups of the unpruned model."""
    graph, lost = trace(model, example, **options), {"out": {}, "in": {}}
    for group_plan in plan:
        if group_plan.selection is None:
            continue
        layer = model.get_submodule(group_plan.name)
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        view = read_group(graph.get_pruning_group(layer, prune, list(range(group_plan.selection.n_channels))))
        for side, members in (("out", view.producers), ("in", view.consumers)):
            for member in members:
                gone = [
                    row
                    for row, channel in zip(member.rows.tolist(), member.channels.tolist(), strict=True)
                    if channel in group_plan.selection.prune_idxs
                ]
                lost[side].setdefault(member.name, set()).update(gone)
    return lost


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.slow
def test_models_of_torchvision(kind):
    pytest.importorskip("torchvision")
    make, given = REAL[kind]
    model, (x, y) = initialise(make()), images(16, size=16)
    trace_options, adapt = given.get("trace_options", lambda model: {}), given.get("adapt")
    fresh = copy.deepcopy(model)
    pruner = CoSePPruner(model, x[:2], fitted(model, x, y), pruning_ratio=0.5, adapt=adapt, **trace_options(model))
    pruner.step()
    lost = lost_channels(fresh, x[:2], pruner.plan, trace_options(fresh))
    for name, layer in fresh.named_modules():
        # The output projection of torch's attention is a part of it: its weights are the attention layer's.
        if type(layer) not in (nn.Conv2d, nn.Linear, nn.BatchNorm2d):
            continue
        # A grouped convolution has the inputs of one channel group in dimension 1, the same in each of them.
        is_depthwise = getattr(layer, "groups", 1) == layer.weight.shape[0]
        gone = lost["out"].get(name, set()), set() if is_depthwise else lost["in"].get(name, set())
        expected = layer.weight.detach()
        for dim, rows in enumerate(gone[: expected.dim()]):
            expected = expected.index_select(
                dim, torch.tensor([i for i in range(expected.shape[dim]) if i not in rows])
            )
        assert torch.equal(model.get_submodule(name).weight, expected), name
    assert sum(len(rows) for rows in lost["out"].values()) > 0
    assert_runs(model, x[:3])
    pruner.plan.apply(fresh, x[:2], adapt=adapt, **trace_options(fresh))
    assert_same_state(fresh.state_dict(), model.state_dict())
