import copy
import itertools
from functools import partial

import pytest
import torch
import torch_pruning as tp
from fitted import group_with
from models import KINDS, PRODUCERS, assert_untouched, build, fingerprint
from torch import nn

from tp_cosep import AttentionMapSelector, CoSePPruner, CoSePSelector, InputError, ReconstructionSelector
from tp_cosep.functional.elimination import Elimination, backward_elimination
from tp_cosep.functional.selection import select_by_elimination
from tp_cosep.graph.groups import read_group
from tp_cosep.selection.input_space import consumers_of, correlation_distances

CLASS_WEIGHTS = (0, 0.5, 3)


def inputs_of(model, name, x):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    model(x)
    handle.remove()
    return seen[0].double()


def patches(conv, x):
    """What a 3 × 3 kernel with padding 1 reads, tap by tap: ``[kernel_positions, samples × positions, channels]``."""
    a = torch.nn.functional.unfold(x, 3, padding=1, stride=conv.stride)
    return a.unflatten(1, (x.shape[1], 9)).permute(2, 0, 3, 1).flatten(1, 2)


def expected_covariances(model, name, x, y):
    """By definition, on all rows at once."""
    inputs, layer = inputs_of(model, name, x), model.get_submodule(name)
    rows = patches(layer, inputs).flatten(0, 1) if isinstance(layer, nn.Conv2d) else inputs
    total = rows.T.cov(correction=0)
    cells = torch.nn.functional.adaptive_avg_pool2d(inputs, 2).flatten(2) if inputs.dim() == 4 else inputs[..., None]
    means = torch.stack([cells[y == c].mean(0) for c in y.unique()])
    between = torch.stack([means[..., s].T.cov(correction=0) for s in range(means.shape[2])]).mean(0)
    return total, between


def measured(model, x, y, **options):
    batches = [(x[:13], y[:13]), (x[13:], y[13:])]
    return ReconstructionSelector(spatial=2).fit(model, batches, progress=False, **options).statistics.inputs


@pytest.mark.parametrize(("kind", "name"), [("vgg", "conv2"), ("resnet", "conv3"), ("mlp", "fc2")])
def test_covariances(kind, name, monkeypatch):
    monkeypatch.setattr(
        "tp_cosep.graph.consumers._FEWEST_POSITIONS", 10**6
    )  # every position, so that nothing is by chance
    monkeypatch.setattr("tp_cosep.graph.consumers._MOST_POSITIONS", 10**6)
    model, x, y = build(kind, 10)
    moments = measured(model, x, y)
    total, between = expected_covariances(model, name, x, y)
    torch.testing.assert_close(moments[name].covariance, total, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments[name].between_classes, between, rtol=1e-5, atol=1e-7)


def test_readers_of_a_group():
    model, x, y = build("resnet", 10)
    moments = measured(model, x, y)
    view = read_group(group_with(model, x, "stem"))
    names = [m.name for m in view.consumers if m.name in moments]
    for class_weight in CLASS_WEIGHTS:
        parts = dict(zip(names, consumers_of(view, moments, class_weight), strict=True))
        assert set(parts) == {"conv1", "conv3", "shortcut"}
        for name, part in parts.items():
            m, weight = moments[name], model.get_submodule(name).weight.detach().double()
            torch.testing.assert_close(part.covariance, m.covariance + class_weight * m.between_classes)
            costs = torch.zeros(10, 10, dtype=torch.float64)
            for filters in weight:  # one output: [in, height, width]
                kernel_positions = [filters[:, i, j] for i, j in itertools.product(*map(range, filters.shape[1:]))]
                variance = sum(w @ m.covariance @ w for w in kernel_positions)
                costs += sum(torch.outer(w, w) for w in kernel_positions) / variance
            torch.testing.assert_close(part.costs, costs)
            assert torch.equal(part.components, torch.arange(10))
    distances = correlation_distances(view, moments, class_weight=0)
    expected = sum(1 - _correlation(moments[n].covariance).abs() for n in ("conv1", "conv3", "shortcut")) / 3
    torch.testing.assert_close(distances, expected, rtol=1e-6, atol=1e-9)


def _correlation(covariance):
    scale = covariance.diagonal().sqrt()
    return covariance / scale / scale[:, None]


