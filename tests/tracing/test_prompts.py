from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import probekit
from probekit.errors import InputError
from probekit.foreign import prompt_files
from probekit.tracing import prompt_store
from probekit.tracing.prompt_store import PromptStore
from probekit.tracing.prompts import (
    BUNDLED_SETS,
    Encoded,
    Prompt,
    as_prompts,
    bundled_prompts,
    bundled_prompts_for,
    each_prompt,
    encode,
    load_prompts,
    stream_prompts,
)


class Letters:
    """A tokenizer of letters that merges "ab", begins each text with id 0, and has a chat template."""

    chat_template = "yes"
    vocabulary = ("^", "ab", *"abcdefghijklmnopqrstuvwxyz<>/ ")

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        pieces = text.replace("ab", "\0")
        ids = [1 if piece == "\0" else self.vocabulary.index(piece) for piece in pieces]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}

    def apply_chat_template(self, messages, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ----------------------------------------------------------------------------------------------------- files
def test_txt_is_a_prompt_a_line(tmp_path) -> None:
    path = written(tmp_path, "a.txt", "\ufeffone \r\ntwo’s\n\n")
    assert load_prompts(path) == [Prompt(0, "one "), Prompt(1, "two’s")]
    assert load_prompts(path, chat=True)[1] == Prompt(1, "", "", ({"role": "user", "content": "two’s"},))


def test_jsonl_takes_prompts_messages_kinds_and_responses(tmp_path) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    records = [
        {"prompt": "a", "kind": "story", "extra": 1},
        {"messages": talk},
        {"prompt": "b", "response": "c"},
    ]
    path = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, records)))
    first, second, third = load_prompts(path)
    assert first == Prompt(0, "a", "story")
    assert second == Prompt(1, "", "", tuple(talk))
    assert third == Prompt(2, "b", response="c")
    assert load_prompts(path, given=True)[1] == Prompt(1, "", "", (talk[0],), "hello")


