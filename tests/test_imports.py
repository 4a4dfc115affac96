"""The house's order (rooms in one line, files in their rows) held against the imports, and torch kept out of doors."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import probekit
from probekit.moved import MOVED

PACKAGE = Path(probekit.__file__).parent

# Rooms in the order that data flows through them. A room imports only from rooms above it.
ROOMS = (
    "moved", "errors", "files", "ranks", "progress", "settings", "html_tables", "foreign", "checksums", "kept",
    "models", "hooks", "lens", "training", "traces", "drafting", "prediction", "decoding", "tracing", "costs", "choice",
    "engines", "validation", "probing", "tying", "presentation", "handover", "study", "verification", "cli", "__main__",
)  # fmt: skip
# Files of a room in their row. A file imports only from files before it.
ROWS = {
    "foreign": ("text", "bounded", "json", "special_tokens", "prompt_records", "prompt_files", "engine_logs"),
    "models": (
        "linear_kernels", "norm_kernels", "cuda_kernels", "kernel_language", "layer_kernels", "attention_kernel",
        "head_kernel", "placement", "memory", "in_blocks", "states", "family", "families", "one_layer",
        "transformers_facts", "discovery", "anatomy", "quantised", "configuration", "weight_files", "shipped",
        "checkpoint",
        "device_map", "gguf_header", "gguf_copies", "gguf", "reference", "adapters", "loaded", "synthetic",
        "described", "cut", "cut_gguf", "write_gguf",
    ),
    "hooks": (
        "layer_stack", "components", "sites", "capture", "stop_resume", "edit", "attention", "fast_forward",
        "fused_layers",
    ),
    "lens": (
        "noise", "discovered", "lens", "torch_files", "tuned_lens", "jacobian_lens", "exit_heads", "jacobian",
        "reductions", "draft_rows", "bf16_bound", "work_skipped", "agreement", "row_kernel", "statistics", "chunked",
    ),
    "training": ("layerskip",),
    "traces": (
        "token_text", "draft_vocabulary", "schema", "ledger", "manifest", "storage", "shared_run", "residuals",
        "pivots", "shown", "trace",
    ),
    "drafting": (
        "keys", "probe_policy", "policies", "round_policies", "trees", "lookup", "proposers", "drafters",
        "text_drafters", "imported", "tree_proposer", "tree_drafters", "named", "ways",
    ),
    "prediction": (
        "intervals", "rounds", "replay", "grids", "table", "joint", "predict", "run_lengths", "oracle", "learning",
        "shapes",
    ),
    "decoding": (
        "sampling", "caches", "detokenize", "results", "sequence", "engine", "batch_invariant", "self_check", "batch",
        "decoder",
        "autoregressive", "turns", "speculative", "device_round", "recordings", "device_decoding", "decode",
    ),
    "tracing": (
        "prompts", "prompt_store", "backend", "remote_service", "nnsight_backend", "block_backend", "backends",
        "self_check", "plan", "continuation", "logged_text", "reading", "part_tables", "tracer",
        "traced_models",
        "self_generated", "inspect_prompt",
    ),
    "costs": (
        "trees", "profile", "blocks", "batch", "engine_profile", "timing", "recorded", "measure", "roofline",
        "trace_plan",
    ),
    "choice": ("certainty", "prices", "ranking", "choose", "schedule", "what_if", "robustness", "rank"),
    "engines": (
        "acceptance", "engine", "transformers", "vllm", "llama_cpp", "sglang", "tensorrt_llm", "known", "export",
        "inside", "pretrained",
    ),
    "validation": (
        "draft_checkpoint", "differences", "results", "engine_rounds", "transformers", "inside_vllm",
        "vllm", "llama_cpp", "open_engine", "engine_costs", "kept_texts", "in_turns", "run", "ways",
    ),
    "probing": (
        "labels", "probe_scores", "probe_curve", "probes", "probe", "acceptance", "linear_answer", "patch_plan",
        "patching", "attribution_patching", "attribution", "stream_geometry",
    ),
    "tying": ("shares", "text_kinds", "factorial", "geometry", "head_swaps", "compare"),
    "presentation": (
        "tokens", "tex_text", "plots", "figure_files", "latex", "tables", "previews", "summary_schema", "study_folder",
        "paper", "next_steps",
        "report_replays", "report_data", "report_text", "report_ways", "report", "model_card", "export_card",
        "patch_page",
    ),
    "presentation.plots": (
        "glyphs", "calling", "style", "lens", "layers", "grids", "rounds", "ways", "layer_maps", "patches",
        "attribution", "probes",
    ),
    "presentation.paper": (
        "look", "panels", "layer_figures", "round_figures", "way_figures", "probing_figures", "captions",
        "probing_captions", "figures",
        "printed_tables", "make",
    ),
    "verification": ("findings", "weights", "run_folder", "study_folder", "verify"),
    "study": ("plan", "phases", "probes", "estimate", "summary", "log_to", "run"),
}  # fmt: skip
FREE_ROWS = {"cli"}  # folders whose files have no written order; they only may not go in circles
WITHOUT_TORCH = ("traces", "prediction", "choice", "engines", "presentation", "verification")
ALSO_WITHOUT_TORCH = (
    "probekit", "probekit.errors", "probekit.files", "probekit.ranks", "probekit.progress",
    "probekit.settings", "probekit.foreign", "probekit.tracing.prompts", "probekit.tracing.prompt_store",
    "probekit.costs.profile", "probekit.costs.blocks", "probekit.costs.batch", "probekit.costs.engine_profile",
    "probekit.lens.statistics", "probekit.models.placement",
    "probekit.models.shipped", "probekit.drafting.drafters",
    "probekit.drafting.policies", "probekit.drafting.probe_policy",
    "probekit.drafting.text_drafters", "probekit.drafting.imported",
    "probekit.drafting.round_policies", "probekit.drafting.ways", "probekit.drafting.named",
)  # fmt: skip
# Rooms whose `__init__` holds more than a docstring: the plots are called as `plots.NAME`.
OFFERS = {"probekit", "probekit.cli", "probekit.presentation.plots", "probekit.hooks", "probekit.study"}
MOST_LINES = 500


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


def row_of(parts: list[str]) -> list[tuple[str, str]]:
    """(row, entry) of a dotted name from the outside in: rooms, a room's files, the files of a folder in a room."""
    found = [("", parts[0])]
    for depth in range(1, len(parts)):
        row = ".".join(parts[:depth])
        if row not in ROWS:
            break
        found.append((row, parts[depth]))
    return found


