"""The paper's figures: from a study folder to files that are the same each time, or one clear line."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import typer
from presentation.fabricate_study import fabricate_study
from typer.testing import CliRunner

from figures import making
from probekit.cli.app import run as probekit
from probekit.errors import InputError
from probekit.presentation.paper.figures import FIGURES
from probekit.presentation.paper.look import PAGE, Look, Page, kinds_of
from probekit.presentation.paper.printed_tables import PRINTED
from probekit.presentation.paper.way_figures import NO_ORACLE
from probekit.presentation.study_folder import TABLES, open_study

pytestmark = pytest.mark.second

ROOT = Path(__file__).parent.parent
NAMES = making.names()

app = typer.Typer()
app.command()(making.command_for(making.scripts(), "Every figure and table of a study."))
HAS_TEX = shutil.which("pdflatex") is not None


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("figures") / "study"
    return fabricate_study(folder, ("tales-untied", "tales-layerskip"), depth=4, prompts=4, tokens=12,
                           draft_lengths=(1, 3), drafter=True, attributed=2, probed=True)  # fmt: skip


@pytest.fixture
def damaged(study, tmp_path) -> Path:
    return Path(shutil.copytree(study, tmp_path / "study", ignore=shutil.ignore_patterns("paper")))


def refused(result, *words: str) -> None:
    """One clear line on standard error, exit status 2, nothing else."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line = result.stderr.strip()
    assert line.startswith("error: ")
    assert "\n" not in line
    for word in words:
        assert word in line


# -- what is made
@pytest.fixture(scope="module")
def made(study):
    result = run("--study", study)
    assert result.exit_code == 0, result.output
    return study / "paper", result


def test_there_are_thirteen():
    assert [name[:5] for name in NAMES] == [f"fig{number:02}" for number in range(1, 14)]


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_comes_in_three_kinds(made, name):
    paper, result = made
    for kind, magic in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
        path = paper / f"{name}.{kind}"
        assert path.read_bytes().startswith(magic)
        assert str(path) in result.stdout


