"""A study decodes with the number of CPU threads that is fastest for its model, and gives torch's back."""

from __future__ import annotations

import json

import pytest
import torch

from probekit.kept import Kept, sealed
from probekit.study import phases
from probekit.study.phases import own_threads, settle_threads
from probekit.tracing.prompts import Prompt


@pytest.fixture
def study(tiny, tmp_path):
    return tiny, Prompt(0, "abc"), Kept(tmp_path, "made with these settings")


def test_the_fastest_number_is_kept_and_taken_again(study, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(phases, "THREAD_TOKENS", 3)
    monkeypatch.setattr(phases, "THREAD_TURNS", 1)
    with own_threads():
        torch.set_num_threads(2)
        settle_threads(*study)
        path = study[-1].path("threads")
        kept = json.loads(path.read_text())["made"]
        assert set(kept["seconds_per_token"]) == {"1", "2"}
        assert kept["seconds_per_token"][str(kept["threads"])] == min(kept["seconds_per_token"].values())
        assert torch.get_num_threads() == kept["threads"]
        for threads in (1, 2):  # of which one was not the fastest
            path.write_text(sealed(study[-1].digest, json.dumps({**kept, "threads": threads})))
            torch.set_num_threads(2)
            settle_threads(*study)
            assert torch.get_num_threads() == threads, "a resumed study goes on with the number that it began with"


def test_threads_that_were_asked_for_stay(study, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with own_threads():
        torch.set_num_threads(2)
        settle_threads(*study)
        assert torch.get_num_threads() == 2
    assert not study[-1].path("threads").exists()


def test_they_come_back_also_after_an_exception():
    before = torch.get_num_threads()

    def interrupted():
        with own_threads():
            torch.set_num_threads(before + 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.get_num_threads() == before


def test_what_was_made_with_other_settings_or_is_damaged_is_made_again(tmp_path):
    calls = []

    def make():
        calls.append(None)
        return {"number": len(calls)}

    kept = Kept(tmp_path / "phases", "one")
    assert kept.once("costs", make) == kept.once("costs", make) == {"number": 1}
    assert Kept(tmp_path / "phases", "other").once("costs", make) == {"number": 2}
    kept.path("costs").write_text('{"digest": "other", "ma')
    assert kept.once("costs", make) == {"number": 3}
