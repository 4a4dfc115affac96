"""What decoding returns: tokens, text, and an accounting of drafted, accepted and emitted tokens.

A text ends with an end-of-sequence token, with the token that completes a stop string, or with the budget. Its tokens
include that last token; its text is everything before the end-of-sequence token or before the stop string.
"""

from __future__ import annotations

import reprlib
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, Literal

import pandas as pd

How = Literal["prefill", "accepted", "corrected", "bonus"]
Ended = Literal["eos", "stop", "budget"]


@dataclass(frozen=True)
class Piece:
    """A few tokens of a text, handed to `on_accept` as soon as they are sure.

    The pieces of a prompt put together are its tokens and its text. Text may lag behind tokens: half a character, or
    what may yet become a stop string, waits for a later piece.

    Parameters
    ----------
    prompt: index of the prompt.
    tokens, text: what is new.
    how: `prefill` (the first token), `accepted` (drafts), `corrected` (the model's token in place of a rejected
        draft), `bonus` (the model's token after drafts that were all accepted, also after an empty draft).
    """

    prompt: int
    tokens: tuple[int, ...]
    text: str
    how: How


@dataclass(frozen=True)
class Decoded:
    """The continuation of one prompt, and how it came about. Convention `prefill`: rounds begin at output index 1.

    Parameters
    ----------
    method: "autoregressive", "self-speculative", "speculative" or "early-exit".
    prompt: index of the prompt, which also names its random numbers.
    tokens: y[0..N-1], the closing token included.
    drafted, accepted: counts of each round. A step of a method that does not draft is a round with an empty draft.
    exit_layer, draft_length, drafter: the setting; None (draft_length 0) where the method has none.
    ways: of each round, whose turn it was to draft: the place of the drafter, -1 for nobody; empty without a policy
        that chooses for each round.
    seconds: "prefill", "draft", "verify" and "total" of the batch, from its start until this text ended. The split
        between draft and verify is the host's view, which on an accelerator runs ahead of the device.
    lossless: whether the tokens are those (greedy) or distributed as those (sampled) of the model alone.
    """

    method: str
    prompt: int
    prompt_ids: list[int]
    tokens: list[int]
    text: str
    ended: Ended
    drafted: list[int]
    accepted: list[int]
    exit_layer: int | None = None
    draft_length: int = 0
    drafter: str | None = None
    ways: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    lossless: bool = True

    @property
    def rounds(self) -> int:
        return len(self.drafted)

    @property
    def emitted(self) -> int:
        """Tokens that rounds emitted: all but the prefill's."""
        return len(self.tokens) - 1

    @property
    def starts(self) -> list[int]:
        """Output index at which each round starts."""
        starts, output = [], 1
        for accepted in self.accepted:
            starts.append(output)
            output += accepted + 1
        return starts

    @property
    def rejections(self) -> int:
        """Rounds that a rejection ended: accepted < min(k, N - i) for a round of k drafts at output index i."""
        total = len(self.tokens)
        rounds = zip(self.starts, self.drafted, self.accepted, strict=True)
        return sum(accepted < min(drafted, total - start) for start, drafted, accepted in rounds)

    @property
    def accepted_by_position(self) -> list[int]:
        """How many rounds accepted their first draft, their second, ...: (draft_length,)."""
        return [sum(accepted > place for accepted in self.accepted) for place in range(self.draft_length)]

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted; None without a draft."""
        drafted = sum(self.drafted)
        return sum(self.accepted) / drafted if drafted else None

    @property
    def alpha(self) -> float | None:
        """Chance that a draft is accepted given that those before it in its round were; None without a trial."""
        trials = sum(self.accepted) + self.rejections
        return sum(self.accepted) / trials if trials else None

    @property
    def tokens_per_round(self) -> float | None:
        """Tokens that rounds emit / rounds; None without a round."""
        return self.emitted / self.rounds if self.rounds else None

    def to_json(self) -> dict[str, Any]:
        """Fields and the figures that follow from them, JSON types only."""
        figures = ("rounds", "accepted_by_position", "acceptance_rate", "alpha", "tokens_per_round")
        fields = asdict(self)
        if not self.ways:
            del fields["ways"]
        return fields | {figure: getattr(self, figure) for figure in figures}

    def __repr__(self) -> str:
        return f"Decoded({reprlib.repr(self.text)}: {self.summary()})"

    def to_pandas(self) -> pd.DataFrame:
        """A row a round: the output index at which it starts, and what it drafted, accepted and emitted."""
        total = len(self.tokens)
        emitted = [min(accepted + 1, total - start) for start, accepted in zip(self.starts, self.accepted, strict=True)]
        return pd.DataFrame(
            {"start": self.starts, "drafted": self.drafted, "accepted": self.accepted, "emitted": emitted}
        )

    def _repr_html_(self) -> str:
        """The text and the line of figures; the rounds of a method that drafts below them."""
        text = f'<pre style="white-space:pre-wrap">{escape(self.text)}</pre><p>{escape(self.summary())}</p>'
        if not sum(self.drafted):
            return text
        rounds = self.to_pandas().to_html(index_names=False, max_rows=20)
        return f"{text}<details><summary>{self.rounds} rounds</summary>{rounds}</details>"

    def summary(self) -> str:
        """One line: what was decoded, how it ended, and what speculation did."""
        endings = {"eos": "an end-of-sequence token", "stop": "a stop string", "budget": "the budget"}
        total = self.seconds.get("total", 0.0)
        speed = f", {len(self.tokens) / total:.1f} tokens/s" if total > 0 else ""
        line = f"{self.method}: {len(self.tokens)} tokens in {total:.2f} s{speed}; ended by {endings[self.ended]}."
        if self.acceptance_rate is not None and self.tokens_per_round is not None:
            line += (
                f" {self.rounds} rounds accepted {sum(self.accepted)} of {sum(self.drafted)} drafts "
                f"({self.acceptance_rate:.1%}), {self.tokens_per_round:.2f} tokens per round."
            )
        return line if self.lossless else f"{line} Not verified: these need not be the model's own tokens."
