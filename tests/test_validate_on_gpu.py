"""The script that runs on a GPU, in miniature on a CPU: every part of it, what its records hold, and how it goes on."""

from __future__ import annotations

import importlib
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

pytestmark = pytest.mark.second

ANALYSES = Path(__file__).parent.parent / "analyses"
FILES = ("validate_on_gpu", "gpu_device", "gpu_parts", "gpu_page", "gpu_plan", "benchmarking")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ANALYSES))
        yield importlib.import_module("validate_on_gpu")
    for name in FILES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def run(script):
    app = typer.Typer(add_completion=False)
    app.command()(script.main)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


MINIATURE = ("--device", "cpu", "--miniature")


@pytest.fixture(scope="module")
def miniature(run, tmp_path_factory):
    """The folder that `--all --miniature` leaves, but for real weights; the first call has time for one cell only."""
    folder = tmp_path_factory.mktemp("gpu")
    parts = [word for part in ("smoke", "micro", "costs", "cells", "peers") for word in ("--part", part)]
    first = run(*MINIATURE, "-o", folder, *parts, "--minutes", 1e-9)
    assert first.exit_code == 3 and "cells are left: run the same command again" in first.output
    assert not (folder / "smoke.json").is_file()
    result = run(*MINIATURE, "-o", folder, *parts)
    assert result.exit_code == 0, result.output
    return folder


def record(folder, name):
    found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert found["schema"] == f"probekit/gpu-{name}/2"
    assert found["machine"]["device"] == "cpu" and found["versions"]["torch"] == torch.__version__
    assert found["attention_order"] == ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    assert found["settings"]["miniature"] is True
    assert all(cell["cell_seconds"] > 0 for cell in found["cells"].values())
    assert str(folder) not in json.dumps(found)
    return found["cells"]


