from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces.fabricate import fabricate, list_again, record

from probekit.errors import InputError, Remark
from probekit.traces.manifest import Manifest, read_manifest
from probekit.traces.schema import conform
from probekit.traces.storage import TraceWriter, check_run_folder
from probekit.traces.token_text import looped, spelled_bytes, visible
from probekit.traces.trace import Trace


@pytest.fixture
def trace() -> Trace:
    return fabricate(depth=3, prompts=5, tokens=12, seed=1, drafter=True, top=2)


def batched(trace: Trace, *batches: tuple[int, ...]) -> Trace:
    manifest = trace.manifest.but(batches=batches)
    return Trace.from_frames(manifest, trace.texts, trace.tokens, trace.layers, top=trace.top, drafter=trace.drafter)


def part(trace: Trace, batch: tuple[int, ...]) -> dict[str, pd.DataFrame]:
    tables = {"texts": trace.texts, "tokens": trace.tokens, "top": trace.top, "drafter": trace.drafter}
    tables["layers"] = trace.layers
    return {name: frame[frame["prompt"].isin(batch)] for name, frame in tables.items() if frame is not None}


# ------------------------------------------------------------------------------------------------ words
def test_looped_by_hand() -> None:
    # a b c a b c a: with n = 3, the runs (abc) at 3, and (bca) at 4 began before; they cover places 3..6.
    assert looped([1, 2, 3, 1, 2, 3, 1], length=3) == pytest.approx(4 / 7)
    assert looped([1, 2, 3, 4, 1, 2, 9], length=3) == 0.0
    assert looped([7] * 9) == pytest.approx(8 / 9)  # one repeated run of eight, overlapping the first
    assert looped([7] * 8) == 0.0
    assert looped([]) == 0.0


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 6))
def test_looped_is_a_share_and_grows_when_a_text_is_said_twice(tokens: list[int], length: int) -> None:
    share = looped(tokens, length)
    assert 0 <= share <= 1
    if len(tokens) >= length:
        assert looped(tokens + tokens, length) >= 0.5


def test_visible_shows_white_space() -> None:
    assert visible(" the\n\t") == "␣the⏎⇥"


# ---------------------------------------------------------------------------------------------- in memory
def test_arrays_are_the_table_s_rows(trace: Trace) -> None:
    layers, prompt = trace.layers, 2
    rows = layers[(layers["prompt"] == prompt) & (layers["lens"] == "raw") & (layers["output"] >= 0)]
    expected = rows.pivot(index="layer", columns="output", values="agrees").to_numpy()
    assert (trace.agreement(prompt, "raw") == expected).all()
    assert trace.agreement(prompt).dtype == bool
    assert trace.agreement(prompt).shape == (4, len(trace.outputs(prompt)))
    assert trace.agreement(prompt)[-1].all()
    assert trace.near_ties(prompt).shape == trace.agreement(prompt).shape
    assert trace.values(prompt, "kl").dtype == np.float32


def test_arrays_do_not_depend_on_the_order_of_rows(trace: Trace) -> None:
    shuffled = Trace.from_frames(
        trace.manifest,
        trace.texts.sample(frac=1, random_state=0),
        trace.tokens.sample(frac=1, random_state=0),
        trace.layers.sample(frac=1, random_state=0),
        top=trace.top,
        drafter=trace.drafter.sample(frac=1, random_state=0),
    )
    assert shuffled.prompts == trace.prompts
    for prompt in trace.prompts:
        assert (shuffled.agreement(prompt) == trace.agreement(prompt)).all()
        assert (shuffled.outputs(prompt) == trace.outputs(prompt)).all()
        assert (shuffled.prompt_ids(prompt) == trace.prompt_ids(prompt)).all()
        assert (shuffled.drafter_agreement(prompt) == trace.drafter_agreement(prompt)).all()


def test_ids_make_the_sequence(trace: Trace) -> None:
    for prompt in trace.prompts:
        rows = trace.tokens[trace.tokens["prompt"] == prompt]
        sequence = [*rows["input_id"], rows["text_id"].iloc[-1]]
        assert [*trace.prompt_ids(prompt), *trace.outputs(prompt)] == sequence
        assert len(trace.prompt_ids(prompt)) == trace.texts["prompt_tokens"].iloc[prompt]
        assert len(trace.outputs(prompt)) == trace.texts["new_tokens"].iloc[prompt]
        assert (trace.ended(prompt) == "eos") == (trace.outputs(prompt)[-1] == 0)
        assert trace.continuation(prompt).startswith("w")
        assert trace.text(prompt).startswith("w")


