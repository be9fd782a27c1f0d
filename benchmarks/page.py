"""How large the page about a plan of 200 layers is, how long it takes to write, and how soon a browser shows it.

python benchmarks/page.py

Needs Chromium and its driver. Times are also given as shares of those of a page about one layer, opened in turn.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tp_cosep import GroupPlan, PruningPlan
from tp_cosep.functional.selection import select_channels
from tp_cosep.selection.embedding import ClassPair, GroupEmbedding, plane

N_ROUNDS, N_CLASSES = 7, 1000
_LOADED = "const t = performance.getEntriesByType('navigation')[0]; return t.loadEventEnd - t.startTime"


def plan_of(n_layers: int, width: int) -> PruningPlan:
    """Layers of one width, half of their channels kept, with clusters and names of a thousand classes."""
    x = torch.randn(width, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances = torch.cdist(x, x)
    selection = select_channels(distances, n_keep=width // 2)
    points, shares = plane(distances)
    scale = float(points.abs().max())
    at = tuple((round(a, 3), round(b, 3)) for a, b in (points / scale).tolist())
    pairs = tuple(
        tuple(ClassPair((37 * j + i) % N_CLASSES, (71 * j + i + 1) % N_CLASSES, 2 / (i + 1)) for i in range(3))
        for j in range(width // 2)
    )
    embedding = GroupEmbedding(at, scale, shares, (), pairs, (N_CLASSES, N_CLASSES))
    names = [f"features.denseblock{i // 50}.denselayer{i}.conv" for i in range(n_layers)]
    entry = GroupPlan("", "out", (), selection, "knee, guarded", embedding=embedding)
    groups = tuple(replace(entry, name=name, layers=(name,)) for name in names)
    costs = {name: (1000 + i, 500) for i, name in enumerate(names)}
    return PruningPlan(groups, costs={"macs": costs, "params": costs})


def browser() -> Any:
    """A headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for option in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"):
        options.add_argument(option)
    driver = shutil.which("chromedriver")
    if driver is None:
        sys.exit("page.py: chromedriver is not installed (Debian: chromium chromium-driver)")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def opened(driver: Any, path: Path) -> float:
    """Milliseconds until a page has loaded."""
    driver.get("about:blank")
    driver.get(path.as_uri())
    while not (found := float(driver.execute_script(_LOADED))) > 0:  # the event itself is not over at once
        time.sleep(0.01)
    return found


def main() -> None:
    """Print the table."""
    driver = browser()
    names = [f"class number {i}" for i in range(N_CLASSES)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            pages: dict[str, tuple[Path, float, int]] = {}
            for n_layers, width in ((1, 256), (200, 64), (200, 128), (200, 256), (200, 512)):
                path, plan = Path(folder) / f"{n_layers}-{width}.html", plan_of(n_layers, width)
                start = time.perf_counter()
                plan.report(path, class_names=names)
                pages[f"{n_layers} × {width}"] = path, time.perf_counter() - start, path.stat().st_size
            times: dict[str, list[float]] = {name: [] for name in pages}
            for _ in range(N_ROUNDS):
                for name, (path, *_) in pages.items():
                    times[name].append(opened(driver, path))
    finally:
        driver.quit()
    least = statistics.median(times["1 × 256"])
    print("| layers × channels | MB | written in, s | opens in, ms (median, most) | as one layer does, times |")
    print("| --- | --- | --- | --- | --- |")
    for name, (_, took, size) in pages.items():
        found = times[name]
        middle = statistics.median(found)
        print(f"| {name} | {size / 1e6:.2f} | {took:.2f} | {middle:.0f}, {max(found):.0f} | {middle / least:.1f} |")


if __name__ == "__main__":
    main()
