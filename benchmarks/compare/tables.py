"""``docs/results.md`` from the raw records."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.compare.cells import COMPENSATIONS, Cell, Records
from benchmarks.compare.methods import METHODS, RETIRED, RETIRED_VARIANTS, VARIANTS
from benchmarks.compare.training import checkpoint

__all__ = ["plot_results", "results_page"]

_Row = tuple[Cell, dict[str, Any]]

_KNOWN = (*METHODS, *RETIRED)
_OURS = ("joint", "reconstruction", "class-means")
_COSEP = tuple(m for m in METHODS if "cosep" in m)
_COLUMNS = [(compensation, recalibrated) for compensation in COMPENSATIONS for recalibrated in (False, True)]
_HEADINGS = ["nothing", "BN", "one-shot", "one-shot + BN", "sequential", "sequential + BN"]
_PANELS_IN_A_ROW = 4
_PAPER = (
    ("CIFAR-10", "VGG-16", "93.55 → 93.92", "2.59×"),
    ("CIFAR-10", "ResNet-56", "93.69 → 93.82", "2.15×"),
    ("CIFAR-10", "MobileNet-V2", "94.48 → 94.98", "1.93×"),
    ("CIFAR-100", "DenseNet-40", "74.30 → 73.94", "1.91×"),
)


def _table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    header = [*map(str, header)]
    lines = [header, ["---"] * len(header), *([*map(str, row)] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(values: list[float]) -> str:
    """Mean, and the standard deviation over several seeds."""
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def base_accuracy(network: str, data: str, base: int) -> float:
    """Test accuracy of a trained network, from its checkpoint."""
    with safe_open(checkpoint(network, data, base), "pt") as file:
        return float(file.metadata()["test_accuracy"])


def _by_method(rows: list[_Row], key: Any) -> dict[str, dict[Any, list[float]]]:
    found: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell, record in rows:
        found[cell.method][key(cell)].append(record["accuracy"])
    return found


def _half_table(rows: list[_Row]) -> str:
    """Half of the channels of every layer, no fine-tuning."""
    rows = [r for r in rows if r[0].amount == "half" and r[0].method in _KNOWN and r[0].n_calibration == 1000]
    accuracies = _by_method(rows, lambda c: (c.compensation, c.recalibrated))
    seconds = defaultdict(list)
    for cell, record in rows:
        seconds[cell.method].append(record["seconds"]["measure"])
    best = {m: max(statistics.mean(v) for v in a.values()) for m, a in accuracies.items()}
    order = sorted(accuracies, key=lambda m: -best[m])
    return _table(
        ["selection", *_HEADINGS, "seeds", "seconds to select"],
        (
            [
                f"**{m}**" if m in _OURS + _COSEP else m,
                *(_percent(accuracies[m].get(c, [])) for c in _COLUMNS),
                len({c.seed for c, _ in rows if c.method == m}),
                f"{statistics.median(seconds[m]):.1f}",
            ]
            for m in order
        ),
    )


def _aim(network: str, data: str, rows: list[_Row], compensation: str) -> list[object] | None:
    """Points of accuracy lost by ours and by the best other selection, on the seeds of joint.

    One-shot compensation is followed by BatchNorm re-estimation, sequential compensation is not.

    Returns:
        A row of the table; ``None`` if too few selections were measured.
    """
    rows = [
        r for r in rows if r[0].amount == "half" and r[0].compensation == compensation
        and r[0].recalibrated == (compensation == "one-shot") and r[0].method in _KNOWN and r[0].n_calibration == 1000
    ]  # fmt: skip
    lost: dict[str, dict[int, float]] = defaultdict(dict)
    for cell, record in rows:
        lost[cell.method][cell.seed] = 100 * (base_accuracy(network, data, cell.base) - record["accuracy"])
    seeds = set(lost["joint"])
    if not seeds:
        return None
    means = {m: statistics.mean(v[s] for s in seeds) for m, v in lost.items() if seeds <= set(v)}
    others = {m: v for m, v in means.items() if m not in (*_OURS, *_COSEP, "energy")}
    if len(others) < 2:
        return None
    best = min(others, key=lambda m: others[m])
    return [
        network, data, compensation + (" + BN" if compensation == "one-shot" else ""), len(seeds),
        f"{means['joint']:.1f}",
        f"{means['cosep']:.1f}" if "cosep" in means else "", f"{others[best]:.1f} ({best}, of {len(others)})",
        f"{means['joint'] / others[best]:.2f}",
    ]  # fmt: skip


def _fine_tuned_table(rows: list[_Row]) -> str:
    rows = [r for r in rows if r[0].epochs]
    if not rows:
        return ""
    pruned = [r for r in rows if r[0].method != "unpruned"]
    columns = sorted({(c.amount, c.epochs, c.compensation) for c, _ in pruned})
    found = _by_method(pruned, lambda c: (c.amount, c.epochs, c.compensation))
    # The unpruned network, fine-tuned as long, belongs in the columns of every compensation.
    unpruned = {(c.amount, c.epochs, c.seed): r["accuracy"] for c, r in rows if c.method == "unpruned"}
    for column in columns:
        if accuracies := [a for (*key, _), a in unpruned.items() if tuple(key) == column[:2]]:
            found["unpruned"][column] = accuracies
    order = sorted(found, key=lambda m: -max(statistics.mean(v) for v in found[m].values()))
    return _table(
        [
            "selection",
            *(
                f"{a}, {e:g} {'epoch' if e == 1 else 'epochs'}, {'no compensation' if r == 'none' else r}"
                for a, e, r in columns
            ),
        ],
        ([m, *(_percent(found[m].get(c, [])) for c in columns)] for m in order),
    )


def _equal_macs_table(rows: list[_Row]) -> str:
    rows = [
        r for r in rows if r[0].amount.endswith("x") and not r[0].epochs and r[0].compensation == "one-shot"
        and r[0].method != "unpruned"
    ]  # fmt: skip
    if not rows:
        return ""
    amounts = sorted({c.amount for c, _ in rows}, key=lambda a: float(a.removesuffix("x")))
    found = _by_method(rows, lambda c: (c.amount, c.recalibrated))
    macs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for cell, record in rows:
        macs[cell.method, cell.amount].append(record["macs"])

    def best(m: str) -> float:
        """Mean accuracy at the speed-up that all selections have, with or without re-estimation, the better one."""
        at = "2x" if (m, "2x") in macs else amounts[0]
        return max(statistics.mean(found[m][at, r]) for r in (False, True) if found[m].get((at, r)))

    def entry(m: str, amount: str) -> str:
        values = [_percent(found[m].get((amount, r), [])) for r in (False, True)]
        return f"{' / '.join(values)} ({statistics.mean(macs[m, amount]):.2f}×)" if any(values) else ""

    return _table(
        ["selection", *(a.replace("x", "×") for a in amounts)],
        (
            [f"**{m}**" if m.startswith((*_OURS, "cosep", "unweighted cosep")) else m, *(entry(m, a) for a in amounts)]
            for m in sorted(found, key=lambda m: -best(m))
        ),
    )


def _groups_table(rows: list[_Row]) -> str:
    """Points of accuracy lost if half of a single group is pruned."""
    rows = [
        r
        for r in rows
        if r[0].amount.startswith("half of ") and not r[0].recalibrated and r[0].compensation == "one-shot"
    ]
    if not rows:
        return ""
    groups = list(dict.fromkeys(c.amount.removeprefix("half of ") for c, _ in rows))
    lost = {
        (c.method, c.amount.removeprefix("half of ")): 100 * (base_accuracy(c.network, c.data, c.base) - r["accuracy"])
        for c, r in rows
    }
    methods = list(dict.fromkeys(c.method for c, _ in rows))
    sums = (f"{sum(v for (m, _), v in lost.items() if m == method):.1f}" for method in methods)
    lines = ([g, *(f"{lost[m, g]:.1f}" if (m, g) in lost else "" for m in methods)] for g in groups)
    return _table(["half of", *methods], [*lines, ["sum", *sums]])


def _own_counts_table(rows: list[_Row]) -> str:
    rows = [r for r in rows if r[0].amount == "knee" and r[0].recalibrated and not r[0].epochs]
    if not rows:
        return ""
    return _table(
        ["selection", "MACs", "parameters", "one-shot + BN"],
        (
            [c.method, f"{r['macs']:.2f}×", f"{r['params']:.2f}×", _percent([r["accuracy"]])]
            for c, r in sorted(rows, key=lambda row: -row[1]["accuracy"])
        ),
    )


def _variants_table(rows: list[_Row]) -> str:
    shown = [*VARIANTS, *RETIRED_VARIANTS, "cosep", "joint", "class-means", "correlation"]
    rows = [
        r for r in rows if r[0].amount == "half" and r[0].compensation == "one-shot" and r[0].method in shown
        and r[0].n_calibration == 1000 and r[0].seed == 0
    ]  # fmt: skip
    if not any(c.method in (*VARIANTS, *RETIRED_VARIANTS) for c, _ in rows):
        return ""
    found = _by_method(rows, lambda c: c.recalibrated)
    return _table(
        ["variant", "one-shot", "one-shot + BN"],
        ([m, *(_percent(found[m].get(c, [])) for c in (False, True))] for m in sorted(found)),
    )


def _calibration_table(rows: list[_Row]) -> str:
    rows = [r for r in rows if r[0].amount == "half" and r[0].compensation == "one-shot" and r[0].seed == 0]
    numbers = sorted({c.n_calibration for c, _ in rows})
    if len(numbers) < 2:
        return ""
    found = _by_method([r for r in rows if r[0].recalibrated], lambda c: c.n_calibration)
    return _table(
        ["selection, one-shot + BN", *(f"{n} images" for n in numbers)],
        ([m, *(_percent(found[m].get(n, [])) for n in numbers)] for m in found if len(found[m]) > 1),
    )


def _latency_table(path: Path) -> str:
    if not path.is_file():
        return ""
    rows = []
    for line in path.read_text().splitlines():
        r = json.loads(line)
        before, after = r["milliseconds"]
        share = (1 - after / before) / (1 - 1 / r["macs"])
        rows.append(
            [
                r["network"], r["round_to"] or "no", r["batch"], f"{r['macs']:.2f}×", f"{before:.2f}", f"{after:.2f}",
                f"{before / after:.2f}×", f"{share:.0%}",
            ]
        )  # fmt: skip
    header = ["network", "round_to", "batch", "MACs", "ms before", "ms after", "faster", "of the saving in MACs"]
    return _table(header, rows)


def _records(folder: Path) -> dict[tuple[str, str], list[_Row]]:
    found: dict[tuple[str, str], list[_Row]] = {}
    for path in sorted(folder.glob("*-*.jsonl")):
        rows = [*Records(path)]
        if rows:
            found[rows[0][0].network, rows[0][0].data] = rows
    return found


def results_page(folder: Path, introduction: str) -> str:
    """The page as Markdown.

    Args:
        folder: Folder of the records.
        introduction: The first part of the page.

    Returns:
        Markdown.
    """
    records = _records(folder)
    trained = sorted({(c.network, c.data, c.base) for rows in records.values() for c, _ in rows})
    parts = [introduction.strip(), "## The trained networks"]
    parts.append(
        _table(
            ["network", "data", "seed", "test accuracy"],
            ([n, d, s, f"{base_accuracy(n, d, s):.2%}"] for n, d, s in trained),
        )
    )
    parts.append("## Half of the channels of every layer, no fine-tuning")
    parts.append("![accuracy by selection](results.png)")
    for (network, data), rows in records.items():
        parts += [f"### {network}, {data}", _half_table(rows)]
    parts.append("### Lost accuracy, against the best other selection")
    parts.append(
        "Points of accuracy, mean over the seeds of joint; other selections count if they were measured with all of "
        "these. The aim is 0.5 or less in the last column."
    )
    header = [
        "network",
        "data",
        "compensation",
        "seeds",
        "joint loses",
        "cosep loses",
        "best other selection loses",
        "joint / best other",
    ]
    aims = (
        _aim(*key, rows, compensation) for key, rows in records.items() for compensation in ("one-shot", "sequential")
    )
    parts.append(_table(header, filter(None, aims)))
    for heading, text, table_of in _SECTIONS:
        tables = [(key, table_of(rows)) for key, rows in records.items()]
        if any(table for _, table in tables):
            parts += [heading, *([text] if text else [])]
            parts += [f"### {n}, {d}\n\n{table}" for (n, d), table in tables if table]
    latency = _latency_table(folder / "latency.jsonl")
    if latency:
        parts += ["## Latency", latency]
    parts += ["## The papers' own numbers", _PAPERS_SAY, _table(["data", "model", "top-1", "FLOPs"], _PAPER)]
    return "\n\n".join(parts) + "\n"


_SECTIONS = (
    (
        "## At equal MACs, no fine-tuning",
        "One-shot compensation without / with BatchNorm re-estimation; in brackets MACs before over after. One ratio "
        "for all layers, except for *global* (ranked over layers, at most nine tenths of a layer pruned), *allocated* "
        '(counts allocated by `target={"macs": …}`) and *counts of joint* (the counts allocated for joint, filled by '
        "another selection).",
        _equal_macs_table,
    ),
    (
        "## Which layers",
        "Points of accuracy lost if half of a single group is pruned and nothing else; one-shot compensation without "
        "BatchNorm re-estimation, which costs more than it gains where so little is pruned.",
        _groups_table,
    ),
    (
        "## The selections' own counts",
        "Counts at the knee; one-shot compensation and BatchNorm re-estimation.",
        _own_counts_table,
    ),
    (
        "## After fine-tuning",
        "*Layer by layer*: the papers' schedule, group by group with statistics collected again and fine-tuning in "
        "between, as long in total.",
        _fine_tuned_table,
    ),
    ("## One option at a time", "", _variants_table),
    ("## How much data", "", _calibration_table),
)

_PAPERS_SAY = (
    "From arXiv 2505.13225, top-1 before and after. They are not comparable with the tables above: the papers train "
    "full-size networks fully, prune layer by layer, and fine-tune two epochs after every layer; here, networks are "
    "smaller, trained for a few epochs, and pruned at once."
)


def plot_results(folder: Path, target: Path) -> None:
    """Draw accuracy by selection with one-shot compensation and recalibration, a panel for every network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = _records(folder)
    n_columns = min(len(records), _PANELS_IN_A_ROW)
    n_rows = -(-len(records) // n_columns)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=(3.6 * n_columns, 4.6 * n_rows), squeeze=False)
    for ax in axes.flat[len(records) :]:
        ax.remove()
    for ax, ((network, data), rows) in zip(axes.flat, records.items(), strict=False):
        chosen = [
            r for r in rows if r[0].amount == "half" and r[0].compensation == "one-shot" and r[0].recalibrated
            and r[0].method in _KNOWN and r[0].n_calibration == 1000
        ]  # fmt: skip
        found = {m: v[None] for m, v in _by_method(chosen, lambda c: None).items()}
        order = sorted(found, key=lambda m: statistics.mean(found[m]))
        colours = ["#0072b2" if m in _OURS else "#e69f00" if m in _COSEP else "#999999" for m in order]
        means = [100 * statistics.mean(found[m]) for m in order]
        ax.barh(order, means, color=colours)
        for y, m in enumerate(order):
            ax.plot([100 * a for a in found[m]], [y] * len(found[m]), "k.", markersize=3)
        base = 100 * base_accuracy(network, data, 0)
        ax.axvline(base, color="k", linewidth=0.8, linestyle=":")
        ax.set_xlim(0, base + 3)
        ax.set_title(f"{network}, {data}", fontsize=10)
        ax.tick_params(labelsize=8)
        ax.set_xlabel("test accuracy, %  (dotted: unpruned)", fontsize=8)
    fig.suptitle(
        "Half of every layer, one-shot compensation + BN: reconstruction (blue), CoSeP (orange), others (grey)",
        fontsize=10,
    )
    fig.tight_layout()
    fig.savefig(target, dpi=110, bbox_inches="tight")
    plt.close(fig)
