import numpy as np
import pandas as pd
import pytest
import torch
from traces.fabricate import fabricate
from tracing.test_tracer import naive_logits

from probekit.errors import InputError
from probekit.settings import Sampling
from probekit.traces.draft_vocabulary import DraftVocabulary, check_draft_rows
from probekit.traces.manifest import Manifest
from probekit.traces.trace import Trace
from probekit.tracing.tracer import trace

TEXTS = ["hello you", "the king was old", "a", "once upon a time there was a boy who"]
ORDER = [57, 2, 19, 40, 16, 25, 71, 3, 8, 44]


@pytest.fixture(scope="module")
def run(tiny):
    return trace(tiny, TEXTS, max_new_tokens=9, draft_vocabulary=ORDER, batch_size=2)


# ------------------------------------------------------------------------------------------------ the order
def test_frequent_tokens_come_first_and_equally_frequent_ones_by_id():
    counted = DraftVocabulary.counted([np.array([7, 3, 3]), np.array([9, 7, 1, 3])], "by hand")
    assert counted.ids == (3, 7, 1, 9)
    assert counted.order(6 + 4).tolist() == [3, 7, 1, 9, 0, 2, 4, 5, 6, 8]
    assert DraftVocabulary.counted([], "nothing").order(3).tolist() == [0, 1, 2]


def test_a_trace_counts_its_continuations():
    traced = fabricate(prompts=3)
    tokens = np.concatenate([traced.outputs(prompt) for prompt in traced.prompts]).tolist()
    counted = traced.frequent_tokens()
    assert counted.ids == tuple(sorted(set(tokens), key=lambda token: (-tokens.count(token), token)))
    assert counted.source == "3 greedy texts of fabricated, fabricated"
    assert set(traced.select([1]).frequent_tokens().ids) == set(traced.outputs(1).tolist())


@pytest.mark.parametrize("ids", [(1, 1), (-1,)])
def test_impossible_orders_are_refused(ids):
    with pytest.raises(InputError, match="distinct token ids, each 0 or more"):
        DraftVocabulary("given", ids)


@pytest.mark.parametrize("rows", [0, -3, 98, 1.5, True, None])
def test_impossible_sizes_are_refused(rows):
    with pytest.raises(InputError, match=r"is out of range: expected 1\.\.97"):
        check_draft_rows(rows, 97)


# ------------------------------------------------------------------------------------------------ the trace
def test_every_size_of_head_is_what_the_logits_say(tiny, run):
    assert run.manifest.settings.draft_vocabulary == DraftVocabulary("given", tuple(ORDER))
    assert run.draft_head["layer"].unique().tolist() == list(range(6))
    agreeing = 0
    for prompt in run.prompts:
        P, N = len(run.prompt_ids(prompt)), len(run.outputs(prompt))
        sequence = [*run.prompt_ids(prompt), *run.outputs(prompt)]
        logits = naive_logits(tiny, sequence[:-1])[:, P - 1 :]
        model = logits[-1].argmax(-1)
        for rows in range(1, 98):
            ids = torch.from_numpy(run.draft_head_ids(rows))
            drafts = ids[logits[..., ids].argmax(-1)]
            found = run.draft_head_agreement(prompt, rows)
            assert found.shape == (6, N)
            assert (found == (drafts == model).numpy()).all()
            assert not run.draft_head_near_ties(prompt, rows)[1:-1].all()
            agreeing += found[1:-1].sum()
        assert (run.draft_head_agreement(prompt, 97) == run.agreement(prompt)).all()
        assert (run.draft_head_near_ties(prompt, 97)[:-1] == run.near_ties(prompt)[:-1]).all()
    assert agreeing > 0
    assert run.draft_head_ids(12).tolist() == [*ORDER, 0, 1]


def test_near_ties_are_where_a_kept_token_comes_within_the_noise(tiny, run):
    """The columns at a noise of .3 logits, against the logits themselves."""
    from probekit.lens.draft_rows import DraftRows
    from probekit.tracing.backend import HooksBackend

    sequence = [*run.prompt_ids(1), *run.outputs(1)][:-1]
    rows = torch.ones(1, len(sequence), dtype=torch.bool)
    with HooksBackend(tiny) as source, torch.inference_mode():
        residuals = source.read({"input_ids": torch.tensor([sequence]), "use_cache": False}, rows).residuals
    order = torch.from_numpy(run.draft_head_ids(97))
    found = DraftRows(tiny.anatomy, order).read(residuals[:, len(run.prompt_ids(1)) - 1 :], noise=0.3)
    frame = run.draft_head[run.draft_head["prompt"] != 1]
    own = run.draft_head[run.draft_head["prompt"] == 1].sort_values(["layer", "output"])
    columns = {name: values.numpy().ravel() for name, values in found.items()}
    noisy = pd.concat([frame, own.assign(**columns)])
    changed = Trace.from_frames(run.manifest.but(top_prompts=0), run.texts, run.tokens, run.layers, draft_head=noisy)
    logits = naive_logits(tiny, sequence)[:, len(run.prompt_ids(1)) - 1 :]
    model = logits[-1].argmax(-1).expand(6, -1)[..., None]
    near = 0
    for size in (5, 11, 40, 97):
        ids = torch.from_numpy(changed.draft_head_ids(size))
        others = logits.scatter(-1, model, -torch.inf)[..., ids].amax(-1)
        close = (logits.gather(-1, model)[..., 0] - others).abs() < 0.3
        expected = close & torch.isin(model[..., 0], ids)
        assert (changed.draft_head_near_ties(1, size)[:-1] == expected.numpy()[:-1]).all()
        near += int(expected[:-1].sum())
    assert near > 3


