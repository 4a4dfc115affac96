"""The best that any policy could do along a text: the quickest path through it, by backward induction.

From output position i each option (a drafter with a number of drafts, or a step without any) leads to i + emitted and
takes so many seconds, both known along a text of a trace. With V(N) = 0,

    V(i) = min over options of seconds + V(i + emitted)

is the least that the rest of the text can take, whatever a policy knows: every policy takes one of the options in every
round. Linear in the text: one pass from its end over positions and options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probekit.drafting.drafters import Outlook
from probekit.drafting.round_policies import NOBODY
from probekit.errors import InputError


@dataclass(frozen=True, eq=False)
class Options:
    """What a round can do from each output position of one text.

    way, length: (options,) what each is; the way NOBODY drafts nothing. emitted, seconds: (options, N).
    """

    way: np.ndarray
    length: np.ndarray
    emitted: np.ndarray
    seconds: np.ndarray

    def with_more(self, other: Options) -> Options:
        """These options and others."""
        return Options(*(np.concatenate([mine, getattr(other, name)]) for name, mine in vars(self).items()))


@dataclass(frozen=True, eq=False)
class BestPath:
    """The best option from every output position, and what it leads to.

    option: (N,) its place among the options. seconds: (N + 1,) the least that the text from there on takes.
    """

    options: Options
    option: np.ndarray
    seconds: np.ndarray

    @property
    def plan(self) -> np.ndarray:
        """(2, N): the way and the length of a round that starts at each output position (`Planned`)."""
        return np.stack([self.options.way[self.option], self.options.length[self.option]])

    def starts(self, first: int) -> list[int]:
        """Where its rounds start."""
        found, i = [], first
        while i < len(self.option):
            found.append(i)
            i += int(self.options.emitted[self.option[i], i])
        return found


def options_of(outlooks: Sequence[Outlook], seconds: np.ndarray, plain_s: float, budget: int) -> Options:
    """Every number of drafts, 1..K, of every drafter, and a step without any.

    outlooks: of each drafter. seconds: (drafters, K + 1) of a round with 0, 1, .. drafts; plain_s: of a step without a
    drafter. budget: M. An option of more drafts than there are is one of as many as there are.
    """
    N, longest = len(outlooks[0].run), seconds.shape[1] - 1
    place = np.arange(N)
    lengths = np.arange(1, longest + 1)[:, None]
    emitted, taken = [np.ones((1, N), dtype=np.int64)], [np.full((1, N), plain_s)]
    for each, own in zip(outlooks, seconds, strict=True):
        drafted = np.clip(np.minimum(np.minimum(lengths, each.drafted), budget - place - 1), 0, None)
        accepted = np.minimum(np.minimum(each.run, drafted), N - place)
        emitted.append(np.minimum(accepted + 1, N - place))
        taken.append(own[drafted])
    drafters = len(outlooks)
    return Options(
        way=np.concatenate([[NOBODY], np.repeat(np.arange(drafters), longest)]),
        length=np.concatenate([[0], np.tile(lengths[:, 0], drafters)]),
        emitted=np.concatenate(emitted),
        seconds=np.concatenate(taken),
    )


def best_path(options: Options) -> BestPath:
    """Backward induction over one text. Of equal options the first wins."""
    N = options.emitted.shape[1]
    if not (options.emitted >= 1).all() or (options.emitted > N - np.arange(N)).any():
        raise InputError("an option emits one token at least, and none beyond its text.")
    left, choice = np.zeros(N + 1), np.zeros(N, dtype=np.int64)
    for i in range(N - 1, -1, -1):
        takes = options.seconds[:, i] + left[i + options.emitted[:, i]]
        choice[i] = takes.argmin()
        left[i] = takes[choice[i]]
    return BestPath(options, choice, left)
