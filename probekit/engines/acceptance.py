"""How many of its drafts a model accepts, position by position: what engines report, and simulate, under many names.

Their definitions differ in three things only: whether the bonus token is counted, whether a position's rate is
conditional on the positions before it, and whether rounds without drafts count. Here rounds are those that verify at
least one draft, as engines count them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from probekit.errors import InputError
from probekit.prediction.table import Cell, Prediction

SCHEMA = "probekit/acceptance/1"


@dataclass(frozen=True)
class AcceptanceProfile:
    """Acceptance of one drafter at one draft length, predicted from a trace by an engine's convention.

    Parameters
    ----------
    rounds, drafted, accepted: counts over all texts (expected ones for sampled text); rounds that verify drafts.
    tokens_per_round: tokens / all rounds, the bonus token in it. alpha: accepted / (accepted + rejections).
    accepted_by_position: (K,) rounds that accepted their first, second, ... draft.
    exact: whether the text is the model's own and everything that the engine counts is known.
    """

    model: str
    drafter: str
    draft_length: int
    text: str
    convention: str
    prompts: int
    rounds: float
    drafted: float
    accepted: float
    alpha: float | None
    tokens_per_round: float | None
    acceptance_rate_interval: tuple[float, float] | None
    accepted_by_position: tuple[float, ...]
    exact: bool

    @classmethod
    def of(cls, prediction: Prediction, cell: Cell) -> AcceptanceProfile:
        """Of one cell of a prediction. Raises InputError where no round drafts anything."""
        rounds = cell.rounds_by_drafted[:, 1:].sum().item()
        if not rounds:
            raise InputError(
                f"{cell.label} drafts nothing on these texts: there is no acceptance to speak of.", "Trace more tokens."
            )
        return cls(
            prediction.model, cell.label, cell.draft_length, prediction.text, prediction.first_round, cell.prompts,
            rounds, cell.drafted, cell.accepted, cell.alpha, cell.tokens_per_round, cell.acceptance_rate_interval,
            tuple(cell.accepted_by_position), prediction.exact,
        )  # fmt: skip

    @property
    def acceptance_rate(self) -> float:
        """accepted / drafted."""
        return self.accepted / self.drafted

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted / rounds: the bonus token is in it, also where a text ended without one."""
        return 1 + self.accepted / self.rounds

    @property
    def unconditional(self) -> list[float]:
        """(K,) share of rounds that accept their first, second, ... draft; never rising."""
        return [accepted / self.rounds for accepted in self.accepted_by_position]

    @property
    def conditional(self) -> list[float | None]:
        """(K,) share of those that accepted all before it; None where none did."""
        before = (self.rounds, *self.accepted_by_position)
        return [at / of if of else None for at, of in zip(self.accepted_by_position, before, strict=False)]

    def to_json(self, engine: str, words: Mapping[str, Any], simulated: Mapping[str, Any]) -> dict[str, Any]:
        """words: the same figures by the engine's names. simulated: settings that make engines accept so."""
        interval = self.acceptance_rate_interval
        return {
            "schema": SCHEMA, "model": self.model, "drafter": self.drafter, "draft_length": self.draft_length,
            "text": self.text, "convention": self.convention, "prompts": self.prompts, "exact": self.exact,
            "rounds": self.rounds, "drafted": self.drafted, "accepted": self.accepted,
            "accepted_by_position": list(self.accepted_by_position),
            "acceptance_rate": self.acceptance_rate,
            "acceptance_rate_interval": None if interval is None else list(interval),
            "alpha": self.alpha, "tokens_per_round": self.tokens_per_round,
            "mean_acceptance_length": self.mean_acceptance_length,
            "unconditional": self.unconditional, "conditional": self.conditional,
            "engine": {"name": engine, "words": dict(words)}, "simulated": dict(simulated),
        }  # fmt: skip


AICONFIGURATOR_POSITIONS = 5  # its --nextn reaches so far, and it wants a rate for each


def simulated(profile: AcceptanceProfile) -> dict[str, Any]:
    """Settings by which engines and planners accept at these rates without a drafter: for their benchmarks.

    vLLM (`synthetic_acceptance_rates`) and llama.cpp (`--spec-synth-rates`) take unconditional rates, AIConfigurator
    (`--nextn-accept-rates`) conditional ones, SGLang the mean acceptance length.
    """
    unconditional = [round(rate, 6) for rate in profile.unconditional]
    found: dict[str, Any] = {
        "vllm": {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": unconditional},
        "llama.cpp": ["--spec-synth-rates", ",".join(f"{rate:g}" for rate in unconditional)],
        "sglang": {"SGLANG_SIMULATE_ACC_LEN": f"{profile.mean_acceptance_length:.4f}"},
    }
    if profile.draft_length <= AICONFIGURATOR_POSITIONS:
        rates = [0.0 if rate is None else rate for rate in profile.conditional]
        rates += [0.0] * (AICONFIGURATOR_POSITIONS - len(rates))
        found["aiconfigurator"] = [
            "--nextn", str(profile.draft_length), "--nextn-accept-rates", ",".join(f"{rate:.6g}" for rate in rates)
        ]  # fmt: skip
    return found
