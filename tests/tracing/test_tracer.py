from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tracing.jobs import ran

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.sampling import warp
from probekit.errors import InputError, Remark, ResourceError
from probekit.lens.noise import Noise
from probekit.models.synthetic import synthetic
from probekit.settings import Sampling
from probekit.traces.trace import Trace
from probekit.tracing import plan as plans
from probekit.tracing import tracer as room
from probekit.tracing.backend import HooksBackend, Reading
from probekit.tracing.plan import _batches
from probekit.tracing.prompts import Prompt
from probekit.tracing.reading import drafter_statistics
from probekit.tracing.tracer import trace

TEXTS = ["hello you", "the king was old", "a", "once upon a time there was a boy who"]


def naive_logits(loaded, ids, kind: str = "final-norm") -> torch.Tensor:
    """(L+1, rows, vocabulary): transformers' own hidden states, one text at a time, each through norm and head."""
    model, last = loaded.model, []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    with torch.inference_mode():
        output = model(torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False)
    handle.remove()
    states = [*output.hidden_states[:-1], last[-1]]
    with torch.inference_mode():
        normed = [model.model.norm(state) for state in states]
        rows = normed if kind == "final-norm" else [*states[:-1], normed[-1]]
        logits = torch.stack([model.lm_head(state)[0].float() for state in rows])
    torch.testing.assert_close(logits[-1], output.logits[0].float(), rtol=1e-4, atol=1e-4)
    return logits


def whole(traced: Trace, prompt: int) -> np.ndarray:
    return np.concatenate([traced.prompt_ids(prompt), traced.outputs(prompt)])


def frames(traced: Trace) -> dict[str, pd.DataFrame]:
    names = ("texts", "tokens", "layers", "top", "drafter")
    return {name: getattr(traced, name) for name in names if getattr(traced, name) is not None}


def assert_same_bits(one: Trace, two: Trace) -> None:
    assert frames(one).keys() == frames(two).keys()
    for name, frame in frames(one).items():
        pd.testing.assert_frame_equal(frame, frames(two)[name], check_exact=True)


