"""Devices that are not at hand: the choice there is that of their roofline, and words that mean nothing are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from traces.fabricate import fabricate

from probekit.choice.choose import choose
from probekit.choice.what_if import BATCHES, Scenario, what_if
from probekit.costs.roofline import DEVICES, roofline_costs
from probekit.errors import InputError
from probekit.prediction.predict import predict


@pytest.fixture(scope="module")
def trace():
    return fabricate(depth=12, prompts=8, tokens=40, agreement=[0.6, *[0.85] * 11])


def test_an_answer_is_the_choice_on_that_roofline(trace):
    prediction = predict(trace, [2, 4], [1, 2, 4])
    there = Scenario.named("device=l4, weight-bits=4, rows=8, context=8192")
    assert there == Scenario("l4", "bfloat16", 4.0, 8, 8192)
    [answer] = what_if(trace, prediction, [there])
    costs = roofline_costs(
        trace, device="l4", dtype="bfloat16", weight_bits=4, rows=8, context=8192, longest_draft=4,
        drafter=trace.manifest.drafter,
    )  # fmt: skip
    meant = choose(prediction, costs)
    assert (answer.choice.speedup, answer.choice.interval) == (meant.speedup, meant.interval)
    assert answer.to_json()["draft_length"] == (meant.draft_length or 0)


def test_where_drafts_stop_to_pay_depends_on_the_device(trace):
    """More products a byte: a larger batch before products bind. m2: 36 a byte; h100: 295."""
    assert DEVICES["m2"].flops / DEVICES["m2"].bandwidth < DEVICES["h100"].flops / DEVICES["h100"].bandwidth
    prediction = predict(trace, [2, 4], [1, 2, 4])
    small, large = what_if(trace, prediction, [Scenario("m2", context=0), Scenario("h100", context=0)])
    assert small.stops_at is not None
    assert small.stops_at in BATCHES
    assert large.stops_at is None or large.stops_at > small.stops_at


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h200", "'h200' is none of it"), ("device=warp", "no roofline is known for 'warp'"), ("rows=0", "rows of a"),
        ("rows=1.5", "a whole number from 1"), ("rows=1,rows=2", "'rows=2' is none of it"), ("speed=1", "'speed=1'"),
        ("weight-bits=nan", "weight-bits of a"), ("context=1e99", "context of a"), ("dtype=int3", "dtype 'int3'"),
        ("device=", "no roofline is known for ''"), ("rows=" + "9" * 400, "rows of a scenario"),
    ],
)  # fmt: skip
def test_what_is_no_scenario_is_named(text, message):
    with pytest.raises(InputError, match=message):
        Scenario.named(text)
    assert Scenario.named("") == Scenario()


def test_the_page_names_the_peaks_of_every_device_and_their_source():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "choose-an-exit.md").read_text(encoding="utf-8")
    for name, roof in DEVICES.items():
        assert roof.source
        row = f"| `{name}` | {roof.bandwidth / 1e9:g} | {roof.flops / 1e12:g} | {roof.source} |"
        assert row in page, row
