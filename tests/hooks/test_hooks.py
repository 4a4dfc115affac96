"""Capture, Stop, Resume, Edit: right numbers, and a model that comes back exactly as it was."""

from __future__ import annotations

import copy
import weakref
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import DynamicCache

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.hooks.edit import Edit
from probekit.hooks.fast_forward import fast_forward
from probekit.hooks.sites import open_hooks
from probekit.hooks.stop_resume import Resume, Stop
from probekit.models.synthetic import synthetic


@pytest.fixture
def loaded(any_tiny, unchanged):
    unchanged(any_tiny.model)
    return any_tiny


@pytest.fixture(autouse=True)
def _no_gradients(request):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def tokens(loaded, batch: int = 2, positions: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, loaded.anatomy.vocabulary - 1, (batch, positions), generator=generator)


def causal_mask(rows: range, keys: int) -> torch.Tensor:
    """Additive mask, (1, 1, rows, keys), float32: the row of position s sees keys 0..s."""
    seen = torch.arange(keys)[None, :] <= torch.tensor(list(rows))[:, None]
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


# ------------------------------------------------------------------------------------------------ Capture


def test_capture_equals_output_hidden_states(loaded):
    ids = tokens(loaded)
    truth = loaded.model(ids, output_hidden_states=True).hidden_states
    with Capture(loaded.model) as capture:
        logits = loaded.model(ids).logits
    depth = loaded.depth
    assert capture.sites == tuple(range(depth + 1))
    for site in range(depth):
        assert torch.equal(capture[site], truth[site])
    # transformers' last entry is normed already; ours is the residual itself
    assert torch.equal(loaded.anatomy.norm(capture[depth]), truth[depth])
    assert torch.equal(loaded.anatomy.head(loaded.anatomy.norm(capture[depth])), logits)


def test_capture_of_some_sites_streams_in_order(loaded):
    ids, seen = tokens(loaded), []
    with Capture(loaded.anatomy, [3, 0], reduce=lambda site, residual: seen.append((site, residual))) as capture:
        loaded.model(ids)
    assert [site for site, _ in seen] == [0, 3]
    assert capture.passes == []
    with Capture(loaded.anatomy, [0, 3]) as kept:
        loaded.model(ids)
    assert all(torch.equal(residual, kept[site]) for site, residual in seen)


def test_streaming_keeps_nothing_alive(loaded):
    alive = []
    with Capture(loaded.model, [2], reduce=lambda site, residual: alive.append(weakref.ref(residual))):
        loaded.model(tokens(loaded))
    assert alive[0]() is None


def test_capture_into_a_buffer(loaded):
    ids = tokens(loaded, batch=2, positions=5)
    sites, width = [1, 4], loaded.anatomy.width
    buffer = torch.full((2, 3, 9, width), 7.0)
    with Capture(loaded.model, sites, into=buffer):
        loaded.model(ids)
    with Capture(loaded.model, sites) as truth:
        loaded.model(ids)
    for index, site in enumerate(sites):
        assert torch.equal(buffer[index, :2, :5], truth[site])
    assert (buffer[:, 2:] == 7).all()
    assert (buffer[:, :, 5:] == 7).all()
    with Capture(loaded.model, sites, into=buffer), pytest.raises(InputError, match=r"does not fit the buffer"):
        loaded.model(tokens(loaded, batch=2, positions=10))


def test_generate_under_capture_has_the_shapes_of_the_tutorial(loaded):
    """Steps x (layers + 1) x (batch, tokens, width); the first step holds the prompt."""
    ids, steps = tokens(loaded, batch=1, positions=6), 5
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    truth = loaded.model.generate(ids, output_hidden_states=True, return_dict_in_generate=True, **options)
    with Capture(loaded.model) as capture:
        out = loaded.model.generate(ids, **options)
    assert torch.equal(out, truth.sequences)
    assert len(capture.passes) == steps
    for step, states in enumerate(capture.passes):
        assert sorted(states) == list(range(loaded.depth + 1))
        assert {residual.shape for residual in states.values()} == {(1, 6 if step == 0 else 1, loaded.anatomy.width)}
        for site in range(loaded.depth):
            assert torch.equal(states[site], truth.hidden_states[step][site])


