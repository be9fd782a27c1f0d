"""Collectives over the processes of ``torch.distributed``, each with its share of the data.

Only :func:`gathered` and :func:`summed` require several processes; the others work in a single one, too.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from tp_cosep.errors import DistributedError

__all__ = ["agreed", "all_samples", "averaged", "gathered", "is_distributed", "own_path", "place", "summed"]

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether ``torch.distributed`` is initialised with several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def place() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) for a single one."""
    return (distributed.get_rank(), distributed.get_world_size()) if is_distributed() else (0, 1)


def own_path(path: str | os.PathLike[str]) -> Path:
    """A path for this process alone: the path with the rank appended, if there are several processes."""
    return Path(f"{os.fspath(path)}.{place()[0]}" if is_distributed() else path)


def agreed(run: Callable[[], T]) -> T:
    """Call a function in every process, and continue only if it succeeds in all of them.

    Otherwise the others would wait for a process that has failed.

    Args:
        run: The function; it must not communicate.

    Returns:
        Its result in this process.

    Raises:
        DistributedError: If it failed in another process. An exception in this process is raised as it is.
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


@contextmanager
def _reporting_lost_processes() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise DistributedError(
            f"a process is gone, or did not answer within the group's timeout ({type(error).__name__}: {error}); what "
            "this one measured is not used."
        ) from error


def gathered(value: Any) -> list[Any]:
    """Values of all processes, by rank; requires an initialised process group.

    Args:
        value: The value of this process; it is pickled.

    Returns:
        One value per process.

    Raises:
        DistributedError: If a process is gone or does not answer in time.
    """
    values: list[Any] = [None] * distributed.get_world_size()
    with _reporting_lost_processes():
        distributed.all_gather_object(values, value)
    return values


def summed(x: Tensor) -> Tensor:
    """Sum over all processes, in place; requires an initialised process group.

    Args:
        x: The tensor of this process, of one shape in all of them.

    Returns:
        x, now the sum.

    Raises:
        DistributedError: If a process is gone or does not answer in time.
    """
    with _reporting_lost_processes():
        distributed.all_reduce(x)
    return x


def all_samples(samples: Counter[int]) -> Counter[int]:
    """Numbers of samples by label, summed over all processes."""
    return sum(gathered(samples), Counter()) if is_distributed() else samples


def averaged(buffers: Iterable[Tensor], n: int) -> int:
    """Replace averages over the batches of one process by those over the batches of all processes, in place.

    Args:
        buffers: Averages over n batches, the same tensors in every process; ignored if n is 0.
        n: Number of batches of this process.

    Returns:
        Number of batches in all processes.

    Raises:
        DistributedError: If a process is gone or does not answer in time.
    """
    if not is_distributed():
        return n
    total: int = sum(gathered(n))
    for x in buffers:
        share = x.double() * (n / max(total, 1)) if n else torch.zeros_like(x, dtype=torch.float64)
        x.copy_(summed(share))
    return total
