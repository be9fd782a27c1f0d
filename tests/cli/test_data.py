"""Data by name: what the batches hold, and that every process has its share."""

import gzip
import hashlib
import pickle
import re
from itertools import chain
from types import SimpleNamespace

import numpy as np
import project
import pytest
import torch
from pictures import idx, write_pictures
from PIL import Image
from torch import nn

from tp_cosep import InputError
from tp_cosep.cli import data as data_module
from tp_cosep.cli import main as cli
from tp_cosep.cli.data import load_data
from tp_cosep.cli.models import ImageSpec

ANY = ImageSpec(None, None, None, 3)


def options(data, **changed):
    given = {
        "data_args": [],
        "download": False,
        "input_size": 16,
        "mean": None,
        "std": None,
        "test_share": 0.25,
        "calibration": 10,
        "batch_size": 6,
        "workers": 0,
        "seed": 0,
        "augment": True,
    }
    return SimpleNamespace(data=data, **{**given, **changed})


def greys(batches, mean=0.0, std=1.0):
    """The numbers of the images in some batches, in order, and their labels."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return [round(v * 255 / 6) for v in (x[:, 0, 4, 4] * std + mean).tolist()], y.tolist()


PLAIN = {"mean": [0.0], "std": [1.0], "augment": False}


def test_a_folder_of_classes_is_split(tmp_path):
    write_pictures(tmp_path)
    data = load_data(options(f"imagefolder:{tmp_path}", **PLAIN), ANY)
    assert data.class_names == ("a", "b", "c", "d")
    (train, y), (test, z) = greys(data.train(0)), greys(data.test)
    assert len(test) == 10
    assert len(train) == 30
    assert sorted(train + test) == list(range(40))
    assert y == [i % 4 for i in train]
    assert z == [i % 4 for i in test]
    first, second = greys(data.calibration), greys(data.calibration)
    assert first == second
    assert len(first[0]) == 10
    assert set(first[0]) < set(train)
    assert greys(data.train(1))[0] != train
    assert sorted(greys(data.train(1))[0]) == sorted(train)
    assert greys(data.train(0))[0] == train
    other = load_data(options(f"imagefolder:{tmp_path}", **{**PLAIN, "seed": 1}), ANY)
    assert greys(other.test)[0] != test
    assert "30 images for training, 10 for testing, 16 × 16, 4 classes; 10 for calibration" in data.about


@pytest.mark.parametrize("content", ["none", "half"])
@pytest.mark.parametrize("part", ["", "train"])
def test_an_image_that_is_damaged(content, part, tmp_path):
    write_pictures(tmp_path / part)
    path = tmp_path / part / "b" / "05.png"
    path.write_bytes(b"" if content == "none" else path.read_bytes()[:60])
    name = f"imagefolder:{tmp_path}"
    data = load_data(options(name, **PLAIN, calibration=1, seed=1), ANY)
    message = f"data {name!r}: expected images, got {str(path)!r}, which cannot be read ("
    with pytest.raises(InputError, match=re.escape(message)):
        list(chain(data.train(0), data.test))


def test_folders_for_training_and_testing(tmp_path):
    write_pictures(tmp_path / "train")
    alone = load_data(options(f"imagefolder:{tmp_path}", **PLAIN), ANY)
    assert alone.class_names == ("a", "b", "c", "d")
    assert len(greys(alone.test)[0]) == 10
    write_pictures(tmp_path / "val", 8)
    data = load_data(options(f"imagefolder:{tmp_path}", **PLAIN), ANY)
    train, _ = greys(data.train(0))
    assert len(set(train)) == len(train) == 36  # six batches of six; the rest is another epoch's
    assert sorted(greys(data.test)[0]) == list(range(8))
    write_pictures(tmp_path / "val" / "e", 1)
    with pytest.raises(InputError, match=r"expected the same classes in both parts; \['e'\] are in one of them only"):
        load_data(options(f"imagefolder:{tmp_path}"), ANY)


@pytest.mark.parametrize("kind", ["imagefolder", "factory"])
@pytest.mark.parametrize("world", [2, 3])
def test_every_process_has_its_share(kind, world, tmp_path, monkeypatch):
    write_pictures(tmp_path)
    x, y = torch.arange(40)[:, None, None, None].expand(40, 1, 5, 5) * 6 / 255, torch.arange(40) % 4
    loaders = [torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4, shuffle=True) for _ in range(2)]
    monkeypatch.setattr(project, "make_loaders", lambda: loaders)
    name = f"imagefolder:{tmp_path}" if kind == "imagefolder" else "project:make_loaders"

    def parts(world):
        found = []
        for rank in range(world):
            monkeypatch.setattr(data_module, "place", lambda rank=rank: (rank, world))
            data = load_data(options(name, **PLAIN, calibration=11), ANY)
            found.append([greys(part)[0] for part in (data.calibration, data.test)])
            train = list(data.train(3))
            found[-1] += [greys(train)[0], len(train)]
            length = getattr(data.test, "__len__", None)
            assert length() == len(list(data.test))
        return found

    (calibration, test, train, _), *none = parts(1)
    assert not none
    found = parts(world)
    assert sorted(chain(*(f[0] for f in found))) == sorted(calibration)
    assert len(calibration) == 11
    assert sorted(chain(*(f[1] for f in found))) == sorted(test)
    assert len({f[3] for f in found}) == 1  # or some would wait for the others' gradients
    seen = [i for f in found for i in f[2]]
    assert set(seen) <= set(train)
    assert len(set(seen)) >= len(train) - 4 * world * 2
    if kind == "factory":
        assert len(seen) == len(set(seen))


def test_chance_in_loaders_is_that_of_the_seed():
    """A user's shuffled loader gives the same calibration data in every pass, whatever is drawn in between."""
    data = load_data(options("project:make_loaders", calibration=150), ANY)

    def samples(batches):
        found = []
        for x, _ in batches:
            torch.rand(3)
            found.append(x)
        return torch.cat(found)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = samples(data.calibration)
    torch.set_rng_state(before)
    torch.rand(3)
    expected = torch.rand(1)
    torch.set_rng_state(before)
    iterator = iter(data.calibration)
    next(iterator)
    torch.rand(3)
    assert torch.equal(torch.rand(1), expected)
    assert len(first) == 150
    assert torch.equal(first, samples(data.calibration))
    assert not torch.equal(samples(data.train(0))[:150], samples(data.train(1))[:150])
    assert torch.equal(samples(data.train(1)), samples(data.train(1)))


