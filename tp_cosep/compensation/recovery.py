"""What a pruner does around its groups to keep the accuracy: repair before them, statistics and fine-tuning after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from tp_cosep.compensation.bn_statistics import recalibrate
from tp_cosep.compensation.compensator import Compensator
from tp_cosep.errors import InputError
from tp_cosep.utils.data import check_loader

__all__ = ["Recovery"]


class Recovery:
    """Repair, new statistics and fine-tuning of a model that is pruned group after group.

    Args:
        model: The model.
        example_inputs: For tracing.
        loader: Calibration data, or ``None``.
        compensate: As for :class:`tp_cosep.CoSePPruner`.
        recalibrate: Likewise.
        trace_options: Keywords for a compensator.
        fit_options: Those of :meth:`tp_cosep.CoSePSelector.fit` that say how to read batches.

    Attributes:
        compensator: The compensator; ``None`` without one.

    Raises:
        InputError: If a compensator is for another model, or there is nothing to measure on.
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
                "CoSePPruner: compensate= measures what layers read; pass loader=, or a fitted Compensator."
            )
        self._model = model
        self._loader = loader
        self._recalibrates = recalibrate
        self._batch_options = {"target_fn": fit_options.get("target_fn"), "progress": fit_options.get("progress", True)}
        self._is_stale = False

    def measure(self) -> None:
        """Measure what a repair needs, unless it is known: before any group, so that errors are about the data.

        Raises:
            InputError: If there is no data.
        """
        if self.compensator is None or (self.compensator.is_fitted and not self._is_stale):
            return
        if self._loader is None:
            raise InputError("CoSePPruner: compensate= has to measure the model, also after fine-tuning; pass loader=.")
        self.compensator.fit(self._loader, **self._batch_options)
        self._is_stale = False

    def before(self, group: Any) -> None:
        """Refit what reads a group that is about to be pruned.

        Raises:
            InputError: If that fails, which is not for the group to answer for: the data is read again for it.
        """
        if self.compensator is None:
            return
        try:
            self.compensator(group)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"CoSePPruner: repairing what reads a group failed ({type(error).__name__}: {error}); "
                "compensate='sequential' reads the data of loader= again for every group."
            ) from error

    def finish(self, fine_tune: Callable[[nn.Module], object] | None) -> None:
        """What comes when everything that was due is pruned: new statistics, and fine-tuning if there is any."""
        if self._recalibrates:
            assert self._loader is not None
            recalibrate(self._model, self._loader, **self._batch_options)
        if fine_tune is not None:
            fine_tune(self._model)
            self._is_stale = True

    def saved(self) -> Callable[[], None]:
        """Remember what is known now; the function that is returned puts it back, for a model that is put back too."""
        is_stale = self._is_stale
        put_back = None if self.compensator is None else self.compensator.saved()

        def restore() -> None:
            self._is_stale = is_stale
            if put_back is not None:
                put_back()

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
