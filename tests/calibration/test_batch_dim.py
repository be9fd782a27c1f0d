"""Where a layer's tensors hold the samples: found by brute force here, and by two short runs in the library."""

import itertools
import warnings

import pytest
import torch
from fitted import fitted
from models import Lambda, assert_untouched, build, fingerprint, images, initialise, seeded, vectors
from torch import nn
from torch.nn import functional as F
from two_pass import assert_two_pass, collect_moments

from tp_cosep import CoSePPruner, CoSePSelector, ReconstructionSelector
from tp_cosep.calibration.batch_dim import Layout, find_layout, to_samples
from tp_cosep.errors import InputError


def collect(model, loader, **options):
    return collect_moments(model, loader, **{"progress": False, **options})


def numbered(n, *shape):
    """Samples whose numbers are all different, ``[n, *shape]``; the first ones of more are those of fewer."""
    return torch.randn(8, *shape, generator=seeded())[:n]


def batch_first(x):
    return x


def time_first(x):
    return x.transpose(0, 1)


def third(x):
    return x.movedim(0, 2)


def folded(x):
    """Windows of one sample next to each other: ``[samples · windows, ...]``."""
    return x.flatten(0, 1)


def folded_by_position(x):
    """The first window of every sample, then the second: ``[windows · samples, ...]``."""
    return x.transpose(0, 1).flatten(0, 1)


def folded_behind(x):
    """Behind a dimension of its own: ``[tokens, samples · windows, channels]``."""
    return x.flatten(0, 1).transpose(0, 1)


ARRANGED = {
    "batch first": (batch_first, (4, 5), Layout(0)),
    "vectors": (batch_first, (5,), Layout(0)),
    "maps": (batch_first, (4, 2, 5), Layout(0)),
    "time first": (time_first, (4, 5), Layout(1)),
    "time first, as many as samples": (time_first, (3, 5), Layout(1)),
    "batch first, as many as samples": (batch_first, (3, 5), Layout(0)),
    "third": (third, (2, 4, 5), Layout(2)),
    "windows": (folded, (4, 2, 5), Layout(0)),
    "windows by position": (folded_by_position, (4, 2, 5), Layout(0, is_minor=True)),
    "windows, as many as samples": (folded, (3, 2, 5), Layout(0)),
    "windows by position, as many as samples": (folded_by_position, (3, 2, 5), Layout(0, is_minor=True)),
    "windows behind": (folded_behind, (4, 2, 5), Layout(1)),
}


def rows_of_samples(arranged, n):
    """Sample by sample the set of ``(channels of one position)``, whatever the order of positions."""
    return [sorted(sample.reshape(len(sample), -1).T.tolist()) for sample in arranged[:n]]


def brute_force(more, fewer, n_more, n_fewer):
    """All layouts under which the first samples of more are the samples of fewer, to the last digit."""
    found = set()
    for dim, is_minor in itertools.product(range(more.dim() - 1), (False, True)):
        a, b = more.movedim(dim, 0), fewer.movedim(dim, 0)
        if a.shape[1:] != b.shape[1:] or len(a) % n_more or len(b) % n_fewer or len(a) // n_more != len(b) // n_fewer:
            continue
        n_rows = len(a) // n_more
        if n_rows == 1 and is_minor:
            continue

        def row(n, sample, position, is_minor=is_minor, n_rows=n_rows):
            return position * n + sample if is_minor else sample * n_rows + position

        cells = itertools.product(range(n_fewer), range(n_rows))
        if all(torch.equal(a[row(n_more, s, p)], b[row(n_fewer, s, p)]) for s, p in cells):
            found.add(Layout(dim, is_minor))
    return found


