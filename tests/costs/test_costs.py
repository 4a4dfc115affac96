"""Costs: the published roofline table, what a round adds up to, and a calibration against a clock that counts work."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from traces.fabricate import fabricate

from probekit.costs import measure as costs_module
from probekit.costs import timing
from probekit.costs.measure import measure_costs, row_design
from probekit.costs.profile import Costs, DraftModelCosts
from probekit.costs.roofline import Dimensions, roofline_costs
from probekit.errors import InputError
from probekit.prediction.rounds import closed_form_tokens_per_round


def by_hand(**changes) -> Costs:
    """Two exits of a model of three layers: a layer takes 1, a head 2 whatever the rows, booking 0.5."""
    settings = {
        "source": "measured", "device": "cpu", "dtype": "float32", "context": 16, "depth": 3, "autoregressive_s": 5.5,
        "early_s": {1: 1.0, 2: 2.0}, "head_s": 2.0, "overhead_s": 0.5,
        "verify_s": {(1, rows): 4.0 for rows in range(1, 5)} | {(2, rows): 3.0 for rows in range(1, 5)},
    }  # fmt: skip
    return Costs(**(settings | changes))


# ------------------------------------------------------------------------------------------------ a round
def test_a_round_adds_up():
    costs = by_hand()
    # exit 1, 3 drafts: 4 early passes, 3 heads, one verification, booking
    assert costs.round_seconds(1, 3) == 4 * 1 + 3 * 2 + 4 + 0.5
    assert costs.round_seconds(2, 1) == 2 * 2 + 2 + 3 + 0.5
    assert costs.round_seconds(2, 0) == 2 + 3 + 0.5  # nothing drafted: a plain step
    assert costs.rounds_seconds(1, 2).tolist() == [5.5, 8.5, 11.5]
    assert by_hand(cold_s={1: 0.25}).round_seconds(1, 3) == 14.75
    assert by_hand(heads_s={1: 1.5}).round_seconds(1, 3) == 13.0


def test_a_two_model_round_adds_up():
    costs = by_hand(draft_model=DraftModelCosts("small", 1.0, 1.5, {1: 5.0, 2: 5.0, 3: 6.0}))
    assert costs.round_seconds(None, 2) == 1.5 + 1.0 + 6.0 + 0.5
    assert costs.round_seconds(None, 0) == 5.0 + 0.5  # the drafter has nothing to do


@pytest.mark.parametrize(
    ("exit_layer", "drafts", "message"),
    [
        (3, 1, r"exit layer 3 is out of range: these costs know exits 1\.\.2"),
        (1, 4, "drafts of up to 3 tokens, not 4"),
        (None, 1, "know no draft model"),
    ],
)
def test_a_round_that_nobody_timed(exit_layer, drafts, message):
    with pytest.raises(InputError, match=message):
        by_hand().round_seconds(exit_layer, drafts)


@pytest.mark.parametrize("bad", [{"head_s": 0.0}, {"autoregressive_s": float("nan")}, {"overhead_s": -1.0}])
def test_times_are_positive(bad):
    with pytest.raises(InputError, match="more than 0 seconds"):
        by_hand(**bad)


def test_json_and_back():
    costs = by_hand(
        draft_model=DraftModelCosts("small", 1.0, 1.5, dict.fromkeys(range(1, 5), 5.0)), cold_s={1: 0.1, 2: 0.2},
        heads_s={1: 1.0, 2: 2.0}, quantiles={"head": [1.0, 2.0, 3.0]},
    )  # fmt: skip
    assert Costs.from_json(json.loads(json.dumps(costs.to_json()))) == costs
    frame = costs.to_pandas()
    assert list(frame.columns) == ["step", "exit_layer", "rows", "seconds"]
    assert frame.loc[frame["step"] == "verify", "seconds"].tolist() == [4.0] * 4 + [3.0] * 4


# ------------------------------------------------------------------------------------------------ roofline
TABLE = [
    # shape, autoregressive step (ms), gigabytes, draft steps at E/L = 1/8, 1/4, 3/8, and verify passes there (ms)
    ("llama-3-8b", 3.49, 15.0, (0.65, 1.06, 1.46), (3.09, 2.68, 2.27)),
    ("llama-3.2-1b", 0.575, 2.47, (0.18, 0.24, 0.29), (0.52, 0.46, 0.41)),
    ("llama-2-7b", 3.07, 13.2, (0.44, 0.81, 1.19), (2.70, 2.32, 1.94)),
    ("smollm2-135m", 0.063, 0.27, (0.020, 0.026, 0.031), (0.056, 0.049, 0.044)),
]


@pytest.mark.parametrize(("shape", "step", "gigabytes", "drafts", "verifies"), TABLE)
def test_bytes_over_bandwidth(shape, step, gigabytes, drafts, verifies):
    """At 4.3 TB/s and 788 TFLOP/s, bf16; the table was computed apart, and rounds."""
    costs = roofline_costs(shape, device="h200", context=0)
    assert costs.autoregressive_s * 1e3 == pytest.approx(step, rel=0.01)
    assert costs.autoregressive_s * 4.3e3 == pytest.approx(gigabytes, rel=0.01)
    for share, draft, verify in zip((1 / 8, 1 / 4, 3 / 8), drafts, verifies, strict=True):
        exit_layer = int(share * costs.depth + 0.5)  # 30 layers have no eighth
        assert (costs.early_s[exit_layer] + costs.head_s) * 1e3 == pytest.approx(draft, rel=0.02)
        assert costs.verify_s[exit_layer, 1] * 1e3 == pytest.approx(verify, rel=0.02)


@pytest.mark.parametrize(
    ("share", "alpha", "length", "speedup"),
    [
        (1 / 8, 0.6, 2, 1.43),
        (1 / 8, 0.8, 4, 1.93),
        (1 / 8, 0.95, 11, 3.02),
        (1 / 4, 0.7, None, 1.36),
        (1 / 4, 0.9, None, 1.86),
    ],
)
def test_the_ideal_speedup_of_an_8b(share, alpha, length, speedup):
    """tokens per round / (1 + K c): the closed form over what a round costs."""
    costs = roofline_costs("llama-3-8b", device="h200", context=0)
    exit_layer = int(share * costs.depth)
    found = {
        K: closed_form_tokens_per_round(alpha, K) * costs.autoregressive_s / costs.round_seconds(exit_layer, K)
        for K in range(1, 16)
    }
    best = max(found, key=found.get)
    assert found[best] == pytest.approx(speedup, rel=0.01)
    assert length is None or best == length


def test_a_roofline_bends_where_products_decide():
    costs = roofline_costs("tiny", bandwidth=1e12, flops=1e12, dtype="bfloat16", context=0)
    one, four = costs.verify_s[2, 1], costs.verify_s[2, 4]
    weights = 3 * Dimensions.of("tiny").layer_parameters + Dimensions.of("tiny").head_parameters
    assert one == pytest.approx(2 * weights / 1e12)  # two bytes a weight, two operations a weight and row
    assert four == pytest.approx(8 * weights / 1e12)


def test_context_costs_bandwidth():
    near, far = (roofline_costs("smollm2-135m", device="h200", context=context) for context in (0, 4096))
    cached = 30 * 2 * 192 * 4096 * 2  # layers x keys and values x width x tokens x bytes
    assert far.autoregressive_s - near.autoregressive_s == pytest.approx(cached / 4.3e12)


def test_dimensions_of_whatever_is_at_hand(tiny, tiny_tied):
    for loaded, shape in ((tiny, "tiny"), (tiny_tied, "tiny-tied")):
        known = Dimensions.of(loaded)
        assert known.layer_parameters == Dimensions.of(shape).layer_parameters
        assert known.head_parameters == Dimensions.of(shape).head_parameters == loaded.anatomy.head.weight.numel()
        assert known.key_value_width == Dimensions.of(shape).key_value_width
        parts = loaded.anatomy
        record = SimpleNamespace(
            name="run", depth=parts.depth, width=parts.width, vocabulary=parts.vocabulary, tied=parts.tied,
            parameters=parts.parameters,
        )  # fmt: skip
        seen = Dimensions.of(record)
        assert (seen.layer_parameters, seen.head_parameters) == (known.layer_parameters, known.head_parameters)
        assert seen.key_value_width is None  # a trace does not say


def test_a_trace_brings_its_device_and_dtype():
    costs = roofline_costs(fabricate(), drafter="tiny")
    assert (costs.device, costs.dtype, costs.context, costs.drafter) == ("cpu", "float32", 0, "tiny")
    assert costs.round_seconds(None, 3) > 0


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("tiny", {"device": "abacus"}, "no roofline is known for 'abacus': it is cpu or one of h200"),
        ("tiny", {"device": "h200", "dtype": "int3"}, "dtype 'int3' is not known"),
        ("llama-9", {}, "no shape is named 'llama-9'"),
        ("tiny", {"bandwidth": -1.0, "flops": 1.0}, "a device moves and computes something"),
    ],
)
def test_a_roofline_of_nothing(source, settings, message):
    with pytest.raises(InputError, match=message):
        roofline_costs(source, **settings)


# ------------------------------------------------------------------------------------------------ measured
class WorkClock:
    """A clock that advances by what the hooked modules do: 10 a layer and 1 a row; 20 a head and 3 a row."""

    def __init__(self) -> None:
        self.now = 0.0
        self.hooks = ExitStack()

    def watch(self, loaded) -> None:
        for modules, once, each in ((loaded.anatomy.layers, 10, 1), ([loaded.anatomy.head], 20, 3)):
            for module in modules:

                def count(_module, _args, output, once=once, each=each):
                    self.now += once + each * output.shape[-2]

                self.hooks.callback(module.register_forward_hook(count).remove)

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def work_clock(monkeypatch):
    clock = WorkClock()
    monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr("probekit.decoding.batch.perf_counter", clock.perf_counter)
    with clock.hooks:
        yield clock


@pytest.mark.parametrize("method", ["self-speculative", "speculative"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_calibration_foretells_the_decoders_work(tiny, tiny_draft, work_clock, method, temperature):
    """By a clock that counts work, the measured steps add up to the decoder's rounds, exactly."""
    from probekit.decoding.autoregressive import Autoregressive
    from probekit.decoding.speculative import SelfSpeculative, Speculative
    from probekit.settings import Sampling

    work_clock.watch(tiny)
    work_clock.watch(tiny_draft)
    sampling = Sampling(temperature=temperature, seed=1)
    costs = measure_costs(tiny, 12, draft_lengths=[4], drafter=tiny_draft, sampling=sampling, repeats=2)
    assert costs.sweeps == 2
    assert costs.fit_error == pytest.approx(0)
    assert costs.autoregressive_s == 5 * 11 + 23

    def seconds(run):
        return run.seconds["total"] - run.seconds["prefill"]

    (plain,) = Autoregressive(tiny).decode([[1, 2, 3]], max_new_tokens=8, sampling=sampling)
    assert seconds(plain) == pytest.approx(costs.autoregressive_s * plain.rounds)
    drafted = set()
    for exit_layer in (2, 4) if method == "self-speculative" else (None,):
        decoder = Speculative(tiny, tiny_draft, 4) if exit_layer is None else SelfSpeculative(tiny, exit_layer, 4)
        for budget in (3, 4, 9):
            (run,) = decoder.decode([[1, 2, 3]], max_new_tokens=budget, sampling=sampling)
            assert seconds(run) == pytest.approx(sum(costs.round_seconds(exit_layer, k) for k in run.drafted))
            drafted.update(run.drafted)
    assert {1, 2, 4} <= drafted