@pytest.mark.parametrize("name", NAMES)
def test_figures_fit_a_column_or_two(made, name):
    svg = (made[0] / f"{name}.svg").read_text(encoding="utf-8")
    width, height = (float(number) / 72 for number in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    assert width == pytest.approx(PAGE.column) or width == pytest.approx(PAGE.text)
    assert height <= PAGE.height


@pytest.mark.parametrize("name", NAMES)
def test_files_carry_no_date_and_their_fonts(made, name):
    pdf = (made[0] / f"{name}.pdf").read_bytes()
    assert b"CreationDate" not in pdf
    assert b"/FontFile2" in pdf  # TrueType, inside
    assert b"/Type3" not in pdf
    svg = (made[0] / f"{name}.svg").read_text(encoding="utf-8")
    assert "<dc:date>" not in svg
    assert "<text" not in svg  # letters are paths: nothing depends on the reader's fonts


def test_the_same_study_gives_the_same_bytes(made, study, tmp_path):
    for name in ("fig01", "fig02"):
        assert run("--study", study, "--only", name, "-o", tmp_path).exit_code == 0
    again = sorted(tmp_path.iterdir())
    assert len(again) == 6
    for path in again:
        assert path.read_bytes() == (made[0] / path.name).read_bytes()


@pytest.mark.parametrize("table", TABLES)
def test_every_table_comes_as_latex(made, table):
    latex = (made[0] / "tables" / f"{table}.tex").read_text(encoding="utf-8")
    assert r"\toprule" in latex
    assert rf"\label{{tab:{table.replace('_', '-')}}}" in latex
    assert "tales-untied" in latex
    assert r"\textbackslash" not in latex
    rows = [line for line in latex.splitlines() if line.startswith("tales-")]
    intervals = latex.count(r"\multicolumn{2}{c}") // (2 if "longtable" in latex else 1)
    assert {row.count("&") for row in rows} == {len(PRINTED[table].columns) - 1 + intervals}
    assert "S[table-format=" in latex


def compiled(tmp_path: Path, paper: Path, options: str = "", text_width: str = "6.9in", tables: bool = True) -> str:
    """What LaTeX says of a document that holds all figures and tables of a folder."""
    (tmp_path / "paper.tex").write_text(
        rf"\documentclass[{options}]{{article}}\usepackage[textwidth={text_width},textheight=9.6in]{{geometry}}"
        r"\usepackage{graphicx,pgf,booktabs,siunitx,longtable,import}\begin{document}"
        r"Figures~\ref{fig:lens-table} to~\ref{fig:trace-and-sweep}, Tables~\ref{tab:layers} to~\ref{tab:costs}."
        rf"\import{{{paper}/}}{{figures}}"
        + (rf"\import{{{paper}/}}{{tables}}\end{{document}}" if tables else r"\end{document}")
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    for _ in range(2):  # labels are known to the second run
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=300)
        assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


@pytest.mark.skipif(not HAS_TEX, reason="needs pdflatex")
@pytest.mark.parametrize("options", ["", "twocolumn", "a4paper,11pt"])
def test_a_paper_with_everything_compiles(made, tmp_path, options):
    said = compiled(tmp_path, made[0], options)
    assert "Overfull \\hbox" not in said, "a table or a figure is wider than a page"
    assert "undefined" not in said
    assert "multiply defined" not in said


@pytest.mark.skipif(not HAS_TEX, reason="needs pdflatex")
def test_a_paper_with_pgf_pictures_compiles(study, tmp_path):
    paper = tmp_path / "paper of 5 in"
    result = run("--study", study, "-o", paper, "--format", "pgf", "--width", "5in")
    assert result.exit_code == 0, result.output
    assert sorted(path.suffix for path in paper.glob("fig0*")) == [".pgf"] * 9
    folder = tmp_path / "paper"
    paper.rename(folder)
    said = compiled(tmp_path, folder, text_width="5in")
    assert "Overfull \\hbox" not in said
    assert "intervals" not in (folder / "tables" / "cells.tex").read_text(), (
        "no intervals on a narrow page, and no word of them"
    )


@pytest.mark.skipif(not HAS_TEX, reason="needs pdflatex")
def test_tables_fit_a_conference_page(study, tmp_path):
    result = run("--study", study, "-o", tmp_path / "paper", "--format", "pdf", "--width", "5.5in")
    assert result.exit_code == 0, result.output
    assert "Overfull \\hbox" not in compiled(tmp_path, tmp_path / "paper", text_width="5.5in")
    assert "intervals" in (tmp_path / "paper" / "tables" / "layers.tex").read_text()


@pytest.mark.skipif(shutil.which("latex") is None or shutil.which("dvipng") is None, reason="needs latex and dvipng")
def test_latex_sets_the_labels(study, tmp_path):
    result = run(
        "--study", study, "-o", tmp_path, "--only", "fig04", "--only", "fig06", "--usetex", "--format", "pdf,png"
    )
    assert result.exit_code == 0, result.output
    assert (
        b"CMR" in (tmp_path / "fig06_speedup.pdf").read_bytes().upper()
        or b"SFRM" in (tmp_path / "fig06_speedup.pdf").read_bytes()
    )


@pytest.mark.skipif(not HAS_TEX, reason="needs pdflatex")
def test_a_narrow_text_is_said_and_figures_stay_within_it(made, tmp_path):
    log = compiled(tmp_path, made[0], text_width="5.5in", tables=False)
    assert "Overfull \\hbox" not in log
    assert "--width 397.4" in log.replace("\n", "")
    assert "made for a text" not in compiled(tmp_path, made[0])


def test_figures_have_captions_and_alternative_texts(made):
    latex = (made[0] / "figures.tex").read_text(encoding="utf-8")
    assert latex.isascii()
    assert (
        latex.count(r"\includegraphics[alt={")
        == latex.count(r"\caption{")
        == latex.count(r"\label{fig:")
        == len(FIGURES)
    )
    alts = re.findall(r"alt=\{(.*?)\}\]\{fig", latex)
    assert all("tales-untied" in alt or "all on the diagonal" in alt for alt in alts)
    cells = open_study(made[0].parent).of("cells", "tales-untied")
    assert f"{cells['speedup'].max():.2f}" in alts[5]


@pytest.mark.parametrize("name", NAMES)
def test_captions_and_alternative_texts_are_sentences(study, name):
    opened = open_study(study)
    for text in (FIGURES[name].caption(opened), FIGURES[name].alt(opened)):
        assert text[0].isupper()
        assert text.endswith(".")
        assert "nan" not in text
        assert 40 < len(text) < 900


# -- the command
def test_the_command_draws_the_same(study, made, tmp_path, capsys):
    assert probekit(["figures", str(study), "-o", str(tmp_path), "--only", "fig02", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "probekit/figures/1"
    assert found["folder"] == str(tmp_path)
    assert [Path(file).name for file in found["files"]] == [f"fig02_agreement.{kind}" for kind in ("pdf", "svg", "png")]
    for file in found["files"]:
        assert Path(file).read_bytes() == (made[0] / Path(file).name).read_bytes()


def test_scripts_and_package_have_the_same_figures():
    assert list(FIGURES) == NAMES
    for name, figure in making.scripts().items():
        assert figure.caption is FIGURES[name].caption


def test_formats_and_widths(study, tmp_path):
    result = run(
        "--study", study, "-o", tmp_path, "--only", "fig02", "--format", "svg,pdf", "--format", "svg", "--width", "14cm"
    )
    assert result.exit_code == 0, result.output
    assert [Path(line).suffix for line in result.stdout.split()] == [".svg", ".pdf"]
    svg = (tmp_path / "fig02_agreement.svg").read_text(encoding="utf-8")
    assert float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1]) / 72 == pytest.approx(14 / 2.54, abs=1e-3)


def test_a_font_is_embedded(study, tmp_path):
    result = run("--study", study, "-o", tmp_path, "--only", "fig02", "--format", "pdf", "--font", "dejavu serif")
    assert result.exit_code == 0, result.output
    pdf = (tmp_path / "fig02_agreement.pdf").read_bytes()
    assert b"DejaVuSerif" in pdf
    assert b"DejaVuSans" not in pdf


@pytest.mark.parametrize("width", ["3in", "5.5in", "397pt", "14cm", "40in"])
def test_every_width_is_drawn_without_touching_labels(study, tmp_path, width):
    opened, page = open_study(study), Page.of(width)
    for name in ("fig05_acceptance", "fig06_speedup", "fig07_predicted_and_measured", "fig08_run_lengths",
                 "fig12_probes", "fig13_attribution"):  # fmt: skip
        with Look().worn():
            figure = FIGURES[name].draw(opened, page)
            figure.draw_without_rendering()
        assert figure.get_figwidth() in (page.text, page.column)
        for part in (figure, *figure.subfigs):
            assert all(legend.get_window_extent().x1 <= figure.bbox.x1 for legend in part.legends), (name, width)
        shown = [ax for ax in figure.axes if ax.get_visible() and ax.get_title(loc="left")]
        boxes = [ax.xaxis.label.get_window_extent() for ax in shown if ax.get_xlabel()]
        boxes += [ax._left_title.get_window_extent() for ax in shown]
        for place, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:place]), (name, width)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--format", "tiff", "the format is tiff; expected some of pdf, svg, png, pgf"),
        ("--width", "wide", "expected a width as 5.5in, 14cm or 397pt"),
        ("--width", "1in", "the width is 1 inches; expected 3 to 40"),
        ("--font", "Dejavu Sanz", "not installed. Near it: DejaVu Sans"),
        ("--font", "qqqqqqqqq", "not installed"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(damaged, option, value, words):
    refused(run("--study", damaged, option, value), words)
    assert not (damaged / "paper").exists()


def test_without_latex_it_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(InputError, match="--usetex needs latex and dvipng, not found"):
        Look(usetex=True)
    with pytest.raises(InputError, match="--format pgf needs pdflatex"):
        Look(kinds_of(["pgf"]))


@pytest.mark.skipif(not HAS_TEX, reason="needs pdflatex")
def test_a_font_that_latex_has_not_is_refused():
    with pytest.raises(InputError, match="a pgf picture has the document's letters"):
        Look(("pgf",), font="DejaVu Sans")
    with pytest.raises(InputError, match="with --usetex, expected serif"):
        Look(font="DejaVu Sans", usetex=True)


def test_a_study_of_sampled_text_has_its_figures(tmp_path):
    folder = fabricate_study(
        tmp_path / "sampled", ("tales-tied",), depth=3, prompts=4, tokens=8, draft_lengths=(2,), text="sampled"
    )
    for name in ("fig05", "fig06"):
        result = run("--study", folder, "--only", name, "--format", "pdf")
        assert result.exit_code == 0, result.output


def test_sampled_text_has_no_oracle_and_nobody_says_it_has(study, tmp_path):
    folder = fabricate_study(
        tmp_path / "sampled", ("tales-tied",), depth=3, prompts=4, tokens=8, draft_lengths=(2,), text="sampled"
    )
    sampled, greedy = open_study(folder), open_study(study)
    with Look().worn():
        figure = FIGURES["fig11_oracle_map"].draw(sampled, PAGE)
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == [NO_ORACLE], "why, and no colour bar"
    assert "sampled" in FIGURES["fig11_oracle_map"].caption(sampled)
    assert "upper bound" not in FIGURES["fig10_ladder"].caption(sampled)
    assert "upper bound" in FIGURES["fig10_ladder"].caption(greedy)


@pytest.mark.parametrize("name", ["fig05_acceptance", "fig06_speedup"])
def test_every_heat_map_has_its_numbers(study, name):
    script = importlib.import_module(f"figures.{name}")
    with Look().worn():
        figure = script.draw(open_study(study), PAGE)
    many = {len(ax.texts) for ax in figure.axes if ax.get_ylabel() == "exit layer E" or ax.get_title(loc="left")}
    assert many == {(3 + 1) * 2}, "three exits and a draft model, two draft lengths, in each panel"


def test_a_study_without_probes_does_without_their_figure(damaged, tmp_path):
    (damaged / "tables" / "probes.csv").unlink()
    (damaged / "tables" / "attribution.csv").write_text("model,prompt,position,term,logit\n")
    result = run("--study", damaged, "-o", tmp_path / "paper", "--format", "pdf")
    assert result.exit_code == 0, result.output
    assert sorted(path.stem for path in (tmp_path / "paper").glob("*.pdf")) == NAMES[:11]
    latex = (tmp_path / "paper" / "figures.tex").read_text(encoding="utf-8")
    assert "fig12" not in latex and "fig13" not in latex and "fig11" in latex
    refused(run("--study", damaged, "--only", "fig12"), "fig12_probes is drawn from tables/probes.csv", "--probes")
    refused(run("--study", damaged, "--only", "fig13"), "fig13_attribution", "tables/attribution.csv")


def test_the_text_that_is_attributed_is_the_one_of_the_lens_table(study):
    opened = open_study(study)
    with Look().worn():
        lens, written = (FIGURES[name].draw(opened, PAGE) for name in ("fig01_lens_table", "fig13_attribution"))
    tokens = [[label.get_text() for label in figure.axes[0].get_xticklabels()] for figure in (lens, written)]
    assert tokens[0] == tokens[1] and len(tokens[0]) > 8
    said = [text.get_text() for ax in written.axes for text in ax.texts]
    assert said == ["it is not known who wrote"] * 2, "of the last model it is not known"


def test_nothing_is_left_unfinished(made):
    assert not list(made[0].rglob("*.unfinished"))


def test_only_one(study, tmp_path):
    result = run("--study", study, "--only", "fig02", "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"fig02_agreement.{kind}" for kind in ("pdf", "png", "svg")
    ]


def test_a_script_runs_by_itself_and_without_torch(study, tmp_path):
    code = (
        "import runpy, sys; sys.argv = ['fig02', '--study', sys.argv[1], '--output', sys.argv[2]]\n"
        "try: runpy.run_module('figures.fig02_agreement', run_name='__main__')\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, study, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fig02_agreement.pdf").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_every_script_has_a_reason_and_can_run_alone(name):
    script = importlib.import_module(f"figures.{name}")
    assert script.__doc__
    assert "alone(__file__)" in Path(script.__file__).read_text(encoding="utf-8")


def test_a_study_of_one_model(tmp_path):
    folder = fabricate_study(tmp_path / "one", ("a_$model$",), depth=3, prompts=4, tokens=8, draft_lengths=(2,))
    for name in ("fig02", "fig05", "fig06", "fig08", "fig09"):
        result = run("--study", folder, "--only", name)
        assert result.exit_code == 0, result.output


def test_settings_of_matplotlib_come_back():
    before = matplotlib.rcParams["font.size"]
    with Look().worn():
        assert matplotlib.rcParams["font.size"] == 8.0
    assert matplotlib.rcParams["font.size"] == before


# -- what is refused
def test_a_folder_that_is_not_there(tmp_path):
    refused(run("--study", tmp_path / "none"), "none", "is not a folder")


def test_an_empty_folder(tmp_path):
    refused(run("--study", tmp_path), "is empty", "probekit study")


def test_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("hello")
    refused(run("--study", tmp_path), "holds other files")


def test_an_unfinished_study(damaged):
    (damaged / "summary.json").rename(damaged / "study.json")
    refused(run("--study", damaged), "is not finished")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[1]", "schema None"),
        ('{"schema": "other/2"}', "'other/2'; expected 'probekit/study/1'"),
        ('{"schema": "probekit/study/1", "models": []}', "names no model"),
        ('{"schema": "probekit/study/1", "models": [{"name": "m"}]}', "has no trace, choice, timings for 'm'"),
    ],
)
def test_a_foreign_summary(damaged, text, words):
    (damaged / "summary.json").write_text(text)
    refused(run("--study", damaged), words)