def assert_close(one: Trace, two: Trace) -> None:
    """The same rows and tokens in whatever order, figures equal up to rounding."""
    assert one.prompts == two.prompts
    for name in ("tokens", "layers"):
        keys = ["prompt", "position"] if name == "tokens" else ["prompt", "lens", "layer", "position"]
        mine, theirs = (getattr(each, name).sort_values(keys, ignore_index=True) for each in (one, two))
        exact = [column for column in mine if mine[column].dtype.kind != "f" and column != "near_tie"]
        pd.testing.assert_frame_equal(mine[exact], theirs[exact])
        rest = [column for column in mine if mine[column].dtype.kind == "f"]
        pd.testing.assert_frame_equal(mine[rest], theirs[rest], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ what it says
@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    made = {}
    for name, shape, seed in (("untied", "tiny", 1), ("tied", "tiny-tied", 2)):
        loaded = synthetic(shape, seed=seed)
        made[name] = (loaded, trace(loaded, TEXTS, max_new_tokens=12, top_prompts=2))
    return made


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_text_is_the_model_s_own(traces, name) -> None:
    loaded, traced = traces[name]
    assert traced.manifest.settings.text == "greedy"
    for prompt, text in enumerate(TEXTS):
        assert traced.prompt_ids(prompt).tolist() == loaded.tokenizer(text)["input_ids"]
        ids = traced.prompt_ids(prompt).tolist()
        for token in traced.outputs(prompt).tolist():  # greedy, without any cache
            with torch.inference_mode():
                assert loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax() == token
            ids.append(token)
        ended = ids[-1] in loaded.eos_ids
        assert traced.ended(prompt) == ("eos" if ended else "budget")
        assert ended or len(traced.outputs(prompt)) == 12
        assert not set(traced.outputs(prompt)[:-1].tolist()) & loaded.eos_ids


@pytest.mark.parametrize("name", ["untied", "tied"])
@pytest.mark.parametrize("lens", ["final-norm", "raw"])
def test_rows_are_those_of_a_plain_forward_pass(traces, name, lens) -> None:
    loaded, traced = traces[name]
    layers = traced.layers
    for prompt in traced.prompts:
        ids = whole(traced, prompt)
        logits = naive_logits(loaded, ids[:-1], lens)
        log_q = logits.log_softmax(-1)
        own = log_q[-1]
        following = torch.from_numpy(ids[1:]).long()
        mine = layers[(layers["prompt"] == prompt) & (layers["lens"] == lens)]
        table = {
            column: mine.pivot(index="layer", columns="position", values=column).to_numpy()
            for column in ("argmax", "agrees", "probability", "margin", "log_probability", "entropy", "kl", "overlap",
                           "echo", "rank")
        }  # fmt: skip
        two = logits.topk(2, dim=-1).values
        clear = ((two[..., 0] - two[..., 1]) > 1e-4).numpy()  # an argmax of rounding noise may fall either way
        assert clear.mean() > 0.99
        assert (table["argmax"] == logits.argmax(-1).numpy())[clear].all()
        assert (table["agrees"] == (logits.argmax(-1) == logits[-1].argmax(-1)).numpy())[clear].all()
        assert (table["echo"] == (logits.argmax(-1) == torch.from_numpy(ids[:-1])).numpy())[clear].all()
        expected = {
            "probability": log_q.amax(-1).exp(),
            "margin": two[..., 0] - two[..., 1],
            "log_probability": log_q.gather(-1, following.expand(len(logits), -1)[..., None])[..., 0],
            "entropy": -(log_q.exp() * log_q).sum(-1),
            "kl": (own.exp() * (own - log_q)).sum(-1),
            "overlap": torch.minimum(own.exp(), log_q.exp()).sum(-1),
        }
        for column, values in expected.items():
            np.testing.assert_allclose(table[column], values.numpy(), rtol=1e-3, atol=1e-4, err_msg=column)
        score = logits.gather(-1, following.expand(len(logits), -1)[..., None])
        rank = (logits > score).sum(-1).numpy()
        assert (np.abs(table["rank"] - rank) <= 1).all()
        assert (table["rank"] == rank).mean() > 0.99


def test_rows_are_named_as_the_design_says(traces) -> None:
    loaded, traced = traces["untied"]
    texts, tokens = traced.texts.set_index("prompt"), traced.tokens
    for prompt in traced.prompts:
        P, N = texts.loc[prompt, "prompt_tokens"], texts.loc[prompt, "new_tokens"]
        rows = tokens[tokens["prompt"] == prompt]
        assert rows["position"].tolist() == list(range(P + N - 1))
        assert rows["output"].tolist() == list(range(-(P - 1), N))
        assert (rows["generated"] == (rows["output"] >= 0)).all()
        assert rows["input_id"].tolist() == whole(traced, prompt)[:-1].tolist()
        assert rows["text_id"].tolist() == whole(traced, prompt)[1:].tolist()
        assert traced.text(prompt) == TEXTS[prompt]
        assert traced.agreement(prompt).shape == (loaded.depth + 1, N)
    assert tokens.loc[tokens["text_id"] == loaded.tokenizer(" ")["input_ids"][0], "text"].eq("␣").all()
    assert len(traced.layers) == 2 * (loaded.depth + 1) * len(tokens)


def test_continuation_reads_on_from_the_prompt(traces) -> None:
    loaded, traced = traces["untied"]
    for prompt in traced.prompts:
        text = loaded.tokenizer.decode(whole(traced, prompt).tolist(), skip_special_tokens=True)
        assert text == traced.text(prompt) + traced.continuation(prompt)


def test_the_top_table_holds_the_first_prompts_only(traces) -> None:
    loaded, traced = traces["untied"]
    top = traced.top
    assert sorted(top["prompt"].unique()) == [0, 1]
    assert (top.groupby(["prompt", "position", "lens", "layer"], observed=True).size() == 10).all()
    first = top[top["place"] == 0].merge(traced.layers, on=["prompt", "position", "output", "lens", "layer"])
    assert (first["token"] == first["argmax"]).all()
    np.testing.assert_allclose(first["probability_x"], first["probability_y"], rtol=1e-5)
    logits = naive_logits(loaded, whole(traced, 1)[:-1])
    shares = logits.softmax(-1).topk(10).values[2, 3].numpy()
    mine = top[(top["prompt"] == 1) & (top["lens"] == "final-norm") & (top["layer"] == 2) & (top["position"] == 3)]
    np.testing.assert_allclose(mine.sort_values("place")["probability"], shares, rtol=1e-3)


def test_sampled_text_has_acceptance_probabilities(tiny) -> None:
    sampling = Sampling(temperature=0.7, top_k=40, top_p=0.9, seed=5)
    traced = trace(tiny, TEXTS, max_new_tokens=10, sampling=sampling)
    assert traced.manifest.settings.text == "sampled"
    assert traced.manifest.settings.decoding == {"temperature": 0.7, "top_k": 40, "top_p": 0.9}
    for prompt in traced.prompts:
        y = traced.outputs(prompt)
        rows = slice(len(traced.prompt_ids(prompt)) - 1, None)
        log_q = warp(naive_logits(tiny, whole(traced, prompt)[:-1])[:, rows], sampling)
        chosen = log_q.gather(-1, torch.tensor(y.tolist()).expand(len(log_q), -1)[..., None])[..., 0].exp()
        expected = (chosen / chosen[-1]).clamp(max=1)
        np.testing.assert_allclose(traced.accept_probability(prompt), expected.numpy(), rtol=1e-3, atol=1e-5)
        overlap = torch.minimum(log_q.exp(), log_q[-1].exp()).sum(-1)
        np.testing.assert_allclose(traced.values(prompt, "overlap"), overlap.numpy(), rtol=1e-3, atol=1e-4)
    alone = trace(tiny, [Prompt(2, TEXTS[2])], max_new_tokens=10, sampling=sampling)
    assert (alone.outputs(2) == traced.outputs(2)).all()  # a prompt's text hangs on its index, not on its batch
    other = trace(tiny, TEXTS, max_new_tokens=10, sampling=replace(sampling, seed=6))
    assert any((other.outputs(prompt)[:3] != traced.outputs(prompt)[:3]).any() for prompt in traced.prompts)


def test_texts_end_with_the_token_that_ends_them() -> None:
    loaded = synthetic("tiny", seed=1)
    traced = trace(loaded, TEXTS * 3, max_new_tokens=80, sampling=Sampling(temperature=1.5, seed=1), top_prompts=0)
    ended = [traced.ended(prompt) for prompt in traced.prompts]
    assert set(ended) == {"eos", "budget"}
    for prompt, how in enumerate(ended):
        y = traced.outputs(prompt)
        assert (y[-1] == 96) == (how == "eos")
        assert 96 not in y[:-1]
        assert len(y) == 80 or how == "eos"


def test_given_text_is_scored_at_temperature_1(tiny) -> None:
    prompts = [{"prompt": "the king ", "response": "was old"}, {"prompt": "hello"}]
    traced = trace(tiny, prompts, given=True)
    assert traced.manifest.settings.text == "given"
    assert traced.manifest.settings.decoding["temperature"] == 1.0
    assert traced.texts["prompt_tokens"].tolist() == [9, 1]
    assert traced.texts["new_tokens"].tolist() == [7, 4]
    assert traced.ended(0) == "given"
    assert traced.continuation(0) == "was old"
    assert traced.outputs(0).tolist() == tiny.tokenizer("was old")["input_ids"]
    q = naive_logits(tiny, whole(traced, 0)[:-1])[:, 8:].softmax(-1)
    chosen = q.gather(-1, torch.tensor(traced.outputs(0).tolist()).expand(len(q), -1)[..., None])[..., 0]
    np.testing.assert_allclose(
        traced.accept_probability(0), (chosen / chosen[-1]).clamp(max=1).numpy(), rtol=1e-3, atol=1e-5
    )
    assert traced.manifest.measured.timings["generation_s"] == 0


def test_a_draft_model_is_read_on_the_same_text(tiny, tiny_draft) -> None:
    for sampling in (Sampling(), Sampling(temperature=0.9, seed=2)):
        traced = trace(tiny, TEXTS, max_new_tokens=8, sampling=sampling, draft_model=tiny_draft)
        assert traced.manifest.drafter.name == tiny_draft.name
        assert traced.manifest.measured.drafter_noise >= 0
        for prompt in traced.prompts:
            ids, rows = whole(traced, prompt), slice(len(traced.prompt_ids(prompt)) - 1, None)
            p, q = (naive_logits(loaded, ids[:-1])[-1, rows] for loaded in (tiny, tiny_draft))
            assert (traced.drafter_agreement(prompt) == (p.argmax(-1) == q.argmax(-1)).numpy()).all()
            assert (traced.drafter_values(prompt, "argmax") == q.argmax(-1).numpy()).all()
            if not sampling.greedy:
                log_p, log_q = warp(p, sampling), warp(q, sampling)
                y = torch.tensor(traced.outputs(prompt).tolist())[:, None]
                w = (log_q.gather(-1, y) - log_p.gather(-1, y)).clamp(max=0).exp()[:, 0]
                np.testing.assert_allclose(traced.drafter_accept_probability(prompt), w.numpy(), rtol=1e-3, atol=1e-5)


def test_drafter_figures_by_hand() -> None:
    p = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0]]).log_softmax(-1)
    q = torch.tensor([[2.0, 1.9, 0.0], [5.0, 1.0, 0.0]])
    text = torch.tensor([1, 0])
    found = drafter_statistics(q, p, text, lambda logits: logits.log_softmax(-1), Noise((0.2,)), None)
    assert found["argmax"].tolist() == [0, 0]
    assert found["agrees"].tolist() == [True, False]  # the model's tie goes to the lower id, 1
    assert found["near_tie"].tolist() == [True, False]  # 0.1 apart; 4 apart
    torch.testing.assert_close(found["margin"], torch.tensor([0.1, 4.0]))
    assert found["accept_probability"].tolist() == [1.0, 1.0]  # q gives more than p to both
    share = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1)
    torch.testing.assert_close(found["overlap"], share)
    greedy = drafter_statistics(q, p, text, None, Noise(), torch.bfloat16)
    assert "accept_probability" not in greedy
    assert greedy["argmax_rounded"].tolist() == [0, 0]
    never = drafter_statistics(
        q, p, text, lambda logits: logits.log_softmax(-1).masked_fill(logits < 1.5, -torch.inf), Noise(), None
    )
    assert never["accept_probability"][0] == 1.0


