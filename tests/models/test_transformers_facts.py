"""Each fact that is relied on in transformers: it holds of every family, and a release that breaks it is named."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.test_families import FAST, ODD, SMALL
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama as llama

import probekit
from probekit.errors import SelfCheckError
from probekit.models import transformers_facts as facts
from probekit.models.families import FAMILIES
from probekit.models.family import CACHE
from probekit.models.one_layer import OneLayer
from probekit.models.transformers_facts import FACTS, TESTED, check_facts

ROOT = Path(__file__).parents[2]
NAMES = [fact.name for fact in FACTS]
SEVERAL = [name if name in FAST else pytest.param(name, marks=pytest.mark.second) for name in sorted(FAMILIES)]


@pytest.fixture(autouse=True)
def unseen(monkeypatch) -> None:
    """As in a new process: no class of model has been looked at."""
    monkeypatch.setattr(facts, "_held", set())


@pytest.mark.parametrize("name", SEVERAL)
def test_every_fact_is_seen_to_hold_of_every_family(name: str, record_property: Any) -> None:
    """Also where a pass without numbers could not tell: here it must."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL | ODD[name]))
    config, drawn = model.config.to_dict(), torch.get_rng_state()
    seen = OneLayer(model, FAMILIES[name])
    assert [fact.name for fact in FACTS if fact.holds(seen) is not True] == []
    check_facts(model)
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), drawn)
    record_property("counted", "families of which every fact of transformers is seen")


@pytest.mark.parametrize("rope", [
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 2.0,
     "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
], ids=["dynamic", "longrope"])  # fmt: skip
def test_rotary_embeddings_that_look_at_positions_are_seen_too(rope: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL, rope_parameters=rope))
    seen = OneLayer(model, FAMILIES["llama"])
    assert [fact.name for fact in FACTS if fact.holds(seen) is not True] == []


# ------------------------------------------------------------------------------------ releases that never were
def released(**changes: Any) -> Callable[..., Any]:
    """The forward of a decoder that differs in these ways, and that its own layers would go along with."""
    how = SimpleNamespace(**{"cache": CACHE, "taken": lambda out: out, "normed": True,
                             "mask": lambda mask: mask} | changes)  # fmt: skip

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                use_cache=None, cache=None, **kwargs):  # fmt: skip
        cache = past_key_values if cache is None else cache  # by the name of this release
        state = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions = torch.arange(state.shape[1], device=state.device)[None] if position_ids is None else position_ids
        turned = self.rotary_emb(state, position_ids=positions)
        for layer in self.layers:
            given = {"attention_mask": how.mask(attention_mask), "position_ids": positions, how.cache: cache}
            state = how.taken(layer(state, position_embeddings=turned, use_cache=use_cache, **given))
        return BaseModelOutputWithPast(self.norm(state) if how.normed else state, cache)

    return forward


def after_init(kind: type, change: Callable[[Any], None]) -> Callable[..., None]:
    made = kind.__init__

    def init(self, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        change(self)

    return init


def renamed(old: str, new: str) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        setattr(module, new, getattr(module, old))
        delattr(module, old)

    return change


def layer_forward(mlp: str = "mlp", returned: Callable[[Any], Any] = lambda out: out) -> Callable[..., Any]:
    def forward(self, hidden_states, **given):
        mixed = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **given)[0]
        return returned(mixed + getattr(self, mlp)(self.post_attention_layernorm(mixed)))

    return forward


def other_layout(self, *args: Any, run=llama.LlamaAttention.forward, **given: Any) -> Any:
    """Tokens before heads, in the cache."""
    held = given.pop(CACHE, None)

    def update(keys, values, number, *args, **more):
        turned = (each.transpose(1, 2) for each in (keys, values))
        return tuple(each.transpose(1, 2) for each in held.update(*turned, number, *args, **more))

    cache = None if held is None else SimpleNamespace(update=update)
    return run(self, *args, **{CACHE: cache}, **given)


def other_name(self, hidden_states, position_embeddings=None, attention_mask=None, run=llama.LlamaAttention.forward,
               **given):  # fmt: skip
    return run(self, hidden_states, position_embeddings, attention_mask, **given)


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    def turned(x):
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def whole_logits(self, *args: Any, logits_to_keep: int = 0, run=llama.LlamaForCausalLM.forward, **given: Any) -> Any:
    return run(self, *args, **given)


