import io
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from tp_cosep.errors import InputError
from tp_cosep.functional.selection import select_channels
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.report import ModelStats, layer_rows, layer_table, measure, measure_models, model_rows, model_table
from tp_cosep.selection.result import GroupPlan

X = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def printed(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def rows_of(text):
    """The words of every line of a printed table."""
    return [line.split() for line in text.splitlines() if line.strip()]


def net():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 10, 3, stride=2, padding=1, bias=False),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(160, 4, bias=False),
    )


@pytest.fixture(scope="module")
def plan():
    x = torch.randn(64, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    selection = select_channels(torch.cdist(x, x), n_keep=17)
    return PruningPlan(
        (
            GroupPlan("stage1.conv", "out", ("stage1.conv", "skip.conv"), selection, "pruning_ratio"),
            GroupPlan("norm", "in", ("norm",), replace(selection, knee_k=None, knee_strength=0.0), "knee"),
            GroupPlan("grouped", "out", ("grouped",), selection.expanded(torch.arange(64).repeat(2)), "knee"),
            GroupPlan("head", "out", ("head",), None, "its channels are the model's output"),
        )
    )


class TestLayers:
    def test_numbers(self, plan):
        first, inputs, grouped, head = layer_rows(plan)
        selection = plan.groups[0].selection
        assert (first.group, first.layers) == ("stage1.conv", ("stage1.conv", "skip.conv"))
        assert (first.n_channels, first.n_kept, first.k, first.reason) == (64, 17, 17, "pruning_ratio")
        assert (first.knee_k, first.knee_strength) == (selection.knee_k, selection.knee_strength)
        assert (inputs.group, inputs.knee_k) == ("norm (inputs)", None)
        assert (grouped.n_channels, grouped.n_kept, grouped.k) == (128, 34, 17)
        assert (head.n_channels, head.n_kept, head.k, head.knee_k, head.knee_strength) == (None,) * 5
        assert head.reason == "its channels are the model's output"

    def test_kept_is_the_final_count(self, plan):
        """A ranking across layers may keep a number of channels other than k."""
        group = plan.groups[0]
        ranked = replace(group.selection, keep_idxs=(1, 2), prune_idxs=(0, *range(3, 64)))
        (row,) = layer_rows(PruningPlan((replace(group, selection=ranked),)))
        assert (row.n_kept, row.k) == (2, 17)

    @pytest.mark.parametrize("width", [80, 120])
    def test_table(self, plan, width):
        text = printed(layer_table(plan), width)
        rows = rows_of(text)
        selection = plan.groups[0].selection
        strength = f"{selection.knee_strength:.2f}"
        expected = ["stage1.conv", "17", "/", "64", "27%", "17", str(selection.knee_k), strength, "pruning_ratio"]
        assert expected in rows
        assert ["norm", "(inputs)", "17", "/", "64", "27%", "17", "–", "–", "knee"] in rows
        assert any(row[:6] == ["head", "–", "–", "–", "–", "–"] for row in rows)
        assert "…" not in text

    def test_names_are_not_markup(self):
        plan = PruningPlan((GroupPlan("blocks[0]", "out", (), None, "[bold]"),))
        text = printed(layer_table(plan))
        assert "blocks[0]" in text
        assert "[bold]" in text

    def test_groups_need_no_plan(self, plan):
        assert layer_rows(plan.groups) == layer_rows(iter(plan.groups)) == layer_rows(plan)
        assert printed(layer_table(plan.groups)) == printed(layer_table(plan))


class TestMeasure:
    def test_parameters_and_macs(self):
        """Counted by hand: products of convolutions and the linear layer, elements of BatchNorm and ReLU."""
        stats = measure(net(), X, n_runs=1)
        assert stats.n_parameters == 12 * 3 * 9 + 2 * 12 + 10 * 12 * 9 + 160 * 4
        products = 64 * 12 * 3 * 9 + 16 * 10 * 12 * 9 + 160 * 4
        assert stats.n_macs == products + 2 * 12 * 64 + 12 * 64
        assert stats.batch_size == 7
        assert stats.accuracy is None

    def test_the_model_is_unchanged(self):
        model = net()
        model.train()
        model[1].eval()
        model[3].weight.requires_grad_(False)
        calls = []
        model[0].register_forward_hook(lambda *args: calls.append(1))
        model(X).sum().backward()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        attributes = [set(vars(m)) for m in model.modules()]
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        modes = [m.training for m in model.modules()]

        measure(model, X, lambda m: float(m.train().training), n_runs=2)

        assert [m.training for m in model.modules()] == modes
        assert [set(vars(m)) for m in model.modules()] == attributes
        assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
        assert not model[3].weight.requires_grad
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        for p, grad in zip(model.parameters(), grads, strict=True):
            assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)

    def test_accuracy_is_evaluated_in_eval_mode(self):
        modes = []

        def evaluate(model):
            modes.append((model.training, torch.is_grad_enabled()))
            return 0.25

        model = net().train()
        assert measure(model, X, evaluate, n_runs=1).accuracy == 0.25
        assert modes == [(False, False)]

    def test_latency_is_the_median_after_the_warm_up(self):
        class Sleeper(nn.Module):
            def __init__(self, pauses):
                super().__init__()
                self.pauses = pauses
                self.n_calls = 0

            def forward(self, x):
                if len(x) > 1:  # operations are counted for the first sample only
                    time.sleep(self.pauses[self.n_calls])
                    self.n_calls += 1
                return x

        sleeper = Sleeper([0.3, 0.3, 0.3, 0.02, 0.9, 0.02])
        latency = measure(sleeper, X, n_warmup=3, n_runs=3).latency
        assert sleeper.n_calls == 6
        assert 0.02 <= latency < 0.2

    def test_models_take_turns(self):
        order = []

        class Named(nn.Module):
            def __init__(self, name, pause):
                super().__init__()
                self.name, self.pause = name, pause

            def forward(self, x):
                if len(x) > 1:
                    order.append(self.name)
                    time.sleep(self.pause)
                return x

        stats = measure_models({"slow": Named("a", 0.05), "fast": Named("b", 0.0)}, X, n_runs=3, n_warmup=1)
        assert order == ["a", "b"] * 4
        assert list(stats) == ["slow", "fast"]
        assert stats["slow"].latency >= 0.05 > stats["fast"].latency

    @pytest.mark.parametrize("kind", [tuple, list, dict])
    def test_several_inputs(self, kind):
        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(5, 3, bias=False)

            def forward(self, a, b, scale=1.0):
                return scale * self.layer(a) + self.layer(b)

        values = [torch.ones(4, 5), torch.ones(4, 5), 2.0]
        inputs = dict(zip(("a", "b", "scale"), values, strict=True)) if kind is dict else kind(values)
        stats = measure(Sum(), inputs, n_runs=1)
        assert (stats.n_macs, stats.n_parameters, stats.batch_size) == (2 * 15, 15, 4)

    @pytest.mark.parametrize("inputs", [(), {"a": 1.0}, torch.tensor(1.0), torch.zeros(0, 3, 8, 8)])
    def test_inputs_without_a_sample(self, inputs):
        with pytest.raises(InputError, match="expected example_inputs with a tensor of at least one sample"):
            measure(net(), inputs)

    @pytest.mark.parametrize(("n_runs", "n_warmup"), [(0, 0), (1, -1)])
    def test_numbers_of_runs(self, n_runs, n_warmup):
        with pytest.raises(InputError, match=f"got {n_runs} and {n_warmup}"):
            measure(net(), X, n_runs=n_runs, n_warmup=n_warmup)


