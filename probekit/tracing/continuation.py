"""The texts of a batch: given with the prompts, or continued by the model, with fewer at once where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.self_check import generated, reproduces
from probekit.errors import InputError, ResourceError
from probekit.tracing.plan import TracePlan
from probekit.tracing.prompts import Encoded

BackOff = Callable[[int, int], None]
"""Called as `back_off(size, limit)` where memory did not suffice for `size` and the next try takes at most `limit`."""


@dataclass(frozen=True)
class ContinuedText:
    """A prompt with its continuation: the sequence, P, and why it ended."""

    prompt: int
    sequence: tuple[int, ...]
    context: int
    ended: str

    @property
    def rows(self) -> int:
        return len(self.sequence) - 1

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.sequence[self.context :]


def continued(plan: TracePlan, prompts: Sequence[Encoded], back_off: BackOff) -> Iterator[list[ContinuedText]]:
    """Each prompt with its text, group after group: together, each to its own end.

    Raises ResourceError where not even one prompt can be continued.
    """
    if plan.written:
        yield [ContinuedText(one.prompt.index, one.ids, one.context, _end(plan, one)) for one in prompts]
        return
    if not reproduces(plan.loaded):
        yield from _by_generate(plan, prompts)
        return
    most = len(prompts)
    while prompts:
        group, failure = prompts[:most], None
        try:
            decoded = Autoregressive(plan.loaded).decode(
                [one.ids for one in group],
                max_new_tokens=plan.manifest.settings.max_new_tokens,
                sampling=plan.sampling,
                indices=[one.prompt.index for one in group],
            )
        except (ResourceError, RuntimeError, MemoryError) as error:
            failure = out_of_memory(error)
        if failure is not None:
            if len(group) == 1:
                raise ResourceError(f"not even prompt {group[0].prompt.index} alone can be continued: {failure}")
            most = len(group) // 2
            back_off(len(group), most)
            continue
        yield [
            ContinuedText(one.prompt.index, (*one.ids, *text.tokens), len(one.ids), text.ended)
            for one, text in zip(group, decoded, strict=True)
        ]
        prompts = prompts[most:]


def _end(plan: TracePlan, one: Encoded) -> str:
    """Why a text that comes with its prompt ends; one out of a log, shorter than the longest, was stopped."""
    if not plan.logged:
        return "given"
    if one.ids[-1] in plan.loaded.eos_ids:
        return "eos"
    return "budget" if len(one.ids) - one.context == plan.manifest.settings.max_new_tokens else "stop"


def _by_generate(plan: TracePlan, prompts: Sequence[Encoded]) -> Iterator[list[ContinuedText]]:
    """Each text by the model's own `generate`, one at a time: for a model that the engine does not reproduce."""
    loaded, budget = plan.loaded, plan.manifest.settings.max_new_tokens
    if not plan.sampling.greedy:
        raise InputError(
            f"{loaded.name} cannot be decoded by probekit's engine, which sampling needs.",
            "Trace it greedily, or trace text that is given.",
        )
    for one in prompts:
        tokens = generated(loaded, one.ids, budget)
        ended = "eos" if tokens[-1] in loaded.eos_ids else "budget"
        yield [ContinuedText(one.prompt.index, (*one.ids, *tokens), len(one.ids), ended)]


def out_of_memory(error: BaseException) -> str:
    """The first line of an out-of-memory error; any other error is raised again."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    known = isinstance(error, torch.OutOfMemoryError | MemoryError | ResourceError)
    if known or any(words in text.lower() for words in ("out of memory", "can't allocate memory", "not enough memory")):
        return text
    raise error