@pytest.mark.parametrize("shape", ["2", "3", "2x1x1", "3x2x1", "2x2", "4x2", "3/1/1/0/1/0/0"])
def test_a_calibration_foretells_the_rounds_of_trees(tiny, work_clock, shape):
    """By the same clock: every exit, every number of levels, also shapes that were not timed."""
    from probekit.decoding.speculative import Speculative
    from probekit.drafting.drafters import ExitLayer
    from probekit.drafting.tree_drafters import TreeDrafts
    from probekit.drafting.trees import tree_shape_named

    work_clock.watch(tiny)
    costs = measure_costs(tiny, 12, draft_lengths=[16], repeats=1)
    tree = tree_shape_named(shape)
    for exit_layer in (1, 2, 4):
        drafter = TreeDrafts(ExitLayer(exit_layer), tree)
        for budget in (2, 3, 4, 9):
            (run,) = Speculative(tiny, drafter, tree.depth).decode([[1, 2, 3]], max_new_tokens=budget)
            levels = [tree.sizes.tolist().index(drafted) for drafted in run.drafted]
            expected = sum(costs.tree_seconds(exit_layer, tree, each) for each in levels)
            assert run.seconds["total"] - run.seconds["prefill"] == pytest.approx(expected)
    again = Costs.from_json(json.loads(json.dumps(costs.to_json())))
    assert again == costs and again.trees == costs.trees


