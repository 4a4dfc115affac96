"""The bundled models tell three different, true stories, and their figures are held here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import probekit
from probekit.models.loaded import load
from probekit.models.shipped import DRAFT, TALES, bundled_models
from probekit.prediction.predict import predict
from probekit.prediction.rounds import rounds_of
from probekit.presentation.tables import layers_table
from probekit.tracing.prompts import bundled_prompts
from probekit.validation.run import validate
from probekit.validation.transformers import transformers_accepted

pytestmark = pytest.mark.second

NAMES = (*TALES, DRAFT)
LENGTHS = range(1, 9)


@pytest.fixture(scope="module")
def traces():
    """Each tales model on its 24 prompts, as the study traces them."""
    return {name: probekit.trace(load(name), max_new_tokens=96) for name in TALES}


@pytest.fixture(scope="module")
def layers(traces):
    """{model: a row a layer, final-norm lens}."""
    tables = {name: layers_table(trace) for name, trace in traces.items()}
    return {name: table[table["lens"] == "final-norm"].set_index("layer") for name, table in tables.items()}


def records() -> dict[str, dict]:
    return {model.name: json.loads((model.path / "training.json").read_text()) for model in bundled_models()}


def test_four_models_ship():
    assert {model.name for model in bundled_models()} == set(NAMES)
    for name, record in records().items():
        assert record["name"] == name


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_them_unaided(name):
    path = next(model.path for model in bundled_models() if model.name == name)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer.decode(tokenizer("Once upon a time")["input_ids"]) == "Once upon a time"
    weights = path / "model.safetensors"
    assert weights.stat().st_size <= 8 * 2**20
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == records()[name]["weights_sha256"]
    card = (path / "README.md").read_text()
    assert all(
        word in card for word in ("Data", "Recipe", "Licence", "Held-out loss", records()[name]["weights_sha256"])
    )


def test_they_differ_in_one_thing_each():
    tied = {name: load(name).anatomy.tied for name in NAMES}
    assert tied == {"tales-untied": False, "tales-tied": True, "tales-layerskip": False, "tales-draft": False}
    untied, tied_model = load("tales-untied").anatomy, load("tales-tied").anatomy
    assert untied.parameters - tied_model.parameters == untied.vocabulary * untied.width
    shared = ("steps", "tokens_seen", "seed", "optimiser", "precision", "corpus_sha256")
    found = records()
    for key in shared:
        assert len({json.dumps(found[name][key]) for name in NAMES}) == 1, key
    assert [found[name]["recipe"] is None for name in TALES] == [True, True, False]


def test_the_last_layers_are_equally_good():
    losses = [records()[name]["held_out"]["loss_by_site"][-1] for name in TALES]
    assert max(losses) - min(losses) <= 0.15
    assert max(losses) < 3.8


def test_the_tied_embedding_echoes_and_the_untied_does_not(layers):
    assert layers["tales-tied"].loc[0, "echo"] > 0.5
    assert layers["tales-untied"].loc[0, "echo"] < 0.1


def test_early_exit_training_doubles_early_agreement(layers):
    third = 4
    assert layers["tales-layerskip"].loc[third, "agreement"] >= 2 * layers["tales-untied"].loc[third, "agreement"]


def ends_in_a_loop(tokens: Sequence[int], window: int = 24) -> bool:
    """Whether the last `window` tokens only repeat themselves, with any period up to half of it."""
    return any(
        all(tokens[-place] == tokens[-place - period] for place in range(1, window - period + 1))
        for period in range(1, window // 2 + 1)
    )


def test_ends_in_a_loop():
    assert ends_in_a_loop([9, 8, *[1, 2, 3] * 8])
    assert not ends_in_a_loop(list(range(30)))


def test_half_of_the_continuations_are_no_loops(traces):
    """A loop: a text that ends in repeating itself. (How much of each text repeats itself is reported as `looped`.)"""
    for name, trace in traces.items():
        loops = [ends_in_a_loop(trace.outputs(prompt).tolist()) for prompt in trace.prompts]
        assert np.mean(loops) <= 0.5, name


def check_against_transformers(loaded, trace, exits, lengths, prompts) -> int:
    """Every round of every cell; returns how many texts part at a near-tie."""
    parted = 0
    for prompt in prompts:
        agreement, text = trace.agreement(prompt), trace.outputs(prompt).tolist()
        ties = trace.near_ties(prompt)
        for exit_layer in exits:
            for length in lengths:
                expected = rounds_of(agreement[exit_layer], length, trace.manifest.settings.max_new_tokens, "draft")
                found = transformers_accepted(
                    loaded,
                    trace.prompt_ids(prompt).tolist(),
                    exit_layer,
                    length,
                    trace.manifest.settings.max_new_tokens,
                )
                if found.tokens == text and found.accepted == expected.accepted.tolist():
                    continue
                assert ties[[exit_layer, -1]].any(), (prompt, exit_layer, length)
                parted += 1
    return parted


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name != "tales-tied")) for name in TALES]
)
def test_some_cells_on_the_running_decoders(name, traces):
    loaded, trace = load(name), traces[name]
    some = trace.select([0, 1])
    validation = validate(loaded, some, exit_layers=[1, 4, 8, 11], draft_lengths=[1, 3, 8])
    assert validation.holds
    assert check_against_transformers(loaded, trace, [4, 8], [2], [0]) <= 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_16_bits_every_difference_is_a_near_tie(dtype):
    loaded = load("tales-tied", dtype=dtype)
    trace = probekit.trace(loaded, bundled_prompts("tales")[:2], max_new_tokens=32)
    validation = validate(loaded, trace, exit_layers=[3, 9], draft_lengths=[2, 5])
    assert validation.holds
    assert all((cell.rounds_equal and cell.tokens_equal) or cell.ties for cell in validation.cells)


@pytest.mark.parametrize("name", NAMES)
def test_nnsight_reads_the_same_numbers(name):
    loaded = load(name)
    texts = bundled_prompts("tales")[:2]
    hooks, nnsight = (probekit.trace(loaded, texts, max_new_tokens=8, backend=each) for each in ("hooks", "nnsight"))
    pd.testing.assert_frame_equal(hooks.layers, nnsight.layers)
    pd.testing.assert_frame_equal(hooks.tokens, nnsight.tokens)


@pytest.mark.long
@pytest.mark.parametrize("name", TALES)
def test_every_cell_on_the_running_decoders(name, traces):
    """All 11 exits x 8 draft lengths: our decoder on every prompt, transformers' on two."""
    loaded, trace = load(name), traces[name]
    validation = validate(loaded, trace)
    assert len(validation.cells) == 88
    assert validation.holds
    assert all(cell.rounds_equal or cell.ties for cell in validation.cells)
    assert check_against_transformers(loaded, trace, range(1, 12), LENGTHS, [0, 1]) <= 8


def test_the_drafter_is_predicted_too():
    loaded, drafter = load("tales-untied"), load(DRAFT)
    trace = probekit.trace(loaded, bundled_prompts("tales")[:2], max_new_tokens=32, draft_model=drafter)
    assert any(cell.exit_layer is None for cell in predict(trace).cells)
    assert validate(loaded, trace, [(None, 2), (None, 5)], drafter=drafter).holds
