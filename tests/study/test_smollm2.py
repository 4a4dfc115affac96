"""SmolLM2-135M-Instruct, a real Llama: one trace foretells the running decoders, round by round."""

from __future__ import annotations

import pytest

import probekit
from probekit.costs.roofline import roofline_costs
from probekit.prediction.rounds import rounds_of
from probekit.tracing.prompts import bundled_prompts
from probekit.validation.run import validate
from probekit.validation.transformers import transformers_accepted

pytestmark = pytest.mark.second


def hold(loaded, prompts: int, tokens: int, exits: list[int], lengths: list[int], peers: list[tuple[int, int]]) -> None:
    trace = probekit.trace(loaded, bundled_prompts("general")[::3][:prompts], max_new_tokens=tokens)
    validation = validate(loaded, trace, exit_layers=exits, draft_lengths=lengths, costs=roofline_costs(loaded))
    assert len(validation.cells) == len(exits) * len(lengths)
    assert validation.holds
    for cell in validation.cells:
        assert cell.rounds_equal or cell.ties > 0, cell.label
    for exit_layer, length in peers:
        for prompt in trace.prompts:
            expected = rounds_of(trace.agreement(prompt)[exit_layer], length, tokens, "draft")
            found = transformers_accepted(loaded, trace.prompt_ids(prompt).tolist(), exit_layer, length, tokens)
            if found.tokens != trace.outputs(prompt).tolist() or found.accepted != expected.accepted.tolist():
                assert trace.near_ties(prompt)[[exit_layer, -1]].any(), (prompt, exit_layer, length)


@pytest.mark.long
def test_a_small_part(smollm2):
    hold(smollm2, prompts=2, tokens=24, exits=[12, 20, 27], lengths=[2, 4], peers=[(20, 2)])


@pytest.mark.long
def test_the_whole(smollm2):
    hold(smollm2, prompts=8, tokens=64, exits=[4, 8, 12, 20, 25, 28], lengths=[1, 2, 4, 8],
         peers=[(12, 2), (20, 4), (27, 3)])  # fmt: skip


@pytest.mark.long
def test_the_trace_costs_less_than_the_text_it_reads(smollm2):
    """One prompt at a time: agreement of all exits and the table of all cells, against generation."""
    from time import perf_counter

    prompts = bundled_prompts("general")[:6]
    trace = probekit.trace(smollm2, prompts, max_new_tokens=64, statistics="agreement", batch_size=1)
    began = perf_counter()
    probekit.predict(trace)
    predicting = perf_counter() - began
    assert trace.manifest.measured.timings["trace_s"] + predicting < trace.manifest.measured.timings["generation_s"]
