"""Recovery of the accuracy around pruning: compensation before each group, re-estimation and fine-tuning after."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from tp_cosep.compensation.bn_statistics import has_statistics, recalibrate, saved_statistics
from tp_cosep.compensation.compensator import Compensator
from tp_cosep.compensation.held_out import HeldOut
from tp_cosep.errors import InputError
from tp_cosep.graph.groups import DependencyGroup
from tp_cosep.utils.data import CalibrationData, check_loader

__all__ = ["Recovery"]


class Recovery:
    """Compensation, BatchNorm re-estimation and fine-tuning of a model that is pruned group by group.

    Args:
        model: The model.
        example_inputs: Inputs for tracing.
        loader: Calibration batches, or ``None``.
        compensate: Whether consumers are refitted; or the compensator's mode, or a compensator.
        recalibrate: Whether BatchNorm statistics are re-estimated after pruning; ``"auto"`` if that brings the outputs
            for held-out batches nearer to those of the unpruned model.
        trace_options: Tracing options of the compensator.
        fit_options: Keywords of :meth:`tp_cosep.CoSePSelector.fit`, of which ``target_fn`` and ``progress`` are used.

    Attributes:
        compensator: The compensator; ``None`` without compensation.
        is_recalibrated: Whether the last re-estimation stayed; ``None`` if there was none to decide on.

    Raises:
        InputError: If an option is invalid, the compensator is of another model, or calibration data is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        loader: Iterable[Any] | None,
        *,
        compensate: bool | str | Compensator,
        recalibrate: bool | str,
        trace_options: Mapping[str, Any],
        fit_options: Mapping[str, Any],
    ) -> None:
        if loader is not None:
            check_loader(loader, "CoSePPruner")
        if recalibrate != "auto" and not isinstance(recalibrate, bool):
            raise InputError(f"CoSePPruner: expected recalibrate to be True, False or 'auto', got {recalibrate!r}.")
        if recalibrate and loader is None:
            raise InputError(
                f"CoSePPruner: recalibrate={recalibrate!r} runs the model on calibration data; pass loader=."
            )
        self.compensator = _compensator(compensate, model, example_inputs, trace_options)
        if self.compensator is not None and loader is None and not self.compensator.is_fitted:
            raise InputError(
                "CoSePPruner: compensate= measures the inputs of layers; pass loader=, or a fitted Compensator."
            )
        self._model = model
        self._data = (
            loader
            if loader is None
            else CalibrationData(loader, fit_options.get("target_fn"), progress=fit_options.get("progress", True))
        )
        self._recalibrates = recalibrate
        self._held_out: HeldOut | None = None
        self._is_stale = False
        self.is_recalibrated: bool | None = None

    def measure(self) -> None:
        """Measure the model, unless it was measured as it is; before any group, so that errors are about data.

        Raises:
            InputError: If there is no calibration data.
        """
        if self._recalibrates == "auto" and (self._held_out is None or self._is_stale):
            assert self._data is not None
            self._held_out = HeldOut(self._model, self._data) if has_statistics(self._model) else None
        if self.compensator is None:
            self._is_stale = False
        if self.compensator is None or (self.compensator.is_fitted and not self._is_stale):
            return
        if self._data is None:
            raise InputError("CoSePPruner: compensate= has to measure the model, also after fine-tuning; pass loader=.")
        self.compensator.fit(self._data.loader, target_fn=self._data.target_fn, progress=self._data.progress)
        self._is_stale = False

    def before(self, group: DependencyGroup) -> None:
        """Refit the consumers of a group that is about to be pruned.

        Raises:
            InputError: If that fails, so that failures of the data are not taken for failures of the group.
        """
        if self.compensator is None:
            return
        try:
            self.compensator(group)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"CoSePPruner: refitting the consumers of a group failed ({type(error).__name__}: {error}); "
                "compensate='sequential' reads the data of loader= again for every group."
            ) from error

    def finish(self, fine_tune: Callable[[nn.Module], object] | None) -> None:
        """Re-estimate BatchNorm statistics and fine-tune, as requested, after a step has pruned its groups."""
        if self._recalibrates == "auto":
            self.is_recalibrated = None if self._held_out is None else self._recalibrated_if_better(self._held_out)
        elif self._recalibrates:
            self.is_recalibrated = self._recalibrate(None) > 0
        if fine_tune is not None:
            fine_tune(self._model)
            self._is_stale = True

    def _recalibrate(self, loader: Iterable[Any] | None) -> int:
        data = self._data
        assert data is not None
        loader = data.loader if loader is None else loader
        return recalibrate(self._model, loader, target_fn=data.target_fn, progress=data.progress)

    def _recalibrated_if_better(self, held_out: HeldOut) -> bool:
        """Re-estimate on all batches, if statistics of the others bring the held-out outputs nearer."""
        before = held_out.error(self._model)
        restore = saved_statistics(self._model)
        try:
            self._recalibrate(held_out.rest)
            is_better = held_out.error(self._model) < before
        except InputError as error:
            warnings.warn(f"CoSePPruner: BatchNorm statistics are not re-estimated: {error}", stacklevel=2)
            is_better = False
        restore()
        if is_better:
            self._recalibrate(None)
        return is_better

    def saved(self) -> Callable[[], None]:
        """Save the state; the returned function restores it, for a caller that restores the model, too."""
        state = {name: getattr(self, name) for name in ("_is_stale", "_held_out", "is_recalibrated")}
        restore_compensator = None if self.compensator is None else self.compensator.saved()

        def restore() -> None:
            vars(self).update(state)
            if restore_compensator is not None:
                restore_compensator()

        return restore


def _compensator(
    compensate: bool | str | Compensator, model: nn.Module, example_inputs: Any, trace_options: Mapping[str, Any]
) -> Compensator | None:
    if compensate is False or compensate is None:
        return None
    if isinstance(compensate, Compensator):
        if compensate.model is not model:
            raise InputError("CoSePPruner: expected a compensator of this model, got one of another.")
        return compensate
    return Compensator(model, example_inputs, mode="one-shot" if compensate is True else compensate, **trace_options)
