"""What decoding returns, and how a text is booked while it grows: the same words counted the same way by every method.

A text ends with an end-of-sequence token, with the token that completes a stop string, or with the budget. Its tokens
include that last token; its text is everything before the end-of-sequence token or before the stop string. Stop
strings are looked for in the text of the continuation, special tokens spelled out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, Literal

import pandas as pd

from probekit.errors import InputError

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
        return asdict(self) | {figure: getattr(self, figure) for figure in figures}

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


def check_stop(stop: str | Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    """Return the stop strings as a tuple, or raise InputError."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(text, str) or not text for text in strings):
        raise InputError(f"stop strings must be texts that are not empty, not {list(strings)!r}.")
    if strings and tokenizer is None:
        raise InputError("stop strings need a tokenizer, and this model has none.", "Stop by tokens or by the budget.")
    return strings


class TextStream:
    """Tokens in, text out, without splitting a character that several tokens spell.

    Only the last few tokens are decoded again: those since the last place where a character ended, and one such
    stretch before them, because some tokenizers write a token differently at the beginning of a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from = 0  # decode from here
        self._whole = 0  # tokens before this one are whole characters
        self._given = 0  # characters of that text that were given out

    def push(self, token: int) -> str:
        """The text that is sure after one more token."""
        self._ids.append(token)
        text = self._decode(self._from)
        sure = text.rstrip("\ufffd")
        piece = sure[self._given :]
        self._given = max(self._given, len(sure))
        if sure == text:
            self._from, self._whole = self._whole, len(self._ids)
            self._given = len(self._decode(self._from))
        return piece

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._decode(self._from)[self._given :]

    def _decode(self, start: int) -> str:
        return decode_tokens(self._tokenizer, self._ids[start:])


def decode_tokens(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens, exactly as they spell it: special tokens too, spaces untouched."""
    return tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Transcript:
    """One text while it grows: tokens, counts, and what to hand out.

    Parameters
    ----------
    index: the prompt's index. budget: most new tokens, M.
    stop, on_accept: as for `decode`; text is followed token by token only where one of them needs it.
    """

    def __init__(
        self,
        index: int,
        prompt_ids: Sequence[int],
        budget: int,
        eos_ids: frozenset[int],
        tokenizer: Any = None,
        stop: tuple[str, ...] = (),
        on_accept: Callable[[Piece], None] | None = None,
    ) -> None:
        self.index = index
        self.prompt_ids = list(prompt_ids)
        self.budget = budget
        self.tokens: list[int] = []
        self.drafted: list[int] = []
        self.accepted: list[int] = []
        self.ended: Ended | None = None
        self._eos_ids = eos_ids
        self._tokenizer = tokenizer
        self._stop = stop
        self._on_accept = on_accept
        self._stream = TextStream(tokenizer) if tokenizer is not None and (stop or on_accept) else None
        self._text = ""
        self._shown = 0

    @property
    def position(self) -> int:
        """Where the last token stands in the sequence: the row that predicts the next token."""
        return len(self.prompt_ids) + len(self.tokens) - 1

    def limit(self, draft_length: int) -> int:
        """Drafts of the next round: k = min(K, M - i - 1), so that no round emits more than the budget."""
        return min(draft_length, self.budget - len(self.tokens) - 1)

    def first(self, token: int) -> None:
        """Book y[0], which the prefill emits."""
        self._append(token)
        self._hand_out((token,), "prefill")

    def round(self, drafts: Sequence[int], drafted: int, run: int, token: int) -> None:
        """Book a round: `run` of `drafted` drafts were accepted, then comes `token`.

        An ending inside the run leaves what follows out; an accepted ending counts as accepted.
        """
        start = len(self.tokens)
        for draft in drafts[:run]:
            if self.ended is None:
                self._append(draft)
        kept = len(self.tokens)
        self.drafted.append(drafted)
        self.accepted.append(kept - start)
        if kept > start:
            self._hand_out(tuple(self.tokens[start:]), "accepted")
        if self.ended is None:
            self._append(token)
            self._hand_out((token,), "bonus" if run == drafted else "corrected")

    def _append(self, token: int) -> None:
        self.tokens.append(token)
        if token in self._eos_ids:
            self.ended = "eos"
        elif self._stream is not None:
            self._follow(self._stream.push(token))
        if self.ended is None and len(self.tokens) == self.budget:
            self.ended = "budget"
        if self._stream is not None and self.ended in ("eos", "budget"):
            self._text += self._stream.rest()

    def _follow(self, piece: str) -> None:
        overlap = max(map(len, self._stop), default=1) - 1
        begin = max(0, len(self._text) - overlap)
        self._text += piece
        found = [at for at in (self._text.find(text, begin) for text in self._stop) if at >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.ended = "stop"

    def _hand_out(self, tokens: tuple[int, ...], how: How) -> None:
        if self._on_accept is None:
            return
        sure = len(self._text) if self.ended else len(self._text) - self._possible_stop()
        text = self._text[self._shown : sure]
        self._shown = max(self._shown, sure)
        self._on_accept(Piece(self.index, tokens, text, how))

    def _possible_stop(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        ends = (self._text[-size:] for size in range(min(longest, len(self._text)), 0, -1))
        return next((len(end) for end in ends if any(text.startswith(end) for text in self._stop)), 0)

    @property
    def text(self) -> str:
        if self._stream is not None:
            return self._text
        if self._tokenizer is None:
            return ""
        return decode_tokens(self._tokenizer, self.tokens[: -1 if self.ended == "eos" else None])

    def decoded(self, *, seconds: dict[str, float], **setting: Any) -> Decoded:
        """The finished result. setting: the fields of Decoded that the method knows."""
        assert self.ended is not None
        return Decoded(
            prompt=self.index,
            prompt_ids=self.prompt_ids,
            tokens=self.tokens,
            text=self.text,
            ended=self.ended,
            drafted=self.drafted,
            accepted=self.accepted,
            seconds=seconds,
            **setting,
        )
