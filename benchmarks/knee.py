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
from tp_cosep.functional.selection import select_channels
from tp_cosep.functional.separability import distances_from_gram, profile_gram

RULES = {"guarded (default)": "guarded", "strongest": "strongest", "first (paper)": "first"}
N_SEEDS = 3


def counts(distances: Tensor) -> dict[str, int]:
    """Number kept by every rule."""
    return {name: select_channels(distances, knee=rule).k for name, rule in RULES.items()}


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
            spans = [f"{min(found[rule])}–{max(found[rule])}" for rule in RULES]
            yield [r, f"{noise:.0%}", *spans]

    print_table(["r planted", "noise", *RULES], rows())


def independent() -> None:
    """Profiles with independent uniform entries: nothing is redundant. Share of channels kept."""

    def rows() -> Iterator[list[object]]:
        for n in (32, 64, 128):
            for n_dims in (3, 10, 45, 450):
                shares = defaultdict(list)
                for seed in range(N_SEEDS):
                    for name, k in counts(euclidean(random_profiles(n, n_dims, seed))).items():
                        shares[name].append(k / n)
                yield [n, n_dims, *(f"{min(shares[rule]):.0%}–{max(shares[rule]):.0%}" for rule in RULES)]

    print_table(["channels", "dimensions", *RULES], rows())


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
                    halves.append(CoSePSelector().fit(net, batches, progress=False).statistics.moments)
                for layer in list(halves[0])[:-1]:
                    one, two = (counts(distances_from_gram(profile_gram(half[layer]))) for half in halves)
                    width = halves[0][layer].n_components
                    for rule in RULES:
                        gaps[rule].append(abs(one[rule] - two[rule]) / width)
                    if seed == 0:
                        yield [f"2 × {n // 2}", f"{layer} ({width})", *(f"{one[rule]}, {two[rule]}" for rule in RULES)]

    print_table(["images", "layer", *RULES], rows())
    print()
    print_table(
        ["difference between halves, share of the layer", *RULES],
        iter(
            [
                ["mean", *(f"{sum(gaps[rule]) / len(gaps[rule]):.1%}" for rule in RULES)],
                ["largest", *(f"{max(gaps[rule]):.1%}" for rule in RULES)],
                ["over 10 %", *(f"{sum(g > 0.1 for g in gaps[rule])} of {len(gaps[rule])}" for rule in RULES)],
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
