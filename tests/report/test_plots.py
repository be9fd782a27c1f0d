"""Plots, read back from the axes; no images are compared."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from matplotlib.collections import PathCollection
from matplotlib.colors import same_color, to_hex
from matplotlib.figure import Figure

from tp_cosep.errors import InputError, MissingDependencyError
from tp_cosep.functional.selection import select_channels
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.report.plots import plot_kept_channels, plot_mss, plot_separability_space
from tp_cosep.selection.embedding import GroupEmbedding, plane
from tp_cosep.selection.result import GroupPlan


def points(n, n_clusters, dims, noise, seed=0):
    """Noisy copies of a few centres; the centre of a point is its index modulo ``n_clusters``."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(n_clusters, dims, generator=generator, dtype=torch.float64)
    x = centres[torch.arange(n) % n_clusters]
    return x + noise * torch.randn(n, dims, generator=generator, dtype=torch.float64)


def distances_of(x):
    return torch.cdist(x, x)


def line(ax, label):
    """The only line whose label starts with ``label``."""
    (found,) = [drawn for drawn in ax.lines if str(drawn.get_label()).startswith(label)]
    return found


def shown_texts(ax):
    return [text.get_text() for text in ax.texts]


@pytest.fixture(scope="module")
def planted():
    x = points(24, 6, 5, 0.1)
    return x, distances_of(x), select_channels(distances_of(x))


class TestMss:
    def test_curve_is_the_selections(self, planted):
        _, _, selection = planted
        _, ax = plot_mss(selection)
        curve = line(ax, "MSS")
        assert tuple(curve.get_xdata()) == selection.ks
        assert tuple(curve.get_ydata()) == selection.mss
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("number of clusters k", "Mean Simplified Silhouette (MSS)")

    def test_knee_height_over_the_straight_line_is_its_strength(self, planted):
        _, _, selection = planted
        _, ax = plot_mss(selection)
        knee = line(ax, "knee")
        (x, x_again), (foot, top) = knee.get_data()
        assert x == x_again == selection.knee_k == 6
        assert top == selection.mss[selection.ks.index(6)]
        height = selection.mss[-1] - selection.mss[0]
        assert top - foot == pytest.approx(selection.knee_strength * height)
        assert knee.get_label() == f"knee at k = 6, strength {selection.knee_strength:.2f}"

    def test_ring_is_where_the_kept_count_meets_the_curve(self, planted):
        _, distances, _ = planted
        selection = select_channels(distances, n_keep=10)
        _, ax = plot_mss(selection)
        kept = line(ax, "kept")
        assert kept.get_label() == "kept: 10 of 24"
        assert (kept.get_xdata()[0], kept.get_ydata()[0]) == (10, selection.mss[selection.ks.index(10)])

    def test_count_that_was_not_tried_is_a_vertical_line(self, planted):
        _, distances, _ = planted
        _, ax = plot_mss(select_channels(distances, n_keep=1))
        assert list(line(ax, "kept: 1 of 24").get_xdata()) == [1, 1]

    def test_count_is_the_final_count(self, planted):
        """A ranking across layers may keep channels other than the k best."""
        _, _, selection = planted
        _, ax = plot_mss(replace(selection, keep_idxs=(0, 1, 2), prune_idxs=tuple(range(3, 24))))
        assert line(ax, "kept").get_label() == "kept: 3 of 24"

    def test_heads_count_once(self, planted):
        _, _, selection = planted
        _, ax = plot_mss(selection.expanded(torch.arange(24).repeat_interleave(4)))
        assert line(ax, "kept").get_label() == f"kept: {selection.k} of 24"

    def test_channel_groups_count_once(self, planted):
        _, _, selection = planted
        _, ax = plot_mss(selection.expanded(torch.arange(24).repeat(3)))
        assert line(ax, "kept").get_label() == f"kept: {selection.k} of 24"

    def test_no_knee_no_mark(self, planted):
        _, _, selection = planted
        _, ax = plot_mss(replace(selection, knee_k=None, knee_strength=0.0))
        labels = [str(drawn.get_label()) for drawn in ax.lines]
        assert not any(label.startswith("knee") for label in labels)
        assert any(label.startswith("kept") for label in labels)

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_few_channels(self, n):
        selection = select_channels(distances_of(points(n, n, 2, 0.0)))
        fig, ax = plot_mss(selection)
        fig.canvas.draw()
        assert tuple(line(ax, "MSS").get_xdata()) == selection.ks
        assert ax.get_title(loc="left") == "silhouette of " + ("1 channel" if n == 1 else f"{n} channels")


