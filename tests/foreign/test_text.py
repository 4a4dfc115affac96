"""Text from strangers: whole files only, no half characters, nothing that steers a terminal."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probekit.cli.app import run
from probekit.errors import InputError
from probekit.foreign import text
from probekit.foreign.json import loads
from probekit.tracing.prompts import as_prompts, load_prompts

ANY = st.text(st.characters(exclude_categories=()))


@given(ANY)
def test_printable_text_can_be_encoded_and_steers_nothing(said):
    shown = text.printable(said)
    shown.encode("utf-8")
    assert not set(shown) & {"\x1b", "\x9b", "\x07", "\r", "\u202e"}
    document = json.dumps({said: [said]}, ensure_ascii=False)
    assert json.loads(text.ascii_escapes(document)) == json.loads(document)


@pytest.mark.parametrize("where", ["prompt", "response", "kind", "messages"])
def test_half_a_surrogate_pair(where):
    half = "a\ud800b"
    record = {"prompt": "abc", where: [{"role": "user", "content": half}] if where == "messages" else half}
    with pytest.raises(InputError, match=r"U\+D800"):
        as_prompts([record])
    with pytest.raises(ValueError, match=r"U\+D800"):
        loads(json.dumps(record))


def test_a_pair_in_escapes_is_text():
    assert loads('{"prompt": "\\ud83d\\ude00"}') == {"prompt": "\U0001f600"}


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("pipe.txt", "zero.txt"):
        with pytest.raises(InputError, match="no regular file"):
            load_prompts(tmp_path / name)


def test_texts_are_bounded_before_they_are_encoded(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("a" * 50_000_000)
    with pytest.raises(InputError, match="50,000,000 characters"):
        load_prompts(path)


def test_a_field_of_a_table_may_be_long(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text(f"prompt\n{'a' * 200_000}\n")
    assert len(load_prompts(path)[0].text) == 200_000
    path.write_text("a" * 5_000_000 + "\n")
    with pytest.raises(InputError, match="field larger"):
        load_prompts(path)


def test_bytes_in_a_parquet_file_that_are_no_text(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"prompt": bad}), tmp_path / "prompts.parquet")
    with pytest.raises(InputError, match="row 0"):
        load_prompts(tmp_path / "prompts.parquet")


@pytest.mark.parametrize("words", [["inspect", "\x1b]0;owned\x07\x1b[2J"], ["inspect", "\udcff"], ["\x1b[31m"]])
def test_the_command_line_shows_escape_codes_as_text(capsys, words):
    assert run(words) == 2
    assert run([*words, "--json"]) == 2
    captured = capsys.readouterr()
    captured.err.encode("utf-8")
    assert "\x1b" not in captured.err + captured.out and "\x07" not in captured.err + captured.out
    assert json.loads(captured.out)["error"]
