"""The documentation: its code runs as it stands, its references say what is there, and its site needs no network."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest

import probekit
from probekit.engines.known import ENGINES
from probekit.lens.statistics import registered, unregister
from probekit.models.families import unregister as unregister_family

pytestmark = pytest.mark.second

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
README = DOCS.parent / "README.md"
PAGES = [path for path in (README, *sorted(DOCS.rglob("*.md"))) if BLOCK.search(path.read_text(encoding="utf-8"))]


def tool(name: str) -> dict[str, Any]:
    """The names of one of the scripts that make pages."""
    return runpy.run_path(str(DOCS / "tools" / f"{name}.py"))


# ------------------------------------------------------------------------------------------------ code that runs
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_code_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    try:
        with matplotlib.rc_context():
            for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
                if language == "python":
                    exec(compile(block, str(page), "exec"), names)
                    continue
                for line in block.replace("\\\n", " ").strip().splitlines():
                    assert status_of(shlex.split(line, comments=True), monkeypatch) == 0, capsys.readouterr().err
    finally:  # a page that registers a statistic or a family is not to change the other tests
        unregister_family("nanochat")
        ENGINES.pop("turbo", None)
        for statistic in registered():
            unregister(statistic.name)
        plt.close("all")


def status_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of one of the project's own commands; pages run no others."""
    from probekit.cli.app import run

    if words[:3] == ["python", "-m", "figures"]:
        monkeypatch.setattr(sys, "argv", words[2:])
        with pytest.raises(SystemExit) as left:
            runpy.run_module("figures", run_name="__main__")
        return int(left.value.code or 0)
    assert words[0] == "probekit", f"only the project's own commands are run, not {words[0]!r}"
    return run([*words[1:], "--quiet"])


# ------------------------------------------------------------------------------------------------ the notebook
NOTEBOOKS = {"early-exit": 5, "inside": 3}
"""Tutorials, and how many pictures each shows."""