def test_arrays_cannot_be_written(trace: Trace) -> None:
    with pytest.raises(ValueError, match="read-only"):
        trace.agreement(0)[0, 0] = True


def test_selection(trace: Trace) -> None:
    some = trace.select([3, 1, 3])
    assert some.prompts == [1, 3]
    assert len(some) == 2
    assert set(some.layers["prompt"]) == {1, 3}
    assert set(some.top["prompt"]) == {1}
    assert some.agreement(3) is not None
    with pytest.raises(InputError, match=r"prompt 0 is not in this trace: it has prompts 1, 3"):
        some.agreement(0)
    with pytest.raises(InputError, match="prompt 9 is not in this trace"):
        trace.select([9])
    with pytest.raises(InputError, match="at least one prompt"):
        trace.select([])


def test_rounded_agreement_is_the_exact_one_in_float32() -> None:
    trace = fabricate(depth=2, prompts=2)
    assert (trace.agreement(0, rounded=True) == trace.agreement(0)).all()
    lower = fabricate(depth=2, prompts=2, dtype="bfloat16")
    layers = lower.layers.assign(agrees_rounded=False)
    rounded = Trace.from_frames(lower.manifest, lower.texts, lower.tokens, layers)
    assert not rounded.agreement(0, rounded=True).any()
    assert rounded.agreement(0)[-1].all()


def test_probabilities_belong_to_text_that_is_not_greedy() -> None:
    with pytest.raises(InputError, match="greedy text has no acceptance probabilities"):
        fabricate(prompts=2).accept_probability(0)
    sampled = fabricate(depth=2, prompts=2, text="sampled", drafter=True)
    w = sampled.accept_probability(1)
    assert w.dtype == np.float32
    assert ((w >= 0) & (w <= 1)).all()
    assert (w[-1] == 1).all()
    assert sampled.drafter_accept_probability(1).shape == (w.shape[1],)


def test_what_is_not_there_is_named() -> None:
    trace = fabricate(depth=2, prompts=2, statistics="agreement")
    assert trace.agreement(1).shape[0] == 3
    assert trace.top is None
    assert trace.drafter is None
    with pytest.raises(InputError, match=r"the 'layers' table of this trace has no kl\."):
        trace.values(0, "kl")
    with pytest.raises(InputError, match="no column 'colour'"):
        trace.values(0, "colour")
    with pytest.raises(InputError, match="no 'raw' lens"):
        trace.agreement(0, "raw")
    with pytest.raises(InputError, match="no draft model"):
        trace.drafter_agreement(0)


def test_a_table_with_missing_or_repeated_rows_is_refused(trace: Trace) -> None:
    for rows in (trace.layers.iloc[:-1], pd.concat([trace.layers.iloc[:-1], trace.layers.iloc[-2:-1]])):
        broken = Trace.from_frames(trace.manifest, trace.texts, trace.tokens, rows)
        with pytest.raises(InputError, match="'layers' table is not whole"):
            broken.agreement(0, "raw")


def test_tables_are_put_into_shape() -> None:
    texts = fabricate(prompts=2).texts
    shaped = conform("texts", texts[texts.columns[::-1]].astype({"prompt": "int64"}))
    assert list(shaped.columns) == list(texts.columns)
    assert shaped["prompt"].dtype == np.int32
    with pytest.raises(InputError, match=r"unknown columns \['colour'\] and lacks \['kind'\]"):
        conform("texts", texts.drop(columns="kind").assign(colour=1))


def test_to_pandas_and_representations(trace: Trace) -> None:
    whole = trace.to_pandas()
    assert len(whole) == len(trace.layers)
    assert {"kind", "text_id", "agrees", "lens"} <= set(whole.columns)
    assert "fabricated" in repr(trace)
    assert "<table>" in trace._repr_html_()
    assert "0..3" in trace._repr_html_()
    shares = np.concatenate([trace.agreement(prompt) for prompt in trace.prompts], axis=1).mean(axis=1)
    for share in shares:
        assert f">{share:.0%}</td>" in trace._repr_html_()


def test_traces_need_no_torch() -> None:
    code = "import sys, probekit.traces.trace; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------------------------------- the folder