@pytest.mark.parametrize(("n_more", "n_fewer"), [(3, 2), (2, 1), (7, 3)])
@pytest.mark.parametrize("kind", ARRANGED)
def test_the_layout_is_the_one_under_which_the_first_samples_are_the_first(kind, n_more, n_fewer):
    arrange, shape, expected = ARRANGED[kind]
    more, fewer = arrange(numbered(n_more, *shape)), arrange(numbered(n_fewer, *shape))
    found = find_layout(more, fewer, n_more, n_fewer)
    if n_fewer > 1:
        assert brute_force(more, fewer, n_more, n_fewer) == {expected}
    assert found in brute_force(more, fewer, n_more, n_fewer)
    assert found == expected


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", ARRANGED)
def test_samples_have_all_their_positions_and_no_others(kind, n):
    arrange, shape, layout = ARRANGED[kind]
    x = numbered(n, *shape)
    samples = to_samples(arrange(x), layout, n)
    assert samples.shape[:2] == (n, shape[-1])
    assert rows_of_samples(samples, n) == rows_of_samples(x.movedim(-1, 1), n)


def test_rounding_that_depends_on_the_batch_is_no_difference():
    more, fewer = (folded_by_position(numbered(n, 4, 2, 5)) for n in (3, 2))
    noise = 1e-6 * torch.randn(fewer.shape, generator=seeded(1))
    assert find_layout(more, fewer + noise, 3, 2) == Layout(0, is_minor=True)
    assert find_layout(more, fewer + 1e5 * noise, 3, 2) is None


def test_values_that_are_not_a_number_are_equal_to_themselves():
    more, fewer = folded(numbered(3, 4, 2, 5)), folded(numbered(2, 4, 2, 5))
    more[0, 0], fewer[0, 0] = torch.nan, torch.nan
    assert find_layout(more, fewer, 3, 2) == Layout(0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_windows_with_values_that_are_not_finite_are_refused_by_the_name_of_the_layer(value):
    model = initialise(Sequence(*ARRANGEMENTS["windows"]))
    model.fc1.bias.data[3] = value
    x, y = vectors(24, shape=(4, 5))
    before = fingerprint(model)
    with pytest.raises(InputError, match=r"layer 'fc\d': got NaN or infinite activations"):
        collect(model, [(x, y)])
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("more", "fewer"),
    [
        (torch.ones(4, 5), torch.ones(4, 5)),  # the same for any number of samples
        (torch.ones(3, 3, 5), torch.ones(2, 2, 5)),  # grows in two dimensions, as a similarity of samples does
        (torch.ones(4, 5), torch.ones(3, 5)),  # grows, but not with the samples
        (torch.ones(6, 5), torch.ones(6, 4)),  # the channels grow
        (torch.ones(3, 4, 5), torch.ones(2, 5)),
        (numbered(6, 5), numbered(6, 5)[[0, 2, 4, 1]]),  # shuffled
        (numbered(6, 5), numbered(6, 5)[2:]),  # the last ones
    ],
    ids=["constant", "two grow", "no multiple", "channels grow", "other dimensions", "shuffled", "others"],
)
def test_what_has_no_layout(more, fewer):
    assert find_layout(more, fewer, 3, 2) is None


def test_rows_that_are_no_multiple_of_the_samples():
    assert to_samples(torch.ones(7, 5), Layout(), 3) is None
    assert to_samples(torch.ones(0, 5), Layout(), 3) is None
    assert to_samples(torch.ones(4, 7, 5), Layout(1), 3) is None


class Sequence(nn.Module):
    """Layers on ``[samples, time, channels]``; ``arrange`` changes that in front of them, ``back`` behind them."""

    def __init__(self, arrange, back):
        super().__init__()
        self.arrange, self.back = arrange, back
        self.fc1, self.fc2, self.head = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 4)

    def forward(self, x):
        n = len(x)
        x = self.fc2(F.relu(self.fc1(self.arrange(x))))
        return self.head(self.back(x, n).mean(1))


