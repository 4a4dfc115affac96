"""How sure is a choice: dependence of acceptances, prompts that a choice needs, and what another kind of text costs.

Acceptances are compared with what independence would give: neighbours with no correlation, tokens per round with the
closed form (runs with the geometric law: `prediction/run_lengths.py`). Choices are judged by drawing prompts again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probekit.choice.choose import decoding_seconds
from probekit.errors import InputError
from probekit.prediction.intervals import Share, draws, spread
from probekit.prediction.predict import predict
from probekit.prediction.rounds import CUT, closed_form_tokens_per_round, expected_rounds
from probekit.prediction.table import Prediction

if TYPE_CHECKING:
    from probekit.costs.profile import Costs
    from probekit.traces.trace import Trace

NONE = "none"
"""The name of the choice not to speculate: speedup 1, always."""


def autocorrelation(trace: Trace, exit_layer: int, lags: Iterable[int] = range(1, 9), *, within: bool = False) -> Share:
    """(lags,): correlation of agreement at one exit with itself some positions later; 0 for independent agreements.

    within: take each text's own mean away first, so that easy and hard texts do not count as dependence. Of n
    independent values less their own mean, two have the covariance -variance / n: that much is put back, or short
    texts would look as if agreements avoided each other.
    """
    _require_greedy(trace)
    series = [trace.agreement(prompt)[exit_layer].astype(np.float64) for prompt in trace.prompts]
    mean = np.concatenate(series).mean()
    above, below = [], []
    for lag in lags:
        sums = []
        for values in series:
            n, pairs = len(values), max(0, len(values) - lag)
            if within and n < 2:
                sums.append((0.0, 0.0))
                continue
            centred = values - (values.mean() if within else mean)
            variance = centred @ centred / (n - 1 if within else n)
            product = centred[:pairs] @ centred[n - pairs :]
            sums.append((product + (pairs * variance / n if within else 0.0), pairs * variance))
        above.append([product for product, _ in sums])
        below.append([variance for _, variance in sums])
    return Share(np.array(above), np.array(below), tuple(trace.prompts))


def closed_form_error(
    trace: Trace, exit_layers: Iterable[int] | None = None, draft_lengths: Iterable[int] = (2, 4, 8)
) -> pd.DataFrame:
    """What the closed form (1 - a^(K+1)) / (1 - a) makes of tokens per round, beside the exact figure.

    Three columns apart what goes wrong: `exact`; `independent`, the exact recursion for texts of the same lengths whose
    positions are accepted independently, each with the chance of its layer (so the ends of texts count, dependence does
    not); `closed_form` with a = alpha of the cell, as papers do. `error` is closed_form / exact - 1, with its interval;
    `dependence` is exact / independent - 1.
    """
    rows = []
    budget = trace.manifest.settings.max_new_tokens
    texts = trace.texts.set_index("prompt").loc[trace.prompts]
    lengths = texts["new_tokens"].tolist()
    budgets = np.where(texts["ended"] == CUT, lengths, np.maximum(budget, lengths)).tolist()
    prediction = predict(trace, exit_layers, draft_lengths, drafter=False)
    times = draws(len(trace))
    greedy = trace.manifest.settings.text == "greedy"
    for cell in prediction.cells:
        read = trace.agreement if greedy else trace.accept_probability
        chance = float(np.concatenate([read(prompt)[cell.key.exit_layer] for prompt in trace.prompts]).mean())
        alone = [
            expected_rounds(np.full(n, chance), cell.draft_length, most)
            for n, most in zip(lengths, budgets, strict=True)
        ]
        independent = sum(one.tokens for one in alone) / max(sum(one.rounds for one in alone), 1e-12)
        error, drawn = np.nan, np.full(len(times), np.nan)
        if cell.tokens_per_round is not None and cell.alpha is not None:
            error = _closed_form(cell.alpha, cell.draft_length) / cell.tokens_per_round - 1
            accepted, rejected = times @ cell.accepted_of_prompt, times @ cell.rejections_of_prompt
            emitted, rounds = times @ cell.tokens_of_prompt, times @ cell.rounds_of_prompt
            with np.errstate(invalid="ignore", divide="ignore"):
                alpha = accepted / (accepted + rejected)
                drawn = _closed_form(alpha, cell.draft_length) / (emitted / rounds) - 1
        low, high = spread(drawn, len(trace))
        rows.append(
            {
                "model": trace.manifest.model.name,
                "text": trace.manifest.settings.text,
                "exit_layer": cell.exit_layer,
                "draft_length": cell.draft_length,
                "acceptance": chance,
                "alpha": cell.alpha,
                "exact": cell.tokens_per_round,
                "independent": independent,
                "closed_form": closed_form_tokens_per_round(cell.alpha, cell.draft_length),
                "error": error,
                "error_low": float(low),
                "error_high": float(high),
                "dependence": (cell.tokens_per_round or np.nan) / independent - 1,
            }
        )
    return pd.DataFrame(rows)


def _closed_form(alpha: Any, draft_length: int) -> Any:
    return sum(alpha**power for power in range(draft_length + 1))


def _require_greedy(trace: Trace) -> None:
    if trace.manifest.settings.text != "greedy":
        text = trace.manifest.settings.text
        raise InputError(
            f"runs and correlations are of agreement on greedy text; this trace has {text} text.",
            "Trace without a temperature.",
        )


@dataclass(frozen=True, eq=False)
class Timed:
    """Tokens and seconds of every cell on every prompt; the first cell is not to speculate.

    cells: their names. tokens, seconds: (cells, prompts). autoregressive_s: seconds of one autoregressive token.
    """

    cells: tuple[str, ...]
    tokens: np.ndarray
    seconds: np.ndarray
    autoregressive_s: float
    prompts: tuple[int, ...]

    def speedups(self, times: np.ndarray) -> np.ndarray:
        """(..., cells): speedup of each cell over prompts that were drawn `times`, (..., prompts)."""
        seconds = times @ self.seconds.T
        tokens = times @ self.tokens.T
        return np.where(seconds > 0, tokens * self.autoregressive_s / np.where(seconds > 0, seconds, 1.0), 1.0)

    def of(self, prompts: Sequence[int]) -> Timed:
        places = [self.prompts.index(prompt) for prompt in prompts]
        return Timed(self.cells, self.tokens[:, places], self.seconds[:, places], self.autoregressive_s, tuple(prompts))

    def without_none(self) -> Timed:
        """The same without the choice not to speculate."""
        return Timed(self.cells[1:], self.tokens[1:], self.seconds[1:], self.autoregressive_s, self.prompts)


def timed(prediction: Prediction, costs: Costs) -> Timed:
    """Cost every round of a prediction: its self-speculative cells, and not to speculate."""
    cells = [cell for cell in prediction.cells if cell.exit_layer is not None]
    if not cells:
        raise InputError("this prediction has no exit layer to time.")
    names, tokens, seconds = [NONE], [cells[0].tokens_of_prompt], []
    seconds.append(cells[0].tokens_of_prompt * costs.autoregressive_s)
    for cell in cells:
        names.append(f"layer {cell.exit_layer}, {cell.draft_length} tokens")
        tokens.append(cell.tokens_of_prompt)
        seconds.append(decoding_seconds(cell, costs))
    return Timed(tuple(names), np.array(tokens, float), np.array(seconds), costs.autoregressive_s, prediction.prompts)


def learning_curve(
    table: Timed, sizes: Sequence[int], *, within: float = 0.02, repeats: int = 400, outer: int = 100, seed: int = 0
) -> pd.DataFrame:
    """The chance that a choice made on n prompts is within 2 % of the best, for several n.

    The prompts of the table stand for all: n of them are drawn with replacement, the best cell on them is chosen and
    judged on the whole table. The interval draws the whole table's prompts again and repeats all of that.

    Columns: prompts (n), probability, low, high, loss (mean share of the best speedup that is lost).
    """
    random = np.random.default_rng(seed)
    count = len(table.prompts)

    def judged(whole: np.ndarray, size: int, times: int) -> tuple[float, float]:
        drawn = random.multinomial(size, whole / whole.sum(), size=times)
        chosen = table.speedups(drawn).argmax(axis=1)
        truth = table.speedups(whole[None])[0]
        worth = truth[chosen] / truth.max()
        return float((worth >= 1 - within).mean()), float(1 - worth.mean())

    rows = []
    populations = draws(count, outer, seed)
    for size in sizes:
        probability, loss = judged(np.ones(count), size, repeats)
        again = np.array([judged(population, size, max(50, repeats // 4))[0] for population in populations])
        low, high = spread(again)
        rows.append({"prompts": size, "probability": probability, "low": float(low), "high": float(high), "loss": loss})
    return pd.DataFrame(rows)


def transfer(tables: Mapping[str, Timed]) -> pd.DataFrame:
    """Choose on one kind of text, use on another: what is lost?

    One row for each pair of kinds: chosen_on, used_on, cell, speedup (there), best_cell, best_speedup (there), loss =
    1 - speedup / best_speedup, with the interval over prompts of both kinds; drawn again, the choice is made again.
    """
    first = next(iter(tables.values()))
    if any(table.cells != first.cells for table in tables.values()):
        raise InputError("tables that are compared need the same cells.", "Predict the same exits and draft lengths.")
    rows = []
    for chosen_on, here in tables.items():
        for used_on, there in tables.items():
            mine, theirs = here.speedups(np.ones(len(here.prompts))), there.speedups(np.ones(len(there.prompts)))
            cell, best = int(mine.argmax()), int(theirs.argmax())
            same = here.prompts == there.prompts
            mine_drawn = here.speedups(draws(len(here.prompts)))
            theirs_drawn = there.speedups(draws(len(there.prompts), seed=0 if same else 1))
            picked = np.take_along_axis(theirs_drawn, mine_drawn.argmax(axis=1)[:, None], axis=1)[:, 0]
            prompts = min(len(here.prompts), len(there.prompts))
            low, high = spread(1 - picked / theirs_drawn.max(axis=1), prompts)
            rows.append(
                {
                    "chosen_on": chosen_on,
                    "used_on": used_on,
                    "cell": here.cells[cell],
                    "speedup": theirs[cell],
                    "best_cell": there.cells[best],
                    "best_speedup": theirs[best],
                    "loss": 1 - theirs[cell] / theirs[best],
                    "loss_low": float(low),
                    "loss_high": float(high),
                }
            )
    return pd.DataFrame(rows)
