"""Probes and their policies on real models of three families: replay and decoder agree, and nothing is changed."""

from __future__ import annotations

import pytest
import torch
from conftest import load_real_model

from probekit.costs.roofline import roofline_costs
from probekit.probing.acceptance import compare_policies
from probekit.probing.linear_answer import linear_answer
from probekit.probing.probe import probe
from probekit.settings import KeptResiduals
from probekit.tracing.prompts import bundled_prompts_for
from probekit.tracing.tracer import trace
from probekit.validation.ways import validate_ways


@pytest.mark.long
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_probe_and_its_policy(name, tmp_path):
    loaded = load_real_model(name)
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    depth = loaded.depth
    kept = KeptResiduals((depth // 3, 2 * depth // 3, depth), rows="scored")
    run = trace(loaded, bundled_prompts_for(loaded.name)[:8], tmp_path / "run", max_new_tokens=24, keep_residuals=kept)
    curve = probe(run, "agrees", shuffles=6)
    for each in curve.layers[:-1]:
        assert each.score.known is not None and each.control.low < 0.5 < each.control.high
    table = linear_answer(loaded, run)
    assert set(table["kind"]) == {"lens", "probe", "control"}
    costs = roofline_costs(run, device="h200", context=128)
    found = compare_policies(run, costs, run.prompts[::2], run.prompts[1::2], draft_lengths=range(1, 5))
    checked = validate_ways(loaded, run.select(run.prompts[1::2]), [each.learned for each in found])
    assert checked.holds and all(each.rounds_equal or each.near_ties for each in checked.ways)
    assert all(each.tokens_equal or each.near_ties for each in checked.ways)
    assert all(torch.equal(before[key], value) for key, value in loaded.model.state_dict().items())
