"""The processes of a run: one, or those that ``torchrun`` or ``accelerate launch`` started."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from torch import distributed

from tp_cosep.cli.console import say
from tp_cosep.cli.models import module_of
from tp_cosep.utils.distributed import is_distributed

__all__ = ["Processes", "processes"]


class Processes:
    """Accelerate's view of the processes, and a console on which only the first one prints.

    Args:
        accelerator: An ``accelerate.Accelerator``.

    Attributes:
        accelerator: The ``accelerate.Accelerator``.
        device: Device of this process.
        is_first: Whether this process is the one that prints and writes files.
        console: The console; quiet in all other processes.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.is_first: bool = accelerator.is_main_process
        self.console = Console(quiet=not self.is_first)

    def say(self, text: str) -> None:
        """Print a line."""
        say(text, self.console)

    def sum(self, values: list[int]) -> list[int]:
        """Sum each value over all processes."""
        total = self.accelerator.reduce(torch.tensor(values, device=self.device), "sum")
        found: list[int] = total.tolist()
        return found

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Broadcast tensors of the first process to all others."""
        if is_distributed():
            for x in tensors:
                distributed.broadcast(x, 0)

    def wait(self) -> None:
        """Wait for all other processes."""
        self.accelerator.wait_for_everyone()


@contextmanager
def processes(options: argparse.Namespace) -> Iterator[Processes]:
    """Join the other processes, if there are any, and leave the process group at the end.

    Args:
        options: Options of the command.

    Yields:
        The processes.

    Raises:
        MissingDependencyError: If Accelerate is not installed.
    """
    accelerate = module_of("accelerate", "cli")
    # torch.accelerator is newer than the oldest supported torch.
    on_cpu = options.device == "cpu" or not getattr(torch, "accelerator", torch.cuda).is_available()
    precision = getattr(options, "mixed_precision", "no")
    try:
        together = Processes(accelerate.Accelerator(mixed_precision=precision, cpu=on_cpu))
        with warnings.catch_warnings():
            if not together.is_first:  # they would be repeated
                warnings.simplefilter("ignore")
            yield together
    finally:
        # Accelerate keeps one state per interpreter; the next run may have other options.
        accelerate.state.AcceleratorState._reset_state(True)
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
