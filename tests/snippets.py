"""Python blocks of the README and the documentation, and what they take for granted."""

import copy
import re
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parent.parent


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 3, padding=1), nn.ReLU()
        )
        self.fc = nn.Linear(10, 4)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))

    @property
    def n_channels(self):
        return self.features[0].out_channels + self.features[3].out_channels


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_blocks(*blocks):
    """Run blocks one after the other on a fresh model, as a reader would; the names that are there afterwards."""
    torch.manual_seed(0)
    x = torch.randn(48, 3, 8, 8)
    loader = [(x[:24], torch.arange(24) % 4), (x[24:], torch.arange(24) % 4)]
    trained = []
    names = {
        "copy": copy,
        "torch": torch,
        "model": Classifier(),
        "example_inputs": x[:1],
        "train_loader": loader,
        "test_loader": loader,
        "train": lambda model, loader, epochs: trained.append(epochs),
        "trained": trained,
    }
    for block in blocks:
        exec(compile(block, "a block of the documentation", "exec"), names)
    assert names["model"](x).shape == (48, 4)
    return names
