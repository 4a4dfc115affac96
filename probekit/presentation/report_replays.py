"""Rounds of any way of drafting as the page's replay plays them: worked out here, and packed for each text.

A row a round: how many drafts one after the other (of a tree, levels), tokens drafted, accepted, who drafted (from 1,
0: nobody), and the first rejected draft as a token id plus 1 (0: none, or not known). Where a round starts and what it
emits follow from what was accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from probekit.choice.rank import oracle_of, rank, replayed_seconds
from probekit.choice.ranking import Ranked
from probekit.costs.profile import Costs
from probekit.drafting.drafters import Drafter, DraftModel, ExitLayer
from probekit.drafting.imported import ImportedDrafter
from probekit.drafting.text_drafters import TextLookup
from probekit.drafting.tree_drafters import TreeDrafts
from probekit.drafting.ways import Way
from probekit.prediction.replay import Replay, replay
from probekit.traces.trace import Trace

MOST = 14  # ways of a model, unless there are more kinds


@dataclass(frozen=True, eq=False)
class Played:
    """A way of drafting along every text of a trace."""

    way: Way
    costs: Costs
    trace: Trace

    @cached_property
    def rounds(self) -> Replay:
        return replay(self.trace, self.way)

    @cached_property
    def seconds(self) -> dict[int, float]:
        """{prompt: predicted seconds of its rounds}."""
        found = replayed_seconds(self.rounds, self.costs)
        return dict(zip(self.rounds.prompts, found.tolist(), strict=True))

    def describe(self) -> dict[str, Any]:
        """What the page says of it."""
        policy = "" if self.way.name == "fixed" else f", {self.way.name}"
        length = "" if self.way.name == "oracle" else f", K {self.way.draft_length}"
        return {
            "label": f"{self.way.label}{policy}{length}",
            "drafters": [key.label for key in self.way.keys],
            "tree": [isinstance(each, TreeDrafts) for each in self.way.drafters],
        }

    def of(self, prompt: int) -> np.ndarray:
        """(rounds, 5), as the module says."""
        own = self.rounds.rounds[self.rounds.prompts.index(prompt)]
        left = len(self.trace.outputs(prompt)) - own.start
        rejected = (own.accepted < np.minimum(own.length, left)) & (own.emitted > own.accepted)
        wrong = np.zeros(len(own.start), dtype=np.int64)
        for place in np.flatnonzero(rejected).tolist():
            drafter, start = self.way.drafters[own.way[place]], int(own.start[place])
            token = self._draft(drafter, prompt, start, int(own.accepted[place]), int(own.length[place]))
            wrong[place] = 0 if token is None else token + 1
        return np.stack([own.length, own.drafted, own.accepted, own.way + 1, wrong], axis=1)

    def _draft(self, drafter: Drafter, prompt: int, start: int, at: int, length: int) -> int | None:
        """The token that a round from `start` drafts in place `at`, all before it being the text's own."""
        if isinstance(drafter, TextLookup):
            return self._copied(drafter, prompt)[start][at]
        if isinstance(drafter, ImportedDrafter):
            return drafter.drafts(prompt, start, length)[at]
        if self.trace.manifest.settings.statistics != "all":
            return None
        column = "argmax_rounded" if self.trace.rounds_logits else "argmax"
        if isinstance(drafter, DraftModel):
            return int(self.trace.drafter_values(prompt, column)[start + at])
        exit_layer = drafter.exit if isinstance(drafter, TreeDrafts) else drafter
        if isinstance(exit_layer, ExitLayer) and exit_layer.rows is None:
            return int(self.trace.values(prompt, column)[exit_layer.exit_layer, start + at])
        return None

    def _copied(self, lookup: TextLookup, prompt: int) -> list[list[int]]:
        """What a lookup drafts at each output position."""
        index, text = lookup.index(self.trace.manifest.model.eos_ids), self.trace.outputs(prompt).tolist()
        index.read(self.trace.prompt_ids(prompt).tolist())
        found = []
        for token in text:
            found.append(index.drafts(self.way.draft_length))
            index.read([token])
        return found


def played_ways(
    trace: Trace, costs: Costs, exit_layers: Sequence[int] | None, draft_lengths: Sequence[int], draft_rows: int | None
) -> list[Played]:
    """The best length of each drafter and policy as the study ranked them, on its even prompts, and the oracle of these
    drafters on all; none of text that is not greedy, whose rounds are a matter of chance."""
    if trace.manifest.settings.text != "greedy":
        return []
    even = trace.select([prompt for prompt in trace.prompts if prompt % 2 == 0])
    ranking = rank(even, costs, exit_layers, draft_lengths, draft_rows=draft_rows)
    shown: list[Ranked] = _of_every_kind([way for way in ranking.shortlist(len(ranking.ways)) if way.way is not None])
    ways = [each.way for each in shown if each.way is not None]
    best = ranking.oracle_of_turns
    if best is not None and best.way is not None:
        everywhere = oracle_of(trace, best.way.drafters, costs, best.draft_length).way
        ways += [] if everywhere is None else [everywhere]
    return [Played(way, costs, trace) for way in ways]


def _of_every_kind(order: Sequence[Ranked]) -> list[Ranked]:
    """The best of each kind of policy, and of each kind of drafter of fixed lengths; then the fastest others."""
    first: dict[str, Ranked] = {}
    for way in order:
        kind, drafter = way.policy.partition(":")[0], way.drafter.partition(":")[0]
        first.setdefault(f"{kind} {drafter}" if kind == "fixed" else kind, way)
    chosen = list(first.values())
    chosen += [way for way in order if way not in chosen][: max(0, MOST - len(chosen))]
    return [way for way in order if way in chosen]
