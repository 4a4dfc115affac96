"""Drafters that need no model: what they draft follows from the text alone. Nothing here needs torch.

They draft a whole chain at the start of a round, so a draft depends on where its round began: `outlook` says, for a
round that starts at any position, how many tokens there are to draft and how many of them the model will accept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probekit.drafting.drafters import Outlook
from probekit.drafting.keys import NGRAM, SUFFIX, DrafterKey
from probekit.drafting.lookup import LatestNgramIndex, NgramIndex, SuffixIndex, TextIndex
from probekit.errors import InputError
from probekit.settings import whole_number

if TYPE_CHECKING:
    from probekit.drafting.proposers import BoundDrafter
    from probekit.models.loaded import Loaded
    from probekit.traces.trace import Trace

LLAMA_CPP = "llama.cpp"
MOST_MATCHED = 1000  # tokens: an index holds every n-gram of each size
RULES = ("transformers", "vllm", LLAMA_CPP)


@dataclass(frozen=True)
class TextLookup:
    """What the drafters that copy from prompt and output share. Subclasses say how an index is made."""

    @property
    def key(self) -> DrafterKey:
        raise NotImplementedError

    def index(self, eos_ids: Sequence[int]) -> TextIndex:
        """An empty index. eos_ids: the model's end-of-sequence tokens."""
        raise NotImplementedError

    def outlook(self, trace: Trace, prompt: int, longest: int) -> Outlook:
        """Read the text once, and ask at each output position what a round there would draft."""
        index, text = self.index(trace.manifest.model.eos_ids), trace.outputs(prompt).tolist()
        index.read(trace.prompt_ids(prompt).tolist())
        run, drafted = np.zeros((2, len(text)), dtype=np.int32)
        for place, token in enumerate(text):
            drafts = index.drafts(longest)
            run[place], drafted[place] = common_beginning(drafts, text[place:]), len(drafts)
            index.read([token])
        return Outlook(run, drafted)

    def signal(self, trace: Trace, prompt: int) -> np.ndarray:
        """(N,) bool: whether the first draft of a round that starts there is the text's own token."""
        return self.outlook(trace, prompt, 1).run > 0

    def near_ties(self, trace: Trace, prompt: int) -> np.ndarray:
        """(N,) bool: never, for copying rounds nothing."""
        return np.zeros(len(trace.outputs(prompt)), dtype=bool)

    def overlap(self, trace: Trace, prompt: int) -> np.ndarray:
        raise InputError(f"a trace does not say how probable the drafts of {self.key.model} are to the model.")

    def confidence(self, trace: Trace, prompt: int, of: str = "probability") -> np.ndarray:
        raise InputError(
            f"{self.key.model} copies tokens: it is never more or less sure of one.", "Draft with a fixed length."
        )

    def on(self, loaded: Loaded) -> BoundDrafter:
        from probekit.drafting.proposers import LookupDrafts

        return LookupDrafts(self.key, lambda: self.index(sorted(loaded.eos_ids)))


