"""What other packages find in the same stream: the kept records, and the comparison itself where a package is here.

`analyses/probing_peers.py` makes the records; tuned-lens and TransformerLens have environments of their own.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "results" / "trust" / "peers"
PAGE = ROOT / "docs" / "how-to" / "residuals.md"
RECORDS = sorted(KEPT.glob("*.json"))


def scripts(name: str, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "analyses"))
    return importlib.import_module(name)


def noise(compared: dict) -> dict[str, float]:
    """Each kind's largest difference, relative to the largest number that was compared."""
    if "activation patching" not in compared:
        return {kind: each["largest_difference"] / each["largest_logit"] for kind, each in compared.items()}
    patches, shares = compared["activation patching"], compared["attribution"]
    return {
        "activation patching": patches["largest_difference"]
        / max(each["largest_change"] for each in patches.values() if isinstance(each, dict)),
        "attribution": shares["largest_difference"] / shares["largest_share"],
        "jacobian lens": compared["jacobian lens"]["largest_relative_difference"],
    }


def test_both_packages_were_held_against():
    records = [json.loads(path.read_text(encoding="utf-8")) for path in RECORDS]
    real = {
        "tuned-lens": {"SmolLM2-135M-Instruct.Q4_1"},
        "transformer-lens": {"SmolLM2-135M-Instruct.Q4_1", "gemma-3-270m.Q4_K_M"},  # two families
    }
    for package, published in real.items():
        models = {record["model"] for record in records if record["package"] == package}
        assert {"tales-untied", "tales-tied", *published} <= models


@pytest.mark.parametrize("path", RECORDS, ids=[path.stem for path in RECORDS])
def test_a_kept_difference_is_float32_noise_and_stands_on_the_page(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["dtype"] == "float32" and record["versions"][record["package"]]
    assert max(noise(record["compared"]).values()) < 1e-4
    page = PAGE.read_text(encoding="utf-8")
    name = record["model"].partition(".Q")[0]
    compared = record["compared"]
    if record["package"] == "tuned-lens":
        assert all(each["same_top_token"] for each in compared.values())
        figures = [max(each["largest_difference"] for each in compared.values())]
    else:
        figures = [compared["activation patching"]["largest_difference"], compared["attribution"]["largest_difference"],
                   compared["jacobian lens"]["largest_relative_difference"]]  # fmt: skip
    row = re.search(rf"^\| `{re.escape(name)}` \|.*$", page, re.MULTILINE)
    assert row is not None, f"{name} is not on the page"
    assert all(f" {figure:.1e} " in row[0] for figure in figures), (figures, row[0])


def test_the_page_says_how_much_the_patches_changed():
    changed = {}
    for name in ("SmolLM2-135M-Instruct.Q4_1", "tales-untied"):
        record = json.loads((KEPT / f"transformer-lens-{name}.json").read_text(encoding="utf-8"))
        patches = record["compared"]["activation patching"]
        changed[name] = max(each["largest_change"] for each in patches.values() if isinstance(each, dict))
    large, small = changed.values()
    said = f"by up to {large:.1f}, those of `tales-untied` by {small:.2f}"
    assert said in PAGE.read_text(encoding="utf-8")


@pytest.mark.second
def test_lenses_of_the_package_tuned_lens(monkeypatch, tiny):
    pytest.importorskip("tuned_lens", reason="pip install tuned-lens, in an environment of its own")
    found = scripts("probing_peers", monkeypatch).with_tuned_lens(tiny)
    assert all(each["same_top_token"] for each in found.values()) and max(noise(found).values()) < 1e-5


@pytest.mark.second
def test_what_transformer_lens_finds(monkeypatch):
    pytest.importorskip("transformer_lens", reason="pip install 'probekit[bench]'")
    from probekit.models.loaded import load

    found = scripts("probing_peers", monkeypatch).with_transformer_lens(load("tales-untied", device="cpu"))
    assert max(noise(found).values()) < 1e-4
