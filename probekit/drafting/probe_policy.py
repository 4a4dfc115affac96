"""A probe of the residual as a policy: stop drafting when the draft is not likely enough to be accepted. No torch.

The policy is what is left of a fitted probe: weights, an offset and a threshold. It computes the same figure from a
trace's residuals (an array) and from a running decoder's (a tensor).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from probekit.errors import InputError
from probekit.files import atomic_text
from probekit.foreign.json import read_json

SCHEMA = "probekit/probe-policy/1"


@dataclass(frozen=True, eq=False)
class ProbeThreshold:
    """Stop after a draft that a linear probe gives less than `threshold` chance to be accepted; it is still verified.

    Parameters
    ----------
    exit_layer: E, whose residual the probe reads.
    weights, offset: of the log-odds of acceptance, weights . residual + offset. weights: (width,).
    threshold: in [0, 1]. model: whose residuals the probe was fitted on.
    """

    exit_layer: int
    weights: np.ndarray = field(repr=False)
    offset: float
    threshold: float
    model: str = ""
    exact = False
    needs_confidence = True
    counts_drafts = False

    def __post_init__(self) -> None:
        weights = np.ascontiguousarray(self.weights, dtype=np.float64)
        if weights.ndim != 1 or not np.isfinite(weights).all() or not np.isfinite(self.offset):
            raise InputError(f"a probe's weights are one finite number a width, not of shape {weights.shape}.")
        if not 0 <= self.threshold <= 1:
            raise InputError(f"the probe's threshold must lie in [0, 1], not {self.threshold}.")
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "_tensors", {})

    def of_residuals(self, residuals: Any) -> Any:
        """The chance of acceptance, (...). residuals: (..., width), an array or a tensor."""
        if residuals.shape[-1] != len(self.weights):
            raise InputError(f"this probe reads residuals {len(self.weights)} wide, not {residuals.shape[-1]}.")
        if isinstance(residuals, np.ndarray):
            return 1 / (1 + np.exp(-np.clip(residuals.astype(np.float64) @ self.weights + self.offset, -700, 700)))
        return (residuals.double() @ self._on(residuals) + self.offset).sigmoid()

    def _on(self, residuals: Any) -> Any:
        """The weights beside a tensor, copied there once."""
        kept: dict[Any, Any] = self._tensors  # type: ignore[attr-defined]
        if residuals.device not in kept:
            kept[residuals.device] = residuals.new_tensor(self.weights, dtype=residuals.double().dtype)
        return kept[residuals.device]

    def keep_drafting(self, drafted: int, confidence: float) -> bool:
        return confidence >= self.threshold

    def at(self, threshold: float) -> ProbeThreshold:
        """The same probe with another threshold."""
        return replace(self, threshold=threshold)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; `--policy probe:FILE` reads it."""
        from json import dumps

        document = {
            "schema": SCHEMA, "model": self.model, "exit_layer": self.exit_layer, "threshold": self.threshold,
            "offset": float(self.offset), "weights": self.weights.tolist(),
        }  # fmt: skip
        atomic_text(path, dumps(document) + "\n")
        return Path(path)


def read_probe_policy(path: str | Path) -> ProbeThreshold:
    """What `ProbeThreshold.save` wrote. Raises InputError for anything else."""
    document = read_json(Path(path))
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise InputError(f"{path} is no policy of a probe.", "Write one with ProbeThreshold.save.")
    try:
        return ProbeThreshold(
            int(document["exit_layer"]), np.array(document["weights"], dtype=np.float64), float(document["offset"]),
            float(document["threshold"]), str(document["model"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no whole policy of a probe: {error}.") from None


def probe_policy_named(text: str) -> ProbeThreshold:
    """`probe:FILE`, or `probe:FILE:0.6` with a threshold of one's own."""
    path, _, number = text.partition(":")[2].rpartition(":")
    try:
        threshold = float(number)
    except ValueError:
        return read_probe_policy(text.partition(":")[2])
    if not path:
        raise InputError(f"{text!r} names no file.", "Write probe:FILE or probe:FILE:0.6.")
    return read_probe_policy(path).at(threshold)
