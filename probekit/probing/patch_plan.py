"""What a sweep of patches does: two texts, an answer and its rival, sites and positions; checked before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from probekit.errors import InputError
from probekit.foreign.text import check_text, token_ids
from probekit.hooks.components import BRANCHES, Site, all_sites, check_site
from probekit.models.anatomy import Anatomy
from probekit.models.loaded import Loaded, as_loaded
from probekit.models.states import in_training

How = Literal["patch", "zero", "mean", "resample"]
HOWS: tuple[How, ...] = get_args(How)
KINDS = ("residual", *BRANCHES)
Text = str | Sequence[int]


@dataclass(frozen=True, eq=False)
class PatchPlan:
    """A sweep, checked.

    base: (positions,) int64, the text that the model reads while a site is changed; clean: the one that it is compared
    with; donors: those that values are taken from. exits: what is read with the lens.
    """

    loaded: Loaded
    how: How
    clean: Tensor
    base: Tensor
    donors: tuple[Tensor, ...]
    sites: tuple[Site, ...]
    positions: tuple[int, ...]
    exits: tuple[int, ...]
    answers: tuple[int, int] | None
    seed: int

    @property
    def parts(self) -> Anatomy:
        return self.loaded.anatomy


def plan_patches(
    model: Any, clean: Text, corrupted: Text | Sequence[Text] | None, sites: Any, positions: Iterable[int] | None,
    *, how: How, answers: Sequence[Any] | None, exits: Iterable[int] | None, seed: int,
) -> PatchPlan:  # fmt: skip
    """Read texts, sites and positions as they were given; InputError for what cannot be patched."""
    loaded = as_loaded(model)
    if how not in HOWS:
        raise InputError(f"there is no intervention {how!r}; there are {', '.join(HOWS)}.")
    if (training := in_training(loaded.model)) is not None:
        raise InputError(f"{training} is in training mode: two runs would differ by their dropout.", "Call .eval().")
    parts, ids = loaded.anatomy, read_text(loaded, clean, "the clean text")
    donors = tuple(read_text(loaded, text, "a corrupted text") for text in _texts(corrupted))
    if bool(donors) == (how == "zero"):
        wanted = (
            "takes no corrupted text"
            if donors
            else f"needs {'a corrupted text' if how == 'patch' else 'one or more corrupted texts'}"
        )
        raise InputError(f"{how!r} {wanted}.", "Zero ablation runs on the clean text alone.")
    if how == "patch" and len(donors) > 1:
        raise InputError(f"activation patching takes one corrupted text, not {len(donors)}.", "Patch one by one.")
    for other in donors if how in ("patch", "resample") else ():
        if len(other) < len(ids) or (how == "patch" and len(other) != len(ids)):
            raise InputError(
                f"the clean text has {len(ids)} tokens and the corrupted one {len(other)}: "
                "their positions do not correspond.",
                "Give texts of equally many tokens.",
            )
    # Patching reads the corrupted text and takes values from the clean one; an ablation reads the clean one.
    base, sources = (donors[0], (ids,)) if how == "patch" else (ids, donors)
    return PatchPlan(
        loaded, how, ids, base, sources, _sites(parts, sites), _positions(positions, len(ids)),
        tuple(parts.exits if exits is None else map(parts.check_exit, exits)), _answers(loaded, answers), seed,
    )  # fmt: skip


def read_text(loaded: Loaded, text: Text, name: str) -> Tensor:
    """(positions,) int64: the tokens of a text, or those that were given."""
    if isinstance(text, str):
        if loaded.tokenizer is None:
            raise InputError(f"{loaded.name} has no tokenizer, so it cannot read {name}.", "Give token ids.")
        text = loaded.tokenizer(check_text(text, name))["input_ids"]
    ids = token_ids(text, name)
    if not ids:
        raise InputError(f"{name} has no tokens.")
    if strange := [each for each in ids if each not in range(loaded.anatomy.vocabulary)]:
        raise InputError(f"{name} has the token {strange[0]}; {loaded.name} has 0..{loaded.anatomy.vocabulary - 1}.")
    if len(ids) > loaded.anatomy.context:
        raise InputError(f"{name} has {len(ids)} tokens; the context of {loaded.name} is {loaded.anatomy.context}.")
    return torch.tensor(ids)


def _texts(given: Any) -> list[Text]:
    """One text or several. Numbers are the tokens of one."""
    if given is None:
        return []
    if isinstance(given, str) or (len(given) and not isinstance(given[0], str) and not hasattr(given[0], "__len__")):
        return [given]
    return list(given)


def _sites(parts: Anatomy, given: Any) -> tuple[Site, ...]:
    """Kinds stand for all of their sites; a kind that the family does not have is left out of the default."""
    if given is None:
        given = KINDS if parts.family.branches is not None and parts.family.decodes else KINDS[:1]
    named: list[Site] = []
    for each in [given] if isinstance(given, (str, int)) else given:
        named += all_sites(parts, each) if each in KINDS else [check_site(parts, each)]
    if not named:
        raise InputError("there is no site to patch.", f"Name some, or a kind of them: {', '.join(KINDS)}.")
    return tuple(dict.fromkeys(named))


def _positions(given: Iterable[int] | None, length: int) -> tuple[int, ...]:
    if given is None:
        return tuple(range(length))
    found = []
    for each in [given] if isinstance(given, int) else given:
        if isinstance(each, bool) or each not in range(-length, length):
            raise InputError(f"position {each!r} does not exist: the text has positions 0..{length - 1}.")
        found.append(each % length)
    if not found:
        raise InputError("there is no position to patch.")
    return tuple(dict.fromkeys(found))


def _answers(loaded: Loaded, given: Sequence[Any] | None) -> tuple[int, int] | None:
    if given is None:
        return None
    if isinstance(given, str) or len(given) != 2:
        raise InputError("answers are two tokens: the right one, and the one it is compared with.")
    right, wrong = (_token(loaded, each) for each in given)
    if right == wrong:
        raise InputError(f"both answers are the token {right}: their logits never differ.", "Name two tokens.")
    return right, wrong


def _token(loaded: Loaded, given: Any) -> int:
    if isinstance(given, str):
        if loaded.tokenizer is None:
            raise InputError(f"{loaded.name} has no tokenizer to read {given!r}.", "Give token ids.")
        ids = loaded.tokenizer(check_text(given, "the answer"), add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(f"the answer {given!r} is {len(ids)} tokens; expected one.", "Mind the space before it.")
        return int(ids[0])
    if isinstance(given, bool) or given not in range(loaded.anatomy.vocabulary):
        raise InputError(f"the answer {given!r} is no token: there are 0..{loaded.anatomy.vocabulary - 1}.")
    return int(given)