def test_capture_before_it_is_reached(loaded):
    with Capture(loaded.model, [1]) as capture:
        with pytest.raises(InputError, match=r"site 1 has not been reached"):
            _ = capture[1]
        with pytest.raises(InputError, match=r"site 2 is not captured.*\[1\]"):
            _ = capture[2]


def test_wrong_sites_name_those_that_exist(loaded):
    depth = loaded.depth
    for site in (-1, depth + 1, 99, True, 1.0, "1"):
        with pytest.raises(InputError, match=rf"does not exist: this model has sites 0\.\.{depth}"):
            Capture(loaded.model, [0, site])
        with pytest.raises(InputError, match=rf"sites 0\.\.{depth}"):
            Stop(loaded.model, site)
        with pytest.raises(InputError, match=rf"sites 0\.\.{depth}"):
            Resume(loaded.model, site)
    with pytest.raises(InputError, match=r"distinct"):
        Capture(loaded.model, [1, 1])
    with pytest.raises(InputError, match=r"distinct and at least one"):
        Capture(loaded.model, [])
    with pytest.raises(InputError, match=r"not both"):
        Capture(loaded.model, [1], reduce=print, into=torch.zeros(1, 1, 1, 1))
    with pytest.raises(InputError, match=r"expected \(1, batch, positions, width\)"):
        Capture(loaded.model, [1], into=torch.zeros(2, 1, 1, 1))
    with pytest.raises(InputError, match=rf"layers 0\.\.{depth - 1}"):
        Edit(loaded.model, skip=[depth])
    with pytest.raises(InputError, match=rf"layers 0\.\.{depth - 1}"):
        Edit(loaded.model, replace={-1: lambda before, after: after})


# ------------------------------------------------------------------------------------------------ Stop, Resume


def test_stop_ends_the_pass(loaded):
    ids = tokens(loaded)
    with Capture(loaded.model) as capture:
        loaded.model(ids)
    for site in loaded.anatomy.sites:
        ran = []
        with Stop(loaded.model, site) as stop:
            with Capture(loaded.model, reduce=lambda at, _, ran=ran: ran.append(at)):
                assert torch.equal(stop(input_ids=ids), capture[site])
        assert ran == list(range(site + 1)), "the layers behind the stop never run, the site itself is read"


def test_stop_and_resume_are_the_whole_pass(loaded):
    ids = tokens(loaded)
    truth = loaded.anatomy.decoder(ids).last_hidden_state
    for site in loaded.anatomy.sites:
        with Stop(loaded.model, site) as stop:
            residual = stop(input_ids=ids, use_cache=False)
        with Resume(loaded.model, site) as resume:
            assert torch.equal(resume(residual, use_cache=False), truth)


def test_stop_and_resume_with_padding(loaded):
    ids = tokens(loaded, batch=2, positions=6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "use_cache": False}
    truth = loaded.anatomy.decoder(input_ids=ids, **inputs).last_hidden_state
    with Stop(loaded.model, 2) as stop:
        residual = stop(input_ids=ids, **inputs)
    with Resume(loaded.model, 2) as resume:
        assert torch.equal(resume(residual, **inputs), truth)


@given(data=st.data())
def test_draft_and_verify_with_one_cache(loaded, data):
    """A round of self-speculation: caches of different length below and above the exit, the full pass's numbers."""
    exit_layer = data.draw(st.integers(1, loaded.depth - 1))
    prompt = data.draw(st.integers(1, 6))
    drafts = data.draw(st.integers(1, 4))
    ids = tokens(loaded, batch=1, positions=prompt + drafts, seed=prompt * 10 + drafts)
    truth = loaded.anatomy.decoder(ids).last_hidden_state
    cache = DynamicCache(config=loaded.model.config)
    loaded.anatomy.decoder(ids[:, :prompt], past_key_values=cache, use_cache=True)
    residuals = []
    with Stop(loaded.model, exit_layer) as stop:
        for position in range(prompt, prompt + drafts):
            step = ids[:, position : position + 1]
            residuals.append(stop(input_ids=step, past_key_values=cache, use_cache=True))
    lengths = [cache.get_seq_length(layer) for layer in range(loaded.depth)]
    assert lengths == [prompt + drafts] * exit_layer + [prompt] * (loaded.depth - exit_layer)
    rows = range(prompt, prompt + drafts)
    with Resume(loaded.model, exit_layer) as resume:
        verified = resume(
            torch.cat(residuals, dim=1),
            past_key_values=cache,
            use_cache=True,
            position_ids=torch.tensor([list(rows)]),
            attention_mask=causal_mask(rows, prompt + drafts),
        )
    assert torch.allclose(verified, truth[:, prompt:], atol=1e-5)
    assert [cache.get_seq_length(layer) for layer in range(loaded.depth)] == [prompt + drafts] * loaded.depth


