import copy

import pytest
import torch
from counting import macs_by_hooks, n_params
from fitted import fitted, widths
from models import KINDS, assert_untouched, build, fingerprint

from tp_cosep import CoSePPruner, InputError, NotFittedError
from tp_cosep.pruning.targets import median_times as real_median_times
from tp_cosep.utils.timing import layer_times, median_times


def pruner_for(kind, n=12, **options):
    model, x, y = build(kind, n)
    return CoSePPruner(model, x[:1], fitted(model, x, y), **options), model, x


@pytest.mark.parametrize("kind", KINDS)
def test_a_preview_tells_what_targets_leave(kind):
    pruner, model, x = pruner_for(kind)
    before = fingerprint(model)
    preview = pruner.preview(n_points=9)
    assert_untouched(model, before)
    assert len(pruner.plan) == 0
    whole = preview.points[0]
    assert (whole.macs, whole.params, whole.retained_variance) == (macs_by_hooks(model, x), n_params(model, x), 1)
    for a, b in zip(preview.points, preview.points[1:], strict=False):
        assert b.macs < a.macs
        assert b.retained_variance <= a.retained_variance
    for point in preview.points[1::3]:
        trial = copy.deepcopy(model)
        CoSePPruner(trial, x[:1], pruner.importance, target={"macs": point.macs * (1 + 1e-9)}).step()
        assert (macs_by_hooks(trial, x), n_params(trial, x)) == (pytest.approx(point.macs), pytest.approx(point.params))
        assert 0 < point.retained_variance < 1
    lines = str(preview).splitlines()
    assert len(lines) == len(preview.points) + 1
    assert f"{preview.points[-1].params:,.0f}" in lines[-1]


def test_a_preview_keeps_to_the_options():
    pruner, model, x = pruner_for("vgg", 16, max_pruning_ratio=0.5, round_to=4, pruning_ratio_dict={"conv2": 0.25})
    preview = pruner.preview(unit="params")
    for point in preview.points:
        assert point.n_kept["conv2"] == 12
        assert all(n % 4 == 0 and n >= 8 for n in point.n_kept.values())
    smallest = preview.points[-1]
    trial = CoSePPruner(model, x[:1], pruner.importance, target={"params": smallest.params + 1}, **{
        "max_pruning_ratio": 0.5, "round_to": 4, "pruning_ratio_dict": {"conv2": 0.25},
    })  # fmt: skip
    trial.step()
    assert n_params(model, x) == smallest.params


def test_a_preview_needs_a_fitted_selector_and_a_unit():
    pruner, _, _ = pruner_for("vgg")
    for options in ({"unit": "joules"}, {"n_points": 0}):
        with pytest.raises(InputError, match=r"preview: expected a unit of .* n_points ≥ 1"):
            pruner.preview(**options)
    model, x, _ = build("vgg", 12)
    with pytest.raises(NotFittedError):
        CoSePPruner(model, x[:1], type(pruner.importance)()).preview()


def as_macs(model, x):
    """A clock that goes by multiply-accumulates, and a constant that no layer's time shows."""
    return 0.2 * macs_by_hooks(model, x) ** 0.9 + 100


@pytest.mark.parametrize("kind", ["vgg", "resnet", "mlp"])
@pytest.mark.parametrize("share", [0.8, 0.5])
@pytest.mark.slow
def test_a_latency_is_met_by_what_is_timed(kind, share, monkeypatch):
    pruner, model, x = pruner_for(kind, 24, target={"latency": share})
    n_timed = 0

    def clock(models, run, device):
        nonlocal n_timed
        n_timed += 1
        return {name: as_macs(m, x) for name, m in models.items()}

    monkeypatch.setattr("tp_cosep.pruning.targets.median_times", clock)
    before = as_macs(model, x)
    pruner.step()
    assert share * 0.93 < as_macs(model, x) / before <= share
    assert 2 <= n_timed <= 9
    assert all(group_plan.reason == "target in latency" for group_plan in pruner.plan if group_plan.selection)


def test_a_latency_in_milliseconds(monkeypatch):
    pruner, model, x = pruner_for("vgg", 24, target={"latency": 3.0})
    whole = as_macs(model, x)

    def clock(models, run, device):  # the model takes 5 ms
        return {name: 0.005 * as_macs(m, x) / whole for name, m in models.items()}

    monkeypatch.setattr("tp_cosep.pruning.targets.median_times", clock)
    pruner.step()
    assert 0.56 < as_macs(model, x) / whole <= 0.6


def test_a_latency_out_of_reach_leaves_the_model(monkeypatch):
    pruner, model, x = pruner_for("vgg", 12, target={"latency": 0.1}, max_pruning_ratio=0.25)
    monkeypatch.setattr(
        "tp_cosep.pruning.targets.median_times", lambda models, *_: {n: as_macs(m, x) for n, m in models.items()}
    )
    before, n = fingerprint(model), widths(model)
    with pytest.raises(InputError, match=r"target: expected a latency that can be reached, got 0\.100 .* are left"):
        pruner.step()
    assert_untouched(model, before)
    assert widths(model) == n


def test_a_latency_by_the_real_clock():
    pruner, model, _ = pruner_for("resnet", 24, target={"latency": 0.9}, round_to=4)
    before = widths(model)
    pruner.step()
    after = widths(model)
    assert sum(after.values()) < sum(before.values())
    assert all(after[name] % 4 == 0 for name, n in before.items() if after[name] < n), after


def test_times_are_of_what_runs():
    model, x, _ = build("resnet", 12)
    times = layer_times(model, lambda: model(x), torch.device("cpu"))
    assert all(seconds > 0 for seconds in times.values())
    assert set(times) == {m for m in model.modules() if not list(m.children())}
    calls = []
    found = real_median_times({"a": model, "b": model}, calls.append, torch.device("cpu"), n_runs=3, n_warmup=1)
    assert set(found) == {"a", "b"}
    assert len(calls) == 8
    assert real_median_times is median_times
