"""What once failed, and a few new inputs: every reader refuses by ProbekitError only. The long run is a command.

`python tests/tools/fuzz.py` counts 100,000 inputs, 10,000 command lines and 1,000 model folders.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from fuzzing import lines, targets

from probekit.errors import ProbekitError
from probekit.foreign import bounded

CORPUS = Path(__file__).parent / "corpus"
KEPT = sorted(path for path in CORPUS.glob("*/*") if path.is_dir())
FEW = 6
SLOW = {"adapters", "GGUF files"}
ENDLESS = {"model_folders-1-17", "model_folders-1-22", "model_folders-1-37"}  # each takes all the time that it is given


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fuzzing")
    made = targets.make_bases(folder) | {"files": folder / "files"}
    lines.make_files(made["files"])
    return made


def kept_input(folder: Path) -> targets.Changed:
    """An input of the corpus: files as they are; an ending says what was no file."""
    changed: targets.Changed = {}
    for path in folder.rglob("*"):
        name, _, ending = path.relative_to(folder).as_posix().rpartition(".")
        if ending in (targets.GONE, targets.PIPE, targets.FOLDER, targets.LINK):
            changed[name] = ending
        elif path.is_file():
            changed[path.relative_to(folder).as_posix()] = path.read_bytes()
    return changed


def kept_inputs():
    for path in KEPT:
        name = f"{path.parent.name}-{path.name}"
        yield pytest.param(path, id=name, marks=pytest.mark.second if name in ENDLESS else ())


@pytest.mark.parametrize("folder", kept_inputs())
def test_what_once_failed(folder, bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bounded, "MOST_SECONDS", 1)
    if folder.parent.name == "command_lines":
        words = json.loads((folder / "words.json").read_text())
        for name, path in bases.items():
            words = [word.replace(f"<{name}>", str(path)) for word in words]
        lines.run_line(words)
        return
    target = targets.TARGETS[folder.parent.name.replace("_", " ")]
    (tmp_path / "input").mkdir()
    with suppress(ProbekitError):
        target.read(targets.lay_out(target, kept_input(folder), bases, tmp_path / "input"))


@pytest.mark.parametrize("name", sorted(set(targets.TARGETS) - SLOW))
def test_a_few_new_inputs(name, bases, tmp_path):
    target = targets.TARGETS[name]
    for number in range(FEW):
        place = tmp_path / str(number)
        place.mkdir()
        base = bases[target.base] if target.base else place
        with suppress(ProbekitError):
            target.read(targets.lay_out(target, target.change(Random(f"few:{name}:{number}"), base), bases, place))


def test_a_few_command_lines(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(30):
        lines.run_line(lines.make_line(Random(f"few:{number}"), lines.places(bases)))
