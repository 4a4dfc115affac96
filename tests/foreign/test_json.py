"""JSON from outside: read within bounds, refused in one line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probekit.errors import InputError
from probekit.foreign import text
from probekit.foreign.json import parse_json, read_json, read_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@given(VALUES)
def test_what_json_wrote_is_read(value):
    assert parse_json(json.dumps(value), "it") == value
    assert parse_json(json.dumps(value, ensure_ascii=False), "it") == value


@pytest.mark.parametrize("sign", ["[", '{"a":'])
def test_ten_thousand_levels_are_one_line(sign):
    with pytest.raises(InputError, match="nested more than 100 levels deep"):
        parse_json(sign * 10_000, "it")


def test_brackets_inside_strings_are_no_nesting():
    assert parse_json(json.dumps(["[" * 500, '"' + "{" * 500 + "\\"]), "it") == ["[" * 500, '"' + "{" * 500 + "\\"]
    assert parse_json("[" * 100 + "]" * 100, "it") is not None


def test_files(tmp_path, monkeypatch):
    path = tmp_path / "it.json"
    with pytest.raises(InputError, match=r"it\.json cannot be read"):
        read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="cannot be read: 'utf-8'"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read: Expecting"):
        read_json(path)
    path.write_text("[1]")
    assert read_json(path) == [1]
    with pytest.raises(InputError, match="it holds a list, not an object"):
        read_object(path)
    monkeypatch.setattr(text, "MOST_BYTES", 2)
    with pytest.raises(InputError, match="it has 3 bytes; at most 2 are read"):
        read_json(path)
