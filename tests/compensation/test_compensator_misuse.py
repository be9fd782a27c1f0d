"""Repair and new statistics where the data, the model or the options are not what they should be."""

import copy

import pytest
import torch
import torch_pruning as tp
from fitted import group_with
from models import assert_untouched, build, fingerprint
from torch import nn
from torch.nn.utils import parametrizations

from tp_cosep import Compensator, CoSePPruner, CoSePSelector, InputError, ReconstructionSelector, recalibrate
from tp_cosep.compensation.compensator import MODES
from tp_cosep.utils.data import run_model


class WithAuxiliary(nn.Module):
    """A second head that runs on demand only."""

    def __init__(self):
        super().__init__()
        self.trunk, self.norm, self.head = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.aux = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x, with_aux=False):
        x = self.norm(self.trunk(x))
        return self.aux(x) if with_aux else self.head(x)


class Failing:
    """A loader that gives its batches whole for some passes, and then does something else."""

    def __init__(self, batches, n_passes, then):
        self.batches, self.n_passes, self.then = batches, n_passes, then

    def __iter__(self):
        self.n_passes -= 1
        yield from self.batches if self.n_passes >= 0 else self.then()


def fail():
    raise OSError("disk")


def test_statistics_of_layers_that_were_not_reached_stay():
    torch.manual_seed(0)
    model = WithAuxiliary()
    x = torch.randn(80, 6) + 1
    for _ in range(3):
        model(x, with_aux=True)
    model.eval()
    before = {name: buffer.clone() for name, buffer in model.aux[1].named_buffers()}
    assert recalibrate(model, [x], progress=False) == 1
    assert all(torch.equal(before[name], buffer) for name, buffer in model.aux[1].named_buffers())
    torch.testing.assert_close(model.norm.running_mean, model.trunk(x).mean(0), rtol=1e-4, atol=1e-5)
    assert int(model.norm.num_batches_tracked) == 1


def test_statistics_do_not_see_empty_batches():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    norms = [nn.BatchNorm1d(5) for _ in range(2)]
    for norm, batches in zip(norms, ([x], [x[:0], x, x[:0]]), strict=True):
        assert recalibrate(norm, batches, progress=False) == 1
    assert all(torch.equal(a, b) for a, b in zip(norms[0].buffers(), norms[1].buffers(), strict=True))
    before = fingerprint(norms[0])
    with pytest.raises(InputError, match="expected at least one batch"):
        recalibrate(norms[0], [x[:0]], progress=False)
    assert_untouched(norms[0], before)


@pytest.mark.parametrize("on_failure", ["raise", "skip"])
@pytest.mark.parametrize(("then", "message"), [(list, "gave none this time"), (fail, "OSError: disk")])
def test_data_that_cannot_be_read_again_is_not_held_against_groups(on_failure, then, message):
    model, x, y = build("vgg", 12)
    selector = ReconstructionSelector(spatial=2).fit(model, [(x, y)], progress=False)
    before = fingerprint(model)
    pruner = CoSePPruner(
        model,
        x[:1],
        selector,
        pruning_ratio=0.5,
        loader=Failing([(x, y)], 1, then),
        compensate="sequential",
        recalibrate=False,
        on_failure=on_failure,
        fit_options={"progress": False},
    )
    with pytest.raises(InputError, match=message):
        pruner.step()
    assert_untouched(model, before)


def test_less_data_than_before_is_not_fitted_to():
    model, x, _ = build("vgg", 12)
    loader = Failing([x[:20], x[20:]], 1, lambda: [x[:20], x[20:-1]])
    compensator = Compensator(model, x[:1], mode="sequential").fit(loader, progress=False)
    before = fingerprint(model)
    with pytest.raises(InputError, match=f"gave {len(x) - 1} of the {len(x)} samples this time"):
        compensator(group_with(model, x, "conv1"))
    assert_untouched(model, before)


@pytest.mark.parametrize("measure", [lambda m, batches: Compensator(m, batches[0][0][:1]).fit(batches), recalibrate])
def test_batches_of_more_than_inputs_and_labels(measure):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x = torch.randn(20, 6)
    with pytest.raises(InputError, match=r"the model's forward takes, got a list of 3 .* pass target_fn="):
        measure(model, [(x, x, x)])


def test_an_error_of_a_type_within_a_model_is_its_own():
    class Broken(nn.Module):
        def forward(self, x):
            return x + None

    with pytest.raises(TypeError, match="unsupported operand"):
        run_model(Broken(), torch.ones(2))


