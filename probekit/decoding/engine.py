"""Parts of a model on a cache of their own, and the frame that every decoding method fills in.

The steps of a round, for whoever wants to time them at a context of `c` tokens (no prefill is needed: the cache is
zeros, and zeros cost what numbers cost):

    engine = Engine(anatomy, rows=1, length=c + 16)
    places = engine.places([c], 1)                      # one token, standing at position c
    residual = engine.early(tokens, places, E)          # layers 0..E-1; tokens: (rows, 1)
    engine.logits(anatomy.norm(residual)).argmax(-1)    # norm and head: the rest of a draft step
    engine.late(residuals, engine.places([c], n), E)    # layers E..L-1 and norm; residuals: (rows, n, width)
    engine.full(tokens, places)                         # every layer and norm: an autoregressive step

Run them under `torch.inference_mode()`, as decoding does. Unmodified layers are called one by one, so hooks on them
fire; a hook on the whole model would never fire, and is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from probekit.decoding.caches import Places, PositionCache, cache_bytes, lower_right_mask
from probekit.decoding.policies import Policy
from probekit.decoding.quick import quick, quick_head
from probekit.decoding.results import Decoded, Piece, Transcript, check_stop
from probekit.decoding.sampling import Rule, Sampling, spread, streams
from probekit.errors import InputError, ResourceError
from probekit.hooks import Resume, Stop, is_hooked
from probekit.models.anatomy import Anatomy
from probekit.models.loading import Loaded

GIB = 2**30


class Engine:
    """The layers of a model over a cache of `rows` sequences, at most `length` tokens each.

    `early`, `late` and `full` take tokens or residuals of (rows, tokens[, width]) and their Places; the two parts of
    one pass share them. Early passes through Stop, late and full ones through Resume.
    """

    def __init__(self, parts: Anatomy, rows: int, length: int) -> None:
        _check_runnable(parts)
        self.parts, self._head = quick(parts), quick_head(parts)
        self._without_hooks = [module for module in (*parts.layers, parts.norm, parts.head) if not is_hooked(module)]
        self.cache = PositionCache(parts, rows, length)
        self._always_mask = parts.model.config._attn_implementation != "sdpa"
        self._positions = torch.arange(length, device=parts.device)[None]
        self._cos, self._sin = parts.rotary(parts.embedding.weight, self._positions)
        self._stops: dict[int, Stop] = {}
        self._resumes: dict[int, Resume] = {}

    def places(self, starts: Sequence[int], tokens: int) -> Places:
        """Each row's next `tokens` tokens, the first of them at position starts[row]."""
        first, last = min(starts), max(starts)
        visible = last + tokens
        if first == last:
            here = slice(first, visible)
            positions = self._positions[:, here]
            rotary = (self._cos[:, here], self._sin[:, here])
            needs_mask = tokens > 1 and (first > 0 or self._always_mask)
        else:
            positions = torch.tensor(starts, device=self.parts.device)[:, None] + self._positions[:, :tokens]
            rotary = (self._cos[0][positions], self._sin[0][positions])
            needs_mask = True
        return self._places(positions, visible, rotary, needs_mask)

    def _places(self, positions: Tensor, visible: int, rotary: tuple[Tensor, Tensor], needs_mask: bool) -> Places:
        mask = lower_right_mask(positions, visible, self.parts.dtype) if needs_mask else None
        inputs = {
            "attention_mask": mask,
            "position_ids": positions,
            "position_embeddings": rotary,
            "past_key_values": self.cache,
            "use_cache": True,
        }
        return Places(self.cache.slots(positions), visible, inputs)

    def early(self, tokens: Tensor, places: Places, exit_layer: int) -> Tensor:
        """Layers 0..exit_layer-1 on (rows, tokens): the residual there, (rows, tokens, width)."""
        stop = self._stops.get(exit_layer)
        if stop is None:
            stop = self._stops[exit_layer] = Stop(self.parts, exit_layer)
        self.cache.places = places
        return stop.direct(self.parts.embedding(tokens), **places.inputs)

    def late(self, residual: Tensor, places: Places, exit_layer: int) -> Tensor:
        """Layers exit_layer..L-1 and the final norm on (rows, tokens, width); the same shape."""
        resume = self._resumes.get(exit_layer)
        if resume is None:
            resume = self._resumes[exit_layer] = Resume(self.parts, exit_layer)
        self.cache.places = places
        return resume.direct(residual, **places.inputs)

    def full(self, tokens: Tensor, places: Places) -> Tensor:
        """Every layer and the final norm on (rows, tokens): (rows, tokens, width)."""
        return self.late(self.parts.embedding(tokens), places, 0)

    def logits(self, normed: Tensor) -> Tensor:
        """The model's head. normed: (..., width). Returns (..., vocabulary)."""
        return self._head(normed)

    def refuse_new_hooks(self) -> None:
        """Raise InputError for a hook that came to a layer after this engine was made: it would never fire."""
        if any(map(is_hooked, self._without_hooks)):
            raise InputError(
                "a hook, or a replaced forward, came to a layer while the model decodes: it would not fire.",
                "Open a Capture (or another hook) before decoding starts.",
            )


