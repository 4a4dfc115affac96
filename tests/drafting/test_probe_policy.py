"""A probe as a policy: one figure in a trace and in a decoder, files, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from probekit.choice.rank import STOPPING, rank
from probekit.costs.roofline import roofline_costs
from probekit.decoding.speculative import SelfSpeculative, Speculative
from probekit.drafting.drafters import ExitLayer, allowed_by
from probekit.drafting.policies import ResidualPolicy, policy_named
from probekit.drafting.probe_policy import ProbeThreshold, read_probe_policy
from probekit.drafting.tree_drafters import TreeDrafts
from probekit.drafting.trees import TreeShape
from probekit.drafting.ways import Way
from probekit.errors import InputError
from probekit.prediction.replay import replay
from probekit.settings import KeptResiduals, Sampling
from probekit.tracing.tracer import trace
from probekit.validation.ways import validate_ways

PROMPTS = [[index + 1, 2 * index + 3, 5] for index in range(8)]


@pytest.fixture(scope="module")
def run(any_tiny_once, tmp_path_factory):
    return trace(any_tiny_once, PROMPTS, tmp_path_factory.mktemp("policy") / "run", max_new_tokens=24,
                 keep_residuals=KeptResiduals(None, rows="scored"))  # fmt: skip


@pytest.fixture(scope="module", params=["untied", "tied"])
def any_tiny_once(request, tiny, tiny_tied):
    return tiny if request.param == "untied" else tiny_tied


def policies(run):
    """Of random probes that let through about half of the drafts."""
    width, random = run.manifest.model.width, np.random.default_rng(2)
    for exit_layer in (1, 2, 3):
        x = run.residuals(exit_layer).numpy()
        weights = random.normal(size=width)
        middle = float(np.median(x @ weights))
        scale = float(np.std(x @ weights))
        yield ProbeThreshold(exit_layer, weights / scale, -middle / scale, 0.5)


def test_rounds_are_those_of_the_decoder(any_tiny_once, run):
    """In every round: where it starts, how much is accepted; and drafts stop where the trace says they do."""
    chosen = list(policies(run))
    ways = [Way((ExitLayer(each.exit_layer),), 5, each, "probe") for each in chosen]
    found = validate_ways(any_tiny_once, run, ways)
    assert found.holds and all(each.rounds_equal and each.tokens_equal for each in found.ways)
    lengths = np.concatenate([each.length for way in ways for each in replay(run, way).rounds])
    assert len(np.unique(lengths)) > 2  # the policy did stop some rounds and not others


def test_batches_decode_as_rows_alone(any_tiny_once, run):
    policy = next(policies(run))
    decoder = SelfSpeculative(any_tiny_once, policy.exit_layer, 5, policy=policy)
    together = decoder.decode(PROMPTS, max_new_tokens=24)
    for prompt, batched in zip(PROMPTS, together, strict=True):
        alone = decoder.decode([prompt], max_new_tokens=24)[0]
        assert alone.tokens == batched.tokens and alone.drafted == batched.drafted
    sampled = decoder.decode(PROMPTS[:2], max_new_tokens=12, sampling=Sampling(temperature=1.0))
    assert max(max(each.drafted) for each in sampled) <= 5


def test_what_it_allows_by_hand(run):
    policy = next(policies(run))
    exit_layer = ExitLayer(policy.exit_layer)
    allowed = allowed_by(policy, exit_layer, run, 3, 4)
    sure = policy.of_residuals(run.residuals_of(3, policy.exit_layer)) >= 0.5
    for start in range(len(sure)):
        expected = 4
        for drafted in range(1, 4):
            if start + drafted - 1 >= len(sure):
                break
            if not sure[start + drafted - 1]:
                expected = drafted
                break
        assert allowed[start] == expected
    assert (allowed == allowed_by(policy, exit_layer, run.select([3]), 3, 4)).all()


def test_arrays_and_tensors_give_one_figure(run):
    policy = next(policies(run))
    x = run.residuals_of(0, policy.exit_layer)
    assert np.allclose(policy.of_residuals(x), policy.of_residuals(torch.from_numpy(x)).numpy(), atol=1e-12)
    assert np.isclose(policy.of_residuals(x)[2], 1 / (1 + np.exp(-(x[2] @ policy.weights + policy.offset))))
    assert isinstance(policy, ResidualPolicy)
    with pytest.raises(InputError, match="wide, not 3"):
        policy.of_residuals(np.zeros((2, 3)))


def test_files(run, tmp_path):
    policy = next(policies(run))
    path = policy.at(0.25).save(tmp_path / "policy.json")
    again = read_probe_policy(path)
    assert np.array_equal(again.weights, policy.weights) and again.offset == policy.offset and again.threshold == 0.25
    assert policy_named(f"probe:{path}").threshold == 0.25 and policy_named(f"probe:{path}:0.75").threshold == 0.75
    path.write_text("{}")
    with pytest.raises(InputError, match="no policy of a probe"):
        policy_named(f"probe:{path}")
    with pytest.raises(InputError, match="names no file"):
        policy_named("probe:0.5")
    with pytest.raises(InputError, match=r"there are fixed, .*, probe"):
        policy_named("probes")


def test_what_is_refused(any_tiny_once, run, tmp_path):
    policy = next(policies(run))
    with pytest.raises(InputError, match="reads the residuals of exit layer 1, and layer 2 drafts"):
        Way((ExitLayer(2),), 3, policy)
    with pytest.raises(InputError, match="reads the residuals"):
        Speculative(any_tiny_once, ExitLayer(2), 3, policy=policy)
    with pytest.raises(InputError, match="reads the residuals"):
        Way((TreeDrafts(ExitLayer(1), TreeShape.of_widths((2, 1))),), 2, policy)
    way = Way((ExitLayer(1),), 3, policy, "probe")
    for more, says in (({"share": 0.5}, "kept the residuals of"), ({"dtype": "float16"}, "as float16"), ({}, None)):
        layers = (1,) if more else ()
        other = trace(any_tiny_once, PROMPTS[:2], tmp_path / str(len(more) and next(iter(more))), max_new_tokens=24,
                      keep_residuals=KeptResiduals(layers, **more))  # fmt: skip
        with pytest.raises(InputError, match=says or "no residuals of layer 1"):
            replay(other, way)
    for wrong in ({"threshold": 1.5}, {"weights": np.zeros((2, 2))}, {"weights": np.array([np.nan])}):
        with pytest.raises(InputError):
            replace(policy, **wrong)


def test_it_is_ranked_at_its_own_exit_and_run(any_tiny_once, run):
    """Beside the other policies, which are tried at every exit."""
    policy = list(policies(run))[1]
    costs = roofline_costs(run, device="h100")
    ranking = rank(run, costs, draft_lengths=[3], policies={**STOPPING, "probe": policy}, learn=False, shapes=())
    ways = [each for each in ranking.ways if each.policy == "probe"]
    assert [each.way.keys[0].exit_layer for each in ways] == [2]
    assert validate_ways(any_tiny_once, run, [ways[0].way]).ways[0].rounds_equal
    without = rank(run, costs, [1, 3], [3], policies={"probe": policy}, learn=False, shapes=())
    assert "probe" not in {each.policy for each in without.ways}
