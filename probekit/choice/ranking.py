"""Every way of drafting on one scale: what `rank` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from probekit.choice.prices import Prices
from probekit.costs.profile import Costs
from probekit.drafting.drafters import Drafter
from probekit.drafting.policies import FIXED, Policy
from probekit.drafting.ways import Way
from probekit.html_tables import HtmlCell, html_table
from probekit.prediction.intervals import FEW_PROMPTS, bootstrap_ratio, interval_of, listed

SCHEMA = "probekit/rank/1"
RUNNERS_UP = 4  # beside the best way, in a choice


@dataclass(frozen=True, eq=False)
class Ranked:
    """A way of drafting with what it costs and gains on the texts of a trace. Counts are expected ones on sampled text.

    Parameters
    ----------
    way: None for autoregressive decoding and for the oracle.
    drafter, policy: as tables and JSON name them. exit_layer: E of an exit or a tree, null for every other drafter.
    tokens_of_prompt, seconds_of_prompt, plain_s_of_prompt: (prompts,) tokens that rounds emit, and the predicted
        seconds of all rounds and of autoregressive decoding.
    rounds, drafted, accepted: over all prompts.
    exact: whether drafted tokens, and with them the seconds, are exact but for the costs.
    cross_fitted: whether it was learned: on the other half of the prompts than those that it is judged on.
    total_s: the seconds of all its rounds by other costs.
    joint: 95 % of the speedup, over prompts and blocks of the calibration, for all ways of a ranking at once; None
        outside of one. alike: not clearly slower than the fastest way of the ranking.
    """

    way: Way | None
    drafter: str
    policy: str
    exit_layer: int | None
    draft_length: int
    tokens_of_prompt: np.ndarray = field(repr=False)
    seconds_of_prompt: np.ndarray = field(repr=False)
    plain_s_of_prompt: np.ndarray = field(repr=False)
    rounds: float
    drafted: float
    accepted: float
    exact: bool
    total_s: Callable[[Prices], float] = field(repr=False)
    cross_fitted: bool = False
    joint: tuple[float, float] | None = None
    alike: bool = False

    def __repr__(self) -> str:
        return f"Ranked({self.label}, {self.policy}, K {self.draft_length}: {self.speedup:.2f}x)"

    @property
    def speedup(self) -> float:
        """Over autoregressive decoding on the same engine, decoding only."""
        return float(self.plain_s_of_prompt.sum() / self.seconds_of_prompt.sum())

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % of the speedup: `joint` in a ranking, else of this way alone, over prompts; None of decoding alone."""
        if self.joint is not None or self.policy == "none":
            return self.joint
        low, high = bootstrap_ratio(self.plain_s_of_prompt, self.seconds_of_prompt)
        return interval_of(float(low), float(high), len(self.seconds_of_prompt))

    @property
    def tokens_per_round(self) -> float:
        return float(self.tokens_of_prompt.sum() / self.rounds)

    @property
    def drafted_per_token(self) -> float:
        """Drafted tokens for each token that rounds emit."""
        return float(self.drafted / self.tokens_of_prompt.sum())

    @property
    def drafts(self) -> Drafter | tuple[Drafter, ...] | None:
        """Who drafts, as `decode` takes it with a choice."""
        if self.way is None:
            return None
        return self.way.drafters[0] if len(self.way.drafters) == 1 else self.way.drafters

    @property
    def label(self) -> str:
        """Who drafts, as a person reads it."""
        return self.drafter if self.way is None or len(self.way.drafters) > 1 else self.way.label

    def speedup_on(self, chosen: np.ndarray) -> float:
        """The speedup on some prompts. chosen: (prompts,) bool."""
        return float(self.plain_s_of_prompt[chosen].sum() / self.seconds_of_prompt[chosen].sum())


class KindOfText(NamedTuple):
    """A kind of text: its prompts, which way is best there, and what the overall choice reaches there."""

    kind: str
    prompts: int
    best: Ranked
    best_speedup: float
    choice_speedup: float
    oracle_speedup: float | None

    @property
    def loss(self) -> float:
        """Share of the kind's best speed that one choice for all texts gives up."""
        return 1 - self.choice_speedup / self.best_speedup