def test_the_plan_is_printed_and_nothing_is_run(run, tmp_path):
    """Also where there is no GPU: it is what one reads before going to one."""
    result = run("--plan", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    parts = list(dict.fromkeys(line.split()[0] for line in lines[:-1]))
    assert parts == ["smoke", "micro", "costs", "cells", "peers", "weights"]
    assert "cells    8B 0.125 0.03" in lines
    assert list(tmp_path.iterdir()) == []


def test_smoke(miniature):
    cells = record(miniature, "smoke")
    for rate in ("copy", "product"):
        assert 0 < cells["rates"][rate]["p20"] <= cells["rates"][rate]["p50"] <= cells["rates"][rate]["p80"]
    assert cells["a captured round"]["same_tokens"] and cells["a captured round"]["same_rounds"]
    assert cells["tests/foreign/test_json.py"]["passed"] and "passed" in cells["tests/foreign/test_json.py"]["says"]


def test_products_and_attention_alone(miniature):
    cells = record(miniature, "micro")
    assert cells["large qkv"]["sizes"] == [8 * (4 + 2 * 2), 32]
    assert [row["rows"] for row in cells["large head and argmax"]["rows"]] == [1, 5, 9]
    assert cells["large attention at 96"]["masked"]["p50"] > 0
    assert cells["large head's product"]["share_of_product"]["p50"] > 0
    assert "skipped" in cells["large row kernel"]


def test_costs_stand_beside_the_roofline(miniature):
    cells = record(miniature, "costs")
    # asked for at 96 tokens, where the model's context ends: the longest draft must find room
    assert {cell["context"] for cell in cells.values() if "context" in cell} == {8, 96 - 4 - 1}
    for cell in cells.values():
        for step in cell.get("steps", ()):
            assert step["seconds"] > 0 and step["roofline_s"] > 0
    steps = {step["step"] for step in cells["large at 8"]["steps"]}
    assert steps == {"autoregressive", "early 2", "head 2", "round 2 2", "round 2 4"}
    assert cells["large at 8"]["costs"]["engine"] == "cuda"
    layers, width, inner, keys, vocabulary, context = 8, 32, 48, 16, 64, 8
    weights = layers * (2 * width * (32 + keys) + 3 * width * inner + 2 * width) + vocabulary * width
    assert cells["large at 8"]["bytes"] == 4 * (weights + layers * 2 * keys * context)
    assert cells["large, profile"]["kernels"][0]["us_per_step"] > 0


def test_cells_are_predicted_and_measured(miniature):
    cells = record(miniature, "cells")
    rows = [row for cell in cells.values() for row in cell.get("rows", ())]
    assert len(rows) == 2 * 2 * 2  # shapes, dials, draft lengths; one share
    assert {(row["model"], row["exit_layer"], row["depth"]) for row in rows} == {("large", 2, 8), ("small", 1, 4)}
    for row in rows:
        assert row["unexplained"] == 0
        if row["ties"] == 0:
            assert row["rounds_equal"] and row["tokens_equal"] and row["predicted"] == row["measured"]
        assert row["speedup_predicted"] > 0 and row["speedup_measured"] > 0 and row["speedup_ideal"] > 0
        assert 1 <= row["tokens_per_round_measured"] <= row["draft_length"] + 1
    by_dial = {dial: [row["alpha_predicted"] for row in rows if row["dial"] == dial] for dial in (0.1, 0.6)}
    assert sum(by_dial[0.1]) > sum(by_dial[0.6])  # the lower the dial, the more is accepted
    margins = cells["large 0.25 0.1"]["margins"]["model"]
    assert 0 <= margins["p1"] <= margins["p50"] <= margins["p75"]
    for kind in ("pdf", "svg", "png"):
        assert (miniature / f"predicted_and_measured.{kind}").stat().st_size > 0


def test_every_way_takes_its_turns_in_the_tutorials_setting(miniature):
    cells = record(miniature, "peers")
    ways = {row["way"]: row for row in cells["decoding"]["rows"]}
    assert {
        "autoregressive", "autoregressive, recorded", "self-speculative 2,4", "self-speculative 2,4, recorded",
        "two models, 2 drafts", "transformers", "transformers, static cache", "transformers, assisted, 2 drafts",
        "transformers, early exit 2,4",
    } <= ways.keys()  # fmt: skip
    assert all(row["same_tokens"] for row in ways.values())
    assert ways["autoregressive"]["speedup_end_to_end"] == {"p20": 1, "p50": 1, "p80": 1}
    assert ways["autoregressive, recorded"]["speedup_over_recorded"] == {"p20": 1, "p50": 1, "p80": 1}
    assert {row["way"] for row in cells["lens"]["rows"]} == {
        "all statistics", "agreement", "torch: argmax, entropy, KL"
    }  # fmt: skip
    for row in cells["lens"]["rows"]:
        rate = 2 * 9 * 64 * 32 * row["tokens_per_s"]["p50"]  # sites, vocabulary, width
        assert row["share_of_product"]["p50"] == pytest.approx(
            rate / record(miniature, "smoke")["rates"]["product"]["p50"]
        )


def test_the_targets(script, miniature):
    """Each of what the device is judged by has a line: bandwidth, the products, the miss, the speedup."""
    import gpu_page
    import gpu_plan

    plan = gpu_plan.miniature("cpu", None)
    found = {part: json.loads((miniature / f"{part}.json").read_text())["cells"]
             for part in ("micro", "costs", "cells", "peers")}  # fmt: skip
    lines = {line["what"].split(":")[0]: line for line in gpu_page.targets(found, plan)}
    assert [(line["at_least"], line["at_most"]) for line in lines.values()] == [
        (0.8, None), (0.8, None), (0.8, None), (None, 0.05), (1.7, None)
    ]  # fmt: skip
    assert "lens of large, all statistics" in lines and "head's product of large" in lines


def test_dials_around_the_alpha_of_the_target_and_margins_above_rounding(script):
    """alpha .8 lies between the dials .02 and .05; logits as peaked as those of trained models, in untied shapes."""
    import gpu_device
    import gpu_plan

    plan = gpu_plan.full("cuda", None)
    assert plan.dials == (0.02, 0.03, 0.04, 0.05, 0.15) and 3 <= plan.logit_scale <= 4
    plan = gpu_plan.miniature("cpu", None)
    for name, deviation in (("large", plan.logit_scale), ("small", 1.0)):
        weight = gpu_device.MODELS.get(plan, name, 2).anatomy.head.weight
        assert float(weight.std()) * weight.shape[1] ** 0.5 == pytest.approx(deviation, rel=0.1)


def test_one_model_at_a_time(script, monkeypatch):
    """The one before is gone when the next is built."""
    import gpu_device
    import gpu_plan

    plan, alive = gpu_plan.miniature("cpu", None), []
    gpu_device.MODELS.drop()
    build = gpu_device.synthetic

    def built(*given, **setting):
        alive.append([kept() is not None for kept in there])
        return build(*given, **setting)

    there: list = []
    monkeypatch.setattr(gpu_device, "synthetic", built)
    for dial in (0.1, 0.2, 0.3):
        there.append(weakref.ref(gpu_device.MODELS.get(plan, "large", 2, dial).model))
    assert alive == [[], [False], [False, False]] and there[-1]() is not None
    assert gpu_device.MODELS.get(plan, "large", 2, 0.3).model is there[-1]()


def test_what_is_on_record_is_not_run_again(run, miniature):
    before = {path: path.read_text() for path in miniature.glob("*.json")}
    result = run(*MINIATURE, "-o", miniature, "--part", "cells", "--part", "costs")
    assert result.exit_code == 0, result.output
    assert {path: path.read_text() for path in miniature.glob("*.json")} == before
    assert "speedup of large at E/L 0.25" in result.output  # and it is judged all the same


def test_the_page_is_filled_from_the_records(run, miniature, tmp_path):
    run("--page", "-o", miniature, "--page-file", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "**A miniature**" in page and "FLASH_ATTENTION, EFFICIENT_ATTENTION, MATH" in page
    assert page.count("Not yet run on a GPU.") == 1  # real weights
    assert "| large | 2 | 4 | 0.6 |" in page
    run("--page", "-o", tmp_path / "empty", "--page-file", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "**Not yet run on a GPU**" in page and not any(sign.isdigit() for sign in page)


def test_the_page_in_the_documentation_is_the_one_of_the_records(script):
    import gpu_page

    assert (ANALYSES.parent / script.PAGE).read_text(encoding="utf-8") == gpu_page.fill_page(
        ANALYSES.parent / script.RESULTS
    )


def test_flips_are_placed_among_all_margins(script, tiny):
    """Of the exit and of the model, at every output of the traced text; and where a flip's margin stands among them."""
    import gpu_parts

    from probekit.tracing.tracer import trace

    run = trace(tiny, [[3, 4, 5]], max_new_tokens=6)
    sequence = torch.tensor([[3, 4, 5, *run.outputs(0).tolist()]])
    every = gpu_parts.margins(tiny, run, 2)
    logits = tiny.model(sequence).logits[0, 2:-1].topk(2).values
    assert every[0]["model"] == pytest.approx((logits[:, 0] - logits[:, 1]).tolist(), abs=1e-5)
    hidden = tiny.model(sequence, output_hidden_states=True).hidden_states[2][0, 2:-1]
    exits = tiny.anatomy.head(tiny.anatomy.norm(hidden)).topk(2).values
    assert every[0]["exit"] == pytest.approx((exits[:, 0] - exits[:, 1]).tolist(), abs=1e-5)
    least = min(range(6), key=every[0]["model"].__getitem__)
    flip = gpu_parts.flip_of(every, 0, least)
    assert flip["model_margin"] == min(every[0]["model"]) and flip["model_margin_quantile"] == pytest.approx(1 / 6)


def test_the_study_of_real_weights(script, run, tiny_folder, tmp_path):
    from dataclasses import replace

    import gpu_parts
    import gpu_plan

    plan = replace(gpu_plan.miniature("cpu", None), weights=(str(tiny_folder),))
    found = gpu_parts.weights(plan, str(tiny_folder), tmp_path, {})
    assert found["anatomy"]["layers"] == 5
    assert all(cell["unexplained"] == 0 for cell in found["validation"]["cells"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(run, tmp_path):
    result = run("--all", "-o", tmp_path)
    assert result.exit_code == 2
    assert "CUDA device 'cuda' is not there: this machine has none that torch can use." in result.output
    assert list(tmp_path.iterdir()) == []
