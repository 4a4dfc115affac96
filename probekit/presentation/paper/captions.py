"""What stands below a paper's figures, and what a reader who cannot see them is told: from the study's own tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd

from probekit.presentation.paper.round_figures import sweep_of
from probekit.presentation.paper.way_figures import is_sampled, oracle_rounds, rungs_of
from probekit.presentation.study_folder import StudyFolder
from probekit.presentation.tables import lens_table

Words = Callable[[StudyFolder], str]
"""A sentence or several about a study, as plain text."""

_PROMPTS = "Bands: 95 % intervals, bootstrap over prompts."


# -- captions
def of_lens_tables(study: StudyFolder) -> str:
    return (
        "The top token of every layer (0: the embedding; last row: the model) at each position of one text, coloured "
        f"by its probability, for {_models(study)}. A dot marks the model's token; columns of the prompt are grey."
    )  # fmt: skip


def of_agreement(study: StudyFolder) -> str:
    return (
        f"Agreement by layer: share of {_rows(study)} generated tokens for which a layer's lens has the model's own "
        f"token. {_PROMPTS}"
    )


def of_echo(study: StudyFolder) -> str:
    return f"Echo by layer: share of positions where a layer's lens has the token that was just read. {_PROMPTS}"


def of_entropy_and_kl(study: StudyFolder) -> str:
    return f"Entropy of the final-norm lens, and KL divergence of the lens from the model, by layer. {_PROMPTS}"


def of_acceptance(study: StudyFolder) -> str:
    return (
        "Acceptance rate (accepted / drafted) and tokens per round, over exit layer E and draft length K, predicted "
        f"from one trace of {_models(study)}."
    )


def of_speedup(study: StudyFolder) -> str:
    costs = " and ".join(sorted({_costs(study, model) for model in study.models}))
    return (
        f"Predicted speedup over autoregressive decoding, over exit layer E and draft length K, with {costs}. White is "
        "1, red a loss, blue a gain, and a line parts them; a frame marks the chosen pair. Brackets: 95 % intervals "
        "over prompts and blocks of the calibration, for all pairs at once."
    )


def of_predicted_and_measured(study: StudyFolder) -> str:
    exact = study.table("validation")["rounds_equal"].notna().all()
    bars = "Bars of the speedup: 20 % and 80 % quantiles of repeated timings" + (
        "; rounds are predicted exactly." if exact else "; of rounds and acceptance: 95 % intervals over prompts."
    )
    return f"The prediction against the running decoder, a point a cell; on the diagonal both are equal. {bars}"


def of_run_lengths(study: StudyFolder) -> str:
    return (
        "How long agreement lasts: runs of at least r tokens at three exit layers, against the geometric law that "
        "independent agreements would follow (dashed). Bars: 95 % intervals, bootstrap over prompts."
    )


def of_trace_and_sweep(study: StudyFolder) -> str:
    return (
        "Time to know the acceptance of so many cells (E, K): by running the decoder for one after the other (dashed: "
        "extrapolated from the predicted speedup), and by one trace."
    )


def of_ladder(study: StudyFolder) -> str:
    costs = " and ".join(sorted({_costs(study, model) for model in study.models}))
    oracle = "" if all(map(partial(is_sampled, study), study.models)) else (
        " The oracle, which knows the text, is an upper bound."
    )  # fmt: skip
    return (
        f"What each kind of drafting gains over autoregressive decoding, predicted with {costs}; in grey the best of "
        f"its kind.{oracle} Bars: 95 % intervals, bootstrap over prompts; an arrow ends one that goes on beyond twice "
        "the greatest speedup."
    )


def of_oracle_map(study: StudyFolder) -> str:
    sampled = [study.label(model) for model in study.models if is_sampled(study, model)]
    if len(sampled) == len(study.models):
        return (
            "Where an oracle would exit: nowhere in this study. Its text is sampled, so that drafts are accepted by "
            "chance, which no oracle knows beforehand."
        )
    return (
        "Where an oracle would exit: texts from top to bottom, each round of the quickest path a bar as long as the "
        "tokens that it emits, coloured by the exit layer that drafts; grey: a step without drafts."
    )


# -- alt texts
def alt_of_lens_tables(study: StudyFolder) -> str:
    def first_half(model: str) -> str:
        own = lens_table(study.trace(model), study.trace(model).prompts[0]).frame
        own = own[own["generated"]]
        depth = int(own["layer"].max())
        share = own.groupby("layer")["agrees"].mean()
        first = next((layer for layer in range(depth) if share[layer] >= 0.5), None)
        if first is None:
            return f"no layer below the last of {depth} has half of the tokens"
        return f"from layer {first} of {depth} on, half or more of the tokens are the model's own"

    return f"Tables of tokens, layers from bottom to top, positions from left to right. {of_each(study, first_half)}."


def alt_of_agreement(study: StudyFolder) -> str:
    return f"Curves of agreement over layers, one panel for each lens. {_trend(study, 'agreement')}"


def alt_of_echo(study: StudyFolder) -> str:
    return f"Curves of echo over layers, one panel for each lens. {_trend(study, 'echo')}"


def alt_of_entropy_and_kl(study: StudyFolder) -> str:
    return (
        f"Curves over layers. Entropy: {_trend(study, 'entropy', ('final-norm',))} "
        f"Divergence: {_trend(study, 'kl', ('final-norm',))}"
    )


def alt_of_acceptance(study: StudyFolder) -> str:
    return f"Heat maps, exit layer upwards, draft length to the right. {_ranges(study, 'acceptance_rate')}"


def alt_of_speedup(study: StudyFolder) -> str:
    return f"Heat maps, exit layer upwards, draft length to the right. {_ranges(study, 'speedup')}"


def alt_of_predicted_and_measured(study: StudyFolder) -> str:
    table = study.table("validation")
    told = []
    for here, there, name in (
        ("predicted_rounds", "measured_rounds", "rounds"),
        ("predicted_acceptance_rate", "measured_acceptance_rate", "acceptance rate"),
        ("speedup_predicted", "speedup_measured", "speedup"),
    ):
        both = table.dropna(subset=[here, there])
        if both.empty:
            told.append(f"no {name} was measured")
            continue
        off = (both[there] / both[here] - 1).abs().max()
        told.append(
            f"{name} of {len(both)} cells: " + ("all on the diagonal" if off < 1e-9 else f"at most {off:.0%} off")
        )
    return f"Scatter plots of measured over predicted. {'; '.join(told).capitalize()}."


def alt_of_run_lengths(study: StudyFolder) -> str:
    longest = study.table("run_lengths").query("at_least > 0").groupby("model")["run"].max()
    told = "; ".join(f"{model}: up to {run} tokens" for model, run in longest.items())
    return f"Counts of runs over their length on a logarithmic scale, falling. Longest runs: {told or 'none'}."


def alt_of_trace_and_sweep(study: StudyFolder) -> str:
    told = []
    for model in study.models:
        last = sweep_of(study, model).groupby(sweep_of(study, model)["source"] == "trace")["seconds"].max()
        if len(last) == 2:
            told.append(
                f"{study.label(model)}: {last[False]:.0f} s by running all cells, {last[True]:.1f} s by one trace"
            )
    return f"Lines on logarithmic scales: a rising one for running cells, a flat one for a trace. {'; '.join(told)}."


def alt_of_ladder(study: StudyFolder) -> str:
    def steps(model: str) -> str:
        rungs = rungs_of(study, model)
        return ", ".join(f"{rung} {gain:.2f}" for rung, gain in zip(rungs["rung"], rungs["speedup"], strict=True))

    return f"Points on a scale of predicted speedup. {of_each(study, steps)}."


def alt_of_oracle_map(study: StudyFolder) -> str:
    def drafting(model: str) -> str:
        rounds = oracle_rounds(study, model)
        if rounds.empty:
            return "no round"
        drafted = rounds[rounds["exit_layer"] > 0]
        layers = drafted["exit_layer"].nunique()
        return f"{len(drafted) / len(rounds):.0%} of the rounds draft, from {layers} different layers"

    return f"A bar for each round of each text, coloured by exit layer. {of_each(study, drafting)}."


# -- pieces
def of_each(study: StudyFolder, words: Callable[[str], str], between: str = "; ") -> str:
    """What `words` says of each model, after its label."""
    return between.join(f"{study.label(model)}: {words(model)}" for model in study.models)


def _models(study: StudyFolder) -> str:
    labels = [study.label(model) for model in study.models]
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"


def _rows(study: StudyFolder) -> str:
    table = study.table("layers")
    return f"{int(table['rows'].max()):,}" if "rows" in table else "all"


def _costs(study: StudyFolder, model: str) -> str:
    costs = study.entry(model)["choice"].get("costs") or {}
    how = "measured" if costs.get("source") == "measured" else "estimated"
    return f"costs {how} on {costs.get('device', 'the device')}"


def _trend(study: StudyFolder, column: str, lenses: tuple[str, ...] = ("final-norm", "raw")) -> str:
    """First, middle and last layer of each curve."""
    table, told = study.table("layers").dropna(subset=[column]), []
    for lens in lenses:
        for model, own in table[table["lens"] == lens].groupby("model", sort=False):
            values = own.sort_values("layer")[column].to_numpy()
            told.append(
                f"{model}, {lens} lens: {values[0]:.2f} at the embedding, {values[len(values) // 2]:.2f} half-way, "
                f"{values[-1]:.2f} at the last layer"
            )
    return f"{'; '.join(told) or f'No {column} was measured'}."


def _ranges(study: StudyFolder, column: str) -> str:
    """Least and greatest value of each model, and where the greatest is."""
    name = column.replace("_", " ")

    def ends(model: str) -> str:
        own = study.of("cells", model).dropna(subset=[column])
        if own.empty:
            return f"no {name}"
        best = own.iloc[int(own[column].to_numpy().argmax())]
        drafter = "the draft model" if pd.isna(best["exit_layer"]) else f"exit layer {int(best['exit_layer'])}"
        return (
            f"{own[column].min():.2f} to {best[column]:.2f}, the most with {drafter} and draft length "
            f"{int(best['draft_length'])}"
        )

    return f"{name.capitalize()} of {of_each(study, ends)}."