def direct_inputs(loaded, ids: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """The embedding output and what the model's own forward would hand to each layer, for a text without padding."""
    embedded, positions = loaded.anatomy.embedding(ids), torch.arange(ids.shape[1])[None]
    rotary = loaded.anatomy.rotary(embedded, positions)
    return embedded, {"position_embeddings": rotary, "attention_mask": causal_mask(range(ids.shape[1]), ids.shape[1])}


def test_direct_is_the_same(loaded):
    ids = tokens(loaded)
    truth = loaded.anatomy.decoder(ids).last_hidden_state
    embedded, inputs = direct_inputs(loaded, ids)
    for parts in (loaded.anatomy, fast_forward(loaded.anatomy)):
        for site in loaded.anatomy.sites:
            residual = Stop(parts, site).direct(embedded, **inputs)
            with Stop(loaded.model, site) as stop:
                assert torch.allclose(residual, stop(input_ids=ids), atol=1e-5)
            assert torch.allclose(Resume(parts, site).direct(residual, **inputs), truth, atol=1e-5)


def test_direct_obeys_other_hooks(loaded):
    """Also in its fast_forward form, if they were there before."""
    embedded, inputs = direct_inputs(loaded, tokens(loaded))
    with Edit(loaded.model, skip=[1]), Capture(loaded.model, [0, 1, 2]) as capture:
        for parts in (loaded.anatomy, fast_forward(loaded.anatomy)):
            capture.passes.clear()
            residual = Stop(parts, 2).direct(embedded, **inputs)
            assert torch.equal(capture[0], embedded)
            assert torch.equal(capture[1], capture[2])
            assert torch.equal(capture[2], residual)


def test_quick_leaves_the_model_alone(loaded):
    before = {name: dict(module.__dict__) for name, module in loaded.model.named_modules()}
    fast_forward(loaded.anatomy)
    assert all(module.__dict__ == before[name] for name, module in loaded.model.named_modules())


def test_resume_with_a_cache_asks_for_positions_and_mask(loaded):
    cache = DynamicCache(config=loaded.model.config)
    residual = torch.zeros(1, 1, loaded.anatomy.width)
    with Resume(loaded.model, 2) as resume:
        with pytest.raises(InputError, match=r"needs position_ids and an additive attention mask"):
            resume(residual, past_key_values=cache)
        with pytest.raises(InputError, match=r"needs position_ids and an additive attention mask"):
            resume(residual, past_key_values=cache, position_ids=torch.tensor([[0]]), attention_mask=torch.ones(1, 1))


def test_use_outside_the_context(loaded):
    with pytest.raises(InputError, match=r"Stop was used outside its context"):
        Stop(loaded.model, 1)(input_ids=tokens(loaded))
    with pytest.raises(InputError, match=r"Resume was used outside its context"):
        Resume(loaded.model, 1)(torch.zeros(1, 1, loaded.anatomy.width))
    stop = Stop(loaded.model, 1)
    with stop, pytest.raises(InputError, match=r"already open"), stop:
        pass
    with stop:  # and again, after it was closed
        stop(input_ids=tokens(loaded))


def test_the_model_itself_inside_a_stop(loaded):
    with Stop(loaded.model, 2), pytest.raises(InputError, match=r"a Stop at site 2 ended the pass.*call the Stop"):
        loaded.model(tokens(loaded))


def test_two_stops(loaded):
    ids = tokens(loaded)
    with Stop(loaded.model, 2) as lower, Stop(loaded.model, 4) as upper, Stop(loaded.model, 2) as twin:
        assert torch.equal(lower(input_ids=ids), twin(input_ids=ids))
        with pytest.raises(InputError, match=r"a Stop at site 2 ended the pass"):
            upper(input_ids=ids)


# ------------------------------------------------------------------------------------------------ Edit


def without(model, layer: int):
    """A copy of the model that never had that layer."""
    shorter = copy.deepcopy(model)
    del shorter.model.layers[layer]
    shorter.config.num_hidden_layers -= 1
    return shorter


def test_skip_is_a_model_without_the_layer(loaded):
    ids = tokens(loaded)
    for layer in range(loaded.depth):
        with Edit(loaded.model, skip=[layer]):
            edited = loaded.model(ids, use_cache=False).logits
        assert torch.equal(edited, without(loaded.model, layer)(ids, use_cache=False).logits)


def test_replace_sees_both_residuals(loaded):
    ids, seen = tokens(loaded), []

    def half(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        seen.append((before, after))
        return (before + after) / 2

    with Capture(loaded.model, [2, 3]) as plain:
        loaded.model(ids)
    with Edit(loaded.model, replace={2: half}), Capture(loaded.model, [3]) as capture:
        loaded.model(ids)
    assert torch.equal(seen[0][0], plain[2])
    assert torch.equal(seen[0][1], plain[3])
    assert torch.equal(capture[3], (plain[2] + plain[3]) / 2)


def test_a_stop_reads_what_an_edit_wrote(loaded):
    ids = tokens(loaded)
    with Stop(loaded.model, 3) as stop, Edit(loaded.model, replace={2: lambda before, after: after * 0}):
        assert stop(input_ids=ids).abs().max() == 0


def test_edit_keeps_gradients(any_tiny):
    model = copy.deepcopy(any_tiny.model).requires_grad_(True)
    ids = tokens(any_tiny)
    with Edit(model, skip=[1], replace={3: lambda before, after: before + 0.5 * (after - before)}):
        with Capture(model, [2]) as capture:
            loss = functional.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), ids.flatten())
    (through,) = torch.autograd.grad(loss, capture[2], retain_graph=True)
    assert through.abs().max() > 0
    loss.backward()
    grads = [[p.grad for p in layer.parameters() if p.grad is not None] for layer in model.model.layers]
    moved = [any(grad.abs().max() > 0 for grad in layer) for layer in grads]
    assert moved == [layer != 1 for layer in range(any_tiny.depth)]
    assert open_hooks(model) == []


