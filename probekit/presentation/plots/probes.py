"""What probes of the residual stream find, by layer, beside what they are held against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from probekit.errors import InputError
from probekit.presentation.plots.calling import axes_or_current, plot
from probekit.presentation.plots.glyphs import plain
from probekit.presentation.plots.style import faint, nothing_to_show

_NAMES: Mapping[str, Mapping[str, str]] = {
    "accepted": {
        "probe": "residual", "confidence": "lens's figures", "together": "both", "position": "position only",
        "control": "shuffled labels",
    },
    "answer": {"probe": "linear map", "lens": "lens", "control": "mean residual"},
}  # fmt: skip
"""{label: {kind: its name in the legend}}, in this order."""
_PLACE = {"probe": 0, "confidence": 1, "lens": 1, "together": 2}  # in the cycle of colours; the others are pale
_LOOK = {
    "probe": ("o", "-"), "confidence": ("s", (0, (4, 1.5))), "lens": ("s", (0, (4, 1.5))),
    "together": ("D", (0, (1, 1))), "position": ("", "--"), "control": ("", ":"),
}  # fmt: skip
_UNITS = {"accepted": "AUROC of acceptance", "answer": "model's token (share)"}


@plot("label", "layer", "kind", "value", "low", "high")
def probes_by_layer(probes: pd.DataFrame, label: str = "accepted", *, ax: Axes | None = None) -> Axes:
    """One curve for each kind of probe, with its 95 % band: of one model.

    Parameters
    ----------
    probes: columns label, layer, kind, value, low, high; a study's `probes.csv`.
    label: "accepted", the AUROC with which accepted drafts of an exit are told, or "answer", the share of the model's
        tokens that is found.

    Raises InputError for a label that is neither, and for several models.
    """
    ax = axes_or_current(ax)
    if label not in _NAMES:
        raise InputError(f"no probes are drawn of {label!r}: there are {' and '.join(_NAMES)}.")
    if "model" in probes and probes["model"].nunique() > 1:
        raise InputError("this table has probes of several models.", "Draw each on Axes of its own.")
    rows = probes[(probes["label"] == label) & probes["value"].notna()]
    if rows.empty:
        nothing_to_show(ax, f"no probes of {label!r}")
        return ax
    cycle, pale = sns.color_palette(n_colors=3), faint(ax)
    for kind, name in _NAMES[label].items():
        own = rows[rows["kind"] == kind].sort_values("layer")
        if own.empty:
            continue
        colour = cycle[_PLACE[kind]] if kind in _PLACE else pale
        marker, dashes = _LOOK[kind]
        x, y, low, high = (own[column].to_numpy(dtype=float) for column in ("layer", "value", "low", "high"))
        ax.plot(x, y, color=colour, marker=marker, linestyle=dashes, label=plain(name), markeredgewidth=0)
        if kind in _PLACE or kind == "control":
            ax.fill_between(x, low, high, color=colour, alpha=0.18 if kind in _PLACE else 0.12, linewidth=0)
    if label == "accepted":
        ax.axhline(0.5, color=pale, linewidth=0.6, zorder=0)
        least = float(np.nanmin([0.4, *rows["low"].to_numpy(dtype=float)]))
        ax.set_ylim(max(0.0, least - 0.02), 1.02)
    else:
        ax.set_ylim(-0.02, 1.02)
    ax.legend()
    ax.set_xlabel(plain("layer" if label == "answer" else "exit layer E"))
    ax.set_ylabel(plain(_UNITS[label]))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.margins(x=0.03)
    return ax
