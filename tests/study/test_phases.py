"""What the phases of a study hand to each other."""

from __future__ import annotations

from probekit.study.phases import even, odd
from probekit.tracing.tracer import trace


def test_the_choice_and_its_validation_share_no_prompt(tiny):
    run = trace(tiny, ["one", "two", "three", "four", "five"], max_new_tokens=3)
    assert [list(part(run).prompts) for part in (even, odd)] == [[0, 2, 4], [1, 3]]
