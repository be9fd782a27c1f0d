"""Data by name: batches for training, calibration and testing, each process with its share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data.distributed import DistributedSampler

from tp_cosep.cli.demo_data import read_idx
from tp_cosep.cli.models import ImageSpec, call, function_of, module_of
from tp_cosep.errors import InputError
from tp_cosep.utils.data import n_samples, peek, take_samples
from tp_cosep.utils.distributed import place

__all__ = ["Data", "load_data"]

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Size, mean and standard deviation of data sets with their own.
_OWN = {
    "cifar10": (32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion-mnist": (28, (0.2860,), (0.3530,)),
}
_TRAIN, _TEST = ("train", "training"), ("val", "valid", "validation", "test", "testing")


@dataclass(frozen=True)
class Data:
    """Batches ``(inputs, labels)`` of this process.

    Attributes:
        about: A description of the data in one line.
        train: Batches of an epoch, shuffled by its number; the same number in every process.
        calibration: Training samples without augmentation, the same ones in every pass.
        test: Test samples, used for accuracies alone.
        first: A batch of any size, the same one in every process.
        class_names: Names of the classes; ``None`` if unknown.
    """

    about: str
    train: Callable[[int], Iterable[Any]]
    calibration: Iterable[Any]
    test: Iterable[Any]
    first: Any
    class_names: tuple[str, ...] | None = None


def load_data(options: argparse.Namespace, images: ImageSpec) -> Data:
    """Load the data that ``--data`` names.

    Args:
        options: Options of the command.
        images: The image format of the model.

    Returns:
        Batches for training, calibration and testing.

    Raises:
        InputError: If the data cannot be used.
        MissingDependencyError: If a package is not installed.
    """
    kind, _, name = options.data.partition(":")
    find = {"imagefolder": _image_folder, "hf-dataset": _hugging_face}.get(kind)
    if kind in ("cifar10", "cifar100"):
        find = _cifar
    elif kind == "fashion-mnist":
        find = _fashion_mnist
    if find is None:
        return _from_loaders(options)
    train, test, class_names = find(Path(name), options)
    return _from_images(options, images, train, test, class_names)


def _from_loaders(options: argparse.Namespace) -> Data:
    function = function_of(options.data, "data")
    found = call(options.data, lambda: function(**dict(options.data_args)))
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise InputError(f"data {options.data!r}: expected two loaders, for training and testing, got {found!r}.")
    train, test = found
    for loader in found:
        if iter(loader) is loader:
            raise InputError(f"data {options.data!r}: expected loaders, got an iterator, which can be read only once.")
    return Data(
        options.data,
        lambda epoch: _Shared(train, seed=options.seed + 1 + epoch, even=True),
        _Shared(train, seed=options.seed, n=options.calibration),
        _Shared(test, seed=options.seed),
        peek(_seeded(train, options.seed))[0],
    )


@dataclass(frozen=True)
class _Shared:
    """This process's share of a loader's batches; the same ones in every pass if the loader shuffles with torch.

    Attributes:
        loader: A loader with the same batches in every process.
        seed: Seed of torch's random numbers.
        n: Number of samples after which to stop, over all processes.
        even: Leave out the last batches that are too few for all processes.
    """

    loader: Iterable[Any]
    seed: int
    n: int | None = None
    even: bool = False

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized) or self.n is not None:
            raise TypeError("the number of batches is not known")
        rank, world = place()
        return len(self.loader) // world if self.even else len(range(rank, len(self.loader), world))

    def __iter__(self) -> Iterator[Any]:
        rank, world = place()
        whole = self._first(_seeded(self.loader, self.seed))
        if not self.even:
            yield from islice(whole, rank, None, world)
            return
        while len(together := list(islice(whole, world))) == world:
            yield together[rank]

    def _first(self, batches: Iterator[Any]) -> Iterator[Any]:
        left = self.n
        for batch in batches:
            size = None if left is None else n_samples(batch)
            if left is None or size is None:
                yield batch
                continue
            yield take_samples(batch, left, size)
            left -= size
            if left <= 0:
                return


def _seeded(loader: Iterable[Any], seed: int) -> Iterator[Any]:
    """The batches of a loader under a seed, which leaves torch's random state elsewhere untouched."""
    own, batches, end = torch.Generator().manual_seed(seed).get_state(), None, object()
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(own)
            batches = iter(loader) if batches is None else batches
            batch = next(batches, end)
            own = torch.get_rng_state()
        if batch is end:
            return
        yield batch


