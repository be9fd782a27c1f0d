"""The figures of the page as small SVG, which takes its colours from the page's style sheet.

They show what :mod:`tp_cosep.report.plots` draws with matplotlib. Coordinates are whole numbers in a view 720 units
wide, about twice the number of pixels on a screen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup, escape

from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.report.labels import CRITERIA
from tp_cosep.selection.embedding import GroupEmbedding, cluster_colours, kept_components

__all__ = ["Plane", "curve", "space"]

_WIDTH, _HEIGHT = 720, 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 104, 18, 18, 88
_MARGIN = 40
_MAX_POINTS = 160


def curve(selection: ChannelSelection, name: str) -> Markup:
    """A selection's curve over k, its straight line, its knee and the number kept.

    Args:
        selection: The selection.
        name: The group's label.

    Returns:
        An ``svg`` element with a text alternative.
    """
    ks, mss, knee = selection.ks, selection.mss, selection.knee_k
    criterion = CRITERIA[selection.criterion]
    n_kept = len(kept_components(selection))
    low, high = min(0.0, *mss), max(1.0, *mss)
    first, last = min(ks[0], n_kept), max(ks[-1], n_kept)
    x = _scale(first, last, _LEFT, _WIDTH - _RIGHT)
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    marks = [
        *_axes(x, y, _ticks(first, last, whole=True), _ticks(low, high), (criterion.x_label, criterion.short)),
        _path("straight", f"M{x(ks[0])} {y(mss[0])}L{x(ks[-1])} {y(mss[-1])}"),
        _path("curve", "M" + "L".join(f"{x(ks[i])} {y(mss[i])}" for i in _drawn_points(selection))),
    ]
    if knee in ks:
        top = mss[ks.index(knee)]
        foot = mss[0] + (mss[-1] - mss[0]) * (knee - ks[0]) / max(ks[-1] - ks[0], 1)
        marks.append(_path("knee", f"M{x(knee)} {y(foot)}V{y(top)}"))
        marks.append(_element("circle", class_="knee", cx=x(knee), cy=y(top), r=9))
    if n_kept in ks:
        marks.append(_element("circle", class_="count", cx=x(n_kept), cy=y(mss[ks.index(n_kept)]), r=16))
    else:
        marks.append(_path("count dotted", f"M{x(n_kept)} {_TOP}V{_HEIGHT - _BOTTOM}"))
    knee_text = "It has no knee"
    if knee is not None:
        knee_text = f"Its knee is at k = {knee}, strength {selection.knee_strength:.2f}"
    description = (
        f"{name}, {criterion.short} over k. {criterion.name} is {mss[0]:.3f} at k = {ks[0]} and {mss[-1]:.3f} at "
        f"k = {ks[-1]}. {knee_text}. {n_kept} of {len(selection.labels)} are kept."
    )
    return _svg(_HEIGHT, description, marks)


@dataclass(frozen=True)
class Plane:
    """A group's components as :func:`space` draws them.

    Attributes:
        selection: The selection.
        embedding: The embedding of the same group.
    """

    selection: ChannelSelection
    embedding: GroupEmbedding

    @cached_property
    def positions(self) -> list[tuple[int, int]]:
        """Coordinates in the view, both axes on the same scale."""
        xs, ys = zip(*self.embedding.positions, strict=True)
        factor = (_WIDTH - 2 * _MARGIN) / (max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0)
        x_middle, y_middle, half = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2, _WIDTH / 2
        return [
            (round(half + (x - x_middle) * factor), round(half - (y - y_middle) * factor))
            for x, y in self.embedding.positions
        ]

    @cached_property
    def colours(self) -> list[int]:
        """The colour of every cluster, see :func:`tp_cosep.selection.embedding.cluster_colours`."""
        return cluster_colours(self.embedding.points, self.selection)

    @cached_property
    def kept(self) -> list[int]:
        """The components kept."""
        return kept_components(self.selection, self.embedding)


def space(plane: Plane, name: str, unit: str = "channel") -> Markup:
    """A group's components in the plane: clusters by colour and by lines to their medoids, kept ones with a ring.

    Args:
        plane: The components.
        name: The group's label.
        unit: What a component is.

    Returns:
        An ``svg`` element with a text alternative.
    """
    selection, at, colours, kept = plane.selection, plane.positions, plane.colours, plane.kept
    is_kept = set(kept)
    size = 2 * round(min(11, max(4, 90 / math.sqrt(len(at)))))
    members_of: dict[str, list[int]] = {}
    for i, label in enumerate(selection.labels):
        members_of.setdefault("alone" if colours[label] < 0 else f"c{colours[label]}", []).append(i)
    marks = [_element("rect", class_="frame", x=1, y=1, width=_WIDTH - 2, height=_WIDTH - 2, rx=12)]
    for colour, members in members_of.items():
        ends = ((at[selection.medoids[selection.labels[i]]], at[i]) for i in members)
        if lines := "".join(f"M{a[0]} {a[1]}L{b[0]} {b[1]}" for a, b in ends if a != b):
            marks.append(_path(f"link {colour}", lines))
    for colour, members in members_of.items():
        if dots := _dots(at[i] for i in members if i not in is_kept):
            marks.append(_path(f"dot {colour}", dots, stroke_width=0.8 * size))
    marks.append(_path("dot ring", _dots(at[i] for i in kept), stroke_width=size + 11))
    for colour, members in members_of.items():
        if dots := _dots(at[i] for i in members if i in is_kept):
            marks.append(_path("dot gap", dots, stroke_width=size + 5))
            marks.append(_path(f"dot {colour}", dots, stroke_width=size))
    description = f"{name}, {unit}s in the plane. {_counts_in_words(plane, unit)}"
    return _svg(_WIDTH, description, marks, class_="plane")


def _counts_in_words(plane: Plane, unit: str) -> str:
    selection, shares = plane.selection, plane.embedding.shares
    sizes = Counter(selection.labels)
    ((largest, n_largest),) = sizes.most_common(1)
    n_joint = sum(size > 1 for size in sizes.values())
    text = (
        f"{len(plane.kept)} of {len(selection.labels)} {unit}s kept, in {len(selection.medoids)} clusters, {n_joint} "
        f"of them with more than one {unit}. The axes show {shares[0]:.1%} and {shares[1]:.1%} of the "
        "squared distances."
    )
    if n_largest > 1:
        text += f" The largest cluster, of {n_largest}, is that of {unit} {selection.medoids[largest]}."
    return text


def _element(tag: str, content: str = "", /, **attributes: str | float) -> Markup:
    """An SVG element; values and text are escaped, ``_`` in an attribute's name is a hyphen."""
    pairs = "".join(f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"' for name, value in attributes.items())
    return Markup(f"<{tag}{pairs}>{escape(content)}</{tag}>" if content else f"<{tag}{pairs}/>")


def _path(class_: str, d: str, **attributes: str | float) -> Markup:
    return _element("path", "", class_=class_, d=d, **attributes)


def _svg(height: int, description: str, marks: Iterable[Markup], **attributes: str) -> Markup:
    content = Markup("").join(marks)
    view = f"0 0 {_WIDTH} {height}"
    return _element("svg", content, viewBox=view, role="img", aria_label=description, **attributes)


def _dots(at: Iterable[tuple[int, int]]) -> str:
    """Lines of no length, which round caps turn into dots: a few characters for each."""
    return "".join(f"M{x} {y}h0" for x, y in at)


def _scale(low: float, high: float, start: int, stop: int) -> Callable[[float], int]:
    factor = (stop - start) / (high - low) if high > low else 0.0
    return lambda value: round(start + (value - low) * factor)


def _drawn_points(selection: ChannelSelection) -> Sequence[int]:
    """Which points of a long curve are drawn: evenly spaced ones, and the knee."""
    n = len(selection.ks)
    if n <= _MAX_POINTS:
        return range(n)
    chosen = {round(i * (n - 1) / (_MAX_POINTS - 1)) for i in range(_MAX_POINTS)}
    return sorted(chosen | {i for i, k in enumerate(selection.ks) if k == selection.knee_k})


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """A few round numbers within a range."""
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
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    labels: tuple[str, str],
) -> list[Markup]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    grid = "".join(f"M{_LEFT} {y(value)}H{right}" for value in y_ticks)
    numbers = [_element("text", f"{v:g}", x=x(v), y=bottom + 32, text_anchor="middle") for v in x_ticks]
    numbers += [_element("text", f"{v:g}", x=_LEFT - 12, y=y(v) + 8, text_anchor="end") for v in y_ticks]
    middle = (_LEFT + right) // 2
    return [
        _path("grid", grid),
        *numbers,
        _element("text", labels[0], x=middle, y=_HEIGHT - 14, text_anchor="middle"),
        _element("text", labels[1], transform=f"translate(24 {bottom // 2}) rotate(-90)", text_anchor="middle"),
    ]
