"""Any ways of drafting, replayed from a trace and run by the decoder, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from probekit.choice.rank import priced
from probekit.costs.profile import Costs
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.results import Decoded
from probekit.decoding.speculative import Speculative
from probekit.drafting.drafters import equipped
from probekit.drafting.ways import Way
from probekit.errors import InputError
from probekit.models.loaded import Loaded, as_loaded
from probekit.prediction.replay import Replay, WayRounds, replay
from probekit.progress import Progress
from probekit.ranks import Ranks, joined
from probekit.settings import digest, whole_number
from probekit.traces.trace import Trace, as_trace
from probekit.tracing.plan import traced_heads
from probekit.validation.in_turns import decode_all
from probekit.validation.kept_texts import KeptTexts, keeping_texts
from probekit.validation.run import as_traced, check_models, counts_of, speedups_measured, texts_digest


@dataclass(frozen=True, eq=False)
class WayValidation:
    """A way of drafting, replayed and run on the same prompts.

    predicted, measured: counts: rounds, drafted, accepted, tokens.
    rounds_equal: in every round of every text whose turn it was and what was accepted; and what was drafted, unless the
        policy looks at drafts, so that this is estimated. tokens_equal: every token as autoregressive decoding has it.
    near_ties: texts that left the prediction first at a position where the trace has a near-tie; unexplained: others.
    speedup_predicted: by the costs that were given, on these prompts; None without any.
    speedup_measured: over autoregressive decoding, decoding only; and 20 and 80 % of single runs.
    """

    way: Way
    prompts: int
    predicted: dict[str, float]
    measured: dict[str, float]
    exact: bool
    rounds_equal: bool
    tokens_equal: bool
    near_ties: int
    unexplained: int
    speedup_predicted: float | None
    speedup_measured: float | None
    speedup_measured_quantiles: tuple[float, float] | None

    @property
    def drafted_error(self) -> float:
        """Share by which the predicted number of drafts is off."""
        return self.predicted["drafted"] / self.measured["drafted"] - 1 if self.measured["drafted"] else 0.0

    def to_json(self) -> dict[str, Any]:
        quantiles = self.speedup_measured_quantiles
        return {
            "drafters": [key.label for key in self.way.keys],
            "policy": self.way.name,
            "exit_layer": self.way.keys[0].exit_or_null if len(self.way.keys) == 1 else None,
            "draft_length": self.way.draft_length,
            "prompts": self.prompts,
            "predicted": self.predicted,
            "measured": self.measured,
            "exact": self.exact,
            "drafted_error": self.drafted_error,
            "rounds_equal": self.rounds_equal,
            "tokens_equal": self.tokens_equal,
            "ties": self.near_ties,
            "unexplained": self.unexplained,
            "speedup_predicted": self.speedup_predicted,
            "speedup_measured": self.speedup_measured,
            "speedup_measured_quantiles": None if quantiles is None else list(quantiles),
        }


@dataclass(frozen=True, eq=False)
class WaysValidation:
    """Ways that were run, beside what was predicted of them."""

    model: str
    ways: tuple[WayValidation, ...]

    def __repr__(self) -> str:
        return f"WaysValidation({self.model}: {len(self.ways)} ways, {'holds' if self.holds else 'does not hold'})"

    @property
    def holds(self) -> bool:
        """Nothing differs but at near-ties."""
        return not any(each.unexplained for each in self.ways)

    def to_pandas(self) -> pd.DataFrame:
        """A row a way; counts as `predicted_*` and `measured_*`."""
        rows = []
        for each in self.ways:
            row = each.to_json() | {"drafters": each.way.label}
            for side in ("predicted", "measured"):
                row |= {f"{side}_{name}": value for name, value in row.pop(side).items()}
            del row["speedup_measured_quantiles"]
            rows.append(row)
        return pd.DataFrame(rows)


def validate_ways(
    loaded: Loaded,
    trace: Trace,
    ways: Sequence[Way],
    *,
    draft_model: Loaded | None = None,
    limit: int | None = None,
    costs: Costs | None = None,
    repeats: int = 1,
    keep: str | Path | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    progress: Progress | None = None,
) -> WaysValidation:
    """Decode the trace's prompts by every way, one prompt at a time and in turns, and compare round by round.

    Parameters
    ----------
    loaded, draft_model: the models that were traced. limit: only the first prompts of the trace.
    costs: for the predicted speedup.
    repeats: how often each prompt is decoded. progress: called as `progress("validate", done, total)`.
    keep: a folder for what was decoded. ranks: processes that share the ways, or go in step. Both as for `validate`.

    Raises InputError for text that is not greedy, for other models than the traced ones, and without a way.

    Examples
    --------
    >>> import probekit
    >>> from probekit.drafting.drafters import ExitLayer
    >>> from probekit.drafting.ways import Way
    >>> trace = probekit.trace("tales-layerskip", ["Once upon a time"], max_new_tokens=16)
    >>> found = probekit.validate_ways("tales-layerskip", trace, [Way((ExitLayer(3),), 2)])
    >>> found.holds
    True
    """
    loaded, trace = as_loaded(loaded), as_trace(trace)
    loaded = as_traced(trace, loaded)
    draft_model = None if draft_model is None else as_traced(trace, draft_model)
    if trace.manifest.settings.text != "greedy":
        raise InputError("ways of drafting are held against greedy decoding.", "Trace greedily.")
    check_models(loaded, trace, draft_model)
    if not ways:
        raise InputError("there is no way of drafting to validate.", "Name one or more.")
    for what, number in (("limit", limit), ("repeats", repeats)):
        if number is not None:
            whole_number(f"{what} must be", number)
    chosen = trace.select(trace.prompts[:limit])
    with joined(ranks) as ranks:
        expected = ranks.agreed(lambda: [replay(chosen, way) for way in ways])
        names = [_name(way, rounds) for way, rounds in zip(ways, expected, strict=True)]
        things = list(zip(ways, expected, names, strict=True))
        with keeping_texts(keep, texts_digest(loaded, trace, "host"), names, ranks) as kept:
            ran = ranks.shared_out(
                things, lambda mine: _ran(loaded, chosen, mine, draft_model, costs, repeats, kept, progress)
            )
    return WaysValidation(trace.manifest.model.name, tuple(ran))


def _name(way: Way, expected: Replay) -> str:
    """Of a way, for what is kept of it: who drafts and how, and the rounds that are expected."""
    rounds = [[each.tolist() for each in (of.way, of.start, of.drafted, of.accepted)] for of in expected.rounds]
    return digest([repr(key) for key in way.keys], way.draft_length, repr(way.policy), rounds)


def _ran(
    loaded: Loaded,
    trace: Trace,
    things: Sequence[tuple[Way, Replay, str]],
    draft_model: Loaded | None,
    costs: Costs | None,
    repeats: int,
    kept: KeptTexts,
    progress: Progress | None,
) -> list[WayValidation]:
    """Some ways, what is expected of them and their names: run beside autoregressive decoding."""
    heads = traced_heads(trace, loaded)
    decoders = {
        name: Speculative(
            loaded,
            [equipped(each, draft_model=draft_model, exit_heads=heads) for each in way.drafters],
            way.draft_length,
            policy=way.policy,
        )
        for way, _, name in things
    }
    runs = decode_all(trace, Autoregressive(loaded), decoders, repeats, kept, progress)
    return [_compared(trace, way, expected, *runs[name], costs) for way, expected, name in things]


def _compared(
    trace: Trace,
    way: Way,
    expected: Replay,
    plain: Sequence[Sequence[Decoded]],
    own: Sequence[Sequence[Decoded]],
    costs: Costs | None,
) -> WayValidation:
    ties = unexplained = 0
    rounds_equal = True
    for prompt, rounds, runs in zip(trace.prompts, expected.rounds, own, strict=True):
        left = _first_difference(trace, prompt, rounds, runs[0], exact=expected.exact)
        rounds_equal &= left is None
        if left is not None:
            tied = trace.near_ties(prompt)[-1].copy()
            for drafter in way.drafters:
                tied |= drafter.near_ties(trace, prompt)
            explained = left < len(tied) and bool(tied[left])
            ties, unexplained = ties + explained, unexplained + (not explained)
    found = speedups_measured(plain, own)
    return WayValidation(
        way=way,
        prompts=len(trace),
        predicted=dict(expected.counts()),
        measured=counts_of([runs[0] for runs in own]),
        exact=expected.exact,
        rounds_equal=rounds_equal,
        tokens_equal=all(mine[0].tokens == theirs[0].tokens for mine, theirs in zip(own, plain, strict=True)),
        near_ties=ties,
        unexplained=unexplained,
        speedup_predicted=None if costs is None else priced(trace, way, costs).speedup,
        speedup_measured=found["speedup_measured"],
        speedup_measured_quantiles=found["speedup_measured_quantiles"],
    )


def _first_difference(trace: Trace, prompt: int, rounds: WayRounds, run: Decoded, *, exact: bool) -> int | None:
    """The output position that decided the first round that differs, or the first token; None: all are equal."""
    text = trace.outputs(prompt).tolist()
    ways = run.ways or [0] * run.rounds
    for i, (place, start) in enumerate(zip(rounds.way.tolist(), rounds.start.tolist(), strict=True)):
        if i >= run.rounds:
            return start
        accepted = int(rounds.accepted[i])
        if ways[i] != place or (exact and run.drafted[i] != rounds.drafted[i]):
            return start
        if run.accepted[i] != accepted:
            return start + min(run.accepted[i], accepted)
    apart = [at for at, (one, other) in enumerate(zip(text, run.tokens, strict=False)) if one != other]
    if apart:
        return apart[0]
    return None if len(text) == len(run.tokens) else min(len(text), len(run.tokens))
