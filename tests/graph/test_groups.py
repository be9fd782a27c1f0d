import pytest
import torch
import torch_pruning as tp
from models import PRODUCERS, assert_untouched, build, fingerprint, initialise
from torch import nn

from tp_cosep.errors import InputError
from tp_cosep.graph.groups import full_group, l1_norms, module_names, prunable_groups, read_group
from tp_cosep.graph.tracing import trace

ROOTS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def groups_by_root(model, x, ignored=()):
    graph = trace(model, x)
    names = {m: name for name, m in model.named_modules()}
    return {names[g[0].dep.target.module]: g for g in graph.get_all_groups(list(ignored), ROOTS)}


def producers(view):
    """Members that are convolutions or linear layers: name → (rows, components)."""
    layers = [m for m in view.producers if isinstance(m.layer, ROOTS)]
    return {m.name: (m.rows.tolist(), m.components.tolist()) for m in layers}


def group_of(model, x, name):
    """The group that creates the channels of a layer."""
    graph = trace(model, x)
    layer = model.get_submodule(name)
    pruner = graph.get_pruner_of_module(layer)
    return graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(graph.get_out_channels(layer))))


@pytest.mark.parametrize("width", [10, 64])
@pytest.mark.parametrize("kind", ["vgg", "resnet", "mlp"])
def test_members_are_the_layers_that_create_the_channels(kind, width):
    model, x, _ = build(kind, width)
    found = {}
    for name, group in groups_by_root(model, x[:1], [model.head]).items():
        view = read_group(group)
        assert view.name == name
        assert view.root is model.get_submodule(name)
        assert view.n_channel_groups == 1
        assert view.n_components == view.n_channels == view.root.weight.shape[0]
        identity = list(range(view.n_channels))
        assert all(pair == (identity, identity) for pair in producers(view).values())
        assert all(m.n_channels == view.n_channels for m in view.producers)
        found[name] = set(producers(view))
    expected = [set(layers) for layers in PRODUCERS[kind].values()]
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, expected))
    assert all(name in members for name, members in found.items())


class Concat(nn.Module):
    """Two layers side by side, the first one twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 5, 1)
        self.b = nn.Conv2d(3, 6, 1)
        self.bn = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        a = self.a(x)
        return self.head(self.bn(torch.cat([a, self.b(x), a], 1)).mean((2, 3)))


def test_concatenation_shifts_rows_and_repeats_components():
    model, x = Concat().eval(), torch.zeros(1, 3, 4, 4)
    views = {name: read_group(group) for name, group in groups_by_root(model, x, [model.head]).items()}
    assert producers(views["a"]) == {"a": ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])}
    (bn,) = [m for m in views["a"].producers if m.name == "bn"]
    assert bn.n_channels == 16
    pairs = sorted(zip(bn.rows.tolist(), bn.components.tolist(), strict=True))
    assert pairs == [(i, i) for i in range(5)] + [(11 + i, i) for i in range(5)]
    (bn,) = [m for m in views["b"].producers if m.name == "bn"]
    assert sorted(zip(bn.rows.tolist(), bn.components.tolist(), strict=True)) == [(5 + i, i) for i in range(6)]


class Joined(nn.Module):
    """Two layers side by side, and a third that is added to both."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 5, 1)
        self.b = nn.Conv2d(3, 6, 1)
        self.both = nn.Conv2d(3, 11, 1)
        self.head = nn.Linear(11, 4)

    def forward(self, x):
        return self.head((torch.cat([self.a(x), self.b(x)], 1) + self.both(x)).mean((2, 3)))


def test_layers_that_create_a_part_of_the_channels():
    model, x = Joined().eval(), torch.zeros(1, 3, 4, 4)
    view = read_group(group_of(model, x, "both"))
    everything = list(range(11))
    assert producers(view) == {
        "both": (everything, everything),
        "a": ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        "b": ([0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]),
    }
    assert {m.name: m.n_channels for m in view.producers if m.name in "ab"} == {"a": 5, "b": 6}


