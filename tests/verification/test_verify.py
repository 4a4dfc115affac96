"""`verify`: what we write is whole, and every kind of damage is one finding that names it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from probekit.checksums import SUMS, read_sums, write_sums
from probekit.cli.app import run as command
from probekit.errors import InputError
from probekit.files import LOCK, locked, sha256_of
from probekit.lens.exit_heads import fit_heads, load_heads, save_heads
from probekit.models.loaded import load
from probekit.settings import KeptResiduals, Sampling
from probekit.study.run import run_study
from probekit.tracing.tracer import trace
from probekit.verification.verify import verify

PROMPTS = ["abc", "defg", "h", "ij"]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load(tiny_folder, device="cpu")


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    """A run of two parts, with residuals, a draft model and the tables of two prompts."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    trace(model, PROMPTS, folder, max_new_tokens=6, batch_size=2, keep_residuals=[1], draft_model=model, top_prompts=2)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def studied(tiny_folder, tmp_path_factory, brief_calibration) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    (folder / "prompts.txt").write_text("abc\ndefg\nhij\nk\nlm\nno\n")
    run_study(
        [str(tiny_folder)], folder / "study", prompts=folder / "prompts.txt", max_new_tokens=5, exit_layers=[2],
        draft_lengths=[1], context=8, fit_heads=True, device="cpu",
    )  # fmt: skip
    return folder / "study"


@pytest.fixture
def study(studied, tmp_path) -> Path:
    return Path(shutil.copytree(studied, tmp_path / "study"))


def said(folder: Path) -> str:
    """All findings, one a line, without the folder that each begins with."""
    found = verify(folder)
    assert found.whole == (not found.findings)
    return "\n".join(str(finding).replace(f"{folder}{os.sep}", "") for finding in found)


def rewritten(path: Path, change) -> None:
    """A part with other content, and its checksum in the manifest."""
    manifest = path.parent / "manifest.json"
    pq.write_table(change(pq.read_table(path)), path)
    document = json.loads(manifest.read_text())
    document["files"][path.name] = sha256_of(path)
    manifest.write_text(json.dumps(document))


# ---------------------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"statistics": "agreement", "batch_size": 1},
        {"sampling": Sampling(temperature=1.0, seed=3), "top_prompts": 0},
        {"given": True},
        {"draft_vocabulary": [5, 6, 7]},
        {"exit_heads": True},
    ],
    ids=lambda how: ", ".join(how) or "greedy",
)
def test_what_is_written_is_whole(model, tmp_path, how):
    if "exit_heads" in how:
        ids = model.tokenizer("abcdef", return_tensors="pt").input_ids
        save_heads(tmp_path / "heads", fit_heads(model.anatomy, [ids]))
        how = {"exit_heads": load_heads(tmp_path / "heads", model.anatomy)}
    prompts = PROMPTS[:2] if "given" in how else PROMPTS
    trace(model, prompts, tmp_path / "run", max_new_tokens=6, **how)
    found = verify(tmp_path / "run")
    assert (found.kind, found.findings, [each.state for each in found.weights]) == ("run", (), ["same"])
    assert found.files == len(list((tmp_path / "run").glob("*-*.*"))) + ("exit_heads" in how)