def stored_cells(name: str) -> list[dict[str, Any]]:
    return json.loads((DOCS / "tutorials" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def page_of(notebook: dict[str, Any], name: str) -> str:
    return next(page for page in notebook["PAGES"] if page.stem == name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_is_in_step_with_its_page(name):
    notebook = tool("notebook")
    stored = [(cell["cell_type"], "".join(cell["source"])) for cell in stored_cells(name)]
    again = "make it again: `python docs/tools/notebook.py`"
    assert stored == notebook["cells_of"](page_of(notebook, name)), again


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_has_run_and_has_pictures(name):
    cells = [cell for cell in stored_cells(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == NOTEBOOKS[name]


@pytest.mark.long
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_runs_in_a_kernel(name, tmp_path):
    notebook = tool("notebook")
    ran = notebook["executed"](notebook["cells_of"](page_of(notebook, name)), tmp_path)
    outputs = [output for cell in ran.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == NOTEBOOKS[name]


# ------------------------------------------------------------------------------------------------ the references
def test_the_benchmarks_page_is_what_the_records_say():
    written = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert written == tool("benchmarks")["page"](), "make it again: `python docs/tools/benchmarks.py`"


def test_the_commands_page_is_what_the_commands_say(capsys):
    from probekit.cli.app import run

    written = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    assert written == tool("commands")["page"](), "make it again: `python docs/tools/commands.py`"
    common, *sections = re.split(r"^## probekit ", written, flags=re.MULTILINE)
    for section in sections:
        run([section.split(None, 1)[0], "--help"])
        options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
        assert options == set(re.findall(r"`(--[a-z-]+)", section + common.partition("## Options")[2]))


def test_the_api_has_every_public_name():
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    documented = set()
    for path, members in re.findall(r"^::: (\S+)(?:\n    options: \{ members: \[(.*?)\] \})?", page, re.MULTILINE):
        documented.update(f"{path}.{name}" for name in members.split(", ") if name)
        documented.add(path)
    for name in probekit.__all__:
        owner = probekit._ROOMS[name]
        assert {owner, f"{owner}.{name}"} & documented, f"{name} of {owner} is not in the API"
    for name in documented:  # and nothing that is not there
        room, _, last = name.rpartition(".")
        try:
            import_module(name)
        except ModuleNotFoundError:
            assert hasattr(import_module(room), last), f"{name} does not exist"


def test_the_files_page_has_the_columns_of_a_trace():
    from probekit.traces.schema import COLUMNS

    page = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    for table, columns in COLUMNS.items():
        row = re.search(rf"^\| `{table}` \| .*? \| (.*) \|$", page, re.MULTILINE)
        assert row is not None, f"the table {table} is not on the page"
        assert re.findall(r"`([a-z_]+)`", row[1]) == list(columns)


@pytest.fixture(scope="module")
def documents(tiny_folder, tmp_path_factory) -> dict[str, list[Any]]:
    """Documents of every command, on a tiny model: of greedy and of sampled text, with and without a draft model."""
    folder = tmp_path_factory.mktemp("documents")
    prompts = folder / "prompts.txt"
    prompts.write_text("abc\ndefg\nhij\nk\n")
    many = folder / "many.txt"  # sampled counts are held against an interval, which few texts make a poor one
    many.write_text("".join(f"{first}{second}\n" for first in "abcdefgh" for second in "xyz"))
    greedy, sampled, study = folder / "greedy", folder / "sampled", folder / "study"
    traced = ["--prompts", prompts, "--max-new-tokens", 8]
    cell = ["--exit-layers", 2, "--draft-lengths", 2]
    timed = [
        "--clock",
        "processor",
        "--sweeps",
        1,
        "--contexts",
        40,
        "--draft-lengths",
        "1,3",
        "--draft-model",
        tiny_folder,
    ]
    made: dict[str, list[Any]] = {}
    for command, *words in (
        ("models",),
        ("inspect", tiny_folder),
        ("lens", tiny_folder, "abc", "--max-new-tokens", 2),
        ("lens", tiny_folder, "abc", "--max-new-tokens", 2, "--attribution"),
        ("patch", tiny_folder, "abcd", "abxd", "--sites", "residual,mlp:1"),
        ("trace", tiny_folder, "-o", greedy, *traced, "--draft-model", tiny_folder, "--keep-residuals", "all"),
        ("trace", tiny_folder, "-o", sampled, "--prompts", many, "--max-new-tokens", 8, "--temperature", 1),
        ("predict", greedy, "--rounds"),
        ("predict", sampled, "--rounds"),
        ("choose", greedy, "--draft-lengths", "1,2", "--costs", "roofline", "--device", "h100"),
        ("choose", greedy, "--draft-lengths", "2", "--exit-layers", "1,2", "--context", 16, "--rows", "1,2"),
        (
            "choose",
            greedy,
            "--costs",
            "roofline",
            "--device",
            "h100",
            "--rows",
            "1,8",
            "--contexts",
            "64,128",
            "--what-if",
            "device=h200,rows=8",
        ),
        ("costs", tiny_folder, "--engine", "transformers", *timed),
        ("export", greedy, "-o", folder / "exported", "--exit-layer", 2, "--draft-length", 2),
        ("rank", greedy, "--draft-lengths", "1,2", "--costs", "roofline", "--device", "cpu", "--validate", 1),
        ("probe", greedy, "--label", "entropy", "--layers", 2),
        ("probe", greedy, "--label", "agrees", "--layers", 2),
        ("geometry", greedy, "--directions", 3),
        ("fit-heads", greedy, "-o", folder / "heads.safetensors"),
        ("decode", tiny_folder, "abc", "--max-new-tokens", 4),
        ("validate", greedy, *cell),
        ("validate", sampled, *cell),
        ("validate", greedy, "--ways", "--draft-lengths", 2, "--limit", 1),
        ("compare", greedy, sampled),
        ("study", tiny_folder, "-o", study, *traced, "--draft-lengths", "1,2", "--probes"),
        ("report", study),
        ("figures", study, "-o", folder / "figures", "--format", "svg"),
        ("verify", study),
    ):
        made.setdefault(command, []).append(printed([command, *map(str, words)]))
    made["choose"].append(printed(["choose", str(study)]))
    made["plan"] = [
        printed(["study", str(tiny_folder), "-o", str(folder / "planned"), *map(str, traced), "--plan", "--probes"])
    ]
    made["trace-plan"] = [printed(["trace", str(tiny_folder), "-o", str(folder / "plan"), *map(str, traced), "--plan"])]
    made["study folder"] = [study]
    return made


def printed(words: list[str]) -> dict[str, Any]:
    """The document that a command prints."""
    from probekit.cli.app import run

    with redirect_stdout(StringIO()) as output:
        status = run([*words, "--json"])
    document = json.loads(output.getvalue())
    assert status == 0, document
    return document


def test_the_json_page_has_every_key(documents):
    page = (DOCS / "reference" / "json.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## ([a-z-]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(documents) - {"study folder"}
    missing: list[str] = []
    for command, section in sections.items():
        rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        documented = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
        found = {path for document in documents[command] for path in paths_of(document)}
        missing += [f"{command}: {path} is not on the page" for path in sorted(found)
                    if not any(is_part(path, key) for key in documented)]  # fmt: skip
        missing += [f"{command}: {key} is on the page, and not there" for key in sorted(documented)
                    if not any(is_part(path, key) for path in found)]  # fmt: skip
        assert f"`{documents[command][0]['schema']}`" in section
    assert not missing, "\n".join(missing)


def paths_of(value: Any, path: str = "") -> Iterator[str]:
    """Every path of a document; [] stands for each entry of a list of objects."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from paths_of(each, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        for each in value:
            yield from paths_of(each, f"{path}[]")
    else:
        yield path


def is_part(path: str, key: str) -> bool:
    """Whether a path lies at or below a documented key; an empty list or a null may stand for a list of objects."""
    return path == key or path.startswith((f"{key}.", f"{key}[]")) or key.startswith(f"{path}[]")


def test_the_files_page_has_the_tables_of_a_study(documents):
    page = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    tables = sorted((documents["study folder"][0] / "tables").glob("*.csv"))
    assert len(tables) == 9
    for path in tables:
        row = re.search(rf"^\| `{re.escape(path.name)}` \| (.*) \|$", page, re.MULTILINE)
        assert row is not None, f"{path.name} is not on the page"
        assert re.findall(r"`([a-z_0-9]+)`", row[1]) == list(pd.read_csv(path).columns)


# ------------------------------------------------------------------------------------------------ contributing
CONTRIBUTING = DOCS.parent / "CONTRIBUTING.md"


def test_the_picture_of_the_house_is_of_todays_rooms():
    house = tool("house")
    picture = (DOCS / "pictures" / "house.svg").read_text(encoding="utf-8")
    drawn = re.findall(r"<text [^>]*>([a-z_]+)</text>", picture)
    again = "make it again: `python docs/tools/house.py`"
    assert sorted(drawn) == sorted(house["rooms"]()), again
    kept = re.search(r"<!-- arrows: (.*?) -->", picture)
    assert kept is not None, again
    assert kept[1].split(", ") == [f"{importer} to {imported}" for importer, imported in house["arrows"]()], again
    folders = {path.stem for path in Path(probekit.__file__).parent.iterdir() if path.suffix in ("", ".py")}
    assert set(house["rooms"]()) | set(house["NOT_DRAWN"]) == folders - {"__init__", "__pycache__"}


def test_contributing_names_what_is_there():
    text = CONTRIBUTING.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:probekit|tests|analyses|figures|docs)/[\w./-]*)`", text)
    paths += re.findall(r"\]\(((?!http)[^)#]+)", text)
    assert len(paths) > 25
    for path in paths:
        assert "NN" in path or (DOCS.parent / path).exists(), f"{path} is not there"
    targets = set(re.findall(r"^(\w+):", (DOCS.parent / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make (\w+)`", text)) <= targets


# ------------------------------------------------------------------------------------------------ the site
def test_every_page_is_in_the_navigation():
    nav = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for path in DOCS.rglob("*.md"):
        assert str(path.relative_to(DOCS)) in nav


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_formulas_are_mathml(site):
    theory = (site / "explanation" / "theory.html").read_text(encoding="utf-8")
    source = (DOCS / "explanation" / "theory.md").read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", source, flags=re.MULTILINE | re.DOTALL)
    assert theory.count("<math ") == len(re.findall(r"\$\$.*?\$\$|\$[^$]+\$", prose, re.DOTALL)) > 100
    for page in site.rglob("*.html"):
        assert "arithmatex" not in page.read_text(encoding="utf-8")


def test_the_tutorials_show_what_their_notebooks_show(site):
    for name, pictures in NOTEBOOKS.items():
        page = (site / "tutorials" / f"{name}.html").read_text(encoding="utf-8")
        assert page.count('src="data:image/png') == pictures


def test_pages_fetch_nothing_from_elsewhere(site):
    elsewhere = re.compile(r"""<(?:script|img|iframe)[^>]* src="?(?:https?:)?//|<link[^>]* rel="stylesheet"[^>]*//""")
    for page in site.rglob("*.html"):
        assert not elsewhere.search(page.read_text(encoding="utf-8")), page


def test_the_api_keeps_every_line_of_the_docstrings(site):
    api = re.sub(r"<[^>]+>", "", (site / "reference" / "api.html").read_text(encoding="utf-8"))
    for kept in (
        "short, without a slash: fit for a folder.",  # an entry of one line
        "(more than 4 GB of weights) of each one's name, size and 64 evenly spaced MiB.",  # of several
        "Raises InputError, which names the line, for anything that is not a prompt.",  # prose after the entries
    ):
        assert kept in re.sub(r"\s+", " ", api).replace("&#39;", "'")


def test_short_docstrings_as_numpydoc():
    short = "Does it.\n\nParameters\n----------\na: one\n    and more.\nb, c: two.\n\nRaises ValueError.\n"
    long = "Does it.\n\nRaises ValueError.\n\nParameters\n----------\na\n    one\n    and more.\nb, c\n    two."
    assert tool("docstrings")["as_numpydoc"](short) == long
    assert tool("docstrings")["as_numpydoc"]("It.\n\nx: one,\n   or more. y: two.") == (
        "It.\n\n- `x`: one,\n  or more. y: two."
    )
