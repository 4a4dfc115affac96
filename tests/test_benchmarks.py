"""The benchmarks in miniature: each runs, compares like with like, and leaves a record and a figure."""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tracing.jobs import job

from probekit.tracing.prompts import bundled_prompts
from probekit.validation.engine_rounds import EngineRounds, Turn

pytestmark = pytest.mark.second

ANALYSES = Path(__file__).parent.parent / "analyses"
NAMES = ("benchmarking", "peers", "benchmark_lens", "benchmark_tracing", "benchmark_choice", "benchmark_regret",
         "learned_drafting", "compare_decoding", "regrets", "engine_turns", "engine_regret")  # fmt: skip


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """The scripts, found beside each other as they are when one of them is run; their texts in a scratch folder."""
    mounted, backward = "save" in vars(object), torch.Tensor.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ANALYSES))
        scripts = {name: importlib.import_module(name) for name in NAMES}
        patch.setattr(scripts["benchmarking"], "TEXTS", tmp_path_factory.mktemp("texts"))
        yield scripts
    for name in NAMES:
        sys.modules.pop(name, None)
    torch.Tensor.backward = backward
    if not mounted and "save" in vars(object):  # nnsight mounts it on every object when it is imported
        sys.modules["nnsight._c"].unmount("save")


@pytest.fixture
def bench(room):
    return room["benchmarking"]


def record_of(folder: Path, benchmark: str) -> dict:
    (path,) = folder.glob(f"{benchmark}-*.json")
    return json.loads(path.read_text())


def figures_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".json" and path.stat().st_size > 1000}


# ------------------------------------------------------------------------------------------------------ in common
def test_spread_and_targets_by_hand(bench):
    assert bench.spread([1.0, 2.0, 3.0, None]) == pytest.approx({"p20": 1.4, "p50": 2.0, "p80": 2.6})
    assert bench.spread([]) is None
    assert bench.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert bench.target("time", [1.0, 1.2, 9.0], at_most=1.5)["met"]
    assert not bench.target("time", [1.0, 1.6, 9.0], at_most=1.5)["met"]
    assert not bench.target("gain", [2.9], at_least=3.0)["met"]


def test_every_way_has_its_turn_and_another_one_begins(bench):
    called = []
    ways = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = bench.turns(ways, 2, "cpu")
    assert called == ["a", "b", "c", "b", "c", "a"]
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    bench.turns(ways, 1, "cpu", before=seconds)
    assert called[6:] == ["c", "a", "b"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts resident memory this way")
def test_extra_memory_is_what_was_held_at_most():
    """In a fresh process: a large one has room to spare, and need not grow."""
    code = (
        "import torch, benchmarking as bench\n"
        "with bench.extra_memory('cpu') as extra: torch.ones(16 * bench.MIB)\n"  # 64 MiB, and gone
        "held = extra()\n"
        "with bench.extra_memory('cpu') as extra: pass\n"
        "print(held // bench.MIB, extra() // bench.MIB)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ANALYSES)
    assert run.returncode == 0, run.stderr
    held, nothing = map(int, run.stdout.split())
    assert 60 <= held < 80
    assert nothing < 8


def test_records_go_on_only_where_everything_is_the_same(bench, tmp_path):
    path = tmp_path / "one.json"
    bench.write(path, {"model": "tiny", "settings": {"tokens": 4}, "samples": {"seconds": {"a": [1.0]}}})
    kept = bench.kept_samples(path, {"model": "tiny", "settings": {"tokens": 4}})
    assert bench.extended(kept["seconds"], {"a": [2.0]}) == {"a": [1.0, 2.0]}
    assert bench.extended(kept["seconds"], {"a": [2.0], "b": [3.0]}) == {"a": [2.0], "b": [3.0]}  # turns stay paired
    assert bench.kept_samples(path, {"model": "tiny", "settings": {"tokens": 8}}) == {}


def test_text_is_the_model_s_own_and_made_once(bench, tiny, monkeypatch):
    ids = bench.packed_text(tiny, 96, length=32)
    assert ids.shape == (3, 32)
    monkeypatch.setattr(bench, "_continued", None)
    assert torch.equal(bench.packed_text(tiny, 96, length=32), ids)
    assert len({bench.fingerprint(ids), bench.fingerprint(ids + 1)}) == 2


# ------------------------------------------------------------------------------------------------------ the peers
def test_peers_read_and_write_what_probekit_does(room, any_tiny):
    """The same argmax in every layer, and the same greedy text: the benchmarks compare the same job."""
    peers, lens = room["peers"], room["benchmark_lens"]
    ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = lens.probekit_lens(any_tiny, ids, "all")
    assert torch.equal(lens.probekit_lens(any_tiny, ids, "agreement"), expected)
    texts = []
    for name in peers.installed():
        peer = peers.PEERS[name](any_tiny)
        assert torch.equal(lens.peer_lens(peer, ids), expected), name
        with torch.inference_mode():
            layers = [peer.logits(state, layer).argmax(-1) for layer, state in enumerate(peer.states(ids))]
            assert torch.equal(torch.stack(layers), peer.argmax(ids)), name
            texts.append(peer.generate(ids, 5))
        assert texts[-1].shape == (2, 14)
        assert torch.equal(texts[-1], texts[0]), name
    assert {"transformers", "nnsight"} <= set(peers.installed())


def test_plain_statistics_are_those_of_a_trace(room, tiny):
    from lens.spelled import random_texts, read

    from probekit.lens.chunked import StatisticsPlan, layer_statistics
    from probekit.lens.lens import Lens

    residuals, inputs, texts, _ = read(tiny, random_texts(tiny, 2, 9))
    ours = layer_statistics(tiny.anatomy, residuals, inputs, texts, StatisticsPlan(lenses=("final-norm",)))
    own = Lens(tiny.anatomy)(residuals[-1], tiny.depth)
    theirs = room["benchmark_tracing"].plain_statistics(
        Lens(tiny.anatomy)(residuals[2], 2), own, inputs.long(), texts.long()
    )
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name][0, 2].to(values.dtype), values, rtol=1e-4, atol=1e-5, msg=name)