@pytest.mark.parametrize("class_weight", CLASS_WEIGHTS)
def test_selection_is_what_elimination_leaves(class_weight):
    model, x, y = build("resnet", 12)
    selector = ReconstructionSelector(class_weight=class_weight, spatial=2).fit(model, [(x, y)], progress=False)
    for channels, names in PRODUCERS["resnet"].items():
        group = group_with(model, x, names[0])
        view = read_group(group)
        elimination = backward_elimination(
            consumers_of(view, selector.statistics.inputs, class_weight), view.n_components
        )
        for k in (1, 5, view.n_components):
            selection = selector.select(group, n_keep=k)
            assert selection.keep_idxs == tuple(sorted(elimination.order[-k:].tolist())), channels
        scores = selector(group)
        assert scores.argsort().tolist() == elimination.order.tolist()


@pytest.mark.parametrize("class_weight", CLASS_WEIGHTS)
def test_of_copies_one_stays(class_weight):
    model, x, y = build("vgg", 12)
    with torch.no_grad():
        model.conv2.weight[6:], model.conv2.bias[6:] = 2.5 * model.conv2.weight[:6], 2.5 * model.conv2.bias[:6]
    selector = ReconstructionSelector(class_weight=class_weight).fit(model, [(x, y)], progress=False)
    selection = selector.select(group_with(model, x, "conv2"), n_keep=6)
    assert sorted(i % 6 for i in selection.keep_idxs) == [*range(6)]
    # What goes is said to be represented by its copy.
    for i, label in enumerate(selection.labels):
        assert selection.medoids[label] % 6 == i % 6


def test_a_cluster_keeps_what_reconstructs_best():
    model, x, y = build("resnet", 12)
    options = {"spatial": 2, "keep": 0.5}
    plain = CoSePSelector(**options).fit(model, [(x, y)], progress=False)
    selector = CoSePSelector(representative="reconstruction", **options).fit(model, [(x, y)], progress=False)
    differ = 0
    for names in PRODUCERS["resnet"].values():
        group = group_with(model, x, names[0])
        medoids, chosen = plain.select(group), selector.select(group)
        assert medoids.labels == chosen.labels
        assert sorted({chosen.labels[i] for i in chosen.keep_idxs}) == [*range(chosen.k)]
        parts = consumers_of(read_group(group), selector.statistics.inputs, class_weight=0)
        order = backward_elimination(parts, len(chosen.labels), torch.tensor(chosen.labels)).order
        assert chosen.keep_idxs == tuple(sorted(order[-chosen.k :].tolist()))
        differ += medoids.keep_idxs != chosen.keep_idxs
    assert differ


