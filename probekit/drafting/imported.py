"""A drafter from elsewhere, by what it says along the target's own text: a Parquet file. Nothing here needs torch.

A row is one draft: the token that the drafter proposes for one output position of one prompt's text, given the text
before it (and its own state at that depth).

    prompt, output   integers: which prompt of the trace, which output position (0: the first generated token)
    token            integer: what is drafted there, its most probable token
    depth            integer, optional: 0 for the first draft of a round, 1 for the second, ..: for heads whose drafts
                     depend on how far back their round began (EAGLE, Medusa); without it they are the same at any depth
    text_id          integer, optional: the text's own token there; held against the trace
    q                number, optional: the drafter's probability of the text's own token
    accept_probability  number, optional: min(1, q / p) of the text's own token, with q and p as they were sampled from

Greedy text needs `token`. Sampled text takes `accept_probability`, or `q` where it was sampled at temperature 1 from
all tokens; with neither, the drafter is taken to put everything on `token`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from probekit.drafting.drafters import Drafter, Outlook
from probekit.drafting.keys import IMPORTED, DrafterKey
from probekit.drafting.text_drafters import common_beginning
from probekit.errors import InputError

if TYPE_CHECKING:
    from probekit.drafting.proposers import BoundDrafter
    from probekit.models.loaded import Loaded
    from probekit.traces.trace import Trace

NOTHING = -1  # no draft
_WHOLE, _NUMBERS = ("prompt", "output", "token", "depth", "text_id"), ("q", "accept_probability")
_NEEDED = ("prompt", "output", "token")
MOST_DEPTH = 1024


@dataclass(frozen=True, eq=False)
class ImportedDrafter:
    """What a drafter from elsewhere would draft, along texts that are known.

    Parameters
    ----------
    name: as tables show it.
    tokens: {prompt: (depths, N) int64, -1 where it drafts nothing}. One depth stands for all of them.
    step_s: seconds that one draft takes; 0 where nobody said.
    """

    name: str
    tokens: Mapping[int, np.ndarray] = field(repr=False)
    step_s: float = 0.0

    @property
    def key(self) -> DrafterKey:
        return DrafterKey(IMPORTED, model=self.name)

    def drafts(self, prompt: int, output: int, most: int) -> list[int]:
        """The chain of a round that starts at an output position, up to its end in the file."""
        known = self.tokens.get(prompt)
        found: list[int] = []
        if known is None:
            return found
        depths, length = known.shape
        for depth in range(min(most, length - output, most if depths == 1 else depths)):
            token = int(known[0 if depths == 1 else depth, output + depth])
            if token == NOTHING:
                break
            found.append(token)
        return found

    def outlook(self, trace: Trace, prompt: int, longest: int) -> Outlook:
        text = trace.outputs(prompt).tolist()
        run, drafted = np.zeros((2, len(text)), dtype=np.int32)
        for place in range(len(text)):
            drafts = self.drafts(prompt, place, longest)
            run[place], drafted[place] = common_beginning(drafts, text[place:]), len(drafts)
        return Outlook(run, drafted)

    def signal(self, trace: Trace, prompt: int) -> np.ndarray:
        """(N,) bool: whether the first draft of a round that starts there is the text's own token."""
        return self.tokens[prompt][0] == trace.outputs(prompt)

    def near_ties(self, trace: Trace, prompt: int) -> np.ndarray:
        """(N,) bool: never; the drafts are what the file says."""
        return np.zeros(len(trace.outputs(prompt)), dtype=bool)

    def overlap(self, trace: Trace, prompt: int) -> np.ndarray:
        raise InputError(f"the file of {self.name} does not say how probable its drafts are to the model.")

    def confidence(self, trace: Trace, prompt: int, of: str = "probability") -> np.ndarray:
        raise InputError(f"the file of {self.name} does not say how sure it is.", "Draft with a fixed length.")

    def on(self, loaded: Loaded) -> BoundDrafter:
        from probekit.drafting.proposers import KnownDrafts

        return KnownDrafts(self.key, self.drafts)


