"""One sequence while it grows: accounting of its accepted and emitted tokens, and its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from probekit.decoding.detokenize import TextStream, decode_tokens
from probekit.decoding.results import Decoded, Ended, How, Piece


class SequenceState:
    """One sequence while it is decoded: its tokens, its counts of drafted and accepted tokens, and its text.

    Parameters
    ----------
    index: the prompt's index. budget: most new tokens, M.
    stop, on_accept: as for `decode`; text is decoded token by token only where one of them needs it.
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
        self.ways: list[int] = []  # of each round: whose turn it was, where drafters take turns
        self.most: int | None = None  # drafts of the next round, where a policy said so
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
        """Position of the last token in the sequence: the row that predicts the next token."""
        return len(self.prompt_ids) + len(self.tokens) - 1

    def limit(self, draft_length: int) -> int:
        """Drafts of the next round: k = min(K, M - i - 1), so that no round emits more than the budget."""
        most = draft_length if self.most is None else min(draft_length, self.most)
        return min(most, self.budget - len(self.tokens) - 1)

    def first(self, token: int) -> None:
        """Count y[0], which the prefill emits."""
        self._append(token)
        self._hand_out((token,), "prefill")

    def round(self, drafts: Sequence[int], drafted: int, run: int, token: int) -> None:
        """Count a round: `run` of `drafted` drafts were accepted, then comes `token`.

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
        if self.ended is None:
            raise RuntimeError("this sequence has not ended yet")
        return Decoded(
            prompt=self.index,
            prompt_ids=self.prompt_ids,
            tokens=self.tokens,
            text=self.text,
            ended=self.ended,
            drafted=self.drafted,
            accepted=self.accepted,
            ways=self.ways,
            seconds=seconds,
            **setting,
        )
