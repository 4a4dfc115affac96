"""Exit heads: the fit against a known map, what it does to agreement, and the file."""

from __future__ import annotations

import pytest
import torch
from lens.spelled import random_texts, read
from safetensors.torch import save_file

from probekit.errors import InputError
from probekit.hooks.sites import open_hooks
from probekit.lens.chunked import StatisticsPlan, layer_statistics
from probekit.lens.exit_heads import ExitHead, HeadFit, fit_heads, load_heads, save_heads
from probekit.models.synthetic import synthetic


def known_map(width: int, seed: int = 0) -> ExitHead:
    generator = torch.Generator().manual_seed(seed)
    return ExitHead(
        torch.randn(width, width, generator=generator) / width**0.5, torch.randn(width, generator=generator)
    )


def test_a_known_map_is_found_again(tiny):
    """h[L] an affine map of h[2], rows of very different length; in pieces, as a stream."""
    parts, head = tiny.anatomy, known_map(tiny.anatomy.width)
    generator = torch.Generator().manual_seed(1)
    fit = HeadFit(parts, [2])
    size = fit.bytes
    for rows in (30, 500, 1):
        x = torch.randn(rows, parts.width, generator=generator) * (1 + 50 * torch.rand(rows, 1, generator=generator))
        fit.add({2: x, parts.depth: head(x)})
    assert (fit.rows, fit.bytes) == (531, size)
    found = fit.solve(ridge=1e-9)[2]
    torch.testing.assert_close(found.change, head.change, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.offset, head.offset, atol=5e-2, rtol=1e-2)


def test_a_strong_ridge_is_the_plain_lens(tiny):
    parts = tiny.anatomy
    fit = HeadFit(parts, [1, 3])
    x = torch.randn(100, parts.width, generator=torch.Generator().manual_seed(1))
    fit.add({1: x, 3: x, parts.depth: known_map(parts.width)(x)})
    for head in fit.solve(ridge=1e9).values():
        assert head.change.abs().max() < 1e-6


@pytest.mark.parametrize("dial", [0.2, 0.6])
def test_a_fitted_head_does_not_lower_agreement(dial):
    """A model whose layers above exit 3 add the less the smaller the dial; agreement on text that was not fitted."""
    loaded = synthetic("tiny", seed=1, dial=dial, exit_layer=3)
    parts = loaded.anatomy
    heads = fit_heads(parts, (random_texts(loaded, 16, 40, seed) for seed in range(4)))
    assert list(heads) == [*parts.exits]
    assert open_hooks(loaded.model) == []
    residuals, inputs, texts, _ = read(loaded, random_texts(loaded, 16, 40, seed=99))

    def agreement(chosen):
        plan = StatisticsPlan(lenses=("final-norm",), heads=chosen)
        return layer_statistics(parts, residuals, inputs, texts, plan)["agrees"][0].float().mean(-1)

    plain, headed = agreement(None), agreement(heads)
    assert (headed[1:-1] >= plain[1:-1]).all()
    assert headed[1] > plain[1] + 0.01
    assert headed[0] == plain[0]
    assert headed[-1] == 1


@pytest.mark.parametrize("mode", ["all", "agreement"])
def test_statistics_use_heads_for_the_final_norm_lens_only(tiny, mode):
    parts = tiny.anatomy
    residuals, inputs, texts, _ = read(tiny, random_texts(tiny, 2, 20))
    heads = {2: known_map(parts.width)}
    moved = residuals.clone()
    moved[2] = heads[2](residuals[2])
    plan = StatisticsPlan(mode=mode, heads=heads)
    headed = layer_statistics(parts, residuals, inputs, texts, plan)
    by_hand = layer_statistics(parts, moved, inputs, texts, StatisticsPlan(mode=mode))
    plain = layer_statistics(parts, residuals, inputs, texts, StatisticsPlan(mode=mode))
    for name, values in headed.items():
        assert torch.equal(values[0], by_hand[name][0])
        if mode == "all":
            assert torch.equal(values[1], plain[name][1])


def test_dtypes(tiny):
    head = known_map(8)
    residual = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    assert head(residual.bfloat16()).dtype == torch.bfloat16
    expected = residual + residual @ head.change.T + head.offset
    torch.testing.assert_close(head(residual), expected)
    torch.testing.assert_close(head.to("cpu", torch.float16)(residual), expected, atol=2e-2, rtol=1e-2)


def test_round_trip(tiny, tmp_path):
    heads = {layer: known_map(tiny.anatomy.width, layer) for layer in (1, 4)}
    save_heads(tmp_path / "heads.safetensors", heads)
    again = load_heads(tmp_path / "heads.safetensors", tiny.anatomy)
    assert list(again) == [1, 4]
    for layer, head in heads.items():
        assert torch.equal(again[layer].change, head.change)
        assert torch.equal(again[layer].offset, head.offset)


def test_files_that_are_not_heads(tiny, tiny_tied, tmp_path):
    path = tmp_path / "heads.safetensors"
    with pytest.raises(InputError, match="cannot be read as exit heads"):
        load_heads(path, tiny.anatomy)
    path.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="cannot be read as exit heads"):
        load_heads(path, tiny.anatomy)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="no file of exit heads"):
        load_heads(path, tiny.anatomy)
    save_heads(path, {1: known_map(tiny.anatomy.width)})
    with pytest.raises(InputError, match="36 wide; this model is 30 wide"):
        load_heads(path, tiny_tied.anatomy)
    save_heads(path, {5: known_map(tiny.anatomy.width)})
    with pytest.raises(InputError, match=r"exits 1\.\.4"):
        load_heads(path, tiny.anatomy)


def test_wrong_use(tiny):
    with pytest.raises(InputError, match=r"exits 1\.\.4"):
        HeadFit(tiny.anatomy, [0])
    with pytest.raises(InputError, match="no exit to fit"):
        HeadFit(tiny.anatomy, [])
    with pytest.raises(InputError, match="no rows"):
        HeadFit(tiny.anatomy, [1]).solve()
    with pytest.raises(InputError, match="the ridge must exceed 0"):
        HeadFit(tiny.anatomy, [1]).solve(ridge=0)
    with pytest.raises(InputError, match=r"\(width, width\)"):
        ExitHead(torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(InputError, match="not finite"):
        ExitHead(torch.full((2, 2), torch.nan), torch.zeros(2))
