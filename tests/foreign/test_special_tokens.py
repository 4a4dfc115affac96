"""A text that has a begin-of-sequence token already, and gets another: said, never silent."""

from __future__ import annotations

import json

import pytest
from tokenizers.processors import TemplateProcessing

import probekit
from probekit.cli.app import run
from probekit.foreign.special_tokens import begins_twice, remark_on_bos
from probekit.models.synthetic import byte_tokenizer, synthetic

BOS = "~"  # an ordinary letter of this tokenizer, made special
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def with_bos(*, puts: bool):
    """A tokenizer of bytes with a begin-of-sequence token, which it `puts` before texts, and a chat template that
    writes one."""
    tokenizer = byte_tokenizer(97, True)
    tokenizer.bos_token, tokenizer.chat_template = BOS, TEMPLATE
    if puts:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
        )
    return tokenizer


@pytest.fixture(scope="module")
def loaded(tiny):
    return probekit.wrap(synthetic("tiny", seed=1).model, with_bos(puts=True), name="mine")


def remarks(loaded, prompts, **settings):
    return probekit.trace(loaded, prompts, max_new_tokens=2, **settings).manifest.provenance.remarks


def test_pasted_texts_are_named(loaded):
    assert remarks(loaded, ["abc", f"{BOS}abc", "def", f"{BOS}def"]) == (remark_on_bos([1, 3], loaded.tokenizer),)
    assert "2 prompts (1, 3) begin with ~ twice" in remark_on_bos([1, 3], loaded.tokenizer)
    assert "prompt 4 begins with" in remark_on_bos([4], loaded.tokenizer)
    assert "6 prompts (0, 1, 2, 3, 4, ..)" in remark_on_bos(range(6), loaded.tokenizer)


def test_what_begins_once_has_no_remark(loaded):
    bos = loaded.tokenizer.bos_token_id
    assert remarks(loaded, ["abc", f"abc{BOS}{BOS}", [bos, bos, 3]]) == ()  # ids are taken as they are
    assert not begins_twice([bos], loaded.tokenizer)
    assert not begins_twice([3, 3], byte_tokenizer(97, True))  # it has no such token
    assert not begins_twice([3, 3], None)


@pytest.mark.parametrize("puts", [True, False])
def test_a_template_that_writes_its_own(tiny, puts):
    """Texts from the template get no other one; a message that has one does, whoever wrote the first."""
    loaded = probekit.wrap(synthetic("tiny", seed=1).model, with_bos(puts=puts), name="mine")
    assert remarks(loaded, ["abc"], chat=True) == ()
    assert len(remarks(loaded, [f"{BOS}abc"], chat=True)) == 1
    assert len(remarks(loaded, [f"{BOS}abc"])) == puts


def test_one_prompt(loaded):
    for work in (probekit.decode, probekit.inspect_prompt):
        with pytest.warns(UserWarning, match="the prompt begins with ~ twice"):
            work(loaded, f"{BOS}abc", max_new_tokens=2)


def test_commands_say_it(loaded, tmp_path, capsys):
    folder = tmp_path / "mine"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text(f"{BOS}abc\n")
    for command in (
        ["decode", folder, f"{BOS}abc"],
        ["lens", folder, f"{BOS}abc"],
        ["trace", folder, "--prompts", prompts, "-o", out],
    ):
        line = [*map(str, command), "--max-new-tokens", "2", "--device", "cpu"]
        assert run(line) == 0
        assert "begins with ~ twice" in " ".join(capsys.readouterr().err.split())
        if command[0] != "trace":
            assert run([*line, "--quiet"]) == 0
            assert "twice" not in capsys.readouterr().err
    assert len(json.loads((out / "manifest.json").read_text())["remarks"]) == 1
