"""One cell of the comparison: prune a trained network, compensate, fine-tune, and measure."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from benchmarks.compare.data import Images
from benchmarks.compare.methods import ALLOCATED, GLOBAL, LAYER_BY_LAYER, importance
from benchmarks.compare.networks import build
from benchmarks.compare.training import Recipe, accuracy, checkpoint, train, trained
from tp_cosep import Compensator, CoSePPruner, recalibrate
from tp_cosep.selection.selector import ratio_for

__all__ = ["COMPENSATIONS", "FINE_TUNING", "Cell", "Records", "checkpoint", "groups_of", "measure", "ratio_for_speedup"]

COMPENSATIONS = ("none", "one-shot", "sequential")
#: How pruned networks are fine-tuned, for all selections.
FINE_TUNING = Recipe(epochs=1, rate=0.05, warm_up=0.1)


@dataclass(frozen=True)
class Cell:
    """The identity of a measurement.

    Attributes:
        network: Name of the network.
        data: Name of the data set.
        seed: Seed of the calibration data, of random selection and of fine-tuning.
        amount: ``"half"`` of the channels of every layer; ``"half of NAME"``, of one group alone; a speed-up in MACs
            such as ``"2x"``, reached by one ratio for all layers unless the method ranks or allocates over layers; or
            ``"knee"``, the selection's own counts.
        method: Name of the selection.
        compensation: One of :data:`COMPENSATIONS`.
        recalibrated: Whether BatchNorm statistics were re-estimated.
        epochs: Epochs of fine-tuning.
        n_calibration: Number of images for selection and compensation.
        base: Index of the trained network.
    """

    network: str
    data: str
    seed: int
    amount: str
    method: str
    compensation: str
    recalibrated: bool
    epochs: float = 0
    n_calibration: int = 1000
    base: int = 0


class Records:
    """Raw results, one JSON object per line; a recorded cell is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[Cell, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                record = json.loads(line)
                self._known[Cell(**record["cell"])] = record

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._known

    def __iter__(self) -> Iterator[tuple[Cell, dict[str, Any]]]:
        return iter(self._known.items())

    def add(self, cell: Cell, **values: Any) -> None:
        """Append a result."""
        record = {"cell": asdict(cell), **values}
        self._known[cell] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


def head_of(model: nn.Module) -> nn.Module:
    """The classifier, whose outputs are kept."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def ratio_for_speedup(
    model: nn.Module, x: torch.Tensor, speedup: float, make: Callable[[nn.Module, float], Any] | None = None
) -> float:
    """The pruning ratio that divides the MACs of a model by a factor.

    Args:
        model: The model, which is not changed.
        x: Inputs of one sample.
        speedup: MACs before over MACs after.
        make: ``make(model, ratio)`` returns a pruner; by default one with the same ratio in all layers.

    Returns:
        The ratio, in [0, 0.95].
    """
    before = tp.utils.count_ops_and_params(model, x)[0]
    low, high = 0.0, 0.95
    for _ in range(10):
        ratio = (low + high) / 2
        pruned = deepcopy(model)
        if make is not None:
            make(pruned, ratio).step()
        else:
            by_size = tp.importance.GroupMagnitudeImportance(p=1)
            tp.pruner.BasePruner(pruned, x, by_size, pruning_ratio=ratio, ignored_layers=[head_of(pruned)]).step()
        if before / tp.utils.count_ops_and_params(pruned, x)[0] < speedup:
            low = ratio
        else:
            high = ratio
    return high


def pruner_for(
    cell: Cell, model: nn.Module, imp: Any, batches: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[Any, float]:
    """The stock pruner of a cell, and its ratio."""
    x, head = batches[0][0][:1], [head_of(model)]
    if cell.amount == "half":
        return tp.pruner.BasePruner(model, x, imp, pruning_ratio=0.5, ignored_layers=head), 0.5
    if cell.amount.startswith("half of "):
        one = {model.get_submodule(cell.amount.removeprefix("half of ")): 0.5}
        return tp.pruner.BasePruner(model, x, imp, pruning_ratio=0.0, pruning_ratio_dict=one, ignored_layers=head), 0.5
    if cell.amount == "knee":
        counts = imp.pruning_ratio_dict(model, x, head)
        return tp.pruner.BasePruner(
            model, x, imp, pruning_ratio=0.0, pruning_ratio_dict=counts, ignored_layers=head
        ), 0.0
    speedup = float(cell.amount.removesuffix("x"))
    if cell.method in ALLOCATED:
        # The counts alone: the importance of the cell selects the channels.
        dry = deepcopy(model)
        selector = importance(ALLOCATED[cell.method], dry, batches)
        allocated = CoSePPruner(dry, x, selector, target={"macs": 1 / speedup}, ignored_layers=[head_of(dry)])
        allocated.step()
        chosen = [(model.get_submodule(e.name), e.selection) for e in allocated.plan if e.selection is not None]
        counts = {layer: ratio_for(len(s.keep_idxs), s.n_channels) for layer, s in chosen}
        return tp.pruner.BasePruner(
            model, x, imp, pruning_ratio=0.0, pruning_ratio_dict=counts, ignored_layers=head
        ), 0.0
    if cell.method in GLOBAL:
        options = {"global_pruning": True, "max_pruning_ratio": 0.9}
        ratio = ratio_for_speedup(
            model,
            x,
            speedup,
            lambda m, r: tp.pruner.BasePruner(
                m, x, importance(cell.method, m, batches), pruning_ratio=r, ignored_layers=[head_of(m)], **options
            ),
        )
        return tp.pruner.BasePruner(model, x, imp, pruning_ratio=ratio, ignored_layers=head, **options), ratio
    ratio = ratio_for_speedup(model, x, speedup)
    return tp.pruner.BasePruner(model, x, imp, pruning_ratio=ratio, ignored_layers=head), ratio


def groups_of(network: str, images: Images) -> list[str]:
    """Names of the prunable groups of a network, in the order in which they run."""
    model = build(network, int(images.train_labels.max()) + 1, images.train.shape[1])
    x = images.standardised(images.test[:1])
    graph = tp.DependencyGraph().build_dependency(model, x)
    names = {m: name for name, m in model.named_modules()}
    groups = graph.get_all_groups(ignored_layers=[head_of(model)], root_module_types=[nn.Conv2d, nn.Linear])
    roots = {names[g[0].dep.target.module] for g in groups}
    return [name for name in names.values() if name in roots]


def layer_by_layer(
    cell: Cell, model: nn.Module, images: Images, batches: list[tuple[torch.Tensor, torch.Tensor]]
) -> Any:
    """A pruner that prunes group by group, with an equal part of the fine-tuning after each."""
    x, head = batches[0][0][:1], [head_of(model)]
    recipe = Recipe(**{**asdict(FINE_TUNING), "epochs": cell.epochs / len(groups_of(cell.network, images))})
    return CoSePPruner(
        model,
        x,
        importance(cell.method, model, batches),
        target={"macs": 1 / float(cell.amount.removesuffix("x"))},
        ignored_layers=head,
        loader=batches,
        layerwise=True,
        fine_tune=lambda m: train(m, images, recipe, cell.seed),
        compensate=cell.compensation != "none" and cell.compensation,
        recalibrate=True,
        fit_options={"progress": False},
    )


def measure(cell: Cell, images: Images, records: Records) -> None:
    """Measure a cell with and without BatchNorm re-estimation, or with it if the cell is fine-tuned."""
    without, with_ = (Cell(**{**asdict(cell), "recalibrated": r}) for r in (False, True))
    cells = [with_] if cell.epochs or cell.method == "unpruned" else [without, with_]
    if all(c in records for c in cells):
        return
    model = trained(cell.network, images, cell.base)
    batches = images.calibration(cell.n_calibration, cell.seed)
    x = batches[0][0][:1]
    before = tp.utils.count_ops_and_params(model, x)
    if cell.method == "unpruned":
        recipe = Recipe(**{**asdict(FINE_TUNING), "epochs": cell.epochs})
        if cell.epochs:
            train(model, images, recipe, cell.seed)
        records.add(cell, accuracy=accuracy(model, images), macs=1.0, params=1.0, recipe=asdict(recipe))
        return
    torch.manual_seed(cell.seed)
    if cell.method in LAYER_BY_LAYER:
        layer_by_layer(cell, model, images, batches).step()
        after = tp.utils.count_ops_and_params(model, x)
        ratios = {"macs": before[0] / after[0], "params": before[1] / after[1]}
        records.add(with_, accuracy=accuracy(model, images), **ratios, recipe=asdict(FINE_TUNING))
        return
    start = time.perf_counter()
    imp = importance(cell.method, model, batches)
    seconds = {"measure": time.perf_counter() - start}
    pruner, ratio = pruner_for(cell, model, imp, batches)
    compensator = None
    if cell.compensation != "none":
        compensator = Compensator(model, x, mode=cell.compensation).fit(batches, progress=False)
    start = time.perf_counter()
    for group in pruner.step(interactive=True):
        if compensator is not None:
            compensator(group)
        group.prune()
    seconds["prune"] = time.perf_counter() - start
    after = tp.utils.count_ops_and_params(model, x)
    facts = {"macs": before[0] / after[0], "params": before[1] / after[1], "ratio": ratio, "seconds": seconds}
    if not cell.epochs:
        records.add(without, accuracy=accuracy(model, images), **facts)
    recalibrate(model, batches, progress=False)
    if cell.epochs:
        recipe = Recipe(**{**asdict(FINE_TUNING), "epochs": cell.epochs})
        train(model, images, recipe, cell.seed)
        facts["recipe"] = asdict(recipe)
    records.add(with_, accuracy=accuracy(model, images), **facts)
