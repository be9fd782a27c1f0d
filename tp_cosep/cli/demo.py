"""Train a small network, prune and fine-tune it, and compare it with the unpruned one."""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from tp_cosep.cli.demo_data import LOADERS, ImageData, load_digits
from tp_cosep.errors import CoSePError, InputError, MissingDependencyError
from tp_cosep.graph.groups import prunable_groups, read_group
from tp_cosep.graph.tracing import ROOT_TYPES, trace
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.pruning.pruner import CoSePPruner
from tp_cosep.report.benchmark import ModelStats, measure_models
from tp_cosep.report.plots import plot_kept_channels, plot_mss, plot_separability_space
from tp_cosep.report.tables import layer_table, model_table
from tp_cosep.selection.reconstruction import ReconstructionSelector
from tp_cosep.utils.data import evaluating

__all__ = ["DATA", "DemoNet", "DemoResult", "accuracy", "load_digits", "run", "run_demo", "train", "train_net"]

#: The names of the data sets.
DATA = tuple(LOADERS)

_TIMED_BATCH = 64


def run(options: argparse.Namespace) -> None:
    """Run ``tp-cosep demo``."""
    run_demo(
        options.data,
        options.output,
        seed=options.seed,
        epochs=options.epochs,
        fine_tune_epochs=options.fine_tune_epochs,
        threads=options.threads,
    )


class DemoNet(nn.Sequential):
    """A small VGG: convolutions with BatchNorm, pooling after every second one.

    Args:
        in_channels: Number of channels of the images.
        widths: Number of channels of each convolution.
        n_classes: Number of classes.
    """

    def __init__(self, in_channels: int = 1, widths: Sequence[int] = (32, 32, 64, 64), n_classes: int = 10) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (n_in, n_out) in enumerate(zip([in_channels, *widths], widths, strict=False), start=1):
            layers[f"conv{i}"] = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
            layers[f"norm{i}"] = nn.BatchNorm2d(n_out)
            layers[f"relu{i}"] = nn.ReLU()
            if i % 2 == 0 and i < len(widths):
                layers[f"pool{i}"] = nn.MaxPool2d(2)
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(widths[-1], n_classes)
        super().__init__(layers)


@dataclass(frozen=True)
class _Recipe:
    """How a network is trained on a data set."""

    widths: tuple[int, ...]
    epochs: int
    fine_tune_epochs: int
    batch_size: int
    n_calibration: int
    threads: int | None = None
    rate: float = 0.1
    fine_tune_rate: float = 0.03


_RECIPES = {
    # One thread: more are hardly faster on maps this small and much slower on busy cores; nor does the result depend
    # on the number of cores.
    "digits": _Recipe((64, 64, 128, 128), epochs=8, fine_tune_epochs=2, batch_size=64, n_calibration=2000, threads=1),
    "fashion-mnist": _Recipe((16, 32, 64, 64), epochs=2, fine_tune_epochs=1, batch_size=64, n_calibration=5000),
}


@dataclass(frozen=True)
class DemoResult:
    """Result of a demo.

    Attributes:
        plan: The plan that was applied.
        stats: Measurements by name of the model.
        model: The pruned and fine-tuned model.
        files: The files in the folder.
        reload: Python code that loads the model.
    """

    plan: PruningPlan
    stats: dict[str, ModelStats]
    model: nn.Module
    files: tuple[Path, ...]
    reload: str