ARRANGEMENTS = {
    "time first": (time_first, lambda x, n: x.transpose(0, 1)),
    "windows": (lambda x: x.reshape(-1, 2, 5), lambda x, n: x.reshape(n, -1, 6)),
    "tokens as samples": (folded, lambda x, n: x.reshape(n, -1, 6)),
    "tokens as samples by position": (folded_by_position, lambda x, n: x.reshape(-1, n, 6).transpose(0, 1)),
}
SPLITS = {"whole": [24], "equal": [8, 8, 8], "last smaller": [10, 10, 4], "ones": [1] * 24, "one first": [1, 20, 3]}


@pytest.mark.parametrize("observe", ["outputs", "inputs"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ARRANGEMENTS)
def test_moments_are_those_of_the_model_with_the_batch_first(kind, split, observe):
    # One cell: the positions of a window are in another order than the tokens of a sample. Time is 4.
    model = initialise(Sequence(*ARRANGEMENTS[kind])).double()
    x, y = vectors(24, shape=(4, 5))
    x = x.double()
    with torch.no_grad():
        fc1 = model.fc1(x)
        fc2 = model.fc2(F.relu(fc1))
        made = {"fc1": fc1, "fc2": fc2, "head": model.head(fc2.mean(1))}
        read = {"fc1": x, "fc2": F.relu(fc1), "head": fc2.mean(1)}
    batches = list(zip(x.split(SPLITS[split]), y.split(SPLITS[split]), strict=True))
    moments = collect(model, batches, observe=observe, spatial=1)
    assert list(moments) == ["fc1", "fc2", "head"]
    for name, tensor in (made if observe == "outputs" else read).items():
        assert_two_pass(moments[name], tensor.movedim(-1, 1).numpy(), y, 1)


@pytest.mark.parametrize("spatial", [4, None])
def test_every_time_step_is_a_cell_of_its_own(spatial):
    first, then = (
        initialise(Sequence(*a)).double() for a in ((batch_first, lambda x, n: x), ARRANGEMENTS["time first"])
    )
    x, y = vectors(24, shape=(4, 5))
    expected, moments = (collect(model, [(x, y)], spatial=spatial) for model in (first, then))
    for name, one in expected.items():
        assert moments[name].n_cells == one.n_cells == (1 if name == "head" else 4)
        torch.testing.assert_close(moments[name].mean, one.mean)
        torch.testing.assert_close(moments[name].m2, one.m2)


class Swapped(nn.Module):
    """Reads ``[time, samples, channels]`` input, as old recurrent code does, and returns a row per sample."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 6)
        self.fc, self.head = nn.Linear(6, 7), nn.Linear(7, 4)

    def forward(self, x):
        hidden, _ = self.lstm(x.transpose(0, 1))
        return self.head(self.fc(hidden)[-1])


def test_a_recurrent_model_with_as_many_samples_as_time_steps():
    model = initialise(Swapped()).double()
    x, y = vectors(6, n_classes=3, shape=(6, 5))
    x = x.double()
    with torch.no_grad():
        fc = model.fc(model.lstm(x.transpose(0, 1))[0]).transpose(0, 1)
    assert_two_pass(collect(model, [(x, y)], spatial=None)["fc"], fc.transpose(1, 2).numpy(), y, None)


def test_a_model_that_does_not_run_on_a_part_of_a_batch():
    # A size of the batch that is written into the code, as in exported models.
    fixed = Lambda(lambda x: x.reshape(20, 5))
    model = nn.Sequential(fixed, nn.Linear(5, 6), nn.Linear(6, 4)).eval()
    x, y = vectors(20, shape=(5,))
    before = fingerprint(model)
    message = r"fit: the model does not run on a part of a batch \(RuntimeError: .*\); the first dimension of every"
    with pytest.warns(UserWarning, match=message):
        moments = collect(model, [(x, y)])
    assert_untouched(model, before)
    with torch.no_grad():
        expected = model[1](x).double().numpy()
    assert_two_pass(moments["1"], expected, y, 4, rtol=1e-5)


def test_layers_by_name():
    model, x, y = build("mlp", 10)
    everything = collect(model, [(x, y)])
    batches = [(x[:30], y[:30]), (x[30:], y[30:])]
    for layers, names in [(["fc3", "fc1"], ["fc1", "fc3"]), (("fc2",), ["fc2"]), (iter(["fc2", "?"]), ["fc2"])]:
        moments = collect(model, batches, layers=layers)
        assert list(moments) == names
        torch.testing.assert_close(moments[names[0]].mean, everything[names[0]].mean)
    assert list(ReconstructionSelector().fit(model, [(x, y)], layers=["fc2"], progress=False).layers) == ["fc3"]


class Detour(nn.Module):
    """A layer under ``no_grad`` that no trace reaches, beside layers that can be pruned."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.aside = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        with torch.no_grad():
            aside = self.aside(x)
        return self.head((self.conv2(F.relu(self.conv1(x))) + aside.mean((1, 2, 3), keepdim=True)).mean((2, 3)))


def test_layers_in_no_group_are_not_measured_but_listed():
    model, (x, y) = initialise(Detour()), images(24)
    selector = fitted(model, x, y)
    assert selector.layers == ["conv1", "conv2", "head"]
    aside = model.aside.weight
    pruner = CoSePPruner(model, x[:2], selector, pruning_ratio=0.5)
    pruner.step()
    reasons = {e.name: e.reason for e in pruner.plan}
    assert reasons["aside"].startswith("Torch-Pruning's trace did not reach it: it runs without gradients")
    assert list(reasons) == [e.name for e in pruner.plan]
    assert set(reasons) == {"conv1", "conv2", "aside", "head"}
    assert model.aside.weight is aside
    assert model.conv1.out_channels == 4


@pytest.mark.parametrize("how", ["module", "name", "type"])
def test_ignored_layers_are_not_measured_but_listed(how):
    model, x, y = build("resnet", 10)
    ignored = {
        "module": [model.conv1, model.conv2, model.head],
        "name": ["conv1", "conv2", "head"],
        "type": [nn.Linear, model.conv1, model.conv2],
    }[how]
    options = {"ignored_layers": ignored, "progress": False}
    selector = CoSePSelector(spatial=2).fit(model, [(x, y)], **options)
    assert ReconstructionSelector(spatial=2).fit(model, [(x, y)], **options).layers == ["conv4", "head"]
    # conv2 is added to the stem: both make the same channels. The head reads those of conv4.
    assert set(selector.layers) - {"head"} == {"conv3", "conv4", "shortcut"}
    pruner = CoSePPruner(model, x[:2], selector, pruning_ratio=0.5, ignored_layers=ignored)
    pruner.step()
    for name in ("stem", "conv1", "conv2", "head"):
        (group_plan,) = [e for e in pruner.plan if name in e.layers]
        assert group_plan.selection is None
        assert group_plan.reason == "in ignored_layers, or pruned only together with a layer that is"
    assert (model.stem.out_channels, model.conv1.out_channels, model.conv3.out_channels) == (10, 10, 6)


def test_a_model_that_cannot_be_traced_is_measured_whole():
    # Leaves torch on the way, which only tensors without a gradient can.
    by_numpy = Lambda(lambda x: torch.from_numpy(x.numpy() * 2))
    layers = [nn.Conv2d(3, 8, 1), by_numpy, nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    model, (x, y) = initialise(nn.Sequential(*layers)), images(24)
    before = fingerprint(model)
    message = r"fit: Torch-Pruning cannot trace the model on the first batch \(\w+: .*\); every layer is measured"
    with pytest.warns(UserWarning, match=message):
        selector = ReconstructionSelector().fit(model, [(x, y)], progress=False)
    assert selector.layers == ["0", "2", "5"]
    assert_untouched(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CoSePSelector(weights=None).fit(model, [(x, y)], layers=["0"], progress=False).layers == ["0"]
    with pytest.raises(RuntimeError, match="numpy"):
        CoSePPruner(model, x[:2], selector)
    assert_untouched(model, before)
