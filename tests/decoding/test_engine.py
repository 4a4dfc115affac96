import pytest
import torch

from probekit.decoding import decoder as engines
from probekit.decoding.autoregressive import Autoregressive, EarlyExit
from probekit.decoding.engine import Engine
from probekit.decoding.self_check import check_engine
from probekit.decoding.speculative import SelfSpeculative
from probekit.errors import InputError, ResourceError
from probekit.hooks.capture import Capture
from probekit.hooks.stop_resume import Resume, Stop
from probekit.models.memory import free_bytes
from probekit.models.synthetic import synthetic
from probekit.settings import Sampling

PROMPT = [5, 6, 7, 8, 9]


def states(loaded, ids):
    """The model's own residuals, before each layer and the last normed: (layers + 1, tokens, width)."""
    return torch.cat(loaded.model(torch.tensor([ids]), output_hidden_states=True).hidden_states)


@torch.inference_mode()
def test_a_split_pass_is_the_models_own_forward(any_tiny):
    expected = states(any_tiny, PROMPT)
    for exit_layer in any_tiny.anatomy.exits:
        engine = Engine(any_tiny.anatomy, rows=1, length=8)
        first = engine.places([0], 3)
        residual = engine.early(torch.tensor([PROMPT[:3]]), first, exit_layer)
        torch.testing.assert_close(residual[0], expected[exit_layer, :3])
        engine.late(residual, first, exit_layer)
        # two tokens drafted one by one, then verified together: the caches above lag behind
        drafted = [engine.early(torch.tensor([[PROMPT[at]]]), engine.places([at], 1), exit_layer) for at in (3, 4)]
        torch.testing.assert_close(torch.cat(drafted, 1)[0], expected[exit_layer, 3:])
        normed = engine.late(torch.cat(drafted, 1), engine.places([3], 2), exit_layer)
        torch.testing.assert_close(normed[0], expected[-1, 3:])


@torch.inference_mode()
def test_rows_at_different_positions_see_only_their_own_past(any_tiny):
    engine = Engine(any_tiny.anatomy, rows=2, length=8)
    other = [11, 12, 13, 14, 15]
    engine.full(torch.tensor([PROMPT[:3], [*other[:1], 0, 0]]), engine.places([0, 0], 3))
    normed = engine.full(torch.tensor([PROMPT[3:], other[1:3]]), engine.places([3, 1], 2))
    torch.testing.assert_close(normed[0], states(any_tiny, PROMPT)[-1, 3:])
    torch.testing.assert_close(normed[1], states(any_tiny, other)[-1, 1:3])


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}])
@torch.inference_mode()
def test_attention_without_sdpa_and_scaled_positions(rope):
    loaded = synthetic("tiny", seed=1, rope=rope)
    loaded.model.config._attn_implementation = "eager"
    engine = Engine(loaded.anatomy, rows=1, length=8)
    engine.full(torch.tensor([PROMPT[:3]]), engine.places([0], 3))
    normed = engine.full(torch.tensor([PROMPT[3:]]), engine.places([3], 2))
    torch.testing.assert_close(normed[0], states(loaded, PROMPT)[-1, 3:])


def test_drafting_goes_through_stop_and_verification_through_resume(tiny, monkeypatch):
    check_engine(tiny)  # once for each model, not on every call
    passes = []
    for primitive in (Stop, Resume):

        def direct(self, residual, each, original=primitive.direct, name=primitive.__name__):
            passes.append((name, self.site, residual.shape[1]))
            return original(self, residual, each)

        monkeypatch.setattr(primitive, "direct", direct)
    SelfSpeculative(tiny, 2, 2).decode([PROMPT], max_new_tokens=4)
    assert passes[:5] == [("Resume", 0, 5), ("Stop", 2, 1), ("Stop", 2, 1), ("Stop", 2, 1), ("Resume", 2, 3)]


def test_a_capture_gets_its_residuals_while_the_model_decodes(any_tiny, unchanged):
    unchanged(any_tiny.model)
    with Capture(any_tiny.model) as capture:
        decoded = Autoregressive(any_tiny).decode([PROMPT], max_new_tokens=6)[0]
    expected = states(any_tiny, PROMPT + decoded.tokens[:-1])
    assert len(capture.passes) == 6
    for site in any_tiny.anatomy.sites[:-1]:  # transformers' last one is normed
        seen = torch.cat([step[site] for step in capture.passes], 1)[0]
        torch.testing.assert_close(seen, expected[site])


def test_a_capture_reads_drafts_and_verification_of_a_speculative_round(tiny):
    seen = []
    with Capture(tiny.model, [1, 4], reduce=lambda site, residual: seen.append((site, residual.shape[1]))):
        decoded = SelfSpeculative(tiny, 2, 3).decode([PROMPT], max_new_tokens=5)[0]
    assert seen[:2] == [(1, 5), (4, 5)]
    assert seen[2:7] == [(1, 1)] * 4 + [(4, 4)]
    assert decoded.drafted[0] == 3


@pytest.mark.parametrize("part", ["model", "decoder", "rotary"])
def test_a_hook_that_would_never_fire_is_refused(part):
    loaded = synthetic("tiny", seed=1)
    handle = getattr(loaded.anatomy, part).register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="calls the layers one by one, so it would never fire"):
        Autoregressive(loaded).decode([PROMPT], max_new_tokens=2)
    handle.remove()
    assert Autoregressive(loaded).decode([PROMPT], max_new_tokens=2)


