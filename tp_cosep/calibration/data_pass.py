"""One pass over calibration data, under the eyes of observers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

from torch import Tensor, nn

from tp_cosep.calibration.io import Checkpoint
from tp_cosep.errors import InputError
from tp_cosep.utils.data import EMPTY, CalibrationData, evaluating, run_model

__all__ = ["Observer", "run_pass"]


class Observer(Protocol):
    """Collects statistics of a model while it runs on batch after batch."""

    def prepare(self, model: nn.Module, inputs: Any) -> None:
        """Called before a batch is run, outside of :meth:`watching`."""

    def watching(self, inputs: Any) -> AbstractContextManager[None]:
        """Around the run of a batch.

        Returns:
            A context manager that is entered before the run and left after it.
        """

    def add(self, labels: Tensor, i: int) -> None:
        """Called with the labels of the i-th batch after its run, if there are labels."""


def run_pass(
    model: nn.Module,
    data: CalibrationData,
    observers: Sequence[Observer],
    description: str,
    *,
    batches: Iterable[Any] | None = None,
    with_labels: bool = True,
    may_be_empty: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Counter[int]:
    """Run a model on all batches, in eval mode and without gradients, under the eyes of observers.

    Args:
        model: The model.
        data: The calibration data.
        observers: What collects statistics.
        description: What is collected, for the progress bar.
        batches: The batches, if the loader was looked into already.
        with_labels: Whether the observers are told labels.
        may_be_empty: Whether a pass without samples is allowed.
        checkpoint: Keeps the pass on the way; an interrupted pass goes on behind the batches that it has seen.

    Returns:
        Number of samples by label; empty without labels.

    Raises:
        InputError: If no batch has a sample, or labels are not as :meth:`tp_cosep.utils.data.BatchAdapter.labels`
            requires.
    """
    n_done, samples = (0, Counter[int]()) if checkpoint is None else checkpoint.restore()
    adapter = data.adapter(model, with_labels=with_labels)
    n_seen = n_done
    with evaluating(model):
        for i, inputs, given in data.batches(adapter, description, batches, skip=n_done):
            outputs = _observed(model, inputs, observers)
            n_seen = i + 1
            if with_labels:
                labels = adapter.labels(outputs, given, i)
                samples.update(labels.tolist())
                for observer in observers:
                    observer.add(labels, i)
            if checkpoint is not None:
                checkpoint.after(n_seen, samples)
    if checkpoint is not None and n_seen > n_done:
        checkpoint.after(n_seen, samples, is_last=True)
    if not n_seen and not may_be_empty:
        raise InputError(EMPTY)
    return samples


def _observed(model: nn.Module, inputs: Any, observers: Sequence[Observer]) -> Any:
    for observer in observers:
        observer.prepare(model, inputs)
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.watching(inputs))
        return run_model(model, inputs)
