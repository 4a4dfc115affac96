"""Rounds recorded into graphs, on a pretended CUDA device whose graphs are tapes: what is replayed is the decoder."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from gpu.pretend import LOG, Event, Graph, move
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

import probekit
from probekit.costs.measure import measure_costs
from probekit.costs.recorded import REPLAYS
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.device_decoding import DeviceAutoregressive, DeviceSelfSpeculative, on_engine
from probekit.decoding.device_round import Round
from probekit.decoding.engine import bucket
from probekit.decoding.recordings import RING, Graphs, recordings
from probekit.decoding.sampling import Sampler
from probekit.decoding.self_check import check_engine
from probekit.decoding.speculative import SelfSpeculative
from probekit.drafting.proposers import DraftHead
from probekit.hooks.capture import Capture
from probekit.models.anatomy import anatomy
from probekit.models.synthetic import Shape, synthetic
from probekit.prediction.rounds import FIRST_START, rounds_of
from probekit.settings import Sampling

SHAPE = Shape(4, 32, 48, 4, 2, 64, 256, 8)
PROMPTS = [[1, 2, 3, 4, 5], [7, 8], [9] * 20]
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3)}
SECOND = pytest.mark.second
GREEDY_AND_SAMPLED = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
GREEDY_FIRST = pytest.mark.parametrize(
    "sampling", [SAMPLINGS["greedy"], pytest.param(SAMPLINGS["sampled"], marks=SECOND)], ids=SAMPLINGS
)


def model(device="cpu"):
    loaded = synthetic(SHAPE, device=device, exit_layer=1, dial=0.3)
    if device != "cpu":
        check_engine(loaded)
    return loaded


def on_host(method, prompts, **setting):
    """What the host decoder gives on the processor."""
    with torch.utils._python_dispatch._disable_current_modes():
        return method(model()).decode(prompts, **setting)


@GREEDY_FIRST
@pytest.mark.parametrize(
    ("draft_length", "rows"), [(4, 3), pytest.param(4, 1, marks=SECOND), pytest.param(0, 1, marks=SECOND),
                               pytest.param(0, 3, marks=pytest.mark.long)],
)  # fmt: skip
def test_replays_are_the_host_decoders_rounds(cuda, draft_length, rows, sampling):
    """Over two buckets of slots: the first round of each for real, all others from its recording."""
    setting = {"max_new_tokens": 80, "sampling": sampling}
    prompts, host = PROMPTS[:rows], model(cuda)
    host_method = Autoregressive(host) if draft_length == 0 else SelfSpeculative(host, 1, draft_length)
    expected = host_method.decode(prompts, **setting)
    method = on_engine(host_method, "cuda")
    for _ in range(2):  # from the second call on everything is there
        made, replays = Graph.made, Graph.replays
        assert method.decode(prompts, **setting) == expected
    assert made == Graph.made == 2
    assert Graph.replays - replays >= max(text.rounds for text in expected)


@GREEDY_FIRST
def test_a_recorded_round_asks_nothing_of_the_host_and_tells_it_without_a_wait(cuda, sampling):
    method = DeviceSelfSpeculative(model(cuda), 1, 3)
    method.decode(PROMPTS[:1], max_new_tokens=50, sampling=sampling)  # records
    few = moved(method, 10, sampling)
    many = moved(method, 50, sampling)
    assert many[1] > few[1] + 5  # rounds
    assert many[0] == few[0]  # copies and waits: of the prefill only
    assert many[2] == 0  # nothing was launched by itself


def moved(method, tokens, sampling):
    LOG.clear()
    (done,) = method.decode(PROMPTS[:1], max_new_tokens=tokens, sampling=sampling)
    rounds = sum(number for (kind, _, at), number in LOG.calls.items() if kind == "kernel" and "device_round" in at)
    filled = sum(number for (_, name, at), number in LOG.calls.items() if name == "fill" or "device_round.py" in at)
    return LOG.count("wait", "to host", "to device"), done.rounds, max(0, rounds - filled)


def test_one_round_is_under_way_while_the_one_before_is_read(cuda):
    """Round r + 1 is sent when round r - 1 was read, and not before; nothing is sent that the budget cannot hold."""
    method = DeviceAutoregressive(model(cuda))
    Event.order.clear()
    (done,) = method.decode(PROMPTS[:1], max_new_tokens=12)
    sent = [event for what, event in Event.order if what == "sent"]
    waited = [event for what, event in Event.order if what == "waited"]
    assert len(sent) == len(waited) == done.rounds == 11
    assert [what for what, _ in Event.order] == ["sent", *["sent", "waited"] * 10, "waited"]
    assert sent == waited and len(set(sent)) == RING


@pytest.mark.second
@pytest.mark.parametrize(
    ("rows", "draft_length", "sampling"),
    [
        (1, 2, SAMPLINGS["greedy"]),
        (3, 3, SAMPLINGS["greedy"]),
        (1, 2, SAMPLINGS["sampled"]),
        (1, 0, SAMPLINGS["greedy"]),
    ],
)
def test_replays_of_fused_kernels_are_the_host_decoders_rounds(fused, rows, draft_length, sampling):
    """The kernels are in the recording, and read where the rows stand from the device."""
    loaded = synthetic(replace(SHAPE, layers=2), device=fused, exit_layer=1, dial=0.3)
    host = SelfSpeculative(loaded, 1, draft_length) if draft_length else Autoregressive(loaded)
    setting = {"max_new_tokens": 6, "sampling": sampling}
    expected = host.decode(PROMPTS[:rows], **setting)
    method = on_engine(host, "cuda")
    assert method.decode(PROMPTS[:rows], **setting) == expected
    assert loaded.kept["recordings"].engine.fused is not None
    replays = Graph.replays
    LOG.clear()
    assert method.decode(PROMPTS[:rows], **setting) == expected
    assert Graph.replays - replays >= max(text.rounds for text in expected)


def test_nothing_moves_between_calls_and_the_first_batchs_numbers_do_not_stay(cuda):
    """The same addresses, another text: what a batch left in the cache is gone."""
    loaded = model(cuda)
    method = DeviceSelfSpeculative(loaded, 1, 4)
    method.decode([[3] * 30], max_new_tokens=30)
    held = loaded.kept["recordings"]
    places = held.engine.cache.keys.data_ptr(), held.states[1, 4, False].last.data_ptr()
    held.engine.cache.keys.fill_(float("nan"))
    held.engine.cache.values.fill_(float("nan"))
    assert method.decode(PROMPTS[:1], max_new_tokens=20) == SelfSpeculative(loaded, 1, 4).decode(
        PROMPTS[:1], max_new_tokens=20
    )
    assert loaded.kept["recordings"] is held
    assert places == (held.engine.cache.keys.data_ptr(), held.states[1, 4, False].last.data_ptr())


def test_seeds_share_a_recording_and_rules_do_not(cuda):
    loaded = model(cuda)
    method = DeviceSelfSpeculative(loaded, 1, 2)
    texts = []
    for seed in (1, 2):
        sampling = Sampling(temperature=0.9, seed=seed)
        texts.append(method.decode(PROMPTS[:1], max_new_tokens=20, sampling=sampling)[0])
        assert texts[-1] == SelfSpeculative(loaded, 1, 2).decode(PROMPTS[:1], max_new_tokens=20, sampling=sampling)[0]
    assert texts[0].tokens != texts[1].tokens and Graph.made == 1
    method.decode(PROMPTS[:1], max_new_tokens=20, sampling=Sampling(temperature=0.5, seed=1))
    assert Graph.made == 2


@pytest.mark.second
def test_longer_texts_other_rows_weights_and_hooks_are_recorded_anew(cuda):
    loaded = model(cuda)
    method = DeviceSelfSpeculative(loaded, 1, 2)
    setting = {"max_new_tokens": 20}
    (first,) = method.decode(PROMPTS[:1], **setting)
    held = weakref.ref(loaded.kept["recordings"])
    buffer = torch.zeros(1, 1, 5, SHAPE.width, device=cuda)
    with Capture(loaded.model, [3], into=buffer):
        assert method.decode(PROMPTS[:1], **setting) == [first]
    assert bool((buffer != 0).any())
    assert "recordings" not in loaded.kept  # what was recorded under a hook serves once
    gc.collect()
    assert held() is None  # and nothing else keeps the old buffers alive
    method.decode(PROMPTS[:1], **setting)
    made = Graph.made
    weight = loaded.model.model.layers[2].mlp.up_proj.weight
    weight.mul_(0.5)  # in place: a recording sees it
    (changed,) = SelfSpeculative(loaded, 1, 2).decode(PROMPTS[:1], **setting)
    assert method.decode(PROMPTS[:1], **setting) == [changed] and Graph.made == made
    loaded.model.model.layers[2].mlp.up_proj.weight = torch.nn.Parameter(weight * 2, requires_grad=False)
    assert method.decode(PROMPTS[:1], **setting) == [first] and Graph.made == made + 1


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(each, marks=SECOND) for each in ("mistral", "gemma3"))])
@pytest.mark.parametrize("first_round", FIRST_START)
def test_both_first_round_conventions(cuda, kind, first_round):
    """Replays that begin at the prompt's last token, or at y[0]: the rounds that each convention predicts."""
    budget, draft_length, prompt = 40, 3, PROMPTS[0]
    with torch.utils._python_dispatch._disable_current_modes():
        loaded = model() if kind == "llama" else windowed(kind)
        run = probekit.trace(loaded, [prompt], max_new_tokens=budget)
        expected = rounds_of(run.agreement(0)[1], draft_length, budget, first_round)
        loaded = replace(loaded, anatomy=anatomy(move(loaded.model)), signature=None)
    first = FIRST_START[first_round]
    text = [prompt[-1], *run.outputs(0).tolist()]
    held = recordings(loaded, 1, len(prompt) + budget + draft_length)
    state = held.state(1, draft_length, False)
    tokens = torch.tensor([prompt], device=cuda)
    held.engine.full(tokens, held.engine.places([0], len(prompt)))
    for buffer, number in (
        (state.last, text[first]), (state.position, len(prompt) - 1 + first), (state.before, len(prompt) - 1),
        (state.final, len(prompt) - 1 + budget),
    ):  # fmt: skip
        buffer.fill_(number)
    found, visible = [], bucket(len(prompt) + budget + draft_length)
    for number in range(len(expected.start)):
        make = partial(Round, held.engine, state, Sampler(Sampling()), visible, 1, DraftHead(loaded.anatomy))
        held.send("round", make, number)
        held.wait(number)
        found.append(state.entry(number)[0].tolist())
    assert Graph.made == 1 and Graph.replays == len(expected.start) - 1 > 5
    assert [accepted for accepted, *_ in found] == expected.accepted.tolist()
    assert sum(expected.emitted) == budget - first
    assert [token for run, token, *drafts in found for token in [*drafts[:run], token]] == text[1 + first :]