def test_agreement_only_gives_the_same_bits(any_tiny) -> None:
    every = trace(any_tiny, TEXTS, max_new_tokens=16)
    only = trace(any_tiny, TEXTS, max_new_tokens=16, statistics="agreement")
    assert set(only.layers.columns) == {"prompt", "position", "output", "lens", "layer", "agrees", "near_tie"}
    assert only.top is None
    for prompt in every.prompts:
        assert (only.outputs(prompt) == every.outputs(prompt)).all()
        assert (only.agreement(prompt) == every.agreement(prompt)).all()
        assert (only.near_ties(prompt) == every.near_ties(prompt)).all()


def test_agreement_only_says_what_it_spared(tiny, tmp_path) -> None:
    settings = {"max_new_tokens": 9, "batch_size": 2, "statistics": "agreement"}
    first = trace(tiny, TEXTS, tmp_path / "run", **settings)
    savings = first.manifest.measured.savings
    assert savings["rows"] == (tiny.depth + 1) * len(first.tokens)
    assert savings["full"] + savings["screened"] <= savings["rows"]
    assert 0 < savings["products_avoided"] < savings["witnessed_share"] <= 1
    assert Trace.open(tmp_path / "run").manifest.measured.savings == savings
    assert trace(tiny, TEXTS[:1], max_new_tokens=3).manifest.measured.savings is None

    (tmp_path / "run" / "layers-00001.parquet").unlink()  # what is made anew was counted before
    with pytest.warns(Remark, match=r"layers-00001\.parquet is missing"):
        again = trace(tiny, TEXTS, tmp_path / "run", resume=True, **settings)
    assert again.manifest.measured.savings == savings
    assert again.manifest.measured.timings == first.manifest.measured.timings

    path = tmp_path / "run" / "manifest.json"  # a resumed run goes on counting
    document = json.loads(path.read_text())
    document["files"] = {name: digest for name, digest in document["files"].items() if "-00001" not in name}
    path.write_text(json.dumps(document))
    again = trace(tiny, TEXTS, tmp_path / "run", resume=True, **settings)
    more = again.tokens["prompt"].isin(again.manifest.plan.batches[1]).sum()
    assert again.manifest.measured.savings["rows"] == savings["rows"] + (tiny.depth + 1) * more


