"""Pictures of a selection and of a plan.

Every function takes an optional ``ax`` and returns ``(figure, ax)``. Without ``ax`` it makes a figure that
pyplot does not know of, so nothing has to be closed. matplotlib is imported when a plot is made.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import Tensor

from tp_cosep.errors import InputError, MissingDependencyError
from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.report.tables import group_label
from tp_cosep.selection.embedding import GroupEmbedding, cluster_colours, kept_components, plane

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_kept_channels", "plot_mss", "plot_separability_space"]

# Okabe and Ito's colours, which colour-blind readers tell apart; without black (rings) and yellow (pale).
_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
_CLUSTER_COLOURS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _RED)
_INK, _GREY, _PALE = "#222222", "#777777", "#D9D9D9"


_CRITERIA = {
    "silhouette": ("MSS", "number of clusters k", "Mean Simplified Silhouette (MSS)", "silhouette of"),
    "retained variance": ("coverage", "number of channels kept k", "share of what readers see", "coverage by"),
}


def plot_mss(selection: ChannelSelection, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw the Mean Simplified Silhouette over the number of clusters, its knee and the number kept.

    For a column subset it is the coverage over the number of channels, see
    :class:`tp_cosep.functional.selection.ChannelSelection`. The straight line between the ends is what channels without any
    redundancy come close to; the knee's strength is its height over that line, as a share of the curve's range.

    Args:
        selection: The selection.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and the axes.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    fig, ax = _figure_and_axes(ax, (6.4, 4.2))
    from matplotlib.ticker import MaxNLocator

    ks, mss = selection.ks, selection.mss
    if len(ks) > 1:
        ax.plot([ks[0], ks[-1]], [mss[0], mss[-1]], color=_GREY, lw=1, ls="--", label="straight line")
    name, x_label, y_label, title = _CRITERIA[selection.criterion]
    ax.plot(ks, mss, color=_BLUE, lw=2, marker="o", ms=3 if len(ks) <= 40 else 0, label=name)
    if selection.knee_k in ks:
        _draw_knee(selection, ax)
    _draw_count(selection, ax)
    ax.set(xlabel=x_label, ylabel=y_label)
    ax.set_title(f"{title} {_channels(len(selection.labels))}", loc="left")
    ax.set_ylim(bottom=min(0.0, *ax.get_ylim()))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="lower right", frameon=False, fontsize=9)
    _tidy(ax)
    return fig, ax


def _draw_knee(selection: ChannelSelection, ax: Axes) -> None:
    ks, mss, knee = selection.ks, selection.mss, selection.knee_k
    assert knee is not None
    top = mss[ks.index(knee)]
    foot = top
    if ks[-1] > ks[0]:
        foot = mss[0] + (mss[-1] - mss[0]) * (knee - ks[0]) / (ks[-1] - ks[0])
    ax.plot(
        [knee, knee],
        [foot, top],
        color=_RED,
        lw=1.5,
        marker="o",
        ms=7,
        markevery=[1],
        zorder=4,
        label=f"knee at k = {knee}, strength {selection.knee_strength:.2f}",
    )


def _draw_count(selection: ChannelSelection, ax: Axes) -> None:
    n_kept, n = len(kept_components(selection)), len(selection.labels)
    label = f"kept: {n_kept} of {n}"
    if n_kept not in selection.ks:  # one channel, or a count that a whole-model ranking decided
        ax.axvline(n_kept, color=_INK, lw=1.2, ls=":", label=label)
        return
    height = selection.mss[selection.ks.index(n_kept)]
    ax.plot(n_kept, height, color=_INK, ls="", marker="o", ms=12, mfc="none", mew=1.8, zorder=5, label=label)


def plot_separability_space(
    distances: Tensor | GroupEmbedding, selection: ChannelSelection, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Draw the channels of a group in the space that compares them, as far as two dimensions can show it.

    The plane is that of classical multidimensional scaling; the axes say what share of the squared distances
    it shows. Colours tell neighbouring clusters apart; they come back for clusters further away, so a thin
    line joins each channel to its medoid. Channels alone in their cluster are grey, and kept ones have a ring.

    Args:
        distances: ``[components, components]``, see :meth:`tp_cosep.CoSePSelector.distances`; or the ``embedding`` of
            a :class:`tp_cosep.GroupPlan`, which is at hand when the plan was loaded from a file.
        selection: What was selected of the same group.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and the axes.

    Raises:
        InputError: If the distances are not those of the selection's components.
        MissingDependencyError: If matplotlib is not installed.
    """
    n = len(selection.labels)
    embedding = distances if isinstance(distances, GroupEmbedding) else None
    shape = (n, n) if embedding is None else (n, 2)
    found = distances if isinstance(distances, Tensor) else distances.points
    if found.shape != shape:
        raise InputError(
            f"plot: expected {'distances' if embedding is None else 'positions'} of shape {shape}, one row per component "
            f"of the selection, got {tuple(found.shape)}; take them from the selector before pruning."
        )
    fig, ax = _figure_and_axes(ax, (7.0, 6.2))
    points, shares = plane(found) if embedding is None else (found, embedding.shares)
    size = min(max(2600 / n, 14), 90)
    _draw_clusters(points, selection, size, ax)
    kept = kept_components(selection, embedding)
    x, y = points[kept].T.tolist()
    ax.scatter(x, y, s=1.9 * size, facecolors="none", edgecolors=_INK, linewidths=1.1, zorder=4)
    ax.set_xlabel(f"dimension 1: {shares[0]:.0%} of the squared distances")
    ax.set_ylabel(f"dimension 2: {shares[1]:.0%} of the squared distances")
    space = "separability space" if selection.criterion == "silhouette" else "1 − |correlation|"
    ax.set_title(f"{space} of {_channels(n)}", loc="left")
    ax.set_aspect("equal", adjustable="datalim")
    ax.margins(0.07)
    _explain_space(selection, len(kept), ax)
    _tidy(ax)
    return fig, ax


