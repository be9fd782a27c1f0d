import re

import pytest
import torch
import torch_pruning as tp
from models import assert_untouched, build, fingerprint, vectors
from torch import nn

from tp_cosep import CoSePSelector, InputError, NotFittedError, ReconstructionSelector
from tp_cosep.graph.tracing import trace


def fitted(model, x, y, **options):
    return CoSePSelector(**options).fit(model, [(x, y)], progress=False)


def group_of(model, x, name):
    layers = {m: n for n, m in model.named_modules()}
    return next(g for g in trace(model, x).get_all_groups() if name in [layers.get(d.target.module) for d, _ in g])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "euclid"}, "metric: expected one of ['hellinger', 'jm', 'wasserstein'] or a callable"),
        ({"knee": "elbow"}, "CoSePSelector: expected knee of ['guarded', 'strongest', 'first'], got 'elbow'"),
        ({"backend": "cuml"}, "expected backend of ['kmedoids', 'native', 'sklearn-extra'], got 'cuml'"),
        (
            {"representative": "random"},
            "expected representative of ['medoid', 'max_norm', 'reconstruction'] or an importance, got 'random'",
        ),
        ({"max_class_pairs": 0}, "CoSePSelector: expected max_class_pairs to be an integer ≥ 1 or None, got 0"),
        ({"max_class_pairs": 2.5}, "expected max_class_pairs to be an integer ≥ 1 or None, got 2.5"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        CoSePSelector(**options)


@pytest.mark.parametrize("keep", [0, -3, 0.0, 1.5, 2.0, float("nan"), True, "3"])
def test_keep_that_is_neither_a_number_nor_a_share(keep):
    message = (
        "CoSePSelector: expected keep to be a number of channels (an integer ≥ 1), a share (a float in (0, 1]) or "
    )
    with pytest.raises(InputError, match=re.escape(message + f"None, got {keep!r}")):
        CoSePSelector(keep=keep)


def test_options_that_are_known():
    assert ReconstructionSelector(knee="first").knee == "first"
    assert ReconstructionSelector(keep=1.0).keep == 1


def assert_refused(error, message, model, use):
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        use()
    assert_untouched(model, before)


def test_an_unfitted_selector():
    model, x, _ = build("mlp", 10)
    selector, group = ReconstructionSelector(), group_of(model, x[:1], "fc1")
    pruner = tp.pruner.MetaPruner(model, x[:1], importance=selector, pruning_ratio=0.5)
    message = r"ReconstructionSelector: no data seen yet; call fit\(model, loader\) first"
    for use in (
        lambda: selector(group),
        lambda: selector.select(group),
        lambda: selector.distances(group),
        lambda: selector.pruning_ratio_dict(model, x[:1]),
        pruner.step,
    ):
        assert_refused(NotFittedError, message, model, use)


class Switched(nn.Module):
    """A branch that runs on a single sample only: on ``example_inputs`` (batched or not), and never on the data."""

    def __init__(self):
        super().__init__()
        self.main = nn.Linear(20, 10)
        self.extra = nn.Linear(20, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        z = self.main(x)
        return self.head((z + self.extra(x) if x.numel() == 20 else z).relu())


def test_a_layer_that_the_data_never_reached():
    model, (x, y) = Switched().eval(), vectors()
    selector = fitted(model, x, y)
    assert set(selector.statistics.moments) == {"main", "head"}
    pruner = tp.pruner.MetaPruner(model, x[:1], importance=selector, pruning_ratio=0.5, ignored_layers=[model.head])
    message = "layer 'extra': expected class moments, got none: the calibration data never reached this layer"
    for use in (
        lambda: selector.select(group_of(model, x[:1], "main")),
        lambda: selector.pruning_ratio_dict(model, x[:1]),
        pruner.step,
    ):
        assert_refused(InputError, message, model, use)
    # What does not concern that layer goes on working.
    assert selector.select(group_of(model, x[:1], "head")).n_channels == 4


def test_a_layer_that_only_one_class_reached():
    model, (x, y) = Switched().eval(), vectors()
    single = [(x[i : i + 1], y[i : i + 1]) for i in range(0, 40, 4)]
    selector = CoSePSelector().fit(model, [*single, (x, y)], progress=False)
    assert selector.statistics.moments["extra"].classes.tolist() == [0]
    group = group_of(model, x[:1], "main")
    assert_refused(InputError, "layer 'extra': .*at least two classes, got 1", model, lambda: selector(group))


def test_moments_that_no_longer_fit():
    model, x, y = build("resnet", 12)
    selector = CoSePSelector(keep=7).fit(model, [(x, y)], refit=False, progress=False)
    ratios = selector.pruning_ratio_dict(model, x[:1], [model.head])
    tp.pruner.MetaPruner(
        model, x[:1], selector, pruning_ratio=0.0, pruning_ratio_dict=ratios, ignored_layers=[model.head]
    ).step()
    message = (
        r"layer '(stem|conv2)': class moments cover 12 channels, the layer has 7; call fit\(\) again after pruning"
    )
    group = group_of(model, x[:1], "stem")
    for use in (lambda: selector.select(group), lambda: selector.distances(group), lambda: selector(group)):
        assert_refused(InputError, message, model, use)
    assert_refused(InputError, "call fit", model, lambda: selector.pruning_ratio_dict(model, x[:1]))
    selector.fit(model, [(x, y)])
    assert len(selector.select(group_of(model, x[:1], "stem"), n_keep=3).keep_idxs) == 3


def test_moments_of_another_model():
    model, x, y = build("mlp", 10)
    selector = fitted(nn.Sequential(model), x, y)
    assert set(selector.statistics.moments) == {"0.fc1", "0.fc2", "0.fc3", "0.head"}
    assert_refused(
        InputError,
        "layer 'fc1': .* not part of the fitted model",
        model,
        lambda: selector(group_of(model, x[:1], "fc1")),
    )


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            lambda m, v, n, w: (m - n).sum(),
            "expected a result of the inputs' shape .* work elementwise",
        ),
        (lambda m, v, n, w: (m - n) / 0.0, "got NaN or infinite separabilities"),
    ],
)
def test_a_metric_that_does_not_work(metric, message):
    model, x, y = build("mlp", 10)
    selector = fitted(model, x, y, metric=metric)
    assert_refused(InputError, message, model, lambda: selector(group_of(model, x[:1], "fc1")))


