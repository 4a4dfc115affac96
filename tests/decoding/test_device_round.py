"""A round as the device's own work: nothing asked of it on the way, the same work each time, and right when replayed
from a recording, in which Python has no part any more."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import LlamaForCausalLM

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.device_round import DeviceEngine, DeviceState, Round, one_place
from probekit.decoding.engine import BUCKET, Engine, bucket
from probekit.decoding.sampling import Sampler, streams
from probekit.decoding.speculative import SelfSpeculative
from probekit.drafting.proposers import DraftHead
from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.hooks.edit import Edit
from probekit.hooks.stop_resume import Stop
from probekit.models.anatomy import anatomy
from probekit.models.synthetic import SHAPES, synthetic
from probekit.settings import Sampling

pytestmark = pytest.mark.second

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 30, 2, 2]]
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(0.8, top_k=20, top_p=0.9, seed=3)}


class Recording(TorchDispatchMode):
    """The calls of the device that were made inside, to be made again on the same buffers."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        made = {}

        def now(tensor):
            return made.get(id(tensor), tensor)

        for function, args, kwargs, result in self.calls:
            fresh = function(*tree_map_only(torch.Tensor, now, args), **tree_map_only(torch.Tensor, now, kwargs))
            made |= {id(old): new for old, new in zip(tree_leaves(result), tree_leaves(fresh), strict=True)}

    def work(self):
        """What was called, with every shape, stride and other argument."""

        def told(tensor):
            return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device

        return [
            (str(function), *map(str, tree_leaves(tree_map_only(torch.Tensor, told, (args, kwargs)))))
            for function, args, kwargs, _ in self.calls
        ]


def standing(parts, prompts, firsts, budget, draft_length, seed=0):
    """Rows after their first token."""
    ends = torch.tensor([[len(ids) - 1] for ids in prompts])
    return DeviceState(
        last=torch.tensor([[first] for first in firsts]),
        position=ends + 1,
        before=ends,
        final=ends + budget,
        stream=streams(seed, range(len(prompts)), ends.device),
        log=torch.zeros(budget + 1, len(prompts), draft_length + 2, dtype=torch.long),
        done=torch.zeros(1, dtype=torch.long),
    )


def begun(loaded, sampling, exit_layer, draft_length, budget=30, visible=64):
    """A round of PROMPTS, ready to be run, and its DeviceState."""
    engine = DeviceEngine(loaded.anatomy, len(PROMPTS), 64)
    longest = max(map(len, PROMPTS))
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in PROMPTS])
    states = engine.full(tokens, engine.places([0], longest))
    ends = [len(ids) - 1 for ids in PROMPTS]
    rule = Sampler(sampling)
    logits = engine.logits(states[torch.arange(len(PROMPTS)), ends])
    firsts = rule.choose(logits, streams(sampling.seed, range(len(PROMPTS))), torch.zeros(len(PROMPTS)).long())
    at = standing(loaded.anatomy, PROMPTS, firsts.tolist(), budget, draft_length, sampling.seed)
    head = None if exit_layer is None else DraftHead(loaded.anatomy)
    return Round(engine, at, rule, visible, exit_layer, head), at


