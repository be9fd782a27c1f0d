"""What a pruning run did, as numbers and as tables: per layer from a plan, per model from measurements.

The numbers (:func:`layer_rows`, :func:`measure`, :func:`model_rows`) are apart from the strings
(:func:`layer_table`, :func:`model_table`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.report.benchmark import ModelStats
from tp_cosep.selection.result import GroupPlan

__all__ = [
    "LayerRow",
    "ModelRow",
    "group_label",
    "layer_rows",
    "layer_table",
    "model_rows",
    "model_table",
    "new_table",
    "quantity",
]

_NOTHING = "–"


@dataclass(frozen=True)
class LayerRow:
    """One visit to a group, in numbers; all but the reason are ``None`` for a group that was left alone.

    Attributes:
        group: The group's label, see :func:`group_label`.
        layers: The layers that create its channels.
        n_channels: Channels before.
        n_kept: Channels after.
        k: Number of clusters.
        knee_k: Where the knee of the silhouette curve is; ``None`` if it has none.
        knee_strength: Height of the knee over the straight line, 0 … 1.
        reason: How the count came about, or why the group was left alone.
    """

    group: str
    layers: tuple[str, ...]
    n_channels: int | None
    n_kept: int | None
    k: int | None
    knee_k: int | None
    knee_strength: float | None
    reason: str


@dataclass(frozen=True)
class ModelRow:
    """A model beside the first one.

    Attributes:
        name: The model's name.
        stats: Its measurements.
        accuracy_change: Its accuracy minus the first one's, in percentage points; ``None`` if either is
            unknown.
        parameters_ratio: Its parameters as a multiple of the first one's; ``None`` if that has none.
        macs_ratio: Likewise.
        latency_ratio: Likewise.
    """

    name: str
    stats: ModelStats
    accuracy_change: float | None
    parameters_ratio: float | None
    macs_ratio: float | None
    latency_ratio: float | None


def group_label(group: GroupPlan) -> str:
    """The name of a group for a reader: its root layer, and its side where that is not the usual one."""
    return group.name if group.side == "out" else f"{group.name} (inputs)"


def layer_rows(plan: PruningPlan) -> list[LayerRow]:
    """The numbers of every visit in a plan.

    Returns:
        One row per visit, in the plan's order.

    Example:
        >>> from tp_cosep.selection.result import GroupPlan
        >>> plan = PruningPlan((GroupPlan("head", "out", ("head",), None, "its channels are the model's output"),))
        >>> layer_rows(plan)[0].reason
        "its channels are the model's output"
    """
    return [_layer_row(group) for group in plan]


def _layer_row(group: GroupPlan) -> LayerRow:
    chosen = group.selection
    if chosen is None:
        return LayerRow(group_label(group), group.layers, None, None, None, None, None, group.reason)
    return LayerRow(
        group=group_label(group),
        layers=group.layers,
        n_channels=chosen.n_channels,
        n_kept=len(chosen.keep_idxs),
        k=chosen.k,
        knee_k=chosen.knee_k,
        knee_strength=chosen.knee_strength,
        reason=group.reason,
    )


def model_rows(stats: Mapping[str, ModelStats]) -> list[ModelRow]:
    """Measurements of several models, each beside the first.

    Returns:
        One row per model, in the order of ``stats``.

    Example:
        >>> a, b = ModelStats(0.9, 1000, 8000, 0.004, 1), ModelStats(0.85, 250, 2000, 0.003, 1)
        >>> model_rows({"before": a, "after": b})[1].macs_ratio
        0.25
    """
    rows: list[ModelRow] = []
    for name, measured in stats.items():
        base = rows[0].stats if rows else measured
        known = measured.accuracy is not None and base.accuracy is not None
        change = 100 * (measured.accuracy - base.accuracy) if known else None  # type: ignore[operator]
        rows.append(
            ModelRow(
                name,
                measured,
                change,
                _ratio(measured.n_parameters, base.n_parameters),
                _ratio(measured.n_macs, base.n_macs),
                _ratio(measured.latency, base.latency),
            )
        )
    return rows


def _ratio(value: float, base: float) -> float | None:
    return value / base if base else None


def layer_table(plan: PruningPlan) -> Table:
    """What a plan keeps of every group and why, as a table to print with ``rich``."""
    table = new_table("Layers", caption="strength: height of the knee over a straight line, 0 to 1")
    table.add_column("layer", overflow="fold")
    for header in ("kept", "share", "k", "knee at", "strength"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("reason")
    for row in layer_rows(plan):
        table.add_row(Text(row.group), *_counts(row), Text(row.reason))
    return table


def _counts(row: LayerRow) -> list[str]:
    if row.n_channels is None or row.n_kept is None:
        return [_NOTHING] * 5
    return [
        f"{row.n_kept} / {row.n_channels}",
        f"{row.n_kept / row.n_channels:.0%}",
        str(row.k),
        _NOTHING if row.knee_k is None else str(row.knee_k),
        _NOTHING if row.knee_k is None else f"{row.knee_strength:.2f}",
    ]


def model_table(stats: Mapping[str, ModelStats]) -> Table:
    """Measurements of several models as a table to print with ``rich``, each beside the first.

    Under every number stands its ratio to the first model's; under an accuracy, the difference in points.

    Args:
        stats: Measurements by the name of the model.

    Returns:
        The table.
    """
    rows = model_rows(stats)
    batch_sizes = sorted({row.stats.batch_size for row in rows})
    table = new_table(
        "Models",
        caption="second lines: beside the first model; "
        f"latency: median for {' or '.join(map(str, batch_sizes)) or 'no'} samples",
    )
    table.add_column("model")
    for header in ("accuracy", "parameters", "MACs", "latency"):
        table.add_column(header, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(Text(row.name), *_measurements(row, is_base=i == 0))
    return table


def _measurements(row: ModelRow, *, is_base: bool) -> Iterable[Text]:
    values = (
        _NOTHING if row.stats.accuracy is None else f"{row.stats.accuracy:.2%}",
        f"{row.stats.n_parameters:,}",
        quantity(row.stats.n_macs),
        f"{1000 * row.stats.latency:.2f} ms",
    )
    if is_base:
        return [Text(value) for value in values]
    change = _NOTHING if row.accuracy_change is None else f"{row.accuracy_change:+.2f}".replace("-", "−")
    ratios = [row.parameters_ratio, row.macs_ratio, row.latency_ratio]
    beside = [change, *(_NOTHING if ratio is None else f"{ratio:.2f} ×" for ratio in ratios)]
    return [Text(f"{value}\n").append(other, "dim") for value, other in zip(values, beside, strict=True)]


def quantity(n: int) -> str:
    """A count in three digits and a unit: 950, 15.3 k, 1.53 M, 4.09 G."""
    value, units = float(n), ["", " k", " M", " G", " T"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    digits = 0 if value == n else max(0, 2 - len(str(int(value))) + 1)
    return f"{value:.{digits}f}{units[0]}"


def new_table(title: str, caption: str | None = None) -> Table:
    """An empty table in this library's style."""
    return Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
