import gzip
import io
import sys
import urllib.error
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from pictures import idx
from rich.console import Console
from torch import nn

from tp_cosep.cli import demo
from tp_cosep.cli import demo_data as _demo_data
from tp_cosep.cli.demo import DemoNet, run_demo
from tp_cosep.cli.demo_data import LOADERS, load_digits, load_fashion_mnist, read_idx
from tp_cosep.cli.torchvision_shim import import_torchvision
from tp_cosep.errors import CoSePError, InputError, MissingDependencyError
from tp_cosep.pruning.plan import PruningPlan

LAYERS = ("conv1", "conv2", "conv3", "conv4")
WIDTHS = (16, 20, 24, 40)


def run(folder, **options):
    """A short demo with a narrow net, and what it printed."""
    console = Console(file=io.StringIO(), width=80)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo._RECIPES, "digits", replace(demo._RECIPES["digits"], widths=WIDTHS, batch_size=32))
        result = run_demo(folder=folder, **{"epochs": 2, "fine_tune_epochs": 1, "console": console} | options)
    return result, console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, *run(folder)


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """The same demo with blank test images, and without matplotlib."""

    def load(seed, folder):
        images = load_digits(seed, folder)
        return replace(images, test_images=torch.zeros_like(images.test_images))

    folder = tmp_path_factory.mktemp("blind")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOADERS, "digits", load)
        patch.setitem(sys.modules, "matplotlib.figure", None)
        return folder, *run(folder)