@pytest.mark.parametrize("statistics", ["all", "agreement"])
def test_near_ties_are_counted_in_every_trace(tiny, monkeypatch, statistics) -> None:
    monkeypatch.setattr(room, "row_noise", lambda *_: Noise((0.5,)))  # logits
    traced = trace(tiny, TEXTS, max_new_tokens=6, statistics=statistics)
    ties, bits = traced.near_tie_count()
    assert bits == (tiny.depth + 1) * int(traced.texts["new_tokens"].sum())
    assert ties == sum(int(traced.near_ties(prompt).sum()) for prompt in traced.prompts)
    assert 0 < ties < bits


def test_a_run_keeps_its_noise_by_layer(tiny, tmp_path) -> None:
    measured = trace(tiny, TEXTS, tmp_path / "run", max_new_tokens=6).manifest.measured
    assert len(measured.noise_by_layer) == tiny.depth + 1 and measured.noise == max(measured.noise_by_layer)
    assert measured.noise_rounding == 0
    read = Trace.open(tmp_path / "run").manifest.measured
    assert read.tolerance == measured.tolerance == Noise(measured.noise_by_layer)
    assert replace(read, noise_by_layer=None).tolerance == Noise((measured.noise,))  # of an earlier version


def test_nnsight_gives_equal_numbers(any_tiny, unchanged) -> None:
    if find_spec("nnsight") is None:
        pytest.skip("nnsight is not installed")
    unchanged(any_tiny.model)
    hooks = trace(any_tiny, TEXTS, max_new_tokens=6)
    nnsight = trace(any_tiny, TEXTS, max_new_tokens=6, backend="nnsight")
    assert nnsight.manifest.settings.backend == "nnsight"
    assert_same_bits(hooks, nnsight)
    assert not hasattr(object(), "save")


def test_smaller_dtypes_have_a_rounded_agreement() -> None:
    loaded = synthetic("tiny", seed=1, dtype="bfloat16")
    traced = trace(loaded, TEXTS, max_new_tokens=12)
    assert traced.manifest.settings.dtype == "bfloat16"
    assert traced.manifest.measured.noise > 0
    for prompt in traced.prompts:
        assert traced.agreement(prompt, rounded=True)[-1].all()
        assert traced.agreement(prompt, rounded=True).shape == traced.agreement(prompt).shape


def test_prompts_may_be_token_ids(tiny) -> None:
    bare = replace(tiny, tokenizer=None)
    traced = trace(bare, [[5, 6, 7], [8]], max_new_tokens=4)
    expected = Autoregressive(tiny).decode([[5, 6, 7], [8]], max_new_tokens=4)
    assert [traced.outputs(prompt).tolist() for prompt in (0, 1)] == [text.tokens for text in expected]
    assert traced.tokens.loc[traced.tokens["prompt"] == 0, "text"].iloc[:2].tolist() == ["6", "7"]
    known = Prompt(0, ids=(5, 6, 7), response_ids=tuple(expected[0].tokens))
    again = trace(bare, [known], given=True)
    assert (again.agreement(0) == traced.agreement(0)).all()


def test_chat_goes_through_the_template() -> None:
    loaded = synthetic("tiny", seed=1)
    with pytest.raises(InputError, match="no chat template"):
        trace(loaded, ["hi"], chat=True)
    loaded.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}> "
    traced = trace(loaded, ["hi"], max_new_tokens=3, chat=True)
    assert traced.text(0) == "[hi]> "
    assert traced.prompt_ids(0).tolist() == loaded.tokenizer("[hi]> ")["input_ids"]


