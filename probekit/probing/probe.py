"""`probe`: fit a probe of a label at each layer of a trace, and judge it on prompts that it never saw.

Prompts are dealt into folds; a fold's rows are answered by a probe of the other folds' prompts, whose regularisation
was chosen within these: fitted on two thirds of the training prompts, judged by log loss (classes) or squared error
(numbers) on the last third, then fitted again on all of them. The same goes for baselines; the control is fitted on
labels that were shuffled among the rows of each part, with the probe's own regularisation. What the residual adds to
the lens's confidence is read off a second probe, that weighs the first one's answer and the lens's figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.base import clone

from probekit.errors import InputError
from probekit.prediction.intervals import spread
from probekit.probing.labels import Label, is_number, known_labels, label_named
from probekit.probing.probe_curve import Figure, LayerProbe, ProbeCurve
from probekit.probing.probe_scores import Auroc, auroc, brier, calibration_error, explained, reliability
from probekit.probing.probes import HELD_BYTES, LogisticProbe, MLPProbe, RidgeProbe
from probekit.progress import Progress, usual_progress
from probekit.settings import whole_number
from probekit.traces.residuals import Residuals
from probekit.traces.trace import Trace, as_trace

if TYPE_CHECKING:
    from collections.abc import Callable

LEAST_PROMPTS = 4
FOLDS = 4
SHUFFLES = 4
CONFIDENCE = ("probability", "entropy", "margin")


class Kind(NamedTuple):
    """A probe with the regularisation that is tried: {parameter: values}, the strongest first."""

    make: Callable[[], Any]
    grid: Mapping[str, Sequence[float]]


KINDS: dict[str, Kind] = {
    "logistic": Kind(LogisticProbe, {"C": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)}),
    "ridge": Kind(RidgeProbe, {"alpha": (1e6, 1e5, 1e4, 1e3, 1e2, 10.0)}),
    "mlp": Kind(MLPProbe, {"weight_decay": (3.0, 1.0, 0.1)}),
}
"""By the names that `probe` and the command line know; one of your own may be added."""


@dataclass(frozen=True)
class Estimator:
    """An estimator and its grid, as `probe` takes them apart."""

    name: str
    base: Any
    grid: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, given: Any, grid: Mapping[str, Sequence[Any]] | None, number: bool) -> Estimator:
        if isinstance(given, str):
            if given not in KINDS:
                raise InputError(f"there is no probe {given!r}: there are {', '.join(KINDS)}.", "Or give an estimator.")
            if number and given != "ridge":
                given = "ridge"
            return cls(given, KINDS[given].make(), KINDS[given].grid if grid is None else grid)
        if not (hasattr(given, "fit") and hasattr(given, "get_params")):
            raise InputError(f"{type(given).__name__} is no estimator: it lacks fit or get_params.")
        if not hasattr(given, "predict" if number else "predict_proba"):
            raise InputError(f"{type(given).__name__} has no {'predict' if number else 'predict_proba'}.")
        return cls(type(given).__name__, given, grid or {})

    def settings(self) -> list[dict[str, Any]]:
        """Each that is tried: one parameter's values, or every combination of several."""
        found: list[dict[str, Any]] = [{}]
        for name, values in self.grid.items():
            found = [{**each, name: value} for each in found for value in values]
        return found

    def fitted(self, setting: Mapping[str, Any], x: Any, y: np.ndarray) -> Any:
        return clone(self.base).set_params(**setting).fit(x, y)


