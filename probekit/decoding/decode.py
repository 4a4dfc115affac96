"""`decode`: one prompt, any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from probekit.decoding.autoregressive import Autoregressive, EarlyExit
from probekit.decoding.decoder import Decoder
from probekit.decoding.results import Decoded, Piece
from probekit.decoding.speculative import SelfSpeculative, Speculative
from probekit.errors import InputError
from probekit.lens.exit_heads import ExitHead, check_heads, load_heads
from probekit.models.loaded import Loaded
from probekit.settings import Sampling

METHODS = ("autoregressive", "self-speculative", "speculative", "early-exit")


def decode(
    loaded: Loaded,
    prompt: str | Sequence[int],
    *,
    method: str = "autoregressive",
    exit_layer: int | None = None,
    draft_length: int | None = None,
    draft_model: Loaded | None = None,
    draft_vocabulary: Sequence[int] | None = None,
    exit_heads: Mapping[int, ExitHead] | str | Path | None = None,
    max_new_tokens: int = 96,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    stop: str | Sequence[str] = (),
    on_accept: Callable[[str, str], None] | None = None,
) -> Decoded:
    """Continue one prompt.

    Parameters
    ----------
    prompt: a text, encoded as `tokenizer(prompt)` does by default, or token ids.
    method: one of METHODS. "self-speculative" needs exit_layer and draft_length, "speculative" draft_model and
        draft_length, "early-exit" exit_layer; a setting that the method has no use for is refused.
    draft_vocabulary: for "self-speculative", the tokens that drafts choose among; all by default.
    exit_heads: for "self-speculative", {exit: head} or a file of them (`probekit.lens.exit_heads`), of which the exit
        layer's is put before norm and head when drafting; none by default.
    stop: strings that end the text.
    on_accept: called as `on_accept(text, how)` with text as soon as it is sure; `how` as in Piece.

    Raises
    ------
    InputError, ResourceError: before any work.
    """
    run = _method(loaded, method, exit_layer, draft_length, draft_model, draft_vocabulary, exit_heads)
    if isinstance(prompt, str):
        if loaded.tokenizer is None:
            raise InputError(f"{loaded.name} has no tokenizer, so it cannot read a text.", "Give token ids.")
        prompt_ids = loaded.tokenizer(prompt)["input_ids"]
    else:
        prompt_ids = prompt

    def hand_out(piece: Piece) -> None:
        assert on_accept is not None
        on_accept(piece.text, piece.how)

    return run.decode(
        [prompt_ids],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        on_accept=None if on_accept is None else hand_out,
    )[0]


def _method(
    loaded: Loaded,
    method: str,
    exit_layer: int | None,
    draft_length: int | None,
    draft_model: Loaded | None,
    draft_vocabulary: Sequence[int] | None,
    exit_heads: Mapping[int, ExitHead] | str | Path | None,
) -> Decoder:
    needs = {
        "autoregressive": (),
        "self-speculative": ("exit_layer", "draft_length"),
        "speculative": ("draft_length", "draft_model"),
        "early-exit": ("exit_layer",),
    }
    if method not in needs:
        raise InputError(f"no method is named {method!r}; there are {', '.join(METHODS)}.")
    given = {"exit_layer": exit_layer, "draft_length": draft_length, "draft_model": draft_model}
    for name, value in given.items():
        if name in needs[method] and value is None:
            raise InputError(f"{method} decoding needs {name}.")
        if name not in needs[method] and value is not None:
            raise InputError(f"{method} decoding has no {name}.", "Leave it out, or choose another method.")
    if method == "self-speculative":
        assert exit_layer is not None and draft_length is not None
        ids = None if draft_vocabulary is None else torch.tensor(draft_vocabulary)
        head = None if exit_heads is None else _exit_head(exit_heads, exit_layer, loaded)
        return SelfSpeculative(loaded, exit_layer, draft_length, exit_head=head, draft_vocabulary=ids)
    for name, given_drafting in (("draft_vocabulary", draft_vocabulary), ("exit_heads", exit_heads)):
        if given_drafting is not None:
            raise InputError(f"{method} decoding has no {name}.", "Leave it out, or choose another method.")
    if method == "speculative":
        return Speculative(loaded, draft_model, draft_length)  # type: ignore[arg-type]
    return EarlyExit(loaded, exit_layer) if method == "early-exit" else Autoregressive(loaded)  # type: ignore[arg-type]


def _exit_head(given: Mapping[int, ExitHead] | str | Path, exit_layer: int, loaded: Loaded) -> ExitHead:
    parts = loaded.anatomy
    heads = load_heads(given, parts) if isinstance(given, (str, Path)) else check_heads(given, parts)
    if parts.check_exit(exit_layer) not in heads:
        known = ", ".join(map(str, heads))
        raise InputError(f"there is no exit head of layer {exit_layer} among these: they have {known}.", "Fit one.")
    return heads[exit_layer]
