"""Choices by rows and context: where speculation stops paying."""

from __future__ import annotations

import pytest
from traces.fabricate import fabricate

from probekit.choice.schedule import schedule
from probekit.costs.roofline import roofline_costs
from probekit.errors import InputError
from probekit.prediction.predict import predict


def at(rows: int, context: int, **more):
    return roofline_costs("llama-3-8b", device="h100", rows=rows, context=context, **more)


@pytest.fixture(scope="module")
def prediction():
    return predict(fabricate(depth=32, prompts=8, tokens=40, agreement=[0.6, *[0.85] * 31]), [4, 8], [1, 2, 4])


def test_large_batches_are_bound_by_products(prediction):
    found = schedule(prediction, at, [256, 1, 512], [128])
    assert list(found.choices) == [(1, 128), (256, 128), (512, 128)]
    assert found.choices[1, 128].speculate
    assert not found.choices[512, 128].speculate
    assert found.stops_at(128) == 512
    assert found.best(1, 128).draft_length > found.best(256, 128).draft_length  # each draft's row costs products
    document = found.to_json()
    assert document["stops_at"] == {"128": 512}
    assert [entry["draft_length"] > 0 for entry in document["entries"]] == [True, True, False]


def test_a_long_context_keeps_a_batch_on_the_bandwidth(prediction):
    """Keys and values of each row are read whatever the tokens of a pass: speculation pays on."""
    near, far = (schedule(prediction, at, [256], [context]).choices[256, context] for context in (128, 16384))
    assert far.speedup > near.ranking[0].speedup


def test_a_roofline_of_a_batch_and_of_quantised_weights():
    one, many = at(1, 0), at(8, 0)
    assert many.autoregressive_s == pytest.approx(one.autoregressive_s)  # the same weights are read
    assert many.rows == 8
    four = at(1, 0, weight_bits=4)
    assert four.autoregressive_s == pytest.approx(one.autoregressive_s / 4)
    assert at(8, 4096).autoregressive_s - many.autoregressive_s == pytest.approx(
        8 * (at(1, 4096).autoregressive_s - one.autoregressive_s)
    )
    with pytest.raises(InputError, match="make no batch"):
        at(0, 128)


def test_a_schedule_of_nothing(prediction):
    with pytest.raises(InputError, match="rows of 1 or more"):
        schedule(prediction, at, [], [128])
