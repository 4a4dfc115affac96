"""Tokens to text while a text grows, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from probekit.errors import InputError


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

    `tokenizers.decoders.DecodeStream` gives the same pieces, but raises "Invalid prefix" where a model with byte
    fallback writes bytes that spell no character; a decoder must go on there.
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
