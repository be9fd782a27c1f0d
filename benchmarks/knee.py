"""Evidence for the default knee: planted redundancy, no redundancy, and stability on real layers.

    python benchmarks/knee.py planted
    python benchmarks/knee.py independent
    python benchmarks/knee.py stability --data digits
    python benchmarks/knee.py stability --data fashion-mnist

Each prints a Markdown table; ``docs/method.md`` holds them.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from tp_cosep import CoSePSelector
from tp_cosep.cli.demo import train_net
from tp_cosep.functional.knee import KneeMethod
from tp_cosep.functional.selection import select_channels
from tp_cosep.functional.separability import distances_from_gram, profile_gram

METHODS = {
    "guarded (default)": KneeMethod("guarded"),
    "strongest": KneeMethod("strongest"),
    "first (paper)": KneeMethod("first"),
    "first, polynomial 2": KneeMethod("first", "polynomial", 2),
    "first, polynomial 6": KneeMethod("first", "polynomial", 6),
}
N_SEEDS = 3


def counts(distances: Tensor) -> dict[str, int]:
    """Number kept by every method."""
    return {name: select_channels(distances, knee=method).k for name, method in METHODS.items()}


def print_table(header: list[str], rows: Iterator[list[object]]) -> None:
    """Print a Markdown table, row by row as they come."""
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


def random_profiles(n: int, n_dims: int, seed: int) -> Tensor:
    """Independent uniform profiles, as wide as JM distances are."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(n, n_dims, generator=generator, dtype=torch.float64)


def euclidean(x: Tensor) -> Tensor:
    """Distances between profiles."""
    return distances_from_gram(x @ x.T)


def planted() -> None:
    """64 channels, noisy copies of r distinct ones, profiles uniform in [0, 2]."""
    cells = [(r, noise) for noise in (0.01, 0.05, 0.1, 0.2) for r in (4, 8, 16, 24, 32, 48)]

    def rows() -> Iterator[list[object]]:
        for r, noise in cells:
            found = defaultdict(list)
            for n_dims in (45, 720):
                for seed in range(N_SEEDS):
                    generator = torch.Generator().manual_seed(1000 + seed)
                    copies = random_profiles(r, n_dims, seed)[torch.arange(64) % r]
                    copies += 2 * noise * torch.randn(64, n_dims, generator=generator, dtype=torch.float64)
                    for name, k in counts(euclidean(copies)).items():
                        found[name].append(k)
            spans = [f"{min(found[m])}–{max(found[m])}" for m in METHODS]
            yield [r, f"{noise:.0%}", *spans]

    print_table(["r planted", "noise", *METHODS], rows())


def independent() -> None:
    """Profiles with independent uniform entries: nothing is redundant. Share of channels kept."""

    def rows() -> Iterator[list[object]]:
        for n in (32, 64, 128):
            for n_dims in (3, 10, 45, 450):
                shares = defaultdict(list)
                for seed in range(N_SEEDS):
                    for name, k in counts(euclidean(random_profiles(n, n_dims, seed))).items():
                        shares[name].append(k / n)
                yield [n, n_dims, *(f"{min(shares[m]):.0%}–{max(shares[m]):.0%}" for m in METHODS)]

    print_table(["channels", "dimensions", *METHODS], rows())


def stability(data: str) -> None:
    """Counts from two disjoint halves of the calibration data, on every hidden layer of a trained net."""
    net, images = train_net(data, seed=0)
    gaps = defaultdict(list)

    def rows() -> Iterator[list[object]]:
        x, y, n_all = images.train_images, images.train_labels, len(images.train_labels)
        for n in sorted({min(n_all, limit) for limit in (2_000, 5_000, 20_000)}):
            for seed in range(N_SEEDS):
                order = torch.randperm(n_all, generator=torch.Generator().manual_seed(seed))[:n]
                halves = []
                for half in (order[: n // 2], order[n // 2 :]):
                    batches = zip(x[half].split(250), y[half].split(250), strict=True)
                    halves.append(CoSePSelector(space="separability").fit(net, batches, progress=False).moments)
                for layer in list(halves[0])[:-1]:
                    one, two = (counts(distances_from_gram(profile_gram(half[layer]))) for half in halves)
                    width = halves[0][layer].n_components
                    for method in METHODS:
                        gaps[method].append(abs(one[method] - two[method]) / width)
                    if seed == 0:
                        yield [f"2 × {n // 2}", f"{layer} ({width})", *(f"{one[m]}, {two[m]}" for m in METHODS)]

    print_table(["images", "layer", *METHODS], rows())
    print()
    print_table(
        ["difference between halves, share of the layer", *METHODS],
        iter(
            [
                ["mean", *(f"{sum(gaps[m]) / len(gaps[m]):.1%}" for m in METHODS)],
                ["largest", *(f"{max(gaps[m]):.1%}" for m in METHODS)],
                ["over 10 %", *(f"{sum(g > 0.1 for g in gaps[m])} of {len(gaps[m])}" for m in METHODS)],
            ]
        ),
    )


def main() -> None:
    """Run the study that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("planted", "independent", "stability"))
    parser.add_argument("--data", default="digits", choices=("digits", "fashion-mnist"))
    options = parser.parse_args()
    if options.what == "stability":
        stability(options.data)
    else:
        {"planted": planted, "independent": independent}[options.what]()


if __name__ == "__main__":
    main()
