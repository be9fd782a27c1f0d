"""Verification that a pruned model computes what the unpruned one computes without the removed channels.

Torch-Pruning follows channels by shape. Where shapes fit by accident (a shuffle of channels, halves of a ``chunk`` that
are consumed in another order, a flattening with channels last), it removes different channels from a producer and from
its consumer, without an error. Values reveal it: a removed channel is equivalent to one with zero weights in all
consumers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from tp_cosep.errors import PruningError
from tp_cosep.graph.protocols import DependencyGroup
from tp_cosep.utils.data import evaluating

__all__ = ["OutputCheck"]

# Layers that work channel by channel, or on weighted sums of channels. Others, such as LayerNorm, take statistics over
# all channels, which differ between removed and zero channels.
_CHANNELWISE = (_ConvNd, nn.Linear, _BatchNorm, _InstanceNorm, nn.PReLU, nn.Embedding, nn.Parameter)

# Rounding may change outputs by this share of the largest one.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_ADVICE = "put this layer into ignored_layers, or skip such groups with on_failure='skip'"


class OutputCheck:
    """Compares a model's outputs on example inputs before and after a group is pruned.

    Args:
        model: The model.
        run: Runs the model on the example inputs.
    """

    def __init__(self, model: nn.Module, run: Callable[[], Any]) -> None:
        self._model = model
        self._run = run
        self._shapes: list[tuple[int, ...]] = []
        self._without: list[Tensor] = []

    def outputs(self) -> list[Tensor]:
        """The tensors among the model's outputs in eval mode."""
        with evaluating(self._model):
            outputs = tp.utils.flatten_as_list(self._run())
        return [t for t in outputs if isinstance(t, Tensor)] if isinstance(outputs, list) else []

    def expect_shapes(self) -> None:
        """Record the shapes of the outputs, which pruning must not change."""
        self._shapes = [tuple(t.shape) for t in self.outputs()]

    def expect_without(self, group: DependencyGroup) -> None:
        """Record the outputs with zero weights for the channels that a group is about to remove."""
        self._without = _outputs_without(group, self.outputs) or []

    def __call__(self, name: str) -> None:
        """Compare the outputs with the recorded ones; recorded values serve once.

        Args:
            name: Root of the group that was pruned.

        Raises:
            PruningError: If the model does not run, or its outputs have other shapes or values.
        """
        without, self._without = self._without, []
        try:
            outputs = self.outputs()
        except Exception as error:
            raise PruningError(
                f"layer {name!r}: the model no longer runs on example_inputs after its group was pruned "
                f"({type(error).__name__}: {error}); the model is as it was. If its code contains sizes, pass "
                f"adapt=, a function that corrects them; else {_ADVICE}."
            ) from error
        shapes = [tuple(t.shape) for t in outputs]
        if shapes != self._shapes:
            raise PruningError(
                f"layer {name!r}: pruning its group changed the output from {self._shapes} to {shapes}; the model is "
                f"as it was; {_ADVICE}."
            )
        difference = _largest_difference(outputs, without)
        if difference > _TOLERANCES.get(outputs[0].dtype if outputs else torch.float32, 0.05):
            raise PruningError(
                f"layer {name!r}: after its group was pruned the model does not compute what it computed when nothing "
                f"read these channels (outputs differ by {difference:.1%} of the largest); Torch-Pruning takes other "
                "channels from a consumer than from the producers, as it does behind a shuffle of channels. The model "
                f"is as it was; {_ADVICE}. If the model takes statistics over all channels in between, such as their "
                "mean, turn this comparison off with verify=False."
            )


def _outputs_without(group: DependencyGroup, run: Callable[[], list[Tensor]]) -> list[Tensor] | None:
    """The outputs of a model whose consumers have zero weights for the channels that a group removes.

    Args:
        group: A ``tp.Group`` that is not pruned yet.
        run: Returns the model's outputs.

    Returns:
        The outputs; ``None`` if they are not comparable with those after pruning, since a layer of the group takes
        statistics over all channels, or the group has no consumer with weights.
    """
    graph, reads = group._DG, list[tuple[Tensor, Any]]()
    for dep, idxs in group:
        layer = dep.target.module
        if layer not in graph._module2name or (isinstance(layer, nn.Module) and not _has_weights(layer)):
            continue
        if not isinstance(layer, _CHANNELWISE):
            return None
        if isinstance(layer, (_ConvNd, nn.Linear)) and not graph.is_out_channel_pruning_fn(dep.handler):
            reads.append((layer.weight, _columns(layer, idxs)))
    if not reads:
        return None
    with _zeroed(reads):
        return run()


def _has_weights(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None


def _columns(layer: nn.Module, idxs: Sequence[int]) -> Any:
    """Index into a layer's weight of the given input channels."""
    n_groups = getattr(layer, "groups", 1)
    if n_groups > 1:  # weights have the channels of one channel group; all groups lose the same
        idxs = sorted(idxs)[: len(idxs) // n_groups]
    columns = torch.as_tensor(list(idxs), dtype=torch.int64)
    return columns if getattr(layer, "transposed", False) else (slice(None), columns)


@contextmanager
def _zeroed(parts: Sequence[tuple[Tensor, Any]]) -> Iterator[None]:
    saved = [(weight, weight.detach().clone()) for weight, _ in parts]
    try:
        with torch.no_grad():
            for weight, index in parts:
                weight[index] = 0
        yield
    finally:
        with torch.no_grad():
            for weight, values in saved:
                weight.copy_(values)


def _largest_difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference between outputs, as a share of the largest expected one; 0 if none are comparable."""
    shares = [0.0]
    for a, b in zip(outputs, expected, strict=False):
        if a.shape != b.shape or not b.is_floating_point() or not b.numel():
            continue
        scale = float(b.abs().max())
        if scale > 0 and bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all()):
            shares.append(float((a - b).abs().max()) / scale)
    return max(shares)
