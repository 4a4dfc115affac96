"""What it costs to know the cells: running them one after the other, or one trace. Dashed: extrapolated."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from figures.panels import of_models
from probekit.errors import InputError
from probekit.presentation import plots
from probekit.presentation.study_folder import StudyFolder
from probekit.presentation.tables import sweep_table


def draw(study: StudyFolder) -> Figure:
    figure, axes = of_models(study, height=2.2, share_y=True)
    for ax, model in zip(axes, study.models, strict=True):
        timings = study.entry(model)["timings"]
        lacking = [name for name in ("tokens", "generation_s", "agreement_trace_s") if name not in timings]
        if lacking:
            raise InputError(f"the study in {study.folder} has no timing {', '.join(lacking)} of {model!r}.")
        costs = study.of("costs", model)
        step = float(costs.loc[costs["step"] == "autoregressive", "seconds"].iloc[0])
        trace_s = timings["generation_s"] + timings["agreement_trace_s"]
        sweep = sweep_table(
            study.of("cells", model), study.of("validation", model), step, int(timings["tokens"]), trace_s
        )
        plots.trace_against_sweep(ax, sweep)
        if ax is not axes[0]:
            ax.set_ylabel("")
    plots.one_legend(figure, axes)
    return figure


if __name__ == "__main__":
    alone(__file__)
