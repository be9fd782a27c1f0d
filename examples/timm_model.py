"""Prune a timm network to half of its multiply-accumulates, with compensation and fine-tuning."""

import copy
from dataclasses import replace
from pathlib import Path

import timm
import torch
import torch_pruning as tp
from torch.nn.functional import interpolate

from tp_cosep import CoSePPruner, ReconstructionSelector
from tp_cosep.cli.demo import accuracy, load_digits, train


def main(name: str = "test_resnet", epochs: int = 3) -> dict[str, tuple[float, float]]:
    """Train, prune and fine-tune; returns multiply-accumulates and accuracy by stage."""
    images = load_digits(0, Path())
    images = replace(
        images,
        train_images=interpolate(images.train_images, 32),  # timm's networks downsample five times
        test_images=interpolate(images.test_images, 32),
    )
    example_inputs = images.train_images[:1]
    calibration = list(zip(images.train_images.split(200), images.train_labels.split(200), strict=True))
    results = {}

    def report(stage: str) -> None:
        n_macs, n_parameters = tp.utils.count_ops_and_params(model, example_inputs)
        results[stage] = n_macs, accuracy(model, images)
        print(f"{stage:20} {n_macs:12,.0f} MACs {n_parameters:9,} parameters, accuracy {results[stage][1]:.1%}")

    torch.manual_seed(0)
    model = timm.create_model(name, in_chans=1, num_classes=images.n_classes)
    train(model, images, epochs=epochs, rate=0.05, seed=0)
    report("trained")
    pruner = CoSePPruner(
        model,
        example_inputs,
        ReconstructionSelector().fit(model, calibration),
        target={"macs": 0.5},
        loader=calibration,
        compensate=True,
        recalibrate=True,
    )
    unpruned = copy.deepcopy(model)
    pruner.step()
    report("pruned, compensated")
    train(model, images, epochs=1, rate=0.02, seed=1)
    report("fine-tuned")
    model = unpruned  # a fair comparison: the same epoch without pruning
    train(model, images, epochs=1, rate=0.02, seed=1)
    report("unpruned, as long")
    return results


if __name__ == "__main__":
    main()