def test_exits_and_widths_between_are_read_off_a_line():
    """Of six layers, exits 1, 3 and 5 are timed; a layer takes 2 and 0.5 a row, a head 3."""
    rows = [1, 2, 5]
    times = {"autoregressive": [15.0], "head first": [3.5], "booking 0": [0.1], "booking 4": [0.5]}
    for exit_layer in (1, 3, 5):
        times[f"head {exit_layer}"] = [2.5 if exit_layer == 1 else 3.0]
        times[f"early {exit_layer}"] = [2.5 * exit_layer] * 2 + [1e6]  # the median forgets the slow one
        times[f"early first {exit_layer}"] = [2.5 * exit_layer + 1]
        for count in rows:
            times[f"verify {exit_layer} {count}"] = [(6 - exit_layer) * (2 + 0.5 * count) + 3]
    blank = by_hand(depth=6)
    found = costs_module.assemble(times, [1, 3, 5], rows, blank)
    assert found.early_s == {exit_layer: 2.5 * exit_layer for exit_layer in range(1, 6)}
    assert found.verify_s[2, 3] == 4 * 3.5 + 3
    assert found.verify_s[4, 4] == 2 * 4 + 3
    assert found.heads_s[2] == pytest.approx(2.75 + 0.1)
    assert found.head_s == pytest.approx(3 + 0.1)  # a quarter of what booking four drafts takes longer
    assert found.cold_s[2] == pytest.approx(1.75)  # a layer's 1, and a head's 1 or 0.5
    assert found.overhead_s == 0.1
    assert found.fit_error == 0
    assert found.longest_draft == 4
    times["early 3"] = [10.0]
    assert costs_module.assemble(times, [1, 3, 5], rows, blank).fit_error == pytest.approx(0.25)