def windowed(kind):
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 9, "max_position_embeddings": 256,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "mistral":
        made = MistralForCausalLM(MistralConfig(**sizes))
    else:
        layers = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
        made = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=layers, query_pre_attn_scalar=8))
    return probekit.wrap(made.eval().requires_grad_(False), None, name=kind)


@pytest.mark.parametrize("kind", ["mistral", pytest.param("gemma3", marks=SECOND)])
@GREEDY_AND_SAMPLED
def test_windows(cuda, kind, sampling):
    """Past the window, where a mask that knows none would be silently wrong."""
    with torch.utils._python_dispatch._disable_current_modes():
        loaded = windowed(kind)
        expected = SelfSpeculative(loaded, 1, 3).decode(PROMPTS, max_new_tokens=30, sampling=sampling)
        there = replace(loaded, anatomy=anatomy(move(loaded.model)), signature=None)
    found = DeviceSelfSpeculative(there, 1, 3).decode(PROMPTS, max_new_tokens=30, sampling=sampling)
    assert [(text.tokens, text.accepted) for text in found] == [(text.tokens, text.accepted) for text in expected]
    assert Graph.replays > 5


def test_a_capture_runs_nothing_and_forbids_waits(cuda):
    """The tape itself: it must be as strict as a capture, or these tests prove nothing."""
    numbers, graphs, ran = torch.zeros(3, device=cuda), Graphs(cuda), []

    def work():
        ran.append(None)
        numbers.add_(1)

    for _ in range(4):
        graphs.run("more", work)
    assert numbers.tolist() == [4.0] * 3 and len(ran) == 2  # for real, and while it was captured
    for asks in (
        lambda: numbers.sum().item(),
        lambda: numbers.tolist(),
        lambda: numbers.cpu(),
        lambda: numbers.nonzero(),
    ):
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            asks()