# ------------------------------------------------------------------------------------------------ restoring


class BoomError(Exception):
    pass


def fail(*_args, **_kwargs):
    raise BoomError


@pytest.mark.parametrize(
    "make",
    [
        lambda model: Capture(model, reduce=fail),
        lambda model: Capture(model, [0, 3]),
        lambda model: Stop(model, 2),
        lambda model: Stop(model, 0),
        lambda model: Resume(model, 3),
        lambda model: Edit(model, skip=[0, 2], replace={1: fail}),
    ],
)
def test_restored_after_an_exception_in_the_middle(loaded, make):
    ids = tokens(loaded)
    truth = loaded.model(ids).logits
    handle = loaded.anatomy.head.register_forward_pre_hook(fail)
    with pytest.raises((BoomError, InputError)), make(loaded.model):
        loaded.model(ids)  # fails in a layer, at a Stop, or at the head
    handle.remove()
    assert open_hooks(loaded.model) == []
    assert torch.equal(loaded.model(ids).logits, truth)


def test_registers_all_or_nothing(loaded, monkeypatch):
    """The third registration fails: the first two are undone."""
    broken = loaded.anatomy.layers[1]
    monkeypatch.setattr(broken, "register_forward_hook", fail)
    for make in (lambda: Capture(loaded.model), lambda: Edit(loaded.model, skip=[0], replace={1: fail})):
        with pytest.raises(BoomError), make():
            pytest.fail("the context was entered")
        assert open_hooks(loaded.model) == []


def test_an_exception_while_drafting(loaded):
    """An exception that is no Stop passes through a Stop, and nothing stays behind."""
    with pytest.raises(BoomError):
        with Stop(loaded.model, 3) as stop, Capture(loaded.model, [1], reduce=fail):
            stop(input_ids=tokens(loaded))
    assert open_hooks(loaded.model) == []


def test_nested_contexts_restore_in_order(loaded):
    ids = tokens(loaded)
    truth = loaded.model(ids).logits
    with Edit(loaded.model, skip=[1]):
        once = loaded.model(ids).logits
        with Edit(loaded.model, skip=[1, 2]), Capture(loaded.model, [1, 3]) as capture:
            loaded.model(ids)
            assert torch.equal(capture[1], capture[3])
        assert torch.equal(loaded.model(ids).logits, once)
    assert torch.equal(loaded.model(ids).logits, truth)


