"""What the page about a plan says of every layer: :mod:`tp_cosep.report.html` puts it together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from xml.etree.ElementTree import Element

from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.report.markup import Child, element
from tp_cosep.report.svg import CRITERIA, curve, placed, space
from tp_cosep.report.tables import group_label
from tp_cosep.selection.embedding import GroupEmbedding, cluster_colours, kept_components
from tp_cosep.selection.result import GroupPlan

__all__ = ["Row", "breakable", "details", "json_data", "rows_of"]

_NO_EMBEDDING = "The plan holds no picture of this group: it was made with pictures=False, or by an earlier release."


@dataclass(frozen=True)
class Row:
    """All visits to a group.

    Attributes:
        label: Its name for the reader.
        ident: Unique on the page.
        unit: ``"channel"`` or ``"head"``.
        visits: In the order of the plan.
        macs: Multiply-accumulates of its layers before and after; ``None`` if not known.
    """

    label: str
    ident: str
    unit: str
    visits: tuple[GroupPlan, ...]
    macs: tuple[int, int] | None

    @property
    def chosen(self) -> list[tuple[GroupPlan, ChannelSelection]]:
        """The visits in which something was chosen."""
        return [(visit, visit.selection) for visit in self.visits if visit.selection is not None]

    @property
    def counts(self) -> tuple[int, int]:
        """Channels, or heads, kept after the last visit, and those there were before the first."""
        (last, chosen), (_, first) = self.chosen[-1], self.chosen[0]
        if self.unit == "head":
            return len(kept_components(chosen, last.embedding)), len(first.labels)
        return len(chosen.keep_idxs), first.n_channels


def rows_of(plan: PruningPlan) -> Iterator[Row]:
    """Groups in the order in which their layers run, where the plan knows it."""
    macs = plan.costs.get("macs", {})
    order = {name: i for i, name in enumerate(macs)}
    visits: dict[tuple[str, str], list[GroupPlan]] = {}
    for group in plan:
        visits.setdefault((group_label(group), group.unit), []).append(group)
    found = []
    for i, ((label, unit), entries) in enumerate(visits.items()):
        layers = {name for entry in entries for name in entry.layers}
        known = [macs[name] for name in layers if name in macs]
        cost = (sum(n for n, _ in known), sum(n for _, n in known)) if known else None
        place = min((order[name] for name in layers if name in order), default=len(order))
        found.append((place, i, Row(label, f"layer-{i}", unit, tuple(entries), cost)))
    yield from (row for _, _, row in sorted(found, key=lambda entry: entry[:2]))


def json_data(value: Any, **attributes: str) -> Element:
    """Data for the script; nothing in it can end the element that it is in."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return element("script", text, type="application/json", **attributes)


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def details(rows: Sequence[Row]) -> Element:
    """The section in which every group can be opened."""
    return element(
        "section",
        element("h2", "Layer by layer", id="details"),
        element("noscript", element("p", "What clusters tell apart is shown with JavaScript only.", class_="note")),
        *(_detail(row) for row in rows),
        aria_labelledby="details",
    )


def _detail(row: Row) -> Element:
    kept, total = row.counts
    summary = element(
        "summary",
        element("span", *breakable(row.label), class_="name"),
        element("span", f"{kept} of {_counted(total, row.unit)} kept", class_="badge"),
    )
    parts = []
    for i, visit in enumerate(row.visits):
        heading = element("h3", f"Visit {i + 1} of {len(row.visits)}") if len(row.visits) > 1 else None
        numbers = element("p", "Channels are numbered as they were before this visit.", class_="note") if i else None
        parts.append(element("div", heading, numbers, *_visit(row, visit), class_="visit"))
    return element("details", summary, *parts, id=row.ident, class_="layer")


