"""One pass over calibration data while collectors watch the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

from torch import Tensor, nn

from tp_cosep.calibration.io import Checkpoint
from tp_cosep.errors import InputError
from tp_cosep.utils.data import EMPTY, BatchAdapter, evaluating, n_samples, progress_bar, run_model

__all__ = ["Observer", "run_pass"]


class Observer(Protocol):
    """Something that measures a model while it runs on batch after batch."""

    def prepare(self, model: nn.Module, inputs: Any) -> None:
        """Called before a batch is run, while nobody is watching."""

    def watching(self, inputs: Any) -> AbstractContextManager[None]:
        """Around the run of a batch.

        Returns:
            What is entered before and left after it.
        """

    def add(self, labels: Tensor, i: int) -> None:
        """Called with the labels of the i-th batch after its run, if there are labels."""


def run_pass(
    model: nn.Module,
    adapter: BatchAdapter,
    batches: Iterable[Any],
    observers: Sequence[Observer],
    *,
    loader: Iterable[Any],
    what: str,
    progress: bool,
    with_labels: bool = True,
    may_be_empty: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Counter[int]:
    """Run a model on all batches, in eval mode and without gradients, while collectors watch.

    Args:
        model: The model.
        adapter: Of the batches.
        batches: The batches.
        observers: Whatever measures.
        loader: Where the batches are from, for the length of the progress bar.
        what: What is being measured, for the progress bar.
        progress: Show it on a terminal.
        with_labels: Whether the collectors are told labels.
        may_be_empty: Whether it is all right if no batch has a sample.
        checkpoint: Where the pass is kept on the way; one that was interrupted goes on behind the batches it has seen.

    Returns:
        Number of samples by label; empty without labels.

    Raises:
        InputError: If no batch has a sample, or labels are not as :meth:`BatchAdapter.labels` wants them.
    """
    n_done, samples = (0, Counter[int]()) if checkpoint is None else checkpoint.restore()
    has_run, i = n_done > 0, -1
    with evaluating(model):
        for i, batch in enumerate(progress_bar(batches, loader, what, shown=progress)):
            if i < n_done:
                continue
            inputs, given = adapter.split(batch, i)
            if n_samples(inputs) == 0:
                continue
            outputs = _watched(model, inputs, observers)
            has_run = True
            if with_labels:
                labels = adapter.labels(outputs, given, i)
                samples.update(labels.tolist())
                for observer in observers:
                    observer.add(labels, i)
            if checkpoint is not None:
                checkpoint.after(i + 1, samples)
    if checkpoint is not None and i + 1 > n_done:
        checkpoint.after(i + 1, samples, is_last=True)
    if not has_run and not may_be_empty:
        raise InputError(EMPTY)
    return samples


def _watched(model: nn.Module, inputs: Any, observers: Sequence[Observer]) -> Any:
    for observer in observers:
        observer.prepare(model, inputs)
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.watching(inputs))
        return run_model(model, inputs)
