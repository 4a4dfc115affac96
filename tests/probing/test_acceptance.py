"""The acceptance probe as a policy, chosen on some prompts and judged on others; and what a linear map knows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from probekit.choice.rank import priced
from probekit.costs.roofline import roofline_costs
from probekit.drafting.policies import looks_at
from probekit.errors import InputError
from probekit.lens.lens import Lens
from probekit.models.loaded import load
from probekit.probing import linear_answer as room
from probekit.probing.acceptance import acceptance_policy, compare_policies
from probekit.probing.labels import accepted
from probekit.probing.linear_answer import linear_answer
from probekit.probing.probe import deal
from probekit.settings import KeptResiduals
from probekit.tracing.prompts import bundled_prompts_for
from probekit.tracing.tracer import trace
from probekit.validation.ways import validate_ways


@pytest.fixture(scope="module")
def tales():
    return load("tales-layerskip", device="cpu")


@pytest.fixture(scope="module")
def run(tales, tmp_path_factory):
    kept = KeptResiduals((1, 3, 6, tales.depth), rows="scored")
    folder = tmp_path_factory.mktemp("acceptance") / "run"
    return trace(tales, bundled_prompts_for(tales.name)[:12], folder, max_new_tokens=32, keep_residuals=kept)


@pytest.mark.second
def test_policies_are_chosen_on_some_prompts_and_judged_on_others(tales, run):
    """The chosen ways run as predicted, on prompts that nothing was learned on; the model comes back untouched."""
    before = {name: value.clone() for name, value in tales.model.state_dict().items()}
    costs = roofline_costs(run, device="h200", dtype="float32", context=128)
    found = compare_policies(run, costs, run.prompts[::2], run.prompts[1::2])
    assert [each.name for each in found] == ["fixed", "confidence", "entropy", "margin", "probe"]
    others = run.select(run.prompts[1::2])
    for each in found:
        assert each.judged.speedup == priced(others, each.learned, costs).speedup
        assert len(each.judged.seconds_of_prompt) == 6
    checked = validate_ways(tales, others, [each.learned for each in found])
    assert checked.holds and all(each.rounds_equal and each.tokens_equal for each in checked.ways)
    assert looks_at(found[3].learned.policy) == "margin"
    assert all(torch.equal(before[name], value) for name, value in tales.model.state_dict().items())
    with pytest.raises(InputError, match="not judged on"):
        compare_policies(run, costs, run.prompts[:6], run.prompts[5:])
    with pytest.raises(InputError, match="learned on 4"):
        compare_policies(run, costs, run.prompts[:2], run.prompts[5:])


def test_a_policy_is_the_probe_it_was_made_of(run):
    """Its figure tells accepted drafts of the prompts that it was fitted on from the others."""
    policy = acceptance_policy(run, 3, threshold=0.4, grid={"C": [0.1]})
    assert policy.threshold == 0.4 and policy.model == "tales-layerskip"
    sure = np.concatenate([policy.of_residuals(run.residuals_of(prompt, 3)) for prompt in run.prompts])
    right = np.concatenate([run.agreement(prompt)[3] for prompt in run.prompts])
    assert sure[right].mean() > sure[~right].mean() + 0.1
    assert abs(sure.mean() - right.mean()) < 0.02  # a logistic probe is calibrated where it was fitted


@pytest.mark.second
def test_an_exit_that_is_always_right_needs_no_probe(run, monkeypatch):
    always = {1, 3}
    monkeypatch.setattr(
        "probekit.probing.acceptance.accepted",
        lambda trace, rows, layer: accepted(trace, rows, layer) | (layer in always),
    )
    with pytest.raises(InputError, match="nothing to tell apart"):
        acceptance_policy(run, 1)
    costs = roofline_costs(run, device="h200", dtype="float32", context=128)
    found = {each.name: each for each in compare_policies(run, costs, run.prompts[::2], run.prompts[1::2])}
    assert found["probe"].learned.keys[0].exit_layer == 6
    always.add(6)
    assert "probe" not in {each.name for each in compare_policies(run, costs, run.prompts[::2], run.prompts[1::2])}


def test_the_linear_answer_by_hand(tales, run, monkeypatch):
    monkeypatch.setattr(room, "ALPHAS", (1e3,))
    found = linear_answer(tales, run, [3]).set_index("kind")
    x, target = (run.residuals(layer).numpy() for layer in (3, tales.depth))
    frame = run.residuals(3).frame
    fold = np.array([deal(run.prompts, 4, 0)[each] for each in frame["prompt"]])
    foretold = np.empty_like(target)
    for each in range(4):
        ridge = make_pipeline(StandardScaler(), Ridge(alpha=1e3)).fit(x[fold != each], target[fold != each])
        foretold[fold == each] = ridge.predict(x[fold == each])
    lens = Lens(tales.anatomy)
    with torch.no_grad():
        said = lens(torch.from_numpy(foretold), tales.depth).argmax(-1).numpy()
    answers = [run.outputs(prompt)[at] for prompt, at in zip(frame["prompt"], frame["output"], strict=True)]
    assert found.loc["probe", "value"] == pytest.approx((said == answers).mean(), abs=0.003)
    assert found.loc["lens", "value"] == np.concatenate([run.agreement(p)[3] for p in run.prompts]).mean()
    assert found.loc["control", "value"] < found.loc["probe", "value"]
    with pytest.raises(InputError, match="no residuals of layer 5"):
        linear_answer(tales, run, [5])
    with pytest.raises(InputError, match="needs 4"):
        linear_answer(tales, run.select(run.prompts[:2]))
