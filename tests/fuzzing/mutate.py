"""Seeded mutations of bytes, JSON and tables: what strangers and accidents make of a file."""

from __future__ import annotations

import copy
import io
import json
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SIGNS = [
    b"\0", b"\x1b[31m", b"\x1b]0;x\x07", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"\r\n",
    b"\n\n",
    b'"', b"'", b"\\", b"{", b"[" * 300, b"{" * 10_000, b"1e999", b"-1", b"9" * 5000, b"NaN", b"null", b",", b"\t",
    b" " * 100,
    b"\\ud800", b"\\u0000", b"{{", b"%s", b"../../etc/passwd", "\u202e".encode(), b"a" * 20_000,
]  # fmt: skip


def hostile(random: Random) -> Any:
    """A value that no field expects."""
    deep: Any = []
    for _ in range(random.choice([3, 60, 200])):
        deep = [deep]
    return random.choice([
        None, True, False, -1, 0, 1, 2, 7, 1.5, -0.5, 1e-300, 1e30, 1e308, float("nan"), float("inf"), -float("inf"),
        2**31 - 1,
        2**31, 2**53, 2**63, -(2**63), 2**64, 10**30, 10**400, "", " ", "x", "nan", "1", "a" * 5000, "\x1b[31mred",
        "\x1b]0;t\x07",
        "\ud800", "\0", "\u202eabc", "../x", "/etc/passwd", "/dev/zero", "CON", "{{ 7 }}", "<script>", "%n", "\n", [],
        {}, [[]],
        [None], [1, "x"], {"a": {}}, deep, list(range(2000)), {str(number): number for number in range(500)},
        "float32", "llama", ["LlamaForCausalLM"], [0], [-1], [2**40], {"0": 1},
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ bytes
def of_bytes(random: Random, content: bytes, times: int | None = None) -> bytes:
    """Some bytes flipped, cut out, doubled, put in."""
    made = bytearray(content)
    for _ in range(times or random.choice([1, 1, 2, 3, 8])):
        at = random.randrange(len(made) + 1)
        length = random.choice([1, 1, 2, 4, 8, 64, len(made) // 2 + 1])
        action = random.randrange(7)
        if action == 0 and at < len(made):
            made[at] ^= 1 << random.randrange(8)
        elif action == 1:
            del made[at : at + length]
        elif action == 2:
            made[at:at] = made[at : at + length] * random.choice([1, 2, 50])
        elif action == 3:
            made[at:at] = random.choice(SIGNS)
        elif action == 4:
            del made[at:]
        elif action == 5 and at < len(made):
            made[at : at + length] = random.randbytes(min(length, 64))
        elif at + 8 <= len(made):
            made[at : at + 8] = random.choice([2**63, 2**40, 0, 2**32 - 1, 2**64 - 1]).to_bytes(8, "little")
    return bytes(made[: 4 * 2**20])


# ------------------------------------------------------------------------------------------------------------- JSON
def of_json(random: Random, document: Any) -> bytes:
    """Values replaced, keys lost, added and renamed; now and then the text itself is damaged."""
    made = json.loads(json.dumps(document))
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        made = _changed(random, made)
    text = json.dumps(made, ensure_ascii=random.random() < 0.7)
    if random.random() < 0.03:
        text = "[" * 20_000 if random.random() < 0.5 else '{"a":' * 20_000
    content = text.encode("utf-8", "surrogatepass")
    return of_bytes(random, content) if random.random() < 0.25 else content


def _changed(random: Random, document: Any) -> Any:
    places = list(_places(document))
    if not places or random.random() < 0.03:
        return hostile(random)
    holder, key = random.choice(places)
    action = random.randrange(8)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[random.choice(["x", "", "\ud800", "\x1b[31m", "schema", "a" * 300])] = holder.pop(key)
    elif action == 2 and isinstance(holder, list):
        holder.extend([copy.deepcopy(holder[key])] * random.choice([1, 3, 200]))
    elif action == 3 and isinstance(holder[key], (int, float)):
        holder[key] = random.choice(
            [
                -holder[key],
                holder[key] + 1,
                holder[key] * 10**6,
                holder[key] + (0.5 if abs(holder[key]) < 2**1000 else 2),
                str(holder[key]),
            ]
        )
    elif action == 4:
        other, place = random.choice(places)
        found = other.get(place) if isinstance(other, dict) else other[place] if place < len(other) else None
        holder[key] = copy.deepcopy(found)
    else:
        holder[key] = hostile(random)
    return document


def _places(document: Any):
    """(holder, key) of every value."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield document, key
            yield from _places(value)
    elif isinstance(document, list):
        for place, value in enumerate(document[:50]):
            yield document, place
            yield from _places(value)


# ------------------------------------------------------------------------------------------------------------ tables
KINDS = [
    pa.int8(), pa.uint8(), pa.int16(), pa.int32(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(),
    pa.bool_(),
    pa.string(), pa.large_string(), pa.binary(), pa.null(), pa.timestamp("us"), pa.decimal128(20, 2),
    pa.list_(pa.int32()),
    pa.dictionary(pa.int8(), pa.string()), pa.struct([("a", pa.int32())]),
]  # fmt: skip


def of_table(random: Random, table: pa.Table) -> bytes:
    """Columns of another kind, nulls, numbers out of range, rows lost and doubled; now and then damaged bytes."""
    for _ in range(random.choice([1, 1, 2, 3])):
        table = _changed_table(random, table)
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink, compression=random.choice(["zstd", "none", "snappy"]),
                       row_group_size=random.choice([1, 7, 10_000]), use_dictionary=random.random() < 0.5)  # fmt: skip
    except (pa.ArrowException, NotImplementedError, ValueError):
        return b"PAR1"
    content = sink.getvalue()
    return of_bytes(random, content) if random.random() < 0.3 else content


def _changed_table(random: Random, table: pa.Table) -> pa.Table:
    if not table.num_columns:
        return table
    place = random.randrange(table.num_columns)
    name, column = table.column_names[place], table.column(place)
    action = random.randrange(9)
    try:
        if action == 0:
            return table.remove_column(place)
        if action == 1:
            return table.rename_columns([*table.column_names[:place], random.choice(["x", "prompt", "\x1b[31m", ""]),
                                         *table.column_names[place + 1 :]])  # fmt: skip
        if action == 2:
            return table.slice(random.randrange(table.num_rows + 1), random.choice([0, 1, 5, table.num_rows]))
        if action == 3:
            return pa.concat_tables([table, table.slice(0, random.choice([1, 3]))])
        if action == 4:
            return table.append_column(random.choice(["extra", name, "response", "messages"]), column)
        if action == 5:
            return table.set_column(place, name, column.cast(random.choice(KINDS), safe=False))
        if action == 6:
            return table.set_column(place, name, _not_text(random, table.num_rows))
        values = column.to_pylist()
        for _ in range(random.choice([1, 1, 5])):
            if values:
                values[random.randrange(len(values))] = random.choice(
                    [None, -1, 0, 2**31 - 1, -(2**31), 1e30, float("nan"), float("inf"), "x", "\x1b[31m", ""]
                )
        return table.set_column(place, name, pa.array(values, column.type, from_pandas=random.random() < 0.5))
    except (pa.ArrowException, OverflowError, TypeError, ValueError, NotImplementedError):
        return table


def _not_text(random: Random, rows: int) -> pa.Array:
    """Strings whose bytes are no UTF-8."""
    pieces = [random.choice([b"\xff", b"\xed\xa0\x80", b"ab", b"\x1b[31m"]) for _ in range(rows)]
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    offsets = pa.array(ends, pa.int32()).buffers()[1]
    return pa.Array.from_buffers(pa.string(), rows, [None, offsets, pa.py_buffer(b"".join(pieces))])
