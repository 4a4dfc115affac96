"""The rounds of transformers' own early-exit generation, counted from inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig

from probekit.errors import InputError
from probekit.models.loaded import Loaded

NO_TOKEN = -1  # as padding: transformers' drafter takes every such token of the text for padding and masks it


class TransformersRounds(NamedTuple):
    """What transformers' own early-exit generation did: its tokens, and drafted and accepted tokens of each round.

    `drafted` is as transformers counts: its drafts stop at an end-of-sequence token. `accepted` is corrected: where
    the text ended with a drafted end-of-sequence token, transformers counts that token as the bonus, and here it is
    accepted.
    """

    tokens: list[int]
    drafted: list[int]
    accepted: list[int]


def transformers_accepted(
    loaded: Loaded, prompt_ids: Sequence[int], exit_layer: int, draft_length: int, max_new_tokens: int
) -> TransformersRounds:
    """Run `generate(assistant_early_exit=E)`, greedy, with K drafts in every round, and count them.

    Rounds follow the `draft` convention. The draft settings stand on the model's generation_config, for transformers
    ignores them as arguments with early exit; the checkpoint's own generation_config is set aside meanwhile. The model
    comes back as it was, also after an exception.
    """
    loaded.anatomy.check_exit(exit_layer)
    eos = sorted(loaded.eos_ids)
    ids = torch.tensor([list(prompt_ids)], device=loaded.device)
    candidates: list[tuple[int, Tensor]] = []  # of each round: the length before it, and the text with its drafts
    lengths: list[int] = []  # after each round
    with _plain_generation(loaded.model, draft_length, eos), _watched(loaded.model, candidates, lengths):
        try:
            output = loaded.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                assistant_early_exit=exit_layer,
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        except IndexError as error:
            raise InputError(
                f"transformers {transformers.__version__} cannot run its own early exit on {loaded.name}: it runs all "
                f"layers of a {loaded.anatomy.family.model_type!r} model with the cache of the first {exit_layer}.",
                "Compare with probekit's own decoder (validate).",
            ) from error
    text = output[0].tolist()
    drafted, accepted = [], []
    for (before, proposal), after in zip(candidates, lengths, strict=True):
        drafts = proposal[0, before:].tolist()
        emitted = text[before:after]
        ended_in_draft = emitted[-1] in loaded.eos_ids and drafts[: len(emitted)] == emitted
        drafted.append(len(drafts))
        accepted.append(len(emitted) - (0 if ended_in_draft else 1))
    return TransformersRounds(text[len(prompt_ids) :], drafted, accepted)


@contextmanager
def _plain_generation(model: Any, draft_length: int, eos: Sequence[int]) -> Iterator[None]:
    """A generation_config with the draft settings and nothing else; the model's own comes back."""
    own, layers = model.generation_config, model.config.num_hidden_layers
    model.generation_config = GenerationConfig(
        eos_token_id=list(eos) or None,
        pad_token_id=eos[0] if eos else NO_TOKEN,
        num_assistant_tokens=draft_length,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
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
