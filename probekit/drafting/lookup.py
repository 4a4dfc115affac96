"""What a text says about its own continuation: drafts copied from where its latest tokens stood before.

An index reads a text token by token and answers, at any moment, with the tokens that would be drafted next. Each
token costs constant time (n-grams) or constant time on average (suffix automaton), however long the text is.
Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class TextIndex(Protocol):
    """Reads a text; says what to draft next."""

    def read(self, tokens: Iterable[int]) -> None:
        """The text goes on with these tokens."""
        ...

    def drafts(self, most: int) -> list[int]:
        """At most `most` tokens, the next of the text first; none where nothing was found."""
        ...


class NgramIndex:
    """The first earlier place where the latest tokens stood: the longest n-gram of `least`..`longest` tokens wins.

    transformers' `PromptLookupCandidateGenerator` (least 1, an end-of-sequence token cuts the drafts before it) and
    vLLM's `NgramProposer` (drafts are not cut) find the same place: the leftmost one of the longest n-gram.

    Parameters
    ----------
    ends: tokens that cut the drafts: neither they nor what follows them is drafted.
    """

    def __init__(self, longest: int, least: int, ends: frozenset[int]) -> None:
        self.text: list[int] = []
        self._sizes = range(longest, least - 1, -1)
        self._ends = ends
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where its first occurrence went on

    def read(self, tokens: Iterable[int]) -> None:
        text = self.text
        for token in tokens:
            # what ends at the last token is known only now, when something follows it
            for size in self._sizes:
                if size <= len(text):
                    self._after.setdefault(tuple(text[-size:]), len(text))
            text.append(token)

    def drafts(self, most: int) -> list[int]:
        text = self.text
        for size in self._sizes:
            start = self._after.get(tuple(text[-size:])) if size <= len(text) else None
            if start is not None:
                return _cut(text[start : start + most], self._ends)
        return []


class LatestNgramIndex:
    """The latest earlier place where the last `size` tokens stood, as llama.cpp's `ngram-simple` finds it.

    Of its `common_ngram_simple_draft` (b11434): nothing is drafted from a text of `size` + `copied` + 2 tokens or
    fewer, from its very beginning, from one token before its end, or where fewer than `size` tokens follow.

    Parameters
    ----------
    size: `--spec-ngram-simple-size-n`. copied: `--spec-ngram-simple-size-m`, the most tokens that are drafted.
    """

    def __init__(self, size: int, copied: int) -> None:
        self.text: list[int] = []
        self._size, self._copied = size, copied
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest occurrence begins

    def read(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.text.append(token)
            start = len(self.text) - self._size - 2
            if start > 0:
                self._latest[tuple(self.text[start : start + self._size])] = start

    def drafts(self, most: int) -> list[int]:
        before = len(self.text) - 1  # the last token is in no cache yet
        start = self._latest.get(tuple(self.text[-self._size :]))
        if start is None or before <= self._size + self._copied + 1:
            return []
        found = self.text[start + self._size : before][: self._copied]
        return found[:most] if len(found) >= self._size else []


class SuffixIndex:
    """The first earlier place of the longest ending of the text that stood in it before, of at least `least` tokens.

    A suffix automaton (Blumer et al., 1985), as in SAM Decoding (arXiv 2411.10666), over prompt and output alike.
    """

    def __init__(self, least: int, ends: frozenset[int]) -> None:
        self.text: list[int] = []
        self._least = least
        self._ends = ends
        # Of each state: its transitions, suffix link, longest string, and where the first occurrence of it ends.
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._end = [-1]
        self._last = 0
        self._state, self.matched = 0, 0  # the longest ending of the text that occurred before

    def read(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._follow(token)
            self._extend(token)
            # a state may have been split meanwhile: the match belongs to the shorter half
            while self.matched and self.matched <= self._length[self._link[self._state]]:
                self._state = self._link[self._state]
            self.text.append(token)

    def drafts(self, most: int) -> list[int]:
        if self.matched < self._least:
            return []
        start = self._end[self._state] + 1
        return _cut(self.text[start : start + most], self._ends)

    def _follow(self, token: int) -> None:
        """The longest ending of text + token that stands in text."""
        while self._state and token not in self._next[self._state]:
            self._state = self._link[self._state]
            self.matched = self._length[self._state]
        if token in self._next[self._state]:
            self._state = self._next[self._state][token]
            self.matched += 1

    def _extend(self, token: int) -> None:
        """Add a token to the automaton."""
        new = self._add(self._length[self._last] + 1, {}, len(self.text))
        state = self._last
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state < 0:
            self._link[new] = 0
        else:
            self._link[new] = self._with_length(state, token)
        self._last = new

    def _with_length(self, state: int, token: int) -> int:
        """The state of `state`'s longest string + token, split off where it shares one with longer strings."""
        target = self._next[state][token]
        length = self._length[state] + 1
        if self._length[target] == length:
            return target
        clone = self._add(length, dict(self._next[target]), self._end[target])
        self._link[clone] = self._link[target]
        self._link[target] = clone
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _add(self, length: int, following: dict[int, int], end: int) -> int:
        self._next.append(following)
        self._link.append(0)
        self._length.append(length)
        self._end.append(end)
        return len(self._link) - 1


def _cut(drafts: list[int], ends: frozenset[int]) -> list[int]:
    return next((drafts[:place] for place, token in enumerate(drafts) if token in ends), drafts)