@pytest.mark.slow
class TestRun:
    def test_files(self, finished):
        folder, result, text = finished
        plots = {"kept_channels.png", *(f"{layer}_{kind}.png" for layer in LAYERS for kind in ("mss", "space"))}
        assert {path.name for path in folder.iterdir()} == {"model.pt", "plan.json", "report.html", *plots}
        assert {path.name for path in result.files} == {"model.pt", "plan.json", "report.html", *plots}
        for name in plots:
            image = imread(folder / name)
            assert min(image.shape[:2]) > 300
            assert image.std() > 0.01
            assert name in text

    def test_plan_is_the_one_that_was_applied(self, finished):
        folder, result, _ = finished
        plan = PruningPlan.load(folder / "plan.json")
        pruned = {group.name: group.selection for group in plan if group.selection is not None}
        assert set(pruned) == set(LAYERS)
        for name, selection in pruned.items():
            assert result.model.get_submodule(name).out_channels == len(selection.keep_idxs)
        assert sum(len(s.prune_idxs) for s in pruned.values()) > 0

    def test_printed_code_loads_the_same_model(self, finished):
        _, result, text = finished
        assert result.reload in text
        names = {}
        exec(result.reload, names)
        images = load_digits(0, Path()).test_images
        with torch.no_grad():
            assert torch.equal(names["model"](images), result.model.eval()(images))

    def test_counts(self, finished):
        """Against a count from the channels that the plan keeps."""
        _, result, _ = finished
        widths = {"trained": [1, *WIDTHS]}
        widths["pruned, compensated"] = [1, *(result.model.get_submodule(layer).out_channels for layer in LAYERS)]
        assert widths["pruned, compensated"] != widths["trained"]
        for name, w in widths.items():
            kernels = [9 * a * b for a, b in pairwise(w)]
            assert result.stats[name].n_parameters == sum(kernels) + 2 * sum(w) - 2 + 10 * w[-1] + 10
            pixels = [64, 64, 16, 16]
            # Beside the products: three operations per value for BatchNorm and ReLU, one for each pooled value, biases.
            touched = sum(3 * p * n for p, n in zip(pixels, w[1:], strict=True)) + 64 * w[2] + 16 * w[4] + 10
            products = sum(p * n for p, n in zip(pixels, kernels, strict=True)) + 10 * w[-1]
            assert result.stats[name].n_macs == products + touched
        for pruned, whole in (
            ("pruned, fine-tuned", "pruned, compensated"),
            ("unpruned, fine-tuned as long", "trained"),
        ):
            assert result.stats[pruned].n_parameters == result.stats[whole].n_parameters
            assert result.stats[pruned].n_macs == result.stats[whole].n_macs

    def test_accuracy_is_that_on_the_test_images(self, finished):
        _, result, _ = finished
        images = load_digits(0, Path())
        with torch.no_grad():
            right = result.model.eval()(images.test_images).argmax(1) == images.test_labels
        assert result.stats["pruned, fine-tuned"].accuracy == pytest.approx(float(right.double().mean()))
        assert all(stats.accuracy is not None and stats.accuracy <= 1 for stats in result.stats.values())
        assert result.stats["trained"].accuracy > 0.7
        assert all(stats.batch_size == 64 and stats.latency > 0 for stats in result.stats.values())

    def test_fine_tuning_trained_both(self, finished):
        _, result, _ = finished
        accuracies = [stats.accuracy for stats in result.stats.values()]
        assert accuracies[2] > accuracies[1]
        assert accuracies[3] != accuracies[0]

    def test_tables(self, finished):
        _, result, text = finished
        rows = [line.split() for line in text.splitlines()]
        for group in result.plan:
            if group.selection is not None:
                kept, total = len(group.selection.keep_idxs), group.selection.n_channels
                start = [group.name, str(kept), "/", str(total)]
                assert any(row[:4] == start for row in rows), start
        first_words = [row[0] for row in rows if row]
        assert [word for word in first_words if word in LAYERS] == list(LAYERS)
        for name, stats in result.stats.items():
            start = [*name.split(), f"{stats.accuracy:.2%}", f"{stats.n_parameters:,}"]
            assert any(row[: len(start)] == start for row in rows), start
        assert "1,198 training and 599 test images" in text
        assert "latency: on 1 thread\n" in text
        assert max(map(len, text.split("load the pruned")[0].splitlines())) <= 80

    def test_test_images_decide_nothing_and_a_seed_everything(self, finished, blind):
        _, result, _ = finished
        _, again, _ = blind
        assert [g.selection and g.selection.keep_idxs for g in again.plan] == [
            g.selection and g.selection.keep_idxs for g in result.plan
        ]
        for (name, a), b in zip(result.model.state_dict().items(), again.model.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
        assert again.stats["pruned, fine-tuned"].accuracy < 0.3

    def test_without_matplotlib(self, blind):
        folder, result, text = blind
        assert "plots skipped: pip install 'tp_cosep[plots]'" in text
        assert {path.name for path in folder.iterdir()} == {"model.pt", "plan.json", "report.html"}
        assert {path.name for path in result.files} == {"model.pt", "plan.json", "report.html"}

    def test_leaves_torch_as_it_was(self, tmp_path, monkeypatch):
        """Threads and random numbers, also if the demo fails."""
        seen = []

        def fail(*args):
            seen.append(torch.get_num_threads())
            raise CoSePError("stop")

        monkeypatch.setattr(demo, "train", lambda *args, **options: None)
        monkeypatch.setattr(demo, "_prune", fail)
        random, threads = torch.get_rng_state(), torch.get_num_threads()
        with pytest.raises(CoSePError, match="stop"):
            run(tmp_path, threads=threads + 1)
        assert seen == [threads + 1]
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.get_rng_state(), random)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"data": "mnist"}, r"expected data of \['digits', 'fashion-mnist'\], got 'mnist'"),
            ({"epochs": 0}, "expected epochs ≥ 1, got 0"),
            ({"fine_tune_epochs": -1}, "expected fine_tune_epochs ≥ 0, got -1"),
            ({"threads": 0}, "expected threads ≥ 1, got 0"),
        ],
    )
    def test_bad_arguments(self, tmp_path, options, message):
        with pytest.raises(InputError, match=message):
            run_demo(folder=tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()


def test_no_fine_tuning_changes_nothing():
    images = load_digits(0, Path())
    net = DemoNet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    demo._fine_tune(net, images, replace(demo._RECIPES["digits"], fine_tune_epochs=0), 0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_fine_tuning_is_the_same_for_equal_nets_and_moves_the_weights():
    images = load_digits(0, Path())
    recipe = replace(demo._RECIPES["digits"], fine_tune_epochs=1)
    a = DemoNet(1, (6, 8))
    b = deepcopy(a)
    before = a.conv2.weight.detach().clone()
    demo._fine_tune(a, images, recipe, 0)
    demo._fine_tune(b, images, recipe, 0)
    assert torch.equal(a.conv2.weight, b.conv2.weight)
    assert (a.conv2.weight - before).norm() > 0.05 * before.norm()
    assert not a.training


def test_a_model_that_comes_back_otherwise_is_an_error(tmp_path):
    images = load_digits(0, Path())
    recipe = demo._RECIPES["digits"]
    model = DemoNet(1, recipe.widths).eval()
    demo._save_model(model, PruningPlan(), recipe, images, tmp_path)
    model.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(CoSePError, match=r"the outputs of the model loaded from .* differ from the saved one's"):
        demo._save_model(model, PruningPlan(), recipe, images, tmp_path)


@pytest.mark.parametrize(("size", "widths"), [(8, (8, 8, 12, 12)), (28, (6, 10, 12)), (28, (4,))])
def test_net(size, widths):
    net = DemoNet(3, widths, 5)
    convs = [m for m in net if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == list(widths)
    assert sum(isinstance(m, nn.MaxPool2d) for m in net) == (len(widths) - 1) // 2
    assert net(torch.zeros(2, 3, size, size)).shape == (2, 5)


class TestDigits:
    def test_split(self):
        """All digits once, a third of them apart, every class in both parts, standardised over the larger."""
        from sklearn.datasets import load_digits as original

        images = load_digits(0, Path())
        assert images.train_images.shape == (1198, 1, 8, 8)
        assert images.test_images.shape == (599, 1, 8, 8)
        assert images.train_images.dtype == torch.float32
        assert images.n_classes == 10
        assert float(images.train_images.mean()) == pytest.approx(0, abs=1e-5)
        assert float(images.train_images.std()) == pytest.approx(1, abs=1e-5)
        x = torch.from_numpy(original().images)
        y = torch.from_numpy(original().target)
        both = torch.cat([images.train_images, images.test_images])[:, 0].double() * x.std() + x.mean()
        labels = torch.cat([images.train_labels, images.test_labels])
        # The deviation of the training part differs a little from that of all images, so match to the nearest.
        nearest = torch.cdist(both.flatten(1), x.flatten(1)).argmin(1)
        assert len(nearest.unique()) > 1790
        assert torch.equal(labels, y[nearest])
        share = torch.bincount(images.test_labels) / torch.bincount(y)
        assert (share - 1 / 3).abs().max() < 0.01

    def test_another_seed_splits_otherwise(self):
        a, b, c = (load_digits(seed, Path()).test_labels for seed in (0, 0, 1))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(MissingDependencyError, match=r"scikit-learn.*pip install 'tp_cosep\[demo\]'"):
            load_digits(0, Path())


@pytest.fixture
def fashion():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, 28, 28), generator=generator)
    return {
        "train-images-idx3-ubyte": images[:20],
        "train-labels-idx1-ubyte": torch.arange(20) % 10,
        "t10k-images-idx3-ubyte": images[20:],
        "t10k-labels-idx1-ubyte": torch.arange(10),
    }


class TestFashionMnist:
    def test_from_debian(self, fashion, tmp_path, monkeypatch):
        for name, values in fashion.items():
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(values), mtime=0))
        monkeypatch.setattr(_demo_data, "DEBIAN_FOLDER", tmp_path)
        images = load_fashion_mnist(0, Path())
        self.check(images, fashion)
        assert str(tmp_path) in images.source

    def test_from_torchvision(self, fashion, tmp_path, monkeypatch):
        raw = tmp_path / "data" / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name, values in fashion.items():
            (raw / name).write_bytes(idx(values))
        monkeypatch.setattr(_demo_data, "DEBIAN_FOLDER", tmp_path / "absent")
        images = load_fashion_mnist(0, tmp_path / "data")
        self.check(images, fashion)
        assert "torchvision" in images.source

    @staticmethod
    def check(images, fashion):
        train = fashion["train-images-idx3-ubyte"].double()
        for part, name in ((images.train_images, "train"), (images.test_images, "t10k")):
            expected = (fashion[f"{name}-images-idx3-ubyte"].double() - train.mean()) / train.std()
            torch.testing.assert_close(part, expected[:, None].float(), rtol=1e-4, atol=1e-5)
        assert torch.equal(images.train_labels, fashion["train-labels-idx1-ubyte"])
        assert torch.equal(images.test_labels, fashion["t10k-labels-idx1-ubyte"])
        assert images.n_classes == 10

    @pytest.mark.parametrize("error", [urllib.error.URLError("no network"), RuntimeError("no mirror")])
    def test_no_download(self, tmp_path, monkeypatch, error):
        def fail(*args, **options):
            raise error

        monkeypatch.setattr(import_torchvision().datasets, "FashionMNIST", fail)
        monkeypatch.setattr(_demo_data, "DEBIAN_FOLDER", tmp_path / "absent")
        with pytest.raises(InputError, match=r"could not be downloaded .*no .*dataset-fashion-mnist"):
            load_fashion_mnist(0, tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            b"not gzipped",
            gzip.compress(idx(torch.arange(6)), mtime=0)[:-9],
            gzip.compress(b"", mtime=0),
            gzip.compress(idx(torch.arange(6))[:-1], mtime=0),
            gzip.compress(idx(torch.arange(6)) + b"more", mtime=0),
            gzip.compress(b"\x00\x00\x09\x01" + idx(torch.arange(6))[4:], mtime=0),
        ],
    )
    def test_damaged_file(self, tmp_path, content):
        (tmp_path / "labels.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"labels.gz': expected a .*IDX file"):
            read_idx(tmp_path / "labels.gz")

    @pytest.mark.slow
    def test_short_demo(self, tmp_path, monkeypatch):
        """Maps of 28 × 28 through all of the demo."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(60) % 3
        images = torch.randn(60, 1, 28, 28, generator=generator) + labels[:, None, None, None]
        small = _demo_data.ImageData("planted", images[:40], labels[:40], images[40:], labels[40:])
        monkeypatch.setitem(LOADERS, "fashion-mnist", lambda seed, folder: small)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        result, text = run(tmp_path, data="fashion-mnist", threads=1)
        assert "planted: 40 training and 20 test images, 28 × 28, 3 classes" in text
        assert result.model.get_submodule("head").out_features == 3