class HeldOut(NamedTuple):
    """What choosing gains: on each half of the prompts the way that was the fastest on the other half.

    interval: None with fewer than four prompts.
    """

    speedup: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class Ranking:
    """Ways of drafting, the fastest first; autoregressive decoding is among them, at 1.

    oracle: the best that any policy could do with these drafters; None on text that is not greedy. oracle_of_turns: the
    same for the drafters that a decoder can let take turns, playable: its `way` runs. kind_of_prompt: of each prompt.
    not_ranked: (ways, why not), of those that this trace cannot answer for.

    A decoder takes it as it is, for its first: `probekit.decode(model, prompt, ranking)`.
    """

    model: str
    text: str
    prompts: tuple[int, ...]
    kind_of_prompt: tuple[str, ...]
    ways: tuple[Ranked, ...]
    costs: Costs
    oracle: Ranked | None = None
    oracle_of_turns: Ranked | None = None
    not_ranked: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        return f"Ranking({self.model}: {len(self.ways)} ways, best {self.best.label}, {self.best.policy})"

    @property
    def best(self) -> Ranked:
        return self.ways[0]

    def best_on(self, chosen: np.ndarray) -> Ranked:
        """The fastest way on some prompts. chosen: (prompts,) bool."""
        return max(self.ways, key=lambda way: way.speedup_on(chosen))

    @property
    def policy(self) -> Policy:
        """Of the best way."""
        return FIXED if self.best.way is None else self.best.way.policy

    def share_of_oracle(self, way: Ranked) -> float | None:
        """The speed of a way over the oracle's."""
        return None if self.oracle is None else float(self.oracle.seconds_of_prompt.sum() / way.seconds_of_prompt.sum())

    def first(self, **wanted: Any) -> Ranked | None:
        """The best way whose fields are as wanted: `first(policy="fixed", drafter="self")`."""
        return next(
            (way for way in self.ways if all(getattr(way, name) == value for name, value in wanted.items())), None
        )

    def shortlist(self, most: int = 20) -> list[Ranked]:
        """The best length of each drafter and policy, at most so many, and autoregressive decoding."""
        found: dict[tuple[str, int | None, str], Ranked] = {}
        for way in self.ways:
            found.setdefault((way.drafter, way.exit_layer, way.policy), way)
        kept = list(found.values())[:most]
        return kept + [way for way in self.ways if way.way is None and way not in kept]

    def to_run(self, best: int = 5, others: int = 5) -> list[Ranked]:
        """What a validation runs: the best of the shortlist, and a spread of others down to the slowest."""
        able = [way for way in self.shortlist(len(self.ways)) if way.way is not None]
        rest = able[best:]
        places = np.unique(np.linspace(0, len(rest) - 1, min(others, len(rest))).round().astype(int))
        return able[:best] + [rest[place] for place in places.tolist()]

    def ladder(self) -> pd.DataFrame:
        """The best of each kind, from decoding alone to the oracle: rung, way, speedup, speedup_low, speedup_high."""
        policies = [way for way in self.ways if way.way is not None and way.policy != "fixed"]
        rungs = (
            ("autoregressive", self.first(policy="none")),
            ("best fixed pair", self.first(drafter="self", policy="fixed")),
            ("best policy", next((way for way in policies if way.policy != "best shape"), None)),
            ("best lookup", next((way for way in self.ways if way.drafter.startswith(("ngram", "suffix"))), None)),
            ("draft model", self.first(drafter=self.costs.drafter, policy="fixed")),
            ("best tree", next((way for way in self.ways if way.drafter.startswith("tree")), None)),
            ("oracle", self.oracle),
        )
        rows = []
        for rung, way in rungs:
            if way is not None:
                low, high = (way.interval if way.way is not None or way is self.oracle else None) or (np.nan, np.nan)
                rows.append((rung, "" if way.policy in ("none", "oracle") else _briefly(way), way.speedup, low, high))
        return pd.DataFrame(rows, columns=["rung", "way", "speedup", "speedup_low", "speedup_high"])

    def kinds(self) -> list[KindOfText]:
        """For each kind of text which way is best there, and what one choice for all costs."""
        rows, of = [], np.array(self.kind_of_prompt)
        for kind in dict.fromkeys(self.kind_of_prompt):
            chosen = of == kind
            best = self.best_on(chosen)
            oracle = None if self.oracle is None else self.oracle.speedup_on(chosen)
            rows.append(
                KindOfText(kind, int(chosen.sum()), best, best.speedup_on(chosen), self.best.speedup_on(chosen), oracle)
            )
        return rows

    @property
    def held_out(self) -> HeldOut:
        """The speedup of the choice among all ways, free of the winner's luck; no way is judged where it was chosen."""
        plain, seconds = self.best.plain_s_of_prompt.copy(), self.best.seconds_of_prompt.copy()
        of_first = np.arange(len(self.prompts)) % 2 == 0
        for chosen in (of_first, ~of_first) if len(self.prompts) > 1 else ():
            best = self.best_on(chosen)
            plain[~chosen], seconds[~chosen] = best.plain_s_of_prompt[~chosen], best.seconds_of_prompt[~chosen]
        low, high = bootstrap_ratio(plain, seconds)
        pair = interval_of(float(low), float(high), len(self.prompts))
        return HeldOut(float(plain.sum() / seconds.sum()), pair)

    def beats(self, speedup: float) -> bool:
        """Whether the best of all ways is faster than that; a difference in the last digits is none."""
        return self.best.speedup > speedup * (1 + 1e-12)

    def beside(self, pair_speedup: float) -> str:
        """A sentence or two that follow a choice of pairs of that speedup: what all other ways add."""
        best = self.best
        if not self.beats(pair_speedup):
            return " No other way of drafting is faster."
        held = self.held_out
        return (
            f" Of all ways, {named(best)} is predicted to be the fastest: {_times(best)}; ways that were chosen on one "
            f"half of the prompts reach {held.speedup:.2f}x on the other."
        )

    def for_choice(self) -> dict[str, Any]:
        """The keys that a choice among all ways adds to a choice of pairs."""
        held = self.held_out
        return {
            "way": self._json(self.best),
            "way_runners_up": [self._json(way) for way in self.ways[1 : 1 + RUNNERS_UP]],
            "way_held_out": {"speedup": held.speedup, "interval": listed(held.interval)},
            "oracle": None if self.oracle is None else self._json(self.oracle),
        }

    def sentence(self) -> str:
        """The outcome in a plain sentence or two."""
        best = self.best
        if best.way is None:
            sentence = f"{self.model}: nothing beats plain autoregressive decoding on these costs."
        else:
            sentence = (
                f"{self.model}: {named(best)} is predicted to decode {_times(best)} as fast as plain autoregressive "
                "decoding."
            )
            sentence += self._alike_sentence()
        if self.oracle is not None:
            share = self.share_of_oracle(best)
            sentence += f" An oracle would reach {self.oracle.speedup:.2f}x; this is {share:.0%} of its speed."
        return sentence

    def _alike_sentence(self) -> str:
        """Which ways are as good as the fastest, as far as anybody can tell."""
        others = [way for way in self.ways[1:] if way.alike]
        if not others or len(self.prompts) < FEW_PROMPTS:
            return ""
        if len(others) == 1:
            return f" It cannot be told apart from {_briefly(others[0])}."
        return f" It cannot be told apart from {len(others)} others, {_briefly(others[0])} the next."

    def to_json(self) -> dict[str, Any]:
        held = self.held_out
        return {
            "schema": SCHEMA,
            "model": self.model,
            "text": self.text,
            "prompts": len(self.prompts),
            "sentence": self.sentence(),
            "held_out": {"speedup": held.speedup, "interval": listed(held.interval)},
            "ways": [self._json(way) for way in self.ways],
            "oracle": None if self.oracle is None else self._json(self.oracle),
            "oracle_of_turns": None if self.oracle_of_turns is None else self._json(self.oracle_of_turns),
            "not_ranked": [{"ways": ways, "reason": why} for ways, why in self.not_ranked],
            "kinds": [
                {
                    "kind": row.kind,
                    "prompts": row.prompts,
                    "best": _named_json(row.best),
                    "speedup": row.best_speedup,
                    "choice_speedup": row.choice_speedup,
                    "loss": row.loss,
                    "oracle_speedup": row.oracle_speedup,
                }
                for row in self.kinds()
            ],
            "costs": self.costs.to_json(),
        }

    def brief(self) -> dict[str, Any]:
        """The same for a report: the best length of each drafter and policy only, and the ladder; without the costs."""
        rungs = [
            {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in row.items()}
            for row in self.ladder().to_dict("records")
        ]
        whole = self.to_json()
        kept = {name: whole[name] for name in ("sentence", "held_out", "oracle", "kinds")}
        return {**kept, "ways": [self._json(way) for way in self.shortlist()], "ladder": rungs}

    def _json(self, way: Ranked) -> dict[str, Any]:
        return {
            **_named_json(way),
            "tokens": int(way.tokens_of_prompt.sum()),
            "rounds": way.rounds,
            "drafted": way.drafted,
            "accepted": way.accepted,
            "tokens_per_round": way.tokens_per_round,
            "drafted_per_token": way.drafted_per_token,
            "speedup": way.speedup,
            "interval": listed(way.interval),
            "exact": way.exact,
            "cross_fitted": way.cross_fitted,
            "alike": way.alike,
            "oracle_share": self.share_of_oracle(way),
        }

    def to_pandas(self) -> pd.DataFrame:
        """A row a way, the oracle last; the interval as `speedup_low`, `speedup_high`."""
        rows = []
        for way in (*self.ways, *(() if self.oracle is None else (self.oracle,))):
            row = self._json(way)
            low, high = row.pop("interval") or (np.nan, np.nan)
            rows.append({"model": self.model, **row, "speedup_low": low, "speedup_high": high})
        return pd.DataFrame(rows).astype({"exit_layer": "Int64"})

    def _repr_html_(self) -> str:
        shown = self.shortlist()
        most = max(way.speedup for way in (*shown, *(() if self.oracle is None else (self.oracle,))))
        rows = []
        for way in (*(() if self.oracle is None else (self.oracle,)), *shown):
            share = self.share_of_oracle(way)
            cells = [way.policy, str(way.draft_length), f"{way.tokens_per_round:.2f}", f"{way.drafted_per_token:.2f}"]
            gain = HtmlCell(f"{way.speedup:.2f}", max(0.0, way.speedup - 1) / max(1e-9, most - 1))
            last = HtmlCell("-" if share is None else f"{share:.0%}", share or 0.0)
            rows.append((way.label, [*map(HtmlCell, cells), gain, last]))
        heads = ["policy", "length", "tokens per round", "drafted a token", "speedup", "share of the oracle"]
        return f"<p>{escape(self.sentence())}</p>" + html_table("ways of drafting", "drafts", heads, rows)


def named(way: Ranked) -> str:
    """A way in words."""
    what = "level" if way.drafter.startswith("tree") else "token"
    upto = "" if way.policy in ("fixed", "best shape") else "up to "
    tokens = f"{upto}{way.draft_length} {what}{'' if way.draft_length == 1 else 's'} at a time"
    by = "" if way.policy == "fixed" else f" by {way.policy}"
    return f"drafting with {way.label}{by}, {tokens},"


def _briefly(way: Ranked) -> str:
    if way.way is not None and len(way.way.drafters) > 1:
        return way.policy
    how = f", K {way.draft_length}" if way.policy == "fixed" else f", {way.policy}"
    return f"{way.label}{how}"


def _named_json(way: Ranked) -> Mapping[str, Any]:
    return {
        "drafter": way.drafter,
        "policy": way.policy,
        "exit_layer": way.exit_layer,
        "draft_length": way.draft_length,
    }


def _times(way: Ranked) -> str:
    pair = way.interval
    return f"{way.speedup:.2f}x" + ("" if pair is None else f" [{pair[0]:.2f}, {pair[1]:.2f}]")
