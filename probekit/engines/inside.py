"""What an engine could draft with along a trace: exits and a draft model by its convention, and its own prompt lookups.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from probekit.drafting.policies import FIXED, Policy
from probekit.drafting.text_drafters import LLAMA_CPP, PromptLookup
from probekit.engines.engine import Engine
from probekit.engines.export import convention
from probekit.prediction.predict import predict
from probekit.prediction.rounds import within_budget
from probekit.prediction.table import Prediction
from probekit.traces.trace import Trace

MATCHED = (1, 2, 3)  # tokens of an n-gram, at most


def lookups(engine: Engine, draft_length: int) -> list[PromptLookup]:
    """The prompt lookups of an engine that are worth trying with so many drafts; none where it has no rule of ours.

    llama.cpp is told how many tokens follow a match, no fewer than were matched: that is its draft length.
    """
    found = []
    for rule in engine.rules:
        for ngram in MATCHED:
            if rule != LLAMA_CPP:
                found.append(PromptLookup(ngram, rule=rule))
            elif ngram <= draft_length:
                found.append(PromptLookup(ngram, rule=rule, copied=draft_length))
    return found


def predict_inside(
    trace: Trace,
    engine: Engine,
    exit_layers: Iterable[int] | None = None,
    draft_lengths: Iterable[int] = range(1, 9),
    *,
    draft_rows: int | None = None,
    policy: Policy = FIXED,
    look_up: bool | None = None,
) -> Prediction:
    """Predict the rounds of every way of drafting that an engine has, by its convention.

    Parameters
    ----------
    exit_layers, draft_lengths, draft_rows, policy: as `predict` takes them.
    look_up: predict its prompt lookups, too; by default where no exit layers were named and lengths are fixed.

    Raises InputError as `predict` does.

    Examples
    --------
    >>> import probekit
    >>> from probekit.engines.known import ENGINES
    >>> trace = probekit.trace("tales-layerskip", ["Once upon a time"], max_new_tokens=16)
    >>> [key.label for key in predict_inside(trace, ENGINES["vllm"], draft_lengths=[2]).keys][-2:]
    ['ngram:2:vllm', 'ngram:3:vllm']
    """
    lengths, begun = list(draft_lengths), convention(trace, engine)
    found = predict(trace, exit_layers, lengths, begun, draft_rows=draft_rows, policy=policy)
    if look_up is None:
        look_up = exit_layers is None and policy == FIXED
    if not look_up:
        return found
    together: dict[tuple[PromptLookup, ...], list[int]] = {}
    for length in within_budget(lengths, found.budget):
        together.setdefault(tuple(lookups(engine, length)), []).append(length)
    more = [predict(trace, None, each, begun, drafters=drafters) for drafters, each in together.items() if drafters]
    cells = (*found.cells, *(cell for each in more for cell in each.cells))
    return replace(found, cells=cells, exact=all(each.exact for each in (found, *more)))
