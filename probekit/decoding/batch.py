"""A batch while it is decoded: the rows that are still going, a round drafted and verified for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from probekit.decoding.engine import Engine
from probekit.decoding.results import Decoded, Piece
from probekit.decoding.sampling import Sampler, scatter, streams
from probekit.decoding.sequence import SequenceState
from probekit.drafting.policies import FixedLength, Policy, looks_at
from probekit.drafting.trees import DraftTree
from probekit.errors import InputError
from probekit.models.loaded import Loaded
from probekit.settings import Sampling


@dataclass(frozen=True)
class DecodePlan:
    """A decode call after all checks: what the methods may rely on."""

    prompts: list[list[int]]
    indices: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    on_accept: Callable[[Piece], None] | None

    @property
    def longest(self) -> int:
        return max(map(len, self.prompts))


class DecodeBatch:
    """The rows of a batch that are still being decoded; a row leaves when its text ends.

    rows: their transcripts. last: (rows, 1) each row's last token; previous: (rows, 1) the one before it.
    stream: (rows,) random streams, None when greedy. seconds: time spent so far in each phase.
    """

    def __init__(self, plan: DecodePlan, loaded: Loaded, setting: dict[str, Any]) -> None:
        self.plan = plan
        self.sampler = Sampler(plan.sampling)
        self.device = loaded.device
        self.vocabulary = loaded.anatomy.vocabulary
        greedy = plan.sampling.greedy
        self.stream = None if greedy else streams(plan.sampling.seed, plan.indices, self.device)
        self._outputs: Tensor | None = None
        self.rows = [
            SequenceState(index, ids, plan.max_new_tokens, loaded.eos_ids, loaded.tokenizer, plan.stop, plan.on_accept)
            for index, ids in zip(plan.indices, plan.prompts, strict=True)
        ]
        self.last = torch.empty(0)
        self.previous = torch.empty(0)
        self.engines: list[Engine] = []
        self.seconds = {"prefill": 0.0, "draft": 0.0, "verify": 0.0}
        self._setting = setting
        self._done: dict[int, Decoded] = {}
        self._began = self._lapped = perf_counter()

    @property
    def positions(self) -> list[int]:
        """Position of each row's last token."""
        return [row.position for row in self.rows]

    @property
    def outputs(self) -> Tensor | None:
        """Output index of each row's next token, (rows,), None when greedy; told once, then kept there."""
        if self.stream is not None and self._outputs is None:
            self._outputs = torch.tensor([len(row.tokens) for row in self.rows], device=self.device)
        return self._outputs

    def prompt_tokens(self) -> Tensor:
        """(rows, longest prompt), padded on the right; the padding's slots are overwritten before any row sees them."""
        longest = self.plan.longest
        padded = [ids + [0] * (longest - len(ids)) for ids in self.plan.prompts]
        return torch.tensor(padded, device=self.device)

    def begin(self, engines: list[Engine], normed: Tensor) -> None:
        """Choose y[0] of each row from the prefill's states after the norm, (rows, longest prompt, width)."""
        self.engines = engines
        ends = torch.tensor([len(row.prompt_ids) - 1 for row in self.rows], device=self.device)
        states = normed[torch.arange(len(self.rows), device=self.device), ends]
        outputs = None if self.stream is None else torch.zeros_like(ends)
        token = self.sampler.choose(engines[0].logits(states), self.stream, outputs)
        self.previous = torch.tensor([[row.prompt_ids[-1]] for row in self.rows], device=self.device)
        self.last = token[:, None]
        for row, first in zip(self.rows, token.tolist(), strict=True):
            row.first(first)
        self.lap("prefill")
        self.retire_finished()

    def draft(
        self,
        draft_length: int,
        policy: Policy,
        step: Callable[[Tensor, int], Tensor],
        ids: Tensor | None = None,
        figure: Callable[[], Tensor] | None = None,
    ) -> DraftTree:
        """Draft a round for all rows.

        step: called with the last token of each row, (rows, 1), and its place in the round, 0, 1, ..; returns the
        drafter's logits after it, (rows, vocabulary), or (rows, F) where `ids`, (F,), says which tokens these are.
        figure: what the policy is told of the last draft, (rows,), where it does not look at its logits.
        """
        limits = [row.limit(draft_length) for row in self.rows]
        outputs = self.outputs
        confidence = looks_at(policy) if policy.needs_confidence and figure is None else None
        tokens, distributions = [self.last], list[Tensor]()
        place = 0
        while place < max(limits):
            token, distribution, sureness = self.sampler.draft(
                step(tokens[-1], place), self.stream, None if outputs is None else outputs + place, confidence
            )
            sureness = sureness if figure is None else figure()
            if distribution is not None:
                distributions.append(distribution if ids is None else scatter(distribution, ids, self.vocabulary))
            tokens.append((token if ids is None else ids[token])[:, None])
            place += 1
            if not isinstance(policy, FixedLength):
                sure = [math.nan] * len(limits) if sureness is None else sureness.tolist()
                for row, probability in enumerate(sure):
                    if limits[row] > place and not policy.keep_drafting(place, probability):
                        limits[row] = place
        written = torch.cat(tokens, dim=1)
        return DraftTree.chain(written, torch.stack(distributions, dim=1) if distributions else None, limits)

    def drafted(self, drafts: Sequence[Sequence[int]], policy: Policy) -> DraftTree:
        """A round whose drafts are known beforehand: each row's own, of any number up to its limit."""
        limits = [
            next((place for place in range(1, len(own)) if not policy.keep_drafting(place, math.nan)), len(own))
            for own in drafts
        ]
        longest = max(limits)
        padded = [[*own[:longest], *[0] * (longest - len(own))] for own in drafts]
        tokens = torch.tensor(padded, dtype=torch.long, device=self.device).view(len(drafts), longest)
        certain = None  # what a copied draft was drawn from: itself
        if longest and not self.plan.sampling.greedy:
            certain = torch.zeros(*tokens.shape, self.vocabulary, device=self.device).scatter_(-1, tokens[..., None], 1)
        return DraftTree.chain(torch.cat([self.last, tokens], dim=1), certain, limits)

    def verify(self, tree: DraftTree, logits: Tensor) -> list[list[int]]:
        """Accept or reject the drafts of a round. logits: (rows, k + 1, vocabulary) of the model on the written tokens.

        Returns the places of the root and of each row's accepted drafts among the written tokens. Raises InputError for
        drafts that branch and were not written as a tree.
        """
        if tree.branches:
            return self._verify_branches(tree, logits)
        if not tree.is_chain:
            raise InputError("these drafts branch, and their keys and values were written as a chain's.")
        whole = min(tree.limits) == tree.tokens.shape[1]  # then nothing has to be sent to the device
        limits = None if whole else torch.tensor(tree.limits, device=self.device)
        outputs = self.outputs
        verdict = self.sampler.verify(tree.tokens, tree.probabilities, limits, logits, self.stream, outputs)
        self._outputs = None if outputs is None else outputs + verdict.run + 1
        run, token = verdict.run[:, None], verdict.token[:, None]
        host_copy = torch.cat([run, token, tree.tokens], dim=1).tolist()  # the only transfer of a round
        self.previous, self.last = tree.written.gather(1, run), token
        for row, limit, (length, after, *tokens) in zip(self.rows, tree.limits, host_copy, strict=True):
            row.round(tokens, limit, length, after)
        self.lap("verify")
        self.retire_finished()
        return [list(range(1 + length)) for length, *_ in host_copy]

    def _verify_branches(self, tree: DraftTree, logits: Tensor) -> list[list[int]]:
        """Greedily: from the root down, as long as the model's token is a draft; then its keys move together."""
        best = logits.argmax(-1)
        chosen, written = best.tolist(), tree.written.tolist()
        children: list[list[int]] = [[] for _ in range(1 + len(tree.parents))]
        for place, parent in enumerate(tree.parents):
            children[parent].append(1 + place)
        paths = []
        for at, (row, start) in enumerate(zip(self.rows, self.positions, strict=True)):
            path: list[int] = [0]
            node: int | None = 0
            while node is not None:
                below = (child for child in children[node] if child <= tree.limits[at])
                node = next((child for child in below if written[at][child] == chosen[at][node]), None)
                path += [] if node is None else [node]
            paths.append(path)
            if path != list(range(len(path))):
                self.engines[0].cache.gather(at, start + 1, [start + each for each in path[1:]])
            row.round([written[at][each] for each in path[1:]], tree.limits[at], len(path) - 1, chosen[at][path[-1]])
        ends = torch.tensor([[path[-1]] for path in paths], device=self.device)
        self.previous = tree.written.gather(1, ends)
        self.last = best.gather(1, ends)
        self.lap("verify")
        self.retire_finished()
        return paths

    def lap(self, phase: str) -> None:
        """Count the time since the last lap to a phase."""
        now = perf_counter()
        self.seconds[phase] += now - self._lapped
        self._lapped = now

    def retire_finished(self) -> None:
        """Finish the rows that ended; the last rows move into their places."""
        if self.plan.on_accept is not None:  # only the caller's own code can have opened a hook meanwhile
            for engine in self.engines:
                engine.refuse_new_hooks()
        going = [place for place, row in enumerate(self.rows) if row.ended is None]
        if len(going) == len(self.rows):
            return
        seconds = {**self.seconds, "total": self._lapped - self._began}
        for row in self.rows:
            if row.ended is not None:
                self._done[row.index] = row.decoded(seconds=seconds, **self._setting)
        movers = [place for place in going if place >= len(going)]
        keep = [place if self.rows[place].ended is None else movers.pop() for place in range(len(going))]
        self.rows = [self.rows[place] for place in keep]
        if not keep:
            return
        order = torch.tensor(keep, device=self.device)
        self.last, self.previous = self.last[order], self.previous[order]
        if self.stream is not None:
            self.stream = self.stream[order]
        if self._outputs is not None:
            self._outputs = self._outputs[order]
        for engine in self.engines:
            engine.cache.keep(keep)

    def results(self) -> list[Decoded]:
        return [self._done[index] for index in self.plan.indices]