def test_without_prompts_the_bundled_set_is_traced(tiny) -> None:
    traced = trace(tiny, max_new_tokens=1, statistics="agreement")
    assert len(traced) == 24
    assert traced.manifest.provenance.prompts_source == "bundled: general"
    assert set(traced.texts["kind"]) == {"story", "question", "list", "arithmetic", "code", "translation"}


def test_manifest_says_what_was_done(tiny) -> None:
    penalised = synthetic("tiny", seed=1)
    penalised.model.generation_config.repetition_penalty = 1.3
    manifest = trace(penalised, TEXTS, max_new_tokens=5).manifest
    assert manifest.provenance.ignored_processors == ("repetition_penalty=1.3",)
    assert manifest.model.weights_hash == tiny.weights_hash
    assert manifest.model.depth == 5
    assert manifest.model.eos_ids == (96,)
    assert (manifest.settings.dtype, manifest.settings.device, manifest.settings.backend) == ("float32", "cpu", "hooks")
    assert {"torch", "transformers", "probekit"} <= set(manifest.provenance.versions)
    assert 4 <= manifest.measured.timings["tokens"] <= 20
    assert manifest.measured.timings["trace_s"] > 0
    assert manifest.measured.timings["generation_s"] > 0
    assert manifest.measured.backoffs == ()


def test_progress_counts_prompts(tiny, tmp_path) -> None:
    calls = []
    trace(tiny, TEXTS, tmp_path / "run", max_new_tokens=3, batch_size=2,
          progress=lambda phase, done, total, **figures: calls.append((phase, done, total, figures)))  # fmt: skip
    assert [call[:3] for call in calls] == [
        ("continuing prompts", 2, 4),
        ("reading layers", 2, 4),
        ("continuing prompts", 4, 4),
        ("reading layers", 4, 4),
    ]
    assert all(figures["tokens_per_second"] > 0 for *_, figures in calls)


def test_the_model_comes_back_as_it_was(tiny, tmp_path, unchanged) -> None:
    if find_spec("nnsight") is None:
        pytest.skip("nnsight is not installed")
    unchanged(tiny.model)
    side = tiny.tokenizer.padding_side
    trace(tiny, TEXTS, max_new_tokens=3)

    def stop(*_, **__) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(tiny, TEXTS, tmp_path / "run", max_new_tokens=3, progress=stop, backend="nnsight")
    assert tiny.tokenizer.padding_side == side
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- batches and memory
@given(
    st.dictionaries(st.integers(0, 99), st.integers(1, 60), min_size=1, max_size=30),
    st.integers(1, 200),
    st.integers(1, 9),
)
def test_batches_hold_every_prompt_once_and_keep_to_the_budget(rows, budget, most) -> None:
    batches = _batches(rows, budget, most)
    assert sorted(prompt for batch in batches for prompt in batch) == sorted(rows)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(rows[prompt] for prompt in batch) <= budget
        assert len(batch) <= most
    lengths = [rows[prompt] for batch in batches for prompt in batch]
    assert lengths == sorted(lengths)  # so prompts of like length are together


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=1)])
def test_a_prompt_alone_and_among_others_reads_the_same(any_tiny, sampling) -> None:
    together = trace(any_tiny, TEXTS, max_new_tokens=10, sampling=sampling)
    alone = trace(any_tiny, TEXTS, max_new_tokens=10, sampling=sampling, batch_size=1)
    assert len(together.manifest.plan.batches) == 1
    assert len(alone.manifest.plan.batches) == 4
    assert_close(together, alone)


class Spy(HooksBackend):
    """Counts the rows of each pass; runs out of memory above a limit."""

    sizes: list[int]
    limit: int | None = None

    def read(self, inputs, rows) -> Reading:
        if self.limit is not None and rows.numel() > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {rows.numel()} rows")
        self.sizes.append(rows.numel())
        return super().read(inputs, rows)


@pytest.fixture
def spy(monkeypatch) -> type[Spy]:
    kind = type("Spied", (Spy,), {"sizes": []})
    monkeypatch.setattr(room, "open_backend", lambda name, loaded: kind(loaded))
    return kind


def test_residuals_are_bounded_by_the_row_budget(tiny, tiny_draft, tmp_path, spy, monkeypatch) -> None:
    expected = trace(tiny, TEXTS, max_new_tokens=10, draft_model=tiny_draft)
    spy.sizes.clear()
    monkeypatch.setattr(plans, "MOST_ROWS", 7)
    folder = tmp_path / "run"
    segmented = trace(tiny, TEXTS, folder, max_new_tokens=10, draft_model=tiny_draft, keep_residuals=[0, 3])
    assert max(spy.sizes) <= 7
    assert segmented.manifest.plan.segment_rows == 7
    assert_close(expected, segmented)
    for prompt in expected.prompts:
        assert (expected.drafter_agreement(prompt) == segmented.drafter_agreement(prompt)).all()
    assert len(list(folder.glob("residuals-*.safetensors"))) == 4