BREAKS: dict[str, list[tuple[Any, str, Any]]] = {
    "parts": [(llama.LlamaModel, "__init__", after_init(llama.LlamaModel, renamed("norm", "final_norm")))],
    "rotary call": [(llama.LlamaRotaryEmbedding, "forward", lambda self, *, positions: (positions, positions))],
    "layer call": [(llama.LlamaModel, "forward", released(cache="kv"))],
    "layer output": [
        (llama.LlamaModel, "forward", released(taken=lambda out: out["hidden_states"])),
        (llama.LlamaDecoderLayer, "forward", layer_forward(returned=lambda out: {"hidden_states": out})),
    ],
    "layer forward": [
        (llama.LlamaDecoderLayer, "__call__", lambda self, *args, **given: type(self).forward(self, *args, **given)),
    ],
    "final norm": [(llama.LlamaModel, "forward", released(normed=False))],
    "mask": [(llama.LlamaModel, "forward", released(mask=lambda mask: mask < 0))],
    "logits": [(llama.LlamaForCausalLM, "forward", whole_logits)],
    "cache": [(llama.LlamaAttention, "forward", other_layout)],
    "dynamic cache": [(DynamicCache, "get_seq_length", lambda self, *args: 0)],
    "branches": [
        (llama.LlamaDecoderLayer, "__init__", after_init(llama.LlamaDecoderLayer, renamed("mlp", "feed_forward"))),
        (llama.LlamaDecoderLayer, "forward", layer_forward("feed_forward")),
    ],
    "attention names": [(facts, "ALL_ATTENTION_FUNCTIONS", {"scaled dot product": None})],
    "Llama attention": [(llama.LlamaAttention, "forward", other_name)],
    "Llama rotation": [(llama, "apply_rotary_pos_emb", interleaved)],
    "Llama norm": [(llama.LlamaRMSNorm, "forward", lambda self, x: self.weight * x / x.abs().mean(-1, keepdim=True))],
}  # fmt: skip


def test_every_fact_has_a_release_that_breaks_it() -> None:
    assert list(BREAKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_release_that_breaks_a_fact_is_named(name: str, tiny_folder: Path, tiny: Any, monkeypatch) -> None:
    assert probekit.load(tiny_folder, device="cpu").depth == 5
    facts._held.clear()
    for owner, attribute, instead in BREAKS[name]:
        monkeypatch.setattr(owner, attribute, instead)
    monkeypatch.setattr(facts.transformers, "__version__", "5.99.1")
    expected = rf"^transformers 5\.99\.1 does not do what probekit relies on \({name}\): {re.escape(says(name))}; of "
    with pytest.raises(SelfCheckError, match=expected) as raised:
        probekit.wrap(tiny.model, tiny.tokenizer, name="mine")
    assert raised.value.hint == (
        f"Install transformers {TESTED['transformers'][0]} to {TESTED['transformers'][1]}, with which probekit is "
        "tested, or a newer probekit."
    )
    assert "\n" not in str(raised.value)
    if name not in ("parts", "branches"):  # of which transformers itself would find no weights
        with pytest.raises(SelfCheckError, match=expected):
            probekit.load(tiny_folder, device="cpu")


def says(name: str) -> str:
    return next(fact.says for fact in FACTS if fact.name == name)


def test_within_the_tested_releases_somebody_else_is_suspected(tiny: Any, monkeypatch) -> None:
    monkeypatch.setattr(facts.transformers, "__version__", "5.20.0")
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", interleaved)
    with pytest.raises(SelfCheckError, match="does another library change transformers here"):
        check_facts(tiny.model)


def test_what_shapes_cannot_tell_is_no_alarm(tiny: Any, monkeypatch) -> None:
    """A class whose forward looks at numbers: the meta device has none, and says so."""
    run = llama.LlamaModel.forward

    def looking(self, *args: Any, **given: Any) -> Any:
        assert float(self.norm.weight.sum()) > -1e9  # as some count packed sequences
        return run(self, *args, **given)

    monkeypatch.setattr(llama.LlamaModel, "forward", looking)
    check_facts(tiny.model)


def test_a_class_is_looked_at_once_and_others_are_left_alone(tiny: Any, monkeypatch) -> None:
    check_facts(tiny.model)
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", interleaved)
    check_facts(tiny.model)
    facts._held.clear()
    mine = type("Mine", (type(tiny.model),), {"__module__": "mine"})
    assert mine.__module__ == "mine"
    stranger = SimpleNamespace(config=SimpleNamespace(model_type="nobody"))
    check_facts(stranger)  # of no family that is known


def test_the_page_has_every_fact_and_the_script_every_release() -> None:
    page = (ROOT / "docs" / "reference" / "transformers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    assert rows == [(fact.name, fact.says, fact.used_by) for fact in FACTS]
    pairs = runpy.run_path(str(ROOT / "tests" / "tools" / "on_other_versions.py"))["PAIRS"]
    for library, releases in TESTED.items():
        assert {pair[library] for pair in pairs.values()} == set(releases)
    for fact in FACTS:
        for path in fact.used_by.split(", "):
            assert (ROOT / "probekit" / f"{path}.py").is_file(), path
