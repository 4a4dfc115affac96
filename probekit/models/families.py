"""The families that probekit reads and decodes, each tested against its own `generate` past its window.

Adding one is one entry here; `tests/models/test_families.py` then holds it to the contract.
"""

from __future__ import annotations

from typing import Any

from probekit.errors import InputError
from probekit.models.family import Branches, Family, Names, no_weight, one_plus_weight, one_window, rotary_by_kind


def _soft_cap(config: Any) -> float | None:
    return config.final_logit_softcapping


def _logit_scale(config: Any) -> float | None:
    return config.logit_scale


def _residual_multiplier(config: Any) -> float | None:
    return config.residual_multiplier


NORMED = Branches("post_attention_layernorm", "post_feedforward_layernorm")
"""Of layers whose norms stand behind their branches."""


def _granite(model_type: str, branches: Branches = Branches()) -> Family:  # noqa: B008 - a tuple
    return Family(
        model_type,
        branches=branches,
        branch_factor=_residual_multiplier,
        embedding_factor=lambda config: config.embedding_multiplier,
        logit_divisor=lambda config: config.logits_scaling,
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral", kinds=one_window),
        Family("ministral"),
        Family("ministral3", kinds=one_window),
        Family("mixtral", kinds=one_window),
        Family("qwen2"),
        Family("qwen2_moe"),
        Family("qwen3"),
        Family("qwen3_moe", kinds=one_window),
        Family("phi", names=Names(norm="final_layernorm")),
        Family("phi3", kinds=one_window),
        Family("phimoe", kinds=one_window),
        Family(
            "gpt_neox",
            names=Names("gpt_neox", "embed_in", norm="final_layer_norm", cache="layer_past"),
            branches=Branches(attention="attention"),
        ),
        Family("olmo", gain=no_weight),
        Family("olmo2", branches=NORMED),
        Family("olmo3", rotary=rotary_by_kind, branches=NORMED),
        Family("olmoe"),
        Family("flex_olmo", branches=NORMED),
        Family("smollm3"),
        Family("gemma", gain=one_plus_weight),
        Family("gemma2", logit_cap=_soft_cap, gain=one_plus_weight, branches=NORMED),
        Family("gemma3_text", rotary=rotary_by_kind, logit_cap=_soft_cap, gain=one_plus_weight, branches=NORMED),
        Family("vaultgemma", logit_cap=_soft_cap, gain=one_plus_weight),
        _granite("granite"),
        _granite("granite_swa"),
        _granite("granitemoe", Branches(mlp="block_sparse_moe")),
        Family(
            "hyperclovax",
            embedding_factor=lambda config: config.embedding_multiplier,
            logit_factor=lambda config: config.logits_scaling,
            branches=Branches("post_norm1", "post_norm2"),
            branch_factor=_residual_multiplier,
        ),
        Family("cohere", logit_factor=_logit_scale),
        Family("cohere2", logit_factor=_logit_scale),
        Family("cohere2_moe", logit_factor=_logit_scale),
        Family("gpt_oss"),
        Family("starcoder2", kinds=one_window),
        Family("stablelm"),
        Family("nemotron", gain=one_plus_weight),
        Family("glm"),
        Family("glm4", branches=Branches("post_self_attn_layernorm", "post_mlp_layernorm")),
        Family("glm4_moe"),
        Family("exaone4", branches=NORMED),
        Family("ernie4_5"),
        Family("ernie4_5_moe"),
        Family("hunyuan_v1_dense"),
        Family("dots1"),
        Family("seed_oss"),
        Family("arcee"),
        Family("apertus"),
        Family("helium"),
        Family("cwm"),
        Family("jais2"),
        Family("bitnet"),
        Family("diffllama"),
    )
}


def register(family: Family) -> Family:
    """Add a family of one's own, from now on; models of it that were read before keep theirs.

    Raises InputError for a name that is taken.
    """
    if FAMILIES.setdefault(family.model_type, family) is not family:
        raise InputError(f"there is a family {family.model_type!r} already.", "Give it another model_type.")
    return family


def unregister(model_type: str) -> None:
    """Take a family away again."""
    FAMILIES.pop(model_type, None)


def check_decodes(family: Family, name: str) -> None:
    """Raise InputError for a model whose layers the engine does not know how to run."""
    if not family.decodes:
        raise InputError(
            f"{name} is a {family.model_type!r} model: probekit traces it and reads its lens, but does not decode it. "
            f"It decodes {names()}.",
            "Describe the family: docs/how-to/extend.md.",
        )


def names() -> str:
    """For messages: the families by the names that `config.json` gives them."""
    return ", ".join(FAMILIES)
