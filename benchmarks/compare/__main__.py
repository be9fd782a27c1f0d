"""Train, prune, compare: ``python -m benchmarks.compare --help``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.compare.data import DATA, load
from benchmarks.compare.networks import NETWORKS
from benchmarks.compare.training import Recipe, checkpoint, train_checkpoint

#: How the networks of each data set are trained.
RECIPES = {
    ("vgg", "cifar10"): Recipe(8, 0.2),
    ("resnet20", "cifar10"): Recipe(9, 0.3),
    ("densenet16", "cifar10"): Recipe(6, 0.2),
    ("mobilenetv2", "cifar10"): Recipe(6, 0.2, weight_decay=1e-4),
    ("vgg", "fashion-mnist"): Recipe(4, 0.2),
    ("resnet20", "fashion-mnist"): Recipe(4, 0.3),
}


def main() -> None:
    """Run a part of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/data"), help="where data sets are downloaded to")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("train", help="train a network and keep its weights, unless they are there")
    part.add_argument("names", nargs="+", metavar="NETWORK-DATA-SEED", help="such as vgg-cifar10-0")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.names:
        network, rest = name.split("-", 1)
        data, seed = rest.rsplit("-", 1)
        if checkpoint(network, data, int(seed)).is_file():
            continue
        images = load(data, args.folder)
        top1 = train_checkpoint(network, images, int(seed), RECIPES[network, data], args.folder)
        print(f"{name}: {top1:.2%}", flush=True)


if __name__ == "__main__":
    main()
