"""The figures of the page about a plan, as small SVG that takes its colours from the page.

They show what :mod:`tp_cosep.report.plots` draws with matplotlib. Coordinates are whole numbers in a view of 720 units, which
is twice what they take on a screen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from xml.etree.ElementTree import Element

from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.report.markup import element
from tp_cosep.selection.embedding import GroupEmbedding, cluster_colours, kept_components

__all__ = ["CRITERIA", "curve", "placed", "space"]

_WIDTH, _HEIGHT = 720, 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 104, 18, 18, 88
_MARGIN = 40
_MOST_POINTS = 160

#: By criterion: name, unit of k, label of the y axis.
CRITERIA = {
    "silhouette": ("Mean Simplified Silhouette (MSS)", "number of clusters k", "MSS"),
    "retained variance": ("Share of what the readers see", "number of channels kept k", "coverage"),
}


def curve(selection: ChannelSelection, name: str) -> Element:
    """A selection's curve over k, its straight line, its knee and the number kept.

    Args:
        selection: The selection.
        name: Of the group.

    Returns:
        An ``svg`` element with a text alternative.
    """
    ks, mss = selection.ks, selection.mss
    what, x_label, y_label = CRITERIA[selection.criterion]
    n_kept = len(kept_components(selection))
    low, high = min(0.0, *mss), max(1.0, *mss)
    first, last = min(ks[0], n_kept), max(ks[-1], n_kept)
    x = _scale(first, last, _LEFT, _WIDTH - _RIGHT)
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    marks = [
        *_axes(x, y, _ticks(first, last, whole=True), _ticks(low, high), x_label, y_label),
        element("path", class_="straight", d=f"M{x(ks[0])} {y(mss[0])}L{x(ks[-1])} {y(mss[-1])}"),
        element("path", class_="curve", d="M" + "L".join(f"{x(ks[i])} {y(mss[i])}" for i in _some(selection))),
    ]
    knee = selection.knee_k
    if knee in ks:
        top = mss[ks.index(knee)]
        foot = mss[0] + (mss[-1] - mss[0]) * (knee - ks[0]) / max(ks[-1] - ks[0], 1)
        marks.append(element("path", class_="knee", d=f"M{x(knee)} {y(foot)}V{y(top)}"))
        marks.append(element("circle", class_="knee", cx=x(knee), cy=y(top), r=9))
    if n_kept in ks:
        marks.append(element("circle", class_="count", cx=x(n_kept), cy=y(mss[ks.index(n_kept)]), r=16))
    else:
        marks.append(element("path", class_="count dotted", d=f"M{x(n_kept)} {_TOP}V{_HEIGHT - _BOTTOM}"))
    fixed = f"{name}, {y_label} over k. {what} is {mss[0]:.3f} at k = {ks[0]} and {mss[-1]:.3f} at k = {ks[-1]}. "
    fixed += (
        "It has no knee. " if knee is None else f"Its knee is at k = {knee}, strength {selection.knee_strength:.2f}. "
    )
    fixed += f"{n_kept} of {len(selection.labels)} are kept."
    return _svg(_HEIGHT, fixed, marks)


def space(selection: ChannelSelection, embedding: GroupEmbedding, name: str, unit: str = "channel") -> Element:
    """A group's components in the plane: clusters by colour and by lines to their medoids, kept ones with a ring.

    Args:
        selection: The selection.
        embedding: Of the same group.
        name: Of the group.
        unit: What was chosen among.

    Returns:
        An ``svg`` element with a text alternative.
    """
    at = placed(embedding)
    colours = cluster_colours(embedding.points, selection)
    kept = kept_components(selection, embedding)
    n, n_clusters = len(at), len(selection.medoids)
    size = 2 * round(min(11, max(4, 90 / math.sqrt(n))))
    of_colour: dict[int, list[int]] = {}
    for i, label in enumerate(selection.labels):
        of_colour.setdefault(colours[label], []).append(i)
    marks = [element("rect", class_="frame", x=1, y=1, width=_WIDTH - 2, height=_WIDTH - 2, rx=12)]
    for colour, members in of_colour.items():
        ends = ((at[selection.medoids[selection.labels[i]]], at[i]) for i in members)
        lines = "".join(f"M{a[0]} {a[1]}L{b[0]} {b[1]}" for a, b in ends if a != b)
        if lines:
            marks.append(element("path", class_=f"link {_class(colour)}", d=lines))
    is_kept = set(kept)
    for colour, members in of_colour.items():
        pruned = [at[i] for i in members if i not in is_kept]
        if pruned:
            marks.append(element("path", class_=f"dot {_class(colour)}", d=_dots(pruned), stroke_width=0.8 * size))
    marks.append(element("path", class_="dot ring", d=_dots(at[i] for i in kept), stroke_width=size + 11))
    for colour, members in of_colour.items():
        stay = [at[i] for i in members if i in is_kept]
        if stay:
            marks.append(element("path", class_="dot gap", d=_dots(stay), stroke_width=size + 5))
            marks.append(element("path", class_=f"dot {_class(colour)}", d=_dots(stay), stroke_width=size))
    fixed = f"{name}, {unit}s in the plane. {_fixed_ratios(selection, embedding, len(kept), n_clusters, unit)}"
    return _svg(_WIDTH, fixed, marks, class_="plane")


def placed(embedding: GroupEmbedding) -> list[tuple[int, int]]:
    """Where the components are drawn, both axes on the same scale."""
    xs, ys = zip(*embedding.positions, strict=True)
    factor = (_WIDTH - 2 * _MARGIN) / (max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0)
    x_middle, y_middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    half = _WIDTH / 2
    return [
        (round(half + (x - x_middle) * factor), round(half - (y - y_middle) * factor)) for x, y in embedding.positions
    ]


def _fixed_ratios(
    selection: ChannelSelection, embedding: GroupEmbedding, n_kept: int, n_clusters: int, unit: str
) -> str:
    sizes = Counter(selection.labels)
    ((largest, most),) = sizes.most_common(1)
    n_joint = sum(size > 1 for size in sizes.values())
    fixed = (
        f"{n_kept} of {len(selection.labels)} {unit}s kept, in {n_clusters} clusters, {n_joint} of them with more than "
        f"one {unit}. The axes show {embedding.shares[0]:.1%} and {embedding.shares[1]:.1%} of the squared distances."
    )
    if most > 1:
        fixed += f" The largest cluster, of {most}, is that of {unit} {selection.medoids[largest]}."
    return fixed


def _svg(height: int, fixed: str, marks: Iterable[Element], **attributes: str) -> Element:
    return element("svg", *marks, viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label=fixed, **attributes)


def _class(colour: int) -> str:
    return "alone" if colour < 0 else f"c{colour}"


def _dots(at: Iterable[tuple[int, int]]) -> str:
    """Lines of no length, which round caps make dots: a few characters for each."""
    return "".join(f"M{x} {y}h0" for x, y in at)


def _scale(low: float, high: float, start: int, stop: int) -> Callable[[float], int]:
    factor = (stop - start) / (high - low) if high > low else 0.0
    return lambda value: round(start + (value - low) * factor)


def _some(selection: ChannelSelection) -> Sequence[int]:
    """Which points of a long curve are drawn: evenly spaced ones, and the knee."""
    n = len(selection.ks)
    if n <= _MOST_POINTS:
        return range(n)
    chosen = {round(i * (n - 1) / (_MOST_POINTS - 1)) for i in range(_MOST_POINTS)}
    return sorted(chosen | {i for i, k in enumerate(selection.ks) if k == selection.knee_k})


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Some round numbers within a range."""
    raw = max((high - low) / 4, 1e-9)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= 0.999 * raw)
    if whole:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def _axes(
    x: Callable[[float], int],
    y: Callable[[float], int],
    xs: Sequence[float],
    ys: Sequence[float],
    x_label: str,
    y_label: str,
) -> list[Element]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    grid = "".join(f"M{_LEFT} {y(value)}H{right}" for value in ys)
    texts = [element("text", f"{value:g}", x=x(value), y=bottom + 32, text_anchor="middle") for value in xs]
    texts += [element("text", f"{value:g}", x=_LEFT - 12, y=y(value) + 8, text_anchor="end") for value in ys]
    middle = (_LEFT + right) // 2
    return [
        element("path", class_="grid", d=grid),
        *texts,
        element("text", x_label, x=middle, y=_HEIGHT - 14, text_anchor="middle"),
        element("text", y_label, transform=f"translate(24 {bottom // 2}) rotate(-90)", text_anchor="middle"),
    ]