def test_an_instance_forward_that_was_there_comes_back(loaded):
    """Wrappers such as nnsight's and accelerate's put a forward on the instance: it is used again afterwards."""
    layer = loaded.anatomy.layers[1]
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = wrapped
    try:
        with Resume(loaded.model, 3) as resume:
            resume(torch.zeros(1, 2, loaded.anatomy.width), use_cache=False)
            assert not calls
        assert layer.__dict__["forward"] is wrapped
        loaded.model(tokens(loaded))
        assert calls
        assert open_hooks(loaded.model) == ["model.layers.1"]
    finally:
        del layer.forward


def test_foreign_hooks_stay(loaded):
    seen = []
    handle = loaded.anatomy.layers[2].register_forward_hook(lambda *_: seen.append(1))
    try:
        with Stop(loaded.model, 3) as stop:
            stop(input_ids=tokens(loaded))
        assert seen == [1]
        loaded.model(tokens(loaded))
        assert seen == [1, 1]
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------ one order


class Chain:
    """The stack's order, spelled out on a model of four layers that add their number: what a pass gives and reads."""

    def __init__(self, contexts):
        self.contexts = contexts  # in the order of opening

    def run(self, resumed=None):
        """(what the Captures read, by context; the residual at the end, or None for a pass that a Stop ended)."""
        read = {index: {} for index, (kind, _) in enumerate(self.contexts) if kind == "capture"}
        site, residual = 0, 1.0
        if resumed is not None:
            residual = 100.0
        while True:
            for index, found in read.items():
                if site in self.contexts[index][1]:
                    found[site] = residual
            if any(kind == "stop" and at == site for kind, at in self.contexts):
                return read, None
            if site == DEPTH:
                return read, residual
            passed = resumed is not None and site < resumed
            given = residual
            skipped = passed or any(kind == "skip" and at == site for kind, at in self.contexts)
            residual = given if skipped else given + site + 1
            for kind, setting in self.contexts:
                if kind == "edit" and setting[0] == site and not passed:
                    residual = setting[1] * residual + given
            site += 1


DEPTH = 4
SETTINGS = st.one_of(
    st.tuples(st.just("capture"), st.sets(st.integers(0, DEPTH), min_size=1).map(tuple)),
    st.tuples(st.just("edit"), st.tuples(st.integers(0, DEPTH - 1), st.sampled_from([0.0, 2.0, -3.0]))),
    st.tuples(st.just("skip"), st.integers(0, DEPTH - 1)),
    st.tuples(st.just("stop"), st.integers(0, DEPTH)),
    st.tuples(st.just("resume"), st.integers(0, DEPTH)),
)


class Adds(torch.nn.Module):
    """A layer that adds its number, or is interrupted."""

    def __init__(self, number):
        super().__init__()
        self.number, self.interrupted = number, False

    def forward(self, hidden_states, **_):
        if self.interrupted:
            raise KeyboardInterrupt
        return hidden_states + self.number


@pytest.fixture(scope="module")
def adder():
    """A Llama of width 36 whose layers add 1, 2, 3, 4, whose embedding is ones, and whose norm changes nothing."""
    model = copy.deepcopy(synthetic("tiny", seed=1, layers=DEPTH).model)
    model.model.layers = torch.nn.ModuleList(Adds(number + 1) for number in range(DEPTH))
    model.model.norm = torch.nn.Identity()
    torch.nn.init.ones_(model.model.embed_tokens.weight)
    return model.eval()


def passed(model, resume):
    """The last residual of a pass: of the whole model, or through a Resume from 100."""
    if resume is None:
        return model.model(torch.tensor([[1, 2]]), use_cache=False).last_hidden_state
    return resume(torch.full((1, 2, 36), 100.0), use_cache=False)


def opened(model, kind, setting):
    if kind == "edit":
        layer, factor = setting
        return Edit(model, replace={layer: lambda before, after: factor * after + before})
    return {
        "capture": lambda: Capture(model, setting), "skip": lambda: Edit(model, skip=[setting]),
        "stop": lambda: Stop(model, setting), "resume": lambda: Resume(model, setting),
    }[kind]()  # fmt: skip