class _Transformed(Dataset[Any]):
    """Images, transformed for the model, and labels."""

    def __init__(self, name: str, items: Any, transform: Callable[[Any], Any]) -> None:
        self.name, self.items, self.transform = name, items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        try:
            image, label = self.items[i]
            return self.transform(image), int(label)
        except (OSError, SyntaxError) as error:  # Pillow raises either for damaged files
            raise InputError(
                f"data {self.name!r}: expected images, got {self._place_of(i)}, which cannot be read "
                f"({type(error).__name__}: {error}); replace or remove it."
            ) from error

    def _place_of(self, i: int) -> str:
        items: Any = self.items
        while isinstance(items, Subset):
            items, i = items.dataset, items.indices[i]
        return repr(items.samples[i][0]) if hasattr(items, "samples") else f"number {i}"


def _from_images(
    options: argparse.Namespace, images: ImageSpec, train: Any, test: Any, class_names: Sequence[str] | None
) -> Data:
    generator = torch.Generator().manual_seed(options.seed)
    if test is None:
        order = torch.randperm(len(train), generator=generator).tolist()
        n = round(options.test_share * len(train))
        train, test = Subset(train, order[n:]), Subset(train, order[:n])
    for part, what in ((train, "training"), (test, "testing")):
        if not len(part):
            raise InputError(f"data {options.data!r}: expected images for {what}, found none.")
    size, plain, augmented = _transforms(options, images)
    rank, world = place()
    chosen = torch.randperm(len(train), generator=generator).tolist()[: options.calibration]
    settings = {"batch_size": options.batch_size, "num_workers": options.workers}

    def epoch_of(epoch: int) -> Iterable[Any]:
        items = _Transformed(options.data, train, augmented)
        sampler: Any = DistributedSampler(items, world, rank, seed=options.seed)
        sampler.set_epoch(epoch)
        # BatchNorm has no variance in a last batch of one sample.
        return DataLoader(items, sampler=sampler, drop_last=len(sampler) > options.batch_size, **settings)

    plain_train = _Transformed(options.data, train, plain)
    n_classes = f", {len(class_names)} classes" if class_names else ""
    return Data(
        f"{options.data}: {len(train):,} images for training, {len(test):,} for testing, {size} × {size}{n_classes}; "
        f"{len(chosen):,} for calibration",
        epoch_of,
        DataLoader(Subset(plain_train, chosen[rank::world]), **settings),
        DataLoader(Subset(_Transformed(options.data, test, plain), range(rank, len(test), world)), **settings),
        next(iter(DataLoader(Subset(plain_train, chosen[:1])))),
        tuple(class_names) if class_names else None,
    )


def _transforms(options: argparse.Namespace, images: ImageSpec) -> tuple[int, Any, Any]:
    """Size of images, and transforms to tensors: plain, and with augmentation for training."""
    t = module_of("torchvision", "cli").transforms
    kind = options.data.partition(":")[0]
    own_size, own_mean, own_std = _OWN.get(kind, (None, None, None))
    size = options.input_size or own_size or images.size or 224
    mean = tuple(options.mean or own_mean or images.mean or _IMAGENET[0])
    std = tuple(options.std or own_std or images.std or _IMAGENET[1])
    n = images.n_channels
    mean, std = (values * n if len(values) == 1 else values for values in (mean, std))
    if n not in (1, 3) or len(mean) != n or len(std) != n:
        raise InputError(
            f"data: the model has {n} input channels; expected as many values for --mean and --std, got {mean} and "
            f"{std}."
        )
    colours = t.Grayscale(n) if n == 1 or kind == "fashion-mnist" else t.Lambda(_as_rgb)
    last = [colours, t.ToTensor(), t.Normalize(mean, std)]
    if own_size:
        resized = [] if size == own_size else [t.Resize((size, size))]
        crop = [] if kind == "fashion-mnist" else [t.RandomCrop(own_size, padding=4), t.RandomHorizontalFlip()]
        plain, augmented = [*resized, *last], [*crop, *resized, *last]
    else:
        plain = [t.Resize(round(size * 256 / 224)), t.CenterCrop(size), *last]
        augmented = [t.RandomResizedCrop(size, scale=(0.35, 1.0)), t.RandomHorizontalFlip(), *last]
    return size, t.Compose(plain), t.Compose(augmented if getattr(options, "augment", False) else plain)


