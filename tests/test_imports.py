"""The house's order (rooms in one line, files in their rows) held against the imports, and torch kept out of doors."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import probekit

PACKAGE = Path(probekit.__file__).parent

# Rooms in the order that data flows through them. A room imports only from rooms above it.
ROOMS = (
    "errors", "models", "hooks", "lens", "decoding", "tracing", "prediction", "tying", "presentation", "study", "cli",
)  # fmt: skip
# Files of a room in their row. A file imports only from files before it.
ROWS = {
    "models": ("products", "anatomy", "loading", "synthetic"),
    "lens": ("lens", "heads", "recipe", "reductions", "draft_rows", "screen", "witness", "kernel", "statistics"),
    "decoding": (
        "sampling", "caches", "policies", "results", "quick", "engine",
        "autoregressive", "self_speculative", "speculative", "device_round", "device_decoding", "decode",
    ),
    "tracing": ("shading", "prompts", "draft_vocabulary", "traces", "backends", "own_text", "tracer", "inner_look"),
    "prediction": ("grids", "acceptance", "costs", "choice", "validation"),
    "tying": (
        "pooling", "shares", "text_kinds", "certainty", "factorial", "geometry", "interventions", "comparison",
    ),
    "presentation": ("tokens", "plots", "tables", "previews", "packing", "report"),
}  # fmt: skip
FREE_ROWS = {"cli"}  # folders whose files have no written order; they only may not go in circles
WITHOUT_TORCH = ("probekit.presentation", "probekit.prediction.acceptance", "probekit.tracing.traces")
ALSO_WITHOUT_TORCH = ("probekit.tracing.prompts", "probekit.prediction.choice", "probekit.errors", "probekit")


def modules() -> list[tuple[str, Path]]:
    """Every module of the package with its dotted name, folders' `__init__` under the folder's name."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("probekit", *path.relative_to(PACKAGE).with_suffix("").parts)
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imported(tree: ast.AST) -> set[str]:
    """Dotted names below `probekit.` that a module imports anywhere, inside functions and for types as well."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if name.startswith("probekit.")}


def place(name: str) -> tuple[str, str]:
    """(room, file) of a dotted name; the file is empty for a room that is one file, or for the room itself."""
    parts = name.split(".")[1:] or [""]
    return parts[0], parts[1] if len(parts) > 1 and parts[0] in {*ROWS, *FREE_ROWS} else ""


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_upwards(name: str, path: Path):
    if name == "probekit":
        return  # the public names, loaded lazily
    room, file = place(name)
    assert room in ROOMS, f"{name} has no place in the list of rooms"
    if file and room in ROWS:
        assert file in ROWS[room], f"{name} has no place in the row of {room}"
    for target in imported(ast.parse(path.read_text(encoding="utf-8"))):
        other, other_file = place(target)
        if other not in ROOMS:
            continue  # a name out of probekit/__init__
        if other != room:
            assert ROOMS.index(other) < ROOMS.index(room), f"{name} imports {target}, which lies below it"
        elif room in ROWS and file and other_file in ROWS[room]:
            row = ROWS[room]
            assert row.index(other_file) < row.index(file), f"{name} imports {target}, which comes after it"


@pytest.mark.parametrize("room", sorted(FREE_ROWS))
def test_no_circles(room: str):
    graph = {
        name: {target for target in imported(ast.parse(path.read_text(encoding="utf-8"))) if place(target)[0] == room}
        for name, path in modules()
        if place(name)[0] == room and place(name)[1]
    }
    list(TopologicalSorter(graph).static_order())


def test_rooms_offer_nothing_by_themselves():
    """A room's `__init__` holds a docstring only: importing one file never pays for its neighbours."""
    for name, path in modules():
        if path.name == "__init__.py" and name not in ("probekit", "probekit.cli"):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(body) == 1, f"{name}/__init__.py holds more than a docstring"
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_only_hooks_touch_hooks():
    """`register_*_hook` and a replaced `forward` appear in hooks.py alone."""
    for name, path in modules():
        if name == "probekit.hooks":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("register_"):
                assert not node.attr.endswith("_hook"), f"{name}:{node.lineno} registers a hook"
            targets = node.targets if isinstance(node, ast.Assign) else ()
            for target in targets:
                replaced = isinstance(target, ast.Attribute) and target.attr == "forward"
                assert not replaced, f"{name}:{target.lineno} replaces a forward"


@pytest.mark.parametrize("name", [*WITHOUT_TORCH, *ALSO_WITHOUT_TORCH])
def test_never_imports_torch(name: str):
    wanted = [module for module, _ in modules() if module == name or module.startswith(f"{name}.")]
    if name in ("probekit", "probekit.errors"):
        wanted = [name]
    elif not any(module.count(".") == 2 for module in wanted):
        pytest.skip(f"{name} is not there yet")
    heavy = ("torch", "transformers", "nnsight")
    code = f"import sys, {', '.join(wanted)}; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_public_names_are_lazy_and_true():
    assert set(probekit.__all__) <= set(dir(probekit))
    with pytest.raises(AttributeError, match=r"it offers .*Capture"):
        _ = probekit.nothing
    from probekit.hooks import Capture

    assert probekit.Capture is Capture
