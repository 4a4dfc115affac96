"""`probekit rank`, as a person and as a program calls it."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from probekit.cli.app import run
from probekit.drafting.probe_policy import ProbeThreshold


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("rank") / "prompts.jsonl"
    lines = [{"prompt": text, "kind": kind} for text, kind in
             [("a king", "tale"), ("aaa bbb aaa", "code"), ("the fox", "tale"), ("x = 1; x =", "code")]]  # fmt: skip
    prompts.write_text("\n".join(map(json.dumps, lines)))
    folder = prompts.parent / "run"
    words = ["--prompts", str(prompts), "-o", str(folder), "--max-new-tokens", "16", "--quiet"]
    assert run(["trace", str(tiny_folder), *words]) == 0
    return folder


WORDS = ["--costs", "roofline", "--device", "h100", "--draft-lengths", "2,4"]


def test_as_json(folder, capsys, tmp_path):
    from probekit.traces.trace import Trace

    trace = Trace.open(folder)
    rows = [
        (prompt, place, int(token)) for prompt in trace.prompts for place, token in enumerate(trace.outputs(prompt))
    ]
    path = tmp_path / "perfect.parquet"
    pd.DataFrame(rows, columns=["prompt", "output", "token"]).to_parquet(path)
    assert run(["rank", str(folder), *WORDS, "--imported", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "probekit/rank/1" and document["ways"][0]["drafter"] == "perfect"
    assert document["oracle"]["speedup"] >= document["ways"][0]["speedup"]
    assert {row["kind"] for row in document["kinds"]} == {"tale", "code"}


def test_the_best_are_run(folder, capsys):
    words = ["--draft-lengths", "2,4", "--costs", "roofline", "--device", "cpu", "--validate", "5", "--limit", "2"]
    assert run(["rank", str(folder), *words, "--json"]) == 0
    validated = json.loads(capsys.readouterr().out)["validated"]
    assert 3 <= len(validated) <= 5
    assert all(each["rounds_equal"] and each["tokens_equal"] for each in validated)


def test_choose_takes_the_best_of_all_ways(folder, capsys):
    assert run(["choose", str(folder), *WORDS, "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)
    assert run(["rank", str(folder), *WORDS, "--json"]) == 0
    ranked = json.loads(capsys.readouterr().out)
    assert chosen["way"] == ranked["ways"][0] and chosen["oracle"] == ranked["oracle"]
    assert chosen["way_held_out"] == ranked["held_out"]
    assert chosen["speedup"] <= max(1, chosen["way"]["speedup"])
    assert run(["choose", str(folder), *WORDS]) == 0
    assert "all ways of drafting" in capsys.readouterr().out
    assert run(["choose", str(folder), *WORDS, "--policy", "confidence:0.5", "--json"]) == 0
    assert "way" not in json.loads(capsys.readouterr().out)


def test_ways_ranked_for_another_device_are_run_where_the_run_was_traced(folder, capsys):
    words = ["--costs", "roofline", "--device", "h100", "--draft-lengths", "2", "--exit-layers", "1,3"]
    assert run(["rank", str(folder), *words, "--validate", "1", "--limit", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["costs"]["device"] == "h100" and document["validated"]
    assert all(way["rounds_equal"] and way["tokens_equal"] for way in document["validated"])


@pytest.mark.second
def test_validate_runs_the_best_and_a_spread(folder, capsys):
    words = ["--ways", "--draft-lengths", "2,4", "--exit-layers", "1,3", "--limit", "1"]
    assert run(["validate", str(folder), *words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "probekit/validate/1" and document["cells"] == [] and len(document["ways"]) == 10
    for way in document["ways"]:
        assert way["rounds_equal"] and way["tokens_equal"] and way["speedup_predicted"] > 0
    assert run(["validate", str(folder), "--ways", "--drafter", "suffix"]) == 2
    assert "--ways ranks every drafter" in capsys.readouterr().err


def test_what_is_not_ranked_says_why(tiny_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a king\naaa bbb aaa\nthe fox\n")
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "8", "--quiet"]
    assert run(["trace", str(tiny_folder), *words, "-o", str(tmp_path / "sampled"), "--temperature", "1"]) == 0
    assert run(["trace", str(tiny_folder), *words, "-o", str(tmp_path / "lean"), "--statistics", "agreement"]) == 0
    left = {}
    for name in ("sampled", "lean"):
        capsys.readouterr()
        assert run(["rank", str(tmp_path / name), *WORDS, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        left[name] = {row["ways"]: row["reason"] for row in document["not_ranked"]}
        policies = {row["policy"].partition(":")[0] for row in document["ways"]}
        assert ("heuristic" in policies) == (name == "lean") and "confidence" not in policies
        assert (document["oracle"] is None) == (name == "sampled")
    assert set(left["sampled"]) == {"policies", "trees", "the oracle"}
    assert set(left["lean"]) == {"confidence, entropy, margin, trees", "learned ways"}
    assert run(["rank", str(tmp_path / "sampled"), *WORDS]) == 0
    assert "Not ranked: trees; a tree is verified greedily." in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def probed(tiny_folder, tmp_path_factory):
    """A run with the residuals of layer 3, and a file of a probe's policy that lets about half of the drafts pass."""
    from probekit.traces.trace import Trace

    place = tmp_path_factory.mktemp("probed")
    (place / "prompts.txt").write_text("a king\naaa bbb aaa\nthe fox\nx = 1; x =\n")
    words = ["--prompts", str(place / "prompts.txt"), "-o", str(place / "run"), "--max-new-tokens", "16", "--quiet"]
    assert run(["trace", str(tiny_folder), *words, "--keep-residuals", "3"]) == 0
    trace = Trace.open(place / "run")
    x = np.concatenate([trace.residuals_of(prompt, 3) for prompt in trace.prompts])
    weights = np.random.default_rng(0).normal(size=x.shape[1]) / x.std()
    return place / "run", ProbeThreshold(3, weights, -float(np.median(x @ weights)), 0.5).save(place / "policy.json")