def _check_runnable(parts: Anatomy) -> None:
    """Raise InputError for a model whose layers cannot be called one by one with the same result."""
    for name, module in (("model", parts.model), ("model.model", parts.decoder), ("rotary_emb", parts.rotary)):
        if is_hooked(module):
            raise InputError(
                f"there is a hook, or a replaced forward, on `{name}` ({type(module).__name__}): decoding calls the "
                "layers one by one, so it would never fire.",
                "Hook the layers instead, as probekit.Capture does.",
            )
    implementation = parts.model.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise InputError(
            f"attention {implementation!r} cannot be used for decoding; expected 'sdpa' or 'eager'.",
            "Load the model with attn_implementation='sdpa'.",
        )
    rope = getattr(parts.rotary, "rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise InputError(f"rotary embeddings of type {rope!r} change with the length of the text: not supported.")


@dataclass(frozen=True)
class Plan:
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


@dataclass(frozen=True, eq=False)
class Drafts:
    """The drafts of one round.

    written: (rows, 1 + k), each row's last token and its drafts. drawn_from: (rows, k, vocabulary) what the drafts
    were drawn from; None when greedy, or without a draft. limits: how many of the k count in each row.
    """

    written: Tensor
    drawn_from: Tensor | None
    limits: list[int]

    @property
    def tokens(self) -> Tensor:
        return self.written[:, 1:]


class Session:
    """The rows of a batch that are still being decoded; a row leaves when its text ends.

    rows: their transcripts. last: (rows, 1) each row's last token; previous: (rows, 1) the one before it.
    stream: (rows,) random streams. seconds: time spent so far in each phase.
    """

    def __init__(self, plan: Plan, loaded: Loaded, setting: dict[str, Any]) -> None:
        self.plan = plan
        self.rule = Rule(plan.sampling)
        self.device = loaded.device
        self.vocabulary = loaded.anatomy.vocabulary
        self.stream = streams(plan.sampling.seed, plan.indices, self.device)
        self.rows = [
            Transcript(index, ids, plan.max_new_tokens, loaded.eos_ids, loaded.tokenizer, plan.stop, plan.on_accept)
            for index, ids in zip(plan.indices, plan.prompts, strict=True)
        ]
        self.last = torch.empty(0)
        self.previous = torch.empty(0)
        self.engines: list[Engine] = []
        self.seconds = {"prefill": 0.0, "draft": 0.0, "verify": 0.0}
        self._setting = setting
        self._done: dict[int, Decoded] = {}
        self._began = self._ticked = perf_counter()

    @property
    def positions(self) -> list[int]:
        """Where each row's last token stands."""
        return [row.position for row in self.rows]

    @property
    def outputs(self) -> Tensor:
        """Output index of each row's next token, (rows,)."""
        return torch.tensor([len(row.tokens) for row in self.rows], device=self.device)

    def prompt_tokens(self) -> Tensor:
        """(rows, longest prompt), filled up on the right: what stands there is overwritten before it is seen."""
        longest = self.plan.longest
        padded = [ids + [0] * (longest - len(ids)) for ids in self.plan.prompts]
        return torch.tensor(padded, device=self.device)

    def begin(self, engines: list[Engine], normed: Tensor) -> None:
        """Choose y[0] of each row from the prefill's states after the norm, (rows, longest prompt, width)."""
        self.engines = engines
        ends = torch.tensor([len(row.prompt_ids) - 1 for row in self.rows], device=self.device)
        states = normed[torch.arange(len(self.rows), device=self.device), ends]
        token = self.rule.choose(engines[0].logits(states), self.stream, torch.zeros_like(ends))
        self.previous = torch.tensor([[row.prompt_ids[-1]] for row in self.rows], device=self.device)
        self.last = token[:, None]
        for row, first in zip(self.rows, token.tolist(), strict=True):
            row.first(first)
        self.tick("prefill")
        self.let_go()

    def draft(
        self,
        draft_length: int,
        policy: Policy,
        step: Callable[[Tensor, int], Tensor],
        ids: Tensor | None = None,
    ) -> Drafts:
        """Draft a round for all rows.

        step: called with the last token of each row, (rows, 1), and its place in the round, 0, 1, ..; returns the
        drafter's logits after it, (rows, vocabulary), or (rows, F) where `ids`, (F,), says which tokens these are.
        """
        limits = [row.limit(draft_length) for row in self.rows]
        outputs = self.outputs
        tokens, distributions = [self.last], list[Tensor]()
        place = 0
        while place < max(limits):
            token, distribution, confidence = self.rule.draft(
                step(tokens[-1], place), self.stream, outputs + place, policy.needs_confidence
            )
            if distribution is not None:
                distributions.append(distribution if ids is None else spread(distribution, ids, self.vocabulary))
            tokens.append((token if ids is None else ids[token])[:, None])
            place += 1
            if confidence is not None:
                for row, sure in enumerate(confidence.tolist()):
                    if limits[row] > place and not policy.goes_on(place, sure):
                        limits[row] = place
        written = torch.cat(tokens, dim=1)
        return Drafts(written, torch.stack(distributions, dim=1) if distributions else None, limits)

    def verify(self, drafts: Drafts, logits: Tensor) -> None:
        """Judge and book a round. logits: (rows, k + 1, vocabulary) of the model on the written tokens."""
        limits = torch.tensor(drafts.limits, device=self.device)
        verdict = self.rule.verify(drafts.tokens, drafts.drawn_from, limits, logits, self.stream, self.outputs)
        run, token = verdict.run[:, None], verdict.token[:, None]
        told = torch.cat([run, token, drafts.tokens], dim=1).tolist()  # the round's one word to the host
        self.previous, self.last = drafts.written.gather(1, run), token
        for row, limit, (length, after, *tokens) in zip(self.rows, drafts.limits, told, strict=True):
            row.round(tokens, limit, length, after)
        self.tick("verify")
        self.let_go()

    def tick(self, phase: str) -> None:
        """Count the time since the last tick to a phase."""
        now = perf_counter()
        self.seconds[phase] += now - self._ticked
        self._ticked = now

    def let_go(self) -> None:
        """Finish the rows that ended; the last rows move into their places."""
        if self.plan.on_accept is not None:  # only the caller's own code can have opened a hook meanwhile
            for engine in self.engines:
                engine.refuse_new_hooks()
        going = [place for place, row in enumerate(self.rows) if row.ended is None]
        if len(going) == len(self.rows):
            return
        seconds = {**self.seconds, "total": self._ticked - self._began}
        for row in self.rows:
            if row.ended is not None:
                self._done[row.index] = row.decoded(seconds=seconds, **self._setting)
        movers = [place for place in going if place >= len(going)]
        keep = [place if self.rows[place].ended is None else movers.pop() for place in range(len(going))]
        self.rows = [self.rows[place] for place in keep]
        if not keep:
            return
        order = torch.tensor(keep, device=self.device)
        self.last, self.previous, self.stream = self.last[order], self.previous[order], self.stream[order]
        for engine in self.engines:
            engine.cache.keep(keep)

    def results(self) -> list[Decoded]:
        return [self._done[index] for index in self.plan.indices]


class Method:
    """What every decoding method is: `decode` checks everything first, then runs; the model stays as it was.

    A subclass says how a batch runs (`_run`) and what it needs.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = True
    exit_layer: int | None = None
    draft_length: int = 0

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        stop: str | Sequence[str] = (),
        on_accept: Callable[[Piece], None] | None = None,
        indices: Sequence[int] | None = None,
    ) -> list[Decoded]:
        """Continue each prompt; all of them together, each to its own end. Results in the order of the prompts.

        Parameters
        ----------
        prompts: token ids.
        max_new_tokens: the budget M of each prompt, at least 1.
        stop: strings that end a text.
        on_accept: called with a Piece as soon as tokens are sure.
        indices: distinct numbers that name the prompts (0, 1, .. by default). Under sampling they choose the random
            numbers: a prompt with the same index gets the same tokens in any batch.

        Raises
        ------
        InputError, ResourceError: before any work.
        """
        plan = self._plan(prompts, max_new_tokens, sampling, stop, on_accept, indices)
        with torch.inference_mode():
            session = Session(plan, self.loaded, self._setting())
            self._run(session)
        return session.results()

    def _run(self, session: Session) -> None:
        raise NotImplementedError

    def _models(self) -> list[Loaded]:
        """The models that run, the one that is decoded first."""
        return [self.loaded]

    def _setting(self) -> dict[str, Any]:
        """The fields of Decoded that name the method and its setting."""
        return {
            "method": self.name,
            "lossless": self.lossless,
            "exit_layer": self.exit_layer,
            "draft_length": self.draft_length,
        }

    def _engine(self, plan: Plan, loaded: Loaded | None = None) -> Engine:
        """An engine with room for the plan. In a batch a row may draft beyond its own budget, uncounted."""
        return Engine((loaded or self.loaded).anatomy, len(plan.prompts), self._length(plan))

    def _length(self, plan: Plan) -> int:
        return plan.longest + plan.max_new_tokens + self.draft_length

    def _plan(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str],
        on_accept: Callable[[Piece], None] | None,
        indices: Sequence[int] | None,
    ) -> Plan:
        names = list(range(len(prompts))) if indices is None else [int(index) for index in indices]
        if len(names) != len(prompts) or len(set(names)) != len(names):
            raise InputError(f"indices must be {len(prompts)} distinct numbers, one a prompt, not {names}.")
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be a whole number of at least 1, not {max_new_tokens!r}.")
        if not prompts:
            raise InputError("there is no prompt to decode.")
        for name, ids in zip(names, prompts, strict=True):
            self._check_prompt(name, ids, max_new_tokens)
        strings = check_stop(stop, self.loaded.tokenizer)
        lists = [[int(token) for token in ids] for ids in prompts]
        plan = Plan(lists, names, max_new_tokens, sampling, strings, on_accept)
        self._check_memory(plan)
        return plan

    def _check_prompt(self, name: int, ids: Sequence[int], max_new_tokens: int) -> None:
        if len(ids) == 0:
            raise InputError(f"prompt {name} is empty: decoding needs at least one token to go on from.")
        for loaded in self._models():
            parts = loaded.anatomy
            if len(ids) + max_new_tokens > parts.context:
                raise InputError(
                    f"prompt {name} has {len(ids)} tokens; with {max_new_tokens} new ones it exceeds the context of "
                    f"{parts.context} tokens of {loaded.name}.",
                    "Shorten the prompt or ask for fewer tokens.",
                )
        vocabulary = self.loaded.anatomy.vocabulary
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise InputError(f"prompt {name} has token ids outside 0..{vocabulary - 1} of {self.loaded.name}.")

    def _check_memory(self, plan: Plan) -> None:
        free = free_bytes(self.loaded.device)
        if free is None:
            return
        rows = len(plan.prompts)
        alone = self.needed_bytes(plan, 1)
        needed = alone * rows
        if needed > free:
            raise ResourceError(
                f"decoding {rows} prompts of up to {plan.longest} tokens with {plan.max_new_tokens} new ones needs "
                f"{needed / GIB:.2f} GiB on {self.loaded.device}, of which {free / GIB:.2f} GiB are free.",
                f"At most {free // alone} fit at once." if free >= alone else "Not even one prompt fits.",
            )

    def needed_bytes(self, plan: Plan, rows: int) -> int:
        """Keys and values, and the largest of the arrays that live for a moment: an estimate from above."""
        total = 0
        for loaded in self._models():
            parts = loaded.anatomy
            config = parts.model.config
            size = torch.empty((), dtype=parts.dtype).element_size()
            inner = 3 * config.intermediate_size + 6 * config.hidden_size
            logits = parts.vocabulary * (self.draft_length + 1)
            # sampled: float32 p, q, noise bits (int64) and their like beside the logits
            wide = size + 4 if plan.sampling.greedy else size + 40
            total += cache_bytes(parts, rows, self._length(plan))
            total += rows * max(plan.longest * inner * size, logits * wide)
        return total


def free_bytes(device: torch.device) -> int | None:
    """Memory that a new array can have on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