# ------------------------------------------------------------------------------------------------------ the scripts
@pytest.mark.long
def test_lens(room, tiny_folder, tmp_path):
    main = room["benchmark_lens"].main
    for turns in (1, 2):
        main(str(tiny_folder), 32, "cpu", 1, tmp_path, memory=turns == 1, alone="")
        record = record_of(tmp_path, "lens")
        assert all(len(each) == turns for each in record["samples"]["seconds"].values())
    assert set(record["equal_agreement"].values()) == {1.0}
    assert record["settings"]["tokens"] == 32
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert {"torch", "transformers", "nnsight"} <= set(record["versions"])
    assert [line["at_least"] or line["at_most"] for line in record["targets"]][:2] == [3.0, 1.5]
    assert all(set(row["seconds"]) == {"p20", "p50", "p80"} for row in record["rows"])
    assert figures_of(tmp_path) == {"lens.pdf", "lens.svg", "lens.png"}


def test_tracing(room, tiny_folder, tmp_path, monkeypatch):
    script = room["benchmark_tracing"]
    for name, value in {"PROMPT": 6, "NEW": 4, "GROWN": 2, "GROWN_NEW": 2, "PASSES": 1}.items():
        monkeypatch.setattr(script, name, value)
    fresh = []

    def in_this_process(path, *arguments):
        fresh.append(arguments[-1])
        loaded = script.endless(room["benchmarking"].opened(str(tiny_folder), "cpu"))
        found = script.run_alone(loaded, arguments[-1], 48, arguments[-3])
        return found | {"extra_bytes": 1000}  # so small a model may need nothing beyond what is there

    monkeypatch.setattr(room["benchmarking"], "in_fresh_process", in_this_process)
    script.main(str(tiny_folder), 48, "cpu", 1, tmp_path, "capture,job,peaks,growth", "agreement", "")
    record = record_of(tmp_path, "tracing")
    assert fresh[-3:] == ["growth 1", "growth 4", "growth 16"]
    assert [row["factor"] for row in record["growth"]] == [1, 4, 16]
    assert {row["way"] for row in record["job"]} >= {"probekit, all statistics", "transformers", "nnsight"}
    assert record["capture"][0]["over_plain"] == {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    assert [line["at_most"] for line in record["targets"]] == [1.03, 1.1, 1.1, 1.1]
    assert figures_of(tmp_path) == {"tracing.pdf", "tracing.svg", "tracing.png"}


@pytest.mark.parametrize("table", ["measured", "replayed"])
def test_choice(room, tiny_folder, tmp_path, table, monkeypatch):
    monkeypatch.setattr(room["benchmark_choice"], "LENGTHS", (2, 6))
    room["benchmark_choice"].main(str(tiny_folder), 8, "cpu", 6, 1, table, tmp_path)
    record = record_of(tmp_path, "choice")
    assert record["cells"] == 4 * 2
    assert len(record["samples"]["runs"]) == 3 * 2  # of four exits, three are a sixth, two thirds and all of the way
    assert np.array(record["samples"]["table_s"]).shape == (8, 6)
    assert all(0 <= row["regret"] < 1 and row["seconds"] > 0 for row in record["curves"])
    assert [line["at_least"] for line in record["targets"]] == [500, 20]
    assert figures_of(tmp_path) == {"choice.pdf", "choice.svg", "choice.png"}


def test_halving_by_hand(room):
    """Four pairs, two prompts of ten tokens: the first round halves on prompt 0, the second on both."""
    script = room["benchmark_choice"]
    seconds = np.array([[1.0, 9.0], [2.0, 2.0], [3.0, 1.0], [4.0, 1.0]])
    table = script.Table([(1, 1), (1, 2), (2, 1), (2, 2)], seconds, np.array([10, 10]))
    cell, spent = script.halving(table, [0, 1], 1)
    assert cell == 1  # the last two went too early; 4 s in all beat 10 s
    assert spent == pytest.approx(1 + 2 + 3 + 4 + 9 + 2)  # nothing is run twice
    assert table.speeds([0, 1]).tolist() == pytest.approx([2.0, 5.0, 5.0, 4.0])


def test_decoding_side_by_side(room, tiny_folder, tmp_path, monkeypatch):
    """Every way has its row, and what exits learned is learned on prompts that are not measured."""
    script = room["compare_decoding"]
    learned, taught = script.Drafting.learned, []

    def learn(loaded, prompts, *given):
        taught.extend(prompt.index for prompt in prompts)
        return learned(loaded, prompts, *given)

    monkeypatch.setattr(script, "bundled_prompts_for", lambda name: bundled_prompts("general")[:6])
    monkeypatch.setattr(script.Drafting, "learned", learn)
    script.main(str(tiny_folder), ["2,2"], None, 2, 5, 1, 30, True, False, 1, "cpu", "float32", tmp_path / "compare")
    assert taught == [prompt.index for prompt in bundled_prompts("general")[2:6]]
    record = json.loads((tmp_path / "compare.json").read_text())
    ways = {(row["engine"], row["method"]): row for row in record["rows"]}
    assert set(ways) == {
        ("transformers", "autoregressive"), ("transformers", "self-speculative 2,2"), ("probekit", "autoregressive"),
        ("probekit", "self-speculative 2,2"), ("probekit", "early exit 2 (lossy)"),
        ("probekit", "2,2 with 30 rows and exit heads"),
    }  # fmt: skip
    assert all(row["same_tokens"] == 2 for way, row in ways.items() if "lossy" not in way[1])
    assert (record["settings"]["draft_rows"], record["settings"]["exit_heads"]) == (30, True)


# ---------------------------------------------------------------------------------------------------------- regret
@pytest.mark.parametrize("drafting", [(None, False), (30, True)], ids=["plain", "rows-and-heads"])
def test_regret_is_resumed_with_what_it_learned(room, tiny_folder, tmp_path, drafting, monkeypatch):
    script, output = room["benchmark_regret"], tmp_path / "regret"
    monkeypatch.setattr(script, "bundled_prompts_for", lambda name: bundled_prompts("general")[:8])

    def run(minutes):
        script.main(str(tiny_folder), output, 6, 2, *drafting, minutes, 2, 1, "cpu", "float32")
        return json.loads(output.with_suffix(".json").read_text())

    begun = run(1e-3)
    assert begun["settings"]["draft_rows"] == begun["choice"]["draft_rows"] == drafting[0]
    assert (begun["choice"]["exit_heads"] is not None) == drafting[1]
    whole = run(60)
    assert whole["choice"] == begun["choice"], "the second command went on"
    assert (begun["regret"]["prompts"], whole["regret"]["prompts"]) == (1, 4)
    assert whole["regret"]["pairs"] == 4 * 2
    assert whole["regret"]["chosen_rank"] >= 1


def test_regret_by_hand(room):
    """Two prompts; the chosen pair loses on both, and each half of them knows the best one."""
    turns = [((0, 0), (4.0, 5.0), (6.0, 9.0)), ((1, 1), (2.5, 3.0), (5.0, 5.5)), ((2, 1), (2.0, 2.2), (4.0, 4.1))]
    rows = [
        (prompt, *pair, turn, seconds, 8, 4)
        for pair, *prompts in turns
        for prompt, twice in enumerate(prompts)
        for turn, seconds in enumerate(twice)
    ]
    raw = pd.DataFrame(rows, columns=list(room["benchmark_regret"].RAW))
    found = room["benchmark_regret"].regret(raw, {"exit_layer": 1, "draft_length": 1, "speedup": 1.5})
    plain = (4.0 + 5.0) / 2 + (6.0 + 9.0) / 2  # two methods, each at the least of its turns
    assert found["chosen_speedup"] == pytest.approx(plain / (2.5 + 5.0))
    assert found["best"] == [2, 1]
    assert found["regret"] == pytest.approx(1 - 6.0 / 7.5)
    assert found["regret_held_out"] == pytest.approx((1 - 2.0 / 2.5 + 1 - 4.0 / 5.0) / 2)
    assert found["noise"] == pytest.approx(1 - 10.0 / 14.0)


def test_an_engines_regret_by_hand(room):
    """Sessions that take so long for each token; a busy moment in one turn of each is not counted."""
    calls = []

    def session(name, per_token):
        def ask(prompt, count):
            calls.append((name, count))
            busy = 7.0 if len(calls) % 5 == 0 else 0.0
            return Turn(EngineRounds([], [], []), 0, 0.0, 1.0 + per_token * count * len(prompt) + busy)

        return ask

    turns, script, regrets = room["engine_turns"], room["engine_regret"], room["regrets"]
    sessions = [session("plain", 1.0), session("drafts", 0.5), session("plain", 1.0)]
    seconds = turns.in_turns([[1], [1, 2]], sessions, 7)
    assert seconds.shape == (7, 2, 3, 2)
    assert len(calls) == 8 * 2 * 3 * 2  # one sweep to warm up
    tokens = turns.MORE - turns.FEWER
    assert turns.decoding(seconds) == pytest.approx(tokens * np.array([[1.0, 0.5, 1.0], [2.0, 1.0, 2.0]]))
    group = script._group(seconds)
    assert regrets.noise(group.plain) == pytest.approx(0)
    assert regrets.noise(np.array([[1.0, 1.0], [1.1, 1.1]])) == pytest.approx(1 - 1 / 1.1)
    all_ways = np.concatenate([group.plain.mean(axis=0)[None], group.ways])
    found = regrets.regret_of(all_ways, 0.0, 0, ["no drafts", "layer 1 x 2"], "ways")
    assert (found["chosen"], found["best"], found["chosen_rank"]) == ("no drafts", "layer 1 x 2", 2)
    assert found["best_speedup"] == pytest.approx(2)
    assert found["regret"] == pytest.approx(found["regret_held_out"]) == pytest.approx(0.5)
    assert found["ways_within_noise_of_the_best"] == 1


def regret_in_a_job(ranks, folder, settings):
    """The regret benchmark as one of several processes; the first may be killed behind its second prompt."""
    sys.path.insert(0, str(ANALYSES))
    script = importlib.import_module("benchmark_regret")
    script.bundled_prompts_for = lambda name: bundled_prompts("general")[:12]
    script.measure_costs = functools.partial(script.measure_costs, repeats=1)
    keep, seen = script.keep, []

    def keep_or_die(*given):
        keep(*given)
        seen.append(1)
        if settings["dies"] and ranks.rank == 0 and len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    script.keep = keep_or_die
    script.main(settings["model"], folder, 6, 2, None, False, 60, 1, 1, "cpu", "float32")


@pytest.mark.long
def test_processes_share_the_prompts_of_a_regret(tiny_folder, tmp_path):
    """Rounds and tokens of one process, whoever ran them, also where one was killed and others went on."""
    asked = {"model": str(tiny_folder), "dies": False}

    def rows(name):
        return pd.read_csv(tmp_path / f"{name}.csv").drop(columns=["seconds"])

    assert job(1, tmp_path / "one", asked, work=regret_in_a_job) == [0]
    assert rows("one")["prompt"].nunique() == 6
    killed = job(2, tmp_path / "more", {**asked, "dies": True}, work=regret_in_a_job)
    assert killed[0] == -9 and 0 not in killed
    assert len(list(tmp_path.glob("more.part-*.csv"))) >= 2
    assert job(3, tmp_path / "more", asked, work=regret_in_a_job) == [0, 0, 0]
    assert rows("more").equals(rows("one"))
    assert not list(tmp_path.glob("more.part-*"))