def _as_rgb(image: Any) -> Any:
    return image.convert("RGB")


def _part(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _image_folder(folder: Path, options: argparse.Namespace) -> tuple[Any, Any, Sequence[str]]:
    datasets = module_of("torchvision", "cli").datasets
    if not folder.is_dir():
        raise InputError(f"data {options.data!r}: no such folder.")
    first, second = _part(folder, _TRAIN), _part(folder, _TEST)
    try:
        train = datasets.ImageFolder(str(first or folder))
        test = None if first is None or second is None else datasets.ImageFolder(str(second))
    except FileNotFoundError as error:
        raise InputError(f"data {options.data!r}: expected a folder of images for every class: {error}") from error
    if test is not None and train.classes != test.classes:
        other = sorted(set(train.classes) ^ set(test.classes))
        raise InputError(
            f"data {options.data!r}: expected the same classes in both parts; {other} are in one of them only."
        )
    return train, test, train.classes


class _HuggingFace(Dataset[Any]):
    def __init__(self, items: Any, image: str, label: str) -> None:
        self.items, self.image, self.label = items, image, label

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        item = self.items[i]
        return item[self.image], item[self.label]


def _hugging_face(folder: Path, options: argparse.Namespace) -> tuple[Any, Any, Sequence[str] | None]:
    datasets = module_of("datasets", "hub")
    try:
        found = datasets.load_from_disk(str(folder))
    except FileNotFoundError as error:
        raise InputError(f"data {options.data!r}: expected a folder of datasets.save_to_disk: {error}") from error
    parts = dict(found) if isinstance(found, dict) else {"train": found}
    train = next((parts[name] for name in _TRAIN if name in parts), None)
    test = next((parts[name] for name in _TEST if name in parts), None)
    if train is None:
        raise InputError(f"data {options.data!r}: expected a part named 'train', got {sorted(parts)}.")
    features = train.features
    image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    label = label or next((name for name in ("label", "labels") if name in features), None)
    if image is None or label is None:
        raise InputError(
            f"data {options.data!r}: expected a column of images and one of class labels, got {sorted(features)}."
        )
    wrapped = [None if part is None else _HuggingFace(part, image, label) for part in (train, test)]
    return *wrapped, getattr(features[label], "names", None)  # type: ignore[return-value]


def _cifar(folder: Path, options: argparse.Namespace) -> tuple[Any, Any, Sequence[str]]:
    """CIFAR is stored as pickles; torchvision reads them only if their checksums are those of the published files."""
    datasets = module_of("torchvision", "cli").datasets
    kind = datasets.CIFAR10 if options.data.startswith("cifar10:") else datasets.CIFAR100
    try:
        train, test = (kind(str(folder), train=t, download=options.download) for t in (True, False))
    except (RuntimeError, OSError) as error:
        raise InputError(f"data {options.data!r}: {error}; add --download to let torchvision fetch it.") from error
    return train, test, train.classes


class _Grey(Dataset[Any]):
    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.fromarray(self.images[i].numpy()), int(self.labels[i])


def _fashion_mnist(folder: Path, options: argparse.Namespace) -> tuple[Any, Any, Sequence[str]]:
    datasets = module_of("torchvision", "cli").datasets
    kind = datasets.FashionMNIST
    if (folder / "train-images-idx3-ubyte.gz").is_file():  # the published files
        train, test = (
            _Grey(*(read_idx(folder / f"{part}-{what}-ubyte.gz") for what in ("images-idx3", "labels-idx1")))
            for part in ("train", "t10k")
        )
        return train, test, kind.classes
    try:
        train, test = (kind(str(folder), train=t, download=options.download) for t in (True, False))
    except (RuntimeError, OSError) as error:
        raise InputError(f"data {options.data!r}: {error}; add --download to let torchvision fetch it.") from error
    return train, test, kind.classes
