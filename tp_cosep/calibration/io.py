"""Statistics in a file: to be kept, and to go on from after an interruption.

A file is one of safetensors, so nothing in it is ever executed. Its header says what was collected, of which model and
how; a file that does not fit is refused. A file is replaced in one step, so that an interruption leaves the old one.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tp_cosep.calibration.input_observer import InputStatistics
from tp_cosep.calibration.statistics import Statistics
from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.functional.second_moments import SecondMoments
from tp_cosep.graph.patches import Patches
from tp_cosep.utils.data import device_of
from tp_cosep.utils.files import digest, read_safetensors, replacing, write_safetensors

__all__ = [
    "Checkpoint",
    "Part",
    "fingerprint",
    "load_statistics",
    "moments_of",
    "read",
    "save_statistics",
    "tensors_of",
    "write",
]

_FORMAT, _VERSION = "tp_cosep.statistics", 1
# A pass of few, slow batches is kept too.
_SECONDS = 30
_FIELDS = ("classes", "count", "mean", "m2")


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and values of a model's parameters and buffers."""
    return digest({name: x for name, x in model.state_dict().items() if isinstance(x, Tensor)})


def tensors_of(moments: Mapping[str, ClassMoments], part: str) -> dict[str, Tensor]:
    """Class moments of layers as tensors under names of their own."""
    return {f"{part}/{name}/{key}": getattr(m, key) for name, m in moments.items() for key in _FIELDS}


def moments_of(
    tensors: Mapping[str, Tensor], part: str, names: list[str], device: torch.device
) -> dict[str, ClassMoments]:
    """The inverse of :func:`tensors_of`, for layers in the order of their names."""
    return {name: ClassMoments(*(tensors[f"{part}/{name}/{key}"].to(device) for key in _FIELDS)) for name in names}


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a file, or leave the old one as it was.

    Args:
        path: Of the file, in a folder that exists.
        tensors: By name.
        header: Whatever JSON can hold.

    Raises:
        InputError: If the folder does not exist.
    """
    with replacing(path, "statistics") as temporary:
        write_safetensors(temporary, tensors, {"format": _FORMAT, "version": _VERSION, **header})


def read(path: str | os.PathLike[str], expected: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that :func:`write` wrote.

    Args:
        path: Of the file.
        expected: What the header has to say.

    Returns:
        Tensors by name, on the CPU, and the header.

    Raises:
        InputError: If the file is damaged, none of moments, or not what is expected.
    """
    try:
        tensors, document = read_safetensors(path)
    except ValueError as error:
        raise InputError(
            f"statistics {str(path)!r}: damaged, or no file of statistics ({error}); delete it."
        ) from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise InputError(f"statistics {str(path)!r}: expected a file of statistics, got another one.")
    if document.get("version") != _VERSION:
        raise InputError(
            f"statistics {str(path)!r}: expected version {_VERSION}, got {document.get('version')!r}; update tp_cosep."
        )
    for key, value in expected.items():
        if document.get(key) != value:
            what = "the model has other weights" if key == "model" else f"{key} was {document.get(key)!r}, is {value!r}"
            raise InputError(f"statistics {str(path)!r}: taken for something else: {what}; delete it to collect again.")
    return tensors, document


