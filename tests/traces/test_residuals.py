"""Kept residuals: every row of every part, those of a selection, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from traces.fabricate import list_again

from probekit.errors import InputError
from probekit.models.synthetic import synthetic
from probekit.traces.trace import Trace
from probekit.tracing.tracer import trace

PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("residuals") / "run"
    return trace(tiny, PROMPTS, folder, max_new_tokens=6, keep_residuals=[0, 2, 5], batch_size=2)


def states_of(loaded, run, prompt, layer):
    """By transformers itself: (rows, width). The last residual is normed there, so it is not asked for."""
    ids = torch.tensor([[*run.prompt_ids(prompt), *run.outputs(prompt)][:-1]])
    return loaded.model(ids, output_hidden_states=True).hidden_states[layer][0].detach().float().numpy()


@pytest.mark.parametrize("layer", [0, 2])
def test_they_are_the_models_own(tiny, run, layer):
    found = run.residuals(layer)
    assert len(run.manifest.plan.batches) > 1
    assert found.numpy().shape == (len(run.tokens), tiny.anatomy.width) == (len(found), found.width)
    for prompt in run.prompts:
        here = (found.frame["prompt"] == prompt).to_numpy()
        assert found.frame["position"][here].tolist() == list(range(here.sum()))
        np.testing.assert_allclose(found.numpy()[here], states_of(tiny, run, prompt, layer), atol=1e-5)
    assert np.array_equal(np.asarray(found), found.numpy())
    assert np.array_equal(np.concatenate(list(found.blocks())), found.numpy())
    generated = found.frame[found.frame["generated"]]
    assert (generated["output"] >= 0).all() and len(found.numpy(generated=True)) == len(generated)


def test_a_selection_has_its_own_rows_only(run):
    some = run.select([1, 3]).residuals(2)
    assert sorted(set(some.frame["prompt"])) == [1, 3]
    whole = run.residuals(2)
    here = whole.frame["prompt"].isin([1, 3]).to_numpy()
    assert np.array_equal(some.numpy(), whole.numpy()[here])


def test_sixteen_bits_are_read_as_they_are(tmp_path):
    loaded = synthetic("tiny", seed=1, dtype="bfloat16")
    kept = trace(loaded, PROMPTS[:1], tmp_path / "run", max_new_tokens=4, keep_residuals=[1])
    expected = states_of(loaded, kept, 0, 1)
    np.testing.assert_allclose(kept.residuals(1).numpy(), expected, rtol=0.05, atol=0.02)


def test_what_was_not_kept_is_named(run, tiny):
    with pytest.raises(InputError, match="no residuals of layer 3: it kept those of layers 0, 2, 5"):
        run.residuals(3)
    with pytest.raises(InputError, match="it kept none"):
        trace(tiny, PROMPTS[:1], max_new_tokens=2).residuals(1)


def test_a_damaged_file_is_named(tiny, tmp_path):
    run = trace(tiny, PROMPTS[:1], tmp_path / "run", max_new_tokens=4, keep_residuals=[1])
    path = tmp_path / "run" / "residuals-00000.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", whole[:20], whole[:-8], b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"residuals-00000\.safetensors is damaged or of another run"):
            run.residuals(1)
        list_again(tmp_path / "run")  # a file that was written so, of another program
        with pytest.raises(InputError, match="cannot be read as residuals"):
            Trace.open(tmp_path / "run").residuals(1)
