"""What a tokenizer's special tokens do to a text that has some already. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def begins_twice(ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether a text begins with two begin-of-sequence tokens: its own, as one from a chat template has, and the
    tokenizer's. A tokenizer may put the piece for a space between them."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and len(ids) > 1 and ids[0] == bos and bos in ids[1:3]


def remark_on_bos(prompts: Sequence[int], tokenizer: Any) -> str:
    """The line for prompts, by their indices, that begin twice."""
    some = ", ".join(map(str, prompts[:5])) + (", .." if len(prompts) > 5 else "")
    which = "the prompt begins" if not prompts else f"prompt {some} begins" if len(prompts) == 1 else ""
    which = which or f"{len(prompts)} prompts ({some}) begin"
    return (
        f"{which} with {tokenizer.bos_token} twice: a text from a chat template has its own, and another is put before "
        "it. Take it out of the text, or give messages instead."
    )