class Part(Protocol):
    """Something that is kept in a checkpoint."""

    def state(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors under names that begin with that of the part, and what JSON can hold."""

    def restore(self, part: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], device: torch.device) -> None:
        """The inverse of :meth:`state`."""


@dataclass
class Checkpoint:
    """Where a pass over the data is kept on the way.

    Attributes:
        path: Of the file.
        every: Batches between two writes; after half a minute there is one too.
        header: What is measured of what.
        device: Of the model.
        parts: Whatever measures, by name.
        written: When the file was written last.
    """

    path: Path
    every: int
    header: Mapping[str, Any]
    device: torch.device
    parts: dict[str, Part] = field(default_factory=dict)
    written: float = field(default_factory=time.monotonic)

    def restore(self) -> tuple[int, Counter[int]]:
        """Go on from the file, if there is one.

        Returns:
            How many batches were seen, and the number of samples by label.

        Raises:
            InputError: If the file is damaged, or of something else.
        """
        if not self.path.is_file():
            return 0, Counter()
        tensors, document = read(self.path, self.header)
        try:
            for name, part in self.parts.items():
                part.restore(name, tensors, document["parts"][name], self.device)
            return int(document["n_batches"]), Counter({int(k): int(n) for k, n in document["samples"].items()})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"statistics {str(self.path)!r}: damaged, {type(error).__name__}: {error}; delete it to collect again."
            ) from error

    def after(self, n_batches: int, samples: Counter[int], *, is_last: bool = False) -> None:
        """Write the file, if it is time to."""
        if not is_last and n_batches % self.every and time.monotonic() - self.written < _SECONDS:
            return
        states = {name: part.state(name) for name, part in self.parts.items()}
        write(
            self.path,
            {key: x for tensors, _ in states.values() for key, x in tensors.items()},
            {
                **self.header,
                "n_batches": n_batches,
                "samples": {str(label): n for label, n in samples.items()},
                "parts": {name: facts for name, (_, facts) in states.items()},
            },
        )
        self.written = time.monotonic()


def save_statistics(path: str | os.PathLike[str], header: Mapping[str, Any], statistics: Statistics) -> None:
    """Write statistics.

    Args:
        path: Of the file.
        header: Which options they were collected with.
        statistics: The statistics.
    """
    with_classes = {name: m.classes for name, m in statistics.inputs.items() if not m.classes.is_empty}
    tensors = {
        **tensors_of(statistics.moments, "moments"),
        **tensors_of(with_classes, "inputs"),
        **{f"second/{name}": m.second.folds for name, m in statistics.inputs.items()},
        **{f"attention/{name}": x for name, x in statistics.attention.items()},
    }
    n_classes = [m.n_classes for m in (*statistics.moments.values(), *with_classes.values())]
    facts = {
        "moments": [*statistics.moments],
        "consumers": {name: m.patches.repeat for name, m in statistics.inputs.items()},
        "inputs": [*with_classes],
        "attention": [*statistics.attention],
        "n_classes": max(n_classes, default=0),
    }
    write(path, tensors, {"model": statistics.fingerprint, **header, "finished": facts})


def load_statistics(
    path: str | os.PathLike[str], header: Mapping[str, Any], model: nn.Module, n_classes: int | None
) -> Statistics:
    """The inverse of :func:`save_statistics`.

    Args:
        path: Of the file.
        header: Which options the statistics must have been collected with.
        model: The model that they must be of; tensors are put on its device.
        n_classes: Number of classes that must have been seen, if given.

    Returns:
        The statistics, without shapes of weights.

    Raises:
        InputError: If the file does not exist, is damaged or of something else.
    """
    name_of_file = os.fspath(path)
    if not os.path.isfile(path):
        raise InputError(f"statistics {name_of_file!r}: expected a file that save_statistics wrote, found none.")
    name_of_model = fingerprint(model)
    tensors, document = read(path, {"model": name_of_model, **header})
    device = device_of(model)
    try:
        facts = document["finished"]
        if n_classes is not None and facts["n_classes"] != n_classes:
            raise InputError(
                f"statistics {name_of_file!r}: expected {n_classes} classes, got {facts['n_classes']}; fit again."
            )
        of_inputs = moments_of(tensors, "inputs", facts["inputs"], device)
        inputs = {}
        for name, repeat in facts["consumers"].items():
            layer = model.get_submodule(name)
            inputs[name] = InputStatistics(
                Patches(layer, repeat=repeat),
                layer.get_parameter("weight").shape,
                SecondMoments.from_sums(tensors[f"second/{name}"].to(device)),
                of_inputs.get(name, ClassMoments()),
            )
        return Statistics(
            moments=moments_of(tensors, "moments", facts["moments"], device),
            inputs=inputs,
            attention={name: tensors[f"attention/{name}"].to(device) for name in facts["attention"]},
            fingerprint=name_of_model,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"statistics {name_of_file!r}: not what save_statistics writes ({type(error).__name__}: {error}); if it is "
            "a checkpoint, pass it to fit(checkpoint=…)."
        ) from error
