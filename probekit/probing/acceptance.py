"""The acceptance probe as a policy of drafting: fitted, given the threshold that is fastest, and held against others.

Everything is learned on some prompts and judged on others: the probe's weights, the exit, the draft length, and the
threshold. A threshold is chosen by replaying rounds of prompts that the probe at hand was not fitted on, since a
probe is surer of what it was fitted on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from probekit.choice.rank import priced
from probekit.choice.ranking import Ranked
from probekit.costs.profile import Costs
from probekit.drafting.drafters import ExitLayer, traced_drafters
from probekit.drafting.policies import ConfidenceThreshold, EntropyThreshold, MarginThreshold, Policy
from probekit.drafting.probe_policy import ProbeThreshold
from probekit.drafting.ways import Way
from probekit.errors import InputError
from probekit.probing.labels import accepted
from probekit.probing.probe import LEAST_PROMPTS, Estimator, Sample, choose_setting, deal
from probekit.traces.trace import Trace, as_trace

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FOLDS = 3
OTHERS: Mapping[str, tuple[Policy, ...]] = {
    "confidence": tuple(map(ConfidenceThreshold, (0.1, *THRESHOLDS))),
    "entropy": tuple(map(EntropyThreshold, (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0))),
    "margin": tuple(map(MarginThreshold, (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0))),
}
"""The lens's own figures as policies, each at as many thresholds as the probe."""


def acceptance_policy(
    trace: Trace | str, exit_layer: int, *, threshold: float = 0.5, grid: Mapping[str, Sequence[Any]] | None = None
) -> ProbeThreshold:
    """A linear probe of whether the exit's draft is accepted, fitted on all prompts of a trace, as a policy.

    The trace has kept the residuals of the exit layer. grid: {"C": values}, chosen among on a third of the prompts.

    Raises InputError where none were kept, and where the exit is always right or always wrong.

    Examples
    --------
    >>> import tempfile
    >>> import probekit
    >>> texts = ["Once upon a time", "The king", "A wolf said", "In the forest"]
    >>> folder = tempfile.mkdtemp()
    >>> trace = probekit.trace("tales-layerskip", texts, folder, max_new_tokens=24, keep_residuals=[3])
    >>> policy = acceptance_policy(trace, 3, threshold=0.4)
    >>> found = probekit.validate_ways("tales-layerskip", trace, [Way((ExitLayer(3),), 4, policy, "probe")])
    >>> found.ways[0].rounds_equal
    True
    """
    found = _fitted(as_trace(trace), exit_layer, grid)
    if found is None:
        raise InputError(
            f"exit layer {exit_layer} is always right here, or always wrong: there is nothing to tell apart."
        )
    return found.at(threshold)


def _fitted(trace: Trace, exit_layer: int, grid: Mapping[str, Sequence[Any]] | None = None) -> ProbeThreshold | None:
    """None where all drafts of the exit share one fate."""
    sample = Sample.of(trace, exit_layer, accepted)
    prompt = sample.frame["prompt"].to_numpy()
    classes = np.unique(sample.y)
    if len(classes) < 2:
        return None
    engine = Estimator.of("logistic", grid, False)
    everything = np.ones(len(sample.y), dtype=bool)
    choice = choose_setting(engine, sample.rows, sample.y, prompt, everything, classes)
    fitted = engine.fitted(choice.setting, sample.x, sample.y)
    weights, offset = fitted.coef_[0], float(fitted.intercept_[0])
    return ProbeThreshold(exit_layer, weights, offset, 0.5, trace.manifest.model.name)


class Compared(NamedTuple):
    """A kind of policy, chosen on the prompts that it is not judged on.

    name: "fixed", "confidence", "entropy", "margin" or "probe". learned: the way that was chosen. judged: what it does
    on the other prompts.
    """

    name: str
    learned: Way
    judged: Ranked


def compare_policies(
    trace: Trace | str,
    costs: Costs,
    learn_on: Iterable[int],
    judge_on: Iterable[int],
    exit_layers: Iterable[int] | None = None,
    draft_lengths: Iterable[int] = range(1, 9),
) -> list[Compared]:
    """The best fixed pair, the best threshold on each of the lens's figures, and the best on a probe, by these costs.

    learn_on, judge_on: prompts, which must not overlap. exit_layers: by default the exits whose residuals were kept.
    Each kind chooses its exit, its draft length (of policies: all, half or a quarter of the longest) and its threshold
    on `learn_on`, by predicted time.
    """
    trace = as_trace(trace)
    mine, others = trace.select(learn_on), trace.select(judge_on)
    if set(mine.prompts) & set(others.prompts):
        raise InputError("prompts that are learned on are not judged on.", "Give two sets without a common prompt.")
    if len(mine) < LEAST_PROMPTS:
        raise InputError(f"a policy is learned on {LEAST_PROMPTS} prompts or more, not on {len(mine)}.")
    kept = trace.manifest.settings.keep_residuals
    chosen = [layer for layer in kept if 1 <= layer < trace.depth] if exit_layers is None else exit_layers
    exits = [each for each in traced_drafters(trace, chosen, draft_model=False) if isinstance(each, ExitLayer)]
    lengths = sorted(dict.fromkeys(draft_lengths))
    found = {"fixed": _fastest(mine, [Way((each,), length) for each in exits for length in lengths], costs)}
    most = [length for length in lengths if length in (lengths[-1] // 4, lengths[-1] // 2, lengths[-1])]
    for name, policies in OTHERS.items():
        found[name] = _fastest(
            mine, [Way((each,), longest, own, name) for each in exits for longest in most for own in policies], costs
        )
    probed = _best_probe(mine, exits, most, costs)
    if probed is not None:
        found["probe"] = probed
    return [Compared(name, way, priced(others, way, costs)) for name, way in found.items()]


def _fastest(trace: Trace, ways: Sequence[Way], costs: Costs) -> Way:
    return max(ways, key=lambda way: priced(trace, way, costs).speedup)


def _best_probe(trace: Trace, exits: Sequence[ExitLayer], most: Sequence[int], costs: Costs) -> Way | None:
    """The exit and threshold that are fastest on prompts that their probes were not fitted on; fitted again on all."""
    fold = deal(trace.prompts, FOLDS, 0)
    parts = [trace.select(each for each in trace.prompts if fold[each] == part) for part in range(FOLDS)]
    rest = [trace.select(each for each in trace.prompts if fold[each] != part) for part in range(FOLDS)]
    best, least = None, np.inf
    for each in exits:
        probes = [_fitted(part, each.exit_layer) for part in rest]
        whole = _fitted(trace, each.exit_layer)
        if whole is None or None in probes:
            continue
        for longest, threshold in product(most, THRESHOLDS):
            ways = [Way((each,), longest, probe.at(threshold), "probe") for probe in probes if probe is not None]
            spent = sum(
                float(priced(part, way, costs).seconds_of_prompt.sum()) for part, way in zip(parts, ways, strict=True)
            )
            if spent < least:
                best, least = Way((each,), longest, whole.at(threshold), "probe"), spent
    return best
