import pytest

from probekit.drafting.policies import ConfidenceThreshold, FixedLength
from probekit.errors import InputError


def test_a_fixed_length_never_stops_early_and_is_exact():
    policy = FixedLength()
    assert policy.keep_drafting(1, 0.0)
    assert policy.exact
    assert not policy.needs_confidence


def test_a_threshold_stops_behind_an_unsure_draft_and_is_estimated():
    policy = ConfidenceThreshold(0.4)
    assert policy.keep_drafting(1, 0.4)
    assert not policy.keep_drafting(1, 0.39)
    assert not policy.exact


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_impossible_thresholds_are_refused(threshold):
    with pytest.raises(InputError, match=r"threshold must lie in \[0, 1\]"):
        ConfidenceThreshold(threshold)