def flipped(path: Path) -> None:
    """One bit is another, and size and times are as before."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(("rows", "share"), [("scored", 1.0), ("all", 0.5), ("scored", 0.5)])
def test_residuals_of_some_rows_are_whole(tiny, tmp_path, rows, share):
    kept = KeptResiduals((1, 3), rows=rows, share=share)
    trace(tiny, PROMPTS, tmp_path / "run", max_new_tokens=6, batch_size=2, keep_residuals=kept)
    assert said(tmp_path / "run") == ""
    edited(tmp_path / "run", residual_rows="all", residual_share=1.0)  # what it does not hold
    assert "does not hold the residuals of its texts" in said(tmp_path / "run")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda run: flipped(run / "layers-00001.parquet"), "layers-00001.parquet is damaged or of another run"),
        (lambda run: (run / "texts-00000.parquet").unlink(), "texts-00000.parquet is missing"),
        (lambda run: (run / "tokens-00000.parquet").write_bytes(b""), "tokens-00000.parquet is damaged"),
        (lambda run: shutil.copy(run / "top-00000.parquet", run / "top-00001.parquet"), "top-00001.parquet is damaged"),
        (lambda run: shutil.copy(run / "top-00000.parquet", run / "top-00002.parquet"), "top-00002.parquet is no file"),
        (lambda run: flipped(run / "residuals-00000.safetensors"), "residuals-00000.safetensors is damaged"),
        (lambda run: (run / "manifest.json").unlink(), "manifest.json"),
        (lambda run: (run / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda run: edited(run, depth=1.5), "manifest.json is not a whole manifest: model.depth"),
        (lambda run: edited(run, weights_hash="sha256:0"), "manifest.json was made with other weights"),
        (lambda run: edited(run, files=None), "manifest.json lists no checksums"),
        (lambda run: edited(run, files={}), "is not finished: 2 of 2 parts are missing"),
        (lambda run: linked(run / "drafter-00001.parquet"), "drafter-00001.parquet is a link"),
    ],
)
def test_damage_is_named(run, damage, expected):
    verify(run)  # a checksum that is remembered helps nobody
    damage(run)
    assert expected in said(run)


def edited(run: Path, **changes) -> None:
    document = json.loads((run / "manifest.json").read_text())
    for name, value in changes.items():
        (document["model"] if name in document["model"] else document)[name] = value
    (run / "manifest.json").write_text(json.dumps(document))


def linked(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def changed(table, column: str, value):
    frame = table.to_pandas()
    frame.loc[1, column] = value
    return table.from_pandas(frame, preserve_index=False)


@pytest.mark.parametrize(
    ("table", "change", "expected"),
    [
        ("texts", lambda table: table.slice(1), "texts-00000.parquet holds other prompts"),
        ("texts", lambda table: changed(table, "prompt", 7), "texts-00000.parquet holds other prompts"),
        ("tokens", lambda table: table.slice(1), "does not hold each position of each text once"),
        ("tokens", lambda table: changed(table, "position", 0), "does not hold each position of each text once"),
        ("tokens", lambda table: changed(table, "text_id", 10**6), "holds token ids (`text_id`)"),
        ("tokens", lambda table: table.drop(["text"]), "has no text"),
        ("layers", lambda table: table.slice(3), "layers-00000.parquet has"),
        ("layers", lambda table: changed(table, "layer", 77), "holds layers that the model has not: it has 5"),
        ("drafter", lambda table: table.slice(0, 2), "drafter-00000.parquet has 2 rows"),
    ],
)
def test_tables_are_held_against_each_other(run, table, change, expected):
    """A part with a right checksum, and content that no trace writes."""
    rewritten(run / f"{table}-00000.parquet", change)
    assert expected in said(run)


def test_weights_that_changed_are_named(model, tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    trace(load(folder, device="cpu"), PROMPTS[:1], tmp_path / "run", max_new_tokens=2)
    assert verify(tmp_path / "run").weights[0].state == "same"
    flipped(folder / "model.safetensors")
    assert f"was made with other weights of {folder}" in said(tmp_path / "run")
    shutil.rmtree(folder)
    [gone] = verify(tmp_path / "run").weights
    assert (gone.state, gone.why) == ("not reachable", f"{folder} is not there")
    assert verify(tmp_path / "run").whole


def test_the_command(run, capsys):
    assert command(["verify", str(run)]) == 0
    assert capsys.readouterr().out == ""
    assert command(["verify", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"] is True
    (run / "layers-00000.parquet").unlink()
    (run / "texts-00001.parquet").unlink()
    assert command(["verify", str(run)]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert command(["verify", str(run), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [finding["problem"] for finding in document["findings"]] == ["is missing"] * 2


def test_folders_that_are_none_and_folders_in_use(run, tmp_path):
    (tmp_path / "other").mkdir()
    for folder, expected in (
        (tmp_path / "none", "no folder"),
        (tmp_path / "other", "no run, no study and no exported"),
    ):
        with pytest.raises(InputError, match=expected):
            verify(folder)
    with locked(run), pytest.raises(InputError, match="is in use"):
        verify(run)
    (run / LOCK).write_text("{}")  # of a writer that was killed
    assert verify(run).whole


# ------------------------------------------------------------------------------------------------- studies, exports
def test_a_study_is_whole_and_sha256sum_says_so_too(study):
    found = verify(study)
    assert (found.kind, found.findings, [each.state for each in found.weights]) == ("study", (), ["same"])
    if shutil.which("sha256sum"):
        checked = subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=study, capture_output=True, text=True)
        assert (checked.returncode, checked.stdout) == (0, "")
    (study / "notes.txt").write_text("mine")
    assert command(["report", str(study)]) == 0  # written anew, its checksum too
    assert verify(study).whole


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("study.json", "study.json has changed"),
        ("summary.json", "summary.json has changed"),
        ("report.html", "report.html has changed"),
        ("tables/cells.csv", "tables/cells.csv has changed"),
        ("figures/agreement.svg", "figures/agreement.svg has changed"),
        ("phases/tiny/costs.json", "phases/tiny/costs.json"),
        ("exit_heads/tiny.safetensors", "exit_heads/tiny.safetensors is missing, or damaged"),
        ("traces/tiny/layers-00000.parquet", "traces/tiny/layers-00000.parquet is damaged"),
        ("traces/tiny/manifest.json", "traces/tiny/manifest.json has changed"),
        (SUMS, SUMS),
    ],
)
def test_damage_in_a_study_is_named(study, name, expected):
    flipped(study / name)
    assert expected in said(study)
    (study / name).unlink()
    assert name in said(study)


def test_a_list_that_lists_too_little(study):
    whole = (study / SUMS).read_text()
    (study / SUMS).write_text("".join(line for line in whole.splitlines(True) if "summary.json" not in line))
    assert f"summary.json is not listed in {SUMS}" in said(study)
    (study / SUMS).write_text("")
    assert f"{SUMS} lists no file" in said(study)


def test_an_exported_choice(run, tmp_path):
    words = ["choose", str(run), "--export", str(tmp_path / "out"), "--draft-lengths", "1", "--quiet"]
    assert command([*words, "--costs", "roofline", "--device", "h100"]) == 0
    found = verify(tmp_path / "out")
    listed = read_sums(tmp_path / "out")
    assert {"choice.json", "settings.json", "schedule.json", "README.md"} <= set(listed)
    assert (found.kind, found.files, found.findings) == ("export", len(listed), ())
    flipped(tmp_path / "out" / "settings.json")
    assert "settings.json has changed since it was written" in said(tmp_path / "out")
    (tmp_path / "out" / SUMS).write_text("no list")  # damaged: it is written anew, and blocks nothing
    assert command([*words, "--costs", "roofline", "--device", "h100"]) == 0
    assert verify(tmp_path / "out").whole


def test_names_in_a_list_of_checksums(tmp_path):
    for name in ("plain", "with space", "back\\slash", "new\nline", " *odd"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    assert read_sums(tmp_path) == {path.name: sha256_of(path) for path in tmp_path.iterdir() if path.name != SUMS}
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=tmp_path).returncode == 0
    for line in ("0" * 64 + "  ../outside", "0" * 64 + "  /etc/passwd", "no checksum"):
        (tmp_path / SUMS).write_text(f"{line}\n")
        with pytest.raises(InputError, match="line 1 is no checksum and file of this folder"):
            read_sums(tmp_path)


def test_a_run_of_an_earlier_version_is_read_and_said_to_have_no_checksums(run):
    document = json.loads((run / "manifest.json").read_text())
    del document["files"]
    (run / "manifest.json").write_text(json.dumps(document))
    assert said(run) == "manifest.json lists no checksums: an earlier version wrote it."
    assert len(pd.read_parquet(run / "texts-00000.parquet")) == 2