def test_a_folder_gives_the_same_trace_back(trace: Trace, tmp_path) -> None:
    split = batched(trace, (4, 0), (2,), (1, 3))
    again = split.save(tmp_path / "run")
    assert again.folder == tmp_path / "run"
    assert again.manifest.but(files=None) == split.manifest
    assert sorted(again.manifest.files) == sorted(path.name for path in again.folder.glob("*.parquet"))
    assert again.prompts == trace.prompts
    for name in ("tokens", "layers", "top", "drafter"):
        keys = [key for key in ("prompt", "lens", "layer", "position", "place") if key in getattr(trace, name)]
        mine, theirs = (getattr(one, name).sort_values(keys, ignore_index=True) for one in (again, trace))
        pd.testing.assert_frame_equal(mine, theirs)
    fresh = Trace.open(tmp_path / "run")
    for prompt in trace.prompts:
        for lens in ("final-norm", "raw"):
            assert (fresh.agreement(prompt, lens) == trace.agreement(prompt, lens)).all()
    assert not list((tmp_path / "run").glob("*.unfinished"))
    with pytest.raises(InputError, match="already holds a run"):
        trace.save(tmp_path / "run")
    with pytest.raises(InputError, match="selection"):
        trace.select([1]).save(tmp_path / "other")


def test_parts_are_whole_or_pending(trace: Trace, tmp_path) -> None:
    split = batched(trace, (0, 1), (2, 3, 4))
    folder = tmp_path / "run"
    writer = TraceWriter(folder, split.manifest)
    assert writer.pending == [0, 1]
    writer.write(1, part(split, (2, 3, 4)))
    assert writer.pending == [0]
    with pytest.raises(InputError, match=r"not finished: 1 of 2 parts are missing.*--resume"):
        Trace.open(folder)

    (folder / "tokens-00001.parquet").unlink()  # as if it had been killed between two files
    (folder / "layers-00000.parquet.unfinished").write_bytes(b"half")
    with pytest.warns(Remark, match=r"tokens-00001\.parquet is missing; it is made anew"):
        again = TraceWriter(folder, split.manifest, resume=True)
    assert again.pending == [0, 1]
    again.write(0, part(split, (0, 1)))
    again.write(1, part(split, (2, 3, 4)))
    assert Trace.of_writer(again).prompts == [0, 1, 2, 3, 4]


def test_a_resumed_run_keeps_its_own_plan_and_measurements(trace: Trace, tmp_path) -> None:
    split = batched(trace, (0, 1), (2, 3, 4))
    writer = TraceWriter(tmp_path / "run", split.manifest)
    writer.update(noise=0.25)
    assert not (tmp_path / "run").exists()  # nothing is written before the first part
    writer.write(0, part(split, (0, 1)))
    other = split.manifest.but(batches=((0, 1, 2, 3, 4),), noise=None, versions={"torch": "0"})
    again = TraceWriter(tmp_path / "run", other, resume=True)
    assert again.manifest.plan.batches == ((0, 1), (2, 3, 4))
    assert again.manifest.measured.noise == 0.25


def test_a_run_of_other_settings_is_refused_and_they_are_named(trace: Trace, tmp_path) -> None:
    trace.save(tmp_path / "run")
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir())
    other = trace.manifest.but(max_new_tokens=99, model=record(depth=4, name="another"))
    with pytest.raises(InputError, match=r"max_new_tokens: 12, 99; model: .*fabricated.*another"):
        check_run_folder(tmp_path / "run", other, resume=True)
    with pytest.raises(InputError, match="drafter: fabricated-drafter, None"):
        check_run_folder(tmp_path / "run", trace.manifest.but(drafter=None), resume=True)
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()) == before


