"""A model that has changed since it was read is refused at every door, and never silently misread."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import probekit
from probekit.costs.roofline import roofline_costs
from probekit.decoding.engine import Engine
from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.hooks.edit import Edit
from probekit.hooks.stop_resume import Resume, Stop
from probekit.lens.exit_heads import fit_heads
from probekit.lens.lens import Lens
from probekit.models.anatomy import anatomy
from probekit.models.families import FAMILIES
from probekit.models.loaded import describe
from probekit.models.synthetic import synthetic
from probekit.tying.geometry import geometry_table

IDS = [5, 9, 17]


def fewer_layers(model):
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3


def one_layer_less_in_place(model):
    del model.model.layers[-1]
    model.config.num_hidden_layers -= 1


def another_head(model):
    model.lm_head = nn.Linear(36, 97, bias=False)


def another_norm(model):
    model.model.norm = nn.LayerNorm(36)


def tied_since(model):
    model.lm_head.weight = model.model.embed_tokens.weight


CHANGES = {
    "resized": (
        lambda model: model.resize_token_embeddings(105),
        r"embedding.* 97 x 36 and now 105 x 36|another module",
    ),
    "fewer layers": (fewer_layers, "its layers is another module|its layers measured 5 and now 3"),
    "a layer cut": (one_layer_less_in_place, "its layers measured 5 and now 4"),
    "fewer by its configuration": (
        lambda model: setattr(model.config, "num_hidden_layers", 3),
        "holds 5 layers, of which",
    ),
    "another head": (another_head, "its head is another module"),
    "another norm": (another_norm, "its norm is another module"),
    "tied": (tied_since, "its embeddings were untied and are tied now"),
}


@pytest.fixture(scope="module")
def run(tiny):
    return probekit.trace(tiny, [IDS], max_new_tokens=4)


@pytest.mark.parametrize("change", list(CHANGES))
def test_every_door_refuses_a_model_that_has_changed(change, run):
    loaded = synthetic("tiny", seed=1)
    alter, message = CHANGES[change]
    alter(loaded.model)
    parts = loaded.anatomy
    for door in (
        lambda: Capture(parts), lambda: Stop(parts, 1), lambda: Resume(parts, 1), lambda: Edit(parts, skip=[1]),
        lambda: Lens(parts), lambda: Engine(parts, 1, 8), lambda: describe(loaded), lambda: roofline_costs(loaded),
        lambda: probekit.trace(loaded, [IDS], max_new_tokens=2), lambda: probekit.decode(loaded, IDS),
        lambda: probekit.decode(loaded, IDS, method="self-speculative", exit_layer=1, draft_length=2),
        lambda: probekit.validate(loaded, run, [(1, 2)]), lambda: probekit.measure_costs(loaded, 8),
        lambda: probekit.inspect_prompt(loaded, "abc"), lambda: fit_heads(parts, [torch.tensor([IDS])]),
        lambda: geometry_table(parts, "mine", np.ones(97)),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message) as error:
            door()
        assert "\n" not in str(error.value)
    if change != "fewer by its configuration":
        again = probekit.wrap(loaded.model, loaded.tokenizer, name="again")
        expected = loaded.model.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
        assert probekit.decode(again, IDS, max_new_tokens=6).tokens == expected


def test_what_changes_nothing_is_not_refused():
    loaded = synthetic("tiny", seed=1)
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(2)  # new numbers in the same place are read as they are
    loaded.model.to(torch.float64).to(torch.float32)
    assert probekit.decode(loaded, IDS, max_new_tokens=2).tokens
    assert Lens(loaded.anatomy)


def test_a_parametrised_norm_is_read_as_it_is_now():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    loaded = synthetic("tiny", seed=1)
    before = probekit.decode(loaded, IDS, max_new_tokens=6).tokens
    nn.utils.parametrize.register_parametrization(loaded.model.model.layers[0].input_layernorm, "weight", Twice())
    nn.utils.parametrize.register_parametrization(loaded.model.model.norm, "weight", Twice())
    expected = loaded.model.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    assert probekit.decode(loaded, IDS, max_new_tokens=6).tokens == expected
    run = probekit.trace(loaded, [IDS], max_new_tokens=6)
    assert run.outputs(0).tolist() == expected
    assert before is not None


def test_a_configuration_that_changes_is_obeyed(monkeypatch):
    """A model whose window is another since the engine was checked is checked, and read, as it is now."""
    from models.test_families import small

    from probekit.decoding import self_check

    loaded, ids, checked = small("mistral"), list(range(1, 13)), []
    compare = self_check._compare
    monkeypatch.setattr(self_check, "_compare", lambda *given: (checked.append(given), compare(*given)))
    for window, times in ((None, 1), (3, 2), (3, 2)):
        if window is not None:
            loaded.model.config.sliding_window = window
        expected = loaded.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, 12:].tolist()
        assert probekit.decode(loaded, ids, max_new_tokens=8).tokens == expected
        assert len(checked) == times


@pytest.mark.parametrize(
    ("tie", "says"),
    [
        (lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight), "tied"),
        (lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.model.embed_tokens.weight.data)), "tied"),
        (lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.model.embed_tokens.weight.data.clone())),
         "untied, but equal in value"),
        (lambda model: None, "untied"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("flag", [True, False])
def test_tying_is_told_by_storage_not_by_a_flag(tie, says, flag):
    model = copy.deepcopy(synthetic("tiny", seed=1).model)
    tie(model)
    model.config.tie_word_embeddings = flag
    parts = anatomy(model)
    assert (parts.tied, parts.embeddings) == (says == "tied", says)
    loaded = probekit.wrap(model, name="mine")
    described = describe(loaded)
    assert (described["tied"], described["embeddings"]) == (says == "tied", says)
    record = probekit.trace(loaded, [IDS], max_new_tokens=2).manifest.model
    assert (record.tied, record.embeddings) == (says == "tied", says)


def test_a_known_name_on_other_parts_is_refused():
    model = copy.deepcopy(synthetic("tiny", seed=1).model)
    model.config.model_type = "gpt_neox"
    assert "gpt_neox" in FAMILIES
    with pytest.raises(InputError, match="its parts are not those of its family"):
        anatomy(model)
