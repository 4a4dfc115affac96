"""The families that probekit reads and decodes, each tested against its own `generate` past its window.

Adding one is one entry here; `tests/models/test_families.py` then holds it to the contract.
"""

from __future__ import annotations

from probekit.errors import InputError
from probekit.models.family import Family, one_plus_weight, one_window, rotary_by_kind

FAMILIES: dict[str, Family] = {
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