def probe(
    trace: Trace | str | Path,
    label: str | Path | Label | pd.DataFrame = "accepted",
    layers: Iterable[int] | None = None,
    *,
    estimator: Any = "logistic",
    grid: Mapping[str, Sequence[Any]] | None = None,
    folds: int = FOLDS,
    shuffles: int = SHUFFLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> ProbeCurve:
    """Probe a label at each layer whose residuals a trace kept.

    Parameters
    ----------
    label: a name (`probekit.probing.labels.LABELS`: accepted, agrees, entropy, token-class, looped, position); a file
        or a table with `prompt`, `position` and a column; or a function of trace, rows and layer.
    layers: those that were kept by default; of `accepted` the exits among them.
    estimator: "logistic", "mlp" (classes) or "ridge" (also taken for numbers); or any of scikit-learn.
    grid: {parameter: values} that are chosen among within the training part; by default the estimator's own.
    folds: that prompts are dealt into. shuffles: of labels, for the control. seed: of both.
    progress: called as `progress("probe", done, total)`.

    Raises InputError for a trace without residuals or with fewer than four prompts, and for labels of one kind only.

    Examples
    --------
    >>> import tempfile
    >>> import probekit
    >>> texts = ["Once upon a time", "The king", "A wolf said", "In the forest"]
    >>> trace = probekit.trace("tales-tied", texts, tempfile.mkdtemp(), max_new_tokens=24, keep_residuals=[6])
    >>> probekit.probe(trace, "agrees").layers[0].positions
    96
    """
    trace = as_trace(trace)
    name, read = label_named(label)
    kept = trace.manifest.settings.keep_residuals
    if layers is None:
        chosen = [layer for layer in kept if name != "accepted" or 1 <= layer < trace.depth]
    else:
        chosen = sorted(dict.fromkeys(layers))
    if not chosen:
        raise InputError("this run kept no residuals that could be probed.", "Trace again with --keep-residuals all.")
    if len(trace) < LEAST_PROMPTS:
        raise InputError(f"this run has {len(trace)} prompts; a probe needs {LEAST_PROMPTS}, which are split.")
    folds = min(whole_number("the number of folds must be", folds, 2), len(trace))
    shuffles = whole_number("the number of shuffles must be", shuffles, 0)
    report = usual_progress(progress)
    found, number, used = [], False, str(estimator)
    for done, layer in enumerate(chosen):
        report("probe", done, len(chosen))
        sample = Sample.of(trace, layer, read)
        number = is_number(sample.y)
        engine = Estimator.of(estimator, grid, number)
        used = engine.name
        found.append(_Judge(sample, engine, deal(trace.prompts, folds, seed), shuffles, seed).layer())
    report("probe", len(chosen), len(chosen))
    if all(each.score.known is None for each in found):
        raise InputError(f"{name!r} is the same on all rows of these layers: there is nothing to tell apart.")
    return ProbeCurve(trace.manifest.model.name, name, number, used, tuple(found))


class Sample(NamedTuple):
    """The labelled rows of a layer.

    x: their residuals, an array where they fit into memory. y: (rows,). frame: prompt, position, output of each.
    confidence: (rows, 3), the lens's figures, or None where the trace has them not.
    """

    layer: int
    x: np.ndarray | Residuals
    y: np.ndarray
    frame: pd.DataFrame
    confidence: np.ndarray | None

    @classmethod
    def of(cls, trace: Trace, layer: int, read: Label) -> Sample:
        residuals = trace.residuals(layer).scored()
        if not len(residuals):
            raise InputError(f"this run kept no scored row of layer {layer}.", "Keep a larger share of them.")
        known, y = known_labels(read(trace, residuals.frame, layer), len(residuals))
        residuals = residuals.where(known)
        x = residuals.numpy() if len(residuals) * residuals.width * 8 <= HELD_BYTES else residuals
        confidence = None
        if trace.manifest.settings.statistics == "all":
            confidence = lens_figures(trace, residuals.frame, layer)
        return cls(layer, x, y, residuals.frame, confidence)

    def rows(self, chosen: np.ndarray) -> np.ndarray | Residuals:
        return self.x.where(chosen) if isinstance(self.x, Residuals) else self.x[chosen]


def lens_figures(trace: Trace, rows: pd.DataFrame, layer: int) -> np.ndarray:
    """(rows, 3): probability of the lens's top token, its entropy and its margin, as CONFIDENCE names them."""
    from probekit.probing.labels import by_output

    columns = [by_output(rows, lambda prompt, of=of: trace.values(prompt, of)[layer]) for of in CONFIDENCE]  # type: ignore
    return np.stack(columns, axis=1).astype(np.float64)


def deal(prompts: Sequence[int], folds: int, seed: int) -> dict[int, int]:
    """{prompt: its fold}: dealt out in random order, so that folds differ by one prompt at most."""
    order = np.random.default_rng(abs(seed)).permutation(np.asarray(prompts))
    return {int(prompt): place % folds for place, prompt in enumerate(order)}


class _Judge:
    """One layer's probes, fold by fold."""

    def __init__(self, sample: Sample, engine: Estimator, fold_of: Mapping[int, int], shuffles: int, seed: int) -> None:
        self.sample, self.engine, self.shuffles = sample, engine, shuffles
        self.prompt = sample.frame["prompt"].to_numpy()
        self.fold = np.array([fold_of[prompt] for prompt in self.prompt.tolist()], dtype=np.int64)
        self.place = np.unique(self.prompt, return_inverse=True)[1]
        self.random = np.random.default_rng((abs(seed), sample.layer))
        self.number = is_number(sample.y)
        self.classes = np.unique(sample.y)

    def layer(self) -> LayerProbe:
        sample, y = self.sample, self.sample.y
        facts: dict[str, Any] = {
            "layer": sample.layer, "positions": len(y), "prompts": len(np.unique(self.prompt)),
        }  # fmt: skip
        if len(self.classes) == 2:
            facts["share"] = float((y == self.classes[1]).mean())
        if len(self.classes) < 2 or len(np.unique(self.prompt)) < LEAST_PROMPTS:
            return LayerProbe(**facts)
        figures = sample.confidence
        answers, chosen, known, together = self._answers(sample.rows, self.engine, figures)
        if not known.any():
            return LayerProbe(**facts)
        linear = Estimator.of("ridge" if self.number else "logistic", None, self.number)
        output = sample.frame["output"].to_numpy(np.float64)
        places = np.stack([output, np.log1p(output), sample.frame["position"].to_numpy(np.float64)], axis=1)
        position = self._answers(lambda rows: places[rows], linear)
        facts |= {
            "score": _shown(self._scored(answers, known)),
            "control": self._control(chosen),
            "position": _shown(self._scored(position[0], position[2])),
            "regularisation": tuple(
                float(next(iter(each.values()))) for each in chosen.values() if len(each) == 1
            ),
        }  # fmt: skip
        if figures is not None:
            facts |= self._beside_confidence(figures, together, linear)
        if not self.number:
            facts |= self._calibration(answers, known)
        return LayerProbe(**facts)

    def _beside_confidence(self, figures: np.ndarray, both: np.ndarray, linear: Estimator) -> dict[str, Any]:
        """both: answers of probes that saw the residual and the lens's figures, NaN where a fold has none."""
        own, _, known, _ = self._answers(lambda rows: figures[rows], linear)
        known &= ~np.isnan(both if self.number else both[:, 0])
        if not known.any():
            return {}
        alone, together = self._scored(own, known), self._scored(both, known)
        found: dict[str, Any] = {"confidence": _shown(alone)}
        if len(self.classes) == 2 and not self.number:
            truth = self.sample.y == self.classes[1]
            for name, column in zip(CONFIDENCE, figures.T, strict=True):
                score = -column if name == "entropy" else column
                found.setdefault("alone", {})[name] = auroc(truth, score, self.place, self.fold).value
        found["together"] = _shown(together)
        if isinstance(together, Auroc) and isinstance(alone, Auroc):
            low, high = spread(together.drawn - alone.drawn)
            found["added"] = Figure(together.value - alone.value, float(low), float(high))
        return found

    def _answers(
        self, features: Callable[[np.ndarray], Any], engine: Estimator, beside: np.ndarray | None = None
    ) -> tuple[np.ndarray, dict[int, dict[str, Any]], np.ndarray, np.ndarray]:
        """Answers of probes that never saw a row's prompt, what each fold chose, which rows have an answer, and answers
        of the same probe with some figures beside it.

        Answers: (rows,) of numbers; (rows, classes) of classes. beside: (rows, figures): a second, small probe weighs
        the first one's answer and these; it is fitted on the training prompts that the first was judged on.
        """
        y = self.sample.y
        answers, both = self._unknown(), self._unknown()
        chosen: dict[int, dict[str, Any]] = {}
        for each in np.unique(self.fold).tolist():
            train, test = self.fold != each, self.fold == each
            if len(np.unique(y[train])) < 2:
                continue
            choice = choose_setting(engine, features, y, self.prompt, train, self.classes)
            chosen[each] = choice.setting
            fitted = engine.fitted(choice.setting, features(train), y[train])
            answers[test] = answers_of(fitted, features(test), self.number, self.classes)
            inner = choice.judged
            if beside is not None and choice.answers is not None and len(np.unique(y[inner])) > 1:
                weigh = (RidgeProbe() if self.number else LogisticProbe()).fit(
                    _beside(choice.answers, beside[inner]), y[inner]
                )
                both[test] = answers_of(weigh, _beside(answers[test], beside[test]), self.number, self.classes)
        return answers, chosen, ~np.isnan(answers if self.number else answers[:, 0]), both

    def _unknown(self) -> np.ndarray:
        rows = len(self.sample.y)
        return np.full(rows if self.number else (rows, len(self.classes)), np.nan)

    def _control(self, chosen: Mapping[int, Mapping[str, Any]]) -> Figure:
        """Labels shuffled among the rows of a fold, and among those it is fitted on."""
        y, drawn, values = self.sample.y, [], []
        for _ in range(self.shuffles):
            shuffled, answers = y.copy(), self._unknown()
            for each in np.unique(self.fold).tolist():
                here = np.flatnonzero(self.fold == each)
                shuffled[here] = self.random.permutation(y[here])
            for each, setting in chosen.items():
                train, test = np.flatnonzero(self.fold != each), self.fold == each
                labels = self.random.permutation(shuffled[train])
                fitted = self.engine.fitted(setting, self.sample.rows(self.fold != each), labels)
                answers[test] = answers_of(fitted, self.sample.rows(test), self.number, self.classes)
            known = ~np.isnan(answers if self.number else answers[:, 0])
            found = self._scored(answers, known, shuffled)
            values.append(found.value)
            drawn.append(found.drawn if isinstance(found, Auroc) else np.array([found.low, found.value, found.high]))
        if not values:
            return Figure(np.nan, np.nan, np.nan)
        low, high = spread(np.concatenate(drawn))
        mean = np.nan if np.isnan(values).all() else float(np.nanmean(values))
        return Figure(mean, float(low), float(high))

    def _scored(self, answers: np.ndarray, known: np.ndarray, y: np.ndarray | None = None) -> Any:
        y = (self.sample.y if y is None else y)[known]
        place, fold = self.place[known], self.fold[known]
        if self.number:
            return explained(y, answers[known], place)
        if len(self.classes) == 2:
            return auroc(y == self.classes[1], answers[known, 1], place, fold)
        return auroc(y, answers[known], place, fold, self.classes.tolist())

    def _calibration(self, answers: np.ndarray, known: np.ndarray) -> dict[str, Any]:
        y, answers = self.sample.y[known], answers[known]
        if len(self.classes) == 2:
            truth, probability = y == self.classes[1], answers[:, 1]
            score = brier(truth, probability)
        else:
            hit = y[:, None] == self.classes
            truth, probability = hit[np.arange(len(y)), answers.argmax(axis=1)], answers.max(axis=1)
            score = brier(hit, answers)
        curve = reliability(truth, probability)
        return {"brier": float(score.mean()), "ece": calibration_error(curve), "curve": tuple(curve)}


class Choice(NamedTuple):
    """A setting; which rows it was judged on, (rows,) bool, and its answers there, None where nothing was judged."""

    setting: dict[str, Any]
    judged: np.ndarray
    answers: np.ndarray | None


def choose_setting(
    engine: Estimator,
    features: Callable[[np.ndarray], Any],
    y: np.ndarray,
    prompt: np.ndarray,
    train: np.ndarray,
    classes: np.ndarray,
) -> Choice:
    """The setting that is best on every third training prompt, fitted on the others. train: (rows,) bool."""
    settings = engine.settings()
    prompts = np.unique(prompt[train])
    inner = train & np.isin(prompt, prompts[2::3])
    outer = train & ~inner
    number = is_number(y)
    if not inner.any() or len(np.unique(y[outer])) < 2:
        return Choice(settings[0], inner, None)
    x, judged = features(outer), features(inner)
    every = [answers_of(engine.fitted(setting, x, y[outer]), judged, number, classes) for setting in settings]
    best = int(np.argmin([loss_of(answers, y[inner], classes) for answers in every]))
    return Choice(settings[best], inner, every[best])


def _beside(answers: np.ndarray, figures: np.ndarray) -> np.ndarray:
    """Answers as numbers or log-odds, and figures: (rows, columns)."""
    if answers.ndim == 1:
        return np.concatenate([answers[:, None], figures], axis=1)
    logs = np.log(np.clip(answers, 1e-6, 1.0))
    return np.concatenate([logs[:, 1:] - logs[:, :1], figures], axis=1)


def answers_of(fitted: Any, x: Any, number: bool, classes: np.ndarray) -> np.ndarray:
    """(rows,) numbers, or (rows, classes) probabilities, 0 for classes that the probe never saw."""
    if number:
        return np.asarray(fitted.predict(x), dtype=np.float64)
    found = np.zeros((len(x), len(classes)))
    found[:, np.searchsorted(classes, fitted.classes_)] = fitted.predict_proba(x)
    return found


def loss_of(answers: np.ndarray, y: np.ndarray, classes: np.ndarray) -> float:
    """Mean squared error of numbers, mean log loss of classes."""
    if is_number(y):
        return float(((answers - y) ** 2).mean())
    own = answers[np.arange(len(y)), np.searchsorted(classes, y)]
    return float(-np.log(np.maximum(own, 1e-12)).mean())


def _shown(found: Any) -> Figure:
    return Figure(found.value, found.low, found.high)
