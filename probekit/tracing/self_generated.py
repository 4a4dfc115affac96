"""What a model writes by itself: the text that exit heads are fitted on, and that frequent tokens are counted in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.self_check import generated, reproduces
from probekit.models.loaded import Loaded, as_loaded
from probekit.progress import Progress
from probekit.tracing.prompts import Prompt, encode

QUARTERS = 4
MOST_TOKENS = 16_000
AT_ONCE = 16  # texts


def self_generated_texts(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 96,
    *,
    most_tokens: int = MOST_TOKENS,
    progress: Progress | None = None,
) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt ids, tokens) of what the model writes after prompts, and then after their beginnings.

    Greedily, for drafts that are verified greedily: exit heads that were fitted on sampled text help those less.

    Parameters
    ----------
    max_new_tokens: the budget of each text.
    most_tokens: no further texts once so many tokens are written.
    progress: called as `progress("learn drafting", done, total)`, in tokens.
    """
    starts, written = list(beginnings(loaded, prompts)), 0
    for first in range(0, len(starts), AT_ONCE):
        for ids, tokens in _continued(loaded, starts[first : first + AT_ONCE], max_new_tokens):
            yield ids, tokens
            written += len(tokens)
        done = written >= most_tokens or first + AT_ONCE >= len(starts)
        if progress is not None:
            progress("learn drafting", most_tokens if done else written, most_tokens)
        if done:
            return


def _continued(
    loaded: Loaded, starts: Sequence[list[int]], max_new_tokens: int
) -> Iterator[tuple[list[int], list[int]]]:
    if reproduces(loaded):
        for each in Autoregressive(loaded).decode(starts, max_new_tokens=max_new_tokens):
            yield each.prompt_ids, each.tokens
    else:
        yield from ((ids, generated(loaded, ids, max_new_tokens)) for ids in starts)


def as_batches(texts: Iterable[tuple[list[int], list[int]]]) -> Iterator[Tensor]:
    """(1, tokens) ids of each prompt with what the model wrote after it: what `fit_heads` reads."""
    return (torch.tensor([ids + tokens]) for ids, tokens in texts)


def beginnings(loaded: Loaded, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """The ids of each prompt, then of what is left when a quarter is cut off, a half, three quarters; each once."""
    loaded = as_loaded(loaded)
    found: set[tuple[int, ...]] = set()
    for kept in range(QUARTERS, 0, -1):
        for prompt in prompts:
            if kept < QUARTERS and prompt.messages is not None:
                continue  # after half a chat template the model would go on as the user
            ids = encode(prompt, loaded.tokenizer).ids
            beginning = tuple(ids[: max(1, len(ids) * kept // QUARTERS)])
            if beginning not in found:
                found.add(beginning)
                yield list(beginning)
