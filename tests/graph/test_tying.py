"""Parameters that several layers share: one tensor before, one tensor afterwards."""

import copy

import pytest
import torch
from models import assert_same_state
from torch import nn

import tp_cosep
from tp_cosep import CoSePPruner, ReconstructionSelector
from tp_cosep.graph.tying import tied_parameters


class Language(nn.Module):
    """An embedding whose table is the output layer's weight too."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(20, 24), nn.Linear(24, 20, bias=False)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)
        self.out.weight = self.table.weight

    def forward(self, words):
        x = self.table(words).mean(1)
        return self.out(x + self.down(torch.relu(self.up(x))))


class Twice(nn.Module):
    """Two layers in a row with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.head = nn.Linear(9, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(torch.relu(self.first(x)))))))


def made(kind):
    torch.manual_seed(0)
    return kind().eval()


def words():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 20, (80, 5), generator=generator), torch.arange(80) % 20


def test_which_parameters_are_tied():
    assert tied_parameters(made(Language)) == [["table.weight", "out.weight"]]
    assert tied_parameters(made(Twice)) == [["a.weight", "b.weight"]]
    layer = nn.Linear(3, 3)
    assert tied_parameters(nn.Sequential(layer, nn.ReLU(), layer)) == []  # one layer, which runs twice


@pytest.mark.parametrize("refit", [False, True, "sequential"])
def test_a_table_stays_the_output_layers_weight(refit, tmp_path):
    model, (x, y) = made(Language), words()
    whole = sum(p.numel() for p in model.parameters())
    selector = ReconstructionSelector().fit(model, [(x, y)], progress=False)
    pruner = CoSePPruner(
        model,
        x[:1],
        selector,
        target={"params": 0.6},
        loader=[(x, y)],
        compensate=refit,
        fit_options={"progress": False},
    )
    pruner.step()
    assert model.out.weight is model.table.weight
    assert model.table.embedding_dim < 24
    assert 0.5 < sum(p.numel() for p in model.parameters()) / whole <= 0.6
    if refit:  # a refit would have changed what the words are
        kept = next(g.selection.keep_idxs for g in pruner.plan if "table" in g.layers)
        assert torch.equal(model.table.weight, made(Language).table.weight[:, list(kept)])
        (left,) = (r for r in pruner.compensator.refits if r.name == "out")
        assert left.reason == "another layer has the same weight"
    tp_cosep.save(model, pruner.plan, tmp_path)
    again = tp_cosep.load(tmp_path, Language)
    assert again.out.weight is again.table.weight
    assert_same_state(again.state_dict(), model.state_dict())


def test_what_cannot_stay_tied_is_said():
    model, x = made(Twice), torch.randn(60, 9, generator=torch.Generator().manual_seed(1))
    y = torch.arange(60) % 4
    selector = ReconstructionSelector(keep=6).fit(model, [(x, y)], progress=False)
    zeroed = copy.deepcopy(model)
    pruner = CoSePPruner(model, x[:1], selector)
    with pytest.warns(UserWarning, match=r"pruning: 'a\.weight' and 'b\.weight' were one tensor and no longer are"):
        pruner.step()
    gone = {g.name: list(g.selection.prune_idxs) for g in pruner.plan if g.selection}
    with torch.no_grad():
        zeroed.b.weight = nn.Parameter(zeroed.a.weight.clone())
        for made_by, read_by in (("first", "a"), ("a", "b"), ("b", "head")):
            zeroed.get_submodule(read_by).weight[:, gone[made_by]] = 0
        torch.testing.assert_close(model(x), zeroed(x))
