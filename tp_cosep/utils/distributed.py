"""Several processes, each with its share of the data: ``torch.distributed``, if it is initialised."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from tp_cosep.errors import DistributedError

__all__ = ["agreed", "all_samples", "averaged", "gathered", "is_distributed", "own_path", "place", "summed"]

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
        gathered(f"{type(error).__name__}: {error}")
        raise
    for rank, problem in enumerate(gathered(None)):
        if problem is not None:
            raise DistributedError(f"process {rank} of {distributed.get_world_size()} failed: {problem}")
    return result


def gathered(value: Any) -> list[Any]:
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


def summed(x: Tensor) -> Tensor:
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
    return sum(gathered(samples), Counter()) if is_distributed() else samples


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
    total: int = sum(gathered(n))
    for x in buffers:
        share = x.double() * (n / max(total, 1)) if n else torch.zeros_like(x, dtype=torch.float64)
        x.copy_(summed(share))
    return total