class TestSeparabilitySpace:
    @staticmethod
    def drawn(ax, selection):
        """Position and colour of every component, and the positions of the rings."""
        *clusters, rings = [c for c in ax.collections if isinstance(c, PathCollection)]
        at, colour = {}, {}
        for j, cluster in enumerate(clusters):
            members = [i for i, label in enumerate(selection.labels) if label == j]
            for i, position in zip(members, np.asarray(cluster.get_offsets()), strict=True):
                at[i], colour[i] = position, to_hex(cluster.get_facecolor()[0])
        xy = np.stack([at[i] for i in range(len(at))])
        return xy, [colour[i] for i in range(len(at))], np.asarray(rings.get_offsets())

    def test_points_in_a_plane_keep_their_distances(self):
        x = points(12, 4, 2, 0.2)
        selection = select_channels(distances_of(x))
        _, ax = plot_separability_space(distances_of(x), selection)
        xy, _, _ = self.drawn(ax, selection)
        torch.testing.assert_close(distances_of(torch.from_numpy(xy)), distances_of(x))
        assert ax.get_aspect() == 1.0

    def test_axes_give_the_share_they_show(self, planted):
        """By another route: principal components of the points themselves."""
        x, distances, selection = planted
        _, ax = plot_separability_space(distances, selection)
        variances = torch.linalg.svdvals(x - x.mean(0)) ** 2
        first, second = (variances / variances.sum())[:2].tolist()
        assert 0.2 < second < first < 0.8
        assert ax.get_xlabel() == f"dimension 1: {first:.0%} of the squared distances"
        assert ax.get_ylabel() == f"dimension 2: {second:.0%} of the squared distances"

    def test_rings_are_the_kept_channels(self, planted):
        _, distances, selection = planted
        _, ax = plot_separability_space(distances, selection)
        xy, _, rings = self.drawn(ax, selection)
        np.testing.assert_array_equal(rings, xy[list(selection.keep_idxs)])
        assert "kept: 6 of 24" in [text.get_text() for text in ax.get_legend().get_texts()]

    def test_rings_follow_another_representative(self, planted):
        _, distances, _ = planted
        selection = select_channels(distances, preference=torch.arange(24.0))
        assert selection.keep_idxs != selection.medoids
        _, ax = plot_separability_space(distances, selection)
        xy, _, rings = self.drawn(ax, selection)
        np.testing.assert_array_equal(rings, xy[list(selection.keep_idxs)])

    def test_lines_join_members_to_their_medoid(self, planted):
        _, distances, selection = planted
        _, ax = plot_separability_space(distances, selection)
        xy, colours, _ = self.drawn(ax, selection)
        joined = {}
        for drawn in ax.lines:
            medoid, member = (int(np.abs(xy - end).sum(1).argmin()) for end in drawn.get_xydata())
            joined[member] = medoid
            assert same_color(drawn.get_color(), colours[member])
        others = set(range(24)) - set(selection.medoids)
        assert joined == {i: selection.medoids[selection.labels[i]] for i in others}

    def test_a_cluster_has_one_colour_and_neighbours_have_others(self, planted):
        _, distances, selection = planted
        _, ax = plot_separability_space(distances, selection)
        _, colours, _ = self.drawn(ax, selection)
        by_label = {label: {colours[i] for i in range(24) if selection.labels[i] == label} for label in range(6)}
        assert all(len(found) == 1 for found in by_label.values())
        assert len(set().union(*by_label.values())) == 6

    def test_only_distant_clusters_share_a_colour(self):
        """Twelve pairs on a line, six colours: no pair has the colour of its neighbour."""
        x = torch.arange(12, dtype=torch.float64).repeat_interleave(2)[:, None] * 10
        x[1::2] += 0.1
        selection = select_channels(distances_of(x), n_keep=12)
        _, ax = plot_separability_space(distances_of(x), selection)
        _, colours, _ = self.drawn(ax, selection)
        assert colours[::2] == colours[1::2]
        assert all(a != b for a, b in zip(colours[::2], colours[2::2], strict=False))
        assert len(set(colours)) == 6

    def test_channels_alone_in_their_cluster_are_grey(self, planted):
        _, distances, _ = planted
        selection = select_channels(distances, n_keep=24)
        _, ax = plot_separability_space(distances, selection)
        _, colours, _ = self.drawn(ax, selection)
        assert set(colours) == {"#777777"}
        assert not ax.lines
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert legend == ["kept: 24 of 24", "alone in its cluster"]

    def test_channel_groups_are_drawn_as_slots(self, planted):
        _, distances, selection = planted
        _, ax = plot_separability_space(distances, selection.expanded(torch.arange(24).repeat(2)))
        _, _, rings = self.drawn(ax, selection)
        assert len(rings) == selection.k

    def test_equal_channels(self):
        selection = select_channels(torch.zeros(5, 5))
        fig, ax = plot_separability_space(torch.zeros(5, 5), selection)
        fig.canvas.draw()
        xy, _, _ = self.drawn(ax, selection)
        np.testing.assert_array_equal(xy, np.zeros((5, 2)))
        assert ax.get_xlabel() == "dimension 1: 0% of the squared distances"

    def test_single_channel(self):
        selection = select_channels(torch.zeros(1, 1))
        fig, ax = plot_separability_space(torch.zeros(1, 1), selection)
        fig.canvas.draw()
        assert ax.get_title(loc="left") == "separability space of 1 channel"

    @pytest.mark.parametrize("n", [8, 512])
    @pytest.mark.slow
    def test_marks_stay_apart(self, n):
        """Many dots cover only a small part of the axes; few dots are large enough to see."""
        x = points(n, n, 5, 0.0)
        selection = select_channels(distances_of(x), n_keep=n // 4)
        fig, ax = plot_separability_space(distances_of(x), selection)
        fig.canvas.draw()
        box = ax.get_window_extent()
        area = box.width * box.height * (72 / fig.dpi) ** 2
        size = ax.collections[0].get_sizes()[0]
        assert n * size < 0.1 * area
        assert size > 12

    def test_an_embedding_is_drawn_like_its_distances(self, planted):
        """An embedding holds positions as fractions of the largest coordinate."""
        _, distances, selection = planted
        points, shares = plane(distances)
        scale = float(points.abs().max())
        embedding = GroupEmbedding(tuple((x, y) for x, y in (points / scale).tolist()), scale, shares)
        drawn = [plot_separability_space(given, selection)[1] for given in (distances, embedding)]
        (xy, colours, rings), (xy_again, colours_again, rings_again) = (self.drawn(ax, selection) for ax in drawn)
        np.testing.assert_allclose(xy, xy_again)
        np.testing.assert_allclose(rings, rings_again)
        assert colours == colours_again
        assert drawn[0].get_xlabel() == drawn[1].get_xlabel()

    def test_heads_are_drawn_as_heads(self, planted):
        _, distances, selection = planted
        _, ax = plot_separability_space(distances, selection.expanded(torch.arange(24).repeat_interleave(4)))
        xy, _, rings = self.drawn(ax, selection)
        np.testing.assert_array_equal(rings, xy[list(selection.keep_idxs)])

    def test_embedding_of_another_group(self, planted):
        _, _, selection = planted
        with pytest.raises(InputError, match=r"expected positions of shape \(24, 2\).*got \(3, 2\)"):
            plot_separability_space(GroupEmbedding(((0.0, 0.0),) * 3, 1.0, (0.5, 0.5)), selection)

    def test_distances_of_another_group(self, planted):
        _, distances, selection = planted
        with pytest.raises(InputError, match=r"expected distances of shape \(24, 24\).*got \(20, 20\)"):
            plot_separability_space(distances[:20, :20], selection)


class TestKeptChannels:
    @staticmethod
    def bars(ax):
        return [[round(bar.get_width()) for bar in container] for container in ax.containers]

    @staticmethod
    def group_plan(name, n, n_keep, side="out", reason="knee"):
        selection = None if n is None else select_channels(distances_of(points(n, n, 3, 0.0)), n_keep=n_keep)
        return GroupPlan(name, side, (name,), selection, reason)

    def test_bars_and_numbers(self):
        plan = PruningPlan((self.group_plan("conv1", 12, 3), self.group_plan("conv2", 20, 15)))
        _, ax = plot_kept_channels(plan)
        assert self.bars(ax) == [[12, 20], [3, 15]]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["conv1", "conv2"]
        assert shown_texts(ax) == ["3 of 12 (25%)", "15 of 20 (75%)"]
        assert [text.get_position()[1] for text in ax.texts] == [0, 1]
        assert ax.get_title(loc="left") == "channels kept: 18 of 32"
        assert ax.yaxis_inverted()

    def test_visits_add_up(self):
        plan = PruningPlan(
            (self.group_plan("conv1", 12, 8), self.group_plan("conv2", 6, 6), self.group_plan("conv1", 8, 5))
        )
        _, ax = plot_kept_channels(plan)
        assert self.bars(ax) == [[12, 6], [5, 6]]
        assert shown_texts(ax) == ["5 of 12 (42%)", "6 of 6 (100%)"]

    def test_group_left_alone_keeps_its_place(self):
        plan = PruningPlan(
            (self.group_plan("stem", None, None, reason="in use elsewhere"), self.group_plan("conv1", 4, 2))
        )
        _, ax = plot_kept_channels(plan)
        assert [label.get_text() for label in ax.get_yticklabels()] == ["stem", "conv1"]
        assert {text.get_text(): text.get_position()[1] for text in ax.texts} == {
            "left alone: in use elsewhere": 0,
            "2 of 4 (50%)": 1,
        }
        assert self.bars(ax) == [[4], [2]]

    def test_sides_of_a_layer_are_two_groups(self):
        plan = PruningPlan((self.group_plan("norm", 4, 2), self.group_plan("norm", 6, 3, side="in")))
        _, ax = plot_kept_channels(plan)
        assert [label.get_text() for label in ax.get_yticklabels()] == ["norm", "norm (inputs)"]

    def test_empty_plan(self):
        fig, ax = plot_kept_channels(PruningPlan())
        fig.canvas.draw()
        assert ax.get_title(loc="left") == "channels kept: 0 of 0"

    def test_height_grows_with_the_plan(self):
        few, many = (PruningPlan(tuple(self.group_plan(f"conv{i}", 4, 2) for i in range(n))) for n in (3, 30))
        assert plot_kept_channels(many)[0].get_figheight() > 3 * plot_kept_channels(few)[0].get_figheight()


def all_plots(planted, ax=None):
    _, distances, selection = planted
    plan = PruningPlan((GroupPlan("conv", "out", ("conv",), selection, "knee"),))
    yield lambda: plot_mss(selection, ax)
    yield lambda: plot_separability_space(distances, selection, ax)
    yield lambda: plot_kept_channels(plan, ax)


def test_own_figures_are_unknown_to_pyplot(planted):
    before = set(Gcf.figs)
    for plot in all_plots(planted):
        fig, ax = plot()
        assert isinstance(fig, Figure)
        assert fig.axes == [ax]
    assert set(Gcf.figs) == before


def test_given_axes_are_drawn_on(planted):
    figure = Figure()
    axes = figure.subplots(1, 3)
    for i, ax in enumerate(axes):
        fig, returned = list(all_plots(planted, ax))[i]()
        assert fig is figure
        assert returned is ax
        assert ax.has_data()


def test_axes_of_a_subfigure_belong_to_the_figure(planted):
    figure = Figure()
    ax = figure.subfigures(1, 2)[0].subplots()
    assert plot_mss(planted[2], ax)[0] is figure


def test_without_matplotlib(planted, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for plot in all_plots(planted):
        with pytest.raises(MissingDependencyError, match=r"pip install 'tp_cosep\[plots\]'"):
            plot()


def test_a_broken_matplotlib_says_so_itself(planted, monkeypatch, tmp_path):
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("import no_such_package\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        plot_mss(planted[2])
