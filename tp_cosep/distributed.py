"""Measuring in several processes, each with its share of the data: ``torch.distributed``, if it is initialised.

Every process ends with the moments of all data, the same in all of them, and so with the same selection.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from tp_cosep.collect import ClassCollector
from tp_cosep.errors import DistributedError, InputError
from tp_cosep.moments import ClassMoments
from tp_cosep.reader_moments import ReaderMoments
from tp_cosep.reading import Reading
from tp_cosep.second_moments import SecondMoments

__all__ = [
    "agreed",
    "all_samples",
    "averaged",
    "is_distributed",
    "merged_classes",
    "merged_readers",
    "merged_seconds",
    "own_path",
    "place",
]

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether there are other processes to measure with."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def place() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if is_distributed() else (0, 1)


def own_path(path: str | os.PathLike[str]) -> Path:
    """A path of this process's own: the rank is added where there are others."""
    return Path(f"{os.fspath(path)}.{place()[0]}" if is_distributed() else path)


def agreed(run: Callable[[], T]) -> T:
    """Do something in every process, and go on only if it went well in all of them.

    Without this the others would wait for a process that has given up.

    Args:
        run: What to do; must not communicate.

    Returns:
        Its result.

    Raises:
        DistributedError: If it failed in another process.
    """
    if not is_distributed():
        return run()
    try:
        result = run()
    except Exception as error:
        _gathered(f"{type(error).__name__}: {error}")
        raise
    for rank, problem in enumerate(_gathered(None)):
        if problem is not None:
            raise DistributedError(f"process {rank} of {distributed.get_world_size()} failed: {problem}")
    return result


def _gathered(value: Any) -> list[Any]:
    """What every process has, by rank."""
    values: list[Any] = [None] * distributed.get_world_size()
    try:
        distributed.all_gather_object(values, value)
    except Exception as error:
        raise DistributedError(
            f"a process is gone, or did not answer within the group's timeout ({type(error).__name__}: {error}); what "
            "this one measured is not used."
        ) from error
    return values


def _summed(x: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    try:
        distributed.all_reduce(x)
    except Exception as error:
        raise DistributedError(
            f"a process is gone, or did not answer within the group's timeout ({type(error).__name__}: {error}); what "
            "this one measured is not used."
        ) from error
    return x


def all_samples(samples: Counter[int]) -> Counter[int]:
    """Numbers of samples by label in all processes."""
    return sum(_gathered(samples), Counter()) if is_distributed() else samples


def merged_classes(collector: ClassCollector | None, device: torch.device) -> tuple[dict[str, ClassMoments], set[str]]:
    """Class moments of the data of all processes.

    Args:
        collector: What this process gathered; layers and classes may be missing where no sample reached them.
        device: Of the model.

    Returns:
        By layer name, of all layers that some process measured; and the layers that are unclear in one.

    Raises:
        InputError: If a layer has other channels or cells in another process.
    """
    moments = {} if collector is None else collector.moments
    unclear = set() if collector is None else collector.unclear
    if not is_distributed():
        return moments, unclear
    seen: dict[str, list[tuple[list[int], int, int]]] = {}
    own = {n: (m.classes.tolist(), m.n_components, m.n_cells) for n, m in moments.items()}
    for shapes, of_one in _gathered((own, unclear)):
        unclear = unclear | of_one
        for name, shape in shapes.items():
            seen.setdefault(name, []).append(shape)
    return {name: _merged(moments.get(name), name, shapes, device) for name, shapes in seen.items()}, unclear


def merged_readers(found: dict[str, ReaderMoments], model: nn.Module, device: torch.device) -> dict[str, ReaderMoments]:
    """What readers see of the data of all processes; class moments are left out.

    Args:
        found: What this process saw, by layer name.
        model: The model.
        device: Of the model.

    Returns:
        By layer name, of all layers that some process measured.
    """
    if not is_distributed():
        return found
    seen: dict[str, tuple[int, int]] = {}
    for sizes in _gathered({name: (m.reading.repeat, m.second.n_features) for name, m in found.items()}):
        seen = {**sizes, **seen}
    merged = {}
    for name, (repeat, n_features) in seen.items():
        layer = model.get_submodule(name)
        second = found[name].second if name in found else SecondMoments(n_features, device, n_folds=1)
        second.sum_up(_summed)
        merged[name] = ReaderMoments(Reading(layer, repeat=repeat), layer.weight.shape, second)  # type: ignore[arg-type]
    return merged


def _merged(
    own: ClassMoments | None, name: str, shapes: list[tuple[list[int], int, int]], device: torch.device
) -> ClassMoments:
    sizes = {shape[1:] for shape in shapes if shape[0]}
    if len(sizes) > 1:
        raise InputError(
            f"layer {name!r}: expected as many channels and cells in every process, got {sorted(sizes)}; give all of "
            "them inputs of one size, and with spatial='auto' n_classes."
        )
    if not sizes:
        return ClassMoments()
    classes = torch.tensor(sorted({label for shape in shapes for label in shape[0]}), device=device)
    count = torch.zeros(len(classes), dtype=torch.int64, device=device)
    total = torch.zeros(len(classes), *sizes.pop(), dtype=torch.float64, device=device)
    squares, has_own = torch.zeros_like(total), own is not None and not own.is_empty
    if own is not None and has_own:
        rows = torch.searchsorted(classes, own.classes)
        count[rows] = own.count
        total[rows] = own.mean * own.count[:, None, None]
    count = _summed(count)
    mean = _summed(total) / count[:, None, None]
    if own is not None and has_own:
        # About the common mean: M2 + n (mean − common mean)².
        squares[rows] = own.m2 + own.count[:, None, None] * (own.mean - mean[rows]).square()
    return ClassMoments(classes, count, mean, _summed(squares))


def averaged(buffers: Iterable[Tensor], n: int) -> int:
    """Make averages over n batches those over the batches of all processes, in place.

    Args:
        buffers: Averages, the same tensors in every process; worth nothing if n is 0.
        n: Number of batches of this process.

    Returns:
        Number of batches in all processes.
    """
    if not is_distributed():
        return n
    total: int = sum(_gathered(n))
    for x in buffers:
        share = x.double() * (n / max(total, 1)) if n else torch.zeros_like(x, dtype=torch.float64)
        x.copy_(_summed(share))
    return total


def merged_seconds(moments: Iterable[SecondMoments]) -> None:
    """Make second moments those of the data of all processes, in place; every process has the same layers."""
    if is_distributed():
        for second in moments:
            second.sum_up(_summed)
