"""Speed-up in time against that in MACs: a network and its pruned copy, timed in turns."""

from __future__ import annotations

import statistics
import time
from copy import deepcopy
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.compare.cells import head_of, ratio_for_speedup
from benchmarks.compare.data import Images
from benchmarks.compare.training import trained

__all__ = ["measure_latency"]


@torch.no_grad()
def _times(models: list[nn.Module], x: Tensor, n_rounds: int) -> list[float]:
    """Median seconds of a forward pass of each model, taken in turns."""
    times: list[list[float]] = [[] for _ in models]
    for i in range(n_rounds + 3):
        for model, seconds in zip(models, times, strict=True):
            start = time.perf_counter()
            model(x)
            if i >= 3:  # the first rounds are for warming up
                seconds.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def measure_latency(network: str, images: Images, speedup: float, n_rounds: int = 25) -> list[dict[str, Any]]:
    """Time a network against itself with all layers pruned by one ratio, as is and with counts rounded to 8.

    Time does not depend on which channels are kept: L1 selects them.

    Args:
        network: Name of a trained network; BatchNorm is not folded into convolutions.
        images: The data set.
        speedup: MACs before over MACs after, before rounding.
        n_rounds: Timed passes of each model.

    Returns:
        One record per rounding and batch size.
    """
    base = trained(network, images, 0)
    x = images.standardised(images.test[:64])
    ratio = ratio_for_speedup(base, x[:1], speedup)
    before = tp.utils.count_ops_and_params(base, x[:1])[0]
    records = []
    for round_to in (None, 8):
        model = deepcopy(base)
        imp = tp.importance.GroupMagnitudeImportance(p=1)
        options = {"pruning_ratio": ratio, "ignored_layers": [head_of(model)], "round_to": round_to}
        tp.pruner.BasePruner(model, x[:1], imp, **options).step()
        macs = before / tp.utils.count_ops_and_params(model, x[:1])[0]
        model = model.to(memory_format=torch.channels_last)
        for batch in (1, 64):
            seconds = _times([base, model], x[:batch], n_rounds)
            records.append(
                {
                    "network": network,
                    "data": images.name,
                    "speedup": speedup,
                    "round_to": round_to,
                    "batch": batch,
                    "macs": macs,
                    "milliseconds": [1000 * s for s in seconds],
                    "threads": torch.get_num_threads(),
                }
            )
    return records