def test_peak_memory_does_not_grow_with_the_corpus(tiny, spy) -> None:
    for count in (1, 4):
        spy.sizes.clear()
        trace(tiny, TEXTS * count, max_new_tokens=4, batch_size=4, top_prompts=0)
        assert max(spy.sizes) <= 4 * (len(TEXTS[3]) + 3)


def test_when_memory_runs_out_the_batch_is_halved_and_nothing_is_lost(tiny, spy, tmp_path) -> None:
    expected = trace(tiny, TEXTS, max_new_tokens=10)
    assert expected.manifest.measured.backoffs == ()
    spy.sizes.clear()
    spy.limit = 50
    halved = trace(tiny, TEXTS, tmp_path / "run", max_new_tokens=10)
    assert max(spy.sizes) <= 50
    rows = 4 * int(expected.tokens.groupby("prompt").size().max())
    first = halved.manifest.measured.backoffs[0]
    assert first == {"batch": 0, "phase": "read", "size": rows, "limit": rows // 2}
    assert halved.manifest.measured.backoffs[-1]["limit"] <= 50
    assert_close(expected, halved)


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from probekit.models.synthetic import synthetic
from probekit.tracing.prompts import Prompt
from probekit.tracing.tracer import trace

def address_space():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmSize"].split()[0]) * 1024

torch.set_num_threads(1)
loaded = synthetic("tiny", seed=1, layers=3, width=64, inner=16384, heads=4, key_value_heads=2, head_dim=16)
texts = [Prompt(i, ids=(5, 6, 7), response_ids=tuple((7 * i + j) % 96 for j in range(200))) for i in range(8)]
trace(loaded, [Prompt(0, ids=(5, 6), response_ids=(7, 8))], given=True)  # whatever is made once
limit = address_space() + 100 * 2**20
if sys.argv[2] == "scarce":
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
trace(loaded, texts, sys.argv[1], given=True)
"""


@pytest.mark.second
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="address space is limited and read as on Linux")
def test_a_process_that_really_runs_out_of_memory_goes_on_with_less(tmp_path) -> None:
    """1,616 rows want 100 MB for each activation of the wide layers; no such array can be had."""
    for name in ("plenty", "scarce"):
        command = [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path / name), name]
        # a fixed threshold: large arrays go back at once, where glibc would come to keep them, in pieces of its heap
        tidy = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=tidy)
        assert run.returncode == 0, run.stderr
    plenty, scarce = (Trace.open(tmp_path / name) for name in ("plenty", "scarce"))
    assert plenty.manifest.measured.backoffs == ()
    limits = [note["limit"] for note in scarce.manifest.measured.backoffs]
    assert limits[0] == 808
    assert limits == sorted(limits, reverse=True)
    assert {note["phase"] for note in scarce.manifest.measured.backoffs} == {"read"}
    assert_close(plenty, scarce)


def test_batches_are_chosen_from_the_memory_at_hand(tiny, monkeypatch) -> None:
    row = (tiny.depth + 1) * tiny.anatomy.width * 4  # bytes of a row's residuals
    sizes = {}
    for free in (4 * 1000 * row, 4 * 60 * row, 4 * row):
        monkeypatch.setattr(plans, "free_bytes", lambda device, free=free: free)
        traced = trace(tiny, TEXTS, max_new_tokens=9, top_prompts=0, statistics="agreement")
        sizes[traced.manifest.plan.segment_rows] = len(traced.manifest.plan.batches)
    assert sizes == {1000: 1, 60: 3, 1: 4}  # a quarter of the memory; a long text goes in segments


def test_later_batches_start_with_the_smaller_limit(tiny, spy) -> None:
    spy.limit = 16
    traced = trace(tiny, TEXTS, max_new_tokens=10, batch_size=2)
    assert {note["batch"] for note in traced.manifest.measured.backoffs} == {0}
    assert max(spy.sizes) <= 16


def test_memory_that_does_not_hold_one_row_is_an_error(tiny, tmp_path, monkeypatch) -> None:
    class OnlyChecks(Spy):
        sizes: list[int] = []  # noqa: RUF012

        def read(self, inputs, rows):
            if self.sizes:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
            return super().read(inputs, rows)

    monkeypatch.setattr(room, "open_backend", lambda name, loaded: OnlyChecks(loaded))
    with pytest.raises(ResourceError, match="not even one row fits into memory"):
        trace(tiny, TEXTS, tmp_path / "run", max_new_tokens=4)
    assert not (tmp_path / "run").exists()


def test_other_errors_are_not_taken_for_missing_memory(tiny, monkeypatch) -> None:
    class Broken(Spy):
        sizes: list[int] = []  # noqa: RUF012

        def read(self, inputs, rows):
            if self.sizes:
                raise RuntimeError("a bug")
            return super().read(inputs, rows)

    monkeypatch.setattr(room, "open_backend", lambda name, loaded: Broken(loaded))
    with pytest.raises(RuntimeError, match="a bug"):
        trace(tiny, TEXTS, max_new_tokens=4)


def test_generation_backs_off_too(tiny, monkeypatch) -> None:
    expected = trace(tiny, TEXTS, max_new_tokens=6)
    decode = Autoregressive.decode

    def scarce(self, prompts, **settings):
        if len(prompts) > 1:
            raise ResourceError("two prompts do not fit.")
        return decode(self, prompts, **settings)

    monkeypatch.setattr(Autoregressive, "decode", scarce)
    halved = trace(tiny, TEXTS, max_new_tokens=6)
    assert_close(expected, halved)
    assert [(note["phase"], note["limit"]) for note in halved.manifest.measured.backoffs] == [
        ("continue", 2),
        ("continue", 1),
    ]


def test_kept_residuals_are_the_model_s(tiny, tmp_path) -> None:
    traced = trace(tiny, TEXTS, tmp_path / "run", max_new_tokens=5, keep_residuals=[3, 0, 3], batch_size=3)
    assert traced.manifest.settings.keep_residuals == (0, 3)
    seen = set()
    for part, batch in enumerate(traced.manifest.plan.batches):
        shard = load_file(tmp_path / "run" / f"residuals-{part:05d}.safetensors")
        assert set(shard) == {"layer_0", "layer_3", "prompt", "position"}
        rows = pd.read_parquet(tmp_path / "run" / f"tokens-{part:05d}.parquet")
        assert shard["prompt"].tolist() == rows["prompt"].tolist()
        assert shard["position"].tolist() == rows["position"].tolist()
        for prompt in batch:
            with torch.inference_mode():
                ids = torch.tensor([whole(traced, prompt)[:-1].tolist()])
                states = tiny.model(ids, output_hidden_states=True).hidden_states
            for site in (0, 3):
                mine = shard[f"layer_{site}"][shard["prompt"] == prompt]
                torch.testing.assert_close(mine, states[site][0], rtol=1e-4, atol=1e-5)
            seen.add(prompt)
    assert seen == {0, 1, 2, 3}


# --------------------------------------------------------------------------------------------------- resuming
KILLED = """
import os, signal, sys
from probekit.decoding.sampling import Sampling
from probekit.models.synthetic import synthetic
from probekit.tracing.tracer import trace

replace = os.replace

def replace_and_die(source, target):
    if {victim!r} in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_and_die
trace(synthetic("tiny", seed=1), {texts!r}, sys.argv[1], draft_model=synthetic("tiny-draft", seed=3), **{settings!r})
"""
SETTINGS = {"max_new_tokens": 9, "batch_size": 1, "keep_residuals": (2,), "sampling": Sampling(temperature=0.8, seed=4)}
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "victim",
    ["layers-00002", *(pytest.param(name, marks=pytest.mark.long) for name in ("tokens-00001", "residuals-00003"))],
)
def test_a_killed_run_goes_on_to_the_same_bits(victim, tiny, tiny_draft, tmp_path) -> None:
    whole_run = trace(tiny, TEXTS, tmp_path / "whole", draft_model=tiny_draft, **SETTINGS)
    folder = tmp_path / "killed"
    code = KILLED.format(victim=victim, texts=TEXTS, settings=SETTINGS)
    assert ran(code, folder) == -signal.SIGKILL
    assert 0 < len(list(folder.glob("layers-*.parquet"))) < 4

    with pytest.raises(InputError, match=r"not finished: \d of 4 parts are missing"):
        Trace.open(folder)
    with pytest.raises(InputError, match="already holds a run"):
        trace(tiny, TEXTS, folder, draft_model=tiny_draft, **SETTINGS)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("layers-*.parquet")}
    resumed = trace(tiny, TEXTS, folder, draft_model=tiny_draft, resume=True, **SETTINGS)
    for name, when in before.items():
        assert (folder / name).stat().st_mtime_ns == when  # parts that were whole were not made again
    assert_same_bits(resumed, whole_run)
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert not list(folder.glob("*.unfinished"))


def test_a_resumed_run_obeys_the_plan_of_its_manifest(tiny, tmp_path) -> None:
    first = trace(tiny, TEXTS, tmp_path / "run", max_new_tokens=5, batch_size=3)
    (tmp_path / "run" / "layers-00001.parquet").unlink()
    again = trace(tiny, TEXTS, tmp_path / "run", max_new_tokens=5, batch_size=1, resume=True)
    assert again.manifest.plan.batches == first.manifest.plan.batches
    assert_same_bits(first, again)
    done = trace(tiny, TEXTS, tmp_path / "run", max_new_tokens=5, resume=True)  # nothing left to do
    assert_same_bits(first, done)


def test_a_run_of_other_settings_is_refused(tiny, tiny_tied, tmp_path) -> None:
    if find_spec("nnsight") is None:
        pytest.skip("nnsight is not installed")
    folder = tmp_path / "run"
    trace(tiny, TEXTS, folder, max_new_tokens=5)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for change, message in [
        ({"max_new_tokens": 6}, "max_new_tokens: 5, 6"),
        ({"sampling": Sampling(temperature=1.0)}, "text: greedy, sampled"),
        ({"statistics": "agreement"}, "statistics: all, agreement"),
        ({"backend": "nnsight"}, "backend: hooks, nnsight"),
    ]:
        with pytest.raises(InputError, match=message):
            trace(tiny, TEXTS, folder, **({"max_new_tokens": 5} | change), resume=True)
    with pytest.raises(InputError, match="prompts_hash"):
        trace(tiny, TEXTS[:3], folder, max_new_tokens=5, resume=True)
    with pytest.raises(InputError, match=r"model: .*tiny.*tiny-tied"):
        trace(tiny_tied, TEXTS, folder, max_new_tokens=5, resume=True)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


# ---------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "new tokens: 0; expected a whole number of at least 1"),
        ({"batch_size": 0}, "prompts in a batch: 0"),
        ({"statistics": "some"}, "statistics are 'all' or 'agreement', not 'some'"),
        ({"backend": "baukit"}, "no backend 'baukit'"),
        ({"keep_residuals": [6]}, r"residual site 6 does not exist: this model has sites 0\.\.5"),
        ({"max_new_tokens": 250}, "prompt 1 has 16 tokens; with 250 new ones it exceeds the context of 256"),
        ({"prompts": ["a", "x" * 300]}, "prompt 1 has 300 tokens: longer than the context of 256 tokens of tiny"),
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": ["a", " "]}, "prompt 1: the prompt is empty"),
        ({"prompts": [[3, 97]]}, r"prompt 0 has token ids outside 0\.\.96"),
        ({"prompts": ["a"], "given": True}, "prompt 0 has no text to score: all of its 1 tokens are context"),
        ({"given": True, "sampling": Sampling(temperature=0.5)}, "given text is scored at temperature 1"),
    ],
)
def test_what_cannot_be_traced_is_refused_before_any_work(tiny, tmp_path, monkeypatch, settings, message) -> None:
    monkeypatch.setattr(type(tiny.model), "forward", None)  # no forward pass may happen
    settings = {"prompts": ["a", "the king was old"]} | settings
    prompts = settings.pop("prompts")
    with pytest.raises(InputError, match=message):
        trace(tiny, prompts, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_models_without_a_tokenizer_need_token_ids(tiny) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        trace(replace(tiny, tokenizer=None), ["a"])


def test_draft_models_need_the_same_tokenizer(tiny, tiny_tied, tiny_draft) -> None:
    with pytest.raises(InputError, match="tokenizer has other tokens"):
        trace(tiny, TEXTS, draft_model=tiny_tied)

    class Shifted:
        """The same vocabulary, put together otherwise."""

        def __init__(self, tokenizer) -> None:
            self.tokenizer = tokenizer

        def __call__(self, text, **settings):
            return {"input_ids": self.tokenizer(text, **settings)["input_ids"][::-1]}

        def get_vocab(self):
            return self.tokenizer.get_vocab()

    other = replace(tiny_draft, tokenizer=Shifted(tiny_draft.tokenizer))
    with pytest.raises(InputError, match="encodes prompt 0 otherwise than tiny"):
        trace(tiny, TEXTS, draft_model=other)


def test_residuals_are_kept_only_in_a_folder(tiny) -> None:
    with pytest.raises(InputError, match="name a folder"):
        trace(tiny, TEXTS, keep_residuals=[1])


def test_foreign_folders_are_left_alone(tiny, tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="not a run folder"):
        trace(tiny, TEXTS, tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_weights_that_give_nan_are_named_by_layer(layer, tmp_path) -> None:
    loaded = synthetic("tiny", seed=1)
    loaded.anatomy.layers[layer].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=rf"not finite \(NaN\) from layer {layer + 1} on"):
        trace(loaded, TEXTS, tmp_path / "run", max_new_tokens=3)
    loaded = synthetic("tiny", seed=1)
    loaded.anatomy.norm.weight[3] = torch.inf
    with pytest.raises(InputError, match=r"logits that are not finite \(NaN\) at layer 5, in norm or head"):
        trace(loaded, TEXTS, tmp_path / "run", max_new_tokens=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_smollm2_reads_the_same_in_every_way(smollm2, unchanged) -> None:
    unchanged(smollm2.model)
    texts = ["The old lighthouse keeper climbed the stairs and", "1. Boil the water.\n2."]
    traced = trace(smollm2, texts, max_new_tokens=24)
    assert_same_bits(traced, trace(smollm2, texts, max_new_tokens=24, backend="nnsight"))
    only = trace(smollm2, texts, max_new_tokens=24, statistics="agreement")
    for prompt in traced.prompts:
        assert (only.agreement(prompt) == traced.agreement(prompt)).all()
        rows = slice(len(traced.prompt_ids(prompt)) - 1, None)
        logits = naive_logits(smollm2, whole(traced, prompt)[:-1])[:, rows]
        agrees = (logits.argmax(-1) == logits[-1].argmax(-1)).numpy()
        assert (agrees == traced.agreement(prompt))[~traced.near_ties(prompt)].all()
        assert (traced.values(prompt, "argmax")[-1] == traced.outputs(prompt)).all()