def test_foreign_folders_are_refused(trace: Trace, tmp_path) -> None:
    with pytest.raises(InputError, match=r"no run folder .*nowhere"):
        Trace.open(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a run folder: it has no manifest"):
        Trace.open(tmp_path)
    with pytest.raises(InputError, match="holds other files"):
        TraceWriter(tmp_path, trace.manifest, resume=True)
    with pytest.raises(InputError, match="is a file"):
        TraceWriter(tmp_path / "notes.txt", trace.manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "cannot be read"),
        ("[]", "has schema None"),
        ('{"schema": "probekit/trace/0"}', "schema 'probekit/trace/0'; this probekit reads 'probekit/trace/1'"),
        ('{"schema": "probekit/trace/1"}', "not a whole manifest"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Trace.open(tmp_path)


def test_a_damaged_part_is_named(trace: Trace, tmp_path) -> None:
    trace.save(tmp_path / "run")
    (tmp_path / "run" / "layers-00000.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"layers-00000\.parquet is damaged or of another run.*--resume"):
        Trace.open(tmp_path / "run").agreement(0)


@pytest.mark.parametrize("kept", [0, 40])
def test_a_damaged_file_of_tokens_is_named_where_texts_are_read(trace: Trace, tmp_path, kept: int) -> None:
    trace.save(tmp_path / "run")
    tokens = tmp_path / "run" / "tokens-00000.parquet"
    tokens.write_bytes(tokens.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"tokens-00000\.parquet is damaged or of another run.*--resume"):
        _ = Trace.open(tmp_path / "run").texts


def test_the_manifest_survives_the_disk(trace: Trace, tmp_path) -> None:
    manifest = trace.manifest.but(
        keep_residuals=(1, 2), backoffs=({"batch": 0, "rows": 9, "rows_limit": 4},), segment_rows=7
    )
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.to_json()["prompt_count"] == 5
    writer = TraceWriter(tmp_path / "run", manifest)
    writer.write(0, part(trace, (0, 1, 2, 3, 4)), residuals=b"a shard")
    assert read_manifest(tmp_path / "run").but(files=None) == manifest
    assert (tmp_path / "run" / "residuals-00000.safetensors").read_bytes() == b"a shard"


@pytest.mark.parametrize("batches", [(), ((0,), ()), ((0, 1), (1,))])
def test_a_plan_names_every_prompt_once(trace: Trace, batches: tuple) -> None:
    with pytest.raises(InputError, match="names every prompt once"):
        trace.manifest.but(batches=batches)


def test_residuals_need_a_folder(trace: Trace) -> None:
    with pytest.raises(InputError, match="name a folder"):
        TraceWriter(None, trace.manifest.but(keep_residuals=(1,)))


@pytest.mark.parametrize(
    ("spelling", "text"),
    [("Ã¢", "â"), ("Ã", "⟨0xC3⟩"), ("Ġa", " a"), ("<0xE2>", "⟨0xE2⟩"), ("▁word", "▁word"), ("", "")],
)
def test_bytes_that_are_no_character_are_shown_as_bytes(spelling, text):
    assert spelled_bytes(spelling) == text


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("agrees", lambda column: pa.array([None] * len(column), pa.bool_()), "lacks .* values of 'agrees'"),
        ("rank", lambda column: pa.array(["a word"] * len(column)), "holds string as 'rank', where int32 belongs"),
        ("layer", lambda column: pa.array([2**40] * len(column)), "holds int64 as 'layer', where int16 belongs"),
    ],
)
def test_columns_of_another_kind_are_named(trace, tmp_path, name, change, message):
    trace.save(tmp_path / "run")
    path = tmp_path / "run" / "layers-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, change(table[name])), path)
    list_again(tmp_path / "run")
    with pytest.raises(InputError, match=message):
        _ = Trace.open(tmp_path / "run").layers


def test_a_wider_integer_with_the_same_numbers_is_read(trace, tmp_path):
    trace.save(tmp_path / "run")
    path = tmp_path / "run" / "layers-00000.parquet"
    table = pq.read_table(path)
    wide = table["rank"].cast(pa.int64())
    pq.write_table(table.set_column(table.column_names.index("rank"), "rank", wide), path)
    list_again(tmp_path / "run")
    assert Trace.open(tmp_path / "run").layers.equals(trace.layers)


# ------------------------------------------------------------------------------------------------ piece by piece
def test_pieces_of_whole_parts_are_the_trace(tmp_path) -> None:
    whole = batched(fabricate(depth=3, prompts=9, tokens=12), (8, 0), (3, 1, 2), (4,), (7, 5, 6))
    stored = whole.save(tmp_path / "run")
    assert [piece.prompts for piece in stored.pieces()] == [whole.prompts]
    assert [piece.prompts for piece in stored.pieces(most_cells=1)] == [[0, 8], [1, 2, 3], [4], [5, 6, 7]]
    for piece in stored.pieces(most_cells=1):
        assert len(piece) == len(piece.prompts)
        for prompt in piece.prompts:
            assert (piece.agreement(prompt) == whole.agreement(prompt)).all()
            assert piece.continuation(prompt) == whole.continuation(prompt)
        with pytest.raises(InputError, match="is not in this trace"):
            piece.agreement(next(prompt for prompt in whole.prompts if prompt not in piece.prompts))
    some = stored.select([0, 4, 5])
    assert [piece.prompts for piece in some.pieces(most_cells=1)] == [[0], [4], [5]]
    assert list(whole.pieces(most_cells=1)) == [whole]  # it is in memory already


def test_columns_of_texts_need_no_texts(tmp_path) -> None:
    whole = batched(fabricate(depth=3, prompts=5, tokens=12), (4, 0), (3, 1, 2))
    stored = whole.save(tmp_path / "run")
    assert stored.text_columns("ended")["ended"].tolist() == whole.texts["ended"].tolist()
    assert stored.text_columns("new_tokens").columns.tolist() == ["prompt", "new_tokens"]
    assert stored.select([3, 0]).text_columns("kind")["prompt"].tolist() == [0, 3]
    assert stored.prompts == whole.prompts