@dataclass(frozen=True, eq=False)
class ImportedChances:
    """How probably drafts from elsewhere are accepted along sampled texts. It cannot run in a decoder.

    chances: {prompt: (N,) float64, w of each output position}. The rest as in ImportedDrafter.
    """

    name: str
    chances: Mapping[int, np.ndarray] = field(repr=False)
    step_s: float = 0.0

    @property
    def key(self) -> DrafterKey:
        return DrafterKey(IMPORTED, model=self.name)

    def signal(self, trace: Trace, prompt: int) -> np.ndarray:
        return self.chances[prompt]

    def near_ties(self, trace: Trace, prompt: int) -> np.ndarray:
        return np.zeros(len(trace.outputs(prompt)), dtype=bool)

    def overlap(self, trace: Trace, prompt: int) -> np.ndarray:
        return np.full(len(trace.outputs(prompt)), np.nan)

    def confidence(self, trace: Trace, prompt: int, of: str = "probability") -> np.ndarray:
        raise InputError(f"the file of {self.name} does not say how sure it is.", "Draft with a fixed length.")

    def on(self, loaded: Loaded) -> BoundDrafter:
        raise InputError(
            f"{self.name} is known along sampled texts only, and a decoder writes others.", "Trace greedily to run it."
        )


def import_drafter(
    path: str | os.PathLike[str], trace: Trace, *, name: str | None = None, step_s: float = 0.0
) -> Drafter:
    """Read a drafter's file and hold it against a trace.

    Parameters
    ----------
    name: as tables show it; the file's name without its ending by default.
    step_s: seconds of one draft, for predicted speedups.

    Raises InputError for a file that cannot be read; that lacks a column, or has one of another kind, an unknown one or
    values that are missing; for drafts that stand there twice, outside the trace's prompts, texts or vocabulary; for
    texts without a draft at every position but the first; and for another text than the trace's.
    """
    path = Path(path)
    if not (np.isfinite(step_s) and step_s >= 0):
        raise InputError(f"a draft takes {step_s} seconds; expected a number of at least 0.")
    frame = _read(path)
    sizes = dict(zip(trace.texts["prompt"].tolist(), trace.texts["new_tokens"].tolist(), strict=True))
    frame = frame[frame["prompt"].isin(sizes)] if frame["prompt"].isin(sizes).any() else frame
    _check_places(frame, sizes, trace, path)
    called = name or path.stem
    chances = _chances(frame, trace, path)
    if chances is not None:
        return ImportedChances(called, _scattered(frame, sizes, chances, path), step_s)
    depths = int(frame["depth"].max()) + 1
    tokens = {prompt: np.full((depths, sizes[prompt]), NOTHING, dtype=np.int64) for prompt in sizes}
    for prompt in frame["prompt"].unique().tolist():
        own = frame[frame["prompt"] == prompt]
        tokens[prompt][own["depth"], own["output"]] = own["token"]
    for prompt, drafts in tokens.items():
        _check_whole(drafts[0] != NOTHING, prompt, path)
    return ImportedDrafter(called, tokens, step_s)


def _read(path: Path) -> pd.DataFrame:
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path} of a drafter.", "Name a .parquet file; the docs give its columns.")
    try:
        schema = pq.read_schema(path)
        unknown = [each for each in schema.names if each not in (*_WHOLE, *_NUMBERS)]
        missing = [each for each in _NEEDED if each not in schema.names]
        if unknown or missing:
            raise InputError(
                f"{path} has the unknown columns {unknown} and lacks {missing}.",
                f"A drafter's file has {', '.join(_NEEDED)} and perhaps {', '.join((*_WHOLE[3:], *_NUMBERS))}.",
            )
        table = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:  # a name that is no UTF-8 is a ValueError
        raise InputError(f"{path} cannot be read as Parquet: {_line(error)}.", "Write it again.") from None
    columns = {}
    for each in table.column_names:
        column = table[each]
        fits = pa.types.is_integer(column.type) or (each in _NUMBERS and pa.types.is_floating(column.type))
        if not fits or column.null_count:
            wanted = "whole numbers" if each in _WHOLE else "numbers"
            raise InputError(f"{path} holds {column.type} with {column.null_count} missing values as {each!r}; "
                             f"expected {wanted}, none missing.")  # fmt: skip
        if each in _WHOLE and len(column) and pc.max(column).as_py() >= 2**31:
            raise InputError(f"{path} holds {each} {pc.max(column)}: that is too large.")
        columns[each] = column.to_numpy().astype(np.int64 if each in _WHOLE else np.float64)
    frame = pd.DataFrame(columns)
    if frame.empty:
        raise InputError(f"{path} holds no draft.")
    return frame if "depth" in frame else frame.assign(depth=0)


