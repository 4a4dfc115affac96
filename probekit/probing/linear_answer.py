"""From which layer on is the answer linearly there, although the lens does not say it?

A ridge probe maps h[l] to h[L], on prompts of its own; what it foretells is read by the model's own norm and head. The
share of positions where that gives the model's token is a lower bound of what a linear map finds: with more rows it
finds more. Beside it stand the lens, which reads h[l] itself, and a control that knows the mean of h[L] only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch

from probekit.errors import InputError
from probekit.lens.lens import Lens
from probekit.models.loaded import Loaded, as_loaded
from probekit.prediction.intervals import Share
from probekit.probing.probe import FOLDS, LEAST_PROMPTS, Estimator, choose_setting, deal
from probekit.progress import Progress, usual_progress
from probekit.traces.trace import Trace, as_trace
from probekit.validation.run import check_models

CHUNK_ROWS = 256
ALPHAS = (1e5, 1e4, 1e3, 1e2)


def linear_answer(
    loaded: Loaded | Any,
    trace: Trace | str,
    layers: Iterable[int] | None = None,
    *,
    folds: int = FOLDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """A row a layer and a kind (`lens`, `probe`, `control`): the share of output tokens that it says, and its interval.

    Parameters
    ----------
    loaded: the model that was traced. layers: of those whose residuals the trace kept; that of L must be among these.
    folds, seed: prompts are dealt into folds, and a fold's rows are answered by a probe of the others' prompts.

    Columns: model, layer, kind, value, low, high, positions. Raises InputError for a trace without these residuals.
    """
    loaded, trace = as_loaded(loaded), as_trace(trace)
    check_models(loaded, trace, None)
    kept = trace.manifest.settings.keep_residuals
    if len(trace) < LEAST_PROMPTS:
        raise InputError(f"this run has {len(trace)} prompts; a probe needs {LEAST_PROMPTS}, which are split.")
    chosen = [layer for layer in kept if layer < trace.depth] if layers is None else sorted(set(layers))
    last = trace.residuals(trace.depth).scored()
    target = last.numpy().astype(np.float64)
    prompt, output = (last.frame[name].to_numpy() for name in ("prompt", "output"))
    fold_of = deal(trace.prompts, folds, seed)
    fold = np.array([fold_of[each] for each in prompt.tolist()])
    answer = _argmax(loaded, target)
    report, rows = usual_progress(progress), []
    means = np.stack([target[fold != each].mean(axis=0) for each in range(folds)])
    control = _argmax(loaded, means)[fold] == answer
    for done, layer in enumerate(chosen):
        report("linear answer", done, len(chosen))
        x = trace.residuals(layer).scored().numpy()
        said = _argmax(loaded, _foretold(x, target, prompt, fold)) == answer
        lens = np.array([trace.agreement(each)[layer][at] for each, at in zip(prompt.tolist(), output, strict=True)])
        for kind, right in (("lens", lens), ("probe", said), ("control", control)):
            rows.append({"model": loaded.name, "layer": layer, "kind": kind, **_share(right, prompt)})
    report("linear answer", len(chosen), len(chosen))
    return pd.DataFrame(rows)


def _foretold(x: np.ndarray, target: np.ndarray, prompt: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """(rows, width): h[L] as probes see it that were not fitted on the row's prompt."""
    engine = Estimator.of("ridge", {"alpha": ALPHAS}, True)
    found = np.empty_like(target)
    for each in np.unique(fold):
        train, test = fold != each, fold == each
        choice = choose_setting(engine, lambda rows: x[rows], target, prompt, train, np.empty(0))
        found[test] = engine.fitted(choice.setting, x[train], target[train]).predict(x[test])
    return found


def _argmax(loaded: Loaded, states: np.ndarray) -> np.ndarray:
    """(rows,): the token that norm and head read off residuals at L."""
    lens, dtype = Lens(loaded.anatomy), loaded.dtype
    with torch.inference_mode():
        pieces = [
            lens(torch.from_numpy(states[start : start + CHUNK_ROWS]).to(loaded.device, dtype), loaded.depth).argmax(-1)
            for start in range(0, len(states), CHUNK_ROWS)
        ]
    return torch.cat(pieces).cpu().numpy()


def _share(right: np.ndarray, prompt: np.ndarray) -> dict[str, float]:
    prompts, place = np.unique(prompt, return_inverse=True)
    share = Share(np.bincount(place, weights=right), np.bincount(place).astype(float), tuple(prompts.tolist()))
    low, high = share.interval()
    return {"value": float(share.values), "low": float(low), "high": float(high), "positions": len(right)}