def _explain_space(selection: ChannelSelection, n_kept: int, ax: Axes) -> None:
    from matplotlib.lines import Line2D

    n, is_subset = len(selection.labels), selection.criterion == "retained variance"
    sizes = Counter(selection.labels).values()
    handles = [Line2D([], [], ls="", marker="o", ms=10, mfc="none", mec=_INK, mew=1.1, label=f"kept: {n_kept} of {n}")]
    if 1 in sizes:
        handles.append(Line2D([], [], ls="", marker="o", ms=7, color=_GREY, label="alone in its cluster"))
    if max(sizes) > 1:
        handles.append(
            Line2D(
                [],
                [],
                lw=0.9,
                marker="o",
                ms=7,
                color=_BLUE,
                label="with others, line to the one kept" if is_subset else "with others, line to the medoid",
            )
        )
    figure = ax.get_figure()
    assert figure is not None
    width = ax.get_window_extent().width / figure.dpi
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=4.6,  # in font sizes: below the axis label, whatever the height of the axes
        ncols=len(handles) if width > 5 else 1,
        frameon=False,
        fontsize=9,
    )


def _draw_clusters(points: Tensor, selection: ChannelSelection, size: float, ax: Axes) -> None:
    colours = [_CLUSTER_COLOURS[c] if c >= 0 else _GREY for c in cluster_colours(points, selection)]
    for j, (medoid, colour) in enumerate(zip(selection.medoids, colours, strict=True)):
        members = [i for i, label in enumerate(selection.labels) if label == j]
        for i in members:
            if i != medoid:
                x, y = points[[medoid, i]].T.tolist()
                ax.plot(x, y, color=colour, lw=0.9, alpha=0.6, zorder=2)
        x, y = points[members].T.tolist()
        ax.scatter(x, y, s=size, color=colour, linewidths=0, zorder=3)


def plot_kept_channels(plan: PruningPlan, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw how many channels of every group a plan keeps, in the plan's order from the top.

    A group that was pruned several times is drawn once, with its first total and its last count. One that
    was left alone has no bar, but the reason.

    Args:
        plan: The plan.
        ax: Where to draw; a new figure by default, as high as the plan is long.

    Returns:
        The figure and the axes.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    totals, kept, reasons = _final_counts(plan)
    names = list(dict.fromkeys(group_label(group) for group in plan))
    fig, ax = _figure_and_axes(ax, (7.0, 1.5 + 0.36 * max(len(names), 2)))
    rows = [names.index(name) for name in totals]
    ax.barh(rows, list(totals.values()), color=_PALE, height=0.68, label="channels")
    ax.barh(rows, list(kept.values()), color=_BLUE, height=0.68, label="kept")
    widest = max(totals.values(), default=1)
    for name, total in totals.items():
        text = f"{kept[name]} of {total} ({kept[name] / total:.0%})"
        ax.text(total + 0.015 * widest, names.index(name), text, va="center", color=_INK, fontsize=9)
    for name, reason in reasons.items():
        if name not in totals:
            ax.text(0.015 * widest, names.index(name), f"left alone: {reason}", va="center", color=_GREY, fontsize=9)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, 1.28 * widest)
    ax.set_xlabel("channels")
    ax.set_title(f"channels kept: {sum(kept.values()):,} of {sum(totals.values()):,}", loc="left")
    _tidy(ax)
    ax.tick_params(axis="y", length=0)
    return fig, ax


def _final_counts(plan: PruningPlan) -> tuple[dict[str, int], dict[str, int], dict[str, str]]:
    """By label: channels before the first visit, channels after the last, why a group was left alone."""
    totals: dict[str, int] = {}
    kept: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for group in plan:
        name = group_label(group)
        if group.selection is None:
            reasons.setdefault(name, group.reason)
            continue
        totals.setdefault(name, group.selection.n_channels)
        kept[name] = len(group.selection.keep_idxs)
    return totals, kept, reasons


def _channels(n: int) -> str:
    return "1 channel" if n == 1 else f"{n} channels"


def _figure_and_axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise MissingDependencyError("plots: matplotlib is not installed; pip install 'tp_cosep[plots]'.") from error
    if ax is None:
        fig = Figure(figsize=size, layout="constrained")
        return fig, fig.subplots()
    parent = ax.figure
    return (parent if isinstance(parent, Figure) else parent.figure), ax


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=_INK)
