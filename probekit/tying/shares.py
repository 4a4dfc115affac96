"""What the lens says at each layer: the model's token, its own input, something near, or gibberish. Needs no torch.

Every (layer, position) belongs to one class, the first that fits:
    agrees      the lens and the model have the same argmax
    echoes      the lens's argmax is the token that was read
    in top 50   the lens's argmax is among the model's 50 most probable tokens
    gibberish   none of these
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probekit.errors import InputError
from probekit.prediction.intervals import SHARE, UNBOUNDED, Estimate, Share, difference, estimate

if TYPE_CHECKING:
    from probekit.traces.schema import LensName
    from probekit.traces.trace import Trace

CLASSES = ("agrees", "echoes", "in top 50", "gibberish")
TOP = 50


def classes_of(trace: Trace, prompt: int, lens: LensName = "final-norm") -> np.ndarray:
    """(L+1, N) int8: an index into CLASSES for every layer and generated position of one prompt."""
    require_all(trace)
    agrees, echo = trace.values(prompt, "agrees", lens), trace.values(prompt, "echo", lens)
    near = trace.values(prompt, "model_rank", lens) < TOP
    return np.select([agrees, echo, near], [0, 1, 2], default=3).astype(np.int8)


def class_shares(trace: Trace, lens: LensName = "final-norm") -> Share:
    """(classes, L+1): share of generated positions in each class; the classes sum to 1."""
    counts = []
    for prompt in trace.prompts:
        classes = classes_of(trace, prompt, lens)
        counts.append(np.stack([(classes == index).sum(axis=1) for index in range(len(CLASSES))]))
    return Share(np.stack(counts, axis=-1), _tokens(trace), tuple(trace.prompts), SHARE)


def layer_means(trace: Trace, column: str, lens: LensName = "final-norm") -> Share:
    """(L+1,): mean of one column of `layers` over the generated positions."""
    sums = [trace.values(prompt, column, lens).sum(axis=1, dtype=np.float64) for prompt in trace.prompts]
    bounds = SHARE if column in ("agrees", "echo") else UNBOUNDED
    return Share(np.stack(sums, axis=-1), _tokens(trace), tuple(trace.prompts), bounds)


def shares_table(trace: Trace, lens: LensName = "final-norm") -> pd.DataFrame:
    """A row for each layer and class: model, lens, layer, class, share, low, high."""
    shares = class_shares(trace, lens)
    low, high = shares.interval()
    index = pd.MultiIndex.from_product([CLASSES, range(trace.depth + 1)], names=["class", "layer"])
    flat = {"share": shares.values.ravel(), "low": low.ravel(), "high": high.ravel()}
    frame = pd.DataFrame(flat, index=index).reset_index()
    frame.insert(0, "model", trace.manifest.model.name)
    frame.insert(1, "lens", lens)
    return frame[["model", "lens", "layer", "class", "share", "low", "high"]]


# ------------------------------------------------------------------------------------------ figures of a curve
def last_rise(curve: np.ndarray, level: float = 0.5) -> np.ndarray:
    """Depth, in layers, at which a curve comes to `level` for good: linear between layers.

    curve: (L+1, draws). Returns (draws,): 0 where the curve never falls below the level, NaN where it ends below it.
    """
    curve = np.asarray(curve, np.float64)
    layers = np.arange(len(curve))[:, None]
    below = np.where(curve < level, layers, -1).max(axis=0)  # the last layer below the level
    start = np.clip(below, 0, len(curve) - 2)
    left, right = np.take_along_axis(curve, np.stack([start, start + 1]), axis=0)
    step = np.where(right > left, (level - left) / np.where(right > left, right - left, 1.0), 0.0)
    return np.where(below < 0, 0.0, np.where(below == len(curve) - 1, np.nan, start + step))


def half_agreement(trace: Trace, lens: LensName = "final-norm") -> Estimate:
    """The depth of half agreement: layers after which the lens has the model's token half of the time, for good."""
    return estimate(layer_means(trace, "agrees", lens), last_rise)


