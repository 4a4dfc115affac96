"""What a trace will take: counted by hand for a roofline, and held against what traces took."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

import probekit
from probekit.costs import trace_plan
from probekit.costs.roofline import DEVICES, Dimensions
from probekit.costs.trace_plan import Machine, roofline_trace, sample_trace
from probekit.errors import InputError
from probekit.models.described import described
from probekit.settings import TraceSettings
from probekit.tracing.plan import plan_trace

TEXTS = ["abc" * (1 + number % 7) for number in range(24)]


def test_a_plan_counts_what_the_trace_has(tiny, tmp_path) -> None:
    settings = TraceSettings(max_new_tokens=6, batch_size=2)
    estimate = sample_trace(plan_trace(tiny, TEXTS, settings), processes=2)
    traced = probekit.trace(tiny, TEXTS, tmp_path / "run", max_new_tokens=6, batch_size=2)
    assert (estimate.prompts, estimate.batches) == (24, len(traced.manifest.plan.batches)) == (24, 12)
    assert estimate.tokens == 24 * 6
    assert estimate.rows >= len(traced.tokens)
    assert set(estimate.seconds) == {"beginning", "generation", "reading", "writing"}
    assert min(estimate.seconds.values()) > 0
    assert estimate.total_s == pytest.approx(sum(estimate.seconds.values()) / 2)
    on_disk = sum(path.stat().st_size for path in traced.folder.glob("*.parquet"))
    assert estimate.disk_bytes == pytest.approx(on_disk, rel=0.2)
    as_if = sample_trace(plan_trace(tiny, TEXTS, settings), prompts=2400)
    assert (as_if.prompts, as_if.batches, as_if.tokens) == (2400, 1200, 14400)
    assert as_if.disk_bytes == pytest.approx(100 * on_disk, rel=0.2)


def test_each_batch_stands_for_those_of_its_length(tiny, monkeypatch) -> None:
    """With seconds that are in proportion to the rows, the estimate is exact whatever batches are drawn."""
    plan = plan_trace(tiny, TEXTS, TraceSettings(max_new_tokens=6, batch_size=2, top_prompts=0))
    batches = plan.manifest.plan.batches
    rows = [sum(len(plan.encoded[index].ids) + 5 for index in batch) for batch in batches]
    write = trace_plan._TimedWriter.write

    def timed(self, part, frames, **given):
        write(self, part, frames, **given)
        self.seconds[-1] = {"generation": 3.0 * rows[part], "reading": 2.0 * rows[part], "writing": 1.0 * rows[part]}

    monkeypatch.setattr(trace_plan._TimedWriter, "write", timed)
    estimate = sample_trace(plan)
    assert sum(estimate.seconds[name] for name in ("generation", "reading", "writing")) == pytest.approx(
        6.0 * sum(rows)
    )


def test_a_roofline_is_what_one_counts_by_hand() -> None:
    """8B in bfloat16, all weights read once a step: 14 GB of layers, 1.05 GB of head; reading is bound by products."""
    estimate = roofline_trace("llama-3-8b", "h200", prompts=64, prompt_tokens=100, max_new_tokens=11, batch_size=64)
    roof, layers = DEVICES["h200"], 32 * (4096 * 2 * (4096 + 1024) + 3 * 4096 * 14336 + 2 * 4096)
    head, cached = 128_256 * 4096, 32 * 2 * 1024 * 2 * 64 * (100 + 11 / 2)
    step = (2 * layers + cached) / roof.bandwidth + 2 * head / roof.bandwidth
    prefill = 2 * layers * 6400 / roof.flops
    assert estimate.seconds["generation"] == pytest.approx(prefill + 10 * step)
    assert estimate.seconds["reading"] == pytest.approx(2 * layers * 64 * 110 / roof.flops)
    cells = 64 * 110 * 33 * 2
    logits = cells * 128_256 * 4 * trace_plan.LOGIT_PASSES / roof.bandwidth
    assert estimate.seconds["lens"] == pytest.approx(2 * head * cells / roof.flops + logits)
    assert estimate.rows == 64 * 110
    few = roofline_trace("llama-3-8b", "h200", prompts=3, prompt_tokens=100, max_new_tokens=11, batch_size=64)
    assert few.seconds["reading"] == pytest.approx(estimate.seconds["reading"] * 3 / 64)


def test_devices_share_prompts_or_layers() -> None:
    asked = {"prompts": 10**6, "prompt_tokens": 200, "max_new_tokens": 96}
    one = roofline_trace("llama-3-70b", "h200", **asked)
    eight = roofline_trace("llama-3-70b", "h200x8", **asked)
    assert eight.total_s == pytest.approx(one.total_s / 8)
    assert eight.memory_bytes == one.memory_bytes > 141e9  # which no H200 has: the layers must be split
    split = roofline_trace("llama-3-70b", "h200x8/8", **asked)
    assert split.memory_bytes < 60e9
    free = roofline_trace("llama-3-70b", Machine("h200", 8, 8, link=1e18), **asked)
    assert free.total_s == pytest.approx(one.total_s / 8, rel=0.02)  # but for keys and values, whose share is small
    assert split.total_s > free.total_s
    assert roofline_trace("llama-3-70b", "h200x8/8", given=True, **asked).seconds["generation"] == 0


TOLD = "llama:layers=80,width=8192,inner=28672,heads=64,key_value_heads=8,vocabulary=128256"


def test_a_model_is_described_by_its_configuration_alone(tiny, tiny_folder, tmp_path) -> None:
    asked = {"prompts": 10**6, "prompt_tokens": 200}
    expected = roofline_trace("llama-3-70b", "h200x8/8", **asked)
    for source in (described("llama-3-70b"), described(TOLD)):
        found = roofline_trace(source, "h200x8/8", **asked)
        assert found.seconds == expected.seconds and found.memory_bytes == expected.memory_bytes
    assert described(TOLD).anatomy.parameters == 70_553_706_496
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(tiny_folder / "config.json", folder)
    for place in (folder, folder / "config.json"):
        assert replace(Dimensions.of(described(place)), name="tiny") == Dimensions.of(tiny)
    experts = {"model_type": "mixtral", "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48,
               "num_local_experts": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
               "vocab_size": 50}  # fmt: skip
    (tmp_path / "moe.json").write_text(json.dumps(experts))
    layer = Dimensions.of(described(tmp_path / "moe.json")).layer_parameters
    assert layer == 4 * 3 * 32 * 48 + 4 * 32 + 2 * 32 * (32 + 16) + 2 * 32  # experts, router, attention, norms


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("no-such-model", "the shapes are llama-3-8b"),
        ("llama:layers=80,depth=3", "'depth=3' is no size"),
        ("llama:layers=-1", "is no size"),
        ("llama:layers=99999", "num_hidden_layers"),
        ("nobody:layers=2", "'nobody' model"),
        ("t5:layers=2", "'t5' model"),
        ("llama:width=30,heads=7", "describes no model"),
    ],
)
def test_what_describes_no_model_is_refused(text, what) -> None:
    with pytest.raises(InputError, match=what):
        described(text)


@pytest.mark.parametrize("text", ["h2000x8", "h200x8/3", "x8", "h200x0", "", "h200x8/0"])
def test_wrong_machines_are_refused(text) -> None:
    with pytest.raises(InputError, match=r"no roofline is known|make no machine"):
        Machine.of(text)


def test_names_of_machines() -> None:
    assert Machine.of("m1-max") == Machine("m1-max")
    assert Machine.of("h200x8/4") == Machine("h200", 8, 4)


def test_the_command_plans_and_writes_nothing(tmp_path, capsys) -> None:
    from probekit.cli.app import run

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nThe king\n")
    words = ["trace", "tales-tied", "--prompts", str(prompts), "-o", str(tmp_path / "run"), "--max-new-tokens", "4"]
    assert run([*words, "--plan", "--prompt-count", "1000", "--processes", "4", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["source"], found["prompts"], found["processes"]) == (
        "probekit/trace-plan/1",
        "sampled",
        1000,
        4,
    )
    assert run([*words, "--plan", "--on", "h200x8/2"]) == 0
    assert "on 8 h200" in capsys.readouterr().out.replace("\n", " ")
    assert run([*words, "--on", "h200"]) == 2
    assert "Add --plan" in capsys.readouterr().err
    words = [
        "trace",
        TOLD,
        "-o",
        str(tmp_path / "run"),
        "--plan",
        "--prompt-tokens",
        "200",
        "--prompt-count",
        "1000000",
    ]
    assert run([*words, "--on", "h200x8/8", "--json"]) == 0
    expected = roofline_trace("llama-3-70b", "h200x8/8", prompts=10**6, prompt_tokens=200)
    assert json.loads(capsys.readouterr().out)["total_s"] == pytest.approx(expected.total_s)
    assert run(words) == 2
    assert "--on h200x8" in capsys.readouterr().err
    assert run([*words[:-4], "--prompt-tokens", "9000", "--on", "h200"]) == 2
    assert "exceed the context" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [prompts]
