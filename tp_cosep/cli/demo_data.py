"""Images for the demo: scikit-learn's digits, and Fashion-MNIST."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tp_cosep.cli.torchvision_shim import import_torchvision
from tp_cosep.errors import InputError, MissingDependencyError

__all__ = ["LOADERS", "ImageData", "load_digits", "load_fashion_mnist", "read_idx"]

#: Folder of Debian's package dataset-fashion-mnist.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FASHION_MNIST_FILES = tuple(
    f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


@dataclass(frozen=True)
class ImageData:
    """Labelled images for training and testing.

    Attributes:
        source: Origin of the images, in words.
        train_images: ``[n, 1, height, width]`` float32, standardised over the training part.
        train_labels: ``[n]`` int64.
        test_images: ``[m, 1, height, width]``, standardised with mean and standard deviation of the training part.
        test_labels: ``[m]`` int64.
    """

    source: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def n_classes(self) -> int:
        """Number of classes of the training part."""
        return int(self.train_labels.max()) + 1


def load_digits(seed: int, folder: Path) -> ImageData:
    """The 1797 handwritten digits of scikit-learn, 8 × 8 pixels, a third of them for testing.

    Args:
        seed: Seed of the split, which is stratified by class.
        folder: Not used.

    Returns:
        The images.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
        ModuleNotFoundError: If a package that scikit-learn needs is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "sklearn":
            raise
        raise MissingDependencyError(
            "demo: the digits are part of scikit-learn, which is not installed; pip install 'tp_cosep[demo]'."
        ) from error
    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=1 / 3, random_state=seed, stratify=labels)
    images = images.reshape(-1, 8, 8)
    return _standardised(
        "digits of scikit-learn",
        *(torch.as_tensor(part) for part in (images[train], labels[train], images[test], labels[test])),
    )


def load_fashion_mnist(seed: int, folder: Path) -> ImageData:
    """Fashion-MNIST: 70 000 images of clothing, 28 × 28 pixels, 10 000 of them the standard test part.

    Args:
        seed: Not used.
        folder: Where the images are downloaded to, unless Debian's package dataset-fashion-mnist is installed.

    Returns:
        The images.

    Raises:
        MissingDependencyError: If a download is required and torchvision is not installed.
        InputError: If the download fails.
    """
    paths = [DEBIAN_FOLDER / name for name in _FASHION_MNIST_FILES]
    if all(path.is_file() for path in paths):
        return _standardised(f"Fashion-MNIST from {DEBIAN_FOLDER}", *(read_idx(path) for path in paths))
    return _standardised("Fashion-MNIST from torchvision", *_downloaded(folder))


def _downloaded(folder: Path) -> list[Tensor]:
    datasets: Any = import_torchvision().datasets
    tensors = []
    for train in (True, False):
        try:
            part = datasets.FashionMNIST(str(folder), train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"demo: Fashion-MNIST could not be downloaded to {str(folder)!r} ({error}); install Debian's package "
                "dataset-fashion-mnist, or put the four files of Fashion-MNIST into "
                f"{str(folder / 'FashionMNIST' / 'raw')!r}."
            ) from error
        tensors += [part.data, part.targets]
    return tensors


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of bytes, the format of MNIST.

    The header is 0, 0, 8 (unsigned bytes) and the number of dimensions, one byte each; then come the sizes, four
    big-endian bytes each, and the values.

    Args:
        path: The file.

    Returns:
        A uint8 tensor of the file's shape.

    Raises:
        InputError: If the file has another format or is incomplete.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"data {str(path)!r}: expected a gzipped IDX file, got {error}.") from error
    n_dims = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    start = 4 + 4 * n_dims
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if not n_dims or len(content) != start + prod(shape):
        raise InputError(f"data {str(path)!r}: expected a complete IDX file of bytes.")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _standardised(
    source: str, train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor
) -> ImageData:
    train, test = train_images[:, None].float(), test_images[:, None].float()
    deviation, mean = torch.std_mean(train)
    return ImageData(
        source, (train - mean) / deviation, train_labels.long(), (test - mean) / deviation, test_labels.long()
    )


#: The data sets by name: ``loader(seed, folder) -> ImageData``.
LOADERS: dict[str, Callable[[int, Path], ImageData]] = {"digits": load_digits, "fashion-mnist": load_fashion_mnist}
