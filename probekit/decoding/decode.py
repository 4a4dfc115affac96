"""`decode`: one prompt, any method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from probekit.decoding.autoregressive import Autoregressive, EarlyExit
from probekit.decoding.engine import Method
from probekit.decoding.results import Decoded, Piece
from probekit.decoding.sampling import Sampling
from probekit.decoding.self_speculative import SelfSpeculative
from probekit.decoding.speculative import Speculative
from probekit.errors import InputError
from probekit.models.loading import Loaded

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
    stop: strings that end the text.
    on_accept: called as `on_accept(text, how)` with text as soon as it is sure; `how` as in Piece.

    Raises
    ------
    InputError, ResourceError: before any work.
    """
    run = _method(loaded, method, exit_layer, draft_length, draft_model, draft_vocabulary)
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
) -> Method:
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
        ids = None if draft_vocabulary is None else torch.tensor(draft_vocabulary)
        return SelfSpeculative(loaded, exit_layer, draft_length, draft_vocabulary=ids)  # type: ignore[arg-type]
    if draft_vocabulary is not None:
        raise InputError(f"{method} decoding has no draft_vocabulary.", "Leave it out, or choose another method.")
    if method == "speculative":
        return Speculative(loaded, draft_model, draft_length)  # type: ignore[arg-type]
    return EarlyExit(loaded, exit_layer) if method == "early-exit" else Autoregressive(loaded)  # type: ignore[arg-type]
