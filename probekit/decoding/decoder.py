"""The frame that every decoding method fills in: check everything first, then run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, ClassVar

import torch

from probekit.decoding.batch import DecodeBatch, DecodePlan
from probekit.decoding.batch_invariant import open_engine
from probekit.decoding.caches import cache_bytes
from probekit.decoding.detokenize import check_stop
from probekit.decoding.engine import Engine
from probekit.decoding.results import Decoded, Piece
from probekit.decoding.self_check import check_decodable, check_engine
from probekit.errors import InputError, ResourceError
from probekit.models.loaded import Loaded, as_loaded
from probekit.models.memory import free_bytes
from probekit.settings import Sampling

GIB = 2**30


class Decoder:
    """The base of every decoding method: `decode` checks everything first, then runs, and leaves the model unchanged.

    A subclass says how a batch runs (`_run`) and what it needs.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = True
    exit_layer: int | None = None
    draft_length: int = 0

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = as_loaded(loaded)

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
        max_new_tokens: the budget M of each prompt, at least 1. A longer draft length is this one.
        stop: strings that end a text.
        on_accept: called with a Piece as soon as tokens are sure.
        indices: distinct numbers that name the prompts (0, 1, .. by default). Under sampling they choose the random
            numbers: a prompt with the same index gets the same tokens in any batch.

        Raises
        ------
        InputError, ResourceError: before any work.
        """
        if isinstance(max_new_tokens, int) and 0 < max_new_tokens < self.draft_length:
            within = copy(self)
            within.draft_length = max_new_tokens  # what is drafted beyond the budget is never used
            return within.decode(
                prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, on_accept=on_accept,
                indices=indices,
            )  # fmt: skip
        plan = self._plan(prompts, max_new_tokens, sampling, stop, on_accept, indices)
        for loaded in self._models():
            check_engine(as_loaded(loaded))
        with torch.inference_mode():
            batch = DecodeBatch(plan, self.loaded, self._setting())
            self._run(batch)
        return batch.results()

    def _run(self, batch: DecodeBatch) -> None:
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

    def _engine(self, plan: DecodePlan, loaded: Loaded | None = None) -> Engine:
        """An engine with room for the plan. In a batch a row may draft beyond its own budget, uncounted."""
        return open_engine((loaded or self.loaded).anatomy, len(plan.prompts), self._length(plan))

    def _length(self, plan: DecodePlan) -> int:
        return plan.longest + plan.max_new_tokens + self.draft_length

    def _plan(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str],
        on_accept: Callable[[Piece], None] | None,
        indices: Sequence[int] | None,
    ) -> DecodePlan:
        for loaded in self._models():
            check_decodable(loaded)
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
        plan = DecodePlan(lists, names, max_new_tokens, sampling, strings, on_accept)
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

    def _check_memory(self, plan: DecodePlan) -> None:
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

    def needed_bytes(self, plan: DecodePlan, rows: int) -> int:
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