def test_a_measured_calibration_is_whole(any_tiny, unchanged):
    from probekit.hooks.sites import open_hooks

    unchanged(any_tiny.model)
    seen = []
    costs = measure_costs(any_tiny, 20, draft_lengths=(1, 2), repeats=1, progress=lambda *at: seen.append(at))
    assert open_hooks(any_tiny.model) == []
    assert (costs.source, costs.device, costs.dtype, costs.context) == ("measured", "cpu", "float32", 20)
    assert sorted(costs.early_s) == list(range(1, any_tiny.depth))
    assert sorted({rows for _, rows in costs.verify_s}) == [1, 2, 3]
    assert len(costs.verify_s) == 3 * (any_tiny.depth - 1)
    low, middle, high = costs.quantiles["autoregressive"]
    assert 0 < low <= middle <= high
    assert seen == [("costs", 100, 100)]
    assert Costs.from_json(costs.to_json()) == costs


@pytest.mark.parametrize("vocabulary", [50, 130])
def test_a_draft_model_whose_head_is_padded_otherwise(tiny, vocabulary):
    from probekit.models.synthetic import synthetic
    from probekit.settings import Sampling

    helper = replace(synthetic("tiny-draft", vocabulary=vocabulary), tokenizer=tiny.tokenizer)
    costs = measure_costs(tiny, 4, draft_lengths=[2], drafter=helper, sampling=Sampling(temperature=1.0), repeats=1)
    assert sorted(costs.draft_model.verify_s) == [1, 2, 3]
    assert costs.round_seconds(None, 2) > 0


def test_a_model_of_two_layers_has_one_exit(tiny_draft):
    costs = measure_costs(tiny_draft, 4, draft_lengths=[1], repeats=1)
    assert list(costs.early_s) == [1]
    assert costs.fit_error is None