def test_agreement_alone_knows_the_same_heads(tiny, run):
    short = trace(tiny, TEXTS, max_new_tokens=9, draft_vocabulary=ORDER, batch_size=2, statistics="agreement")
    pd.testing.assert_frame_equal(short.draft_head, run.draft_head)
    assert set(short.layers.columns) == {"prompt", "position", "output", "lens", "layer", "agrees", "near_tie"}


def test_a_decoder_that_rounds_asks_for_rounded_logits(tiny):
    from probekit.models.synthetic import synthetic

    half = trace(synthetic("tiny", seed=1, dtype="bfloat16"), TEXTS, max_new_tokens=9, draft_vocabulary=ORDER)
    assert "agrees_up_to_rounded" in half.draft_head
    for prompt in half.prompts:
        rounded = half.draft_head_agreement(prompt, 97, rounded=True)
        assert (rounded == half.agreement(prompt, rounded=True)).all()


# ------------------------------------------------------------------------------------------------ where it comes from
def test_a_trace_its_folder_or_ids_name_the_order(tiny, tmp_path):
    first = trace(tiny, TEXTS[:2], tmp_path / "first", max_new_tokens=9)
    by_trace = trace(tiny, TEXTS, tmp_path / "second", max_new_tokens=5, draft_vocabulary=first)
    by_folder = trace(tiny, TEXTS, max_new_tokens=5, draft_vocabulary=tmp_path / "first")
    by_ids = trace(tiny, TEXTS, max_new_tokens=5, draft_vocabulary=list(first.frequent_tokens().ids))
    for other in (by_folder, by_ids, Trace.open(tmp_path / "second")):
        pd.testing.assert_frame_equal(other.draft_head, by_trace.draft_head)
        assert other.draft_head_ids(97).tolist() == by_trace.draft_head_ids(97).tolist()
    saved = by_trace.save(tmp_path / "saved")
    assert (
        saved.manifest.but(files=by_trace.manifest.files)
        == by_trace.manifest
        == Manifest.from_json(by_trace.manifest.to_json())
    )


def test_a_run_goes_on_with_its_own_order_only(tiny, tmp_path):
    folder = tmp_path / "run"
    setting = {"max_new_tokens": 5, "batch_size": 2}
    whole = trace(tiny, TEXTS, folder, draft_vocabulary=ORDER, **setting)
    before = whole.draft_head.copy()
    (folder / "draft_head-00001.parquet").unlink()
    again = trace(tiny, TEXTS, folder, draft_vocabulary=ORDER, resume=True, **setting)
    pd.testing.assert_frame_equal(again.draft_head, before)
    for other in (None, ORDER[::-1]):
        with pytest.raises(InputError, match=r"draft_vocabulary: 10 tokens, \w{12}, "):
            trace(tiny, TEXTS, folder, draft_vocabulary=other, resume=True, **setting)


def test_a_trace_without_an_order_says_so(tiny):
    plain = trace(tiny, TEXTS[:1], max_new_tokens=3)
    assert plain.draft_head is None
    with pytest.raises(InputError, match="knows nothing of draft heads"):
        plain.draft_head_agreement(0, 5)


@pytest.mark.parametrize("setting", [{"sampling": Sampling(1.0)}, {"given": True}])
def test_only_greedy_text_is_predicted(tiny, setting):
    with pytest.raises(InputError, match="for greedy text only"):
        trace(tiny, TEXTS, max_new_tokens=3, draft_vocabulary=ORDER, **setting)


def test_an_order_of_another_vocabulary_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"names token 97; this model has tokens 0\.\.96"):
        trace(tiny, TEXTS, max_new_tokens=3, draft_vocabulary=[97])
    with pytest.raises(InputError, match="there is no run folder"):
        trace(tiny, TEXTS, max_new_tokens=3, draft_vocabulary=tmp_path / "nothing")
