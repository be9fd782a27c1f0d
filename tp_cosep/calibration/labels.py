"""What calibration data must be like for class moments: options, numbers of classes, and classes that are rare."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.utils.checks import check_one_of
from tp_cosep.utils.data import BatchAdapter, CalibrationData

__all__ = ["check_data", "finished", "guessed_classes"]


def check_data(data: CalibrationData) -> None:
    """Refuse unknown ways to treat labels and classes.

    Raises:
        InputError: If ``labels`` or ``rare_classes`` is unknown.
    """
    check_one_of("labels", data.labels, ("given", "predicted"), "fit")
    check_one_of("rare_classes", data.rare_classes, ("error", "drop"), "fit")


def guessed_classes(adapter: BatchAdapter, outputs: Any, given: Any, n_classes: int | None) -> int:
    """The number of classes, from a batch: the largest label or the width of the model's output, if that is a matrix.

    Args:
        adapter: Of the batches.
        outputs: Of the model, for samples of the first batch.
        given: The labels of that batch.
        n_classes: What the user says, if anything.

    Returns:
        What the user says, or a number that is not too large.
    """
    if n_classes is not None:
        return n_classes
    labels = adapter.labels(outputs, given, 0)
    seen = int(labels.max()) + 1 if len(labels) else 1
    return max(seen, outputs.shape[1] if isinstance(outputs, Tensor) and outputs.dim() == 2 else 0)


def finished(
    moments: dict[str, ClassMoments],
    unclear: set[str],
    samples: Counter[int],
    *,
    observe: str,
    rare_classes: str,
    consequence: str = "groups of such layers alone are left alone",
) -> dict[str, ClassMoments]:
    """What was gathered, once all batches were seen.

    Args:
        moments: By layer name.
        unclear: Layers whose tensors cannot be told apart by sample.
        samples: Number of samples by label.
        observe: What was measured of them.
        rare_classes: As for :class:`tp_cosep.utils.data.CalibrationData`, or ``"keep"``.
        consequence: What it means that a layer is unclear.

    Returns:
        Moments by layer name.

    Raises:
        InputError: If there are fewer than two classes, or a class has too few samples.
    """
    named = sorted(unclear & set(moments))
    if named and samples:
        warnings.warn(
            f"fit: cannot measure {', '.join(named)}: what in the {observe} of these layers belongs to which "
            f"sample cannot be told; {consequence}.",
            stacklevel=4,
        )
    return _drop_rare_classes(moments, samples, rare_classes)


def _drop_rare_classes(
    moments: dict[str, ClassMoments], samples: Counter[int], rare_classes: str
) -> dict[str, ClassMoments]:
    rare = sorted(label for label, n in samples.items() if n < 2) if rare_classes != "keep" else []
    if rare and rare_classes == "error":
        raise InputError(
            f"fit: expected at least two samples of every class, got one of class {_enumerate(rare)}; use more "
            "calibration data, or rare_classes='drop' to leave such classes out."
        )
    if len(samples) - len(rare) < 2:
        raise InputError(
            f"fit: expected samples of at least two classes, got {len(samples)} (class {_enumerate(sorted(samples))}), "
            f"{len(rare)} of them with a single sample; every selector but ReconstructionSelector(class_weight=0) and "
            "AttentionMapSelector requires classes to tell apart."
        )
    if not rare:
        return moments
    warnings.warn(f"fit: left out class {_enumerate(rare)}, seen only once.", stacklevel=4)
    dropped = torch.tensor(rare)
    return {name: m.without(dropped) for name, m in moments.items()}


def _enumerate(labels: list[int], limit: int = 10) -> str:
    shown = ", ".join(map(str, labels[:limit]))
    return shown if len(labels) <= limit else f"{shown} and {len(labels) - limit} more"
