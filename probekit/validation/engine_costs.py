"""What an engine's steps take, timed from outside: transformers, vLLM and llama.cpp alike.

An engine is opened plainly, with prompt lookups (rounds that verify drafts and draft with no model), and with draft
models of a few depths. Each decodes a short and a longer text from a few prompts; what the longer one takes more, and
the rounds that the engine counts more, are one equation: seconds = plain steps + drafts + verifications, and what a
round of lookups takes besides. The steps solve all equations by least squares of their
relative errors. All are asked in turns, in an order that is drawn again each time.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import lsq_linear

from probekit.costs.engine_profile import EngineProfile, Step
from probekit.costs.measure import device_name
from probekit.costs.timing import CLOCKS
from probekit.drafting.text_drafters import LLAMA_CPP, PromptLookup
from probekit.engines.engine import Drafting
from probekit.engines.known import ENGINES
from probekit.errors import InputError, ResourceError
from probekit.progress import Progress, usual_progress
from probekit.settings import whole_number
from probekit.tracing.prompts import as_prompts, bundled_prompts_for, encode
from probekit.validation.engine_rounds import Session, Turn
from probekit.validation.open_engine import EngineHome

SHORTER, LONGER = 8, 56  # new tokens
LEAST = 0.01
LOOKED_FOR = (1, 3)  # tokens: one is nearly always found, three seldom, so that rounds that find nothing are timed
Open = Callable[[Drafting], AbstractContextManager[Session]]


@dataclass(frozen=True)
class CostPlan:
    """What is timed.

    exit_layers: depths of the draft models. draft_lengths: K of the lookups; a draft model of each depth takes the
        least, the middle and the greatest of them, for its steps are alike.
    drafter: the name of a draft model of its own that is timed too; None: there is none.
    texts: prompts that are continued; with one, lookups tell rounds that find something badly from those that do not.
    rows, contexts: of the batches, and tokens in the cache halfway through a text. sweeps: turns of everything.
    clock: "wall", or "processor": seconds of the engine's processor, for one thread on a busy machine.
    together: all ways of drafting open at once, in turns; otherwise each beside plain decoding, where memory is short.
    """

    exit_layers: tuple[int, ...]
    draft_lengths: tuple[int, ...] = (1, 2, 4, 8)
    rows: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (128,)
    sweeps: int = 5
    clock: str = "wall"
    together: bool = True
    texts: int = 3
    drafter: str | None = None

    def __post_init__(self) -> None:
        if self.clock not in CLOCKS:
            raise InputError(f"clock {self.clock!r} is not known: it is {' or '.join(CLOCKS)}.")
        for name in ("exit_layers", "draft_lengths", "rows", "contexts"):
            values = tuple(sorted({whole_number(f"each of {name} must be", each, 1) for each in getattr(self, name)}))
            if not values:
                raise InputError(f"{name} of a cost plan is empty; expected one or more.")
            object.__setattr__(self, name, values)
        whole_number("sweeps must be", self.sweeps, 1)
        whole_number("texts must be", self.texts, 1)
        least = (SHORTER + LONGER) // 2 + 1
        if self.contexts[0] < least:
            raise InputError(
                f"a context of {self.contexts[0]} tokens is too short to be timed; expected {least} or more."
            )

    @property
    def longest_text(self) -> int:
        """Tokens that a session must have room for, drafts past the end among them."""
        return self.contexts[-1] + LONGER + self.draft_lengths[-1]

    @property
    def exit_lengths(self) -> tuple[int, ...]:
        """K of the draft models."""
        all_of_them = self.draft_lengths
        return tuple(dict.fromkeys((all_of_them[0], all_of_them[len(all_of_them) // 2], all_of_them[-1])))

    def ways(self, rule: str) -> Iterator[Drafting]:
        """Plain decoding, lookups at every length, and each exit and the draft model at a few."""
        yield Drafting()
        for length in self.draft_lengths:
            for ngram in LOOKED_FOR:
                if (lookup := lookup_of(rule, length, ngram)) is not None:
                    yield Drafting(length, lookup=lookup)
        for length in self.exit_lengths:
            for exit_layer in self.exit_layers:
                yield Drafting(length, exit_layer)
            if self.drafter is not None:
                yield Drafting(length, drafter=self.drafter)

    def prompts(self, text: Sequence[int], context: int) -> list[Sequence[int]]:
        """Of each text, so that its middle has so many tokens in the cache."""
        size, longest = (at - (SHORTER + LONGER) // 2 for at in (context, self.contexts[-1]))
        starts = [place * (len(text) - longest) // max(1, self.texts - 1) for place in range(self.texts)]
        return [text[start : start + size] for start in starts]


def lookup_of(rule: str, length: int, ngram: int) -> PromptLookup | None:
    """The lookup of an engine that matches so many tokens and no fewer; None where it has none such."""
    if rule == LLAMA_CPP:
        return PromptLookup(ngram, rule=rule, copied=length) if ngram <= length else None
    if rule == "transformers" and ngram > 1:
        return None  # it goes on to look for fewer
    return PromptLookup(ngram, ngram, rule)


@dataclass(frozen=True)
class Equation:
    """seconds = plain steps + rounds of `drafting`; rounds: {drafts: how many rounds verified so many}."""

    drafting: Drafting
    plain: int
    rounds: Mapping[int, int]
    seconds: float


def measure_engine(
    name: str,
    open_engine: Open,
    text: Sequence[int],
    plan: CostPlan,
    *,
    rule: str,
    device: str,
    dtype: str,
    details: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> EngineProfile:
    """Time an engine's steps.

    Parameters
    ----------
    name: of the engine. open_engine: drafting -> a context that holds a session of the engine.
    text: token ids, as many as the longest context at least: prompts are taken from all over it.
    rule: of the engine's prompt lookup. details: what the profile shall say beside the plan.
    progress: called as `progress("costs", done, all)`.

    Raises InputError for a text too short, ResourceError where the engine made no round with so many drafts.
    """
    if len(text) < plan.contexts[-1]:
        raise InputError(f"a context of {plan.contexts[-1]} tokens needs as many of text; there are {len(text)}.")
    report, ways = usual_progress(progress), list(plan.ways(rule))
    plain, *drafting = ways
    groups = [ways] if plan.together else [[plain, way] for way in drafting]
    found: dict[Asked, Equation] = {}
    for number, group in enumerate(groups):
        timed = _turns(open_engine, group, text, plan, random.Random(number))
        for asked, each in timed.items():
            alone = asked._replace(way=plain)
            first = found.setdefault(alone, timed[alone])
            if asked.way != plain:  # in a slower hour plain steps were slower, too
                found[asked] = replace(each, seconds=each.seconds * first.seconds / timed[alone].seconds)
        report("costs", number + 1, len(groups))
    steps: list[Step] = []
    errors: list[float] = []
    for rows in plan.rows:
        for at in plan.contexts:
            equations = [each for asked, each in found.items() if (asked.rows, asked.context) == (rows, at)]
            solved, error = solve(equations, plan, rows, at)
            steps += solved
            errors += [] if error is None else [error]
    about = {"sweeps": plan.sweeps, "clock": plan.clock, "together": plan.together, "texts": plan.texts,
             "tokens": [SHORTER, LONGER], "largest_error": max(errors, default=None), **(details or {})}  # fmt: skip
    return EngineProfile(name, device, dtype, tuple(steps), about)


def measure_home(home: EngineHome, plan: CostPlan, *, progress: Progress | None = None) -> EngineProfile:
    """Time an engine that is installed, on the bundled prompts, one after the other as one text."""
    loaded = home.loaded
    prompts = as_prompts(bundled_prompts_for(loaded.name))
    if (helper := home.helper) is not None and any(
        encode(prompt, helper.tokenizer).ids != encode(prompt, loaded.tokenizer).ids for prompt in prompts
    ):
        raise InputError(
            f"the draft model {helper.name} encodes text otherwise than {loaded.name}.",
            "Take a draft model with the same tokenizer.",
        )
    once = [token for prompt in prompts for token in encode(prompt, loaded.tokenizer).ids]
    many = plan.texts * plan.contexts[-1]
    text = (once * (1 + many // len(once)))[:many]
    return measure_engine(
        home.engine, home.open, text, plan, rule=ENGINES[home.engine].rules[0], device=device_name(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."), progress=progress,
        details={"model": loaded.name, "layers": loaded.depth, "options": home.options, "versions": home.versions()},
    )  # fmt: skip


class Asked(NamedTuple):
    """What an equation is of. text: the number of the prompt."""

    rows: int
    context: int
    text: int
    way: Drafting


def _turns(
    open_engine: Open, group: Sequence[Drafting], text: Sequence[int], plan: CostPlan, order: random.Random
) -> dict[Asked, Equation]:
    """The equations of some ways, all of them asked in turns."""
    turns: dict[Asked, list[list[Turn]]] = defaultdict(list)
    with ExitStack() as stack:
        sessions = {way: stack.enter_context(open_engine(way)) for way in group}
        asks = [
            (Asked(rows, at, number, way), prompt)
            for way in group
            for rows in plan.rows
            for at in plan.contexts
            for number, prompt in enumerate(plan.prompts(text, at))
        ]
        for sweep in range(plan.sweeps + 1):
            for asked, prompt in asks:
                session = sessions[asked.way]
                pair = [session(prompt, count, rows=asked.rows, ignore_eos=True) for count in (SHORTER, LONGER)]
                if sweep:  # the first passes are slow
                    turns[asked].append(pair)
            order.shuffle(asks)
    return {asked: _equation(asked.way, pairs, plan.clock) for asked, pairs in turns.items()}


def _equation(way: Drafting, pairs: Sequence[Sequence[Turn]], clock: str) -> Equation:
    """What the longer text took more, by the median of the turns, or by the least that the processor took: other
    processes only add to it. The rounds are those of every turn: decoding is greedy."""
    shorter, longer = pairs[0]
    rounds: dict[int, int] = defaultdict(int)
    for turn, sign in ((longer, 1), (shorter, -1)):
        for drafted in turn.text.drafted:
            rounds[drafted] += sign
    if clock == "wall":
        before, after = (median(turn.seconds for turn in turns) for turns in zip(*pairs, strict=True))
    else:
        before, after = (min(turn.processor_s for turn in turns) for turns in zip(*pairs, strict=True))
    if after <= before:
        raise ResourceError(
            "a longer text took no longer than a shorter one: this machine is too busy to be timed.",
            "Time again when it is quiet, with more sweeps, or by the processor's clock.",
        )
    return Equation(way, longer.plain - shorter.plain, dict(rounds), after - before)


def solve(equations: Sequence[Equation], plan: CostPlan, rows: int, context: int) -> tuple[list[Step], float | None]:
    """(the steps, the largest relative error of an equation) by least squares of relative errors, within bounds.

    The error is None where there are no more equations than steps, which then always hold.

    A plain step is known from plain decoding. Unknown are verifications of K + 1 tokens for each K of the plan, of
    which a wider one takes no less, a draft step of each exit and of the draft model, what the first of a round takes
    longer, and what a round of a lookup does. Verifications of other widths are read off the line between their
    neighbours. A step takes LEAST of a plain one at least.
    """
    widths = [1, *(length + 1 for length in plan.draft_lengths)]
    helpers: list[int | str] = [*plan.exit_layers, *([] if plan.drafter is None else [plan.drafter])]
    most = len(helpers)
    table = np.zeros((len(equations), len(widths) + 2 * most + 1))
    for place, each in enumerate(equations):
        table[place, 0] = each.plain
        if each.drafting.lookup is not None:
            table[place, -1] = each.plain + sum(each.rounds.values())
        for drafts, count in each.rounds.items():
            for column, one in enumerate(np.eye(len(widths))):
                table[place, column] += count * np.interp(drafts + 1, widths, one)
            helper = each.drafting.exit_layer or each.drafting.drafter
            if helper is not None:
                drafts_at = len(widths) + helpers.index(helper)
                table[place, drafts_at] += count * drafts
                table[place, drafts_at + most] += count
    seconds = np.array([each.seconds for each in equations])
    unseen = [width - 1 for width, column in zip(widths, table.T, strict=False) if width > 1 and column.sum() < 1]
    if unseen and (set(unseen) & set(plan.exit_lengths) or unseen[-1] == plan.draft_lengths[-1]):
        raise ResourceError(f"no round verified {unseen[0]} drafts.", "Time shorter drafts, or at a longer context.")
    if unseen:  # no lookup found so many: they are read off their neighbours
        seen = tuple(length for length in plan.draft_lengths if length not in unseen)
        return solve(equations, replace(plan, draft_lengths=seen), rows, context)
    # A plain step, which everything is held against, is that of plain decoding, whatever other equations leave over.
    alone = [place for place, each in enumerate(equations) if not each.drafting.speculates]
    plain_s = float(seconds[alone].sum() / table[alone, 0].sum())
    other = table[:, 1:] @ _increments(len(widths) - 1, table.shape[1] - 1) * plain_s / seconds[:, None]
    least = np.zeros(other.shape[1])
    least[[0, *range(len(widths) - 1, len(widths) - 1 + most)]] = LEAST  # unknown are multiples of a plain step
    left = 1 - table[:, 0] * plain_s / seconds
    solved = lsq_linear(other, left, (least, np.inf), method="bvls").x
    found = plain_s * np.append(1.0, _increments(len(widths) - 1, len(solved)) @ solved)
    error = float(np.abs(table @ found / seconds - 1).max()) if table.shape[0] > table.shape[1] else None
    at: dict[str, Any] = {"rows": rows, "context": context}
    taken = found.tolist()
    steps = [Step("autoregressive", taken[0], **at)]
    steps += [Step("verify", each, tokens=width, **at) for width, each in zip(widths[1:], taken[1:], strict=False)]
    for place, helper in enumerate(helpers):
        who: dict[str, Any] = {"exit_layer" if isinstance(helper, int) else "drafter": helper}
        steps.append(Step("draft", taken[len(widths) + place], **who, **at))
        steps.append(Step("first", taken[len(widths) + most + place], **who, **at))
    return [*steps, Step("lookup", taken[-1], **at)], error


def _increments(widths: int, steps: int) -> np.ndarray:
    """(steps, steps): steps from unknowns; the first of them are what each wider verification takes longer."""
    matrix = np.eye(steps)
    matrix[:widths, :widths] = np.tri(widths)
    return matrix
