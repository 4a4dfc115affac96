"""The Jacobian lens: against torch's own Jacobian of the layers, its averages, its files, and drafts through it."""

from __future__ import annotations

import json
import pickle
import random

import pytest
import torch

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.hooks.edit import Edit
from probekit.hooks.sites import open_hooks
from probekit.lens.exit_heads import ExitHead, fingerprint, load_heads, save_heads
from probekit.lens.jacobian import fit_jacobian, save_jacobian_lens
from probekit.lens.lens import Lens
from probekit.models.synthetic import synthetic
from probekit.tracing.tracer import trace
from probekit.validation.run import validate
from tests.models.test_families import small

IDS = torch.tensor([[5, 9, 17, 3, 44, 12, 30, 8], [7, 6, 21, 2, 13, 40, 1, 11]])
SKIP = 2


@torch.no_grad()
def at_site(parts, ids, layer):
    with Capture(parts, [layer]) as capture:
        parts.decoder(input_ids=ids[None], use_cache=False)
    return capture[layer][0]


def spelled_out(model, h, layer):
    """(positions, width) at the layer -> at the last, by a Llama's own layers."""
    places = torch.arange(len(h))
    rotary = model.model.rotary_emb(h[None], places[None])
    mask = torch.full((len(h), len(h)), torch.finfo(h.dtype).min).triu(1)[None, None]
    h = h[None]
    for block in model.model.layers[layer:]:
        h = block(h, attention_mask=mask, position_embeddings=rotary)
    return h[0]


def by_edit(loaded, ids, h, layer):
    """The same of any family: the whole model runs, and `h` stands at the layer."""
    with Edit(loaded.anatomy, at={layer: lambda _: h[None]}), Capture(loaded.anatomy, [loaded.depth]) as capture:
        loaded.anatomy.decoder(input_ids=ids[None], use_cache=False)
    return capture[loaded.depth][0]


def averaged(whole, places, same=False):
    """(width, width) of (positions, width, positions, width): the mean over places, the sum over later ones."""
    own = whole[places][:, :, places]
    return torch.stack([own[:, :, p].sum(0) if not same else own[p, :, p] for p in range(len(places))]).mean(0)


def reference(loaded, layer, rest, *, same=False, texts=IDS):
    found = []
    for ids in texts:
        h = at_site(loaded.anatomy, ids, layer)
        whole = torch.autograd.functional.jacobian(lambda value, ids=ids: rest(ids, value, layer), h)
        found.append(averaged(whole, torch.arange(SKIP, len(ids) - 1), same))
    return torch.stack(found).mean(0)


def matrix(head):
    return head.change + torch.eye(len(head.offset))


# ------------------------------------------------------------------------------------------------ what it is
@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_it_is_torchs_jacobian_averaged(any_tiny, unchanged, at_once):
    """Rows found one by one, in batches that do not divide the width, and all at once."""
    unchanged(any_tiny.model)
    layers = [1, any_tiny.depth - 1] if at_once == 7 else [2]
    heads = fit_jacobian(any_tiny.anatomy, [IDS], layers, skip=SKIP, at_once=at_once)
    assert list(heads) == layers
    for layer, head in heads.items():
        expected = reference(any_tiny, layer, lambda ids, h, layer: spelled_out(any_tiny.model, h, layer))
        torch.testing.assert_close(matrix(head), expected, atol=3e-6, rtol=1e-4)
        assert not head.offset.any()
    assert not any(each.requires_grad or each.grad is not None for each in any_tiny.model.parameters())


