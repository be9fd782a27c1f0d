"""The pruner with a loader and nothing else: selection, compensation and re-estimation by default."""

import copy
import warnings

import pytest
import torch
from models import assert_same_state, build, initialise, seeded
from torch import nn

from tp_cosep import Compensator, CoSePPruner, CoSePSelector, InputError, recalibrate

QUIET = {"progress": False}


def batches(x, y, n=4):
    return list(zip(x.chunk(n), y.chunk(n), strict=True))


@pytest.mark.parametrize("kind", ["vgg", "resnet"])
def test_a_loader_is_all_that_is_required(kind):
    model, x, y = build(kind, 12)
    twin, loader = copy.deepcopy(model), batches(x, y)
    pruner = CoSePPruner(model, x[:1], loader=loader, target={"macs": 0.5}, fit_options=QUIET)
    pruner.step()
    selector = CoSePSelector().fit(twin, loader, progress=False)
    compensator = Compensator(twin, x[:1]).fit(loader, progress=False)
    by_hand = CoSePPruner(twin, x[:1], selector, target={"macs": 0.5}, compensate=compensator)
    by_hand.step()
    assert [r.name for r in pruner.compensator.refits] == [r.name for r in compensator.refits] != []
    if pruner.plan.options["recalibrated"]:
        recalibrate(twin, loader, progress=False)
    assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("shifted", [False, True])
def test_statistics_that_bring_the_outputs_nearer_stay(shifted):
    # Without compensation the mean of what a BatchNorm receives moves with the removed channels, unless they are zero.
    model = initialise(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)))
    x, y = torch.randn(200, 5, generator=seeded(1)), torch.arange(200) % 3
    with torch.no_grad():
        model[0].bias.fill_(2.0 if shifted else 0.1)
        if not shifted:
            model[2].weight[:, 4:] = 0
    recalibrate(model, [x], progress=False)
    before, reference = {k: v.clone() for k, v in model[3].named_buffers()}, copy.deepcopy(model)
    selector = CoSePSelector(keep=5).fit(model, [(x, y)], progress=False)
    if not shifted:  # noise in the training part alone: its statistics are further off than the model's own
        loader = batches(x, y)
        loader[0] = (loader[0][0] * 5, loader[0][1])
    else:
        loader = batches(x, y)
    pruner = CoSePPruner(
        model, x[:1], selector, ignored_layers=[model[2]], loader=loader, compensate=False, fit_options=QUIET
    )
    kept = copy.deepcopy(pruner.plan)
    pruner.step()
    assert pruner.plan.options == {**kept.options, "recalibrated": shifted}
    with torch.no_grad():
        now = (model(x) - reference(x)).square().mean()
        again = copy.deepcopy(model)
        for name, value in before.items():
            again[3].get_buffer(name).copy_(value)
        then = (again(x) - reference(x)).square().mean()
    if shifted:
        expected = copy.deepcopy(model)
        recalibrate(expected, loader, progress=False)
        assert_same_state(model.state_dict(), expected.state_dict())
        assert now < then
    else:
        assert all(torch.equal(model[3].get_buffer(k), v) for k, v in before.items())


def test_a_model_without_batch_normalisation_has_nothing_to_re_estimate():
    model = initialise(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)))
    x, y = torch.randn(60, 5, generator=seeded(1)), torch.arange(60) % 3
    pruner = CoSePPruner(model, x[:1], loader=batches(x, y), pruning_ratio=0.5, fit_options=QUIET)
    pruner.step()
    assert "recalibrated" not in pruner.plan.options
    assert [r.name for r in pruner.compensator.refits] == ["2"]


def test_batches_that_cannot_be_re_estimated_on_are_reported_and_change_nothing():
    model = initialise(nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)))
    x, y = torch.randn(12, 5, generator=seeded(1)), torch.arange(12) % 3
    selector = CoSePSelector().fit(model, [(x, y)], progress=False)
    pruner = CoSePPruner(
        model, x[:1], selector, loader=batches(x, y, 12), pruning_ratio=0.5, compensate=False, fit_options=QUIET
    )
    with pytest.warns(UserWarning, match="BatchNorm statistics are not re-estimated: .*value per channel"):
        pruner.step()
    assert pruner.plan.options["recalibrated"] is False
    assert model[0].out_features == 4


def test_a_loader_that_can_be_read_once_fits_the_selector_alone():
    model, x, y = build("vgg", 12)
    pruner = CoSePPruner(model, x[:1], loader=iter(batches(x, y)), pruning_ratio=0.5, fit_options=QUIET)
    pruner.step()
    assert pruner.compensator is None
    assert "recalibrated" not in pruner.plan.options


def test_without_importance_and_loader():
    model, x, _ = build("vgg", 12)
    with pytest.raises(InputError, match="expected an importance, or loader= to fit a CoSePSelector on"):
        CoSePPruner(model, x[:1])


@pytest.mark.parametrize("value", ["always", 1.5, "Auto"])
def test_recalibrate_is_true_false_or_auto(value):
    model, x, y = build("vgg", 12)
    with pytest.raises(InputError, match="expected recalibrate to be True, False or 'auto'"):
        CoSePPruner(model, x[:1], loader=[(x, y)], recalibrate=value)


def test_a_step_too_many_says_so_and_measures_nothing():
    model, x, y = build("vgg", 12)
    n_runs = 0

    class Counting(list):
        def __iter__(self):
            nonlocal n_runs
            n_runs += 1
            return super().__iter__()

    loader = Counting(batches(x, y))
    pruner = CoSePPruner(model, x[:1], loader=loader, pruning_ratio=0.5, fit_options=QUIET)
    pruner.step()
    plan, state, before = pruner.plan, copy.deepcopy(model.state_dict()), n_runs
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner.step()
    assert [str(w.message) for w in caught] == [
        "step: this would exceed the maximum iterative steps, 1; nothing is pruned."
    ]
    assert n_runs == before
    assert pruner.plan == plan
    assert_same_state(model.state_dict(), state)