@dataclass(frozen=True)
class PromptLookup(TextLookup):
    """Prompt lookup: draft what followed the first earlier occurrence of the latest tokens, in prompt or output.

    Parameters
    ----------
    ngram: the most tokens that are matched; of several sizes that occurred before, the longest decides.
    least: the fewest.
    rule: "transformers" (`prompt_lookup_num_tokens` with `max_matching_ngram_size=ngram`; an end-of-sequence token
        ends the drafts before it), "vllm" (`ngram` with `prompt_lookup_max=ngram`, `prompt_lookup_min=least`; it may
        be drafted) or "llama.cpp" (`ngram-simple`: `ngram` tokens, no fewer, and their latest occurrence). The first
        two engines also draft past the budget in a text's last round, where nothing can be accepted; the decoder here
        does not.
    copied: of llama.cpp, the most tokens that are drafted: its rule depends on them. 0 for the others.
    """

    ngram: int = 2
    least: int = 1
    rule: str = "transformers"
    copied: int = 0

    def __post_init__(self) -> None:
        whole_number("the n-gram of prompt lookup must be", self.ngram)
        whole_number("the shortest n-gram of prompt lookup must be", self.least)
        if max(self.ngram, self.copied) > MOST_MATCHED:
            raise InputError(
                f"prompt lookup matches {self.ngram} tokens and copies {self.copied}; expected {MOST_MATCHED} at most."
            )
        if self.least > self.ngram:
            raise InputError(f"prompt lookup matches {self.least} to {self.ngram} tokens, which is no range.")
        if self.rule not in RULES:
            raise InputError(f"prompt lookup by the rule {self.rule!r} is not known: it is one of {', '.join(RULES)}.")
        latest = self.rule == LLAMA_CPP
        if latest != (self.copied > 0) or (latest and (self.least > 1 or self.copied < self.ngram)):
            raise InputError(
                f"prompt lookup by the rule {self.rule} cannot match {self.least} to {self.ngram} tokens and copy "
                f"{self.copied}: llama.cpp's matches a fixed number and copies as many or more, the others name none.",
                "Write ngram:2x4:llama.cpp, ngram:2 or ngram:1-3:vllm.",
            )

    @property
    def key(self) -> DrafterKey:
        sizes = str(self.ngram) if self.least == 1 else f"{self.least}-{self.ngram}"
        if self.copied:
            sizes = f"{self.ngram}x{self.copied}"
        return DrafterKey(NGRAM, model=f"ngram:{sizes}" + ("" if self.rule == RULES[0] else f":{self.rule}"))

    def index(self, eos_ids: Sequence[int]) -> TextIndex:
        if self.rule == LLAMA_CPP:
            return LatestNgramIndex(self.ngram, self.copied)
        return NgramIndex(self.ngram, self.least, frozenset(eos_ids if self.rule == RULES[0] else ()))


@dataclass(frozen=True)
class SuffixLookup(TextLookup):
    """Draft what followed the first earlier occurrence of the longest ending of the text that occurred before.

    A suffix automaton over prompt and output (SAM Decoding, arXiv 2411.10666). An end-of-sequence token ends the drafts
    before it. least: the fewest tokens that must match.
    """

    least: int = 1

    def __post_init__(self) -> None:
        whole_number("the shortest match of suffix lookup must be", self.least)

    @property
    def key(self) -> DrafterKey:
        return DrafterKey(SUFFIX, model="suffix" if self.least == 1 else f"suffix:{self.least}")

    def index(self, eos_ids: Sequence[int]) -> SuffixIndex:
        return SuffixIndex(self.least, frozenset(eos_ids))


def common_beginning(drafts: Sequence[int], text: Sequence[int]) -> int:
    """How many leading drafts are the text's own tokens."""
    for place, (draft, token) in enumerate(zip(drafts, text, strict=False)):
        if draft != token:
            return place
    return min(len(drafts), len(text))


def lookup_named(text: str) -> TextLookup | None:
    """The lookup that a text names: `ngram:2`, `ngram:1-3`, `ngram:2-4:vllm`, `ngram:2x4:llama.cpp`, `suffix`,
    `suffix:2`; None: none of them.

    Raises InputError for numbers or a rule that make no lookup.
    """
    kind, *rest = text.split(":")
    if kind not in (NGRAM, SUFFIX):
        return None
    try:
        given = [part for part in rest if part not in RULES]
        rules = [part for part in rest if part in RULES]
        if kind == NGRAM and rules == [LLAMA_CPP] and len(rest) == 2:
            size, _, copied = given[0].partition("x")
            return PromptLookup(int(size), rule=LLAMA_CPP, copied=int(copied or size))
        sizes = [int(number) for part in given for number in part.split("-")]
        if kind == SUFFIX and not rules and len(given) == len(sizes) <= 1:
            return SuffixLookup(*sizes)
        if kind == NGRAM and len(given) == 1 and len(sizes) <= 2 and len(rest) <= 2:
            least = sizes[0] if len(sizes) == 2 else 1
            return PromptLookup(sizes[-1], least, rules[0] if rules else RULES[0])
    except ValueError:
        pass
    raise InputError(
        f"{text!r} names no lookup.",
        "Write ngram:2, ngram:1-3, ngram:2-4:vllm, ngram:2x4:llama.cpp, suffix or suffix:2 (shortest match).",
    )
