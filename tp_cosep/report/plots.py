"""Plots of a selection and of a pruning run.

Every function takes an optional ``ax`` and returns ``(fig, ax)``. Without ``ax`` it makes a figure that is not
registered with pyplot, so nothing has to be closed. matplotlib is imported when a plot is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from tp_cosep.errors import InputError, MissingDependencyError
from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.report.labels import CRITERIA, counted
from tp_cosep.report.tables import channel_counts, group_label
from tp_cosep.selection.embedding import GroupEmbedding, cluster_colours, kept_components, plane
from tp_cosep.selection.result import GroupPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_kept_channels", "plot_mss", "plot_separability_space"]

# Okabe and Ito's colours, which colour-blind readers tell apart; without black (rings) and yellow (pale).
_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
_CLUSTER_COLOURS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _RED)
_INK, _GREY, _PALE = "#222222", "#777777", "#D9D9D9"


def plot_mss(selection: ChannelSelection, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot the Mean Simplified Silhouette over the number of clusters, its knee and the number kept.

    For a selection by elimination the curve is the retained variance over the number of channels, see
    :class:`tp_cosep.ChannelSelection`. Without redundant channels the curve is close to the straight line between its
    ends; the knee's strength is its height over that line, as a share of the curve's range.

    Args:
        selection: The selection.
        ax: The axes to draw on; by default those of a new figure.

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
    criterion = CRITERIA[selection.criterion]
    ax.plot(ks, mss, color=_BLUE, lw=2, marker="o", ms=3 if len(ks) <= 40 else 0, label=criterion.short)
    if selection.knee_k in ks:
        _draw_knee(selection, ax)
    _draw_count(selection, ax)
    ax.set(xlabel=criterion.x_label, ylabel=criterion.name)
    ax.set_title(f"{selection.criterion} of {counted(len(selection.labels), 'channel')}", loc="left")
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
    if n_kept not in selection.ks:  # a single channel, or a count decided by a whole-model ranking
        ax.axvline(n_kept, color=_INK, lw=1.2, ls=":", label=label)
        return
    height = selection.mss[selection.ks.index(n_kept)]
    ax.plot(n_kept, height, color=_INK, ls="", marker="o", ms=12, mfc="none", mew=1.8, zorder=5, label=label)


def plot_separability_space(
    distances: Tensor | GroupEmbedding, selection: ChannelSelection, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Plot the channels of a group by their distances, embedded in two dimensions.

    The embedding is classical multidimensional scaling; the axis labels give the share of the squared distances that it
    shows. Neighbouring clusters differ in colour; distant ones may share one, so a thin line joins each channel to its
    medoid. Channels alone in their cluster are grey, and kept ones have a ring.

    Args:
        distances: ``[components, components]``, see :meth:`tp_cosep.CoSePSelector.distances`; or the ``embedding`` of
            a :class:`tp_cosep.GroupPlan`, which a saved plan contains.
        selection: The selection of the same group.
        ax: The axes to draw on; by default those of a new figure.

    Returns:
        The figure and the axes.

    Raises:
        InputError: If there is not one row per component of the selection.
        MissingDependencyError: If matplotlib is not installed.
    """
    n = len(selection.labels)
    embedding = distances if isinstance(distances, GroupEmbedding) else None
    shape = (n, n) if embedding is None else (n, 2)
    found = distances if isinstance(distances, Tensor) else distances.points
    if found.shape != shape:
        raise InputError(
            f"plot: expected {'distances' if embedding is None else 'positions'} of shape {shape}, one row per "
            f"component of the selection, got {tuple(found.shape)}; take them from the selector before pruning."
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
    ax.set_title(f"{space} of {counted(n, 'channel')}", loc="left")
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
        borderaxespad=4.6,  # in font sizes, so that it is below the axis label for any height of the axes
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


def plot_kept_channels(groups: Iterable[GroupPlan], ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot how many channels of every group are kept, the first group at the top.

    A group that was pruned several times has one bar, with its first total and its last count. A group that was left
    alone has the reason instead of a bar.

    Args:
        groups: The visits, e.g. a :class:`tp_cosep.PruningPlan`.
        ax: The axes to draw on; by default those of a new figure, whose height grows with the number of groups.

    Returns:
        The figure and the axes.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    groups = list(groups)
    counts = channel_counts(groups)
    names = list(dict.fromkeys(map(group_label, groups)))
    fig, ax = _figure_and_axes(ax, (7.0, 1.5 + 0.36 * max(len(names), 2)))
    row_of = {name: row for row, name in enumerate(names)}
    totals, kept = ([pair[i] for pair in counts.values()] for i in (0, 1))
    ax.barh([row_of[name] for name in counts], totals, color=_PALE, height=0.68, label="channels")
    ax.barh([row_of[name] for name in counts], kept, color=_BLUE, height=0.68, label="kept")
    widest = max(totals, default=1)
    for name, (total, n_kept) in counts.items():
        text = f"{n_kept} of {total} ({n_kept / total:.0%})"
        ax.text(total + 0.015 * widest, row_of[name], text, va="center", color=_INK, fontsize=9)
    # Reversed: of several visits to a group, the first gives the reason.
    reasons = {group_label(group): group.reason for group in reversed(groups)}
    for name in reasons.keys() - counts.keys():
        ax.text(0.015 * widest, row_of[name], f"left alone: {reasons[name]}", va="center", color=_GREY, fontsize=9)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, 1.28 * widest)
    ax.set_xlabel("channels")
    ax.set_title(f"channels kept: {sum(kept):,} of {sum(totals):,}", loc="left")
    _tidy(ax)
    ax.tick_params(axis="y", length=0)
    return fig, ax


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