@pytest.mark.parametrize("table", TABLES)
def test_a_missing_table_is_found_before_anything_is_written(damaged, table):
    (damaged / "tables" / f"{table}.csv").unlink()
    refused(run("--study", damaged), f"no tables/{table}.csv")
    assert not (damaged / "paper").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "cannot be read"), ("a,b\n1,2\n", "has no column model"), ("{header}\n", "says nothing of tales-")],
)
def test_a_table_of_something_else(damaged, content, words):
    path = damaged / "tables" / "layers.csv"
    header = path.read_text().splitlines()[0]
    path.write_text(content.replace("{header}", header))
    refused(run("--study", damaged, "--only", "fig02"), words)
    assert not (damaged / "paper").exists()


def test_a_missing_trace(damaged):
    shutil.rmtree(damaged / "traces" / "tales-untied")
    refused(run("--study", damaged), "tales-untied")
    assert not (damaged / "paper").exists()


def test_only_needs_only_its_own(damaged):
    (damaged / "tables" / "cells.csv").unlink()
    assert run("--study", damaged, "--only", "fig02").exit_code == 0


def test_an_unknown_figure(study):
    refused(run("--study", study, "--only", "fig77"), "no figure 'fig77'", "fig01_lens_table")


def test_labels_stand_for_names(damaged):
    summary = json.loads((damaged / "summary.json").read_text())
    summary["models"][0]["label"] = "untied"
    (damaged / "summary.json").write_text(json.dumps(summary))
    opened = open_study(damaged)
    assert set(opened.table("layers")["model"]) == {"untied", "tales-layerskip"}
    assert len(opened.of("cells", "tales-untied")) == 8
