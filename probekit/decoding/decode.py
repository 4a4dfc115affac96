"""`decode`: continue one prompt, by a method, or by a choice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from probekit.decoding.autoregressive import Autoregressive, EarlyExit
from probekit.decoding.decoder import Decoder
from probekit.decoding.device_decoding import on_engine
from probekit.decoding.results import Decoded, Piece
from probekit.decoding.speculative import Speculative
from probekit.drafting.drafters import Drafter, ExitLayer, equipped
from probekit.drafting.named import drafter_named
from probekit.drafting.policies import Policy
from probekit.drafting.trees import TreeShape
from probekit.errors import InputError
from probekit.foreign.special_tokens import begins_twice, remark_on_bos
from probekit.foreign.text import check_text, token_ids
from probekit.lens.exit_heads import ExitHead, check_heads, load_heads
from probekit.models.loaded import Loaded, as_loaded
from probekit.models.loaded import batch_invariant as made_invariant
from probekit.settings import Sampling

METHODS = ("autoregressive", "self-speculative", "speculative", "early-exit")
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "autoregressive": (),
    "self-speculative": ("exit_layer", "draft_length"),
    "speculative": ("draft_length",),
    "early-exit": ("exit_layer",),
}
_DRAFTING: Mapping[str, tuple[str, ...]] = {
    "self-speculative": ("draft_vocabulary", "exit_heads", "policy"),
    "speculative": ("draft_model", "drafter", "exit_layer", "policy"),
}
"""What each method needs, and what else it can be given."""
_MEANS = {
    "exit_layer": "Give the number of layers that draft (--exit-layer).",
    "draft_length": "Give the most tokens that a round drafts (--draft-length).",
}


class Chosen(Protocol):
    """A way to decode (`choice.choose.Candidate`, `choice.ranking.Ranked`).

    drafts: who drafts; several take turns by the choice's policy; None where nobody does.
    """

    @property
    def drafts(self) -> Drafter | tuple[Drafter, ...] | None: ...

    @property
    def draft_length(self) -> int: ...


class ChoiceLike(Protocol):
    """What `probekit.choose` and `probekit.rank` return."""

    @property
    def best(self) -> Chosen: ...

    @property
    def policy(self) -> Policy: ...


def decode(
    loaded: Loaded | str | Path,
    prompt: str | Sequence[int],
    choice: ChoiceLike | None = None,
    *,
    method: str | None = None,
    exit_layer: int | None = None,
    draft_length: int | None = None,
    drafter: Drafter | str | None = None,
    draft_model: Loaded | None = None,
    draft_vocabulary: Sequence[int] | None = None,
    exit_heads: Mapping[int, ExitHead] | str | Path | None = None,
    policy: Policy | None = None,
    max_new_tokens: int = 96,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    stop: str | Sequence[str] = (),
    on_accept: Callable[[str, str], None] | None = None,
    engine: str = "host",
    batch_invariant: bool = False,
) -> Decoded:
    """Continue one prompt.

    Parameters
    ----------
    prompt: a text, encoded as `tokenizer(prompt)` does by default, or token ids.
    choice: what `probekit.choose` or `probekit.rank` found best: its drafter, draft length and policy, or plain
        decoding where it says not to speculate. A chosen draft model is to be given too. Without a choice:
    method: one of METHODS; by default what the settings say: "speculative" with a drafter or a draft model,
        "self-speculative" with an exit layer, else "autoregressive". "self-speculative" needs exit_layer and
        draft_length, "speculative" drafter or draft_model, and draft_length (a tree by itself goes to its depth),
        "early-exit" exit_layer; a setting that the method has no use for is refused.
    drafter: any Drafter, or the name of one: "ngram:2", "suffix", "tree:2x1" (which drafts from exit_layer).
    draft_vocabulary: for "self-speculative", the tokens that drafts choose among; all by default.
    exit_heads: for "self-speculative", {exit: head} or a file of them (`probekit.lens.exit_heads`), of which the exit
        layer's is put before norm and head when drafting; none by default.
    policy: when to stop drafting before draft_length; never by default.
    stop: strings that end the text.
    on_accept: called as `on_accept(text, how)` with text as soon as it is sure; `how` as in Piece.
    engine: "host", which runs step by step; or "cuda", whole rounds recorded into CUDA graphs (autoregressive decoding
        and exit layers with a fixed draft length; the same tokens; not yet run on a GPU).
    batch_invariant: verify so that no row depends, bit for bit, on how many are computed with it: slower, and the
        tokens are those of batch-invariant autoregressive decoding in any dtype. A model of `probekit.batch_invariant`
        always decodes so.

    Raises
    ------
    InputError, ResourceError: before any work.

    Warns (UserWarning) of a text that begins with two begin-of-sequence tokens.

    Examples
    --------
    >>> import probekit
    >>> how = {"exit_layer": 3, "draft_length": 3}
    >>> drafted = probekit.decode("tales-layerskip", "Once upon a time", max_new_tokens=12, **how)
    >>> plain = probekit.decode("tales-layerskip", "Once upon a time", max_new_tokens=12)
    >>> drafted.tokens == plain.tokens, drafted.rounds < plain.rounds
    (True, True)
    """
    opened = made_invariant if batch_invariant else as_loaded
    loaded, draft_model = opened(loaded), None if draft_model is None else opened(draft_model)
    given = {
        "exit_layer": exit_layer, "draft_length": draft_length, "drafter": drafter, "draft_model": draft_model,
        "draft_vocabulary": draft_vocabulary, "exit_heads": exit_heads, "policy": policy,
    }  # fmt: skip
    if choice is None:
        given = _with_drafter(given)
        run = _by_method(loaded, method or _method_of(given), given)
    else:
        run = _as_chosen(loaded, choice, given | {"method": method})
    run = on_engine(run, engine)
    if isinstance(prompt, str):
        if loaded.tokenizer is None:
            raise InputError(f"{loaded.name} has no tokenizer, so it cannot read a text.", "Give token ids.")
        prompt_ids = loaded.tokenizer(check_text(prompt, "the prompt"))["input_ids"]
        if begins_twice(prompt_ids, loaded.tokenizer):
            warnings.warn(remark_on_bos((), loaded.tokenizer), stacklevel=2)
    else:
        prompt_ids = token_ids(prompt, "the prompt")

    def hand_out(piece: Piece) -> None:
        if on_accept is not None:
            on_accept(piece.text, piece.how)

    return run.decode(
        [prompt_ids],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        on_accept=None if on_accept is None else hand_out,
    )[0]


def _as_chosen(loaded: Loaded, choice: ChoiceLike, given: Mapping[str, Any]) -> Decoder:
    for name in ("method", "exit_layer", "draft_length", "drafter", "draft_vocabulary", "policy"):
        if given[name] is not None:
            raise InputError(f"a choice and {name} were both given.", "Give one of the two.")
    best = choice.best
    if best.drafts is None:
        return Autoregressive(loaded)
    heads = None if given["exit_heads"] is None else _heads(given["exit_heads"], loaded)
    drafts = best.drafts if isinstance(best.drafts, tuple) else (best.drafts,)
    drafters = [equipped(each, draft_model=given["draft_model"], exit_heads=heads) for each in drafts]
    return Speculative(loaded, drafters, best.draft_length, policy=choice.policy)


def _with_drafter(given: dict[str, Any]) -> dict[str, Any]:
    """The same with the drafter that a name means; a tree is drafted to its depth unless a length says less."""
    if isinstance(given["drafter"], str):
        given = given | {"drafter": drafter_named(given["drafter"], given["exit_layer"]), "exit_layer": None}
    shape: TreeShape | None = getattr(given["drafter"], "shape", None)
    return given if shape is None or given["draft_length"] is not None else given | {"draft_length": shape.depth}


def _method_of(given: Mapping[str, Any]) -> str:
    """What the settings say where no method is named."""
    named = {name for name, value in given.items() if value is not None}
    if named & {"drafter", "draft_model"}:
        return "speculative"
    return "self-speculative" if "exit_layer" in named else METHODS[0]


def _by_method(loaded: Loaded, method: str, given: Mapping[str, Any]) -> Decoder:
    if method not in _NEEDS:
        raise InputError(f"no method is named {method!r}; there are {', '.join(METHODS)}.")
    for name, value in given.items():
        if name in _NEEDS[method] and value is None:
            raise InputError(f"{method} decoding needs {name}.", _MEANS.get(name, ""))
        if name not in (*_NEEDS[method], *_DRAFTING.get(method, ())) and value is not None:
            raise InputError(f"{method} decoding has no {name}.", "Leave it out, or choose another method.")
    if method in _DRAFTING:
        drafter = _exit_drafter(loaded, given) if method == "self-speculative" else _any_drafter(given)
        return Speculative(loaded, drafter, given["draft_length"], policy=given["policy"])
    return EarlyExit(loaded, given["exit_layer"]) if method == "early-exit" else Autoregressive(loaded)


def _any_drafter(given: Mapping[str, Any]) -> Drafter | Loaded:
    drafter, draft_model, exit_layer = given["drafter"], given["draft_model"], given["exit_layer"]
    if (drafter is None) == (draft_model is None):
        raise InputError("speculative decoding needs a drafter, or a draft_model.", "Give one of the two.")
    if exit_layer is not None:
        raise InputError("an exit_layer was given beside another drafter.", "Leave one of the two out.")
    return drafter if draft_model is None else draft_model


def _exit_drafter(loaded: Loaded, given: Mapping[str, Any]) -> Drafter:
    """The exit layer that was asked for, with its draft vocabulary and exit head."""
    ids = given["draft_vocabulary"]
    drafter = ExitLayer(given["exit_layer"], rows=None if ids is None else len(ids), draft_ids=ids)
    if given["exit_heads"] is None:
        return drafter
    heads = _heads(given["exit_heads"], loaded)
    if loaded.anatomy.check_exit(drafter.exit_layer) not in heads:
        known = ", ".join(map(str, heads))
        raise InputError(
            f"there is no exit head of layer {drafter.exit_layer} among these: they have {known}.", "Fit one."
        )
    return equipped(drafter, exit_heads=heads)


def _heads(given: Mapping[int, ExitHead] | str | Path, loaded: Loaded) -> dict[int, ExitHead]:
    parts = loaded.anatomy
    return load_heads(given, parts) if isinstance(given, (str, Path)) else check_heads(given, parts)