class Routed(nn.Module):
    """A layer that reads the trunk for some batches only, or never from some moment on."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head, self.rare = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.sends = lambda x: bool(x.sum() > 0)

    def forward(self, x):
        y = torch.relu(self.trunk(x))
        return self.head(y) + self.rare(y) if self.sends(x) else self.head(y)


def test_sequential_repair_of_a_layer_that_some_batches_do_not_reach():
    torch.manual_seed(0)
    model = Routed()
    with torch.no_grad():  # the second half repeats the first, scaled
        model.trunk.weight[4:] = 3 * model.trunk.weight[:4]
        model.trunk.bias[4:] = 3 * model.trunk.bias[:4]
    x = torch.randn(40, 6).abs()
    before = [model(x), model(-x)]
    compensator = Compensator(model, x[:1], mode="sequential").fit([x, -x, x + 1, -x - 1], progress=False)
    graph = tp.DependencyGraph().build_dependency(model, x[:1])
    group = graph.get_pruning_group(model.trunk, tp.prune_linear_out_channels, [4, 5, 6, 7])
    refits = compensator(group)
    group.prune()
    assert {r.name for r in refits if r.error is not None} == {"head", "rare"}
    for x_i, y in zip((x, -x), before, strict=True):
        torch.testing.assert_close(model(x_i), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sends", "message"),
    [
        (lambda x, is_pruned: not is_pruned and bool(x.sum() > 0), "read 40 rows of a batch .* and 0 as pruned so far"),
        (lambda x, is_pruned: False, "layer 'rare': the data reached it in fit"),
    ],
)
def test_sequential_repair_of_a_layer_that_is_no_longer_reached(sends, message):
    torch.manual_seed(0)
    model = Routed()
    x = torch.randn(40, 6).abs()
    graph = tp.DependencyGraph().build_dependency(model, x[:1])
    compensator = Compensator(model, x[:1], mode="sequential").fit([x], progress=False)
    original = compensator._original[model]
    for module, is_pruned in ((model, True), (original, False)):
        module.sends = lambda x, is_pruned=is_pruned: sends(x, is_pruned)
    before = fingerprint(model)
    with pytest.raises(InputError, match=message):
        compensator(graph.get_pruning_group(model.trunk, tp.prune_linear_out_channels, [0, 1]))
    assert_untouched(model, before)


@pytest.mark.parametrize("call", [Compensator.__call__, CoSePSelector.__call__])
def test_what_is_no_group_is_refused(call):
    model, x, y = build("vgg", 12)
    if call is Compensator.__call__:
        fitted = Compensator(model, x[:1]).fit([x], progress=False)
    else:
        fitted = ReconstructionSelector(spatial=2).fit(model, [(x, y)], progress=False)
    for group, came in ((None, "None"), ([1, 2], "a list of 2")):
        with pytest.raises(InputError, match=f"expected a group of a DependencyGraph .* got {came}"):
            call(fitted, group)


@pytest.mark.parametrize(("options", "message"), [({"targetfn": 3}, r"\['targetfn'\]"), (3, "map keywords .* got 3")])
def test_unknown_fit_options_are_refused_also_if_nothing_is_to_be_fitted(options, message):
    model, x, y = build("vgg", 12)
    selector = ReconstructionSelector(spatial=2).fit(model, [(x, y)], progress=False)
    with pytest.raises(InputError, match=f"fit_options.*{message}"):
        CoSePPruner(model, x[:1], selector, fit_options=options)


def test_groups_of_another_model_are_refused():
    model, x, _ = build("vgg", 12)
    other = copy.deepcopy(model)
    compensator = Compensator(model, x[:1]).fit([x], progress=False)
    group = group_with(other, x, "conv1")
    before = fingerprint(other)
    with pytest.raises(InputError, match="a copy is another model"):
        compensator(group)
    assert_untouched(other, before)


def test_a_layer_that_was_replaced_is_refused():
    model, x, _ = build("vgg", 12)
    compensator = Compensator(model, x[:1]).fit([x], progress=False)
    model.conv2 = copy.deepcopy(model.conv2)
    with pytest.raises(InputError, match=r"layer 'conv2': it is not the one that was measured"):
        compensator(group_with(model, x, "conv1"))


@pytest.mark.parametrize("compute", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_weights_that_are_computed_are_left_alone(compute):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), compute(nn.Linear(8, 5)), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.randn(80, 6)
    compensator = Compensator(model, x[:1]).fit([x], progress=False)
    before = model(x)
    graph = tp.DependencyGraph().build_dependency(model, x[:1])
    (refit,) = compensator(graph.get_pruning_group(model[0], tp.prune_linear_out_channels, [0, 1]))
    assert refit.reason == "its weight is computed from other parameters"
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("mode", MODES)
def test_what_reads_an_embedding_alone_is_repaired(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[0].weight[:, 4:] = -2 * model[0].weight[:, :4]
    x = torch.randint(0, 20, (80, 5))
    before = model(x)
    compensator = Compensator(model, x[:1], mode=mode).fit([x], progress=False)
    graph = tp.DependencyGraph().build_dependency(model, x[:1])
    group = graph.get_pruning_group(model[0], tp.prune_embedding_out_channels, [4, 5, 6, 7])
    compensator(group)
    group.prune()
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_a_model_that_does_not_run_between_groups():
    model, x, _ = build("vgg", 12)
    compensator = Compensator(model, x[:1], mode="sequential").fit([x], progress=False)
    group = group_with(model, x, "conv1")
    model.double()
    with pytest.raises(InputError, match="mode='sequential' runs the model between groups, and as pruned so far"):
        compensator(group)


@pytest.mark.parametrize(
    "options",
    [
        {"max_positions": 2.5},
        {"max_positions": True},
        {"max_positions": "a"},
        {"max_features": -1},
        {"max_features": "a"},
        {"ridge": float("inf")},
        {"ridge": "a"},
        {"memory_budget": "1GB"},
        {"memory_budget": -10},
        {"seed": "a"},
        {"forward_fn": 3},
        {"unheard_of": 3},
    ],
)
def test_options_are_checked_at_once(options):
    with pytest.raises(InputError, match=f"Compensator: .*{next(iter(options))}"):
        Compensator(nn.Linear(2, 2), torch.randn(1, 2), **options)
