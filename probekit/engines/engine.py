"""What an engine is told: who drafts, how many tokens, at which batch. Each engine is one value of `Engine`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probekit.choice.choose import Choice
from probekit.drafting.drafters import Drafter
from probekit.drafting.keys import EXIT, MODEL
from probekit.drafting.text_drafters import PromptLookup
from probekit.engines.acceptance import AcceptanceProfile
from probekit.errors import InputError
from probekit.prediction.rounds import LONGEST
from probekit.settings import Sampling


@dataclass(frozen=True)
class Pretrained:
    """Where the models of a run are found.

    model, drafter: arguments of transformers' `from_pretrained`, as Python source; adapter, drafter_adapter: what is
    put into them, or None. probekit cannot know them for a model that was in memory. path, drafter_path: the same for
    a command line: a hub id, a folder or a GGUF file. revision: the hub's commit, or None.
    """

    model: str = '"..."'
    drafter: str = '"..."'
    adapter: str | None = None
    drafter_adapter: str | None = None
    path: str = "MODEL"
    drafter_path: str = "DRAFT_MODEL"
    revision: str | None = None


@dataclass(frozen=True)
class Drafting:
    """Who drafts, and how many tokens: one of an exit layer, a draft model, a prompt lookup, or nobody (K = 0).

    draft_rows, exit_heads: what an exit drafts with, where that is more or less than the model's own head.
    """

    draft_length: int = 0
    exit_layer: int | None = None
    drafter: str | None = None
    lookup: PromptLookup | None = None
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    draft_rows: int | None = None
    exit_heads: str | None = None

    @classmethod
    def of(cls, choice: Choice) -> Drafting:
        """What a choice says."""
        best = choice.best
        if best.drafts is None:
            return cls(sampling=choice.sampling)
        return cls.with_drafter(best.drafts, best.draft_length, choice.sampling)

    @classmethod
    def with_drafter(cls, drafter: Drafter, draft_length: int, sampling: Sampling) -> Drafting:
        """Raises InputError for a drafter that no engine knows (a tree, a suffix lookup, one from elsewhere), and for a
        draft length out of range."""
        key = drafter.key
        if not 1 <= draft_length <= LONGEST:
            raise InputError(f"draft length {draft_length} is out of range: expected 1 to {LONGEST:,}.")
        if isinstance(drafter, PromptLookup):
            return cls(draft_length, lookup=drafter, sampling=sampling)
        if key.kind == EXIT:
            return cls(draft_length, key.exit_layer, None, None, sampling, key.rows, key.exit_heads)
        if key.kind == MODEL:
            return cls(draft_length, drafter=key.model, sampling=sampling)
        raise InputError(
            f"{key.label} is a drafter of probekit's own decoder: no engine that is exported to knows it.",
            "Export an exit layer, a draft model or a prompt lookup.",
        )

    @property
    def speculates(self) -> bool:
        return self.draft_length > 0

    @property
    def label(self) -> str:
        if self.lookup is not None:
            return self.lookup.key.label
        return self.drafter or f"layer {self.exit_layer}"


@dataclass(frozen=True)
class Entry:
    """The best draft length with so many rows in the batch; 0: no drafts. speedup: predicted; None: not costed."""

    rows: int
    draft_length: int
    speedup: float | None = None
    interval: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        interval = None if self.interval is None else list(self.interval)
        return {"rows": self.rows, "draft_length": self.draft_length, "speedup": self.speedup, "interval": interval}


def ranges(entries: Sequence[Entry]) -> list[tuple[int, int, int]]:
    """(first, last, K) rows of the batch, without gaps, from 1 to the most rows that were asked about.

    Between two batches that were asked about, the smaller one's length holds.
    """
    ordered = sorted(entries, key=lambda each: each.rows)
    found: list[tuple[int, int, int]] = []
    for place, entry in enumerate(ordered):
        first = 1 if place == 0 else entry.rows
        last = ordered[place + 1].rows - 1 if place + 1 < len(ordered) else entry.rows
        if found and found[-1][2] == entry.draft_length:
            found[-1] = (found[-1][0], last, entry.draft_length)
        else:
            found.append((first, last, entry.draft_length))
    return found


@dataclass(frozen=True)
class Engine:
    """One engine: what it is told, and by which names it reports.

    Parameters
    ----------
    name: as `--engine` has it; title: as its users write it.
    checked: the version whose source these names were read in; proved: whether rounds were counted inside it.
    first_round: the convention that its rounds are predicted by (`probekit.prediction.rounds.CONVENTIONS`).
    checkpoint: what it wants of an exit layer: "safetensors", "gguf", or None, where the model's own layers draft.
    rules: the prompt lookups that it has, by the name of their rule.
    settings: (drafting, where the models are, schedule) -> the document `settings.json`.
    shown: (the same) -> Markdown: how the settings are used.
    words: profile -> the same figures by its own names.
    schedules: (drafting, entries) -> the schedule in its own form; None where it has none.
    """

    name: str
    title: str
    checked: str
    proved: bool
    first_round: str
    checkpoint: str | None
    rules: tuple[str, ...]
    settings: Callable[[Drafting, Pretrained, Sequence[Entry]], dict[str, Any]]
    shown: Callable[[Drafting, Pretrained, Sequence[Entry]], str]
    words: Callable[[AcceptanceProfile], Mapping[str, Any]]
    schedules: Callable[[Drafting, Sequence[Entry]], Any] = lambda drafting, entries: None


def check_drafting(engine: Engine, drafting: Drafting) -> None:
    """Raise InputError where an engine cannot hold what drafts, with the reason."""
    if engine.checkpoint is not None and drafting.exit_layer is not None:
        for value, what, instead in (
            (drafting.exit_heads, "exit heads, maps between a layer and the norm",
             "Trace without --exit-heads, or fold the heads into a model of your own."),
            (drafting.draft_rows, f"a draft head of {drafting.draft_rows} rows",
             "Export without --draft-rows: the whole head drafts, which accepts more and costs more."),
        ):  # fmt: skip
            if value is not None:
                raise InputError(f"a draft model of {engine.title} cannot hold {what}.", instead)
    if drafting.lookup is not None and drafting.lookup.rule not in engine.rules:
        known = f"its rule is {' or '.join(engine.rules)}" if engine.rules else "none that probekit predicts"
        raise InputError(
            f"{engine.title} has no prompt lookup by the rule {drafting.lookup.rule}; {known}.",
            f"Write for instance {_example(engine.rules[0])}." if engine.rules else "Export an exit layer.",
        )


def _example(rule: str) -> str:
    return {"transformers": "ngram:2", "llama.cpp": "ngram:2x4:llama.cpp"}.get(rule, f"ngram:2-4:{rule}")