class Noise:
    """A loader whose batches are by chance."""

    def __iter__(self):
        for _ in range(3):
            yield torch.rand(2, 1), torch.zeros(2, dtype=torch.int64)


def test_chance_goes_on_from_batch_to_batch(monkeypatch):
    monkeypatch.setattr(project, "make_loaders", lambda: (Noise(), Noise()))
    data = load_data(options("project:make_loaders"), ANY)
    first = [x.tolist() for x, _ in data.calibration]
    assert first[0] != first[1] != first[2]
    assert [x.tolist() for x, _ in data.calibration] == first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagefolder:/nowhere", "no such folder"),
        ("hf-dataset:/nowhere", "expected a folder of datasets.save_to_disk"),
        ("cifar10:/nowhere", r"add --download to let torchvision fetch it"),
        ("cifar100:/nowhere", r"add --download"),
        ("fashion-mnist:/nowhere", r"add --download"),
        ("mnist:/nowhere", "expected a name that --help lists, or MODULE:FUNCTION"),
        ("project:make_net", "expected two loaders, for training and testing, got"),
        ("project:one_loader", "expected two loaders"),
        ("project:generators", "expected loaders, got an iterator, which can be read only once"),
        ("project:fails", "failed: ZeroDivisionError"),
    ],
)
def test_data_that_is_not_there(name, message):
    with pytest.raises(InputError, match=message):
        load_data(options(name), ANY)


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="expected a folder of images for every class"):
        load_data(options(f"imagefolder:{tmp_path}"), ANY)
    write_pictures(tmp_path, 1)
    with pytest.raises(InputError, match="expected images for testing, found none"):
        load_data(options(f"imagefolder:{tmp_path}"), ANY)


@pytest.mark.parametrize("split", [False, True])
def test_hugging_face(split, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})

    def part(numbers):
        images = [Image.fromarray(np.full((20, 20, 3), 6 * i, np.uint8)) for i in numbers]
        return datasets.Dataset.from_dict({"img": images, "label": [i % 2 for i in numbers]}, features)

    whole = part(range(20))
    if split:
        whole = datasets.DatasetDict({"train": whole, "test": part(range(20, 25))})
    whole.save_to_disk(tmp_path / "set")
    data = load_data(options(f"hf-dataset:{tmp_path / 'set'}", **PLAIN), ANY)
    numbers, labels = greys(data.test)
    assert data.class_names == ("x", "y")
    assert labels == [i % 2 for i in numbers]
    assert sorted(numbers) == list(range(20, 25)) if split else len(numbers) == 5
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match=r"expected a column of images and one of class labels, got \['text'\]"):
        load_data(options(f"hf-dataset:{tmp_path / 'other'}"), ANY)