def test_a_representative_that_is_not_one_score_per_channel():
    model, x, y = build("mlp", 10)
    for scores, message in (
        (torch.zeros(9), r"one number per channel, .* got \(9,\)"),
        ([0.0] * 10, "one number per channel, .* got a list of 10"),
        (torch.full((10,), torch.nan), "got NaN"),
    ):
        selector = fitted(model, x, y, representative=lambda group, scores=scores: scores)
        assert_refused(InputError, message, model, lambda s=selector: s(group_of(model, x[:1], "fc1")))


def test_a_representative_that_needs_gradients():
    model, x, y = build("mlp", 10)
    selector = fitted(model, x, y, representative=tp.importance.TaylorImportance())
    message = (
        r"layer 'fc1': the importance that chooses the representatives, a TaylorImportance, could not score its group "
        r"\(AttributeError: .*\); one that needs gradients, such as Taylor's, requires loss\.backward\(\)"
    )
    assert_refused(InputError, message, model, lambda: selector(group_of(model, x[:1], "fc1")))
    nn.functional.cross_entropy(model(x), y).backward()
    assert selector(group_of(model, x[:1], "fc1")).shape == (10,)
    other = fitted(model, x, y, representative=ReconstructionSelector())
    assert_refused(NotFittedError, "no data seen yet", model, lambda: other(group_of(model, x[:1], "fc1")))


def test_a_count_beyond_the_group():
    model, x, y = build("mlp", 10)
    selector = fitted(model, x, y)
    for n_keep in (0, 11):
        with pytest.raises(InputError, match=rf"expected n_keep in 1 … 10 .* got {n_keep}"):
            selector.select(group_of(model, x[:1], "fc1"), n_keep=n_keep)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # inside torch.compile
@pytest.mark.slow
def test_wrapped_models():
    from tp_cosep import Compensator, CoSePPruner

    model, x, y = build("mlp", 10)
    selector = fitted(model, x, y)
    for wrapped, message in (
        (nn.DataParallel(model), r"got a DataParallel, which holds on to parameters .*; pass model\.module"),
        (torch.compile(model), r"got a compiled one \(OptimizedModule\).*; pass model\._orig_mod"),
    ):
        for use in (
            lambda m=wrapped: ReconstructionSelector().fit(m, [(x, y)]),
            lambda m=wrapped: CoSePPruner(m, x[:1], selector),
            lambda m=wrapped: Compensator(m, x[:1]),
        ):
            assert_refused(InputError, message, model, use)

    class Sharded(nn.Parameter):
        device_mesh = None

    model.fc1.weight = Sharded(model.fc1.weight)
    with pytest.raises(InputError, match=r"expected whole parameters, got sharded ones \(fc1\.weight\)"):
        ReconstructionSelector().fit(model, [(x, y)])