@dataclass(frozen=True)
class Valley:
    """Where the lens says neither its input nor the answer.

    known: share of positions that agree or echo. floor: the least of it over layers 0..L; layer: where that is;
    drop: known at layer 0 minus the floor: how much of the echo is lost before the answer comes; 0 where there is no
    valley; wide: layers at which known is below one half.
    """

    floor: Estimate
    layer: Estimate
    drop: Estimate
    wide: Estimate


def valley(trace: Trace, lens: LensName = "final-norm") -> Valley:
    """The valley between echo and answer."""
    shares = class_shares(trace, lens)
    known = Share(shares.numerators[:2].sum(axis=0), shares.denominators[0], shares.prompts, SHARE)
    return Valley(
        floor=estimate(known, lambda curve: curve.min(axis=0)),
        layer=estimate(known, lambda curve: curve.argmin(axis=0).astype(float)),
        drop=estimate(known, lambda curve: curve[0] - curve.min(axis=0)),
        wide=estimate(known, lambda curve: (curve < 0.5).sum(axis=0).astype(float)),
    )


# --------------------------------------------------------------------------------------------- norm or raw
def norm_or_raw(trace: Trace) -> pd.DataFrame:
    """How much of the raw lens's gibberish is the missing norm: a row a layer 0..L-1, and one for the early half.

    gibberish_raw, gibberish_norm: shares; agreement_raw, agreement_norm: likewise. missing_norm: the share of the raw
    lens's gibberish that is gone with the norm, 1 - gibberish_norm / gibberish_raw. agreement_gain: agreement_norm -
    agreement_raw, paired. Each with its interval, `_low` and `_high`. `layers` names the row: a layer, or "1..h" for
    the early half.

    Layer L is left out: its raw row is the model's own.
    """
    if set(trace.manifest.settings.lenses) < {"final-norm", "raw"}:
        raise InputError("this trace has one lens only.", "Trace again with both lenses.")
    norm, raw = class_shares(trace, "final-norm"), class_shares(trace, "raw")
    half = max(1, trace.depth // 2)
    groups = {str(layer): [layer] for layer in range(trace.depth)} | {f"1..{half}": list(range(1, half + 1))}
    rows = []
    for name, layers in groups.items():
        pooled = {key: share.at((slice(None), layers)) for key, share in (("norm", norm), ("raw", raw))}
        summed = {
            key: Share(share.numerators.sum(axis=1), share.denominators.sum(axis=1), share.prompts, SHARE)
            for key, share in pooled.items()
        }
        gone = Share(
            summed["raw"].numerators[3] - summed["norm"].numerators[3], summed["raw"].numerators[3], norm.prompts
        )
        gain = difference(summed["norm"].at(0), summed["raw"].at(0))
        figures = {
            "gibberish_raw": _figure(summed["raw"].at(3)),
            "gibberish_norm": _figure(summed["norm"].at(3)),
            "missing_norm": _figure(gone),
            "agreement_raw": _figure(summed["raw"].at(0)),
            "agreement_norm": _figure(summed["norm"].at(0)),
            "agreement_gain": Estimate(float(gain.values), float(gain.low), float(gain.high)),
        }
        row: dict[str, Any] = {"model": trace.manifest.model.name, "layers": name}
        for quantity, (value, low, high) in figures.items():
            row |= {quantity: value, f"{quantity}_low": low, f"{quantity}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def _figure(share: Share) -> Estimate:
    """A single share, with its interval."""
    low, high = share.interval()
    return Estimate(float(share.values), float(low), float(high))


def require_all(trace: Trace) -> None:
    """InputError for a trace that has agreement only."""
    if trace.manifest.settings.statistics != "all":
        raise InputError("this trace has agreement only.", "Trace again with `--statistics all`.")


def _tokens(trace: Trace) -> np.ndarray:
    """(prompts,): generated tokens of each."""
    return trace.texts["new_tokens"].to_numpy(np.float64)
