"""Which entries of parameters a block of code selects."""

import copy
import gc
import pickle

import pytest
import torch
from models import Mlp, initialise
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tp_cosep.graph.edits import EditHistory, recorded_edits, selected

KEPT = [1, 4, 7]


def recorded(change, weight=None):
    """A layer, its weight before, and the edits that a change of it makes."""
    layer = nn.Linear(5, 9)
    if weight is not None:
        layer.weight = nn.Parameter(weight)
    before = layer.weight
    with recorded_edits(layer) as edits:
        change(layer)
    return layer, before, edits


def rows(weight):
    return weight.index_select(0, torch.tensor(KEPT))


@pytest.mark.parametrize(
    "select",
    [
        rows,
        lambda w: w.data.index_select(-2, torch.tensor(KEPT)),
        lambda w: w[KEPT],
        lambda w: w.detach()[torch.tensor(KEPT) - 9].clone(),
        lambda w: w[torch.tensor([i in KEPT for i in range(9)])],
        lambda w: w[:, [4, 0, 2]],
        lambda w: rows(w)[:, [0, 3]].index_select(0, torch.tensor([0, 2])),
    ],
    ids=["rows", "data", "list", "from the end", "mask", "another order", "several"],
)
def test_selections(select):
    layer, before, (edit,) = recorded(lambda layer: setattr(layer, "weight", nn.Parameter(select(layer.weight))))
    assert edit.name == "weight"
    assert edit.old() is before
    x = torch.randn(9, 5)
    assert torch.equal(selected(x, edit.selections), select(x))
    assert torch.equal(selected(before.detach(), edit.selections), layer.weight)


def test_equal_entries_are_told_apart():
    layer, _, (edit,) = recorded(
        lambda layer: setattr(layer, "weight", nn.Parameter(rows(layer.weight))), torch.zeros(9, 5)
    )
    assert not layer.weight.any()
    assert [(dim, idxs.tolist()) for dim, idxs in edit.selections] == [(0, KEPT)]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "weight", nn.Parameter(2 * rows(layer.weight))),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(3, 5))),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight[[0, 1], [2, 3]])),
        lambda layer: setattr(layer.weight, "data", rows(layer.weight.data)),
        lambda layer: setattr(layer, "weight", None),
    ],
    ids=["scaled", "made", "pairs", "in place", "removed"],
)
def test_what_is_no_selection(change):
    _, _, (edit,) = recorded(change)
    assert edit.selections is None


def test_the_memory_of_a_selection_is_not_used_again():
    """A tensor in the place of one that is gone would be taken for it."""
    model = nn.Linear(5, 9)
    with recorded_edits(model):
        memory = StorageWeakRef(rows(model.weight).untyped_storage())
        unrelated = StorageWeakRef(rows(torch.zeros(9, 5)).untyped_storage())
        assert unrelated.expired()
        assert not memory.expired()
    assert memory.expired()


def test_values_may_change():
    _, _, edits = recorded(lambda layer: layer.weight.data.mul_(2))
    assert edits == []


def test_an_error_is_not_recorded():
    with pytest.raises(ZeroDivisionError):
        recorded(lambda layer: 1 / 0)


def test_a_history_keeps_nothing_alive_and_stays_here():
    model = initialise(Mlp(6))
    with recorded_edits(model) as edits:
        model.fc1.weight = nn.Parameter(model.fc1.weight[[0, 1]])
    gc.collect()
    assert edits[0].old() is None
    history = EditHistory().extended(model, edits)
    assert len(history.edits) == 1
    for other in (copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
        assert other == EditHistory()
    del model
    gc.collect()
    assert history.model() is None
