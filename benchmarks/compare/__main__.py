"""Train, prune, compare: ``python -m benchmarks.compare --help``."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch

from benchmarks.compare.cells import COMPENSATIONS, Cell, Records, groups_of, measure
from benchmarks.compare.data import load
from benchmarks.compare.latency import measure_latency
from benchmarks.compare.methods import METHODS
from benchmarks.compare.tables import plot_results, results_page
from benchmarks.compare.training import Recipe, checkpoint, train_checkpoint

RECORDS = Path(__file__).parent / "records"
#: How the networks of each data set are trained.
RECIPES = {
    ("vgg", "cifar10"): Recipe(8, 0.2),
    ("resnet20", "cifar10"): Recipe(9, 0.3),
    ("resnet56", "cifar10"): Recipe(6, 0.2),
    ("densenet16", "cifar10"): Recipe(6, 0.2),
    ("mobilenetv2", "cifar10"): Recipe(6, 0.2, weight_decay=1e-4),
    ("vgg", "fashion-mnist"): Recipe(4, 0.2),
    ("resnet20", "fashion-mnist"): Recipe(4, 0.3),
    # At the papers' own scale.
    ("vgg16", "cifar10"): Recipe(25, 0.1, label_smoothing=0.1, cutout=8),
    ("resnet56_full", "cifar10"): Recipe(30, 0.3, label_smoothing=0.1, cutout=8),
    ("resnet20_full", "cifar10"): Recipe(30, 0.4, label_smoothing=0.05, cutout=8),
}


def main() -> None:
    """Run a part of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path.home() / ".cache" / "tp_cosep", help="where data sets are downloaded to"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("train", help="train a network and keep its weights, unless they exist")
    part.add_argument("names", nargs="+", metavar="NETWORK-DATA-SEED", help="such as vgg-cifar10-0")
    part = parts.add_parser("run", help="prune and measure, except for what is recorded already")
    part.add_argument("names", nargs="+", metavar="NETWORK-DATA-SEED")
    part.add_argument("--methods", default=",".join(METHODS).replace(", ", "; "), help="separated by commas")
    part.add_argument("--amounts", default="half", help="half, 2x, knee, or each: half of one group at a time")
    part.add_argument("--compensations", default=",".join(COMPENSATIONS))
    part.add_argument("--epochs", type=float, default=0)
    part.add_argument("--calibration", default="1000", help="numbers of images, separated by commas")
    part.add_argument("--base", type=int, help="index of the trained network; that of the seed by default")
    part = parts.add_parser("latency", help="time pruned networks against unpruned ones")
    part.add_argument("names", nargs="+", metavar="NETWORK-DATA")
    part.add_argument("--speedups", default="2,4")
    parts.add_parser("table", help="write docs/results.md and its figure from the records")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    PARTS[args.part](args)


def train(args: argparse.Namespace) -> None:
    """Train networks that have no checkpoint yet."""
    for name in args.names:
        network, rest = name.split("-", 1)
        data, seed = rest.rsplit("-", 1)
        if checkpoint(network, data, int(seed)).is_file():
            continue
        images = load(data, args.folder)
        top1 = train_checkpoint(network, images, int(seed), RECIPES[network, data], args.folder)
        print(f"{name}: {top1:.2%}", flush=True)


def run(args: argparse.Namespace) -> None:
    """Measure all combinations of the arguments."""
    for name in args.names:
        network, rest = name.split("-", 1)
        data, seed = rest.rsplit("-", 1)
        images = load(data, args.folder)
        records = Records(RECORDS / f"{network}-{data}.jsonl")
        base = int(seed) if args.base is None else args.base
        amounts = args.amounts
        if amounts == "each":
            amounts = ",".join(f"half of {group}" for group in groups_of(network, images))
        lists = (amounts, args.compensations, args.methods, args.calibration)
        for amount, compensation, method, n in itertools.product(*(x.split(",") for x in lists)):
            method = method.replace("; ", ", ")
            cell = Cell(network, data, int(seed), amount, method, compensation, True, args.epochs, int(n), base)
            measure(cell, images, records)


def latency(args: argparse.Namespace) -> None:
    """Time pruned networks, and replace older times."""
    target = RECORDS / "latency.jsonl"
    old = [json.loads(line) for line in target.read_text().splitlines()] if target.is_file() else []
    for name in args.names:
        network, data = name.split("-", 1)
        new = [
            r for s in args.speedups.split(",") for r in measure_latency(network, load(data, args.folder), float(s))
        ]  # fmt: skip
        old = [r for r in old if (r["network"], r["data"]) != (network, data)] + new
        target.write_text("".join(json.dumps(r) + "\n" for r in old))
        print("\n".join(json.dumps(r) for r in new), flush=True)


def table(args: argparse.Namespace) -> None:
    """Write the page and its figure."""
    docs = Path(__file__).parents[2] / "docs"
    introduction = (Path(__file__).parent / "introduction.md").read_text()
    (docs / "results.md").write_text(results_page(RECORDS, introduction))
    plot_results(RECORDS, docs / "results.png")


PARTS = {"train": train, "run": run, "latency": latency, "table": table}

if __name__ == "__main__":
    main()
