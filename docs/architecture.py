"""Draw which room of the package imports which: ``python docs/architecture.py`` writes docs/architecture.svg.

The imports are read from the code, the order of the rooms from the import contract in pyproject.toml. With ``--check``
nothing is written; the exit status says whether the figure is up to date.
"""

from __future__ import annotations

import sys
from collections import Counter
from itertools import cycle
from pathlib import Path

import grimp

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = "tp_cosep"
_FOLDER = Path(__file__).parent
_FIGURE = _FOLDER / "architecture.svg"
_BOX_X, _BOX_WIDTH, _BOX_HEIGHT, _STEP = 30, 250, 34, 48
_LANE_X, _LANE_STEP = _BOX_X + _BOX_WIDTH + 60, 40
# Okabe and Ito's colours without yellow, which is too pale for lines, and two dark ones.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5195", "#8C564B")


def floors() -> list[list[str]]:
    """The rooms, from the top floor down; rooms of one floor do not import each other."""
    document = tomllib.loads((_FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = document["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = [[name.strip() for name in layer.split("|")] for layer in layers]
    return [rooms for floor in named if (rooms := [name for name in floor if not name.startswith("_")])]


def imports(graph: grimp.ImportGraph, rooms: list[str]) -> Counter[tuple[str, str]]:
    """How many modules of one room import modules of another room, counted by pair."""
    counts: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            importer, room = (f"{name}.".split(".")[1] for name in (module, imported))
            if importer != room and importer in rooms and room in rooms:
                counts[importer, room] += 1
    return counts


def figure() -> str:
    """The rooms one below another, and for each imported room a lane that its importers are joined to by dots."""
    sys.path.insert(0, str(_FOLDER.parent))  # the checkout, not an installed copy
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    rooms = [room for floor in floors() for room in floor]
    counts = imports(graph, rooms)
    middle = {room: 24 + _STEP * i + _BOX_HEIGHT // 2 for i, room in enumerate(rooms)}
    imported = [room for room in rooms if any(b == room for _, b in counts)]
    lane = {room: _LANE_X + _LANE_STEP * i for i, room in enumerate(imported)}
    colour = dict(zip(imported, cycle(_COLOURS), strict=False))
    right = _BOX_X + _BOX_WIDTH
    width, height = max(lane.values()) + 30, _STEP * len(rooms) + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">',
        "<title>Imports between the rooms of the package</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for floor in floors():
        top = middle[floor[0]] - _BOX_HEIGHT // 2 - 5
        bottom = middle[floor[-1]] + _BOX_HEIGHT // 2 + 5
        lines.append(
            f'<rect x="{_BOX_X - 12}" y="{top}" width="{_BOX_WIDTH + 24}" height="{bottom - top}" rx="8" '
            'fill="#eef3f8"/>'
        )
    for importer in rooms:
        lanes = [lane[room] for room in imported if (importer, room) in counts]
        if lanes:
            y = middle[importer] + 6
            lines.append(f'<path d="M{right} {y}H{max(lanes)}" stroke="#999" stroke-width="1"/>')
    for room in imported:
        importers = [a for a in rooms if (a, room) in counts]
        x, y = lane[room], middle[room] - 7
        lines.append(
            f'<path d="M{x} {middle[importers[0]] + 6}V{y}H{right + 7}" fill="none" stroke="{colour[room]}" '
            f'stroke-width="2"/><path d="M{right} {y}l9 -4.5v9z" fill="{colour[room]}"/>'
        )
        lines += [
            f'<circle cx="{x}" cy="{middle[a] + 6}" r="5" fill="{colour[room]}">'
            f"<title>{a} imports {room}: {counts[a, room]}</title></circle>"
            for a in importers
        ]
    for room in rooms:
        n_modules = len(graph.find_descendants(f"{PACKAGE}.{room}"))
        y = middle[room] - _BOX_HEIGHT // 2
        outline = colour.get(room, "#555")
        lines.append(
            f'<rect x="{_BOX_X}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="5" fill="#fff" '
            f'stroke="{outline}" stroke-width="2"/>'
            f'<text x="{_BOX_X + 14}" y="{y + 23}" font-size="17">{room}</text>'
            f'<text x="{right - 14}" y="{y + 22}" font-size="12" text-anchor="end" fill="#555">'
            f"{f'{n_modules} modules' if n_modules else '1 module'}</text>"
        )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    if "--check" not in sys.argv:
        _FIGURE.write_text(figure(), encoding="utf-8")
    elif _FIGURE.read_text(encoding="utf-8") != figure():
        sys.exit("docs/architecture.svg is out of date: run python docs/architecture.py")
