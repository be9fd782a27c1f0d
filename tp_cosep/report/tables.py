"""What a pruning run did, as numbers and as tables: per layer from group plans, per model from measurements.

The numbers (:func:`layer_rows`, :func:`model_rows`) are kept apart from the strings (:func:`layer_table`,
:func:`model_table`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from tp_cosep.report.benchmark import ModelStats
from tp_cosep.report.labels import NOT_KNOWN, percent, quantity, signed
from tp_cosep.selection.result import GroupPlan

__all__ = [
    "LayerRow",
    "ModelRow",
    "channel_counts",
    "group_label",
    "layer_rows",
    "layer_table",
    "model_rows",
    "model_table",
    "new_table",
    "quantity",
]


@dataclass(frozen=True)
class LayerRow:
    """One visit to a group, in numbers; they are ``None`` for a group that was left alone.

    Attributes:
        group: The group's label, see :func:`group_label`.
        layers: The group's producers.
        n_channels: Channels before.
        n_kept: Channels after.
        k: Number of clusters.
        knee_k: The number of clusters at the knee of the curve; ``None`` if it has none.
        knee_strength: Height of the knee over the straight line, 0 … 1.
        reason: Where the count is from, or why the group was left alone.
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
    """A model compared with the first one.

    Attributes:
        name: The model's name.
        stats: Its measurements.
        accuracy_change: Its accuracy minus the first model's, in percentage points; ``None`` if either is unknown.
        parameters_ratio: Its number of parameters over the first model's; ``None`` if that is 0.
        macs_ratio: Its multiply-accumulates over the first model's; ``None`` if those are 0.
        latency_ratio: Its latency over the first model's; ``None`` if that is 0.
    """

    name: str
    stats: ModelStats
    accuracy_change: float | None
    parameters_ratio: float | None
    macs_ratio: float | None
    latency_ratio: float | None


def group_label(group: GroupPlan) -> str:
    """A group's name in tables and figures: its root layer, marked if the root's input channels are meant."""
    return group.name if group.side == "out" else f"{group.name} (inputs)"


def channel_counts(groups: Iterable[GroupPlan]) -> dict[str, tuple[int, int]]:
    """By label the channels before a group's first visit and after its last; groups left alone are absent."""
    counts: dict[str, tuple[int, int]] = {}
    for group in groups:
        if group.selection is not None:
            label = group_label(group)
            total, _ = counts.get(label, (group.selection.n_channels, 0))
            counts[label] = (total, len(group.selection.keep_idxs))
    return counts


def layer_rows(groups: Iterable[GroupPlan]) -> list[LayerRow]:
    """The numbers of every visit.

    Args:
        groups: The visits, e.g. a :class:`tp_cosep.PruningPlan`.

    Returns:
        One row per visit, in the same order.

    Example:
        >>> group = GroupPlan("head", "out", ("head",), None, "its channels are the model's output")
        >>> layer_rows([group])[0].reason
        "its channels are the model's output"
    """
    return [_layer_row(group) for group in groups]


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
    """Measurements of several models, each compared with the first.

    Args:
        stats: Measurements by the name of the model.

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


def layer_table(groups: Iterable[GroupPlan]) -> Table:
    """The channels kept of every group and the reason, as a table to print with ``rich``.

    Args:
        groups: The visits, e.g. a :class:`tp_cosep.PruningPlan`.

    Returns:
        The table, one row per visit.
    """
    table = new_table("Layers", caption="strength: height of the knee over a straight line, 0 to 1")
    table.add_column("layer", overflow="fold")
    for header in ("kept", "share", "k", "knee at", "strength"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("reason")
    for row in layer_rows(groups):
        table.add_row(Text(row.group), *_counts(row), Text(row.reason))
    return table


def _counts(row: LayerRow) -> list[str]:
    if row.n_channels is None or row.n_kept is None:
        return [NOT_KNOWN] * 5
    return [
        f"{row.n_kept} / {row.n_channels}",
        percent(row.n_kept / row.n_channels, 0),
        str(row.k),
        NOT_KNOWN if row.knee_k is None else str(row.knee_k),
        NOT_KNOWN if row.knee_k is None else f"{row.knee_strength:.2f}",
    ]


def model_table(stats: Mapping[str, ModelStats]) -> Table:
    """Measurements of several models, each compared with the first, as a table to print with ``rich``.

    Below every number is its ratio to the first model's; below an accuracy, the difference in points.

    Args:
        stats: Measurements by the name of the model.

    Returns:
        The table.
    """
    rows = model_rows(stats)
    batch_sizes = sorted({row.stats.batch_size for row in rows})
    table = new_table(
        "Models",
        caption="second lines: relative to the first model; "
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
        NOT_KNOWN if row.stats.accuracy is None else percent(row.stats.accuracy, 2),
        f"{row.stats.n_parameters:,}",
        quantity(row.stats.n_macs),
        f"{1000 * row.stats.latency:.2f} ms",
    )
    if is_base:
        return [Text(value) for value in values]
    change = NOT_KNOWN if row.accuracy_change is None else signed(row.accuracy_change, ".2f")
    ratios = [row.parameters_ratio, row.macs_ratio, row.latency_ratio]
    beside = [change, *(NOT_KNOWN if ratio is None else f"{ratio:.2f} ×" for ratio in ratios)]
    return [Text(f"{value}\n").append(other, "dim") for value, other in zip(values, beside, strict=True)]


def new_table(title: str, caption: str | None = None) -> Table:
    """An empty table in the style of this library."""
    return Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
