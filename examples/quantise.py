"""Prune a network of linear layers, and quantise it to 8 bits with torchao."""

import copy
import io
from pathlib import Path

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from tp_cosep import CoSePPruner, ReconstructionSelector
from tp_cosep.cli.demo import accuracy, load_digits, train


def n_bytes(model: nn.Module) -> int:
    """Size of the saved weights."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def main(epochs: int = 8) -> dict[str, tuple[int, float]]:
    """Train, prune, fine-tune and quantise; returns size in bytes and accuracy by stage."""
    images = load_digits(0, Path())
    calibration = list(zip(images.train_images.split(200), images.train_labels.split(200), strict=True))
    torch.manual_seed(0)
    layers = [nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, images.n_classes)]
    model = nn.Sequential(nn.Flatten(), *layers)
    results = {}

    def report(stage: str, net: nn.Module) -> None:
        results[stage] = n_bytes(net), accuracy(net, images)
        print(f"{stage:20} {results[stage][0]:9,} bytes, accuracy {results[stage][1]:.1%}")

    train(model, images, epochs=epochs, rate=0.05, seed=0)
    report("trained", model)
    quantised = copy.deepcopy(model)
    quantize_(quantised, Int8DynamicActivationInt8WeightConfig())
    report("quantised", quantised)
    # Prune and fine-tune before quantisation: a quantised model can be neither pruned nor trained.
    CoSePPruner(
        model,
        images.train_images[:1],
        ReconstructionSelector().fit(model, calibration),
        target={"params": 0.2},
        loader=calibration,
        compensate=True,
        round_to=8,  # widths that suit 8-bit kernels
    ).step()
    train(model, images, epochs=2, rate=0.02, seed=1)
    report("pruned", model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    report("pruned and quantised", model)
    return results


if __name__ == "__main__":
    main()
