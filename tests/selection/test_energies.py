"""Energies against variances that are computed by hand."""

import pytest
import torch
from models import images, initialise, seeded
from torch import nn

from tp_cosep import CoSePPruner, CoSePSelector, InputError
from tp_cosep.graph.groups import read_group
from tp_cosep.graph.tracing import trace
from tp_cosep.selection.input_space import energies_of


def of_group(model, x, y, layer):
    selector = CoSePSelector().fit(model, [(x, y)], progress=False)
    group = next(g for g in trace(model, x[:1]).get_all_groups() if g[0].dep.target.module is layer)
    return energies_of(read_group(group), selector.statistics.inputs)


def drawn(x, layer):
    """var(x_f) Σ_o w_fo² / var(y_o) of a linear layer on rows x, the outputs' variances as they come out."""
    y = layer(x).double()
    return (x.double().var(0, correction=0)[:, None] * layer.weight.T.double() ** 2 / y.var(0, correction=0)).sum(1)


def test_energies_of_a_linear_layer():
    model = initialise(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)))
    x = 3 + torch.randn(60, 5, generator=seeded(1))
    with torch.no_grad():
        expected = drawn(model[:2](x), model[2])
    assert of_group(model, x, torch.arange(60) % 3, model[0]).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_energies_of_maps_that_are_flattened():
    model = initialise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)))
    x, y = images(3000, size=8)  # of which three positions each are sampled
    with torch.no_grad():
        maps = model[:2](x).double()
        weights = model[3].weight.double().view(4, 6, 36)
    # The 36 inputs of a channel are its positions, which have one covariance and none with each other.
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    outputs = sum((rows @ weights[:, :, p].T).var(0, correction=0) for p in range(36))
    expected = rows.var(0, correction=0) * (weights.square().sum(2) / outputs[:, None]).sum(0)
    assert of_group(model, x, y, model[0]).tolist() == pytest.approx(expected.tolist(), rel=0.05)


class Two(nn.Module):
    """A residual stream with two consumers, one of them grouped."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.grouped, self.head = nn.Conv2d(8, 6, 1, groups=2), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + torch.relu(self.body(torch.relu(x)))
        return self.head(torch.relu(self.grouped(x))).mean((2, 3))


def test_energies_add_up_over_consumers_and_channel_groups():
    model, (x, y) = initialise(Two()), images(40, size=3)
    with torch.no_grad():
        stream = model.stem(x)
        total = stream + torch.relu(model.body(torch.relu(stream)))
        rows, rows_total = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (torch.relu(stream), total))
        body, grouped = nn.Linear(8, 8), [nn.Linear(4, 3), nn.Linear(4, 3)]
        body.weight.copy_(model.body.weight[:, :, 0, 0])
        for part, weight in zip(grouped, model.grouped.weight.split(3), strict=True):
            part.weight.copy_(weight[:, :, 0, 0])
        parts = [drawn(r, layer) for r, layer in zip(rows_total.split(4, 1), grouped, strict=True)]
        by_channel = drawn(rows, body) + torch.cat(parts)
    # Slots of the two channel groups are pruned together. Nine positions a map, of which some are sampled.
    expected = by_channel.view(2, 4).sum(0)
    assert of_group(model, x, y, model.stem).tolist() == pytest.approx(expected.tolist(), rel=0.15)


def test_where_no_consumer_has_weights_all_count_alike_and_the_plan_says_so():
    model = initialise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)))
    x, y = images(40, size=9)
    model.append(nn.Flatten()).append(nn.Linear(8, 4))
    with torch.no_grad():
        model[2].weight.zero_()
    weighted = CoSePSelector().fit(model, [(x, y)], progress=False)
    plain = CoSePSelector(weights=None).fit(model, [(x, y)], progress=False)
    plans = [CoSePPruner(model, x[:1], s, ignored_layers=[model[2], model[5]]) for s in (weighted, plain)]
    entries = [next(p.planner().group_plans()) for p in plans]
    assert entries[0].name == "0"
    assert entries[0].selection == entries[1].selection
    assert entries[0].reason.endswith("; all channels count alike: no consumer draws anything from them")
    assert "alike" not in entries[1].reason.removeprefix("all alike")


def test_weights_of_a_users_own():
    model = initialise(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)))
    x, y = torch.randn(60, 5, generator=seeded(1)), torch.arange(60) % 3
    heavy = torch.full((9,), 1e-9)
    heavy[[2, 7]] = 1.0
    selector = CoSePSelector(weights=lambda group: heavy, keep=2).fit(model, [(x, y)], progress=False)
    group = next(g for g in trace(model, x[:1]).get_all_groups() if g[0].dep.target.module is model[0])
    assert selector.select(group).keep_idxs == (2, 7)
    assert not selector.statistics.inputs  # nothing but class moments is required


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda group: torch.ones(4), r"layer '0': expected one number per channel, a tensor of shape \(9,\)"),
        (lambda group: -torch.ones(9), "layer '0': expected finite weights ≥ 0, at least one positive"),
        (lambda group: torch.zeros(9), "layer '0': expected finite weights ≥ 0, at least one positive"),
        (lambda group: 1 / 0, "the importance that gives the weights, .*, could not score its group"),
    ],
)
def test_weights_that_cannot_be_used(weights, message):
    model = initialise(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)))
    x, y = torch.randn(60, 5, generator=seeded(1)), torch.arange(60) % 3
    selector = CoSePSelector(weights=weights).fit(model, [(x, y)], progress=False)
    group = next(g for g in trace(model, x[:1]).get_all_groups() if g[0].dep.target.module is model[0])
    with pytest.raises(InputError, match=message):
        selector.select(group)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "magnitude"}, "expected weights to be 'energy', None or an importance, got 'magnitude'"),
        ({"backend": "kmedoids"}, "backend='kmedoids' knows no weights; pass weights=None with it"),
    ],
)
def test_options_of_weights(options, message):
    with pytest.raises(InputError, match=message):
        CoSePSelector(**options)
