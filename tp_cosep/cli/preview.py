"""``tp-cosep preview``: how many channels targets would keep."""

from __future__ import annotations

import argparse
from copy import deepcopy

from rich.table import Table
from rich.text import Text

from tp_cosep.cli.processes import processes
from tp_cosep.cli.setup import Subject, fitted, prepare, pruner_options
from tp_cosep.errors import InputError
from tp_cosep.pruning.budget import Preview
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.pruning.pruner import CoSePPruner
from tp_cosep.report.benchmark import ModelStats, measure
from tp_cosep.report.tables import group_label, new_table
from tp_cosep.selection.selector import Selector

__all__ = ["run"]

_SIZES = ("MACs", "share", "parameters", "share")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    with processes(options) as together:
        subject = prepare(options, together)
        selector = fitted(options, subject, together, None)
        pruner = CoSePPruner(subject.model, subject.example, importance=selector, **pruner_options(options, None))
        together.console.print("", _trade_offs(pruner.preview(n_points=11)), sep="\n")
        found = {"unpruned": (PruningPlan(), measure(subject.model, subject.example, n_runs=5, n_warmup=1))}
        notes = []
        for target in options.targets:
            name = "knee" if target is None else f"{target[0]}={target[1]:g}"
            try:
                found[name] = _pruned(options, subject, selector, target)
            except InputError as error:
                notes.append(f"{name}: {error}")
        together.console.print("", _models(found), "", _layers(found), "", sep="\n")
        for note in notes:
            together.say(note)


def _trade_offs(preview: Preview) -> Table:
    table = new_table(
        "Targets in MACs",
        "retained variance: of consumers' inputs, over all groups; MACs of convolutions and matrix products alone",
    )
    for header in (*_SIZES, "retained variance"):
        table.add_column(header, justify="right", no_wrap=True)
    whole = preview.points[0]
    for p in preview.points:
        table.add_row(*_sizes((p.macs, p.params), (whole.macs, whole.params)), f"{p.retained_variance:.2%}")
    return table


def _sizes(now: tuple[float, float], whole: tuple[float, float]) -> list[str]:
    """Multiply-accumulates and parameters, each with its share of the whole."""
    return [
        text for n, all_of_it in zip(now, whole, strict=True) for text in (f"{n:,.0f}", f"{n / max(all_of_it, 1):.0%}")
    ]


def _pruned(
    options: argparse.Namespace, subject: Subject, selector: Selector, target: tuple[str, float] | None
) -> tuple[PruningPlan, ModelStats]:
    model = deepcopy(subject.model)
    pruner = CoSePPruner(model, subject.example, importance=selector, **pruner_options(options, target))
    pruner.step()
    return pruner.plan, measure(model, subject.example, n_runs=5, n_warmup=1)


def _models(found: dict[str, tuple[PruningPlan, ModelStats]]) -> Table:
    table = new_table("Targets")
    table.add_column("target")
    for header in _SIZES:
        table.add_column(header, justify="right", no_wrap=True)
    whole = found["unpruned"][1]
    for name, (_, stats) in found.items():
        table.add_row(name, *_sizes((stats.n_macs, stats.n_parameters), (whole.n_macs, whole.n_parameters)))
    return table


def _layers(found: dict[str, tuple[PruningPlan, ModelStats]]) -> Table:
    plans = {name: plan for name, (plan, _) in found.items() if len(plan)}
    table = new_table("Channels kept", "–: not pruned")
    table.add_column("layer", overflow="fold")
    table.add_column("of", justify="right")
    for name in plans:
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[str, tuple[str, dict[str, str]]] = {}
    for name, plan in plans.items():
        for group in plan:
            chosen = group.selection
            if chosen is not None:
                _, kept = rows.setdefault(group_label(group), (str(chosen.n_channels), {}))
                kept[name] = str(len(chosen.keep_idxs))
    for label, (n_channels, kept) in rows.items():
        table.add_row(Text(label), n_channels, *(kept.get(name, "–") for name in plans))
    return table
