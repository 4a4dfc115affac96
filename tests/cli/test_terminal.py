"""What reaches the terminal: folded, coloured, harmless; what reaches a file: the text and the numbers as they are."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from presentation.fabricate_study import fabricate_trace
from rich.console import Console

from probekit.cli import decode as running
from probekit.cli import lens as looking
from probekit.cli import terminal
from probekit.presentation.tables import LensTable, lens_table
from probekit.presentation.tokens import columns

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture
def window(monkeypatch):
    """`window(width)` stands a terminal of that width in for standard output; its `file` holds what was written."""

    def open_window(width: int, is_terminal: bool = True) -> Console:
        console = Console(file=io.StringIO(), width=width, force_terminal=is_terminal, highlight=False,
                          color_system="256" if is_terminal else "auto")  # fmt: skip
        for room in (looking, running, terminal):
            monkeypatch.setattr(room, "out", console)
        return console

    return open_window


def written(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


# -- JSON
def test_json_keeps_numbers_lists_and_text(capsys):
    document = {
        "interval": (0.25, np.float64(0.5)), "whole": np.int64(3), "flag": np.bool_(True), "text": "␣王", "none": None,
        "nan": float("nan"), "deep": [{"infinite": -np.inf}], 4: [1, 2],
    }  # fmt: skip
    terminal.print_json(document)
    printed = capsys.readouterr().out
    assert printed.endswith("\n")
    assert json.loads(printed) == {
        "interval": [0.25, 0.5], "whole": 3, "flag": True, "text": "␣王", "none": None, "nan": None,
        "deep": [{"infinite": None}], "4": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (float("nan"), "-"), (True, "yes"), (0.12345, "0.123"), (1234567, "1,234,567"),
     ([0.5, 0.75], "[0.50, 0.75]"), ((1, 2, 3), "1 2 3"), ([], ""), ("[bold]x", "[bold]x")],
)  # fmt: skip
def test_show(value, shown):
    assert terminal.show(value) == shown


# -- the lens table
@pytest.fixture(scope="module")
def table():
    return lens_table(fabricate_trace("tales-tied", depth=4, prompts=1, tokens=16, seed=3), 0)


@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_the_lens_table_folds_to_the_window(window, table: LensTable, width):
    console = window(width)
    looking._print_lens(table)
    lines = [ESCAPES.sub("", line) for line in written(console).splitlines()]
    assert max(columns(line) for line in lines) <= width
    rows = [line for line in lines if re.match(r"(model|layer) +\d+ ", line)]
    folds = sum(line.lstrip().startswith("reads ") for line in lines)
    assert len(rows) == 5 * folds, "no row runs over into a second line"
    assert [row.split()[:2] for row in rows[:5]] == [["model", "4"], *(["layer", str(layer)] for layer in (3, 2, 1, 0))]
    assert (folds > 1) == (width < 80), "eight positions of at most 12 columns each"


def test_the_lens_table_is_coloured_by_probability_and_grey_in_the_prompt(window, table: LensTable):
    console = window(200)
    looking._print_lens(table)
    lines = written(console).splitlines()
    first = table.generated.index(True)
    assert lines[1].count("48;5;236m") >= 1  # the prompt's ground
    shades = {looking._shade(probability, True) for probability in (0.0, 0.3, 0.5, 0.7, 1.0)}
    assert len(shades) == 5
    assert first > 0


def test_the_lens_table_has_no_colour_in_a_file(window, table: LensTable):
    console = window(80, is_terminal=False)
    looking._print_lens(table)
    assert "\x1b" not in written(console)


# -- tables
@pytest.mark.parametrize("width", [44, 60, 80, 140])
def test_a_wide_table_folds_and_cuts_nothing(window, width):
    console = window(width)
    heads = ["drafts at", "length", "speedup predicted", "95 %", "measured", "tokens per round", "parameters"]
    rows = [[f"layer {each}", each, 1.2345, [0.5, 10.25], None, 22.5, 3_263_616 + each] for each in range(3)]
    terminal.print_table("a title", heads, rows, "a note", keys=2)
    lines = [ESCAPES.sub("", line) for line in written(console).splitlines()]
    assert max(columns(line) for line in lines) <= width
    text = "\n".join(lines)
    for each in range(3):
        assert text.count(f"layer {each} ") == text.count("drafts")
        assert f"{3_263_616 + each:,}" in text
    for word in " ".join(heads).split():
        assert word in text, "a heading folds between words only"
    intervals = [line for line in lines if "[0.50, 10.25]" in line]
    assert len(intervals) == 3
    assert all("1.2345"[:5] in line for line in intervals), "an interval stays with its figure"
    assert (text.count("drafts") == 1) == (width >= 80)


# -- decoding as it streams
def test_a_file_gets_the_text_as_it_is(window):
    console = window(20, is_terminal=False)
    text = "a\tb\r\n\x1b[31m[bold]c[/bold]" + 30 * "x"
    running._stream(text, "accepted")
    assert written(console) == text


def test_a_terminal_shows_which_drafts_were_accepted(window):
    console = window(20)
    running._stream("once", "accepted")
    running._stream(" upon", "bonus")
    marked, plain = written(console).split("once")
    assert "\x1b[4" in marked
    assert "\x1b[4" not in plain
    assert plain.endswith(" upon")


def test_a_text_does_not_steer_the_terminal(window):
    console = window(40)
    running._stream("\x1b]0;owned\x07\u202e[red]x", "bonus")
    assert written(console) == "⟨001B⟩]0;owned⟨0007⟩⟨202E⟩[red]x"


# -- progress
def progress(monkeypatch, width: int, is_terminal: bool, quiet: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=is_terminal, highlight=False)
    monkeypatch.setattr(terminal, "err", console)
    with terminal.progress_bars(quiet) as bars:
        bars("reading [layers]", 1, 2, tokens_per_second=53.6)
        bars("reading [layers]", 2, 2, tokens_per_second=54.25)
    return ESCAPES.sub("", written(console))


def test_progress_has_time_left_and_keeps_to_a_line(monkeypatch):
    drawn = progress(monkeypatch, 80, True)
    last = drawn.replace("\r", "\n").strip().splitlines()[-1]
    for words in ("reading [layers]", "2/2", "took 0:00:0"):
        assert words in last
    assert "tokens per second 54.2" in progress(monkeypatch, 120, True)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_the_time_left_is_never_cut(monkeypatch, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, highlight=False)
    monkeypatch.setattr(terminal, "err", console)
    with terminal.progress_bars(False) as bars:
        bars("study", 3.5, 100.5, says="model 1 of 3, phase 3 of 9")
        bars("tales-layerskip: time the trace: continuing prompts", 1, 24, tokens_per_second=53.6, loss=3.25)
    drawn = ESCAPES.sub("", written(console)).replace("\r", "\n").strip().splitlines()
    for line in drawn[-2:]:
        assert re.search(r"left \d:\d\d:\d\d", line), line
        assert len(line.rstrip()) <= width
    assert "model 1" in drawn[-2]


@pytest.mark.parametrize(("is_terminal", "quiet"), [(False, False), (True, True)])
def test_progress_is_quiet_where_nobody_watches(monkeypatch, is_terminal, quiet):
    assert progress(monkeypatch, 80, is_terminal, quiet).strip("\n") == ""