def run_demo(
    data: str = "digits",
    folder: str | Path = "tp_cosep_demo",
    *,
    seed: int = 0,
    epochs: int | None = None,
    fine_tune_epochs: int | None = None,
    threads: int | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Train, prune, fine-tune, compare, and write model, plan and plots to a folder.

    Test images are used for accuracies and timing alone; every decision is made on training images.

    Args:
        data: ``"digits"`` (seconds) or ``"fashion-mnist"`` (minutes).
        folder: Where the files are written; created if it is missing.
        seed: Seed of the weights, the order of the batches and the split of the digits. The same seed gives the same
            result on the same machine with the same number of threads, but for the latencies.
        epochs: Epochs of training; by default those of the data set's recipe.
        fine_tune_epochs: Epochs of fine-tuning, which may be 0; by default those of the data set's recipe.
        threads: Threads of torch during the demo; by default 1 for the digits, and torch's own number otherwise.
        console: Where to print; standard output by default.

    Returns:
        Plan, measurements, model and files.

    Raises:
        InputError: If an argument is not valid or the data cannot be loaded.
        MissingDependencyError: If the package with the data is not installed.
    """
    recipe = _recipe(data, epochs, fine_tune_epochs, threads)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _threads(recipe.threads):
        return _run(LOADERS[data](seed, folder / "data"), recipe, folder, seed, console or Console())


def _run(images: ImageData, recipe: _Recipe, folder: Path, seed: int, console: Console) -> DemoResult:
    say = partial(console.print, highlight=False, markup=False)
    _describe(images, say)
    trained = _new_net(recipe, images, seed)
    with _timed(f"training for {recipe.epochs} epochs", say):
        train(trained, images, epochs=recipe.epochs, rate=recipe.rate, seed=seed, batch_size=recipe.batch_size)
    pruned, plan, distances = _prune(trained, images, recipe, say)
    models = {"trained": trained, "pruned, compensated": pruned}
    for name, start in (("pruned, fine-tuned", pruned), ("unpruned, fine-tuned as long", trained)):
        models[name] = deepcopy(start)
        with _timed(f"{name}: {recipe.fine_tune_epochs} epochs", say):
            _fine_tune(models[name], images, recipe, seed)
    timed = images.test_images[:_TIMED_BATCH]
    stats = measure_models(models, timed, lambda net: accuracy(net, images))

    shown = _in_network_order(plan, trained)
    console.print("", layer_table(shown), "", model_table(stats), "", sep="\n")
    say(
        f"accuracy: on the {len(images.test_labels):,} test images; latency: on {torch.get_num_threads()} "
        f"{'thread' if torch.get_num_threads() == 1 else 'threads'}\n"
    )
    model = models["pruned, fine-tuned"]
    page = folder / "report.html"
    # The page compares the last model with the first.
    in_order = {name: stats[name] for name in sorted(stats, key=lambda name: name.startswith("pruned"))}
    shown.report(page, stats=in_order, title=f"The demo on {images.source}")
    files = [*_save_model(model, plan, recipe, images, folder), page, *_save_plots(shown, distances, folder, say)]
    say(f"{folder}: {', '.join(path.name for path in files)}\n")
    reload = _reload_code(recipe, images, folder)
    say(f"load the pruned model:\n\n{reload}", soft_wrap=True)
    return DemoResult(plan, stats, model, tuple(files), reload)


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """Set torch's number of threads for a while; ``None`` keeps it."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _recipe(data: str, epochs: int | None, fine_tune_epochs: int | None, threads: int | None) -> _Recipe:
    if data not in _RECIPES:
        raise InputError(f"demo: expected data of {sorted(_RECIPES)}, got {data!r}.")
    asked: dict[str, Any] = {"epochs": epochs, "fine_tune_epochs": fine_tune_epochs, "threads": threads}
    for name, value in asked.items():
        least = 0 if name == "fine_tune_epochs" else 1
        if value is not None and value < least:
            raise InputError(f"demo: expected {name} ≥ {least}, got {value}.")
    return replace(_RECIPES[data], **{name: value for name, value in asked.items() if value is not None})


def _describe(images: ImageData, say: Callable[..., None]) -> None:
    height, width = images.train_images.shape[-2:]
    say(
        f"{images.source}: {len(images.train_labels):,} training and {len(images.test_labels):,} test images, "
        f"{height} × {width}, {images.n_classes} classes"
    )


@contextmanager
def _timed(what: str, say: Callable[..., None]) -> Iterator[None]:
    """Print the duration of a block."""
    start = time.perf_counter()
    yield
    say(f"{what}: {time.perf_counter() - start:.1f} s")


def _new_net(recipe: _Recipe, images: ImageData, seed: int) -> DemoNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DemoNet(images.train_images.shape[1], recipe.widths, images.n_classes)


def train_net(
    data: str, *, seed: int = 0, epochs: int | None = None, folder: str | Path = "tp_cosep_demo"
) -> tuple[DemoNet, ImageData]:
    """Train the network of the demo.

    Args:
        data: ``"digits"`` or ``"fashion-mnist"``.
        seed: Seed of the weights, the order of the batches and the split of the digits.
        epochs: Epochs of training; by default those of the data set's recipe.
        folder: Where data is downloaded to, if it is not installed.

    Returns:
        The network in eval mode, and its images.

    Raises:
        InputError: If an argument is not valid or the data cannot be loaded.
        MissingDependencyError: If the package with the data is not installed.
    """
    recipe = _recipe(data, epochs, None, None)
    images = LOADERS[data](seed, Path(folder) / "data")
    net = _new_net(recipe, images, seed)
    with _threads(recipe.threads):
        train(net, images, epochs=recipe.epochs, rate=recipe.rate, seed=seed, batch_size=recipe.batch_size)
    return net, images


def train(net: nn.Module, images: ImageData, *, epochs: int, rate: float, seed: int, batch_size: int = 64) -> None:
    """Train in place with SGD; the learning rate rises over the first fifth of the steps, then decays to 0."""
    shuffle = torch.Generator().manual_seed(seed)
    n = len(images.train_labels)
    batches = [b for _ in range(epochs) for b in torch.split(torch.randperm(n, generator=shuffle), batch_size)]
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    warmup = max(1, len(batches) // 5)
    net.train()
    for step, batch in enumerate(tqdm(batches, unit="batch", disable=None, leave=False)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warmup, (len(batches) - step) / max(1, len(batches) - warmup))
        optimizer.zero_grad()
        loss = cross_entropy(net(images.train_images[batch]), images.train_labels[batch])
        torch.autograd.backward(loss)
        optimizer.step()
    net.eval()


def _fine_tune(net: nn.Module, images: ImageData, recipe: _Recipe, seed: int) -> None:
    """Fine-tune any network on the same batches in the same order."""
    epochs, rate, batch_size = recipe.fine_tune_epochs, recipe.fine_tune_rate, recipe.batch_size
    train(net, images, epochs=epochs, rate=rate, seed=seed + 1, batch_size=batch_size)


def _prune(
    trained: nn.Module, images: ImageData, recipe: _Recipe, say: Callable[..., None]
) -> tuple[nn.Module, PruningPlan, dict[str, Tensor]]:
    """A pruned copy, its plan, and the distances between channels by name of the group."""
    n = min(recipe.n_calibration, len(images.train_labels))
    calibration = list(_batches(images.train_images[:n], images.train_labels[:n]))
    example = images.train_images[:1]
    pruned = deepcopy(trained)
    with _timed(f"pruning and compensation, calibrated on {n:,} training images", say):
        selector = ReconstructionSelector().fit(pruned, calibration)
        pruner = CoSePPruner(
            pruned, example, importance=selector, loader=calibration, compensate=True, recalibrate=True
        )
        pruner.step()
        groups = prunable_groups(trace(trained, example), (), ROOT_TYPES)
        distances = {read_group(group).name: selector.distances(group) for group in groups}
    return pruned, pruner.plan, {name: d for name, d in distances.items() if d is not None}


def _in_network_order(plan: PruningPlan, model: nn.Module) -> PruningPlan:
    """The plan from the first layer to the last, for people; Torch-Pruning has an order of its own."""
    position = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return replace(plan, groups=tuple(sorted(plan, key=lambda group: position[group.name])))


def _batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(images, 250), torch.split(labels, 250), strict=True)


@torch.no_grad()
def accuracy(net: nn.Module, images: ImageData) -> float:
    """Accuracy of a network in eval mode on the test images."""
    n_right = 0
    for x, y in _batches(images.test_images, images.test_labels):
        n_right += int((net(x).argmax(1) == y).sum())
    return n_right / len(images.test_labels)


def _save_model(model: nn.Module, plan: PruningPlan, recipe: _Recipe, images: ImageData, folder: Path) -> list[Path]:
    """Save weights and plan, and check that they restore the same model."""
    weights, plan_path = folder / "model.pt", folder / "plan.json"
    torch.save(model.state_dict(), weights)
    plan.save(plan_path)
    example = images.test_images[:_TIMED_BATCH]
    again = DemoNet(example.shape[1], recipe.widths, images.n_classes)
    PruningPlan.load(plan_path).apply(again, example[:1])
    again.load_state_dict(torch.load(weights, weights_only=True))
    again.eval()
    with evaluating(model):
        if not torch.equal(again(example), model(example)):
            raise CoSePError(f"demo: the outputs of the model loaded from {str(folder)!r} differ from the saved one's.")
    return [weights, plan_path]


def _save_plots(plan: PruningPlan, distances: dict[str, Tensor], folder: Path, say: Callable[..., None]) -> list[Path]:
    try:
        figures = {"kept_channels.png": plot_kept_channels(plan)[0]}
        for name, selection in [(group.name, group.selection) for group in plan if group.selection is not None]:
            drawn = {"mss": plot_mss(selection), "space": plot_separability_space(distances[name], selection)}
            for kind, (figure, ax) in drawn.items():
                ax.set_title(f"{name}: {ax.get_title(loc='left')}", loc="left")
                figures[f"{name}_{kind}.png"] = figure
    except MissingDependencyError:
        say("plots skipped: pip install 'tp_cosep[plots]'")
        return []
    for file, figure in figures.items():
        figure.savefig(folder / file, dpi=150)
    return [folder / file for file in figures]


def _reload_code(recipe: _Recipe, images: ImageData, folder: Path) -> str:
    shape = (1, *images.train_images.shape[1:])
    return f"""\
import torch
from tp_cosep import PruningPlan
from tp_cosep.cli.demo import DemoNet

model = DemoNet({shape[1]}, {recipe.widths}, {images.n_classes})
PruningPlan.load({str(folder / "plan.json")!r}).apply(model, torch.zeros{shape})
model.load_state_dict(torch.load({str(folder / "model.pt")!r}, weights_only=True))
model.eval()
"""