def order_of(row: str) -> tuple[str, ...]:
    return ROWS[row] if row else ROOMS


def is_module(parts: list[str]) -> bool:
    return PACKAGE.joinpath(*parts).with_suffix(".py").is_file() or PACKAGE.joinpath(*parts).is_dir()


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_upwards(name: str, path: Path):
    if name == "probekit":
        return  # the public names, loaded lazily
    mine = row_of(name.split(".")[1:])
    for row, entry in mine:
        assert entry in order_of(row), f"{name} has no place in the row of {row or 'rooms'}"
    for target in imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = target.split(".")[1:]
        if not is_module(parts):
            continue  # a name in a module, which is listed too
        for (row, here), (other_row, there) in zip(mine, row_of(parts), strict=False):
            if row != other_row or (here == there):
                continue
            order = order_of(row)
            assert order.index(there) < order.index(here), f"{name} imports {target}, which comes after it"
            break


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_files_stay_small(name: str, path: Path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{name} has {lines} lines: more than one trade lives there"


def test_most_files_are_below_300_lines():
    long = [name for name, path in modules() if len(path.read_text(encoding="utf-8").splitlines()) > 300]
    assert len(long) <= len(modules()) // 10, long


@pytest.mark.parametrize("room", sorted(FREE_ROWS))
def test_no_circles(room: str):
    graph = {
        name: {
            target for target in imported(ast.parse(path.read_text(encoding="utf-8"))) if target.split(".")[1] == room
        }
        for name, path in modules()
        if name.startswith(f"probekit.{room}.")
    }
    list(TopologicalSorter(graph).static_order())


def test_rooms_offer_nothing_by_themselves():
    """A room's `__init__` holds a docstring only: importing one file never pays for its neighbours."""
    for name, path in modules():
        if path.name == "__init__.py" and name not in OFFERS:
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(body) == 1, f"{name}/__init__.py holds more than a docstring"
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_only_hooks_touch_hooks():
    """`register_*_hook`, a replaced `forward`, a rebuilt function, an object without `__init__`: in hooks/ alone."""
    for name, path in modules():
        if name.startswith("probekit.hooks."):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("register_"):
                assert not node.attr.endswith("_hook"), f"{name}:{node.lineno} registers a hook"
            for target in node.targets if isinstance(node, ast.Assign) else ():
                replaced = isinstance(target, ast.Attribute) and target.attr == "forward"
                assert not replaced, f"{name}:{target.lineno} replaces a forward"
            made = isinstance(node, ast.Attribute) and ast.unparse(node) == "object.__new__"
            assert not made, f"{name}:{node.lineno} makes an object without its __init__"
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            assert "FunctionType" not in names, f"{name}:{node.lineno} rebuilds functions"
            whole = isinstance(node, ast.Attribute) and node.attr == "FunctionType"
            assert not whole, f"{name}:{node.lineno} rebuilds functions"


def test_never_imports_torch():
    names = [*(f"probekit.{room}" for room in WITHOUT_TORCH), *ALSO_WITHOUT_TORCH]
    wanted = ["probekit"]
    for name in names:
        found = [module for module, _ in modules() if module == name or module.startswith(f"{name}.")]
        assert found, f"{name} is not there"
        wanted += found if name != "probekit" else []
    code = (
        "import importlib, sys\n"
        f"for name in {wanted}:\n"
        "    importlib.import_module(name)\n"
        "    loaded = {'torch', 'transformers', 'nnsight'} & set(sys.modules)\n"
        "    assert not loaded, f'{name} imports {loaded}'\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr


def test_public_names_are_lazy_and_true():
    assert set(probekit.__all__) <= set(dir(probekit))
    with pytest.raises(AttributeError, match=r"it offers .*Capture"):
        _ = probekit.nothing
    from probekit.hooks.capture import Capture

    assert probekit.Capture is Capture


def test_old_names_lead_to_the_new_ones():
    """Public names that have moved keep working, and say where they are now."""
    for old, names in MOVED.items():
        for name, place in names.items():
            home, _, renamed = place.partition(":")
            with pytest.warns(DeprecationWarning, match=rf"has moved to {home}\.{renamed or name}"):
                found = getattr(importlib.import_module(old), name)
            assert found is getattr(importlib.import_module(home), renamed or name)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("probekit.never_was")
    with pytest.raises(AttributeError, match="nothing"):
        _ = importlib.import_module("probekit.lens.heads").nothing