def _check_places(frame: pd.DataFrame, sizes: Mapping[int, int], trace: Trace, path: Path) -> None:
    """Every row is a draft of one of the trace's tokens, and stands there once."""
    vocabulary = trace.manifest.model.vocabulary
    lengths = frame["prompt"].map(sizes)
    rules = (
        (lengths.isna(), "a prompt that the trace has not"),
        (~frame["output"].between(0, lengths.fillna(0) - 1), "an output position outside its text"),
        (~frame["token"].between(0, vocabulary - 1), f"a token outside 0..{vocabulary - 1}"),
        (~frame["depth"].between(0, MOST_DEPTH - 1), f"a depth outside 0..{MOST_DEPTH - 1}"),
        (frame["depth"] > frame["output"], "a draft whose round would begin before the text"),
        (frame.duplicated(["prompt", "output", "depth"]), "a draft that stands there twice"),
    )
    for wrong, what in rules:
        if wrong.any():
            row = frame[wrong].iloc[0]
            raise InputError(
                f"{path} has {what}: prompt {row['prompt']:.0f}, output {row['output']:.0f}, depth {row['depth']:.0f}, "
                f"token {row['token']:.0f} ({int(wrong.sum())} such rows).",
                "Its rows are drafts along the texts of this very trace.",
            )
    if "text_id" in frame:
        for prompt in sorted(frame["prompt"].unique().tolist()):
            own = frame[frame["prompt"] == prompt]
            texts = trace.outputs(prompt)[own["output"]]
            if (places := np.flatnonzero(texts != own["text_id"])).size:
                at = int(own["output"].iloc[places[0]])
                raise InputError(
                    f"{path} is of another text: prompt {prompt} has token {int(own['text_id'].iloc[places[0]])} at "
                    f"output {at}, where the trace has {int(texts[places[0]])}.",
                    "Make it on the texts of this trace.",
                )


def _chances(frame: pd.DataFrame, trace: Trace, path: Path) -> np.ndarray | None:
    """(rows,) w, for sampled and given text where the file says enough; else None."""
    settings = trace.manifest.settings
    if settings.text == "greedy" or not any(each in frame for each in _NUMBERS):
        return None
    if frame["depth"].max() > 0:
        raise InputError(
            f"{path} has probabilities by depth.", "Along sampled text, only drafts of one depth are read."
        )
    named = "accept_probability" if "accept_probability" in frame else "q"
    chances = frame[named].to_numpy()
    if not ((chances >= 0) & (chances <= 1)).all():
        raise InputError(f"{path} holds {named} outside [0, 1].")
    if named == "accept_probability":
        return chances
    plain = settings.text == "given" or (
        settings.decoding["temperature"] == 1 and not settings.decoding["top_k"] and settings.decoding["top_p"] == 1
    )
    if not plain:
        raise InputError(
            f"{path} gives q, and these texts were sampled with {dict(settings.decoding)}.",
            "Give accept_probability, min(1, q / p) with q and p as they were sampled from.",
        )
    log_p = {prompt: trace.values(prompt, "log_probability")[-1] for prompt in trace.prompts}
    own = np.array([log_p[int(p)][int(o)] for p, o in zip(frame["prompt"], frame["output"], strict=True)], np.float64)
    return np.minimum(1.0, chances / np.exp(own))


def _scattered(frame: pd.DataFrame, sizes: Mapping[int, int], values: np.ndarray, path: Path) -> dict[int, np.ndarray]:
    found = {prompt: np.full(length, np.nan) for prompt, length in sizes.items()}
    for prompt, output, value in zip(frame["prompt"], frame["output"], values, strict=True):
        found[int(prompt)][int(output)] = value
    for prompt, own in found.items():
        _check_whole(~np.isnan(own), prompt, path)
    return {prompt: np.nan_to_num(own, nan=0.0) for prompt, own in found.items()}


def _check_whole(there: np.ndarray, prompt: int, path: Path) -> None:
    """Position 0 may be missing: the prefill emits it."""
    if not there[1:].all():
        raise InputError(
            f"{path} has no draft at output {int(np.flatnonzero(~there[1:])[0]) + 1} of prompt {prompt} "
            f"({int((~there[1:]).sum())} positions are missing there).",
            "A first draft (depth 0) is needed at every position.",
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
