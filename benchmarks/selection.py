"""Time and quality of a selection, against the full path: every k swapped to convergence, one after the other.

    python benchmarks/selection.py
    python benchmarks/selection.py --largest 1024

Prints a Markdown table: the processor time of ``select_channels``, automatic and for half of the channels; that of the
full path, its curve and its knee alone, by the same k-medoids steps; the knee and its height from both; and the mean
ratio of the total deviation to FasterPAM's with a random start (the package kmedoids), over the k that were tried.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import kmedoids
import torch
from torch import Tensor

from tp_cosep.functional.kmedoids import GrowingPath
from tp_cosep.functional.knee import Knee, find_knee
from tp_cosep.functional.selection import select_channels
from tp_cosep.functional.separability import distances_from_gram
from tp_cosep.functional.silhouette import mss_curve
from tp_cosep.functional.swap_table import few_threads

T = TypeVar("T")


def latent(n: int, seed: int = 0) -> Tensor:
    """Distances as those of trained layers: curved profiles over twelve hidden causes, channels of any strength."""
    g = torch.Generator().manual_seed(seed)
    strength = torch.rand(n, 1, generator=g, dtype=torch.float64).log().neg()
    causes = strength * torch.randn(n, 12, generator=g, dtype=torch.float64)
    mixed = causes @ torch.randn(12, 720, generator=g, dtype=torch.float64)
    profiles = 2 - 2 * (-mixed.square() / 12).exp()
    return distances_from_gram(profiles @ profiles.T)


def planted(n: int, seed: int = 0) -> Tensor:
    """Noisy copies (5 %) of n/4 distinct profiles."""
    g = torch.Generator().manual_seed(seed)
    profiles = 2 * torch.rand(n // 4, 45, generator=g, dtype=torch.float64)[torch.arange(n) % (n // 4)]
    profiles += 0.1 * torch.randn(n, 45, generator=g, dtype=torch.float64)
    return distances_from_gram(profiles @ profiles.T)


def full_knee(d: Tensor) -> Knee:
    """The knee of the whole curve."""
    with few_threads(d):
        path = GrowingPath(d, list(range(1, len(d) + 1)))
        solutions = [path.solve(k) for k in range(2, len(d) + 1)]
        return find_knee([s.k for s in solutions], mss_curve(d, solutions).tolist())


def timed(call: Callable[[], T], repeats: int) -> tuple[T, float]:
    """A result, and the least of some processor times in seconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        times.append(time.process_time() - start)
    return result, min(times)


def deviation_ratio(d: Tensor, ks: tuple[int, ...]) -> float:
    """Mean of TD / FasterPAM's TD over about twenty of the ks."""
    path, ratios = GrowingPath(d), []
    for k in ks[:-1][:: max(1, len(ks) // 20)]:
        ratios.append(path.solve(k).total_deviation / kmedoids.fasterpam(d.numpy(), k, random_state=0).loss)
    return sum(ratios) / len(ratios)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=2048, help="largest number of channels")
    torch.set_num_threads(1)
    largest = parser.parse_args().largest
    print(
        "| matrix | N | selection, ms | n_keep = N/2, ms | full path / selection | k tried | knee, full | height, full "
        "| TD / FasterPAM |"
    )
    print("|" + " --- |" * 9)
    for n in (n for n in (64, 128, 256, 512, 768, 1280, 2048) if n <= largest):
        for matrix in (latent, planted):
            d = matrix(n)
            selection, own_time = timed(lambda d=d: select_channels(d), 10 if n <= 512 else 3)
            _, half_time = timed(lambda d=d, n=n: select_channels(d, n_keep=n // 2), 10 if n <= 512 else 3)
            full, full_time = timed(lambda d=d: full_knee(d), 3 if n <= 256 else 1)
            row = [
                matrix.__name__,
                n,
                f"{1e3 * own_time:.1f}",
                f"{1e3 * half_time:.1f}",
                f"{full_time / own_time:.1f}",
                len(selection.ks),
                f"{selection.knee_k}, {full.k}",
                f"{selection.knee_strength:.4f}, {full.strength:.4f}",
                f"{deviation_ratio(d, selection.ks):.4f}",
            ]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