def test_csv_and_parquet_have_a_prompt_column(tmp_path) -> None:
    frame = pd.DataFrame({"kind": ["x", ""], "prompt": ["one, two\nthree", "NA"], "response": ["r", "s"], "n": [1, 2]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    expected = [Prompt(0, "one, two\nthree", "x", None, "r"), Prompt(1, "NA", "", None, "s")]
    assert load_prompts(tmp_path / "a.csv") == expected
    assert load_prompts(tmp_path / "a.parquet") == expected


def test_a_local_dataset_folder(tmp_path) -> None:
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    for number, text in enumerate(("one", "two")):
        frame = pd.DataFrame({"prompt": [text]})
        frame.to_parquet(hub / "data" / f"train-0000{number}-of-00002.parquet")
    (hub / "README.md").write_text("a dataset")
    assert [prompt.text for prompt in load_prompts(hub)] == ["one", "two"]

    saved = tmp_path / "saved"
    saved.mkdir()
    table = pa.table({"prompt": ["three"], "other": [1]})
    with (
        pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table)
    (saved / "state.json").write_text("{}")
    assert load_prompts(saved) == [Prompt(0, "three")]

    pd.DataFrame({"prompt": ["x"]}).to_parquet(hub / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(InputError, match="several sets: test, train"):
        load_prompts(hub)
    with pytest.raises(InputError, match=r"holds no .* file\. Name one of its folders: saved"):
        load_prompts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt holds no prompt: it is empty"),
        ("a.txt", "\n\n", "holds no prompt"),
        ("a.txt", "one\n  \nthree", r"a\.txt, line 2: the prompt is empty"),
        ("a.txt", b"one\ntw\xff", r"a\.txt is not UTF-8 \(line 2, byte 6\)"),
        ("a.jsonl", "", "holds no prompt"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"}', "line 2 is empty"),
        ("a.jsonl", '{"prompt": "a"}\n"b"', "line 2: expected an object with `prompt` or `messages`, not 'b'"),
        ("a.jsonl", '{"text": "a"}', "line 1: there is no `prompt`; it has text"),
        ("a.jsonl", '{"prompt": 3}', "line 1: `prompt` is 3; expected a text"),
        ("a.jsonl", '{"prompt": ""}', "line 1: the prompt is empty"),
        ("a.jsonl", '{"prompt": "a", "response": ""}', "line 1: `response` is ''"),
        ("a.jsonl", '{"messages": []}', "line 1: `messages` is"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "line 1: `messages` is"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": " "}]}', "the last message is empty"),
        ("a.csv", "", "holds no prompt"),
        ("a.csv", "prompt\n", "holds no prompt"),
        ("a.csv", "text,kind\na,b\n", "has no `prompt` column; it has text, kind"),
        ("a.csv", 'prompt,kind\n"one\ntwo",a\n,b\n', "line 4: the prompt is empty"),
        ("a.csv", b"prompt\n\xe9\n", r"not UTF-8 \(line 2, byte 7\)"),
        ("a.parquet", "no", "is not a Parquet file"),
        ("a.docx", "one", r"ends in '\.docx'; expected \.txt, \.jsonl, \.json, \.csv or \.parquet"),
    ],
)
def test_what_is_no_prompts_file_is_named(tmp_path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_prompts(written(tmp_path, name, content))


def test_missing_files_and_columns(tmp_path) -> None:
    with pytest.raises(InputError, match=r"no prompts file .*nowhere\.txt"):
        load_prompts(tmp_path / "nowhere.txt")
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="has no `prompt` column; it has text"):
        load_prompts(tmp_path / "a.parquet")
    pd.DataFrame({"prompt": ["a", None]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(InputError, match="row 2: `prompt` is null"):
        load_prompts(tmp_path / "b.parquet")


def test_prompts_from_python() -> None:
    made = as_prompts(["a", {"prompt": "b", "kind": "list"}, Prompt(7, "c")])
    assert made == [Prompt(0, "a"), Prompt(1, "b", "list"), Prompt(7, "c")]
    talk = ({"role": "user", "content": "hi"},)
    assert as_prompts([Prompt(3, messages=talk)], chat=True, given=False) == [Prompt(3, messages=talk)]
    with pytest.raises(InputError, match="same index"):
        as_prompts([Prompt(1, "a"), "b"])
    with pytest.raises(InputError, match="a list of texts, not one text"):
        as_prompts("abc")
    with pytest.raises(InputError, match="prompt 1: the prompt is empty"):
        as_prompts(["a", " "])
    with pytest.raises(InputError, match="there is no prompt"):
        as_prompts([])


def test_prompts_know_where_they_came_from(tmp_path) -> None:
    path = written(tmp_path, "a.txt", "one")
    assert stored(load_prompts(path)).source == str(path)
    assert stored(as_prompts(bundled_prompts("tales"), chat=True)).source == "bundled: tales"
    assert stored(as_prompts(["a", *bundled_prompts("general")[1:]])).source == "Python, bundled: general"
    assert stored(load_prompts(path)).hash == stored([Prompt(0, "one")]).hash


def test_the_hash_sees_everything() -> None:
    talk = ({"role": "user", "content": "a"},)
    sets = [
        [Prompt(0, "a")],
        [Prompt(0, "b")],
        [Prompt(1, "a")],
        [Prompt(0, "a", "x")],
        [Prompt(0, "a", response="r")],
        [Prompt(0, messages=talk)],
        [Prompt(0, "a"), Prompt(1, "b")],
        [Prompt(1, "b"), Prompt(0, "a")],
    ]
    assert len({stored(prompts).hash for prompts in sets}) == len(sets)
    assert stored(sets[0]).hash == stored([Prompt(0, "a")]).hash
    for prompts in sets:  # as manifests have had it from the first: of one document
        document = json.dumps([asdict(replace(prompt, source="")) for prompt in prompts], sort_keys=True)
        assert stored(prompts).hash == "sha256:" + hashlib.sha256(document.encode()).hexdigest()


def stored(prompts) -> PromptStore:
    store = PromptStore()
    for prompt in prompts:
        store.add(Encoded(prompt, prompt.text, (1, 300, 5), 2))
    return store


def test_prompts_beyond_what_is_held_wait_in_a_file(monkeypatch) -> None:
    talk = ({"role": "user", "content": "ä\u2028 b"},)
    prompts = [Prompt(4, "é", "x"), Prompt(0, messages=talk, response="r"), Prompt(2, ids=(3, 4), response_ids=(5,))]
    held = stored(prompts)
    monkeypatch.setattr(prompt_store, "HELD_TOKENS", 3)
    filed = stored(prompts)
    assert len(filed._held) == 1 and len(filed._places) == 2
    assert list(filed) == list(held) == [4, 0, 2]
    for index in (2, 4, 0, 2):
        assert filed[index] == held[index]
        assert filed[index].prompt.messages == held[index].prompt.messages
    assert (filed.hash, filed.sizes) == (held.hash, held.sizes)
    with pytest.raises(InputError, match="same index"):
        filed.add(held[0])
    with pytest.raises(KeyError):
        _ = filed[1]


# ------------------------------------------------------------------------------------------------- streamed
def test_streamed_files_are_the_loaded_ones(tmp_path) -> None:
    records = [{"prompt": f"prompt {number}", "kind": "ab"[number % 2], "other": number} for number in range(3000)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=700)
    table = pa.Table.from_pylist([{"messages": [{"role": "user", "content": str(number)}]} for number in range(5)])
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    written(tmp_path, "c.jsonl", '{"prompt": "a"}\n{"prompt": "b"}')
    for name in ("a.parquet", "b.arrow", "c.jsonl"):
        assert list(stream_prompts(tmp_path / name)) == load_prompts(tmp_path / name)
    (tmp_path / "set").mkdir()
    (tmp_path / "a.parquet").rename(tmp_path / "set" / "a.parquet")
    assert list(stream_prompts(tmp_path / "set")) == load_prompts(tmp_path / "set")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_a_pipe_is_not_waited_for(name, tmp_path) -> None:
    os.mkfifo(tmp_path / name)
    for read in (load_prompts, stream_prompts):
        with pytest.raises(InputError, match="it is no regular file"):
            list(read(tmp_path / name))


def test_a_stream_is_bounded_by_its_row_groups(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [f"{number:06} " * 20 for number in range(2000)]}), path, row_group_size=100)
    monkeypatch.setattr(prompt_files, "MOST_BYTES", 40_000)
    with pytest.raises(InputError, match="it unfolds to"):
        load_prompts(path)
    assert sum(1 for _ in stream_prompts(path)) == 2000
    monkeypatch.setattr(prompt_files, "MOST_BYTES", 4_000)
    with pytest.raises(InputError, match="its row group 0 unfolds to"):
        next(stream_prompts(path))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match="is not a Parquet file"):
        next(stream_prompts(tmp_path / "b.parquet"))
    with pytest.raises(InputError, match="there is no prompts file"):
        stream_prompts(tmp_path / "none.parquet")


def test_prompts_come_one_after_the_other() -> None:
    taken = []

    def coming():
        for number in range(10**9):
            taken.append(number)
            yield f"prompt {number}"

    assert [prompt.text for prompt in islice(each_prompt(coming()), 3)] == ["prompt 0", "prompt 1", "prompt 2"]
    assert len(taken) == 3


def test_a_trace_takes_a_stream(tiny, tmp_path) -> None:
    texts = ["abc", "de", "fghij", "k"]
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "a.parquet")
    one = probekit.trace(tiny, load_prompts(tmp_path / "a.parquet"), max_new_tokens=4)
    other = probekit.trace(tiny, stream_prompts(tmp_path / "a.parquet"), max_new_tokens=4)
    assert one.manifest.but(timings={}) == other.manifest.but(timings={})
    assert one.tokens.equals(other.tokens)
    assert probekit.trace(tiny, iter(texts), max_new_tokens=4).tokens.equals(one.tokens)


# --------------------------------------------------------------------------------------------- bundled sets
@pytest.mark.parametrize("name", BUNDLED_SETS)
def test_bundled_sets(name: str) -> None:
    prompts = bundled_prompts(name)
    assert [prompt.index for prompt in prompts] == list(range(24))
    assert len({prompt.text for prompt in prompts}) == 24
    halves = [sorted({prompt.kind for prompt in prompts[half::2]}) for half in (0, 1)]
    assert halves[0] == halves[1]  # the even and the odd half hold the same kinds


def test_tales_are_cut_in_the_middle_of_a_sentence() -> None:
    for prompt in bundled_prompts("tales"):
        assert 20 <= len(prompt.text.split()) <= 45
        assert prompt.text[-1].isalpha()


def test_general_prompts_are_six_kinds_of_four() -> None:
    kinds = pd.Series([prompt.kind for prompt in bundled_prompts("general")]).value_counts()
    assert kinds.to_dict() == dict.fromkeys(("story", "question", "list", "arithmetic", "code", "translation"), 4)


def test_models_get_the_set_that_suits_them() -> None:
    assert bundled_prompts_for("tales-tied")[0].kind == "tale"
    assert bundled_prompts_for("SmolLM2-135M")[0].kind == "story"
    with pytest.raises(InputError, match="no bundled prompt set 'songs'; there are tales, general"):
        bundled_prompts("songs")


# ------------------------------------------------------------------------------------------------- encoding
def test_plain_text_is_encoded_as_the_tokenizer_does_it() -> None:
    encoded = encode(Prompt(0, "cab", response="b"), Letters())
    assert encoded.ids == (0, 4, 1)
    assert encoded.context == 3
    assert encoded.text == "cab"


def test_messages_go_through_the_template_once() -> None:
    encoded = encode(Prompt(0, messages=({"role": "user", "content": "cab"},)), Letters())
    assert encoded.text == "<user>cab<assistant>"
    assert encoded.ids[0] != 0  # the template writes the special tokens
    plain = Letters()
    plain.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        encode(Prompt(0, messages=({"role": "user", "content": "a"},)), plain)


def test_given_text_is_encoded_as_one_text() -> None:
    # "ca" + "bd": encoded together they share "^c"; "ab" spans the border and is scored.
    encoded = encode(Prompt(0, "ca", response="bd"), Letters(), given=True)
    assert encoded.ids == (0, 4, 1, 5)
    assert encoded.context == 2
    apart = encode(Prompt(0, "ca", response="cd"), Letters(), given=True)
    assert apart.ids == (0, 4, 2, 4, 5)
    assert apart.context == 3
    alone = encode(Prompt(0, "cab"), Letters(), given=True)
    assert (alone.ids, alone.context) == ((0, 4, 1), 1)


def test_token_ids_are_taken_as_they_are() -> None:
    (prompt,) = as_prompts([[5, 6]])
    assert prompt == Prompt(0, ids=(5, 6))
    assert encode(prompt, None) == Encoded(prompt, "", (5, 6), 2)
    assert encode(prompt, None, given=True).context == 1
    known = Prompt(3, ids=(5, 6), response_ids=(7,))
    assert as_prompts([known]) == [known]
    assert encode(known, None) == Encoded(known, "", (5, 6), 2)
    assert encode(known, None, given=True) == Encoded(known, "", (5, 6, 7), 2)
    with pytest.raises(InputError, match="prompt 0 has no token ids"):
        as_prompts([[]])


def test_encoding_needs_a_tokenizer() -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        encode(Prompt(0, "a"), None)


def test_prompts_need_no_torch() -> None:
    code = "import sys, probekit.tracing.prompts as p; p.bundled_prompts('tales'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
