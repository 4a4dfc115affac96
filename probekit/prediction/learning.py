"""A table of what to do after each recent past, learned offline from the texts of a trace.

Policy iteration: the table at hand gives every position the time that the rest of its text takes; then each state takes
the option that is best on average over the positions in it; and so on. States lump positions together, so a step may
also lose; the best table of all steps is kept. As LEDE (arXiv 2606.03113) does, the policy that runs is a table, and
all learning happens before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from probekit.drafting.drafters import Drafter, outlook
from probekit.drafting.round_policies import LOOK_BACK, Table, state_of
from probekit.prediction.oracle import Options, options_of
from probekit.prediction.replay import budget_of

if TYPE_CHECKING:
    from probekit.traces.trace import Trace

STATES = 2 * LOOK_BACK + 3
STEPS = 8


class _Text(NamedTuple):
    """options of each position, its state, (N,), and how much it matters although no round may start there."""

    options: Options
    state: np.ndarray


def learn_table(
    trace: Trace, drafters: Sequence[Drafter], seconds: np.ndarray, plain_s: float, reference: int, first: int = 1
) -> Table:
    """The table for these drafters on these texts, by these costs.

    seconds: (drafters, K + 1) of a round with 0, 1, .. drafts. plain_s: of a step without a drafter. reference: the
    place of the exit whose recent agreement is the state. first: where rounds begin.
    """
    texts = [_read(trace, prompt, drafters, seconds, plain_s, reference, first) for prompt in trace.prompts]
    choice, best = np.full(STATES, _best_fixed(texts, first)), (np.inf, np.zeros(0, dtype=np.int64))
    for _ in range(STEPS):
        total, worth, weight = 0.0, np.zeros((STATES, len(texts[0].options.way))), np.zeros(STATES)
        for text in texts:
            left = _time_left(text, choice)
            total += left[first] if len(left) > first else 0.0
            _judge(text, choice, left, first, worth, weight)
        if total < best[0]:
            best = total, choice
        choice = np.where(weight > 0, worth.argmin(axis=1), choice)
    options, (_, found) = texts[0].options, best
    known = {state for text in texts for state in text.state[first:].tolist()}
    choices = {state: (int(options.way[o]), int(options.length[o])) for state, o in enumerate(found) if state in known}
    fixed = _best_fixed(texts, first)
    return Table(reference, choices, (int(options.way[fixed]), int(options.length[fixed])))


def _read(
    trace: Trace,
    prompt: int,
    drafters: Sequence[Drafter],
    seconds: np.ndarray,
    plain_s: float,
    reference: int,
    first: int,
) -> _Text:
    outlooks = [outlook(drafter, trace, prompt, seconds.shape[1] - 1) for drafter in drafters]
    right = drafters[reference].signal(trace, prompt).tolist()
    state = [0 if i < first else state_of(right[max(first, i - LOOK_BACK) : i]) for i in range(len(right))]
    return _Text(options_of(outlooks, seconds, plain_s, budget_of(trace, prompt)), np.array(state))


def _best_fixed(texts: Sequence[_Text], first: int) -> int:
    """The option that takes least time when it is taken in every round."""
    options = range(len(texts[0].options.way))
    totals = np.zeros(len(options))
    for text in texts:
        emitted, seconds = text.options.emitted, text.options.seconds
        N = emitted.shape[1]
        left = np.zeros((len(totals), N + 1))
        for i in range(N - 1, first - 1, -1):
            left[:, i] = seconds[:, i] + left[options, i + emitted[:, i]]
        totals += left[:, first] if first < N else 0.0
    return int(totals.argmin())


def _time_left(text: _Text, choice: np.ndarray) -> np.ndarray:
    """(N + 1,) seconds of the rest of the text from each position, by a table."""
    N = len(text.state)
    own, place = choice[text.state], np.arange(N)
    ahead, takes = place + text.options.emitted[own, place], text.options.seconds[own, place]
    left = np.zeros(N + 1)
    for i in range(N - 1, -1, -1):
        left[i] = takes[i] + left[ahead[i]]
    return left


def _judge(
    text: _Text, choice: np.ndarray, left: np.ndarray, first: int, worth: np.ndarray, weight: np.ndarray
) -> None:
    """Add to each state what each option takes from its positions; those where a round starts count ten times."""
    N = len(text.state)
    takes = text.options.seconds + left[np.arange(N) + text.options.emitted]
    counts, i = np.ones(N), first
    while i < N:
        counts[i] = 10.0
        i += int(text.options.emitted[choice[text.state[i]], i])
    counts[:first] = 0.0
    np.add.at(worth, text.state, counts[:, None] * takes.T)
    np.add.at(weight, text.state, counts)
