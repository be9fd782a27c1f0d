"""One cell of the comparison: prune a trained network in one way, repair it, fine-tune it, and measure."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from benchmarks.compare.data import Images
from benchmarks.compare.methods import importance
from benchmarks.compare.training import Recipe, accuracy, checkpoint, train, trained
from tp_cosep import Compensator, recalibrate

__all__ = ["FINE_TUNING", "REPAIRS", "Cell", "Records", "checkpoint", "measure", "ratio_for_speedup"]

REPAIRS = ("none", "one-shot", "sequential")
#: How pruned networks are fine-tuned, whatever selected them.
FINE_TUNING = Recipe(epochs=1, rate=0.05, warm_up=0.1)


@dataclass(frozen=True)
class Cell:
    """What identifies a measurement.

    Attributes:
        network: Its name.
        data: The data set.
        seed: Of the trained network, the calibration data, the random selection and the fine-tuning.
        amount: ``"half"`` of the channels of every layer, or a speed-up in MACs such as ``"2x"``, reached by one ratio
            for all layers.
        method: The selection.
        repair: One of :data:`REPAIRS`.
        recalibrated: Whether BatchNorm statistics were estimated anew.
        epochs: Of fine-tuning.
        n_calibration: Images that selection and repair look at.
        base: Index of the trained network.
    """

    network: str
    data: str
    seed: int
    amount: str
    method: str
    repair: str
    recalibrated: bool
    epochs: float = 0
    n_calibration: int = 1000
    base: int = 0


class Records:
    """Raw results, one JSON object a line; what is there is not measured again."""

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
        """Keep a result."""
        record = {"cell": asdict(cell), **values}
        self._known[cell] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


def head_of(model: nn.Module) -> nn.Module:
    """The classifier, which keeps its outputs."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def ratio_for_speedup(model: nn.Module, x: torch.Tensor, speedup: float) -> float:
    """The one pruning ratio for all layers at which the MACs fall by a factor."""
    before = tp.utils.count_ops_and_params(model, x)[0]
    low, high = 0.0, 0.95
    for _ in range(12):
        ratio = (low + high) / 2
        pruned = deepcopy(model)
        imp = tp.importance.GroupMagnitudeImportance(p=1)
        tp.pruner.BasePruner(pruned, x, imp, pruning_ratio=ratio, ignored_layers=[head_of(pruned)]).step()
        if before / tp.utils.count_ops_and_params(pruned, x)[0] < speedup:
            low = ratio
        else:
            high = ratio
    return high


def measure(cell: Cell, images: Images, records: Records) -> None:
    """Measure a cell with and without recalibration (without fine-tuning), or with it and fine-tuned."""
    without, with_ = (Cell(**{**asdict(cell), "recalibrated": r}) for r in (False, True))
    wanted = [with_] if cell.epochs or cell.method == "unpruned" else [without, with_]
    if all(c in records for c in wanted):
        return
    model = trained(cell.network, images, cell.base)
    batches = images.calibration(cell.n_calibration, cell.seed)
    x = batches[0][0][:1]
    before = tp.utils.count_ops_and_params(model, x)
    ratio = 0.5 if cell.amount == "half" else ratio_for_speedup(model, x, float(cell.amount.removesuffix("x")))
    if cell.method == "unpruned":
        recipe = Recipe(**{**asdict(FINE_TUNING), "epochs": cell.epochs})
        if cell.epochs:
            train(model, images, recipe, cell.seed)
        records.add(cell, accuracy=accuracy(model, images), macs=1.0, params=1.0, recipe=asdict(recipe))
        return
    torch.manual_seed(cell.seed)
    start = time.perf_counter()
    imp = importance(cell.method, model, batches)
    pruner = tp.pruner.BasePruner(model, x, imp, pruning_ratio=ratio, ignored_layers=[head_of(model)])
    seconds = {"measure": time.perf_counter() - start}
    repair = None
    if cell.repair != "none":
        repair = Compensator(model, x, mode=cell.repair).fit(batches, progress=False)
    start = time.perf_counter()
    for group in pruner.step(interactive=True):
        if repair is not None:
            repair(group)
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
