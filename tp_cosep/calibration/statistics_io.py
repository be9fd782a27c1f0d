"""What a selector measured, in a file and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tp_cosep.calibration.input_observer import InputStatistics
from tp_cosep.calibration.io import moments_of, read, tensors_of, write
from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.functional.second_moments import SecondMoments
from tp_cosep.graph.patches import Patches
from tp_cosep.utils.data import device_of

__all__ = ["load_measured", "save_measured"]


def save_measured(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    moments: dict[str, ClassMoments],
    consumers: dict[str, InputStatistics],
    attention: dict[str, Tensor],
) -> None:
    """Write what was measured.

    Args:
        path: Of the file.
        header: Of which model and how.
        moments: Class moments, by layer.
        consumers: What layers read, by layer.
        attention: Attention maps, by layer.
    """
    with_classes = {name: m.classes for name, m in consumers.items() if not m.classes.is_empty}
    tensors = {
        **tensors_of(moments, "moments"),
        **tensors_of(with_classes, "read"),
        **{f"second/{name}": m.second.folds for name, m in consumers.items()},
        **{f"attention/{name}": x for name, x in attention.items()},
    }
    n_classes = [m.n_classes for m in (*moments.values(), *with_classes.values())]
    facts = {
        "moments": [*moments],
        "consumers": {name: m.patches.repeat for name, m in consumers.items()},
        "read": [*with_classes],
        "attention": [*attention],
        "n_classes": max(n_classes, default=0),
    }
    write(path, tensors, {**header, "finished": facts})


def load_measured(
    path: str | os.PathLike[str], header: Mapping[str, Any], model: nn.Module, n_classes: int | None
) -> tuple[dict[str, ClassMoments], dict[str, InputStatistics], dict[str, Tensor]]:
    """The inverse of :func:`save_measured`.

    Args:
        path: Of the file.
        header: What it has to say.
        model: The model, where tensors are put.
        n_classes: Number of classes that must have been seen, if given.

    Returns:
        Class moments, what layers read, and attention maps.

    Raises:
        InputError: If the file does not exist, is damaged or of something else.
    """
    if not os.path.isfile(path):
        raise InputError(f"moments {os.fspath(path)!r}: expected a file that save_moments wrote, found none.")
    tensors, document = read(path, header)
    device = device_of(model)
    try:
        facts = document["finished"]
        if n_classes is not None and facts["n_classes"] != n_classes:
            raise InputError(
                f"moments {os.fspath(path)!r}: expected {n_classes} classes, got {facts['n_classes']}; fit again."
            )
        read_classes = moments_of(tensors, "read", facts["read"], device)
        consumers = {}
        for name, repeat in facts["consumers"].items():
            layer = model.get_submodule(name)
            second = SecondMoments.from_sums(tensors[f"second/{name}"].to(device))
            consumers[name] = InputStatistics(
                Patches(layer, repeat=repeat),
                layer.get_parameter("weight").shape,
                second,
                read_classes.get(name, ClassMoments()),
            )
        attention = {name: tensors[f"attention/{name}"].to(device) for name in facts["attention"]}
        return moments_of(tensors, "moments", facts["moments"], device), consumers, attention
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"moments {os.fspath(path)!r}: not what save_moments writes ({type(error).__name__}: {error}); if it is a "
            "checkpoint, pass it to fit(checkpoint=…)."
        ) from error