def test_row_design():
    assert row_design(3) == [1, 2, 3, 4]
    assert row_design(8) == list(range(1, 10))
    assert row_design(20) == [*range(1, 10), 13, 17, 21]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 0}, "context must be a whole number of at least 1"),
        ({"context": 250}, "context of 250 tokens and drafts of 8 exceed the 256 tokens that tiny reads"),
        ({"draft_lengths": [0]}, "draft length 0 is out of range"),
        ({"draft_lengths": []}, "no draft length"),
        ({"exit_layers": [5]}, r"exit layer 5 is out of range: this model has exits 1\.\.4"),
        ({"clock": "sundial"}, "clock 'sundial' is not known: it is wall or processor"),
    ],
)
def test_wrong_use(tiny, settings, message):
    with pytest.raises(InputError, match=message):
        measure_costs(tiny, **settings)


def test_the_processors_clock_counts_one_thread_alone(tiny, monkeypatch):
    """What a step waits for is not in it; the threads of a pass would be counted twice."""
    from probekit.decoding.batch import DecodeBatch

    verify, threads = DecodeBatch.verify, torch.get_num_threads()

    def slowly(batch, *given):
        time.sleep(0.005)
        return verify(batch, *given)

    monkeypatch.setattr(DecodeBatch, "verify", slowly)
    try:
        torch.set_num_threads(2)
        with pytest.raises(InputError, match="counts the time of one thread on a CPU; this model runs on 2 threads"):
            measure_costs(tiny, 12, clock="processor")
        torch.set_num_threads(1)
        waits = measure_costs(tiny, 12, draft_lengths=[2], repeats=2)
        works = measure_costs(tiny, 12, draft_lengths=[2], repeats=2, clock="processor")
    finally:
        torch.set_num_threads(threads)
    assert min(waits.blocks["autoregressive"]) > 0.005
    assert works.autoregressive_s < waits.autoregressive_s - 0.003


def test_costs_show_themselves_in_milliseconds():
    costs = by_hand()
    page = costs._repr_html_()
    assert page.count('<th scope="row">') == len(costs.early_s)
    widths = {rows for _, rows in costs.verify_s}
    assert page.count("<td") == len(costs.early_s) * (1 + len(widths))
    draft = costs.early_s[1] + costs.heads_s.get(1, costs.head_s)
    assert f">{1000 * draft:.3g}</td>" in page
    assert f"{1000 * costs.autoregressive_s:.3g}" in page


def test_copied_drafts_cost_their_verification_by_the_whole_model(tiny):
    """A roofline that moves bytes: a pass of the whole model takes what its weights take, whatever its rows."""
    from probekit.drafting.imported import ImportedDrafter
    from probekit.drafting.keys import DrafterKey
    from probekit.drafting.text_drafters import PromptLookup

    costs = roofline_costs(tiny, bandwidth=1e9, flops=1e15)
    for rows in (1, 2, 9):
        assert costs.whole_pass_seconds(rows) == pytest.approx(costs.autoregressive_s)
    lookup = PromptLookup(2)
    assert costs.knows(lookup.key)
    assert costs.rounds_seconds_of(lookup, 3).tolist() == pytest.approx([costs.autoregressive_s] * 4)
    imported = ImportedDrafter("eagle", {}, step_s=0.5)
    seconds = costs.rounds_seconds_of(imported, 3) - costs.rounds_seconds_of(lookup, 3)
    assert seconds.tolist() == pytest.approx([0, 0.5, 1.0, 1.5])
    with_model = roofline_costs(tiny, drafter=tiny, bandwidth=1e9, flops=1e9)
    assert with_model.whole_pass_seconds(4) == with_model.draft_model.verify_s[4]
    products = roofline_costs(tiny, bandwidth=1e15, flops=1e9)
    assert products.whole_pass_seconds(4) == pytest.approx(with_model.draft_model.verify_s[4], rel=1e-6)
    with pytest.raises(InputError, match="drafts of up to 32 tokens, not 33"):
        costs.round_seconds(lookup.key, 33)
    assert not costs.knows(DrafterKey("a word of my own"))