def texts(at, firsts):
    """Tokens of each row as the log tells them: y[0], then of each round the accepted drafts and the token after."""
    found = [[first] for first in firsts]
    for entry in at.log[: at.done].tolist():
        for text, (run, token, *drafts) in zip(found, entry, strict=True):
            text += [*drafts[:run], token]
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize(("exit_layer", "draft_length"), [(None, 0), (2, 3), (4, 1)])
@torch.inference_mode()
def test_a_replayed_round_decodes_on(any_tiny, exit_layer, draft_length, sampling):
    """Recorded once, then replayed without a line of the decoder: the tokens and rounds are the methods'."""
    budget = 30
    run, at = begun(any_tiny, sampling, exit_layer, draft_length, budget)
    firsts = at.last[:, 0].tolist()
    with Recording() as recording:
        run()
    for _ in range(budget - 1):
        recording.replay()
    assert at.done.item() == budget
    assert at.position.tolist() == at.final.tolist()  # a row at its end stays there
    method = Autoregressive(any_tiny) if exit_layer is None else SelfSpeculative(any_tiny, exit_layer, draft_length)
    for row, (text, done) in enumerate(
        zip(texts(at, firsts), method.decode(PROMPTS, max_new_tokens=budget, sampling=sampling), strict=True)
    ):
        assert text[: len(done.tokens)] == done.tokens
        rounds = at.log[: done.rounds, row, 0].tolist()
        ended = done.ended == "eos"  # the log tells what verification found, also behind an end
        assert rounds[: -1 if ended else None] == done.accepted[: -1 if ended else None]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize(("exit_layer", "draft_length"), [(None, 0), (3, 4)])
@torch.inference_mode()
def test_every_round_is_the_same_work(tiny, exit_layer, draft_length, sampling):
    """The same calls with the same shapes, whatever was accepted and wherever the rows stand: nothing grows."""
    run, at = begun(tiny, sampling, exit_layer, draft_length)
    work, runs = [], set()
    for _ in range(8):
        with Recording() as recording:
            run()
        work.append(recording.work())
        runs.add(tuple(at.log[at.done - 1, :, 0].flatten().tolist()))
    assert all(each == work[0] for each in work)
    assert exit_layer is None or len(runs) > 1


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@torch.inference_mode()
def test_a_round_compiles_whole(sampling):
    """As one graph: no part of it needs Python. The same tokens and rounds come out."""
    loaded = synthetic("tiny", seed=1)  # a fresh one: transformers may have left hooks on another, which do not compile
    (run, at), (plain, expected) = (begun(loaded, sampling, 2, 1) for _ in range(2))
    compiled = torch.compile(lambda: run(), fullgraph=True, backend="aot_eager")
    for _ in range(5):
        compiled()
        plain()
    assert at.done.item() == 5
    assert torch.equal(at.log, expected.log) and torch.equal(at.position, expected.position)


class DeviceOnly(TorchDispatchMode):
    """Refuse work on any tensor that has numbers."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        assert devices <= {"meta"}, f"{function} works on {devices}"
        return result


class NothingFromTheHost(TorchFunctionMode):
    """Refuse numbers of the host that become a tensor of the device: a copy that would be recorded with its numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.from_numpy), f"{function} copies from the host"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("vocabulary", [None, [3, 1, 4, 59, 26]])
