"""The lens against the model's own parts, in every dtype."""

from __future__ import annotations

import pytest
import torch
from lens.spelled import random_texts, read

from probekit.errors import InputError, SelfCheckError
from probekit.lens import lens as lens_file
from probekit.lens.lens import Lens, check_model_row, head_logits, head_scratch_bytes
from probekit.models.synthetic import synthetic


def test_last_row_of_both_lenses_is_the_model(any_tiny):
    parts = any_tiny.anatomy
    residuals, _, _, logits = read(any_tiny, random_texts(any_tiny, 2, 12))
    for kind in ("final-norm", "raw"):
        seen = Lens(parts, kind)(residuals[-1], parts.depth)
        torch.testing.assert_close(seen, logits, rtol=1e-5, atol=1e-5)
        check_model_row(parts, seen, logits, noise=0.0)


def test_each_kind_is_what_its_name_says(any_tiny):
    parts, model = any_tiny.anatomy, any_tiny.model
    residual = torch.randn(2, 3, parts.width, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Lens(parts)(residual, 2), model.lm_head(model.model.norm(residual)))
    torch.testing.assert_close(Lens(parts, "raw")(residual, 2), model.lm_head(residual))


def test_an_exit_head_comes_before_the_norm(tiny):
    parts = tiny.anatomy
    residual = torch.randn(4, parts.width, generator=torch.Generator().manual_seed(1))
    lens = Lens(parts, heads={2: lambda h: 2 * h - 1})
    torch.testing.assert_close(lens(residual, 2), Lens(parts)(2 * residual - 1, 2))
    torch.testing.assert_close(lens(residual, 3), Lens(parts)(residual, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_small_dtypes_are_float32(dtype, monkeypatch):
    """No worse than the float32 product of the same rounded numbers, and made without a whole float32 head."""
    loaded = synthetic("tiny", seed=1, dtype=dtype)
    parts = loaded.anatomy
    states = torch.randn(7, parts.width, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth = states.double() @ parts.head.weight.double().T
    monkeypatch.setattr(lens_file, "WEIGHT_BLOCK_BYTES", 4 * parts.width * 10)  # 97 rows in blocks of 10
    logits = head_logits(parts, states)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), truth, rtol=1e-5, atol=1e-5)
    widened, product = parts.width * (7 + 10), 7 * 10
    assert head_scratch_bytes(parts, 7) == 4 * (widened + product)
    assert len({*logits.flatten().tolist()}) > len({*logits.to(dtype).flatten().tolist()})


def test_a_lens_that_is_not_the_model_is_found_out(tiny):
    parts = tiny.anatomy
    residuals, _, _, logits = read(tiny, random_texts(tiny, 1, 6))
    seen = head_logits(parts, residuals[-1])  # the norm forgotten
    with pytest.raises(SelfCheckError, match=r"not the model's own logits: they are up to .* apart in row"):
        check_model_row(parts, seen, logits, noise=0.0)
    check_model_row(parts, logits + 0.5, logits, noise=0.6)
    with pytest.raises(SelfCheckError, match="not the model's own"):
        check_model_row(parts, torch.full_like(logits, torch.nan), logits, noise=0.0)


def test_wrong_use(tiny):
    parts = tiny.anatomy
    with pytest.raises(InputError, match="no 'logit' lens; there are final-norm, raw"):
        Lens(parts, "logit")
    with pytest.raises(InputError, match="the raw lens has none"):
        Lens(parts, "raw", heads={1: lambda h: h})
    with pytest.raises(InputError, match=r"exits 1\.\.4"):
        Lens(parts, heads={5: lambda h: h})
    with pytest.raises(InputError, match=r"sites 0\.\.5"):
        Lens(parts)(torch.zeros(1, parts.width), 6)
