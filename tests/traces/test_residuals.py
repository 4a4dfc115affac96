"""Kept residuals: every row of every part, those of a selection, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from traces.fabricate import list_again

from probekit.errors import InputError
from probekit.models.synthetic import synthetic
from probekit.probing.probes import LogisticProbe
from probekit.settings import KeptResiduals, Sampling
from probekit.traces.residuals import read_residuals
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


def test_all_layers_of_scored_rows_in_another_precision(tiny, run, tmp_path):
    kept = KeptResiduals.of("all")
    kept = trace(tiny, PROMPTS, tmp_path / "run", max_new_tokens=6,
                 keep_residuals=replace(kept, dtype="float16", rows="scored"), batch_size=2)  # fmt: skip
    assert kept.manifest.settings.keep_residuals == tuple(range(6))
    whole = run.residuals(2)
    scored = whole.frame["generated"].to_numpy()
    found = kept.residuals(2)
    assert found.frame["generated"].all() and found.frame.equals(whole.frame[scored].reset_index(drop=True))
    assert np.array_equal(found.numpy(), whole.numpy()[scored].astype(np.float16).astype(np.float32))
    header = (tmp_path / "run" / "residuals-00000.safetensors").read_bytes()[:400]
    assert b'"F16"' in header and b'"F32"' not in header


def test_a_share_is_the_same_rows_in_any_batches(tiny, tmp_path):
    some = KeptResiduals((2,), share=0.4)
    frames = [
        trace(tiny, PROMPTS, tmp_path / str(size), max_new_tokens=6, keep_residuals=some, batch_size=size)
        .residuals(2).frame.sort_values(["prompt", "position"], ignore_index=True)
        for size in (1, 4)
    ]  # fmt: skip
    assert frames[0].equals(frames[1])
    whole = len(trace(tiny, PROMPTS, max_new_tokens=6).tokens)
    assert 0.15 * whole < len(frames[0]) < 0.65 * whole
    other = trace(tiny, PROMPTS, tmp_path / "seed", max_new_tokens=6, keep_residuals=some, sampling=Sampling(seed=1))
    assert not other.residuals(2).frame.equals(frames[0])
    none = trace(tiny, PROMPTS[:1], tmp_path / "none", max_new_tokens=1, keep_residuals=KeptResiduals((2,), share=1e-9))
    assert none.residuals(2).numpy().shape == (0, tiny.anatomy.width)


def test_rows_are_taken_in_any_order_and_chosen_without_reading(run):
    residuals = run.residuals(2)
    whole = residuals.numpy()
    places = np.random.default_rng(0).permutation(len(whole))[:17]
    assert np.array_equal(residuals.take(places), whole[places])
    assert np.array_equal(residuals[-1], whole[-1]) and np.array_equal(residuals.torch().numpy(), whole)
    with pytest.raises(IndexError):
        residuals.take([len(whole)])
    odd = (residuals.frame["position"] % 2 == 1).to_numpy()
    some = residuals.where(odd).where(np.arange(odd.sum()) % 3 == 0)
    assert np.array_equal(some.numpy(), whole[odd][::3]) and len(some.frame) == len(some)
    assert np.array_equal(residuals.numpy(generated=True), residuals.scored().numpy())
    assert np.array_equal(np.concatenate(list(residuals.blocks(3))), whole)
    assert max(len(block) for block in residuals.blocks(3)) == 3
    with pytest.raises(InputError, match="truth values"):
        residuals.where(np.arange(3))


def test_a_file_larger_than_memory(tmp_path):
    """Twice the machine's memory, as a file with holes: rows are taken, chosen and probed, and nothing else is read."""
    width, row_bytes = 2**16, 4 * 2**16
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    count = 2 * memory // row_bytes
    entries, end = {}, 0
    for name, dtype, shape in (
        ("prompt", "I32", [count]),
        ("position", "I32", [count]),
        ("layer_3", "F32", [count, width]),
    ):
        size = 4 * int(np.prod(shape))
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    start = 8 + len(header)
    places = np.linspace(0, count - 1, 40).astype(np.int64)
    values = np.random.default_rng(0).normal(size=(40, width)).astype(np.float32)
    with (tmp_path / "residuals-00000.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(np.repeat(np.arange(count // 8 + 1, dtype="<i4"), 8)[:count].tobytes())
        file.write(np.tile(np.arange(8, dtype="<i4"), count // 8 + 1)[:count].tobytes())
        for place, row in zip(places.tolist(), values, strict=True):
            file.seek(start + entries["layer_3"]["data_offsets"][0] + place * row_bytes)
            file.write(row.tobytes())
        file.truncate(start + end)
    tracemalloc.start()
    residuals = read_residuals(tmp_path, 1, 3)
    assert residuals.shape == (count, width) and count * row_bytes > memory
    assert np.array_equal(residuals.take(places[::-1]), values[::-1])
    chosen = np.isin(np.arange(count), places)
    some = residuals.where(chosen)
    assert np.array_equal(some.numpy(), values)
    assert some.frame["prompt"].tolist() == (places // 8).tolist()
    truth = values[:, 7] > 0
    assert LogisticProbe(C=10.0).fit(some, truth).score(some, truth) == 1.0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < memory / 20


def test_a_dataset_feeds_a_loader_and_travels_as_a_files_name(run):
    from torch.utils.data import DataLoader, Dataset

    residuals = run.residuals(2).scored()
    labels = residuals.frame["output"].to_numpy()
    pairs = residuals.dataset(labels)
    assert isinstance(pairs, Dataset) and len(pairs) == len(residuals)
    rows, found = zip(*DataLoader(pairs, batch_size=5), strict=True)
    assert np.array_equal(torch.cat(rows).numpy(), residuals.numpy())
    assert np.array_equal(torch.cat(found).numpy(), labels)
    packed = pickle.dumps(pairs)
    assert len(packed) < residuals.numpy().nbytes
    row, label = pickle.loads(packed)[3]
    assert np.array_equal(row.numpy(), residuals[3]) and label == labels[3]
    assert np.array_equal(residuals.dataset()[0].numpy(), residuals[0])
    with pytest.raises(InputError, match="1 labels were given"):
        residuals.dataset([1])


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"dtype": "int8"}, "kept as float32"), ({"rows": "some"}, "'all' or 'scored'"), ({"share": 0.0}, r"\(0, 1\]")],
)
def test_settings_that_make_no_sense(settings, says):
    with pytest.raises(InputError, match=says):
        KeptResiduals((1,), **settings)
    with pytest.raises(InputError, match="'all'"):
        KeptResiduals.of("some")


def test_a_run_with_other_residuals_is_another_run(tiny, tmp_path):
    trace(tiny, PROMPTS[:1], tmp_path / "run", max_new_tokens=2, keep_residuals=[1])
    with pytest.raises(InputError, match="residual_rows: all, scored"):
        trace(tiny, PROMPTS[:1], tmp_path / "run", max_new_tokens=2, resume=True,
              keep_residuals=KeptResiduals((1,), rows="scored"))  # fmt: skip
