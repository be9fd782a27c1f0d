"""Pruning one architecture and checking everything about it: shared by the tests and by benchmarks/architectures.py."""

import copy
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from architectures import Architecture
from torch import nn
from torch_pruning.dependency import Group

from tp_cosep import CoSePPruner, CoSePSelector, PruningPlan

N_SAMPLES, N_LABELS = 8, 4

#: Reasons that are no failure: there was nothing to prune.
HARMLESS = ("its channels are the model's output", "in ignored_layers", "Torch-Pruning's trace did not reach it")


@dataclass
class Outcome:
    """A pruned model, the one it was, the plan, and data."""

    model: nn.Module
    original: nn.Module
    plan: PruningPlan
    inputs: torch.Tensor

    @property
    def n_pruned(self) -> int:
        """Groups that lost channels."""
        return len({(e.name, e.side) for e in self.plan if e.selection is not None and e.selection.prune_idxs})

    @property
    def left(self) -> dict[str, str]:
        """Groups that could not be pruned, and why."""
        return {e.name: e.reason for e in self.plan if e.selection is None and not e.reason.startswith(HARMLESS)}

    @property
    def n_parameters(self) -> tuple[int, int]:
        """Of the pruned model and of the original."""
        return tuple(sum(p.numel() for p in m.parameters()) for m in (self.model, self.original))


def data(architecture: Architecture) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of noise whose classes differ, and labels in turn."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(N_SAMPLES) % N_LABELS
    shape = (3, architecture.size, architecture.size)
    return torch.randn(N_SAMPLES, *shape, generator=generator) + torch.randn(N_LABELS, *shape, generator=generator)[
        y
    ], y


def fit(architecture: Architecture) -> tuple[nn.Module, CoSePSelector, torch.Tensor]:
    """The model, a selector that measured it, and the inputs."""
    model, (x, y) = architecture.build().eval(), data(architecture)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    with expected_warnings():
        selector = CoSePSelector(weights=None, spatial=1).fit(model, batches, rare_classes="drop", progress=False)
    return model, selector, x


@contextmanager
def expected_warnings():
    """What Torch-Pruning says of some models while it traces them, and what cannot be measured in others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        warnings.filterwarnings("ignore", message="Maximum recursive depth reached")
        warnings.filterwarnings("ignore", message="fit: cannot measure .*cpb_mlp")
        yield


def prune(
    architecture: Architecture, model: nn.Module, selector: CoSePSelector, x: torch.Tensor, ratio: float | None
) -> Outcome:
    """Prune a copy; what Torch-Pruning cannot prune is left alone."""
    pruned = copy.deepcopy(model)
    ignored = architecture.ignored_layers(pruned)
    with expected_warnings(), every_group_checked():
        pruner = CoSePPruner(pruned, x[:1], selector, pruning_ratio=ratio, ignored_layers=ignored, on_failure="skip")
        pruner.step()
    return Outcome(pruned, model, pruner.plan, x)


def check(outcome: Outcome) -> None:
    """The pruned model runs both ways; its plan, applied to a fresh copy, gives the same weights."""
    again = copy.deepcopy(outcome.original)
    with expected_warnings():
        outcome.plan.apply(again, outcome.inputs[:1])
    state, expected = again.state_dict(), outcome.model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    with torch.no_grad():
        before, after = tensors(outcome.original(outcome.inputs)), tensors(outcome.model(outcome.inputs))
    assert [t.shape for t in before] == [t.shape for t in after]
    assert all(torch.isfinite(t).all() for t in after)
    again.train()
    sum(t.square().sum() for t in tensors(again(outcome.inputs))).backward()
    trained = [p for p in again.parameters() if p.grad is not None]
    assert trained
    assert all(p.grad.shape == p.shape for p in trained)


def tensors(outputs) -> list[torch.Tensor]:
    """A model's outputs, whether one or several."""
    return [outputs] if isinstance(outputs, torch.Tensor) else [t for t in outputs if isinstance(t, torch.Tensor)]


@contextmanager
def every_group_checked():
    """Compare every layer that a group touches, before and after, by index_select of our own."""
    native = Group.prune

    def prune_and_compare(group, idxs=None, record_history=True):
        assert idxs is None
        layers = {}
        for dep, gone in group:
            layer = dep.target.module
            if isinstance(layer, nn.Module) and layer in group._DG._module2name and layer.state_dict():
                removed = layers.setdefault(layer, ({"out": set(), "in": set()}, copy.deepcopy(layer)))[0]
                is_out = group._DG.is_out_channel_pruning_fn(dep.handler)
                removed["out" if is_out else "in"].update(gone)
        native(group, idxs, record_history)
        for layer, (removed, before) in layers.items():
            assert_removed(before, layer, removed["out"], removed["in"])

    Group.prune = prune_and_compare
    try:
        yield
    finally:
        Group.prune = native


def assert_removed(before: nn.Module, after: nn.Module, out: set[int], into: set[int]) -> None:
    """A layer lost exactly some output and input channels."""
    kept = lambda n, gone: [i for i in range(n) if i not in gone]  # noqa: E731
    if isinstance(before, nn.modules.conv._ConvNd):
        weight, groups = before.weight, before.groups
        is_depthwise = groups == before.out_channels and groups > 1
        if before.transposed:
            weight = weight.transpose(0, 1)
        inner = kept(before.in_channels, into)
        if groups > 1:  # weights know the inputs of one channel group; all groups lose the same
            inner = list(range(weight.shape[1])) if is_depthwise else inner[: len(inner) // groups]
        weight = weight[kept(weight.shape[0], out)][:, inner]
        expected = weight.transpose(0, 1) if before.transposed else weight
    elif isinstance(before, nn.Linear):
        expected = before.weight[kept(before.out_features, out)][:, kept(before.in_features, into)]
    elif isinstance(before, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
        expected = None if before.weight is None else before.weight[kept(len(before.weight), out)]
    else:
        return
    assert expected is None or torch.equal(after.weight, expected), (
        f"{before}: other channels are left than were chosen"
    )
    bias = getattr(before, "bias", None)
    if bias is not None:
        assert torch.equal(after.bias, bias[kept(len(bias), out)]), f"{before}: bias"