@pytest.mark.parametrize(
    "make",
    [
        ReconstructionSelector,
        partial(ReconstructionSelector, class_weight=0),
        partial(CoSePSelector, representative="reconstruction"),
    ],
    ids=["reconstruction", "without classes", "clusters"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_pruners(kind, make):
    model, x, y = build(kind, 12)
    selector = make().fit(model, [(x, y)], progress=False)
    for pruner_type, more in ((CoSePPruner, {}), (tp.pruner.BasePruner, {"ignored_layers": ["head"]})):
        pruned = copy.deepcopy(model)
        if "ignored_layers" in more:
            more = {"ignored_layers": [pruned.head]}
        pruner_type(pruned, x[:1], selector, pruning_ratio=0.5, **more).step()
        assert pruned(x).shape == (len(x), 4)
        assert all(m.weight.shape[0] == 6 for n, m in pruned.named_modules() if n in ("conv1", "fc1"))
    automatic = copy.deepcopy(model)
    pruner = CoSePPruner(automatic, x[:1], selector)
    pruner.step()
    assert any(e.selection and e.selection.prune_idxs for e in pruner.plan)
    assert automatic(x).shape == (len(x), 4)


def test_global_ranking_and_one_layer_after_the_other():
    model, x, y = build("vgg", 12)
    ranked = copy.deepcopy(model)
    selector = ReconstructionSelector().fit(ranked, [(x, y)], progress=False)
    CoSePPruner(ranked, x[:1], selector, global_pruning=True, pruning_ratio=0.5).step()
    widths = [ranked.conv1.out_channels, ranked.conv2.out_channels, ranked.conv3.out_channels, ranked.fc.out_features]
    assert sum(widths) == 24
    assert len(set(widths)) > 1
    CoSePPruner(
        model, x[:1], ReconstructionSelector(), loader=[(x, y)], layerwise=True, fit_options={"progress": False}
    ).step()
    assert model(x).shape == (len(x), 4)


def elimination_of(costs):
    return Elimination(torch.arange(len(costs)), torch.tensor(costs, dtype=torch.float64))


def test_the_count_is_the_knee_of_the_coverage_and_covers_nearly_all():
    d = 1 - torch.eye(8, dtype=torch.float64)
    costs = [0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 3.0, 5.0]
    selection = select_by_elimination(elimination_of(costs), d)
    assert (selection.knee_k, selection.k, selection.keep_idxs) == (3, 3, (5, 6, 7))
    assert selection.mss == pytest.approx([0.5, 0.8, 1, 1, 1, 1, 1, 1])
    ones = torch.ones(50, 50)
    assert select_by_elimination(elimination_of([1.0] * 50), ones).k == 50  # a straight line has no knee
    growing = [float(i) for i in range(1, 51)]
    at_its_word = select_by_elimination(elimination_of(growing), ones, knee="strongest")
    guarded = select_by_elimination(elimination_of(growing), ones)
    assert at_its_word.k == at_its_word.knee_k == guarded.knee_k
    assert guarded.k == next(k for k in range(1, 51) if sum(growing[50 - k :]) >= 0.98 * sum(growing)) > guarded.knee_k
    assert select_by_elimination(elimination_of(growing), ones, n_keep=3).k == 3
    assert select_by_elimination(elimination_of(costs), d, round_to=4).k in (4, 8)
    assert select_by_elimination(elimination_of([0.0] * 5), torch.zeros(5, 5)).k == 1
    with pytest.raises(InputError, match=r"n_keep in 1 … 8"):
        select_by_elimination(elimination_of(costs), d, n_keep=9)


def test_as_published():
    selector = CoSePSelector.published()
    assert (selector.spatial, selector.knee, selector.metric) == (None, "first", "jm")
    assert (selector.representative, selector.observe) == ("medoid", "outputs")
    assert CoSePSelector.published(representative="max_norm").representative == "max_norm"


def test_refusals():
    for make, options, message in (
        (ReconstructionSelector, {"class_weight": -1}, "expected class_weight to be a finite number ≥ 0, got -1"),
        (ReconstructionSelector, {"class_weight": float("inf")}, "expected class_weight"),
        (ReconstructionSelector, {"class_weight": "much"}, "expected class_weight"),
        (ReconstructionSelector, {"knee": "magic"}, "ReconstructionSelector: expected knee of"),
        (CoSePSelector, {"observe": "consumers"}, "CoSePSelector: expected observe of"),
        (CoSePSelector, {"representative": "best"}, "expected representative"),
        (AttentionMapSelector, {"backend": "none"}, "AttentionMapSelector: expected backend of"),
    ):
        with pytest.raises(InputError, match=message):
            make(**options)
    for make, option in ((ReconstructionSelector, "metric"), (CoSePSelector, "class_weight"), (CoSePSelector, "space")):
        with pytest.raises(TypeError, match=option):
            make(**{option: "jm"})
    model, x, y = build("vgg", 12)
    before = fingerprint(model)
    with pytest.raises(InputError, match="gave none"):
        ReconstructionSelector().fit(model, [])
    with pytest.raises(InputError, match=r"layer 'conv2': got NaN or infinite"):
        ReconstructionSelector().fit(model, [(x * float("nan"), y)])
    selector = ReconstructionSelector().fit(model, [(x, y)], refit=False, progress=False)
    assert_untouched(model, before)
    tp.pruner.BasePruner(
        model, x[:1], tp.importance.RandomImportance(), pruning_ratio=0.5, ignored_layers=[model.head]
    ).step()
    with pytest.raises(InputError, match=r"layer 'conv2': observed with weights of shape .* call fit\(\) again"):
        selector.select(group_with(model, x, "conv1"))


def test_without_labels():
    model, x, y = build("vgg", 12)
    given = ReconstructionSelector(class_weight=0).fit(model, [(x, y)], progress=False)
    alone = ReconstructionSelector(class_weight=0).fit(model, [x], progress=False)
    group = group_with(model, x, "conv2")
    assert given.select(group) == alone.select(group)

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 4)

        def forward(self, x):
            return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean(0))

    model, x = TimeFirst(), torch.randn(5, 30, 6)
    assert ReconstructionSelector(class_weight=0).fit(model, [x], progress=False).layers == ["b", "head"]
    with pytest.raises(
        InputError, match="expected one label per sample, got 30 labels where the layers' outputs have 5"
    ):
        ReconstructionSelector().fit(model, [(x, torch.arange(30) % 4)], progress=False)


def test_samples_may_be_in_any_dimension_inside():
    class Transposed(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.dim, self.a, self.b, self.head = dim, nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 4)

        def forward(self, x):  # [samples, time, channels]
            x = x.movedim(0, self.dim)
            return self.head(torch.relu(self.b(torch.relu(self.a(x)))).movedim(self.dim, 0).mean(1))

    model, x, y = Transposed(0), torch.randn(30, 5, 6), torch.arange(30) % 4
    time_first = Transposed(1)
    time_first.load_state_dict(model.state_dict())
    a, b = (ReconstructionSelector().fit(m, [(x, y)], progress=False) for m in (model, time_first))
    for name in ("b", "head"):
        torch.testing.assert_close(a.statistics.inputs[name].between_classes, b.statistics.inputs[name].between_classes)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.lstm, self.head = nn.Linear(6, 12), nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.lstm(torch.relu(self.stem(x)))[0][:, -1])


