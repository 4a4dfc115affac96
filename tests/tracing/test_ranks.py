"""Several processes trace one run: the same bits for any number of them, also when one is killed in the middle."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pytest
from tracing.jobs import TEXTS, bits, job, unlike

from probekit import ranks as ranks_room
from probekit.decoding.sampling import Sampling
from probekit.errors import InputError, ResourceError
from probekit.files import locked
from probekit.models.shipped import bundled_models
from probekit.ranks import Ranks, connected, joined
from probekit.traces.ledger import LedgerEntry, append_entry, ledger_of
from probekit.traces.manifest import read_manifest
from probekit.traces.trace import Trace
from probekit.tracing.prompts import Prompt
from probekit.tracing.tracer import trace

ROOT = Path(__file__).parents[2]
LOG = [
    Prompt(index, ids=(5, 6, 7 + index), response_ids=tuple((5 * index + 3 * at) % 90 for at in range(4 + index)))
    for index in range(6)
]
KINDS = {
    "greedy": {"max_new_tokens": 7, "batch_size": 1},
    "sampled, with a draft model": {
        "max_new_tokens": 7, "batch_size": 2, "sampling": Sampling(0.8, seed=4), "drafter": True,
    },
    "given, with residuals": {"prompts": LOG, "given": True, "batch_size": 1, "keep_residuals": (2,)},
    "agreement": {"max_new_tokens": 9, "batch_size": 1, "statistics": "agreement"},
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The bits that one process writes, for each kind of run."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for number, (kind, settings) in enumerate(KINDS.items()):
        assert job(1, folder / str(number), settings) == [0]
        found[kind] = bits(folder / str(number))
    return found


@pytest.mark.parametrize(
    ("size", "kind"),
    [pytest.param(2, "sampled, with a draft model", marks=pytest.mark.second), (4, "given, with residuals")],
)
def test_any_number_of_processes_writes_the_same_bits(size, kind, alone, tmp_path) -> None:
    assert job(size, tmp_path / "run", KINDS[kind]) == [0] * size
    assert unlike(bits(tmp_path / "run"), alone[kind]) == []
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(alone[kind])  # no ledger, no lock


@pytest.mark.parametrize(("victim", "again"), [(0, 1), (1, 3)])
def test_when_one_is_killed_any_number_goes_on_to_the_same_bits(victim, again, alone, tmp_path) -> None:
    settings, folder = KINDS["agreement"], tmp_path / "run"
    died = job(2, folder, settings, victim=(victim, 5))  # 3 files a part: in the middle of its second one
    assert died[victim] == -9
    assert died[1 - victim] == 1
    survivor = folder.with_suffix(f".said-{1 - victim}").read_text()
    assert "another process of this job ended before its work was done" in survivor and "--resume" in survivor
    with pytest.raises(InputError, match=r"not finished: [1-5] of 6 parts are missing"):
        Trace.open(folder)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet") if listed(folder, path.name)}
    assert len(kept) >= 3
    assert job(again, folder, {**settings, "resume": True}) == [0] * again
    assert unlike(bits(folder), alone["agreement"]) == []
    for name, when in kept.items():
        assert (folder / name).stat().st_mtime_ns == when  # what was listed was not made again


def listed(folder: Path, name: str) -> bool:
    return name in (read_manifest(folder).files or {})


@pytest.mark.long
def test_ranks_and_deaths_are_counted(alone, tmp_path, capsys) -> None:
    """1, 2, 3 and 4 processes on four kinds of run; each of them killed at several files, and resumed by others."""
    counts = {"runs": 0, "same_bits": 0, "deaths": 0, "deaths_survived": 0}
    sizes, places = (1, 2, 3, 4), (1, 4, 6)
    for size, kind in product(sizes, KINDS):
        folder = tmp_path / f"whole-{counts['runs']}"
        assert job(size, folder, KINDS[kind]) == [0] * size
        counts["runs"] += 1
        counts["same_bits"] += not unlike(bits(folder), alone[kind])
        for victim, place in product(range(size), places):
            folder = tmp_path / f"killed-{counts['runs']}-{victim}-{place}"
            if -9 not in job(size, folder, KINDS[kind], victim=(victim, place)):
                continue  # its share has fewer files
            counts["deaths"] += 1
            again = sizes[counts["deaths"] % len(sizes)]
            assert job(again, folder, {**KINDS[kind], "resume": (folder / "manifest.json").exists()}) == [0] * again
            counts["deaths_survived"] += not unlike(bits(folder), alone[kind])
    record = {
        "question": "Does a trace depend on the number of its processes, or on one of them being killed?",
        "processes": list(sizes), "kinds": list(KINDS), **counts,
        "machine": {"processors": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    path = ROOT / "docs" / "results" / "scale" / "ranks.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    with capsys.disabled():
        print(
            f"\nruns of the same bits: {counts['same_bits']} of {counts['runs']}; "
            f"killed processes survived: {counts['deaths_survived']} of {counts['deaths']}"
        )
    assert counts["same_bits"] == counts["runs"] == 16
    assert counts["deaths_survived"] == counts["deaths"] >= 100


# ------------------------------------------------------------------------------------------------ what goes wrong
def test_one_process_says_what_is_wrong_and_all_stop(tmp_path) -> None:
    folder = tmp_path / "run"
    other = {"prompts": [*TEXTS[:-1], "another text"]}
    assert job(2, folder, KINDS["greedy"], rank_1=other) == [2, 2]
    assert folder.with_suffix(".said-1").read_text().startswith("InputError: process 1 of 2 was given other things")
    assert folder.with_suffix(".said-0").read_text().startswith("ElsewhereError: process 1 of this job failed")
    assert not folder.exists()
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert job(2, folder, KINDS["greedy"]) == [2, 2]
    assert folder.with_suffix(".said-0").read_text().startswith("InputError")
    assert folder.with_suffix(".said-1").read_text().startswith("ElsewhereError: process 0 of this job failed")


def _adding(ranks: Ranks, folder: Path, settings: dict) -> None:
    """As processes that share a model: they add up; the second is killed."""
    import torch

    with joined(ranks):
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.all_reduce(torch.ones(3))


@pytest.mark.second
def test_a_death_within_a_shared_pass_is_no_fault_of_ours(tmp_path) -> None:
    assert job(2, tmp_path / "run", {}, work=_adding) == [1, -9]
    assert "another process of this job ended" in (tmp_path / "run.said-0").read_text()
    with pytest.raises(RuntimeError, match="shapes"), connected():
        raise RuntimeError("shapes")
    with pytest.raises(ResourceError, match=r"was done \(Read error \[::1\]:5: reset\)"), connected():
        raise RuntimeError("[/a/gloo/pair.cc:537] Read error [::1]:5: reset. This is mostly caused by others.")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_does_not_wait_for_ever_for_others_that_never_start(rank, monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks_room, "MEETING", timedelta(seconds=1))
    with pytest.raises(ResourceError, match=f"process {rank} of 2 did not meet the others at 127.0.0.1:{port}"):
        with joined(Ranks(rank, 2)):
            pass


def test_several_processes_need_a_folder(tiny) -> None:
    from probekit.traces.shared_run import writing_together

    with pytest.raises(InputError, match="written to files"), writing_together(None, None, Ranks(0, 2)):  # type: ignore[arg-type]
        pass


def test_a_folder_is_in_use_while_one_of_several_still_writes(tiny, tmp_path) -> None:
    folder = tmp_path / "run"
    trace(tiny, TEXTS, folder, max_new_tokens=3)
    with locked(folder, helper=3), pytest.raises(InputError, match="is in use"):  # its first process was killed
        trace(tiny, TEXTS, folder, max_new_tokens=3, resume=True)
    trace(tiny, TEXTS, folder, max_new_tokens=3, resume=True)


def test_environments_of_launchers(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert Ranks.of_environment() == Ranks()  # a single command in a SLURM job is one
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert Ranks.of_environment() == Ranks()  # and so is one that the batch script does not start with srun
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert Ranks.of_environment() == Ranks(5, 8, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Ranks.of_environment() == Ranks(1, 2, 0)  # torchrun inside it knows better
    for rank, size in (("2", "2"), ("-1", "2"), ("x", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(InputError, match="a rank must be a number below that of processes"):
            Ranks.of_environment()


# ---------------------------------------------------------------------------------------------------- ledgers
def test_a_half_written_line_of_a_ledger_does_not_count(tiny, tmp_path) -> None:
    folder = tmp_path / "run"
    whole = trace(tiny, TEXTS, folder, max_new_tokens=3, batch_size=2)
    ledger = ledger_of(folder, 2)
    append_entry(ledger, LedgerEntry(files={"texts-00009.parquet": "0" * 64}, seconds={"tokens": 4}))
    with ledger.open("a") as file:
        file.write('{"files": {"texts-00010.par')
    manifest = read_manifest(folder)
    assert "texts-00009.parquet" in manifest.files
    assert manifest.measured.timings["tokens"] == whole.manifest.measured.timings["tokens"] + 4
    ledger.write_text('{"files": 3}\n')
    with pytest.raises(InputError, match=r"ledger-00002\.jsonl is no ledger of a run.*Delete"):
        read_manifest(folder)
    ledger.write_text("{\n")
    with pytest.raises(InputError, match=r"ledger-00002\.jsonl cannot be read"):
        read_manifest(folder)


def test_a_ledger_that_was_taken_in_is_not_counted_again(tiny, tmp_path) -> None:
    folder = tmp_path / "run"
    manifest = trace(tiny, TEXTS, folder, max_new_tokens=3, statistics="agreement").manifest
    entry = LedgerEntry(files=manifest.files, seconds=manifest.measured.timings, savings=manifest.measured.savings)
    append_entry(ledger_of(folder, 0), entry)  # as if it had been killed between the two
    assert read_manifest(folder) == manifest


def test_the_manifest_is_not_written_with_every_part(tiny, tmp_path, monkeypatch) -> None:
    from probekit.traces import storage

    written, write = [], storage.atomic_text
    monkeypatch.setattr(storage, "atomic_text", lambda path, text: (written.append(path.name), write(path, text)))
    for texts in (TEXTS, TEXTS * 3):
        written.clear()
        trace(tiny, texts, tmp_path / str(len(texts)), max_new_tokens=1, batch_size=1)
        assert written == ["manifest.json"] * 2  # when it begins, and when it ends


# ------------------------------------------------------------------------------------------- on the command line
def torchrun(size: int, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    return subprocess.run(
        [*command, "-m", "probekit", *words], env=environment, text=True, capture_output=True, check=False
    )


@pytest.mark.second
def test_torchrun_traces_with_all_its_processes_and_prints_once(tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nThe king\nA fox\n")
    words = ["--prompts", str(prompts), "--max-new-tokens", "6", "--batch-size", "1"]
    ran = torchrun(2, "trace", "tales-tied", "-o", str(tmp_path / "two"), "--json", *words)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["manifest"]["prompt_count"] == 3
    one = trace("tales-tied", prompts.read_text().splitlines(), tmp_path / "one", max_new_tokens=6, batch_size=1)
    assert one.manifest.files == document["manifest"]["files"]

    ran = torchrun(2, "trace", "tales-tied", "-o", str(tmp_path / "two"), "--json", *words)
    assert ran.returncode != 0
    assert json.loads(ran.stdout)["error"].endswith("already holds a run.")
    ran = torchrun(2, "models", "--json")  # what is not shared, the first does alone
    assert len(json.loads(ran.stdout)["models"]) == len(bundled_models())
