"""One HTML page about a pruning run, a file that needs nothing but a browser: :meth:`tp_cosep.PruningPlan.report`."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tp_cosep._version import __version__
from tp_cosep.errors import InputError
from tp_cosep.report.benchmark import ModelStats
from tp_cosep.report.html_groups import Costs, GroupRow, group_rows, total_costs
from tp_cosep.report.labels import NOT_KNOWN, counted, percent, quantity, signed
from tp_cosep.report.svg import curve, space
from tp_cosep.report.tables import channel_counts, model_rows
from tp_cosep.selection.result import GroupPlan
from tp_cosep.utils.files import replacing

__all__ = ["PageContent", "write_page"]


@dataclass(frozen=True)
class PageContent:
    """What the page is about.

    Attributes:
        groups: One entry per visit to a group, in the order of the visits.
        costs: By unit (``"macs"``, ``"params"``) and layer the costs before and after; layers in execution order.
        options: The options of the run, by name.
        stats: Measurements by the name of the model, the first one unpruned and the last one the result, see
            :func:`tp_cosep.report.measure_models`.
        class_names: By label; a label without a name stands for itself.
        title: The page's title.
    """

    groups: Sequence[GroupPlan]
    costs: Costs = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    stats: Mapping[str, ModelStats] | None = None
    class_names: Sequence[str] | Mapping[int, str] | None = None
    title: str | None = None


def write_page(content: PageContent, path: str | os.PathLike[str]) -> None:
    """Write the page.

    Args:
        content: What the page is about.
        path: The file; an existing one is replaced only when the new one is complete.

    Raises:
        InputError: If the folder does not exist, or ``stats`` or ``class_names`` is of the wrong type.
    """
    text = _page(content, _checked(content.stats), _by_label(content.class_names))
    with replacing(path, "report") as temporary:
        # A name that UTF-8 cannot encode, half of a surrogate pair, becomes a character reference.
        temporary.write_bytes(text.encode("utf-8", "xmlcharrefreplace"))


def _checked(stats: Mapping[str, ModelStats] | None) -> Mapping[str, ModelStats]:
    if stats is None:
        return {}
    values = stats.values() if isinstance(stats, Mapping) else [stats]
    if wrong := [value for value in values if not isinstance(stats, Mapping) or not isinstance(value, ModelStats)]:
        raise InputError(
            "report: expected stats to be a mapping of names to ModelStats, as measure_models returns, got "
            f"{type(wrong[0]).__name__}."
        )
    return stats


def _by_label(class_names: Sequence[str] | Mapping[int, str] | None) -> dict[int, str]:
    if class_names is None:
        return {}
    if isinstance(class_names, Mapping):
        return {int(label): str(name) for label, name in class_names.items()}
    if isinstance(class_names, str) or not isinstance(class_names, Sequence):
        raise InputError(
            "report: expected class_names to be a sequence of names, or a mapping of labels to names, got "
            f"{type(class_names).__name__}."
        )
    return {label: str(name) for label, name in enumerate(class_names)}


def _page(content: PageContent, stats: Mapping[str, ModelStats], names: Mapping[int, str]) -> str:
    rows = group_rows(content.groups, content.costs)
    style, script = ((files(__package__) / "assets" / name).read_text("utf-8") for name in ("page.css", "page.js"))
    labels = {label for group in content.groups for label in _labels_of(group)}
    context = {
        "title": "Pruning plan" if content.title is None else str(content.title),
        "version": __version__,
        "style": Markup(style),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "lead": _lead(content),
        "tiles": _tiles(content, rows, stats),
        "requested": ", ".join(f"{k} {_said(v)}" for k, v in content.options.items() if v not in (None, False)),
        "has_costs": bool(content.costs),
        "models": model_rows(stats),
        "batch_sizes": " or ".join(map(str, sorted({s.batch_size for s in stats.values()}))),
        "pruned": [row for row in rows if row.pruning_visits],
        "left_alone": [row for row in rows if not row.pruning_visits],
        "class_names": {str(label): names[label] for label in sorted(labels) if label in names},
    }
    return _environment().get_template("page.html.jinja").render(context)


def _environment() -> Environment:
    loader = PackageLoader("tp_cosep.report", "assets")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters.update(breakable=_breakable, percent=percent, quantity=quantity, signed=signed)
    environment.globals.update(counted=counted, curve=curve, space=space, not_known=NOT_KNOWN)
    return environment


def _breakable(name: str) -> Markup:
    """A module's name, in which a line may break after a dot."""
    return Markup(".<wbr>").join(name.split("."))


def _labels_of(group: GroupPlan) -> set[int]:
    pairs = group.embedding.pairs if group.selection is not None and group.embedding is not None else ()
    return {label for of_cluster in pairs for pair in of_cluster for label in (pair.first, pair.second)}


def _channels(content: PageContent) -> tuple[int, int]:
    """Channels before and after."""
    counts = channel_counts(content.groups).values()
    return sum(total for total, _ in counts), sum(kept for _, kept in counts)


def _lead(content: PageContent) -> str:
    if not content.groups:
        return "The plan is empty."
    total, kept = _channels(content)
    if kept == total:
        return "Nothing was pruned."
    macs = total_costs(content.costs, "macs")
    of_macs = f", and {macs[1] / macs[0]:.1%} of the multiply-accumulates" if macs and macs[0] else ""
    return f"{kept:,} of {total:,} channels are kept{of_macs}."


def _tiles(
    content: PageContent, rows: Sequence[GroupRow], stats: Mapping[str, ModelStats]
) -> list[tuple[str, str, str]]:
    """What the summary shows: a quantity, its change, and its values before and after."""
    total, kept = _channels(content)
    tiles = [("channels", _change(total, kept), f"{total:,} → {kept:,}")]
    for unit, name in (("macs", "MACs"), ("params", "parameters")):
        costs = total_costs(content.costs, unit)
        if costs is None or not costs[0]:
            tiles.append((name, NOT_KNOWN, "not known"))
        else:
            tiles.append((name, _change(*costs), f"{quantity(costs[0])} → {quantity(costs[1])}"))
    tiles += _measured_tiles(stats)
    n_pruned = sum(bool(row.pruning_visits) for row in rows)
    tiles.append(("groups", str(len(rows)), f"{n_pruned} chosen from, {len(rows) - n_pruned} left alone"))
    return tiles


def _measured_tiles(stats: Mapping[str, ModelStats]) -> list[tuple[str, str, str]]:
    measured = model_rows(stats)
    if len(measured) < 2:
        return []
    tiles, (first, last) = [], (measured[0].stats, measured[-1].stats)
    if measured[-1].accuracy_change is not None:
        points = signed(measured[-1].accuracy_change, ".2f")
        tiles.append(("accuracy, in points", points, f"{first.accuracy:.2%} → {last.accuracy:.2%}"))
    if measured[-1].latency_ratio is not None:
        before, after = 1000 * first.latency, 1000 * last.latency
        tiles.append(("latency", _change(before, after), f"{before:.2f} ms → {after:.2f} ms"))
    return tiles


def _change(before: float, after: float) -> str:
    return signed(after / before - 1, ".1%") if before else NOT_KNOWN


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(v)}" for key, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
