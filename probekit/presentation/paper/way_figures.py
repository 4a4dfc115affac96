"""Figures of ways of drafting: what each kind gains, and where an oracle exits."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from probekit.choice.rank import oracle_of, rank
from probekit.costs.profile import Costs
from probekit.drafting.drafters import traced_drafters
from probekit.prediction.replay import replay
from probekit.presentation import plots
from probekit.presentation.paper.look import Page
from probekit.presentation.paper.panels import of_models
from probekit.presentation.study_folder import StudyFolder

TEXTS = 12  # of a map
NO_ORACLE = "sampled text: drafts are accepted by chance"
_COLUMNS = ["prompt", "start", "emitted", "exit_layer"]


def ladder(study: StudyFolder, page: Page) -> Figure:
    """What each kind of drafting gains, from plain decoding over fixed pairs, policies and trees to the oracle."""
    figure, axes = of_models(study, page, height=2.6)
    for ax, model in zip(axes, study.models, strict=True):
        plots.ladder(rungs_of(study, model), ax=ax)
    rungs = [[label.get_text() for label in ax.get_yticklabels()] for ax in axes]
    rows = {ax.get_subplotspec().rowspan.start for ax in axes}  # type: ignore[union-attr]
    if len(rows) == 1 and all(each == rungs[0] for each in rungs):
        for ax in axes[1:]:
            ax.set_yticklabels([])
    return figure


def oracle_map(study: StudyFolder, page: Page) -> Figure:
    """Where in its texts an oracle would exit: the layer that drafts in each round of the quickest path."""
    figure, axes = of_models(study, page, height=2.3)
    deepest = max(study.trace(model).depth for model in study.models) - 1
    found = [oracle_rounds(study, model) for model in study.models]
    why = [NO_ORACLE if is_sampled(study, model) else "no text has a round" for model in study.models]
    for ax, rounds, empty in zip(axes, found, why, strict=True):
        plots.exit_map(rounds, deepest, ax=ax, empty=empty)
        if ax is not axes[0]:
            ax.set_ylabel("")
    if all(rounds.empty for rounds in found):
        return figure
    bar = figure.colorbar(plots.exit_colours(deepest), ax=list(axes), shrink=0.8, pad=0.01)
    bar.set_ticks(list(range(1, deepest + 1, max(1, deepest // 6))))
    bar.set_label("exit layer that drafts; grey: none")
    return figure


def rungs_of(study: StudyFolder, model: str) -> pd.DataFrame:
    """The ladder of a model on the study's costs."""
    costs = _costs(study, model)
    lengths = [length for length in study.summary["settings"]["draft_lengths"] if length <= costs.longest_draft]
    rows = costs.draft_head.rows
    return rank(study.trace(model), costs, draft_lengths=lengths, draft_rows=rows).ladder()


def oracle_rounds(study: StudyFolder, model: str) -> pd.DataFrame:
    """The oracle's rounds along the first texts, exits taking turns; none on text that is not greedy."""
    costs, trace = _costs(study, model), study.trace(model)
    if is_sampled(study, model):
        return pd.DataFrame(columns=_COLUMNS)
    some = trace.select(trace.prompts[:TEXTS])
    exits = traced_drafters(some, draft_model=False, draft_rows=costs.draft_head.rows)
    way = oracle_of(some, exits, costs, costs.longest_draft).way
    if way is None:
        return pd.DataFrame(columns=_COLUMNS)
    layers = [*(key.exit_layer for key in way.keys), plots.NO_EXIT]  # nobody's turn is the last
    return pd.DataFrame(
        [
            (prompt, start, emitted, layers[turn] if length else plots.NO_EXIT)
            for prompt, own in zip(some.prompts, replay(some, way).rounds, strict=True)
            for start, emitted, turn, length in zip(own.start, own.emitted, own.way, own.length, strict=True)
        ],
        columns=_COLUMNS,
    )


def is_sampled(study: StudyFolder, model: str) -> bool:
    """Whether drafts were accepted by chance, so that nobody knows beforehand which: no oracle does."""
    return study.trace(model).manifest.settings.text != "greedy"


def _costs(study: StudyFolder, model: str) -> Costs:
    return Costs.from_json(study.entry(model)["choice"]["costs"])