@pytest.mark.second
def test_costs_are_of_whole_replayed_rounds(cuda):
    """No wait inside a round, and one for each measurement; the parts of a round add up to it."""
    loaded = model(cuda)
    measure_costs(loaded, 40, exit_layers=[1], draft_lengths=[2, 4], repeats=1, engine="cuda")
    LOG.clear()
    Event.order.clear()
    replays = Graph.replays
    costs = measure_costs(loaded, 40, exit_layers=[1], draft_lengths=[2, 4], repeats=1, engine="cuda")
    replayed = Graph.replays - replays
    assert LOG.count("wait", "to host") == 0
    assert replayed == REPLAYS * sum(what == "waited" for what, _ in Event.order) > 0
    assert costs.engine == "cuda" and costs.longest_draft == 4
    whole = costs.quantiles["verify 1 5"][1] + 5 * costs.early_s[1] + 4 * costs.heads_s[1]
    assert costs.round_seconds(1, 4) == pytest.approx(whole) and costs.overhead_s == 0
    assert (costs.rounds_seconds(1, 4) == costs.round_seconds(1, 4)).all()  # drafted whole at the end of a budget too


@pytest.mark.second
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, on infinities as planned
def test_validate_and_decode_by_the_recorded_engine(cuda, kernel):
    loaded = replace(model(cuda), tokenizer=None)
    run = probekit.trace(loaded, PROMPTS[:2], max_new_tokens=12)
    costs = measure_costs(loaded, 10, exit_layers=[1], draft_lengths=[2], repeats=1, engine="cuda")
    made = probekit.validate(loaded, run, [(1, 2)], costs=costs, engine="cuda")
    assert made.holds and Graph.replays > 10
    for cell in made.cells:
        assert cell.rounds_equal and cell.tokens_equal and cell.speedup_predicted > 0
    how = {"method": "self-speculative", "exit_layer": 1, "draft_length": 2, "max_new_tokens": 20}
    assert probekit.decode(loaded, PROMPTS[0], engine="cuda", **how) == probekit.decode(loaded, PROMPTS[0], **how)
