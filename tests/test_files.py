"""The one file that writes: whole or not at all, never through links or over devices, one process at a time."""

from __future__ import annotations

import ast
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import probekit
from probekit import files
from probekit.errors import InputError, ResourceError
from probekit.files import LOCK, UNFINISHED, atomic_bytes, atomic_text, check_file_target, check_folder_target, locked

PACKAGE = Path(probekit.__file__).parent
ALONE = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
PAIRS = 20
# Where something else writes files, and why. Everything else goes through probekit/files.py.
WRITES = {
    "files.py": "it is the one place",
    "models/gguf_copies.py": "a cache: a folder that is renamed when it is whole",
    "models/cut.py": "at a place that `files.built` puts in order",
    "validation/llama_cpp.py": "what a server prints, in a temporary folder",
    "validation/vllm.py": "what an engine prints, in a temporary folder",
    "validation/open_engine.py": "models for an engine, in a folder that its caller removes",
    "models/synthetic.py": "a temporary folder of its own",
}


def writing_calls(tree: ast.AST) -> list[str]:
    """Calls that write files by themselves: into a buffer they do not."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [
            each.value for each in (*node.args, *(key.value for key in node.keywords)) if isinstance(each, ast.Constant)
        ]
        if name in ("write_text", "write_bytes", "mkdir", "touch", "save_file", "save_pretrained"):
            found.append(name)
        if name == "open" and any(
            isinstance(mode, str) and set(mode) & set("wax+") and len(mode) < 4 for mode in modes
        ):
            found.append(name)
        if name == "savefig" and "format" not in {key.arg for key in node.keywords}:
            found.append(name)
        if name in ("to_csv", "to_parquet", "to_json") and (
            node.args and isinstance(node.args[0], (ast.BinOp, ast.JoinedStr))
        ):
            found.append(name)
    return found


def test_everything_is_written_in_one_place():
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE).as_posix()
        if where not in WRITES:
            assert writing_calls(ast.parse(path.read_text(encoding="utf-8"))) == [], where
    for where in WRITES:
        assert writing_calls(ast.parse((PACKAGE / where).read_text(encoding="utf-8"))), f"{where} writes nothing"


# ---------------------------------------------------------------------------------------------- whole or not at all
def test_a_file_is_replaced_whole_and_nothing_is_left(tmp_path):
    path = tmp_path / ("n" * 255)  # the longest name that there is
    atomic_text(path, "one")
    path.chmod(0o600)
    atomic_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    atomic_text(tmp_path / "half.json", '"\udc80"')
    assert (tmp_path / "half.json").read_text() == '"\\udc80"'


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EIO, ResourceError),
        (errno.EROFS, InputError),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_when_the_disk_says_no_the_old_file_stays(tmp_path, monkeypatch, number, kind, call):
    path = tmp_path / "page.html"
    atomic_text(path, "old")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, call, refuse)
    with pytest.raises(kind, match=r"page\.html cannot be written"):
        atomic_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_links_devices_and_other_places_are_refused(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name, said in (
        ("link", "is a link"), ("dangling", "is a link"), ("loop", "is a link"), ("pipe", "is no file"),
        (".", "is no file"), ("none/x", "there is no folder"), ("victim/x", "there is no folder"),
        ("n" * 256, "File name too long"), ("a\0b", "null"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            check_file_target(tmp_path / name)
        with pytest.raises(InputError, match=said):
            atomic_text(tmp_path / name, "x")
    with pytest.raises(InputError, match="is no file that can be written"):
        atomic_text("/dev/full", "x")
    for name, said in (
        ("victim", "is a file; a folder is needed"), ("victim/x", "is below .*victim"), ("dangling", "leads nowhere"),
        ("dangling/x", "leads nowhere"), ("n" * 256, "File name too long"), ("a\0b", "null"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            check_folder_target(tmp_path / name)
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


# ------------------------------------------------------------------------------------------------- one writer
HOLD = """
import sys, time
from probekit.errors import InputError
from probekit.files import locked
sys.stdin.readline()
try:
    with locked(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
except InputError as error:
    print(error, flush=True)
"""


def holder(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env=ALONE, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def tell(process: subprocess.Popen) -> None:
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.parametrize("pair", range(PAIRS))
def test_of_two_processes_one_writes(tmp_path, record_property, pair):
    """Started together: one holds the folder, the other is told which process that is. Killed: the next takes over."""
    record_property("counted", "folders that two processes wanted, and one got")
    folder = tmp_path / "folder"
    both = [holder(folder), holder(folder)]
    for process in both:
        tell(process)
    said = [process.stdout.readline().strip() for process in both]
    assert said.count("held") == 1, said
    winner = both[said.index("held")]
    refused = said[1 - said.index("held")]
    assert f"{folder} is in use: process {winner.pid} on " in refused or "another process writes to it" in refused
    if pair % 2:
        (folder / f"half{UNFINISHED}").write_text("half")
        winner.send_signal(signal.SIGKILL)
        winner.wait()
        with locked(folder):
            assert [path.name for path in folder.iterdir()] == [LOCK]
        assert list(folder.iterdir()) == []
    else:
        tell(winner)
        winner.wait()
        # Made for the lock, and gone with it; unless the process that made it is the one that was refused.
        assert not folder.exists() or list(folder.iterdir()) == []
    for process in both:
        process.communicate()


def test_within_one_process_too(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(InputError, match=rf"in use: process {os.getpid()} on .* Wait for it, or name another"):
            with locked(tmp_path / "run"):
                pass
    assert not (tmp_path / "run").exists()
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "kept").write_text("kept")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


def test_a_planted_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(InputError):
        with locked(tmp_path / "run"):
            pass
    assert (tmp_path / "victim").read_text() == "mine"


# ----------------------------------------------------------------------------------------------------- every door
@pytest.mark.parametrize("name", ["n" * 5000, "a\0b", "~nobody_at_all/x", "\udcff", "/dev/null/x", ""])
def test_names_that_no_system_holds_are_refused_at_every_door(tiny, name):
    """Path.is_file and its like raise for names that are too long, on some versions of Python."""
    from traces.fabricate import fabricate

    from probekit.costs.engine_profile import read_profile
    from probekit.drafting.imported import import_drafter
    from probekit.lens.exit_heads import load_heads
    from probekit.presentation.study_folder import open_study

    for door in (
        lambda: probekit.load(name), lambda: probekit.load("tales-tied", adapter=name),
        lambda: probekit.Trace.open(name),
        lambda: probekit.verify(name), lambda: probekit.load_prompts(name), lambda: probekit.load_log(name),
        lambda: open_study(name), lambda: read_profile(name), lambda: load_heads(name, tiny.anatomy),
        lambda: import_drafter(name, fabricate()),
    ):  # fmt: skip
        with pytest.raises(InputError):
            door()
