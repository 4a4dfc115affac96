"""The house as a picture, drawn from the imports: `python docs/tools/house.py` writes house.svg and .png.

Rooms are boxes in the order of `tests/test_imports.py`; a room imports only from rooms before it. An arrow goes from a
room to one that it imports, where no arrow by way of a third room says the same.
"""

from __future__ import annotations

import ast
import runpy
from functools import cache
from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "probekit"
PICTURES = ROOT / "docs" / "pictures"
IMPORT_TEST = ROOT / "tests" / "test_imports.py"

# Kept out: old names' new places, and errors, which every room imports.
NOT_DRAWN = ("moved", "errors", "progress", "__main__")
WITHOUT_TORCH = "#d9ead3"
WITH_TORCH = "#dce6f2"
INK = "#222222"
GREY = "#777777"
# Not dates or versions: the picture changes only when the house does.
METADATA: dict[str, dict[str, str | None]] = {
    "svg": {"Date": None, "Creator": "probekit"},
    "png": {"Software": "probekit"},
}


@cache
def imports_test() -> dict[str, object]:
    return runpy.run_path(str(IMPORT_TEST))


def rooms() -> list[str]:
    """The rooms of the picture, in their order."""
    return [room for room in imports_test()["ROOMS"] if room not in NOT_DRAWN]  # type: ignore[attr-defined]


def imported_rooms() -> dict[str, set[str]]:
    """What each room imports, by room."""
    known, read = set(rooms()), imports_test()["imported"]
    found: dict[str, set[str]] = {room: set() for room in rooms()}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room in known:
            names = read(ast.parse(path.read_text(encoding="utf-8")))  # type: ignore[operator]
            found[room] |= {name.split(".")[1] for name in names} & known - {room}
    return found


def arrows() -> list[tuple[str, str]]:
    """(importer, imported), without those that follow from two or more others."""
    direct = imported_rooms()

    @cache
    def reached(room: str) -> frozenset[str]:
        return frozenset().union(*({each} | reached(each) for each in direct[room])) if direct[room] else frozenset()

    return [
        (room, each)
        for room in rooms()
        for each in sorted(direct[room], key=rooms().index)
        if not any(each in reached(other) for other in direct[room] - {each})
    ]


def levels() -> dict[str, int]:
    """The column of each room: one more than the last of those that it imports."""
    direct = imported_rooms()
    found: dict[str, int] = {}
    for room in rooms():
        found[room] = max((found[each] + 1 for each in direct[room]), default=0)
    return found


def drawn() -> Figure:
    """Columns from left to right: a room stands to the right of all that it imports."""
    column = levels()
    places: dict[str, tuple[float, float]] = {}
    for level in range(max(column.values()) + 1):
        here = [room for room in rooms() if column[room] == level]
        tilt = 0.22 if level % 2 else -0.22  # neighbours a little apart, so that arrows do not run through boxes
        for at, room in enumerate(here):
            places[room] = (float(level), (len(here) - 1) / 2 - at + tilt)
    figure = Figure(figsize=(11, 3.6))
    ax = figure.add_axes((0, 0, 1, 1))
    xs, ys = zip(*places.values(), strict=True)
    ax.set_xlim(min(xs) - 0.7, max(xs) + 0.45)
    ax.set_ylim(min(ys) - 0.5, max(ys) + 0.5)
    ax.set_axis_off()
    boxes = {room: box(ax, room, place) for room, place in places.items()}
    for importer, imported in arrows():
        far = column[importer] - column[imported] > 1
        down = places[imported][1] < places[importer][1]
        ax.annotate(
            "", xy=places[imported], xytext=places[importer], zorder=2,  # behind the names
            arrowprops={
                "arrowstyle": "-|>", "color": GREY, "linewidth": 0.8, "mutation_scale": 9,
                "patchA": boxes[importer].get_bbox_patch(), "patchB": boxes[imported].get_bbox_patch(),
                "connectionstyle": f"arc3,rad={(-0.12 if down else 0.22) if far else 0}", "shrinkA": 1, "shrinkB": 2,
            },
        )  # fmt: skip
    return figure


def box(ax: Axes, room: str, place: tuple[float, float]) -> Text:
    colour = WITHOUT_TORCH if room in imports_test()["WITHOUT_TORCH"] else WITH_TORCH  # type: ignore[operator]
    return ax.text(
        *place, room, ha="center", va="center", fontsize=8.5, color=INK, zorder=3,
        bbox={"boxstyle": "round,pad=0.4", "facecolor": colour, "edgecolor": INK, "linewidth": 0.6},
    )  # fmt: skip


def write() -> None:
    with matplotlib.rc_context({"svg.hashsalt": "probekit", "svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        figure = drawn()
        for kind, metadata in METADATA.items():
            for _ in range(2):  # arrows are drawn before the boxes at which they end: those of the first time
                buffer = BytesIO()
                figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
            content = buffer.getvalue()
            if kind == "svg":  # for the test that holds the picture against the imports
                said = ", ".join(f"{importer} to {imported}" for importer, imported in arrows())
                content = content.rstrip() + f"\n<!-- arrows: {said} -->\n".encode()
            (PICTURES / f"house.{kind}").write_bytes(content)


if __name__ == "__main__":
    write()