def write_cifar(folder, kind, monkeypatch):
    """A CIFAR of a few images, and its checksums."""
    key = b"labels" if kind.base_folder == "cifar-10-batches-py" else b"fine_labels"
    names = "label_names" if key == b"labels" else "fine_label_names"
    base = folder / kind.base_folder
    base.mkdir(parents=True)

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((base / name).read_bytes()).hexdigest()

    def images(n):
        values = np.repeat(np.arange(n, dtype=np.uint8)[:, None] * 6, 3072, 1)
        return {"data": values, key.decode(): [i % 10 for i in range(n)]}

    monkeypatch.setattr(kind, "train_list", [write("train", images(30))])
    monkeypatch.setattr(kind, "test_list", [write("test", images(12))])
    name, checksum = write("meta", {names: list("abcdefghij")})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": names, "md5": checksum})
    return base


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, tmp_path, monkeypatch):
    from torchvision import datasets

    base = write_cifar(tmp_path, {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name], monkeypatch)
    data = load_data(options(f"{name}:{tmp_path}", **{**PLAIN, "input_size": None}), ANY)
    assert next(iter(data.test))[0].shape[1:] == (3, 32, 32)
    numbers, labels = greys(data.test)
    assert numbers == list(range(12))
    assert labels == [i % 10 for i in range(12)]
    # A file that is not the published one is not unpickled.
    (base / "test").write_bytes((base / "test").read_bytes() + b" ")
    with pytest.raises(InputError, match="not found or corrupted"):
        load_data(options(f"{name}:{tmp_path}"), ANY)


@pytest.mark.parametrize("layout", ["published", "torchvision"])
def test_fashion_mnist(layout, tmp_path):
    raw = tmp_path if layout == "published" else tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", 30), ("t10k", 12)):
        grey = (torch.arange(n) * 6)[:, None, None].expand(n, 28, 28)
        for what, values in (("images-idx3", grey), ("labels-idx1", torch.arange(n) % 10)):
            content = idx(values.contiguous())
            path = raw / f"{part}-{what}-ubyte"
            (path.with_name(f"{path.name}.gz") if layout == "published" else path).write_bytes(
                gzip.compress(content) if layout == "published" else content
            )
    for n_channels in (1, 3):
        images = ImageSpec(None, None, None, n_channels)
        data = load_data(options(f"fashion-mnist:{tmp_path}", **{**PLAIN, "input_size": None}), images)
        assert next(iter(data.test))[0].shape[1:] == (n_channels, 28, 28)
        assert greys(data.test) == (list(range(12)), [i % 10 for i in range(12)])
        assert data.class_names[0] == "T-shirt/top"


def test_normalisation(tmp_path):
    """Normalisation and size: of the command line, else of the model, else of ImageNet."""
    write_pictures(tmp_path)
    name = f"imagefolder:{tmp_path}"
    own = ImageSpec(24, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 3)
    for given, images, size, mean, std in [
        ({"mean": [0.0, 0.5, 1.0], "std": [1.0, 2.0, 4.0]}, own, 16, (0.0, 0.5, 1.0), (1.0, 2.0, 4.0)),
        ({"input_size": None}, own, 24, own.mean, own.std),
        ({}, ANY, 16, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ({"mean": [0.5], "std": [0.5]}, ImageSpec(None, None, None, 1), 16, (0.5,), (0.5,)),
    ]:
        data = load_data(options(name, **given), images)
        x, _ = next(iter(data.test))
        assert x.shape[1:] == (len(mean), size, size)
        raw = load_data(options(name, **PLAIN), images).test
        value = next(iter(raw))[0][:, 0, 4, 4]
        for c in range(len(mean)):
            torch.testing.assert_close(x[:, c, 4, 4], (value - mean[c]) / std[c])
    with pytest.raises(InputError, match="5 input channels; expected as many values for --mean and --std"):
        load_data(options(name), ImageSpec(None, None, None, 5))
    with pytest.raises(InputError, match="the model has 3 input channels"):
        load_data(options(name, mean=[0.5, 0.5]), ANY)


def test_augmentation_is_for_training_alone(tmp_path):
    """An image with a gradient looks different in every epoch of training, and the same elsewhere."""
    for i in range(8):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20)).save(path)
    torch.manual_seed(0)
    data = load_data(options(f"imagefolder:{tmp_path}"), ANY)
    for batches, n in ((data.train(0), 2), (data.calibration, 1), (data.test, 1)):
        x = torch.cat([x for x, _ in batches])
        assert (len(x.flatten(1).unique(dim=0)) > 1) == (n > 1)


def test_batches_fit_a_model_with_batch_norm(tmp_path):
    """No last batch of a single sample."""
    write_pictures(tmp_path / "train", 13)
    write_pictures(tmp_path / "val", 8)
    data = load_data(options(f"imagefolder:{tmp_path}"), ANY)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)).train()
    sizes = [len(net(x)) for x, _ in data.train(0)]
    assert sizes == [6, 6]


def test_images_of_a_size_that_the_model_does_not_take(tmp_path, capsys):
    write_pictures(tmp_path / "photos")
    words = ["prune", "--model", "project:make_mlp", "--data", f"imagefolder:{tmp_path / 'photos'}", "--device", "cpu"]
    assert cli.main([*words, "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "does not run on the data's inputs, (1, 3, 224, 224)" in said
    assert said.endswith("; set the size of images with --input-size.\n")
