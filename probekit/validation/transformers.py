"""The rounds of transformers' own early-exit generation and prompt lookup, counted from inside."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig

from probekit.engines.engine import Drafting
from probekit.errors import InputError
from probekit.models.loaded import Loaded, silent
from probekit.validation.engine_rounds import EngineRounds, Turn

NO_TOKEN = -1  # as padding: transformers' drafter takes every such token of the text for padding and masks it


class TransformersRounds(NamedTuple):
    """What transformers' own generation did: its tokens, and drafted and accepted tokens of each round.

    `drafted` is as transformers counts, within the budget: drafts of its early exit stop at an end-of-sequence token,
    and what prompt lookup drafts past the budget, where nothing can be accepted, is left out. `accepted` is corrected:
    where the text ended with a drafted end-of-sequence token, transformers counts that token as the bonus, and here it
    is accepted.
    """

    tokens: list[int]
    drafted: list[int]
    accepted: list[int]


def transformers_accepted(
    loaded: Loaded,
    prompt_ids: Sequence[int],
    exit_layer: int,
    draft_length: int,
    max_new_tokens: int,
    schedule: str = "constant",
) -> TransformersRounds:
    """Run `generate(assistant_early_exit=E)`, greedy, and count its rounds.

    draft_length: K drafts in every round; the first round's K where `schedule` is "heuristic".

    Rounds follow the `draft` convention. The draft settings stand on the model's generation_config, for transformers
    ignores them as arguments with early exit; the checkpoint's own generation_config is set aside meanwhile. The model
    comes back as it was, also after an exception.
    """
    loaded.anatomy.check_exit(exit_layer)
    eos = sorted(loaded.eos_ids)
    settings = _drafts(draft_length, schedule)
    return _counted(loaded, prompt_ids, max_new_tokens, settings, eos, assistant_early_exit=exit_layer)


def transformers_assisted(
    loaded: Loaded, drafter: Loaded, prompt_ids: Sequence[int], draft_length: int, max_new_tokens: int
) -> TransformersRounds:
    """Run `generate(assistant_model=...)`, greedy, and count its rounds.

    drafter: a draft model with the same tokenizer, such as a draft checkpoint; its generation_config is set aside
    meanwhile, too. Rounds follow the `draft` convention; the rest is as in `transformers_accepted`.
    """
    return _assisted(loaded, drafter, prompt_ids, draft_length, max_new_tokens, sorted(loaded.eos_ids))


def _assisted(
    loaded: Loaded, drafter: Loaded, prompt_ids: Sequence[int], length: int, max_new_tokens: int, eos: Sequence[int]
) -> TransformersRounds:
    with _plain_generation(drafter.model, _drafts(length), eos):
        return _counted(loaded, prompt_ids, max_new_tokens, {}, eos, assistant_model=drafter.model)


def transformers_lookup(
    loaded: Loaded, prompt_ids: Sequence[int], ngram: int, draft_length: int, max_new_tokens: int
) -> TransformersRounds:
    """Run `generate(prompt_lookup_num_tokens=K, max_matching_ngram_size=n)`, greedy, and count its rounds.

    Rounds follow the `draft` convention; the rest is as in `transformers_accepted`.
    """
    call = {"prompt_lookup_num_tokens": draft_length, "max_matching_ngram_size": ngram}
    return _counted(loaded, prompt_ids, max_new_tokens, {}, sorted(loaded.eos_ids), **call)


class TransformersSession:
    """transformers' own `generate`, greedy, with one way of drafting, timed.

    drafting: who drafts and how many tokens; an exit is its own early exit, a lookup its own prompt lookup, nobody
    plain decoding. helper: the draft model, its assistant, where `drafting` is of one; None for all others.
    """

    def __init__(self, loaded: Loaded, drafting: Drafting, helper: Loaded | None = None) -> None:
        self.loaded, self.drafting, self.helper = loaded, drafting, helper

    def __call__(
        self, prompt_ids: Sequence[int], max_new_tokens: int, *, rows: int = 1, ignore_eos: bool = False
    ) -> Turn:
        if rows != 1:
            raise InputError(f"transformers drafts for one row at a time, not {rows}.", "Leave --rows out.")
        begin, processor = time.perf_counter(), time.process_time()
        found = self._rounds(prompt_ids, max_new_tokens, () if ignore_eos else sorted(self.loaded.eos_ids))
        seconds, processor = time.perf_counter() - begin, time.process_time() - processor
        text = verified(found)
        plain = len(found.drafted) - len(text.drafted) if self.drafting.speculates else len(text.tokens)
        return Turn(text, plain, seconds, processor)

    def _rounds(self, prompt_ids: Sequence[int], max_new_tokens: int, eos: Sequence[int]) -> TransformersRounds:
        how, length = self.drafting, self.drafting.draft_length
        if how.lookup is not None:
            call = {"prompt_lookup_num_tokens": length, "max_matching_ngram_size": how.lookup.ngram}
            return _counted(self.loaded, prompt_ids, max_new_tokens, {}, eos, **call)
        if not how.speculates:
            return _counted(self.loaded, prompt_ids, max_new_tokens, {}, eos)
        if self.helper is not None:
            return _assisted(self.loaded, self.helper, prompt_ids, length, max_new_tokens, eos)
        settings = _drafts(length)
        return _counted(self.loaded, prompt_ids, max_new_tokens, settings, eos, assistant_early_exit=how.exit_layer)


def verified(found: TransformersRounds) -> EngineRounds:
    """The rounds that verified drafts, as other engines count."""
    kept = [place for place, drafted in enumerate(found.drafted) if drafted > 0]
    return EngineRounds(
        found.tokens, [found.drafted[place] for place in kept], [found.accepted[place] for place in kept]
    )


def _drafts(length: int, schedule: str = "constant") -> dict[str, Any]:
    return {
        "num_assistant_tokens": length,
        "num_assistant_tokens_schedule": schedule,
        "assistant_confidence_threshold": 0.0,
    }


def _counted(
    loaded: Loaded,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    settings: Mapping[str, Any],
    eos: Sequence[int],
    **call: Any,
) -> TransformersRounds:
    ids = torch.tensor([list(prompt_ids)], device=loaded.device)
    candidates: list[tuple[int, Tensor]] = []  # of each round: the length before it, and the text with its drafts
    lengths: list[int] = []  # after each round
    # It warns of settings that it makes for its own drafts.
    with silent(), _plain_generation(loaded.model, settings, eos), _watched(loaded.model, candidates, lengths):
        try:
            output = loaded.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                **call,
            )
        except IndexError as error:
            if "assistant_early_exit" not in call:
                raise
            raise InputError(
                f"transformers {transformers.__version__} cannot run its own early exit on {loaded.name}: it runs all "
                f"layers of a {loaded.anatomy.family.model_type!r} model with the cache of the first "
                f"{call['assistant_early_exit']}.",
                "Compare with probekit's own decoder (validate).",
            ) from error
    text = output[0].tolist()
    drafted, accepted = [], []
    for (before, proposal), after in zip(candidates, lengths, strict=True):
        drafts = proposal[0, before:].tolist()
        emitted = text[before:after]
        ended_in_draft = emitted[-1] in eos and drafts[: len(emitted)] == emitted
        drafted.append(min(len(drafts), len(prompt_ids) + max_new_tokens - before - 1))
        accepted.append(len(emitted) - (0 if ended_in_draft else 1))
    return TransformersRounds(text[len(prompt_ids) :], drafted, accepted)


@contextmanager
def _plain_generation(model: Any, settings: Mapping[str, Any], eos: Sequence[int]) -> Iterator[None]:
    """A generation_config with these settings and nothing else; the model's own comes back."""
    own, layers = model.generation_config, model.config.num_hidden_layers
    model.generation_config = GenerationConfig(
        eos_token_id=list(eos) or None, pad_token_id=eos[0] if eos else NO_TOKEN, **settings
    )
    try:
        yield
    finally:
        model.generation_config = own
        model.config.num_hidden_layers = layers  # transformers leaves it changed after an exception


@contextmanager
def _watched(model: Any, candidates: list[tuple[int, Tensor]], lengths: list[int]) -> Iterator[None]:
    """Note each round's drafts, and how long the text is after it."""
    make = model._get_candidate_generator

    def watched(*args: Any, **kwargs: Any) -> Any:
        generator = make(*args, **kwargs)
        propose, judge = generator.get_candidates, generator.update_candidate_strategy

        def get_candidates(input_ids: Tensor, *more: Any, **named: Any) -> Any:
            found = propose(input_ids, *more, **named)
            candidates.append((input_ids.shape[1], found[0]))
            return found

        def update_candidate_strategy(input_ids: Tensor, *more: Any, **named: Any) -> Any:
            lengths.append(input_ids.shape[1])
            return judge(input_ids, *more, **named)

        generator.get_candidates, generator.update_candidate_strategy = get_candidates, update_candidate_strategy
        return generator

    model._get_candidate_generator = watched
    try:
        yield
    finally:
        del model._get_candidate_generator