def channel_groups_net(*, norm_groups=None, conv_groups=1, width=12):
    norm = nn.GroupNorm(norm_groups, width) if norm_groups else nn.Identity()
    inner = nn.Conv2d(width, width, 3, padding=1, groups=conv_groups)
    return nn.Sequential(
        nn.Conv2d(3, width, 1), norm, nn.ReLU(), inner, nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 4)
    ).eval()


@pytest.mark.parametrize(
    ("options", "n_groups"),
    [
        ({"norm_groups": 3}, 3),
        ({"conv_groups": 4}, 4),
        ({"conv_groups": 12}, 1),  # depthwise: every channel goes its own way
        ({"norm_groups": 4, "conv_groups": 2}, 4),
        ({"norm_groups": 2, "conv_groups": 12}, 2),
        ({}, 1),
    ],
)
def test_channel_groups(options, n_groups):
    model = channel_groups_net(**options)
    view = read_group(group_of(model, torch.zeros(1, 3, 4, 4), "0"))
    assert (view.n_channels, view.n_channel_groups, view.n_components) == (12, n_groups, 12 // n_groups)
    rows, components = producers(view)["0"]
    assert [r % view.n_components for r in rows] == components
    slot_1 = [i for i in range(12) if i % view.n_components == 0]
    assert view.channels_of([0]) == slot_1
    assert view.channels_of(range(view.n_components)) == list(range(12))
    assert read_group(group_of(model, torch.zeros(1, 3, 4, 4), "6")).n_channel_groups == 1


def test_channel_groups_that_the_pruner_was_told_of():
    model, x = channel_groups_net(), torch.zeros(1, 3, 4, 4)
    group = group_of(model, x, "0")
    assert read_group(group, {}, {model[0]: 6}).n_channel_groups == 6
    assert read_group(group, {model[3]: 2}, {model[0]: 3}).n_channel_groups == 3
    assert read_group(group, {model[3]: 2}, {}).n_channel_groups == 2
    # A dict for inputs says nothing about outputs.
    assert read_group(group, {model[0]: 6}, {model[3]: 6}).n_channel_groups == 1
    with pytest.raises(InputError, match=r"layer '0': .* divisible by its 5 channel groups, got 12"):
        read_group(group, {}, {model[0]: 5})


def test_the_pruner_sees_the_same_channel_groups():
    x = torch.zeros(1, 3, 4, 4)
    for options in ({"norm_groups": 3}, {"conv_groups": 4}, {"conv_groups": 12}, {"norm_groups": 4, "conv_groups": 2}):
        model = channel_groups_net(**options)
        pruner = tp.pruner.MetaPruner(
            model, x, tp.importance.RandomImportance(), in_channel_groups={}, out_channel_groups={}, num_heads={}
        )
        for group in pruner.DG.get_all_groups():
            assert pruner._get_channel_groups(group) == read_group(group).n_channel_groups


@pytest.mark.parametrize("name", ["0", "6"])
def test_a_part_of_a_group_stands_for_the_whole(name):
    model = channel_groups_net()
    graph = trace(model, torch.zeros(1, 3, 4, 4))
    layer = model.get_submodule(name)
    prune = graph.get_pruner_of_module(layer).prune_out_channels
    n = graph.get_out_channels(layer)
    whole = graph.get_pruning_group(layer, prune, list(range(n)))
    assert full_group(whole) is whole
    part = graph.get_pruning_group(layer, prune, [2])
    assert list(full_group(part)[0].idxs) == list(range(n))
    assert [d.target.module for d, _ in full_group(part)] == [d.target.module for d, _ in whole]
    pruned = graph.get_pruner_of_module(model[6]).prune_in_channels
    inputs = graph.get_pruning_group(model[6], pruned, [0])
    assert list(full_group(inputs)[0].idxs) == list(range(16 * 12))


def test_a_group_made_by_hand_is_refused():
    with pytest.raises(InputError, match=r"group of a DependencyGraph .* got one made by hand"):
        module_names(tp.dependency.Group())


def test_ignored_layers_and_root_types_select_the_groups():
    model, x, _ = build("resnet", 10)
    graph = trace(model, x[:1])

    def roots(ignored, types=ROOTS):
        return {frozenset(producers(read_group(g))) for g in prunable_groups(graph, ignored, types)}

    everything = {frozenset(s) for s in (("stem", "conv2"), ("conv1",), ("conv3",), ("conv4", "shortcut"), ("head",))}
    assert roots([]) == everything
    assert roots([model.head]) == everything - {frozenset(["head"])}
    assert roots([model.conv2, model.head.weight]) == everything - {frozenset(["stem", "conv2"])}
    assert roots([], [nn.Linear]) == {frozenset(["head"])}
    # A container stands for all that is in it.
    box = nn.Sequential(model.conv1, nn.Sequential(model.conv3))
    assert roots([box]) == everything - {frozenset(["conv1"]), frozenset(["conv3"])}


def test_tracing_keeps_modes_buffers_and_gradients():
    model, x, _ = build("resnet", 10)
    model.train()
    model.bn1.eval()
    model(x).sum().backward()
    before = fingerprint(model)
    trace(model, x[:1])
    with torch.no_grad():
        trace(model, x[:1])
    assert_untouched(model, before)
    with pytest.raises(RuntimeError):
        trace(model, x[:1, :2])
    assert [m.training for m in model.modules()] == [m is not model.bn1 for m in model.modules()]


def test_l1_norms_of_convolutions_and_linear_layers():
    model, x, _ = build("vgg", 10)
    for name in ("conv2", "fc", "head"):
        weight = model.get_submodule(name).weight
        expected = torch.stack([row.double().abs().sum() for row in weight.detach()])
        torch.testing.assert_close(l1_norms(read_group(group_of(model, x[:1], name))), expected)


def test_l1_norms_add_up_over_the_producers():
    model, x, _ = build("resnet", 10)
    weights = [model.conv4.weight.detach().double(), model.shortcut.weight.detach().double()]
    expected = sum(w.abs().sum((1, 2, 3)) for w in weights)
    torch.testing.assert_close(l1_norms(read_group(group_of(model, x[:1], "conv4"))), expected)


def test_l1_norms_of_a_part_and_of_channel_groups():
    model = initialise(Joined())
    norms = l1_norms(read_group(group_of(model, torch.zeros(1, 3, 4, 4), "both")))
    a, b, both = (w.detach().double().abs().sum((1, 2, 3)) for w in (model.a.weight, model.b.weight, model.both.weight))
    torch.testing.assert_close(norms, both + torch.cat([a, b]))
    model = initialise(channel_groups_net(norm_groups=3))
    norms = l1_norms(read_group(group_of(model, torch.zeros(1, 3, 4, 4), "0")))
    per_channel = model[0].weight.detach().double().abs().sum((1, 2, 3))
    torch.testing.assert_close(norms, torch.stack([per_channel[s::4].sum() for s in range(4)]))


@pytest.mark.parametrize("groups", [1, 2])
def test_l1_norms_of_a_transposed_convolution(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    model = initialise(nn.Sequential(layer, nn.Flatten(), nn.Linear(6 * 36, 4)))
    view = read_group(group_of(model, torch.zeros(1, 4, 4, 4), "0"))
    # By use: only the weights of channel c reach output channel c, so a gradient finds them.
    expected = []
    for c in range(6):
        model.zero_grad()
        layer(torch.ones(1, 4, 9, 9))[0, c, 4, 4].backward()
        expected.append((layer.weight.grad * layer.weight).abs().sum().double().detach())
    expected = torch.stack(expected).view(view.n_channel_groups, -1).sum(0)
    torch.testing.assert_close(l1_norms(view), expected)


def test_l1_norms_of_an_embedding_are_those_of_its_columns():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 10)
            self.fc = nn.Linear(10, 10)
            self.head = nn.Linear(10, 3)

        def forward(self, ids):
            x = self.embedding(ids)
            return self.head((x + self.fc(x)).mean(1))

    model = initialise(Text())
    view = read_group(group_of(model, torch.zeros(1, 5, dtype=torch.int64), "fc"))
    assert {m.name for m in view.producers} == {"fc", "embedding"}
    rows, columns = model.fc.weight.detach().double(), model.embedding.weight.detach().double()
    torch.testing.assert_close(l1_norms(view), rows.abs().sum(1) + columns.abs().sum(0))
