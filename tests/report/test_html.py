"""The HTML page: its content, its safety against hostile names, and its behaviour in a browser."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from benchmarks.page import plan_of
from tp_cosep import GroupPlan, InputError, PruningPlan
from tp_cosep.functional.selection import select_channels
from tp_cosep.report.benchmark import ModelStats
from tp_cosep.selection.embedding import ClassPair, GroupEmbedding, kept_components, plane

VOID = {"meta", "link", "wbr"}
HOSTILE = """</script><script>alert(1)</script>"><img src=x onerror='alert(2)'>&amp;\u202e"""
STATS = {
    "trained": ModelStats(0.9, 1000, 8000, 0.004, 16),
    "pruned": ModelStats(0.875, 250, 2000, 0.003, 16),
}


class Page(HTMLParser):
    """Elements with their attributes and all the text in them, in document order; fails on unbalanced tags."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.elements, self._open = [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        found = {"tag": tag, "text": "", "inside": [e["tag"] for e in self._open], **dict(attributes)}
        self.elements.append(found)
        if tag not in VOID:
            self._open.append(found)

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag, **attributes):
        return [e for e in self.elements if e["tag"] == tag and attributes.items() <= e.items()]

    def rows(self, label):
        """The text of the cells in the body of the table with this name."""
        start = next(i for i, e in enumerate(self.elements) if e["tag"] == "table" and e.get("aria-label") == label)
        rows = []
        for e in self.elements[start + 1 :]:
            if "table" not in e["inside"]:
                break
            if e["tag"] == "tr" and "tbody" in e["inside"]:
                rows.append([])
            elif e["tag"] in ("td", "th") and "tbody" in e["inside"]:
                rows[-1].append(e["text"])
        return rows


def selection_of(n, n_keep=None, seed=0):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    d = torch.cdist(x, x)
    return d, select_channels(d, n_keep=n_keep)


def group_plan(name, n=12, n_keep=5, *, seed=0, embedding=True, n_labels=10, reason="knee at 5, guarded", **options):
    d, selection = selection_of(n, n_keep, seed)
    drawn = None
    if embedding:
        points, shares = plane(d)
        scale = float(points.abs().max())
        xy = tuple((round(x, 3), round(y, 3)) for x, y in (points / (scale or 1)).tolist())
        numbers = range(len(selection.medoids))
        pairs = tuple(
            tuple(ClassPair((3 * j + i) % n_labels, (7 * j + i + 1) % n_labels, 2 / (i + 1)) for i in range(3))
            for j in numbers
        )
        drawn = GroupEmbedding(xy, scale, shares, (), pairs, (n_labels, n_labels))
    return GroupPlan(name, "out", (name,), selection, reason, embedding=drawn, **options)


@pytest.fixture
def plan():
    costs = {"conv1": (100, 50), "conv2": (700, 150), "head": (200, 100)}
    groups = (
        group_plan("conv2", 20, 8, seed=1),
        group_plan("conv1"),
        GroupPlan("head", "out", ("head",), None, "its channels are the model's output"),
    )
    return PruningPlan(groups, {"target": {"macs": 0.3}}, costs={"macs": costs, "params": costs})


def write(plan, tmp_path, **options):
    plan.report(tmp_path / "report.html", **options)
    return Page(tmp_path / "report.html")


NAMES = [f"class number {i}" for i in range(1000)]


class TestContents:
    def test_layers_in_the_order_in_which_they_run(self, plan, tmp_path):
        page = write(plan, tmp_path)
        strengths = {g.name: f"{g.selection.knee_strength:.2f}" for g in plan if g.selection}
        knees = {g.name: str(g.selection.knee_k) for g in plan if g.selection}
        assert page.rows("Layers") == [
            [
                "conv1",
                "5 / 12",
                "41.7%",
                "5",
                knees["conv1"],
                strengths["conv1"],
                "10.0%",
                "5.0%",
                "knee at 5, guarded",
            ],
            [
                "conv2",
                "8 / 20",
                "40.0%",
                "8",
                knees["conv2"],
                strengths["conv2"],
                "70.0%",
                "15.0%",
                "knee at 5, guarded",
            ],
        ]

    def test_left_alone_with_the_reason(self, plan, tmp_path):
        page = write(plan, tmp_path)
        assert page.rows("Left alone") == [["head", "20.0%", "its channels are the model's output"]]

    def test_summary(self, plan, tmp_path):
        page = write(plan, tmp_path, title="A net")
        (tiles,) = page.all("dl", **{"class": "tiles"})
        assert "−59.4%32 → 13" in tiles["text"]
        assert "−70.0%1.00 k → 300" in tiles["text"]
        assert "2 chosen from, 1 left alone" in tiles["text"]
        assert "Requested: target macs 0.3." in page.source
        assert [e["text"] for e in page.all("title")] == ["A net"]
        assert [e["text"] for e in page.all("h1")] == ["A net"]

    def test_before_and_after(self, plan, tmp_path):
        page = write(plan, tmp_path, stats=STATS)
        assert page.rows("Before and after") == [
            ["trained", "90.00%", "1,000", "8.00 k", "4.00 ms"],
            ["pruned", "87.50%−2.50 points", "2500.25 ×", "2.00 k0.25 ×", "3.00 ms0.75 ×"],
        ]
        (tiles,) = page.all("dl", **{"class": "tiles"})
        assert "−2.5090.00% → 87.50%" in tiles["text"]
        assert "−25.0%4.00 ms → 3.00 ms" in tiles["text"]

    def test_accuracy_that_was_not_measured(self, plan, tmp_path):
        stats = {name: replace(s, accuracy=None) for name, s in STATS.items()}
        page = write(plan, tmp_path, stats=stats)
        assert [row[1] for row in page.rows("Before and after")] == ["–", "–"]
        assert "accuracy, in points" not in page.source

    def test_every_figure_has_a_text_alternative(self, plan, tmp_path):
        page = write(plan, tmp_path)
        figures = page.all("svg")
        assert len(figures) == 4
        assert all(e["role"] == "img" for e in figures)
        assert len({e["aria-label"] for e in figures}) == 4
        chosen = next(g.selection for g in plan if g.name == "conv2")
        label = next(e["aria-label"] for e in figures if e["aria-label"].startswith("conv2, MSS"))
        assert f"knee is at k = {chosen.knee_k}, strength {chosen.knee_strength:.2f}" in label
        assert "8 of 20 are kept" in label
        assert f"{chosen.mss[0]:.3f} at k = 2" in label
        plane_label = next(e["aria-label"] for e in figures if e["aria-label"].startswith("conv1, channels"))
        assert "5 of 12 channels kept, in 5 clusters" in plane_label

    def test_figures_show_every_channel_once(self, plan, tmp_path):
        """There is one coloured dot per channel and one ring per kept channel."""
        page = write(plan, tmp_path)
        paths = [e for e in page.all("path") if "dot" in e.get("class", "")]
        at = {kind: sum(e["d"].count("h0") for e in paths if kind in e["class"]) for kind in ("ring", "gap")}
        n_coloured = sum(e["d"].count("h0") for e in paths if re.search(r"c\d|alone", e["class"]))
        assert at == {"ring": 13, "gap": 13}
        assert n_coloured == 32

    def test_clusters_come_with_their_class_pairs(self, plan, tmp_path):
        page = write(plan, tmp_path, class_names={0: "cat", 1: "dog", 77: "unused"})
        *layers, names = [json.loads(e["text"]) for e in page.all("script", type="application/json")]
        assert names == {"0": "cat", "1": "dog"}
        conv1 = next(g for g in plan if g.name == "conv1")
        assert layers[0]["labels"] == list(conv1.selection.labels)
        assert layers[0]["medoids"] == list(conv1.selection.medoids)
        assert layers[0]["kept"] == kept_components(conv1.selection)
        assert layers[0]["pairs"][2] == [6, 5, 2.0, 7, 6, 1.0, 8, 7, 0.67]
        assert len(layers[0]["xy"]) == 24

    def test_channels_are_listed(self, plan, tmp_path):
        page = write(plan, tmp_path)
        listed = {e["text"].replace("–", " to ") for e in page.all("dd")}
        kept = [g.selection.keep_idxs for g in plan if g.selection]

        def spelt(text):
            parts = [part.split(" to ") for part in text.split(", ")]
            return tuple(i for ends in parts for i in range(int(ends[0]), int(ends[-1]) + 1))

        readable_groups = {spelt(text) for text in listed if re.fullmatch(r"\d+( to \d+)?(, \d+( to \d+)?)*", text)}
        assert readable_groups == {*kept, *(g.selection.prune_idxs for g in plan if g.selection)}

    def test_visits_of_one_group_are_one_row(self, plan, tmp_path):
        again = group_plan("conv1", 5, 3, seed=4, reason="pruning_ratio")
        left = GroupPlan("conv1", "out", ("conv1",), None, "the caller did not prune it")
        page = write(replace(plan, groups=(*plan.groups, again, left)), tmp_path)
        row = page.rows("Layers")[0]
        assert row[:3] == ["conv1", "3 / 12", "25.0%"]
        assert row[-1] == "pruning_ratio"
        assert [e["text"] for e in page.all("h3")] == ["Visit 1 of 3", "Visit 2 of 3", "Visit 3 of 3"]
        assert "Left alone: the caller did not prune it." in page.source
        assert len(page.all("details")) == 2

    def test_heads_are_counted_as_heads(self, plan, tmp_path):
        _, chosen = selection_of(4, 2)
        embedding = replace(group_plan("x", 4, 2).embedding, component_of=tuple(i // 6 for i in range(24)))
        selection = chosen.expanded(torch.arange(4).repeat_interleave(6))
        heads = GroupPlan("proj", "in", ("qkv",), selection, "heads", "head", {"qkv": (4, 2)}, embedding)
        page = write(PruningPlan((heads,)), tmp_path)
        assert page.rows("Layers")[0][:4] == ["proj (inputs)", "2 / 4 heads", "50.0%", "2"]
        assert "2 of 4 heads kept" in page.source
        assert "qkv 4 → 2" in page.source

    def test_retained_variance_is_named(self, plan, tmp_path):
        group = group_plan("conv1")
        covered = replace(group, selection=replace(group.selection, criterion="retained variance"))
        page = write(PruningPlan((covered,)), tmp_path)
        assert "<b>Retained variance</b>" in page.source
        assert "Silhouette" not in page.source

    def test_missing_information_is_stated(self, plan, tmp_path):
        bare = PruningPlan(tuple(replace(group, embedding=None) for group in plan))
        page = write(bare, tmp_path)
        assert "The plan does not say what its layers cost" in page.source
        assert page.source.count("The plan holds no embedding of this group") == 2
        assert "Accuracy and latency were not measured" in page.source
        assert {row[6] for row in page.rows("Layers")} == {"–"}
        note = "classes were not measured where its channels are compared"
        blind = replace(group_plan("conv1"), embedding=replace(group_plan("conv1").embedding, pairs=(), note=note))
        assert f"not known: {note}." in write(PruningPlan((blind,)), tmp_path).source

    def test_some_of_the_classes(self, tmp_path):
        group = group_plan("conv1")
        some = replace(group, embedding=replace(group.embedding, n_classes=(40, 1000)))
        assert "among 40 of the 1,000 classes" in write(PruningPlan((some,)), tmp_path).source

    @pytest.mark.parametrize(
        ("groups", "lead"),
        [
            ((), "The plan is empty."),
            ((GroupPlan("head", "out", ("head",), None, "output"),), "Nothing was pruned."),
            ((group_plan("conv1", 12, 12),), "Nothing was pruned."),
            ((group_plan("conv1", 1, 1),), "Nothing was pruned."),
            ((group_plan("conv1", 2, 1),), "1 of 2 channels are kept."),
        ],
        ids=["empty", "left alone", "all kept", "one channel", "two channels"],
    )
    def test_small_plans(self, groups, lead, tmp_path):
        page = write(PruningPlan(groups), tmp_path)
        assert [e["text"] for e in page.all("p", **{"class": "lead"})] == [lead]

    def test_the_same_plan_gives_the_same_page(self, plan, tmp_path):
        assert write(plan, tmp_path).source == write(plan, tmp_path).source

    def test_a_loaded_plan_gives_the_same_page(self, plan, tmp_path):
        plan.save(tmp_path / "plan.json")
        assert write(PruningPlan.load(tmp_path / "plan.json"), tmp_path).source == write(plan, tmp_path).source


class TestSafety:
    def test_names_stay_text(self, plan, tmp_path):
        plain = write(plan, tmp_path, stats=STATS, class_names=list("abcdefghij"))
        hostile = tuple(
            replace(group, name=HOSTILE + group.name, layers=(HOSTILE,), reason=HOSTILE, heads={HOSTILE: (2, 1)})
            for group in plan
        )
        costs = {unit: {HOSTILE: (10, 5)} for unit in ("macs", "params")}
        page = write(
            PruningPlan(hostile, {HOSTILE: HOSTILE}, costs=costs),
            tmp_path,
            stats={HOSTILE + name: s for name, s in STATS.items()},
            class_names=[HOSTILE] * 10,
            title=HOSTILE,
        )
        assert len(page.all("script")) == len(plain.all("script"))
        assert not page.all("img")
        assert not [name for e in page.elements for name in e if name.startswith("on")]
        assert page.all("h1")[0]["text"] == HOSTILE
        assert page.rows("Layers")[0][0] == HOSTILE + "conv2"
        assert json.loads(page.all("script", id="class-names")[0]["text"])["0"] == HOSTILE

    def test_texts_of_a_foreign_plan_stay_text(self, plan, tmp_path):
        plan.save(tmp_path / "plan.json")
        document = json.loads((tmp_path / "plan.json").read_text())
        document["groups"][0]["unit"] = document["groups"][0]["embedding"]["note"] = HOSTILE
        (tmp_path / "plan.json").write_text(json.dumps(document))
        page = write(PruningPlan.load(tmp_path / "plan.json"), tmp_path)
        assert f"8 of 20 {HOSTILE}s kept" in [e["text"] for e in page.all("span")]
        assert not page.all("img")
        assert len([e for e in page.all("script") if "type" not in e]) == 1

    def test_nothing_is_loaded(self, plan, tmp_path):
        page = write(plan, tmp_path, stats=STATS)
        references = [v for e in page.elements for name, v in e.items() if name in ("src", "href", "data", "action")]
        assert references
        assert all(value.startswith(("#", "data:,")) for value in references)
        assert not re.search(r"url\(|@import|https?:", page.source)

    def test_only_the_pages_own_script_runs(self, plan, tmp_path):
        page = write(plan, tmp_path)
        (policy,) = [e["content"] for e in page.all("meta") if e.get("http-equiv") == "Content-Security-Policy"]
        (script,) = [e["text"] for e in page.all("script") if "type" not in e]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy
        assert policy.startswith("default-src 'none';")

    def test_half_a_character(self, plan, tmp_path):
        page = write(plan, tmp_path, title="a\ud800b")
        assert page.all("title")[0]["text"] == "a\ufffdb"  # as a browser reads a character that UTF-8 cannot encode

    def test_colours_can_be_seen(self):
        """Contrast of text is at least 4.5 : 1 on the page and in boxes, of marks 3 : 1, in light and in dark mode."""
        from importlib.resources import files

        css = files("tp_cosep.report").joinpath("assets/page.css").read_text("utf-8")
        light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in css.split("@media (prefers", 1))
        for colours in (light, {**light, **dark}):
            for name, least in {"ink": 4.5, "soft": 4.5, "link": 4.5, "knee": 3, "alone": 3}.items():
                assert contrast(colours[name], colours["paper"]) >= least, name
            assert contrast(colours["soft"], colours["box"]) >= 4.5
            assert contrast(colours["ink"], colours["mark"]) >= 4.5
            assert all(contrast(colours[f"c{i}"], colours["paper"]) >= 3 for i in range(6))


def contrast(a, b):
    """Contrast ratio of WCAG 2."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


