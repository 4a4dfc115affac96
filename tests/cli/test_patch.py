"""`probekit patch`: what it prints, and what it refuses."""

from __future__ import annotations

import json

from probekit.cli.app import run


def test_a_map_a_page_and_a_document_say_the_same(tiny_folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    words = ["patch", str(tiny_folder), "abcd", "ab<d", "--sites", "embedding,mlp:1", "--positions", "1-2"]
    assert run([*words, "--html", str(page), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "mlp:1" in printed
    assert "residual:0" in printed
    text = page.read_text(encoding="utf-8")
    assert "2 &lt;" in text
    assert "<script" not in text
    assert run([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["sites"] == ["residual:0", "mlp:1"]
    assert f"{document['restored'][0][1]:.2f}" in text
    assert run([*words, "--json", "--how", "gradient"]) == 0
    assert len(json.loads(capsys.readouterr().out)["change"]) == 2


def test_what_does_not_fit_is_refused_in_a_line(tiny_folder, capsys):
    for words, message in (
        (["abcd"], "'patch' needs a corrupted text"),
        (["abcd", "abc"], "has 4 tokens and the corrupted one 3"),
        (["abcd", "abxd", "--sites", "head"], "does not exist"),
        (["abcd", "abxd", "--answer", "a"], "belong together"),
        (["abcd", "--how", "gradient"], "needs one corrupted text"),
        (["abcd", "abxd", "--positions", "9"], "position 9 does not exist"),
    ):
        assert run(["patch", str(tiny_folder), *words]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert message in error
        assert "Traceback" not in error


def test_the_lens_says_who_wrote_the_tokens(tiny_folder, capsys):
    words = ["lens", str(tiny_folder), "abc", "--max-new-tokens", "3", "--attribution"]
    assert run([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    shares = document["attribution"]
    assert len(shares["tokens"]) == 5
    for token, logit, values in zip(shares["tokens"], shares["logits"], shares["values"], strict=True):
        assert abs(sum(values) - logit) < 1e-4
        assert token in range(97)
    top = [cell["token_id"] for cell in document["layers"][-1]["cells"]]
    assert shares["tokens"][-3:] == top[-3:]
    assert run([*words, "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "attention:4" in printed
    assert "embedding" in printed
