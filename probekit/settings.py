"""Settings that travel as values: small frozen dataclasses, checked where they are made. Nothing here needs torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from probekit.errors import InputError


def whole_number(what: str, value: Any, least: int = 1) -> int:
    """Return `value`, or raise InputError where it is no whole number of at least `least`.

    what: how the sentence begins: "the context must be".
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{what} a whole number of at least {least}, not {value!r}.")
    return value


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy, and is the default.

    Parameters
    ----------
    temperature: >= 0; logits are divided by it.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: in (0, 1]; keep the fewest most probable tokens whose probabilities sum to at least top_p.
    seed: of the random numbers; prompts differ by their index.

    Examples
    --------
    >>> import probekit
    >>> probekit.Sampling(temperature=0.7, top_p=0.9).greedy
    False
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise InputError(f"the temperature must be a number of at least 0, not {self.temperature}.")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise InputError(f"top-k must be a whole number of at least 0 (0 keeps every token), not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must lie in (0, 1], not {self.top_p}.", "1 keeps every token.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"the seed must be a whole number, not {self.seed!r}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class KeptResiduals:
    """Which residuals a trace keeps, and how.

    Parameters
    ----------
    layers: sites 0..L; None: all of them.
    dtype: as which they are written, one of RESIDUAL_DTYPES; None: as the model computes them.
    rows: "all", or "scored": only those that predict a token of the continuation.
    share: in (0, 1], of those rows; which ones follows from the run's seed, each prompt's index and each position.

    Examples
    --------
    >>> from probekit.settings import KeptResiduals
    >>> KeptResiduals((3, 6), dtype="float16", rows="scored").layers
    (3, 6)
    """

    layers: tuple[int, ...] | None = ()
    dtype: str | None = None
    rows: str = "all"
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in RESIDUAL_DTYPES:
            raise InputError(f"residuals are kept as {', '.join(RESIDUAL_DTYPES)}, not as {self.dtype!r}.")
        if self.rows not in ("all", "scored"):
            raise InputError(f"the rows whose residuals are kept are 'all' or 'scored', not {self.rows!r}.")
        if not 0 < self.share <= 1:
            raise InputError(f"the share of rows whose residuals are kept must lie in (0, 1], not {self.share}.")

    @classmethod
    def of(cls, given: Iterable[int] | str | KeptResiduals) -> KeptResiduals:
        """From sites, or "all" of them."""
        if isinstance(given, KeptResiduals):
            return given
        if isinstance(given, str):
            if given != "all":
                raise InputError(f"residuals are kept of named sites or of 'all', not of {given!r}.")
            return cls(None)
        return cls(tuple(given))


RESIDUAL_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TraceSettings:
    """How a trace is made; the parameters are those of `probekit.trace`."""

    max_new_tokens: int = 96
    sampling: Sampling = Sampling()
    given: bool = False
    statistics: str = "all"
    keep_residuals: KeptResiduals = KeptResiduals()
    backend: str = "hooks"
    chat: bool = False
    batch_size: int | None = None
    top_prompts: int = 1
    skip_long: bool = False
    logged: bool = False
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        _at_least_one("new tokens", self.max_new_tokens)
        if self.batch_size is not None:
            _at_least_one("prompts in a batch", self.batch_size)
        if self.statistics not in ("all", "agreement"):
            raise InputError(f"statistics are 'all' or 'agreement', not {self.statistics!r}.")
        if self.given and not self.sampling.greedy:
            raise InputError("given text is scored at temperature 1.", "Leave the sampling settings out.")
        if self.batch_invariant and self.backend != "hooks":
            raise InputError(
                f"backend {self.backend!r} does not read batch-invariantly.",
                "Use 'hooks', or leave batch-invariance out.",
            )
        if self.given and self.logged:
            raise InputError("a text is either given or out of a log of the model's own.", "Choose one.")

    @property
    def written(self) -> bool:
        """Whether the text comes with the prompts."""
        return self.given or self.logged

    @property
    def text(self) -> str:
        """Whose text is scored: "greedy" and "sampled" text is the model's own, "given" text came with the prompts."""
        return "given" if self.given else "greedy" if self.sampling.greedy else "sampled"


def _at_least_one(what: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise InputError(f"{what}: {number!r}; expected a whole number of at least 1.")


@dataclass(frozen=True)
class StudySettings:
    """What a study does; two studies with equal settings are the same study.

    Parameters
    ----------
    models: references as `load` takes them. prompts: a prompts file; None: the bundled set of the first model.
    max_new_tokens: the budget M of each text. sampling: how texts are chosen; greedy by default.
    exit_layers: that may draft; None: all. draft_lengths: K, ascending. context: tokens in the cache of a timed step.
    batch_size: most prompts in a batch of the trace; None: from the memory at hand.
    draft_model: a model that drafts, too. draft_rows: rows of the head that exit layers draft with; None: all.
    fit_heads: exit layers draft through fitted heads. chat: put prompts through the chat template.
    device, dtype: of the models; None: by `load`'s own rule. adapter: the folder of one, for a study of one model.
    probes: keep residuals of every layer, and probe them.
    """

    models: tuple[str, ...]
    prompts: str | None = None
    max_new_tokens: int = 96
    draft_lengths: tuple[int, ...] = tuple(range(1, 9))
    draft_model: str | None = None
    chat: bool = False
    device: str | None = None
    dtype: str | None = None
    draft_rows: int | None = None
    fit_heads: bool = False
    sampling: Sampling = Sampling()
    exit_layers: tuple[int, ...] | None = None
    context: int = 128
    batch_size: int | None = None
    adapter: str | None = None
    probes: bool = False

    def __post_init__(self) -> None:
        whole_number("the context must be", self.context)
        if self.batch_size is not None:
            _at_least_one("prompts in a batch", self.batch_size)
        if self.draft_rows is not None and not self.sampling.greedy:
            raise InputError(
                "draft heads with fewer rows are predicted for greedy text only.",
                "Leave --draft-rows out, or sample not.",
            )
        if self.exit_layers is not None and (not self.exit_layers or min(self.exit_layers) < 1):
            raise InputError(f"exit layers are {list(self.exit_layers)}; expected one or more, each 1 or more.")
        if self.adapter is not None and len(self.models) != 1:
            raise InputError(
                f"an adapter belongs to one model, and this study has {len(self.models)}.",
                "Name the one model; or name folders that hold only an adapter among the models.",
            )
        if not self.draft_lengths or min(self.draft_lengths) < 1:
            raise InputError(f"draft lengths are {list(self.draft_lengths)}; expected one or more, each 1 or more.")
        if self.max_new_tokens < 1:
            raise InputError(f"the budget is {self.max_new_tokens} new tokens; expected 1 or more.")
        if self.draft_rows is not None and self.draft_rows < 1:
            raise InputError(f"a draft head of {self.draft_rows} rows is out of range: expected 1 or more.")

    @property
    def learns(self) -> bool:
        """Whether drafting is learned from text."""
        return self.fit_heads or self.draft_rows is not None

    def to_json(self) -> dict[str, Any]:
        kept = asdict(self)
        exits = None if self.exit_layers is None else list(self.exit_layers)
        return {**kept, "models": list(self.models), "draft_lengths": list(self.draft_lengths), "exit_layers": exits}

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """The names of settings in which another study's JSON differs; what it does not name is at its default."""
        now = self.to_json()
        usual = StudySettings(self.models).to_json()
        return sorted(name for name in now if before.get(name, usual[name]) != now[name])


def digest(*parts: Any) -> str:
    """Names settings in a few letters: equal JSON gives equal names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