@pytest.mark.parametrize(
    "family", ["gemma3_text", *(pytest.param(each, marks=pytest.mark.second) for each in ("qwen2", "gpt_neox"))]
)
def test_other_families(family):
    loaded = small(family)
    heads = fit_jacobian(loaded.anatomy, [IDS], [1, 2], skip=SKIP)
    for layer, head in heads.items():
        expected = reference(loaded, layer, lambda ids, h, layer: by_edit(loaded, ids, h, layer))
        torch.testing.assert_close(matrix(head), expected, atol=1e-5 * expected.abs().max(), rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models(name, request, unchanged):
    """Along random directions of the last residual, by one backward pass each."""
    loaded = request.getfixturevalue(name)
    unchanged(loaded.model)
    text, layer = "The wolf came to the forest and asked the king for bread and for a bed.", loaded.depth - 2
    ids = torch.tensor(loaded.tokenizer(text)["input_ids"][:12])
    found = matrix(fit_jacobian(loaded.anatomy, [ids[None]], [layer], skip=SKIP, at_once=32)[layer])
    h = at_site(loaded.anatomy, ids, layer).requires_grad_()
    last = by_edit(loaded, ids, h, layer)
    for seed in range(3):
        direction = torch.randn(loaded.anatomy.width, generator=torch.Generator().manual_seed(seed))
        (slope,) = torch.autograd.grad((last[SKIP:-1] @ direction).sum(), h, retain_graph=True)
        expected = slope[SKIP:-1].mean(0)
        torch.testing.assert_close(direction @ found, expected, atol=2e-4 * expected.abs().max(), rtol=1e-3)


def test_one_place_is_the_derivative_at_that_place(tiny):
    """With one place there are no later ones: both kinds are the same, and the signs cancel exactly."""
    texts = IDS[:1, : SKIP + 2]
    expected = reference(tiny, 3, lambda _, h, layer: spelled_out(tiny.model, h, layer), texts=texts)
    for same in (False, True):
        (head,) = fit_jacobian(tiny.anatomy, [texts], [3], skip=SKIP, same_position=same).values()
        torch.testing.assert_close(matrix(head), expected, atol=3e-6, rtol=1e-4)


def test_the_same_position_alone_in_the_mean_over_signs(tiny):
    rest = lambda _, h, layer: spelled_out(tiny.model, h, layer)  # noqa: E731
    same, later = (reference(tiny, 2, rest, same=kind) for kind in (True, False))
    found = [
        matrix(fit_jacobian(tiny.anatomy, [IDS], [2], skip=SKIP, at_once=36, same_position=True, seed=seed)[2])
        for seed in range(24)
    ]
    errors = torch.stack(found) - same
    noise = errors.std(0) / len(found) ** 0.5
    assert (errors.mean(0).abs() <= 5 * noise + 1e-6).all(), "unbiased"
    assert errors.mean(0).norm() < 0.4 * (later - same).norm(), "and told apart from the sum over later places"


def test_expanded_about_the_mean(tiny):
    """mean h[L] + J (h - mean h), over the same places; the mean itself is moved to the mean."""
    plain = fit_jacobian(tiny.anatomy, [IDS], [1, 3], skip=SKIP)
    centred = fit_jacobian(tiny.anatomy, [IDS], [1, 3], skip=SKIP, centred=True)
    mean = {
        site: torch.stack([at_site(tiny.anatomy, ids, site)[SKIP:-1].mean(0) for ids in IDS]).mean(0)
        for site in (1, 3, 5)
    }
    for layer, head in centred.items():
        assert torch.equal(head.change, plain[layer].change)
        torch.testing.assert_close(head(mean[layer]), mean[5], atol=1e-4, rtol=1e-4)


def test_texts_are_cut_counted_once_each_and_left_out_where_short(tiny):
    heads = fit_jacobian(tiny.anatomy, [IDS], [2], skip=SKIP)
    again = fit_jacobian(tiny.anatomy, [IDS[:1], IDS[1:], IDS[:, : SKIP + 1]], [2], skip=SKIP)
    torch.testing.assert_close(again[2].change, heads[2].change)
    cut = fit_jacobian(tiny.anatomy, [IDS], [2], skip=SKIP, longest=6)
    assert torch.equal(cut[2].change, fit_jacobian(tiny.anatomy, [IDS[:, :6]], [2], skip=SKIP)[2].change)
    assert (cut[2].change - heads[2].change).abs().max() > 1e-4


def test_parameters_that_train_get_no_gradients_and_an_exception_leaves_nothing(tiny, unchanged):
    model = synthetic("tiny", seed=1)
    unchanged(model.model)
    model.model.requires_grad_(True)
    heads = fit_jacobian(model.anatomy, [IDS], [2], skip=SKIP)
    torch.testing.assert_close(heads[2].change, fit_jacobian(tiny.anatomy, [IDS], [2], skip=SKIP)[2].change)
    assert all(each.grad is None and each.requires_grad for each in model.model.parameters())
    with pytest.raises(IndexError):
        fit_jacobian(model.anatomy, [torch.full((1, 8), 10_000)], [2], skip=SKIP)
    assert open_hooks(model.model) == []
    with torch.inference_mode():  # as a trace runs
        inside = fit_jacobian(model.anatomy, [IDS], [2], skip=SKIP)
    assert torch.equal(inside[2].change, heads[2].change)


def test_wrong_use(tiny):
    with pytest.raises(InputError, match="no text has 18 tokens"):
        fit_jacobian(tiny.anatomy, [IDS])
    with pytest.raises(InputError, match=r"exits 1\.\.4"):
        fit_jacobian(tiny.anatomy, [IDS], [5])
    with pytest.raises(InputError, match="no exit to fit"):
        fit_jacobian(tiny.anatomy, [IDS], [])
    model = synthetic("tiny", seed=1)
    model.model.train()
    with pytest.raises(InputError, match="in training mode"):
        fit_jacobian(model.anatomy, [IDS], [1], skip=SKIP)
    for wrong in ({"skip": -1}, {"skip": 6, "longest": 7}, {"at_once": 0}):
        with pytest.raises(InputError, match="reads places from"):
            fit_jacobian(tiny.anatomy, [IDS], **wrong)


# ------------------------------------------------------------------------------------------------ what it does
@pytest.fixture(scope="module")
def heads(tiny):
    return fit_jacobian(tiny.anatomy, [IDS], skip=SKIP)


@torch.no_grad()
def test_as_a_lens(tiny, heads):
    """head(norm(J h)), on the model's own modules."""
    lens = Lens(tiny.anatomy, heads=heads)
    h = at_site(tiny.anatomy, IDS[0], 3)
    expected = tiny.model.lm_head(tiny.model.model.norm(h @ matrix(heads[3]).T))
    torch.testing.assert_close(lens(h, 3), expected.float(), atol=1e-4, rtol=1e-4)


def test_a_linear_rest_is_found_whole():
    """Where the layers above add nothing the lens is the logit lens: J = 1, whatever text it was fitted on."""
    loaded = synthetic("tiny", seed=1, dial=0.0, exit_layer=3)
    head = fit_jacobian(loaded.anatomy, [IDS], [3], skip=SKIP)[3]
    torch.testing.assert_close(matrix(head), torch.eye(loaded.anatomy.width), atol=1e-5, rtol=0)


def test_it_drafts_and_every_round_is_as_traced(tiny, heads):
    prompts = [[1, 2, 3], [30, 4], [9, 9, 8, 7]]
    run = trace(tiny, prompts, max_new_tokens=12, exit_heads=heads)
    assert run.manifest.heads_name == fingerprint(heads)
    cells = {"exit_layers": [1, 3], "draft_lengths": [3]}

    found = validate(tiny, run, **cells)
    assert all(cell.rounds_equal and cell.tokens_equal for cell in found.cells)


# ------------------------------------------------------------------------------------------------ files
def test_round_trips(tiny, heads, tmp_path):
    save_heads(tmp_path / "heads.safetensors", heads)
    again = load_heads(tmp_path / "heads.safetensors", tiny.anatomy)
    assert fingerprint(again) == fingerprint(heads)
    save_jacobian_lens(tmp_path / "lens.pt", heads, tiny.anatomy, texts=2)
    again = load_heads(tmp_path / "lens.pt", tiny.anatomy)
    assert list(again) == list(heads)
    for layer, head in heads.items():
        torch.testing.assert_close(again[layer].change, head.change, atol=1e-6, rtol=0)
    state = torch.load(tmp_path / "lens.pt", weights_only=True)
    assert (state["n_prompts"], state["source_layers"], state["d_model"]) == (2, [0, 1, 2, 3], 36)
    torch.testing.assert_close(state["J"][2], matrix(heads[3]))
    with pytest.raises(InputError, match="has an offset"):
        save_jacobian_lens(tmp_path / "x.pt", {1: ExitHead(torch.zeros(36, 36), torch.ones(36))}, tiny.anatomy)


def published(path, matrices, **more):
    torch.save({"J": matrices, "n_prompts": 3, "source_layers": list(matrices), "d_model": 36, **more}, path)
    return path


def test_a_published_file_in_half_precision(tiny, tmp_path):
    """Blocks are counted from 0; a matrix of the last one is no exit's."""
    matrices = {block: torch.randn(36, 36).half() for block in (0, 3, 4)}
    found = load_heads(published(tmp_path / "lens.pt", matrices, metadata={"by": "another"}), tiny.anatomy)
    assert list(found) == [1, 4]
    torch.testing.assert_close(matrix(found[4]), matrices[3].float())


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_what_is_refused(tiny, tmp_path):
    path = tmp_path / "lens.pt"
    for matrices, message in (
        ({5: torch.zeros(36, 36)}, r"block 5; this model has blocks 0\.\.4"),
        ({1: torch.zeros(36, 30)}, r"\(36, 30\) for block 1; expected a matrix of 36 x 36"),
        ({1: [0.0]}, "list for block 1"),
        ({}, "no matrices under 'J'"),
        ({"1": torch.zeros(36, 36)}, "no matrices under 'J'"),
        ({1: torch.full((36, 36), torch.nan)}, "not finite"),
        ({4: torch.zeros(36, 36)}, "no exit heads"),
    ):
        with pytest.raises(InputError, match=message):
            load_heads(published(path, matrices), tiny.anatomy)
    torch.save([1], path)
    with pytest.raises(InputError, match="no matrices under 'J'"):
        load_heads(path, tiny.anatomy)
    torch.save({"J": {1: torch.zeros(36, 36)}, "more": Trap()}, path)
    with pytest.raises(InputError, match="cannot be read as a Jacobian lens"):
        load_heads(path, tiny.anatomy)
    published(path, {1: torch.zeros(36, 36)})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="cannot be read as a Jacobian lens"):
        load_heads(path, tiny.anatomy)
    path.write_bytes(pickle.dumps({"J": {}}))
    with pytest.raises(InputError, match="cannot be read as exit heads"):
        load_heads(path, tiny.anatomy)


def test_damaged_bytes_are_refused_or_read(tiny, tmp_path):
    """Whatever the unpickler makes of them, nothing but an InputError comes out: here and of a tuned lens."""
    whole = published(tmp_path / "lens.pt", {0: torch.zeros(36, 36)}).read_bytes()
    (tmp_path / "tuned").mkdir()
    config = {"d_model": 36, "num_hidden_layers": 5, "base_model_name_or_path": "tiny"}
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    start, draw, refused = whole.index(b"data.pkl"), random.Random(0), 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 2, 4))):
            content[draw.randrange(start, start + 400)] = draw.randrange(256)
        (tmp_path / "damaged.pt").write_bytes(content)
        (tmp_path / "tuned" / "params.pt").write_bytes(content)
        for path in (tmp_path / "damaged.pt", tmp_path / "tuned"):
            try:
                load_heads(path, tiny.anatomy)
            except InputError:
                refused += 1
    assert refused > 150