class TestErrors:
    @pytest.mark.parametrize("stats", [STATS["trained"], {"a": 1}, [STATS["trained"]], "text"])
    def test_stats(self, plan, tmp_path, stats):
        with pytest.raises(InputError, match="report: expected stats to be a mapping of names to ModelStats"):
            plan.report(tmp_path / "report.html", stats=stats)

    @pytest.mark.parametrize("names", ["cats and dogs", 3])
    def test_class_names(self, plan, tmp_path, names):
        with pytest.raises(InputError, match="report: expected class_names to be a sequence of names"):
            plan.report(tmp_path / "report.html", class_names=names)

    def test_folder(self, plan, tmp_path):
        with pytest.raises(InputError, match="report: expected an existing folder to write to"):
            plan.report(tmp_path / "nowhere" / "report.html")

    def test_an_error_leaves_the_old_page(self, plan, tmp_path, monkeypatch):
        write(plan, tmp_path)
        before = (tmp_path / "report.html").read_bytes()

        def fail(*args):
            raise OSError("no space")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            plan.report(tmp_path / "report.html", title="another")
        assert (tmp_path / "report.html").read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_200_layers_stay_small(tmp_path):
    plan_of(200, 256).report(tmp_path / "report.html", class_names=NAMES)
    assert (tmp_path / "report.html").stat().st_size < 5e6


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium of its own, with an empty profile."""
    if CHROMIUM is None or shutil.which("chromedriver") is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.slow
class TestBrowser:
    @pytest.fixture
    def opened(self, browser, plan, tmp_path):
        """Open a page with a width and a colour scheme; any console message fails the test."""

        def open_page(plan=plan, width=1280, scheme="light", fragment="", **options):
            path = tmp_path / "report.html"
            plan.report(path, **options)
            browser.get("about:blank")
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            browser.get(path.as_uri() + fragment)
            return browser

        yield open_page
        assert browser.get_log("browser") == []

    @staticmethod
    def first_column(browser):
        script = (
            """return [...document.querySelectorAll("table.sorts tbody")[0].rows].map(r => r.cells[0].textContent)"""
        )
        return browser.execute_script(script)

    @staticmethod
    def heading(browser, text):
        buttons = browser.find_elements("css selector", "table.sorts thead button")
        return next(button for button in buttons if button.text == text)

    def test_the_table_sorts(self, opened, plan):
        fewer = group_plan("conv10", 30, 2, seed=2)
        unknown = group_plan("conv9", 8, 8, seed=3)
        unknown = replace(unknown, selection=replace(unknown.selection, knee_k=None, knee_strength=0.0))
        browser = opened(replace(plan, groups=(*plan.groups, fewer, unknown)))
        assert self.first_column(browser) == ["conv1", "conv2", "conv10", "conv9"]
        self.heading(browser, "kept").click()
        assert self.first_column(browser)[-2:] == ["conv1", "conv10"]
        assert set(self.first_column(browser)[:2]) == {"conv2", "conv9"}
        self.heading(browser, "kept").click()
        assert self.first_column(browser)[:2] == ["conv10", "conv1"]
        self.heading(browser, "layer").click()
        assert self.first_column(browser) == ["conv1", "conv2", "conv9", "conv10"]
        for _ in range(2):  # rows without a knee stay last in both directions
            self.heading(browser, "knee strength").send_keys("\ue007")
            assert self.first_column(browser)[-1] == "conv9"
        sorted_by = browser.find_elements("css selector", "table.sorts [aria-sort]")
        assert [(h.text, h.get_attribute("aria-sort")) for h in sorted_by] == [("knee strength", "ascending")]

    def test_a_layer_opens_from_the_table_with_its_clusters(self, opened, plan):
        browser = opened(class_names={i: f"digit {i}" for i in range(10)})
        assert not browser.find_elements("css selector", ".clusters table")
        link = browser.find_element("css selector", "table.sorts a")
        assert link.text == "conv1"
        link.click()
        time.sleep(0.2)
        (layer,) = browser.find_elements("css selector", "details[open]")
        cells = [row.find_elements("xpath", "*") for row in layer.find_elements("css selector", ".clusters tbody tr")]
        rows = [" ".join(cell.get_property("textContent") for cell in row) for row in cells]
        assert len(rows) == 5
        assert sum("digit 0\u00a0| digit 1\u00a0(2.00), digit 1\u00a0| digit 2\u00a0(1.00)" in row for row in rows) == 1
        shown = {int(i) for row in rows for i in re.findall(r"\d+", re.sub(r"digit \d+|\(.*?\)", "", row))}
        assert shown == set(range(12))

    def test_a_link_to_a_layer(self, opened):
        browser = opened(fragment="#layer-0")
        time.sleep(0.2)
        (layer,) = browser.find_elements("css selector", "details[open]")
        assert layer.find_element("css selector", "summary").text.startswith("conv2")

    def test_a_tip_describes_the_channel_under_the_pointer(self, opened, plan):
        browser = opened(class_names=[f"digit {i}" for i in range(10)], fragment="#layer-1")
        time.sleep(0.2)
        conv1 = next(g for g in plan if g.name == "conv1")
        script = """
            const plane = document.querySelector("details[open] .plane"), box = plane.getBoundingClientRect();
            const xy = JSON.parse(document.querySelector("details[open] .clusters script").textContent).xy;
            const [x, y] = [2 * arguments[0], 2 * arguments[0] + 1].map((i) => xy[i] / 720);
            const at = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
            plane.dispatchEvent(new PointerEvent("pointermove", at));
            return document.getElementById("tip").textContent;
        """
        for channel in range(12):
            kept = "kept" if channel in conv1.selection.keep_idxs else "pruned"
            said = browser.execute_script(script, channel).split("\n")
            assert said[0] == f"channel {channel}, {kept}"
            assert len(said) == 4 + (channel not in conv1.selection.medoids)

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [360, 1280])
    def test_every_width_and_scheme(self, opened, plan, width, scheme):
        """Even with long names nothing is wider than the screen, and the page follows the colour scheme."""
        long = replace(plan.groups[0], name="features." + "x" * 60, reason="because " * 30)
        browser = opened(
            replace(plan, groups=(long, *plan.groups[1:])),
            width,
            scheme,
            title="T" * 80,
            stats={"m" * 90: STATS["trained"]},
        )
        browser.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        time.sleep(0.2)
        assert browser.execute_script("const e = document.documentElement; return e.scrollWidth - e.clientWidth") == 0
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", colour))) / 3
        assert brightness > 200 if scheme == "light" else brightness < 60
        for svg in browser.find_elements("css selector", "details svg"):
            assert svg.accessible_name
            assert svg.size["width"] > 0.4 * min(width, 800)

    def test_hostile_names_do_nothing(self, opened, plan):
        groups = tuple(replace(g, name=HOSTILE + g.name, layers=(HOSTILE,), reason=HOSTILE) for g in plan)
        browser = opened(PruningPlan(groups), class_names=[HOSTILE] * 10, title=HOSTILE)
        browser.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        time.sleep(0.2)
        assert browser.title.startswith("</script><script>")
        assert not browser.find_elements("css selector", "img")
        assert browser.find_elements("css selector", ".clusters td")

    def test_200_layers_open(self, opened):
        """``benchmarks/page.py`` measures the time."""
        browser = opened(plan_of(200, 256), class_names=NAMES)
        assert len(browser.find_elements("css selector", "details")) == 200


@pytest.mark.slow
def test_report_does_not_import_pruning():
    """The views depend on values only."""
    code = (
        "import sys, tp_cosep.report.html; sys.exit(any(name.startswith('tp_cosep.pruning') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
