"""A study decodes with the number of CPU threads that is fastest for its model, and gives torch's back."""

from __future__ import annotations

import json

import pytest
import torch

from probekit.study.phases import ModelStudy, settle_threads
from probekit.study.plan import StudyPlan
from probekit.study.run import _own_threads
from probekit.tracing.prompts import Prompt


@pytest.fixture
def study(tiny, tmp_path):
    plan = StudyPlan(("tiny",), tmp_path, None, 8, (1,), None, False, "cpu", None)
    return ModelStudy(plan, "tiny", "tiny", [Prompt(0, "abc")], lambda *_, **__: None, loaded=tiny)


def test_the_fastest_number_is_kept_and_taken_again(study, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with _own_threads():
        torch.set_num_threads(2)
        settle_threads(study)
        kept = json.loads(study.kept("threads").read_text())
        assert set(kept["seconds_per_token"]) == {"1", "2"}
        assert kept["seconds_per_token"][str(kept["threads"])] == min(kept["seconds_per_token"].values())
        assert torch.get_num_threads() == kept["threads"]
        study.kept("threads").write_text(json.dumps({**kept, "threads": 1}))
        torch.set_num_threads(2)
        settle_threads(study)
        assert torch.get_num_threads() == 1, "a resumed study goes on with the number that it began with"


def test_threads_that_were_asked_for_stay(study, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with _own_threads():
        torch.set_num_threads(2)
        settle_threads(study)
        assert torch.get_num_threads() == 2
    assert not study.kept("threads").exists()


def test_they_come_back_also_after_an_exception():
    before = torch.get_num_threads()

    def interrupted():
        with _own_threads():
            torch.set_num_threads(before + 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.get_num_threads() == before