@pytest.mark.parametrize("shape", ["tiny", "tiny-tied"])
@torch.inference_mode()
def test_the_host_is_not_asked(shape, vocabulary, sampling):
    """On the meta device there are no numbers: whatever depends on one raises. Nothing comes from the host either."""
    with torch.device("meta"):
        model = LlamaForCausalLM(SHAPES[shape].config()).eval()
    parts = anatomy(model)
    with torch.device("meta"):
        engine = DeviceEngine(parts, 2, 64)
        at = standing(parts, PROMPTS, [1, 2], 20, 4)
        head = DraftHead(parts)
        head.ids = None if vocabulary is None else torch.tensor(vocabulary)
        if vocabulary is not None:
            head._head = lambda normed: parts.head(normed)[..., : len(vocabulary)]
        step = Round(engine, standing(parts, PROMPTS, [1, 2], 20, 0), Sampler(sampling), 64)
        run = Round(engine, at, Sampler(sampling), 64, 2, head)
    for each in (step, run):
        with DeviceOnly(), NothingFromTheHost():
            each()
    for asked in (at.done.item, at.last.tolist, lambda: at.last.nonzero(), lambda: bool(at.done == 1), at.last.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            asked()
    with pytest.raises(AssertionError, match="copies from the host"), NothingFromTheHost():
        engine.places([1, 2], 1)  # as the engine does it whose host knows where the rows stand


@torch.inference_mode()
def test_places_are_the_engines(any_tiny):
    """Mask, rotation and slots are those that the host would have computed, with the slots behind hidden."""
    mine, theirs = DeviceEngine(any_tiny.anatomy, 2, 40), Engine(any_tiny.anatomy, 2, 64)
    positions = torch.tensor([[3], [7]]) + torch.arange(4)
    found, expected = mine.places_at(positions, 64), theirs.places([3, 7], 4)
    assert mine.cache.length == 64 and found.visible == 64 and expected.visible == 11
    assert torch.equal(found.slots, expected.slots)
    mask = found.inputs["attention_mask"]
    assert torch.equal(mask[..., :11], expected.inputs["attention_mask"])
    assert (mask[..., 11:] == torch.finfo(mask.dtype).min).all()
    for token in range(4):
        one, alone = one_place(found, token), theirs.places([3 + token, 7 + token], 1)
        assert torch.equal(one.slots, alone.slots)
        assert torch.equal(one.inputs["position_ids"], alone.inputs["position_ids"])
        for mine_too, theirs_too in zip(
            one.inputs["position_embeddings"], alone.inputs["position_embeddings"], strict=True
        ):
            assert torch.equal(mine_too, theirs_too)
        assert torch.equal(one.inputs["attention_mask"][..., : alone.visible], alone.inputs["attention_mask"])


@pytest.mark.parametrize(("slots", "expected"), [(1, 64), (63, 64), (64, 64), (65, 128), (1000, 1024)])
def test_buckets(slots, expected):
    assert BUCKET == 64
    assert bucket(slots) == expected


@torch.inference_mode()
def test_a_capture_into_a_buffer_replays(unchanged):
    """Its copy is a part of the recording: replayed, it brings the residuals of the new tokens."""
    loaded = synthetic("tiny", seed=1, dial=0.3, exit_layer=2)
    unchanged(loaded.model)
    buffer = torch.zeros(2, 2, 7, 36)
    with Capture(loaded.model, [1, 5], into=buffer):
        run, at = begun(loaded, Sampling(), 2, 3)
        firsts = at.last[:, 0].tolist()
        with Recording() as recording:
            run()
    whole = 0
    for _ in range(5):
        stood = at.position[:, 0].tolist()
        recording.replay()
        for row, text in enumerate(texts(at, firsts)):
            with Capture(loaded.model, [1, 5]) as capture:  # transformers' own forward on the text
                loaded.model(torch.tensor([[*PROMPTS[row], *text]]))
            accepted = at.log[at.done - 1, row, 0].item()
            late = capture[5][0, stood[row] : stood[row] + accepted + 1]  # the last late pass: K + 1 tokens
            torch.testing.assert_close(buffer[1, row, : accepted + 1], late)
            if accepted == 3:  # the last early pass: that of the last draft
                whole += 1
                torch.testing.assert_close(buffer[0, row, 0], capture[1][0, stood[row] + 3])
    assert whole > 0


def test_other_hooks_are_refused(tiny, unchanged):
    unchanged(tiny.model)
    layer = tiny.anatomy.layers[1]
    hooks = [
        Capture(tiny.model, [2]),
        Capture(tiny.model, [0], reduce=lambda site, residual: None),
        Edit(tiny.model, skip=[1]),
        Edit(tiny.model, replace={1: lambda before, after: after}),
        Stop(tiny.model, 3),
    ]
    for hook in hooks:
        with hook, pytest.raises(InputError, match=r"hook, or a replaced forward, on .*layers.*never again when it is"):
            DeviceEngine(tiny.anatomy, 1, 64)
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(InputError, match=r"layers.1.mlp"):
            DeviceEngine(tiny.anatomy, 1, 64)
    finally:
        handle.remove()
    DeviceEngine(tiny.anatomy, 1, 64)
