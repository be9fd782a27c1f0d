"""Draw which room of the package imports which: ``python docs/architecture.py`` writes docs/architecture.svg.

The arrows are read from the code; nothing but the order of the rooms is written down here, and the import contract in
pyproject.toml is where that comes from.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grimp

FLOORS = [
    ["cli"],
    ["pruning"],
    ["report"],
    ["selection", "compensation"],
    ["calibration"],
    ["graph"],
    ["utils", "functional"],
    ["errors"],
]
#: Rooms that most others import; the arrows to them would hide the others.
EVERYWHERE = ("utils", "errors")
_WIDTH, _HEIGHT, _BOX, _STEP = 760, 36, 190, 74


def imports() -> dict[tuple[str, str], int]:
    """How many imports of one room's modules go to another room, by the pair of rooms."""
    graph = grimp.build_graph("tp_cosep", exclude_type_checking_imports=False)
    rooms = {room for floor in FLOORS for room in floor}
    counts: dict[tuple[str, str], int] = {}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            a, b = (f"{name}.".split(".")[1] for name in (module, imported))
            if a != b and {a, b} <= rooms and b not in EVERYWHERE:
                counts[a, b] = counts.get((a, b), 0) + 1
    return counts


def figure() -> str:
    """The rooms as boxes, the highest floor on top, and an arrow from each room to those that it imports."""
    places = {
        room: (_WIDTH * (i + 1) / (len(floor) + 1), 20 + _STEP * level)
        for level, floor in enumerate(FLOORS)
        for i, room in enumerate(floor)
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_STEP * len(FLOORS)}" '
        'font-family="sans-serif">',
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{_STEP * len(FLOORS)}" fill="#fff"/>',
    ]
    for (a, b), n in sorted(imports().items()):
        (x1, y1), (x2, y2) = places[a], places[b]
        far = abs(y2 - y1) > _STEP * 1.5
        # Imports that skip floors swing out to a side, so that they do not run through the boxes between.
        bend = (_WIDTH * (0.04 if (x1 + x2) / 2 <= _WIDTH / 2 else 0.96) - (x1 + x2) / 2) * 0.9 if far else 0
        start, end = y1 + _HEIGHT, y2 - 2
        lines.append(
            f'<path d="M{x1:.0f} {start:.0f}C{x1 + bend:.0f} {start + 20:.0f} {x2 + bend:.0f} {end - 20:.0f} '
            f'{x2:.0f} {end:.0f}" fill="none" stroke="#555" stroke-opacity=".55" '
            f'stroke-width="{min(1 + n / 8, 4):.1f}" marker-end="url(#end)"><title>{a} imports {b}: {n}</title></path>'
        )
    for room, (x, y) in places.items():
        lines.append(
            f'<rect x="{x - _BOX / 2:.0f}" y="{y}" width="{_BOX}" height="{_HEIGHT}" rx="6" fill="#eef3f8" '
            f'stroke="#0072B2"/><text x="{x:.0f}" y="{y + 24}" text-anchor="middle" font-size="17">{room}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    target = Path(__file__).with_name("architecture.svg")
    if "--check" in sys.argv:
        if target.read_text(encoding="utf-8") != figure():
            sys.exit("docs/architecture.svg is out of date: run python docs/architecture.py")
    else:
        target.write_text(figure(), encoding="utf-8")