def _visit(row: Row, visit: GroupPlan) -> list[Child]:
    selection, embedding = visit.selection, visit.embedding
    if selection is None:
        return [element("p", f"Left alone: {visit.reason}.")]
    heads = ", ".join(f"{name} {before} → {after}" for name, (before, after) in visit.heads.items() if before != after)
    n_removed, n, what = len(selection.prune_idxs), len(selection.labels), _component(row, selection)
    facts = [
        ("count by", visit.reason),
        ("chosen among", f"{_counted(n, what)}, channels that only go together" if what == "slot" else ""),
        ("made by", ", ".join(visit.layers)),
        ("heads", heads),
        ("kept channels", _ranges(selection.keep_idxs)),
        (f"{_counted(n_removed, 'pruned channel')}", _ranges(selection.prune_idxs) or "none"),
    ]
    listed = [element("div", element("dt", name), element("dd", value)) for name, value in facts if value]
    figures = [_curve_figure(selection, row.label)]
    clusters = None
    if embedding is not None:
        figures.append(_space_figure(selection, embedding, row.label, what))
        clusters = _clusters(selection, embedding)
    note = _NO_EMBEDDING if embedding is None else _pairs_note(embedding)
    return [
        element("div", *figures, class_="figures"),
        element("p", note, class_="note"),
        element("div", clusters, class_="clusters", data_unit=what) if clusters is not None else None,
        element("dl", *listed, class_="facts"),
    ]


def _component(row: Row, selection: ChannelSelection) -> str:
    """What a component is: a channel, a head, or a slot of several channels."""
    return "slot" if row.unit == "channel" and len(selection.labels) != selection.n_channels else row.unit


def _pairs_note(embedding: GroupEmbedding) -> str:
    if embedding.note:
        return f"Which classes the clusters tell apart is not known: {embedding.note}."
    compared, there = embedding.n_classes
    among = "" if compared == there else f", among {compared} of the {there:,} classes"
    return (
        f"What each cluster tells apart best{among}. Numbers are Jeffries–Matusita distances, from 0 (alike) to 2 "
        "(told apart without fail), the mean over the cluster’s channels."
    )


def _curve_figure(selection: ChannelSelection, name: str) -> Element:
    n_kept, n = len(kept_components(selection)), len(selection.labels)
    knee = "no knee"
    if selection.knee_k is not None:
        knee = f"knee at k = {selection.knee_k}, strength {selection.knee_strength:.2f}"
    keys = [
        _key("curve", CRITERIA[selection.criterion][2]),
        _key("straight", "straight line"),
        _key("knee", knee) if selection.knee_k is not None else element("li", knee),
        _key("count", f"kept: {n_kept} of {n}"),
    ]
    caption = element("figcaption", element("b", CRITERIA[selection.criterion][0]), element("ul", *keys))
    return element("figure", curve(selection, name), caption)


def _space_figure(selection: ChannelSelection, embedding: GroupEmbedding, name: str, unit: str) -> Element:
    what = "Separability space" if selection.criterion == "silhouette" else "Channels by 1 − |correlation|"
    one_kept = "the one kept" if selection.criterion == "retained variance" else "the medoid"
    keys = [
        _key("ring", "kept"),
        _key("dot", "pruned, a line to " + one_kept),
        _key("alone", "alone in its cluster"),
        element("li", f"axes show {embedding.shares[0]:.1%} and {embedding.shares[1]:.1%} of the squared distances"),
    ]
    caption = element("figcaption", element("b", what), element("ul", *keys))
    return element("figure", space(selection, embedding, name, unit), caption)


def _key(kind: str, text: str) -> Element:
    return element("li", element("i", class_=f"key {kind}"), text)


def _clusters(selection: ChannelSelection, embedding: GroupEmbedding) -> Element:
    """What the script makes the table of clusters from, and the tips over the plane."""
    return json_data(
        {
            "labels": selection.labels,
            "medoids": selection.medoids,
            "kept": kept_components(selection, embedding),
            "colours": cluster_colours(embedding.points, selection),
            "xy": [x for position in placed(embedding) for x in position],
            "pairs": [[x for pair in pairs for x in (*pair[:2], round(pair[2], 2))] for pairs in embedding.pairs],
        }
    )


def breakable(name: str) -> Iterator[Child]:
    """A module's name, which may go on in another line behind its dots."""
    first, *others = name.split(".")
    yield first
    for part in others:
        yield "."
        yield element("wbr")
        yield part


def _ranges(idxs: Sequence[int]) -> str:
    """Ascending numbers, runs of three and more as ranges: 0, 3–7, 9."""
    parts: list[str] = []
    for _, run in groupby(enumerate(idxs), lambda pair: pair[1] - pair[0]):
        numbers = [n for _, n in run]
        parts += [f"{numbers[0]}–{numbers[-1]}"] if len(numbers) > 2 else map(str, numbers)
    return ", ".join(parts)
