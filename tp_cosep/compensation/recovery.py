"""Recovery of the accuracy around pruning: compensation before each group, re-estimation and fine-tuning after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from tp_cosep.compensation.bn_statistics import recalibrate
from tp_cosep.compensation.compensator import Compensator
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
        recalibrate: Whether BatchNorm statistics are re-estimated after pruning.
        trace_options: Tracing options of the compensator.
        fit_options: Keywords of :meth:`tp_cosep.CoSePSelector.fit`, of which ``target_fn`` and ``progress`` are used.

    Attributes:
        compensator: The compensator; ``None`` without compensation.

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
        recalibrate: bool,
        trace_options: Mapping[str, Any],
        fit_options: Mapping[str, Any],
    ) -> None:
        if loader is not None:
            check_loader(loader, "CoSePPruner")
        if not isinstance(recalibrate, bool):
            raise InputError(f"CoSePPruner: expected recalibrate to be True or False, got {recalibrate!r}.")
        if recalibrate and loader is None:
            raise InputError("CoSePPruner: recalibrate=True runs the model on calibration data; pass loader=.")
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
        self._is_stale = False

    def measure(self) -> None:
        """Fit the compensator, unless its measurements are current; before any group, so that errors are about data.

        Raises:
            InputError: If there is no calibration data.
        """
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
        if self._recalibrates:
            data = self._data
            assert data is not None
            recalibrate(self._model, data.loader, target_fn=data.target_fn, progress=data.progress)
        if fine_tune is not None:
            fine_tune(self._model)
            self._is_stale = True

    def saved(self) -> Callable[[], None]:
        """Save the state; the returned function restores it, for a caller that restores the model, too."""
        is_stale = self._is_stale
        restore_compensator = None if self.compensator is None else self.compensator.saved()

        def restore() -> None:
            self._is_stale = is_stale
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
