"""Whether a pruned model computes what the unpruned one computes without the removed channels.

Torch-Pruning follows channels by shape. Where shapes fit by accident (a shuffle of channels, halves of a ``chunk`` that
are read in another order, a flattening with channels last), other channels go from a layer than from the one that
reads it, and nothing fails. Values show it: a channel that is gone and a channel that nobody reads are the same.
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
from tp_cosep.utils.data import evaluating

__all__ = ["OutputCheck"]

# Layers that treat every channel by itself, or read a weighted sum of channels. Others, such as LayerNorm, look at all
# channels at once: what they compute without some of them is another thing from what they compute with zeros.
_CHANNELWISE = (_ConvNd, nn.Linear, _BatchNorm, _InstanceNorm, nn.PReLU, nn.Embedding, nn.Parameter)

# Outputs may differ by this share of the largest one by rounding.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_ADVICE = "put this layer into ignored_layers, or leave such groups alone with on_failure='skip'"


class OutputCheck:
    """Runs a model on example inputs before and after a group is pruned.

    Args:
        model: The model.
        run: Calls it on the example inputs.
    """

    def __init__(self, model: nn.Module, run: Callable[[], Any]) -> None:
        self._model = model
        self._run = run
        self._shapes: list[tuple[int, ...]] = []
        self._without: list[Tensor] = []

    def outputs(self) -> list[Tensor]:
        """The tensors that the model gives in eval mode."""
        with evaluating(self._model):
            outputs = tp.utils.flatten_as_list(self._run())
        return [t for t in outputs if isinstance(t, Tensor)] if isinstance(outputs, list) else []

    def expect_shapes(self) -> None:
        """Remember the shapes of the outputs: they are to stay."""
        self._shapes = [tuple(t.shape) for t in self.outputs()]

    def expect_without(self, group: Any) -> None:
        """Remember the outputs when nobody reads the channels that a group is about to remove."""
        self._without = _outputs_without(group, self.outputs) or []

    def __call__(self, name: str) -> None:
        """Compare the outputs with what was expected, and expect nothing more of the values.

        Args:
            name: The layer whose group was pruned.

        Raises:
            PruningError: If the model does not run, or its outputs have other shapes or values.
        """
        without, self._without = self._without, []
        try:
            outputs = self.outputs()
        except Exception as error:
            raise PruningError(
                f"layer {name!r}: the model no longer runs on example_inputs after its group was pruned "
                f"({type(error).__name__}: {error}); the model is as it was. If its code has a size of its own written "
                f"down, pass adapt=, a function that corrects it; else {_ADVICE}."
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
                "channels from a layer that reads them than from those that create them, as it does behind a shuffle "
                f"of channels. The model is as it was; {_ADVICE}. If the model looks at all channels at once in "
                "between, such as by a mean over them, turn this comparison off with verify=False."
            )


def _outputs_without(group: Any, run: Callable[[], list[Tensor]]) -> list[Tensor] | None:
    """The outputs of a model in which nobody reads the channels that a group removes.

    Args:
        group: A ``tp.Group`` that was not pruned yet.
        run: Gives the model's outputs.

    Returns:
        The outputs; ``None`` if they could not be compared with those after pruning, since a layer of the group
        looks at all channels at once or no layer reads them by weights.
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
    """An index of the weights that belong to some input channels."""
    n_groups = getattr(layer, "groups", 1)
    if n_groups > 1:  # weights know the channels of one channel group; all groups lose the same
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
    """The largest difference between outputs, as a share of the largest expected one; 0 if nothing compares."""
    shares = [0.0]
    for a, b in zip(outputs, expected, strict=False):
        if a.shape != b.shape or not b.is_floating_point() or not b.numel():
            continue
        scale = float(b.abs().max())
        if scale > 0 and bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all()):
            shares.append(float((a - b).abs().max()) / scale)
    return max(shares)
