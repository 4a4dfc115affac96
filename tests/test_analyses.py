"""The analyses on a tiny model: each runs alone, and leaves one table and one figure. And what the docs claim."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

pytestmark = pytest.mark.second

ROOT = Path(__file__).parent.parent
ANALYSES = ROOT / "analyses"
NUMBERED = sorted(path.stem for path in ANALYSES.glob("[0-9][0-9]_*.py"))
KEPT = ROOT / "docs" / "results" / "science"
FINDINGS = ROOT / "docs" / "findings.md"
FINDINGS_TEXT = ROOT / "docs" / "sources" / "findings.md.in"
FINDINGS_SOURCES = ROOT / "docs" / "sources" / "findings.csv"
MARKER = re.compile(r"\{([a-zA-Z0-9][\w.-]*)\}")
NUMBER = re.compile(r"[−-]?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def command(monkeypatch_module):
    """The typer command of an analysis, by name."""

    def load(name: str) -> typer.Typer:
        spec = importlib.util.spec_from_file_location(name, ANALYSES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        app = typer.Typer(add_completion=False)
        app.command()(module.main)
        return app

    return load


@pytest.fixture(scope="module")
def monkeypatch_module():
    """`workbench` is found beside the analyses, as it is when one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ANALYSES))
        yield patch
    sys.modules.pop("workbench", None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("analyses")


def test_there_are_twelve():
    assert [name[:2] for name in NUMBERED] == [f"{number:02}" for number in range(1, 13)]


@pytest.mark.parametrize("name", NUMBERED)
def test_no_analysis_imports_another(name):
    text = (ANALYSES / f"{name}.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) (analyses|_?[01]\d)", text, re.MULTILINE)
    assert text.startswith('"""'), "the question stands at the top"
    assert f"python analyses/{name}.py" in text


@pytest.mark.parametrize("name", NUMBERED)
def test_an_analysis_leaves_a_table_and_a_figure(name, command, tiny_folder, tiny_tied_folder, shared):
    more = ["--costs", "roofline"] if name.startswith("06") else []
    learns = name.startswith("09")  # and what is learned on one half needs four prompts; one model is enough
    prompts, models = ("8", [tiny_folder]) if learns else ("4", [tiny_folder, tiny_tied_folder])
    result = CliRunner().invoke(
        command(name),
        [*map(str, models), "-o", str(shared), "--traces", str(shared / "traces"), "--prompts", prompts,
          "--max-new-tokens", "10", "--device", "cpu", *more],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads((shared / f"{name}.json").read_text(encoding="utf-8"))
    table = pd.read_csv(shared / f"{name}.csv")
    assert record["schema"] == "probekit/analysis/1"
    assert record["columns"] == list(table.columns)
    assert len(record["rows"]) == len(table) > 0
    assert {"model", "quantity", "value"} <= set(table.columns)
    assert {"with", "without"} <= set(table["loops"].dropna()), "headline figures come with and without looping text"
    assert "measured speedup" not in set(table["quantity"]), "times are compared only when asked for"
    assert str(shared) not in json.dumps(record), "a kept table names no machine's folder"
    for kind, head in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
        assert (shared / f"{name}.{kind}").read_bytes().startswith(head)


@pytest.mark.parametrize("name", NUMBERED)
def test_help_says_the_question(name, command):
    result = CliRunner().invoke(command(name), ["--help"])
    assert result.exit_code == 0
    assert "--max-new-tokens" in result.output


def test_a_model_that_is_not_there_is_one_clear_line(command, shared):
    result = CliRunner().invoke(command(NUMBERED[0]), [str(shared / "nothing"), "-o", str(shared)])
    assert result.exit_code == 2
    assert "error:" in result.output


def test_times_are_compared_where_they_are_asked_for(command, shared, tiny_folder):
    """With measured costs the fifth analysis holds the predicted speedup against the decoder's."""
    folder = shared / "timed"
    result = CliRunner().invoke(
        command("05_predicted_against_measured"),
        [str(tiny_folder), "-o", str(folder), "--traces", str(shared / "traces"), "--prompts", "4",
         "--max-new-tokens", "10", "--device", "cpu", "--run", "1", "--costs", "measured"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    table = pd.read_csv(folder / "05_predicted_against_measured.csv")
    both = table[table["quantity"].isin(["predicted speedup", "measured speedup"])]
    wide = both.pivot(index=["exit_layer", "draft_length"], columns="quantity", values="value")
    assert (wide > 0).all().all()
    errors = (wide["predicted speedup"] / wide["measured speedup"] - 1).abs()
    whole = table.set_index("quantity")["value"]
    assert whole["median error of the predicted speedup"] == pytest.approx(errors.median(), rel=1e-4, abs=1e-5)
    assert whole["largest error of the predicted speedup"] == pytest.approx(errors.max(), rel=1e-4, abs=1e-5)


def test_costs_are_of_two_kinds(command, shared):
    for name in ("05_predicted_against_measured", "06_choosing_the_exit"):
        result = CliRunner().invoke(command(name), ["-o", str(shared), "--costs", "guessed"])
        assert result.exit_code == 2


# ------------------------------------------------------------------------------------------------- the 2 x 2
def test_two_by_two_keeps_tables_and_no_weights(tmp_path, monkeypatch_module, command, shared, tiny_folder):
    """Four models of one seed, two steps each: the tables that analysis 03 reads."""
    pytest.importorskip("tokenizers")
    training = importlib.import_module("train_reference_models")
    king = "Once upon a time there lived a king, who had seven sons and a bird of gold, and a queen of silver. "
    plain = [f"{number} {king * 2}" for number in range(60)]
    held_out = ["Long, long ago there stood in the midst of a country covered with lakes a moor. " + king * 6] * 8
    corpus = tmp_path / "tales.txt"
    corpus.write_text("\n".join([*plain, *held_out, "Dorothy lived in the midst of the prairies.", *plain]))
    words = ["two-by-two", str(corpus), "-o", str(tmp_path / "tables"), "--work", str(tmp_path / "work"), "--seed", "5",
             "--steps", "2", "--max-new-tokens", "4", "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(training.app, words)
    assert result.exit_code == 0, result.output
    kept = sorted(path.name for path in (tmp_path / "tables").iterdir())
    assert kept == ["two_by_two.json", "two_by_two_exits.csv", "two_by_two_layers.csv"]
    layers = pd.read_csv(tmp_path / "tables" / "two_by_two_layers.csv")
    depth = json.loads((tmp_path / "tables" / "two_by_two.json").read_text())["shape"]["depth"]
    assert len(layers) == 4 * 2 * (depth + 1)  # models, texts, layers
    assert layers.groupby(["tied", "layerskip", "text"]).size().nunique() == 1
    folder, traces = str(shared / "with 2 x 2"), str(shared / "traces")
    result = CliRunner().invoke(
        command("03_tied_or_untied"),
        [str(tiny_folder), "-o", folder, "--traces", traces, "--prompts", "4", "--max-new-tokens", "10", "--no-heads",
         "--two-by-two", str(tmp_path / "tables")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    table = pd.read_csv(Path(folder) / "03_tied_or_untied.csv")
    effects = table[(table["part"] == "two by two") & (table["model"] == "effect")]
    assert set(effects["factor"]) == {"tying", "training", "interaction"}


# ------------------------------------------------------------------------------------------ what the docs claim
def sources() -> dict[str, dict[str, str]]:
    """What each marker of the page's text stands for: table, row, format."""
    return {row["marker"]: row for row in pd.read_csv(FINDINGS_SOURCES, dtype=str).to_dict("records")}


def claims() -> list[tuple[str, str]]:
    """(marker, what the page prints in its place), in the page's order.

    The page is its text with the markers filled in, so that what stands between them finds each figure.
    """
    between = MARKER.split(FINDINGS_TEXT.read_text(encoding="utf-8"))
    pattern = "(.{1,40}?)".join(re.escape(part) for part in between[::2])
    found = re.fullmatch(pattern, FINDINGS.read_text(encoding="utf-8"))
    return list(zip(between[1::2], found.groups(), strict=True)) if found else []


def recomputed(source: dict[str, str]) -> list[float]:
    """What the kept table holds for a claim: one row; its value, and the ends of its interval where they are shown."""
    table = pd.read_csv(KEPT / f"{source['table']}.csv", dtype={"layers": str})
    for condition in source["row"].split("; "):
        key, wanted = condition.split("=", 1)
        column = table[key]
        sought: str | float = float(wanted) if pd.api.types.is_numeric_dtype(column) else wanted
        table = table[column == sought]
    assert len(table) == 1, f"{source} names {len(table)} rows"
    columns = ("value", "low", "high") if "[" in source["format"] else ("value",)
    return [float(table[column].iloc[0]) for column in columns]


@pytest.mark.parametrize(
    ("marker", "printed"), claims(), ids=[f"{at} {marker}" for at, (marker, _) in enumerate(claims())]
)
def test_a_claim_is_what_its_table_holds(marker, printed):
    """Each number of a figure, at its printed precision; with a % sign, in hundredths."""
    source = sources()[marker]
    values = recomputed(source)
    assert NUMBER.sub("0", printed) == NUMBER.sub("0", source["format"])
    written = NUMBER.findall(printed)
    shown = []
    for number, value in zip(written, values, strict=True):
        places = len(number.partition(".")[2])
        shown.append(f"{100 * value if '%' in printed else value:.{places}f}")
    assert [text.replace("-0.0", "0.0") if float(text) == 0 else text for text in shown] == written


def test_the_findings_page_is_its_text_with_the_figures_filled_in():
    page = runpy.run_path(str(ROOT / "docs" / "tools" / "findings.py"))["page"]
    assert FINDINGS.read_text(encoding="utf-8") == page(), "make it again: `python docs/tools/findings.py`"
    assert {marker for marker, _ in claims()} == set(sources()), "every marker has a source, every source is used"


KEPT_WITH = {
    "": (["tales-untied", "tales-tied", "tales-layerskip"], 24, 96),
    "smollm2": (["SmolLM2-135M-Instruct.Q4_1.gguf"], 24, 48),
    "measured": (["tales-untied", "tales-tied", "tales-layerskip"], 24, 96),
    "measured/smollm2": (["SmolLM2-135M-Instruct.Q4_1.gguf"], 24, 48),
    "real": (
        ["SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m.Q4_K_M.gguf", "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf"],
        24,
        48,
    ),
    "probing": (["tales-untied", "tales-tied", "tales-layerskip"], 24, 96),
    "probing/smollm2": (["SmolLM2-135M-Instruct.Q4_1.gguf"], 24, 48),
    "probing/qwen": (["Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf"], 24, 32),
    "probing/gemma": (["gemma-3-270m.Q4_K_M.gguf"], 24, 32),
    "probing/together": (["tales-untied", "tales-tied", "tales-layerskip", "SmolLM2-135M-Instruct.Q4_1.gguf"], 24, 48),
}
KEPT_ANALYSES = {
    "measured": ("05", "06"), "measured/smollm2": ("05", "06"), "real": ("01", "07"),
    "probing": ("08", "09", "10", "12"),
    "probing/smollm2": ("08", "09", "10", "12"), "probing/qwen": ("08",), "probing/gemma": ("08",),
    "probing/together": ("11",),
}  # fmt: skip


@pytest.mark.parametrize("folder", KEPT_WITH)
def test_kept_tables_were_made_as_the_findings_say(folder):
    """The models, prompts and tokens under "What was read"; costs measured where the folder says so."""
    records = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((KEPT / folder).glob("[0-9][0-9]_*.json"))
    ]
    names = [record["analysis"] for record in records]
    kept = KEPT_ANALYSES.get(folder, ("01", "02", "03", "04", "05", "06"))
    assert names == [name for name in NUMBERED if name[:2] in kept]
    for record in records:
        settings = record["settings"]
        assert (settings["models"], settings["prompts"], settings["max_new_tokens"]) == KEPT_WITH[folder]
        if record["analysis"][:2] in ("05", "06"):
            assert settings["costs"] == ("measured" if "measured" in folder else "roofline")


def test_the_kept_two_by_two_is_the_one_described():
    record = json.loads((KEPT / "two_by_two.json").read_text(encoding="utf-8"))
    shape, text = record["shape"], FINDINGS.read_text(encoding="utf-8")
    said = f"({shape['depth']} layers of width {shape['width']}, {shape['vocabulary']} tokens, {record['steps']} steps;"
    assert said in text
    assert record["seeds"] == [1, 2, 3]
    assert len(pd.read_csv(KEPT / "two_by_two_layers.csv")[["seed", "tied", "layerskip"]].drop_duplicates()) == 12


def test_every_figure_in_the_findings_is_claimed():
    """In the page's text, outside of code, no decimal number and no percentage is written by hand: all are markers."""
    text = re.sub(r"```.*?```", "", FINDINGS_TEXT.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", "", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    left = re.findall(r"\d+\.\d+|\d+ ?%", re.sub(r"\b(95|2) %", "", MARKER.sub("", text)))
    assert left == []
    assert len(claims()) >= 390