@given(
    settings=st.lists(SETTINGS, min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    interrupt=st.booleans(),
)
def test_contexts_in_any_order_keep_the_one_order(adder, settings, order, interrupt):
    """Whatever is opened, however it is closed, also in the middle of a KeyboardInterrupt."""
    layers = adder.model.layers
    alive = []  # (kind, setting, context) in the order of opening
    try:
        for kind, setting in settings:
            alive.append((kind, setting, opened(adder, kind, setting)))
            alive[-1][2].__enter__()
        while alive:
            chain = Chain([(kind, setting) for kind, setting, _ in alive])
            for resumed in [None, *(number for number, each in enumerate(alive) if each[0] == "resume")]:
                read, end = chain.run(None if resumed is None else alive[resumed][1])
                resume = None if resumed is None else alive[resumed][2]
                if interrupt:
                    for layer in layers:
                        layer.interrupted = True
                    with suppress(KeyboardInterrupt, InputError):
                        passed(adder, resume)
                    for layer in layers:
                        layer.interrupted = False
                for _, _, context in alive:
                    getattr(context, "passes", []).clear()
                if end is None:
                    with pytest.raises(InputError, match="ended the pass"):
                        passed(adder, resume)
                else:
                    assert (passed(adder, resume) == end).all()
                for index, found in read.items():
                    passes = alive[index][2].passes
                    assert ({at: float(each[0, 0, 0]) for at, each in passes[-1].items()} if passes else {}) == found
            alive.pop(order.randrange(len(alive)))[2].__exit__(None, None, None)
    finally:
        for layer in layers:
            layer.interrupted = False
        for _, _, context in alive:
            context.__exit__(None, None, None)
    assert open_hooks(adder) == []
    assert (passed(adder, None) == 1 + 1 + 2 + 3 + 4).all()


def test_two_edits_closed_out_of_order_leave_nothing(loaded):
    ids = tokens(loaded)
    truth = loaded.model(ids).logits
    first, second = Edit(loaded.model, skip=[1]), Edit(loaded.model, skip=[1, 2])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with Capture(loaded.model, [1, 2, 3]) as capture:
        loaded.model(ids)
    assert torch.equal(capture[1], capture[3])
    second.__exit__(None, None, None)
    assert open_hooks(loaded.model) == []
    assert torch.equal(loaded.model(ids).logits, truth)


def test_a_capture_sees_edits_that_were_opened_after_it(loaded):
    ids = tokens(loaded)
    for first, second in ((Capture, Edit), (Edit, Capture)):
        made = {
            Capture: lambda: Capture(loaded.model, [3]),
            Edit: lambda: Edit(loaded.model, replace={2: lambda before, after: after * 0}),
        }
        with made[first]() as one, made[second]() as two:
            loaded.model(ids)
        assert (one if first is Capture else two)[3].abs().max() == 0


def test_a_forward_that_came_on_top_of_a_skip_stays(loaded):
    """What accelerate or nnsight puts on a layer while it is skipped is not thrown away; the skip ends all the same."""
    ids, layer = tokens(loaded), loaded.anatomy.layers[1]
    truth = loaded.model(ids).logits
    edit = Edit(loaded.model, skip=[1])
    edit.__enter__()
    ours = layer.forward
    theirs = layer.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    try:
        assert not torch.equal(loaded.model(ids).logits, truth)
        edit.__exit__(None, None, None)
        assert layer.__dict__["forward"] is theirs
        assert torch.equal(loaded.model(ids).logits, truth)
    finally:
        del layer.forward


def test_the_model_itself_inside_a_resume_runs_as_ever(loaded):
    ids = tokens(loaded)
    truth = loaded.model(ids).logits
    with Resume(loaded.model, 3) as resume:
        assert torch.equal(loaded.model(ids).logits, truth)
        resume(torch.zeros(1, 2, loaded.anatomy.width), use_cache=False)
        assert torch.equal(loaded.model(ids).logits, truth)


def test_what_is_adapted_is_captured_through_its_adapter(any_tiny):
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(any_tiny.model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted, ids = peft.get_peft_model(model, config).eval(), tokens(any_tiny)
    with Capture(adapted) as capture:
        truth = adapted(ids, output_hidden_states=True).hidden_states
    assert torch.equal(capture[3], truth[3])
    with Capture(any_tiny.model) as plain:
        any_tiny.model(ids)
    assert not torch.equal(plain[3], capture[3])
