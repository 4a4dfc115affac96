from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from probekit.errors import InputError
from probekit.tracing.prompts import (
    BUNDLED_SETS,
    Encoded,
    Prompt,
    as_prompts,
    bundled_prompts,
    bundled_prompts_for,
    encode,
    load_prompts,
    prompts_hash,
    prompts_source,
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
        ("a.docx", "one", r"ends in '\.docx'; expected \.txt, \.jsonl, \.csv or \.parquet"),
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
    with pytest.raises(InputError, match="row 2: there is no `prompt`"):
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
    assert prompts_source(load_prompts(path)) == str(path)
    assert prompts_source(as_prompts(bundled_prompts("tales"), chat=True)) == "bundled: tales"
    assert prompts_source(as_prompts(["a", *bundled_prompts("general")[1:]])) == "Python, bundled: general"
    assert prompts_hash(load_prompts(path)) == prompts_hash([Prompt(0, "one")])


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
    assert len({prompts_hash(prompts) for prompts in sets}) == len(sets)
    assert prompts_hash(sets[0]) == prompts_hash([Prompt(0, "a")])


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
