"""Any text as LaTeX: it compiles, in every encoding, and says what the text says."""

from __future__ import annotations

import shutil
import subprocess

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probekit.presentation.latex import to_latex
from probekit.presentation.tex_text import tex_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b & 5 % #1", r"a\_b \& 5 \% \#1"),
        (r"\input{x}", r"\textbackslash{}input\{x\}"),
        ("a -- b", "a -{}- b"),
        ("``x''", "`{}`x'{}'"),
        ("[x] *", "{[}x{]} {*}"),
        ('say "x"', r"say {\char34}x{\char34}"),
        ("ça, Ünï", r"\c{c}a, \"{U}n\"{\i}"),
        ("naïve", r"na\"{\i}ve"),
        ("␣王", r"\textvisiblespace{}$\langle$738B$\rangle$"),
        ("α", r"$\langle$03B1$\rangle$"),
        ("two\nlines", r"two$\hookleftarrow$lines"),
        ("", ""),
        ("  ", "  "),
    ],
)
def test_it_is_escaped(text, expected):
    assert tex_text(text) == expected


@given(st.text())
def test_it_is_ascii_and_balanced(text):
    found = tex_text(text)
    assert found.isascii()
    bare = found.replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}")
    assert found.replace(r"\$", "").count("$") % 2 == 0
    assert "\n" not in found
    assert all(sign not in found.replace(f"\\{sign}", "") for sign in "%#&")


@pytest.mark.second
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
@pytest.mark.parametrize("encoding", ["OT1", "T1"])
@pytest.mark.parametrize("columns", ["onecolumn", "twocolumn"])
def test_every_character_compiles(tmp_path, encoding, columns):
    """Names and tokens of every kind, at the beginning of a row, in captions, in short tables and in long ones."""
    strange = [
        chr(code) for code in (*range(1, 0x180), 0x2028, 0x202E, 0x3B1, 0x738B, 0x1F600, 0xFFFD, *range(0x2010, 0x2040))
    ]
    strange += ["[x]", "*", "--", "\\\\", "a & b", "?`!`", ",,", "␣king", "⟨0xE2⟩", "", "two words"]
    words = "".join(strange).replace("\n", "")
    frame = pd.DataFrame({"token": strange, "x": range(len(strange)), "x_low": 0.5, "x_high": 700.25})
    if columns == "twocolumn":
        frame = frame.iloc[-30:]
    (tmp_path / "table.tex").write_text(to_latex(frame, words, "tab:a_b"), encoding="utf-8")
    (tmp_path / "paper.tex").write_text(
        rf"\documentclass[{columns}]{{article}}\usepackage[{encoding}]{{fontenc}}\usepackage{{booktabs,siunitx,longtable}}"
        r"\begin{document}\input{table}\end{document}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in done.stdout