@pytest.mark.parametrize("method", [Autoregressive, lambda model: SelfSpeculative(model, 2, 3)])
def test_a_capture_that_opens_while_the_model_decodes_is_refused(unchanged, method):
    loaded = synthetic("tiny", seed=1)  # a fresh one: where hooks stood before, new ones fire as well
    unchanged(loaded.model)
    capture = Capture(loaded.model, [2])
    pieces = []

    def open_late(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            capture.__enter__()

    with pytest.raises(InputError, match="came to a layer while the model decodes"):
        method(loaded).decode([PROMPT], max_new_tokens=20, on_accept=open_late)
    capture.__exit__(None, None, None)
    assert len(pieces) in (3, 4)
    assert method(loaded).decode([PROMPT], max_new_tokens=20)


def test_other_attention_is_refused():
    loaded = synthetic("tiny", seed=1)
    loaded.model.config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match="attention 'flex_attention' cannot be used"):
        Engine(loaded.anatomy, 1, 8)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_change_with_the_length_are_decoded_as_far_as_they_do_not(kind):
    """LongRoPE turns to other frequencies beyond the original context; a draft beyond the budget must not do that."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 5, "long_factor": [3.0] * 5, "original_max_position_embeddings": 24}
    loaded = synthetic("tiny", seed=1, rope=rope, context=24 if kind == "dynamic" else 48)
    assert loaded.anatomy.context == 24
    ids = [5, 9, 17, 3]
    expected = loaded.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, 4:].tolist()
    assert Autoregressive(loaded).decode([ids], max_new_tokens=20)[0].tokens == expected
    assert SelfSpeculative(loaded, 3, 6).decode([ids], max_new_tokens=20)[0].tokens == expected
    with pytest.raises(InputError, match="exceeds the context of 24 tokens"):
        Autoregressive(loaded).decode([ids], max_new_tokens=21)


@pytest.mark.parametrize(
    ("prompts", "setting", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ([[1] * 250], {"max_new_tokens": 7}, "prompt 0 has 250 tokens; with 7 new ones it exceeds the context of 256"),
        ([[97]], {}, r"token ids outside 0\.\.96 of tiny"),
        ([[1]], {"stop": ""}, "stop strings must be texts that are not empty"),
        ([[1], [2]], {"indices": [3, 3]}, "indices must be 2 distinct numbers"),
        ([[1], [2]], {"indices": [3]}, "indices must be 2 distinct numbers"),
    ],
)
def test_bad_input_is_refused_before_any_work(tiny, monkeypatch, prompts, setting, message):
    monkeypatch.setattr(engines, "Engine", None)
    with pytest.raises(InputError, match=message):
        Autoregressive(tiny).decode(prompts, **{"max_new_tokens": 5, **setting})


def test_the_context_can_be_filled_to_the_last_token(tiny):
    assert len(Autoregressive(tiny).decode([[1] * 250], max_new_tokens=6)[0].tokens) <= 6
    assert SelfSpeculative(tiny, 2, 8).decode([[1] * 250, [2]], max_new_tokens=6)


def test_a_batch_that_does_not_fit_says_how_much_it_needs(tiny, monkeypatch):
    method = SelfSpeculative(tiny, 2, 3)
    plan = method._plan([[1] * 10], 20, Sampling(), (), None, None)
    alone = method.needed_bytes(plan, 1)
    monkeypatch.setattr(engines, "free_bytes", lambda device: 3 * alone + 1)
    assert len(method.decode([[1] * 10] * 3, max_new_tokens=20)) == 3
    monkeypatch.setattr(engines, "Engine", None)
    message = r"decoding 4 prompts of up to 10 tokens with 20 new ones needs 0\.00 GiB .* At most 3 fit at once"
    with pytest.raises(ResourceError, match=message):
        method.decode([[1] * 10] * 4, max_new_tokens=20)
    monkeypatch.setattr(engines, "free_bytes", lambda device: alone - 1)
    with pytest.raises(ResourceError, match="Not even one prompt fits"):
        method.decode([[1] * 10], max_new_tokens=20)


def test_free_memory_is_known_here():
    free = free_bytes(torch.device("cpu"))
    assert free is None or free > 2**20


class Interrupt:
    """Raises KeyboardInterrupt when it is called for the n-th time."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, *_):
        self.calls -= 1
        if self.calls == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("calls", [1, 2, 7, 20])
@pytest.mark.parametrize("method", [Autoregressive, lambda m: SelfSpeculative(m, 3, 2), lambda m: EarlyExit(m, 2)])
def test_an_interrupt_at_any_point_leaves_the_model_as_it_was(tiny, unchanged, method, calls):
    unchanged(tiny.model)
    expected = method(tiny).decode([PROMPT, [1]], max_new_tokens=12)
    with pytest.raises(KeyboardInterrupt):
        method(tiny).decode([PROMPT, [1]], max_new_tokens=12, on_accept=Interrupt(calls))
    handle = tiny.anatomy.layers[1].register_forward_hook(Interrupt(calls))
    with pytest.raises(KeyboardInterrupt):
        method(tiny).decode([PROMPT] * 3, max_new_tokens=30)
    handle.remove()
    assert method(tiny).decode([PROMPT, [1]], max_new_tokens=12) == expected
    assert not torch.is_inference_mode_enabled()
