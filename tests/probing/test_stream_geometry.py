"""The stream's geometry: by hand, adding up, invariant where it should be, and of families without components."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.stats import spearmanr

from probekit.errors import InputError
from probekit.hooks.sites import open_hooks
from probekit.probing.stream_geometry import _basis, _gram, debiased_cka, spearman, stream_geometry
from probekit.tracing.tracer import trace
from tests.models.test_families import small

PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [11, 3], [12, 2, 5]]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("geometry") / "run"
    return trace(tiny, PROMPTS, folder, max_new_tokens=20, keep_residuals=range(6))


@pytest.fixture(scope="module")
def found(tiny, run):
    return stream_geometry(tiny, run, directions=3)


def test_it_is_what_the_kept_residuals_say(run, found):
    h = np.stack([run.residuals(layer).scored().numpy() for layer in range(6)]).astype(np.float64)
    length = np.linalg.norm(h, axis=-1)

    def cosine(one, other):
        return (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)

    def directions(rows):
        return np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:3].T

    expected = {
        "norm": length.mean(1),
        "step": np.r_[np.nan, (np.linalg.norm(np.diff(h, axis=0), axis=-1) / length[:-1]).mean(1)],
        "cosine": np.r_[np.nan, cosine(h[1:], h[:-1]).mean(1)],
        "final_cosine": cosine(h, h[-1:]).mean(1),
        "embedding": ((h[:1] * h).sum(-1) / length**2).mean(1),
        "overlap": [(np.cos(subspace_angles(directions(each), directions(h[-1]))) ** 2).mean() for each in h],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found.of(name)["value"], values, atol=2e-5, err_msg=name)
    assert found.positions == h.shape[1] and found.chance == 3 / h.shape[2]
    agreed = np.concatenate([run.agreement(prompt) for prompt in run.prompts], axis=1).mean(1)
    np.testing.assert_allclose(found.of("agreement")["value"], agreed)
    related = found.with_acceptance().set_index("quantity")
    assert related.loc["norm", "correlation"] == pytest.approx(spearmanr(length.mean(1)[1:-1], agreed[1:-1]).statistic)


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3_text", "granite"])
def test_what_was_written_adds_up(name, unchanged):
    """Parallel branches, norms behind them, learned positions: embedding, attention and MLPs are the whole stream."""
    loaded = small(name)
    unchanged(loaded.model)
    run = trace(loaded, PROMPTS[:3], max_new_tokens=8)
    table = stream_geometry(loaded, run, directions=2).to_pandas()
    np.testing.assert_allclose(table[["embedding", "attention", "mlp"]].sum(axis=1), 1, atol=1e-4)
    assert table["final_cosine"].iloc[-1] == pytest.approx(1) and table["cka"].iloc[-1] == pytest.approx(1)
    assert open_hooks(loaded.model) == []


def test_cka_does_not_see_a_rotation_and_is_0_for_unrelated_rows():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 60, generator=random, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(60, 60, generator=random, dtype=torch.float64)).Q
    assert debiased_cka(_gram(x), _gram(3 * x @ turn + 7)) == pytest.approx(1)
    assert torch.linalg.svdvals(_basis(x, 4).T @ _basis(3 * x + 7, 4)).min() == pytest.approx(1)
    others = [torch.randn(40, 60, generator=random, dtype=torch.float64) for _ in range(20)]
    values = [debiased_cka(_gram(x), _gram(each)) for each in others]
    assert abs(np.mean(values)) < 0.03  # the plain one is above .5 here
    plain = [(x.T @ y).norm() ** 2 / (x.T @ x).norm() / (y.T @ y).norm() for y in others]
    assert np.mean(plain) > 0.5
    assert np.isnan(debiased_cka(torch.zeros(5, 5), _gram(x[:5])))


def test_fewer_rows_are_a_sample(tiny, run, found):
    some = stream_geometry(tiny, run, rows=30, directions=3)
    assert some.of("norm").equals(found.of("norm")) and some.positions == found.positions
    assert not some.of("cka").equals(found.of("cka"))
    assert np.abs(some.of("cka")["value"] - found.of("cka")["value"]).max() < 0.3


def test_documents(found):
    document = json.loads(json.dumps(found.to_json()))
    assert [each["layer"] for each in document["layers"]] == list(range(6))
    assert document["layers"][0]["cosine"] is None and len(document["layers"][1]["norm_interval"]) == 2
    assert {each["quantity"] for each in document["with_acceptance"]} >= {"norm", "cka"}
    assert "final_cosine" in found._repr_html_()
    assert np.isnan(spearman(np.ones(4), np.arange(4))) and spearman(np.arange(4), -np.arange(4)) == -1


def test_what_is_refused(tiny, tiny_tied, run, found):
    with pytest.raises(InputError, match="another model"):
        stream_geometry(tiny_tied, run)
    with pytest.raises(InputError, match="directions cannot be told"):
        stream_geometry(tiny, run, directions=40)
    with pytest.raises(InputError, match="no 'colour' in this geometry"):
        found.of("colour")
