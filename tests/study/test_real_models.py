"""Three published models, each of another family, held against transformers' own early exit, text by text.

Each test prints its counts (`pytest -m long -s`). A text counts as equal when its tokens, and the accepted drafts of
every round, are those of `generate(assistant_early_exit=E)`; a first difference must be a near-tie, and is counted.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import probekit
from probekit.hooks.capture import Capture
from probekit.lens.lens import Lens
from probekit.prediction.rounds import rounds_of
from probekit.tracing.prompts import bundled_prompts
from probekit.validation.transformers import transformers_accepted

pytestmark = pytest.mark.long

TOKENS = 24
CELLS = {  # (exit layer, draft length): two deep exits that accept often, and two that accept seldom or draft long
    "smollm2": [(12, 2), (20, 4), (25, 1), (28, 3)],
    "gemma3": [(12, 2), (15, 1), (15, 4), (17, 3)],
    "qwen": [(18, 2), (20, 1), (21, 4), (23, 3)],
}


class Counts(NamedTuple):
    equal: int
    ties: int
    rounds: int
    accepted: int
    wrong: list


@pytest.fixture(scope="module", params=CELLS)
def real(request):
    """Each model in turn, with its trace of 24 prompts of six kinds."""
    loaded = request.getfixturevalue(request.param)
    trace = probekit.trace(loaded, bundled_prompts("general"), max_new_tokens=TOKENS, statistics="agreement")
    return request.param, loaded, trace


def test_every_round_is_that_of_transformers(real):
    name, loaded, trace = real
    assert len(trace.prompts) >= 24
    for exit_layer, length in CELLS[name]:
        found = count(loaded, trace, exit_layer, length)
        print(f"\n{loaded.name}, exit {exit_layer}, {length} drafts: {found.equal} of {len(trace.prompts)} texts equal")
        print(f"{found.ties} part at a near-tie; {found.rounds} rounds, {found.accepted} drafts accepted")
        assert found.wrong == []
        assert found.equal + found.ties == len(trace.prompts)
        assert found.ties <= 2
        assert found.accepted > 0 or exit_layer < trace.depth // 2


def count(loaded, trace, exit_layer: int, length: int) -> Counts:
    equal = ties = rounds = accepted = 0
    wrong = []
    for prompt in trace.prompts:
        expected = rounds_of(trace.agreement(prompt)[exit_layer], length, TOKENS, "draft")
        run = transformers_accepted(loaded, trace.prompt_ids(prompt).tolist(), exit_layer, length, TOKENS)
        rounds, accepted = rounds + len(run.accepted), accepted + sum(run.accepted)
        tokens = trace.outputs(prompt).tolist()
        if run.tokens == tokens and run.accepted == expected.accepted.tolist():
            equal += 1
            continue
        at = first_difference(tokens, expected.accepted.tolist(), run)
        if trace.near_ties(prompt)[[exit_layer, -1], at : at + length + 1].any():
            ties += 1
        else:
            wrong.append((prompt, at, run.accepted, expected.accepted.tolist()))
    return Counts(equal, ties, rounds, accepted, wrong)


def first_difference(tokens: list[int], accepted: list[int], run) -> int:
    """The output index at which the first round begins that differs."""
    at = 0
    for mine, theirs in zip(accepted, run.accepted, strict=False):
        if mine != theirs or tokens[at : at + mine + 1] != run.tokens[at : at + mine + 1]:
            return at
        at += mine + 1
    return at


def test_tokens_are_those_of_generate(real):
    _, loaded, trace = real
    equal = ties = 0
    for prompt in trace.prompts:
        ids = torch.tensor([trace.prompt_ids(prompt).tolist()])
        text = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
        )[0, ids.shape[1] :].tolist()
        mine = trace.outputs(prompt).tolist()
        equal += mine == text
        if mine != text:
            at = next((i for i, pair in enumerate(zip(mine, text, strict=False)) if len({*pair}) == 2), len(mine))
            assert trace.near_ties(prompt)[-1, at], (prompt, at)
            ties += 1
    print(f"\n{loaded.name}: {equal} of {len(trace.prompts)} texts are those of generate, {ties} part at a near-tie")
    assert equal >= len(trace.prompts) - 2


@torch.inference_mode()
def test_the_last_row_of_the_lens_is_the_model(real):
    """On a text, and past a window where there is one: the residual stream through norm, head, scale and cap."""
    _, loaded, trace = real
    parts = loaded.anatomy
    window = getattr(loaded.model.config, "sliding_window", None) or 0
    ids = [token for prompt in trace.prompts for token in trace.prompt_ids(prompt).tolist()][: min(window, 600) + 40]
    ids = torch.tensor([ids])
    with Capture(loaded.model, [parts.depth]) as seen:
        logits = loaded.model(ids, use_cache=False).logits
    lens = Lens(parts)(seen[parts.depth], parts.depth)
    apart = float((lens - logits).abs().max() / logits.abs().max())
    print(f"\n{loaded.name}: {ids.shape[1]} tokens, the last row is {apart:.1e} from the model's own logits")
    assert apart < 1e-5


def test_the_decoder_emits_what_the_trace_says(real):
    """The same cells on the project's own decoder, under its own convention, for some of the texts."""
    name, loaded, trace = real
    equal = total = 0
    for exit_layer, length in CELLS[name]:
        for prompt in trace.prompts[::6]:
            run = probekit.decode(
                loaded, trace.prompt_ids(prompt).tolist(), method="self-speculative", exit_layer=exit_layer,
                draft_length=length, max_new_tokens=TOKENS,
            )  # fmt: skip
            expected = rounds_of(trace.agreement(prompt)[exit_layer], length, TOKENS, "prefill")
            same = run.tokens == trace.outputs(prompt).tolist() and list(run.accepted) == expected.accepted.tolist()
            equal, total = equal + same, total + 1
            assert same or trace.near_ties(prompt)[[exit_layer, -1]].any(), (prompt, exit_layer, length)
    print(f"\n{loaded.name}: {equal} of {total} texts of the decoder equal")
    assert equal >= total - 1
