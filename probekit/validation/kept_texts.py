"""What a validation has decoded so far, kept until all of it is, so that one that was ended goes on.

Each process appends to a file of its own, a line a prompt: what autoregressive decoding wrote, and what each cell did
beside it. A cell's speedup is taken over the text that was decoded in the same turn, whoever decoded it, and when.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from probekit.decoding.results import Decoded
from probekit.errors import InputError, ProbekitError, Remark
from probekit.files import append_line, locked, make_folder
from probekit.foreign.json import parse_json
from probekit.kept import sealed
from probekit.ranks import Ranks

_DECODED: TypeAdapter[Decoded] = TypeAdapter(Decoded)
Turn = tuple[Decoded, Decoded]
"""What autoregressive decoding and a cell made of one prompt, decoded one after the other."""


@dataclass
class KeptTexts:
    """Texts that were decoded before, and a place for those to come.

    path: the file of this process; None: nothing is kept. digest: of what texts depend on beside the cell; lines of
        others are passed over. turns: {(cell, prompt, repeat): what is known}, the cell by its name.
    """

    path: Path | None = None
    digest: str = ""
    turns: dict[tuple[str, int, int], Turn] = field(default_factory=dict)

    def add(self, prompt: int, repeat: int, plain: Decoded, runs: Mapping[str, Decoded]) -> None:
        """One prompt, decoded by some cells. Where the disk has no more room, it says so, and keeps nothing more."""
        self.turns |= {(name, prompt, repeat): (plain, run) for name, run in runs.items()}
        if self.path is None:
            return
        texts = {name: asdict(run) for name, run in runs.items()}
        made = json.dumps({"prompt": prompt, "repeat": repeat, "plain": asdict(plain), "runs": texts})
        try:
            append_line(self.path, sealed(self.digest, made))
        except ProbekitError as error:
            warnings.warn(f"{error.problem.rstrip('.')}: no more of this validation is kept.", Remark, stacklevel=2)
            self.path = None


@contextmanager
def keeping_texts(folder: str | Path | None, digest: str, names: Iterable[str], ranks: Ranks) -> Iterator[KeptTexts]:
    """What is in a folder of these cells, and a file for this process, which alone writes to the folder.

    folder: None keeps nothing; so does one that cannot be made, of which it warns. names: of all cells, of all
        processes. Raises InputError while another validation writes to the folder.
    """
    with ExitStack() as stack:

        def opened() -> Path | None:
            if folder is None or not ranks.first:
                return None
            try:
                place = make_folder(folder)
            except ProbekitError as error:
                warnings.warn(f"{error.problem.rstrip('.')}: nothing of this validation is kept.", Remark, stacklevel=4)
                return None
            return stack.enter_context(locked(place))

        def read() -> dict[tuple[str, int, int], Turn]:
            return {} if place is None or not ranks.first else _read(place, digest, set(names))

        place = ranks.agreed(opened)
        place = ranks.from_first(place)
        turns = ranks.from_first(ranks.agreed(read))
        path = None
        if place is not None and (ranks.first or not ranks.in_step):  # in step, the first writes what all decoded
            if not ranks.first:
                stack.enter_context(locked(place, ranks.rank))
            path = place / f"decoded-{ranks.rank:05d}.jsonl"
            if path.is_file():
                append_line(path, "")  # a killed writer may have left half a line
        yield KeptTexts(path, digest, turns)
        ranks.all("written")  # the first one's lock is everybody's


def _read(folder: Path, digest: str, names: set[str]) -> dict[tuple[str, int, int], Turn]:
    """Every whole line of these settings. What is damaged is named, and decoded again."""
    turns: dict[tuple[str, int, int], Turn] = {}
    for path in sorted(folder.glob("decoded-*.jsonl")):
        damaged = 0
        with path.open("rb") as lines:
            for line in lines:
                try:
                    kept = parse_json(line.decode(), str(path)) if line.strip() else None
                    if kept is not None and kept["digest"] == digest:
                        turns |= _turns(kept["made"], kept["sha256"], names)
                except (InputError, ValidationError, ValueError, LookupError, TypeError, AttributeError):
                    damaged += 1
        if damaged:
            says = f"{damaged} lines of {path} are damaged or half written; what they held is decoded again."
            warnings.warn(says, Remark, stacklevel=4)
    return turns


def _turns(made: Mapping[str, Any], checksum: str, names: set[str]) -> dict[tuple[str, int, int], Turn]:
    if sha256(json.dumps(made).encode()).hexdigest() != checksum:
        raise InputError("the line is damaged.")
    plain = _DECODED.validate_python(made["plain"])
    where = int(made["prompt"]), int(made["repeat"])
    return {
        (name, *where): (plain, _DECODED.validate_python(run)) for name, run in made["runs"].items() if name in names
    }
