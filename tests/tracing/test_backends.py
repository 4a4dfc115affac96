from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import DynamicCache

from probekit.errors import InputError, SelfCheckError
from probekit.hooks.sites import open_hooks
from probekit.lens.lens import Lens
from probekit.models.synthetic import synthetic
from probekit.tracing.backend import HooksBackend, Reading
from probekit.tracing.backends import BACKENDS, check_backend, open_backend
from probekit.tracing.nnsight_backend import NnsightBackend
from probekit.tracing.self_check import row_noise, self_check


def batch(lengths: tuple[int, ...], vocabulary: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A left-padded batch of random texts of these lengths, and which of its places are texts."""
    ids = torch.randint(vocabulary, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    positions = (rows.long().cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": rows.long(), "position_ids": positions, "use_cache": False}
    return inputs, rows


needs_nnsight = pytest.mark.skipif(find_spec("nnsight") is None, reason="nnsight is not installed")
EACH = [pytest.param(name, marks=needs_nnsight if name == "nnsight" else ()) for name in BACKENDS]


def naive(model, inputs, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own hidden states, text by text, without padding; the last site before the norm."""
    residuals, logits, last = [], [], []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    with torch.inference_mode():
        for ids, keep in zip(inputs["input_ids"], rows, strict=True):
            output = model(ids[keep][None], output_hidden_states=True, use_cache=False)
            residuals.append(torch.stack([*output.hidden_states[:-1], last[-1]])[:, 0])
            logits.append(output.logits[0, -1])
    handle.remove()
    return torch.cat(residuals, dim=1), torch.stack(logits)


def kept(reading: Reading) -> Reading:
    """The same, to be looked at after another one."""
    return replace(reading, residuals=reading.residuals.clone())


@pytest.mark.parametrize("name", EACH)
def test_each_backend_reads_what_transformers_computes(name, any_tiny, unchanged) -> None:
    model = unchanged(any_tiny.model)
    inputs, rows = batch((7, 3, 12, 1), any_tiny.anatomy.vocabulary)
    with open_backend(name, any_tiny) as backend:
        reading = backend.read(inputs, rows)
    residuals, logits = naive(model, inputs, rows)
    assert reading.residuals.shape == (any_tiny.depth + 1, 23, any_tiny.anatomy.width)
    torch.testing.assert_close(reading.residuals, residuals, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reading.logits, logits, rtol=1e-4, atol=1e-5)


@needs_nnsight
def test_backends_give_the_same_numbers(any_tiny) -> None:
    inputs, rows = batch((5, 9), any_tiny.anatomy.vocabulary, seed=1)
    with HooksBackend(any_tiny) as hooks, NnsightBackend(any_tiny) as nnsight:
        one, two = hooks.read(inputs, rows), nnsight.read(inputs, rows)
    assert torch.equal(one.residuals, two.residuals)
    assert torch.equal(one.logits, two.logits)


@pytest.mark.parametrize("name", EACH)
def test_a_text_may_come_in_segments(name, tiny) -> None:
    inputs, rows = batch((12,), tiny.anatomy.vocabulary)
    with open_backend(name, tiny) as backend:
        whole = kept(backend.read(inputs, rows))
        cache = DynamicCache(config=tiny.model.config)
        parts = [
            kept(
                backend.read(
                    {
                        "input_ids": inputs["input_ids"][:, start : start + 5],
                        "position_ids": inputs["position_ids"][:, start : start + 5],
                        "past_key_values": cache,
                        "use_cache": True,
                    },
                    rows[:, start : start + 5],
                )
            )
            for start in (0, 5, 10)
        ]
    together = torch.cat([part.residuals for part in parts], dim=1)
    torch.testing.assert_close(together, whole.residuals, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts[-1].logits, whole.logits, rtol=1e-4, atol=1e-5)


def test_passes_share_one_place(tiny) -> None:
    """A shorter pass after a longer one, and a longer one after that: each is right, until the next one comes."""
    with HooksBackend(tiny) as hooks:
        places = []
        for length in (9, 4, 12, 9):
            inputs, rows = batch((length, 2), 97, seed=length)
            reading = hooks.read(inputs, rows)
            places.append(reading.residuals.data_ptr())
            with HooksBackend(tiny) as fresh:
                assert torch.equal(reading.residuals, fresh.read(inputs, rows).residuals)
    assert places[0] == places[1] != places[2] == places[3]


@needs_nnsight
def test_nnsight_leaves_no_trace() -> None:
    loaded = synthetic("tiny", seed=5)
    side, backward = loaded.tokenizer.padding_side, torch.Tensor.backward
    config = loaded.model.config.to_dict()
    entries = [set(module.__dict__) for module in loaded.model.modules()]
    inputs, rows = batch((4, 6), 97)

    def check() -> None:
        assert not hasattr(object(), "save")
        assert torch.Tensor.backward is backward
        assert loaded.tokenizer.padding_side == side
        assert open_hooks(loaded.model) == []
        assert loaded.model.config.to_dict() == config
        assert [set(module.__dict__) for module in loaded.model.modules()] == entries

    for _ in range(2):  # again, when the import is not the first
        with NnsightBackend(loaded) as backend:
            first = backend.read(inputs, rows)
        check()
    with pytest.raises(IndexError, match="out of range"), NnsightBackend(loaded) as backend:
        backend.read({**inputs, "input_ids": inputs["input_ids"] + 97}, rows)
    check()
    with HooksBackend(loaded) as hooks:
        assert torch.equal(hooks.read(inputs, rows).residuals, first.residuals)


@needs_nnsight
def test_nnsight_reads_a_model_without_a_tokenizer(tiny) -> None:
    inputs, rows = batch((4, 6), 97)
    with NnsightBackend(replace(tiny, tokenizer=None)) as nnsight, HooksBackend(tiny) as hooks:
        assert torch.equal(nnsight.read(inputs, rows).residuals, hooks.read(inputs, rows).residuals)


@pytest.mark.second
def test_nnsight_is_imported_only_when_asked_for() -> None:
    code = "import sys, probekit.tracing.backends; sys.exit('nnsight' in sys.modules or hasattr(object(), 'save'))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_backends_are_refused() -> None:
    with pytest.raises(InputError, match="no backend 'baukit'; there are hooks, nnsight"):
        check_backend("baukit")


def test_a_model_that_is_not_norm_and_head_fails_its_check(tiny) -> None:
    with HooksBackend(tiny) as hooks:
        reading = hooks.read(*batch((3,), 97))
    self_check(tiny.anatomy, reading)
    with pytest.raises(SelfCheckError, match="not the model's own logits"):
        self_check(tiny.anatomy, Reading(reading.residuals, reading.logits * 1.5))


def test_noise_bounds_what_rows_alone_and_among_others_differ_by(any_tiny) -> None:
    ids = torch.randint(any_tiny.anatomy.vocabulary - 1, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    noise = row_noise(any_tiny, ids, any_tiny.anatomy.sites)
    assert len(noise.by_site) == any_tiny.depth + 1 and noise.rounding == 0
    assert list(noise.by_site) == sorted(noise.by_site) and 0 < noise.by_site[-1] < 1e-4
    assert min(row_noise(any_tiny, ids[:1], any_tiny.anatomy.sites).by_site) >= 0
    lens, apart = Lens(any_tiny.anatomy), []
    inputs, rows = batch((40, 25), any_tiny.anatomy.vocabulary)
    short, short_rows = {name: values[1:, 15:] for name, values in inputs.items() if name != "use_cache"}, rows[1:, 15:]
    with HooksBackend(any_tiny) as hooks:
        among, alone = kept(hooks.read(inputs, rows)), hooks.read({**short, "use_cache": False}, short_rows)
    for site in any_tiny.anatomy.sites:
        together = lens(among.residuals[site, 40:], site)
        moved = (together - lens(alone.residuals[site], site)).gather(-1, together.topk(2).indices)
        apart.append(float((moved[:, 0] - moved[:, 1]).abs().max()))
    assert all(one <= max(most, 1e-5) for one, most in zip(apart, noise.by_site, strict=True))


def test_noise_counts_the_rounding_of_a_smaller_dtype() -> None:
    loaded = synthetic("tiny", seed=1, dtype="bfloat16")
    noise = row_noise(loaded, list(range(20)), [5])
    assert noise.rounding == torch.finfo(torch.bfloat16).eps
    for size in (0.7, 5.0, 100.0):  # two logits of this size that a decoder rounds to different numbers
        logits = torch.linspace(size, size * 1.05, 400)
        moved = (logits[:, None] - logits) - (logits.bfloat16().float()[:, None] - logits.bfloat16().float())
        assert float(moved.abs().max()) <= float(noise.around(torch.zeros(()), torch.tensor(size * 1.05)))