def test_separability_where_nothing_reads_by_weights():
    torch.manual_seed(0)
    model, x, y = Recurrent(), torch.randn(40, 5, 6), torch.arange(40) % 4
    selector = ReconstructionSelector().fit(model, [(x, y)], progress=False)
    assert list(selector.statistics.inputs) == ["head"]
    assert list(selector.statistics.moments) == ["stem"]
    group = group_with(model, x, "stem")
    plain = CoSePSelector().fit(model, [(x, y)], progress=False)
    assert selector.select(group, n_keep=5) == plain.select(group, n_keep=5)
    assert selector.layers_of(read_group(group)) == ("stem",)
    # Without labels there is nothing to fall back on.
    alone = ReconstructionSelector(class_weight=0).fit(model, [x], progress=False)
    assert alone.select(group) is None
    # Torch-Pruning cannot take the states of an LSTM apart, but its inputs.
    CoSePPruner(model, x[:1], selector, pruning_ratio=0.5, on_failure="skip").step()
    assert (model.stem.out_features, model.lstm.input_size, model.lstm.hidden_size) == (6, 6, 8)


def test_a_reader_that_was_not_measured():
    model, x, y = build("vgg", 12)
    selector = ReconstructionSelector().fit(model, [(x, y)], layers=["conv1"], progress=False)
    assert selector.layers == ["conv2"]
    assert selector.select(group_with(model, x, "conv1")) is not None
    with pytest.raises(InputError, match=r"layer 'conv3': its input was not observed.* put 'conv2' into ignored"):
        selector.select(group_with(model, x, "conv2"))
    with pytest.raises(
        InputError, match=r"needs 0 MiB .*the memory_budget is 0 MiB; the largest: conv2 .*CoSePSelector"
    ):
        ReconstructionSelector(memory_budget=1000).fit(model, [(x, y)], progress=False)


def test_labels_predicted_and_a_class_that_is_missing():
    model, x, _ = build("vgg", 12)
    moments = measured(model, x, torch.where(torch.arange(len(x)) % 2 == 0, 5, 0))
    assert moments["conv2"].classes.classes.tolist() == [0, 5]
    assert moments["conv2"].classes.count.tolist() == [20, 20]
    with pytest.raises(InputError, match=r"at least two classes, got 1 \(class 3\)"):
        measured(model, x, torch.full((len(x),), 3))
    with torch.no_grad():  # so that it predicts several classes
        model.head.bias -= model(x).mean(0)
    predicted = ReconstructionSelector().fit(model, [x], labels="predicted", progress=False).statistics.inputs
    assert int(predicted["conv2"].classes.count.sum()) == len(x)


@pytest.mark.parametrize("class_weight", CLASS_WEIGHTS)
def test_a_dead_layer_keeps_one_channel(class_weight):
    model, x, y = build("vgg", 12)
    with torch.no_grad():
        model.conv2.weight.zero_()
        model.conv2.bias.fill_(-1)  # a ReLU behind: 0 for every sample
        model.conv3.weight[5:] = 0  # outputs that never move
    selector = ReconstructionSelector(class_weight=class_weight).fit(model, [(x, y)], progress=False)
    dead = selector.select(group_with(model, x, "conv2"))
    assert (dead.k, len(dead.keep_idxs)) == (1, 1)
    pruner = CoSePPruner(model, x[:1], selector, target={"macs": 0.5})
    pruner.step()
    assert model.conv2.out_channels < 12
    assert bool(torch.isfinite(model(x)).all())


def test_what_was_found_once_is_found_anew_when_something_changes():
    model, x, y = build("vgg", 12)
    selector = ReconstructionSelector().fit(model, [(x, y)], progress=False)
    first = selector.select(group_with(model, x, "conv2"), n_keep=5)
    assert selector.select(group_with(copy.deepcopy(model), x, "conv2"), n_keep=5) == first
    with torch.no_grad():
        model.conv3.weight[:, list(first.keep_idxs)] = 0  # read no more
    other = selector.select(group_with(model, x, "conv2"), n_keep=5)
    assert not set(other.keep_idxs) & set(first.keep_idxs)
    again = selector.fit(model, [(x, y)], progress=False).select(group_with(model, x, "conv2"), n_keep=5)
    assert again.keep_idxs == other.keep_idxs
