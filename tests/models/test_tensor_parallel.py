"""A model that is split over processes by transformers' own plan: the trace and the rounds of one process."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tracing.jobs import job
from tracing.test_ranks import torchrun

import probekit
from probekit.costs.roofline import roofline_costs
from probekit.errors import InputError
from probekit.files import entries
from probekit.ranks import Ranks
from probekit.traces.trace import Trace

TEXTS = ["Once upon a time", "The king", "A fox and a hen"]
MODELS = ("tales-untied", "tales-tied")
ASKED = {"max_new_tokens": 8, "batch_size": 2}
WAYS = ({}, {"method": "self-speculative", "exit_layer": 4, "draft_length": 3})
SAMPLING = (probekit.Sampling(), probekit.Sampling(0.8, seed=3))


def decoded(loaded: probekit.Loaded) -> list[Any]:
    """Tokens and rounds of every way, greedy and sampled."""
    found = []
    for way in WAYS:
        for sampling in SAMPLING:
            text = probekit.decode(loaded, TEXTS[0], max_new_tokens=10, sampling=sampling, **way)
            found.append([list(text.tokens), list(text.drafted), list(text.accepted)])
    return found


def validated(loaded: probekit.Loaded, folder: Path, ranks: Ranks) -> list[Any]:
    """Counts and equalities of two cells, and every round that was run."""
    costs = roofline_costs(Trace.open(folder), device="h100")  # which need no measuring
    cells = probekit.validate(loaded, folder, [(4, 3), (8, 2)], limit=2, costs=costs, ranks=ranks).cells
    return [[cell.measured, cell.rounds_equal, cell.tokens_equal, list(map(list, cell.rounds))] for cell in cells]


def in_step(ranks: Ranks, folder: Path, settings: dict[str, Any]) -> None:
    """What each process of a job does with a model that it shares; its answer goes beside the run."""
    os.environ["LOCAL_RANK"] = str(ranks.rank)
    loaded = probekit.load(settings["model"], tensor_parallel=True)
    parts = loaded.anatomy
    probekit.trace(loaded, TEXTS, folder, ranks=replace(ranks, in_step=True), **ASKED)
    seen = [parts.split_over, parts.parameters, parts.bytes, parts.tied, parts.plain_head]
    said = [seen, decoded(loaded), validated(loaded, folder, replace(ranks, in_step=True))]
    folder.with_suffix(f".step-{ranks.rank}").write_text(json.dumps(said))


@pytest.mark.second
@pytest.mark.parametrize("name", MODELS)
def test_processes_that_share_a_model_read_and_decode_as_one(name, tmp_path) -> None:
    folder = tmp_path / "run"
    assert job(2, folder, {"model": name}, work=in_step) == [0, 0]
    loaded = probekit.load(name, device="cpu")
    one, split = probekit.trace(loaded, TEXTS, **ASKED), Trace.open(folder)
    assert split.tokens.equals(one.tokens)
    assert split.manifest.plan == one.manifest.plan
    assert split.manifest.model == one.manifest.model
    for column in ("argmax", "agrees", "rank", "near_tie"):
        assert (split.layers[column] == one.layers[column]).mean() > 0.999, column
    for column in ("entropy", "kl", "log_probability"):
        np.testing.assert_allclose(split.layers[column], one.layers[column], atol=1e-4)
    assert {path.suffix for path in entries(folder)} == {".parquet", ".json"}
    parts = loaded.anatomy
    for rank in range(2):
        seen, rounds, cells = json.loads(folder.with_suffix(f".step-{rank}").read_text())
        assert seen[1:4] == [parts.parameters, parts.bytes, parts.tied]
        assert (seen[0], seen[4]) == (2, False)
        assert rounds == decoded(loaded)
        assert cells == json.loads(json.dumps(validated(loaded, folder, Ranks())))
        assert all(cell[1:3] == [True, True] for cell in cells)


@pytest.mark.long
@pytest.mark.second
def test_commands_of_a_split_model_print_once(tmp_path) -> None:
    words = ["decode", "tales-untied", TEXTS[0], "--max-new-tokens", "6", "--json"]
    ran = torchrun(2, *words, "--tensor-parallel")
    assert ran.returncode == 0, ran.stderr
    alone = probekit.decode(probekit.load("tales-untied", device="cpu"), TEXTS[0], max_new_tokens=6)
    assert json.loads(ran.stdout)["text"] == alone.text
    probekit.trace("tales-untied", TEXTS, tmp_path / "run", max_new_tokens=6)
    words = ["validate", str(tmp_path / "run"), "--exit-layers", "4", "--draft-lengths", "1,3", "--json"]
    ran = torchrun(2, *words, "--tensor-parallel")  # the run of one process, decoded by two that share the model
    assert ran.returncode == 0, ran.stderr
    assert [cell["rounds_equal"] for cell in json.loads(ran.stdout)["cells"]] == [True, True]


def test_one_process_splits_nothing(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="this is one alone"):
        probekit.load("tales-tied", tensor_parallel=True)
    with pytest.raises(InputError, match="either dealt out by a device map or split"):
        probekit.load("tales-tied", tensor_parallel=True, device_map="auto")
