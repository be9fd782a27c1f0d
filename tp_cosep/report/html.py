"""One HTML page about a plan, which needs no network and nothing but a browser: :meth:`tp_cosep.PruningPlan.report`."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from xml.etree.ElementTree import Element

import tp_cosep
from tp_cosep.errors import InputError
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.report.benchmark import ModelStats
from tp_cosep.report.html_layers import Row, breakable, details, json_data, rows_of
from tp_cosep.report.markup import Child, element, html
from tp_cosep.report.tables import group_label, model_rows, quantity
from tp_cosep.selection.embedding import GroupEmbedding
from tp_cosep.utils.files import replacing

__all__ = ["write_page"]

_NOTHING = "–"
_NO_COSTS = "The plan does not say what its layers cost: it was made by an earlier release, or not to its end."


def write_page(
    plan: PruningPlan,
    path: str | os.PathLike[str],
    *,
    stats: Mapping[str, ModelStats] | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    title: str | None = None,
) -> None:
    """Write the page; arguments as for :meth:`tp_cosep.PruningPlan.report`.

    Raises:
        InputError: If the folder does not exist, or an argument is not as it should be.
    """
    text = _page(plan, _checked(stats), _by_label(class_names), "Pruning plan" if title is None else str(title))
    with replacing(path, "report") as temporary:
        # A name that UTF-8 cannot write, half of a surrogate pair, becomes a character reference.
        temporary.write_bytes(text.encode("utf-8", "xmlcharrefreplace"))


def _checked(stats: Mapping[str, ModelStats] | None) -> Mapping[str, ModelStats]:
    if stats is None:
        return {}
    wrong = stats if not isinstance(stats, Mapping) else next((s for s in stats.values() if not _is_stats(s)), None)
    if wrong is not None:
        raise InputError(
            "report: expected stats to be a mapping of names to ModelStats, as measure_models gives, got "
            f"{type(wrong).__name__}."
        )
    return stats


def _is_stats(value: object) -> bool:
    return isinstance(value, ModelStats)


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


def _page(plan: PruningPlan, stats: Mapping[str, ModelStats], names: Mapping[int, str], title: str) -> str:
    rows = list(rows_of(plan))
    style, script = ((files(tp_cosep) / "assets" / name).read_text("utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=f"tp_cosep {tp_cosep.__version__}"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", style),
    )
    main = element(
        "main",
        _summary(plan, rows, stats),
        _models(stats),
        _layers(plan, [row for row in rows if row.chosen]),
        _left_alone(plan, [row for row in rows if not row.chosen]),
        details([row for row in rows if row.chosen]),
    )
    used = {label for row in rows for v, _ in row.chosen if v.embedding for label in _labels_of(v.embedding)}
    body = element(
        "body",
        element("header", element("h1", title), element("p", _lead(plan, rows), class_="lead")),
        main,
        element("footer", element("p", f"Written by tp_cosep {tp_cosep.__version__}.")),
        json_data({str(label): names[label] for label in sorted(used) if label in names}, id="class-names"),
        element("div", id="tip", role="status", hidden=True),
        element("script", script),
    )
    return "<!DOCTYPE html>\n" + html(element("html", head, body, lang="en")) + "\n"


def _labels_of(embedding: GroupEmbedding) -> Iterator[int]:
    for of_cluster in embedding.pairs:
        for pair in of_cluster:
            yield from (pair.first, pair.second)


def _totals(plan: PruningPlan, unit: str) -> tuple[int, int] | None:
    costs = plan.costs.get(unit)
    return (sum(n for n, _ in costs.values()), sum(n for _, n in costs.values())) if costs else None


def _channels(plan: PruningPlan) -> tuple[int, int]:
    """Channels after the last visit to each group, and before the first."""
    kept: dict[str, int] = {}
    total: dict[str, int] = {}
    for group in plan:
        if group.selection is not None:
            total.setdefault(group_label(group), group.selection.n_channels)
            kept[group_label(group)] = len(group.selection.keep_idxs)
    return sum(kept.values()), sum(total.values())


def _lead(plan: PruningPlan, rows: Sequence[Row]) -> str:
    if not rows:
        return "The plan is empty."
    kept, total = _channels(plan)
    if kept == total:
        return "Nothing was pruned."
    fixed = f"{kept:,} of {total:,} channels stay"
    macs = _totals(plan, "macs")
    if macs and macs[0]:
        fixed += f", and {macs[1] / macs[0]:.1%} of the multiply-accumulates"
    return fixed + "."


def _summary(plan: PruningPlan, rows: Sequence[Row], stats: Mapping[str, ModelStats]) -> Element:
    n_chosen, channels = sum(bool(row.chosen) for row in rows), _channels(plan)
    tiles: list[Child] = [_tile("channels", _change(channels[::-1]), f"{channels[1]:,} → {channels[0]:,}")]
    for unit, what in (("macs", "MACs"), ("params", "parameters")):
        totals = _totals(plan, unit)
        if totals is None or not totals[0]:
            tiles.append(_tile(what, _NOTHING, "not known"))
        else:
            tiles.append(_tile(what, _change(totals), f"{quantity(totals[0])} → {quantity(totals[1])}"))
    measured = model_rows(stats)
    if len(measured) > 1 and measured[-1].accuracy_change is not None:
        first, last = measured[0].stats.accuracy or 0.0, measured[-1].stats.accuracy or 0.0
        points = f"{measured[-1].accuracy_change:+.2f}".replace("-", "−")
        tiles.append(_tile("accuracy, in points", points, f"{first:.2%} → {last:.2%}"))
    if len(measured) > 1 and measured[-1].latency_ratio is not None:
        before, after = (1000 * measured[i].stats.latency for i in (0, -1))
        tiles.append(_tile("latency", _change((before, after)), f"{before:.2f} ms → {after:.2f} ms"))
    tiles.append(_tile("groups", str(len(rows)), f"{n_chosen} chosen from, {len(rows) - n_chosen} left alone"))
    asked = ", ".join(f"{name} {_said(value)}" for name, value in plan.options.items() if value not in (None, False))
    return element(
        "section",
        element("h2", "Summary", id="summary"),
        element("dl", *tiles, class_="tiles"),
        element("p", f"Asked for: {asked}." if asked else "Asked for: every layer's own count.", class_="note"),
        element("p", _NO_COSTS, class_="note") if not plan.costs else None,
        aria_labelledby="summary",
    )


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(v)}" for key, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _change(numbers: tuple[float, float]) -> str:
    before, after = numbers
    return f"{after / before - 1:+.1%}".replace("-", "−") if before else _NOTHING


def _tile(what: str, value: str, more: str) -> Element:
    return element("div", element("dt", what), element("dd", element("strong", value), element("span", more)))


def _models(stats: Mapping[str, ModelStats]) -> Element:
    heading = element("h2", "Before and after", id="models")
    if not stats:
        fixed = "Accuracy and latency were not measured; report(…, stats=measure_models(…)) shows them here."
        return element("section", heading, element("p", fixed, class_="note"), aria_labelledby="models")
    body = []
    for i, row in enumerate(model_rows(stats)):
        s, change = row.stats, row.accuracy_change
        ratios = [row.parameters_ratio, row.macs_ratio, row.latency_ratio]
        accuracy = _NOTHING if s.accuracy is None else f"{s.accuracy:.2%}"
        points = None if change is None else f"{change:+.2f} points".replace("-", "−")
        values = [accuracy, f"{s.n_parameters:,}", quantity(s.n_macs), f"{1000 * s.latency:.2f} ms"]
        beside = [points, *(None if ratio is None else f"{ratio:.2f} ×" for ratio in ratios)]
        cells = [_measured(*pair, is_first=i == 0) for pair in zip(values, beside, strict=True)]
        body.append(element("tr", element("th", row.name, scope="row"), *cells))
    sizes = " or ".join(map(str, sorted({s.batch_size for s in stats.values()})))
    columns = {"model": False, "accuracy": True, "parameters": True, "MACs": True, "latency": True}
    note = f"Latency: the median time of a forward pass of {sizes} samples. Small: beside the first model."
    return element("section", heading, *_table("Before and after", columns, body, note), aria_labelledby="models")


def _measured(value: str, beside: str | None, *, is_first: bool) -> Element:
    return element("td", value, element("small", beside) if beside and not is_first else None, class_="number")


def _table(
    label: str,
    columns: Mapping[str, bool],
    body: Iterable[Element],
    note: str,
    *,
    sorts: bool = False,
) -> list[Element]:
    """A note, and a table in a box of its own that scrolls where the screen is narrow.

    Args:
        label: What the table is, for those who do not see it.
        columns: By heading whether it is of numbers.
        body: The rows.
        note: What is to know of it.
        sorts: Whether its headings sort.

    Returns:
        The two elements.
    """
    cells = [
        element(
            "th",
            element("button", heading, type="button") if sorts else heading,
            scope="col",
            class_="number" if is_number else None,
        )
        for heading, is_number in columns.items()
    ]
    table = element(
        "table",
        element("thead", element("tr", *cells)),
        element("tbody", *body),
        class_="sorts" if sorts else None,
        aria_label=label,
    )
    box = element("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)
    return [element("p", note, class_="note"), box]


def _number(value: float | None, text: str | None = None) -> Element:
    if value is None:
        return element("td", _NOTHING, class_="number")
    return element("td", str(value) if text is None else text, class_="number", data_v=f"{value:.6g}")


def _share(share: float | None) -> Element:
    """A share as a number over a bar."""
    if share is None:
        return _number(None)
    cell = _number(share, f"{share:.1%}")
    cell.set("class", "number share")
    cell.set("style", f"--share:{min(max(share, 0.0), 1.0):.1%}")
    return cell


def _layers(plan: PruningPlan, rows: Sequence[Row]) -> Element:
    whole = _totals(plan, "macs")
    body = []
    for row in rows:
        (kept, total), selection = row.counts, row.chosen[-1][1]
        has_knee = selection.knee_k is not None
        shares = [n / whole[0] for n in row.macs] if row.macs and whole and whole[0] else [None, None]
        heads = " heads" if row.unit == "head" else ""
        body.append(
            element(
                "tr",
                element("th", element("a", *breakable(row.label), href=f"#{row.ident}"), scope="row", data_v=row.label),
                _number(kept, f"{kept} / {total}{heads}"),
                _share(kept / total),
                _number(selection.k),
                _number(selection.knee_k),
                _number(selection.knee_strength if has_knee else None, f"{selection.knee_strength:.2f}"),
                *map(_share, shares),
                element("td", row.chosen[-1][0].reason, data_v=row.chosen[-1][0].reason),
            )
        )
    numbers = ("kept", "share", "k", "knee at", "knee strength", "MACs before", "MACs after")
    columns = {"layer": False, **dict.fromkeys(numbers, True), "count by": False}
    note = (
        "In the order in which they run; a heading sorts. Shares of MACs are of the unpruned model. Strength: the "
        "knee’s height over a straight line, 0 to 1."
    )
    nothing = [element("p", "No group was chosen from.", class_="note")]
    content = _table("Layers", columns, body, note, sorts=True) if rows else nothing
    return element("section", element("h2", "Layers", id="layers"), *content, aria_labelledby="layers")


def _left_alone(plan: PruningPlan, rows: Sequence[Row]) -> Element:
    whole = _totals(plan, "macs")
    body = []
    for row in rows:
        share = row.macs[0] / whole[0] if row.macs and whole and whole[0] else None
        reason = row.visits[-1].reason
        name = element("th", *breakable(row.label), scope="row", data_v=row.label)
        body.append(element("tr", name, _share(share), element("td", reason, data_v=reason)))
    columns = {"layer": False, "MACs": True, "why": False}
    note = "They are as they were. Shares of MACs are of the unpruned model."
    nothing = [element("p", "Nothing: every group was chosen from.", class_="note")]
    content = _table("Left alone", columns, body, note, sorts=True) if rows else nothing
    return element("section", element("h2", "Left alone", id="left"), *content, aria_labelledby="left")
