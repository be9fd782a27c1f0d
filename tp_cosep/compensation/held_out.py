"""Whether a change of a model brings it nearer to what it was, by its outputs on held-out calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.errors import InputError
from tp_cosep.utils.data import EMPTY, CalibrationData, evaluating, n_samples, run_model, tensors_in
from tp_cosep.utils.distributed import agreed, is_distributed, summed

__all__ = ["HeldOut"]

# One batch of so many is held out, until there are enough samples.
_EVERY, _ENOUGH = 4, 256


class HeldOut:
    """Held-out batches, and what a model computes of them at the moment.

    One batch in four is held out, up to 256 samples; of less than four batches the last. No labels are used.

    Args:
        model: The model.
        data: The calibration data.

    Raises:
        InputError: If there are no batches.
    """

    def __init__(self, model: nn.Module, data: CalibrationData) -> None:
        self._data = data
        self._held: dict[int, tuple[Any, list[Tensor]]] = {}
        agreed(lambda: self._collect(model))

    def _collect(self, model: nn.Module) -> None:
        n, last = 0, None
        with evaluating(model):
            for i, inputs, _ in self._data.batches(self._data.adapter(model), "held-out outputs"):
                last = i, inputs
                if i % _EVERY == _EVERY - 1 and n < _ENOUGH:
                    self._held[i] = inputs, _outputs(model, inputs)
                    n += n_samples(inputs) or 0
            if last is None and not is_distributed():
                raise InputError(EMPTY)
            if not self._held and last is not None:
                self._held[last[0]] = last[1], _outputs(model, last[1])
        self._is_all = last is not None and last[0] == 0

    @property
    def rest(self) -> Iterable[Any]:
        """The loader without the held-out batches; all of it, if there is a single batch."""
        return self._data.loader if self._is_all else _Without(self._data.loader, self._held.keys())

    def error(self, model: nn.Module) -> float:
        """How far a model is from what it was when the batches were held out.

            Σ ‖f(x) − f₀(x)‖² / Σ ‖f₀(x) − mean f₀‖²

        over the floating-point outputs of the held-out batches, the mean per batch and output tensor.

        Args:
            model: The model.

        Returns:
            The error, ≥ 0; infinite if an output is NaN or has another shape, as those of a detector may have.
        """
        sums = torch.zeros(2, dtype=torch.float64)

        def add() -> None:
            with evaluating(model):
                for inputs, before in self._held.values():
                    after = _outputs(model, inputs)
                    if [x.shape for x in after] != [x.shape for x in before]:
                        sums[0] = torch.inf
                        return
                    for now, then in zip(after, before, strict=True):
                        sums[0] += (now - then).square().sum(dtype=torch.float64)
                        sums[1] += (then - then.mean(0)).square().sum(dtype=torch.float64)

        agreed(add)
        if is_distributed():
            summed(sums)
        error = float(sums[0] / sums[1].clamp(min=torch.finfo(torch.float64).tiny))
        return error if error == error else float("inf")


class _Without:
    """A loader without some of its batches, which can be read as often as the loader."""

    def __init__(self, loader: Iterable[Any], left_out: Iterable[int]) -> None:
        self._loader, self._left_out = loader, set(left_out)

    def __iter__(self) -> Iterator[Any]:
        return (batch for i, batch in enumerate(self._loader) if i not in self._left_out)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating-point outputs of a model, on the CPU."""
    return [x.float().cpu() for x in tensors_in(run_model(model, inputs)) if x.is_floating_point()]