STATS = {
    "trained": ModelStats(0.9213, 1_234_567, 4_089_184_256, 0.0421, 64),
    "pruned": ModelStats(0.9013, 308_642, 950, 0.02105, 64),
    "better": ModelStats(0.9313, 2_469_134, 15_300, 0.0842, 64),
    "unknown": ModelStats(None, 0, 1_999_999, 0.00001, 64),
}


class TestModels:
    def test_relative_to_the_first(self):
        first, pruned, better, unknown = model_rows(STATS)
        assert (first.name, first.accuracy_change, first.parameters_ratio) == ("trained", 0.0, 1.0)
        assert pruned.accuracy_change == pytest.approx(-2.0)
        assert pruned.parameters_ratio == 308_642 / 1_234_567
        assert pruned.macs_ratio == 950 / 4_089_184_256
        assert pruned.latency_ratio == 0.5
        assert better.accuracy_change == pytest.approx(1.0)
        assert better.latency_ratio == 2.0
        assert unknown.accuracy_change is None
        assert unknown.parameters_ratio == 0.0

    def test_first_model_without_anything_to_compare_with(self):
        first = ModelStats(None, 0, 0, 0.1, 1)
        row = model_rows({"a": first, "b": STATS["pruned"]})[1]
        assert (row.accuracy_change, row.parameters_ratio, row.macs_ratio) == (None, None, None)

    @pytest.mark.parametrize("width", [80, 120])
    def test_table(self, width):
        text = printed(model_table(STATS), width)
        rows = rows_of(text)
        assert ["trained", "92.13%", "1,234,567", "4.09", "G", "42.10", "ms"] in rows
        at = rows.index(["pruned", "90.13%", "308,642", "950", "21.05", "ms"])
        assert rows[at + 1] == ["−2.00", "0.25", "×", "0.00", "×", "0.50", "×"]
        at = rows.index(["better", "93.13%", "2,469,134", "15.3", "k", "84.20", "ms"])
        assert rows[at + 1][0] == "+1.00"
        at = rows.index(["unknown", "–", "0", "2.00", "M", "0.01", "ms"])
        assert rows[at + 1][0] == "–"
        assert "64 samples" in " ".join(text.split())
        assert "…" not in text

    def test_no_models(self):
        assert "accuracy" in printed(model_table({}))

    def test_names_are_not_markup(self):
        assert "[net]" in printed(model_table({"[net]": STATS["trained"]}))
