"""The families that probekit reads and decodes, each tested against its own `generate` past its window.

Adding one is one entry here; `tests/models/test_families.py` then holds it to the contract.
"""

from __future__ import annotations

from collections.abc import Mapping

from probekit.models.family import Family, one_plus_weight, one_window, rotary_by_kind

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral", kinds=one_window),
        Family("qwen2"),
        Family("qwen3"),
        Family("phi3", kinds=one_window),
        Family("olmo2"),
        Family("smollm3"),
        Family(
            "gemma3_text",
            rotary=rotary_by_kind,
            logit_cap=lambda config: config.final_logit_softcapping,
            gain=one_plus_weight,
        ),
        Family("gemma2", logit_cap=lambda config: config.final_logit_softcapping, gain=one_plus_weight),
        Family(
            "granite",
            embedding_factor=lambda config: config.embedding_multiplier,
            logit_divisor=lambda config: config.logits_scaling,
        ),
        Family("cohere", logit_factor=lambda config: config.logit_scale),
        Family("cohere2", logit_factor=lambda config: config.logit_scale),
    )
}


def names() -> str:
    """For messages: the families by the names that `config.json` gives them."""
    return ", ".join(FAMILIES)