def test_a_probes_policy_is_ranked_at_the_exit_that_it_reads(probed, capsys):
    folder, policy = probed
    name = f"probe:{policy}"
    assert run(["rank", str(folder), *WORDS, "--policy", name, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    own = [way for way in document["ways"] if way["policy"] == name]
    assert [(way["exit_layer"], way["draft_length"], way["exact"]) for way in own] == [(3, 4, False)]
    fixed = next(
        way for way in document["ways"] if (way["policy"], way["exit_layer"], way["draft_length"]) == ("fixed", 3, 4)
    )
    assert own[0]["drafted_per_token"] < fixed["drafted_per_token"], "it stops some drafts"
    assert run(["rank", str(folder), *WORDS, "--policy", f"{name}:0", "--json"]) == 0
    never = [way for way in json.loads(capsys.readouterr().out)["ways"] if way["policy"] == f"{name}:0"]
    assert never[0]["tokens_per_round"] == fixed["tokens_per_round"], "a threshold of 0 stops none"


def test_a_probes_policy_is_run_by_the_decoder(probed, capsys):
    folder, policy = probed
    words = ["--costs", "roofline", "--device", "cpu", "--draft-lengths", "4", "--exit-layers", "3", "--limit", "2"]
    assert run(["rank", str(folder), *words, "--policy", f"probe:{policy}", "--validate", "40", "--json"]) == 0
    ran = [way for way in json.loads(capsys.readouterr().out)["validated"] if way["policy"] == f"probe:{policy}"]
    assert len(ran) == 1 and ran[0]["rounds_equal"] and ran[0]["tokens_equal"]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("probe:{nothing}", "cannot be read"),
        ("probe:{prompts}", "cannot be read"),
        ("probe:{policy}:2", "must lie in [0, 1]"),
        ("probe:0.5", "names no file"),
    ],
)
def test_a_probes_policy_that_is_none_is_one_clear_line(probed, capsys, policy, message):
    folder, file = probed
    places = {"nothing": file.with_name("nothing.json"), "prompts": file.with_name("prompts.txt"), "policy": file}
    assert run(["rank", str(folder), *WORDS, "--policy", policy.format(**places)]) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split()) and "Traceback" not in error


def test_a_probes_policy_needs_the_residuals_that_it_reads(folder, probed, capsys):
    assert run(["rank", str(folder), *WORDS, "--policy", f"probe:{probed[1]}"]) in (0, 2)
    said = " ".join(capsys.readouterr().err.split())
    assert "residuals" in said and "--keep-residuals" in said


def test_as_tables(folder, capsys):
    assert run(["rank", str(folder), *WORDS, "--exit-layers", "2,3"]) == 0
    shown = capsys.readouterr()
    for text in ("of the oracle", "by kind of text", "suffix", "autoregressive", "confidence:0.6"):
        assert text in shown.out
    assert "An oracle would reach" in " ".join(shown.err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--costs", "guessed"], "--costs is 'guessed'"),
        (["--validate", "-1"], "--validate is -1"),
        (["--exit-layers", "99"], "exit layer 99 is out of range"),
        (["--imported", "nothing.parquet"], "there is no file nothing.parquet"),
    ],
)
def test_bad_input_is_one_clear_line(folder, capsys, words, message):
    given = [*WORDS, *words] if words[0] != "--costs" else words
    assert run(["rank", str(folder), *given]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


@pytest.mark.second
def test_choose_for_batches_of_the_decoder_here(folder, capsys):
    """A choice for each number of rows; a schedule for an engine is not made of these costs."""
    words = ["choose", str(folder), "--context", "8", "--draft-lengths", "2", "--exit-layers", "1,2"]
    assert run([*words, "--rows", "1,3", "--quiet"]) == 0
    assert "whose text has ended leaves it" in capsys.readouterr().out
    assert run([*words, "--rows", "2,4", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)
    assert [entry["rows"] for entry in chosen["schedule"]["entries"]] == [2, 4]
    assert chosen["costs"]["rows"] == 2 and "way" not in chosen
    assert run([*words, "--rows", "5"]) == 2
    assert "a batch of 5 rows needs as many prompts; there are 4" in capsys.readouterr().err
    assert run([*words, "--rows", "2", "--export", str(folder / "out"), "--engine", "vllm"]) == 2
    assert "measured of the decoder here, not of vLLM" in capsys.readouterr().err
