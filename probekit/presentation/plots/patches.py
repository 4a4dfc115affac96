"""Patches: what one value of the stream restores, layer by position."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import colors
from matplotlib.axes import Axes

from probekit.errors import InputError
from probekit.presentation.plots.calling import axes_or_current, plot
from probekit.presentation.plots.glyphs import drawable, token_ticks
from probekit.presentation.plots.style import DIVERGING, colormap, label_points, nothing_to_show, points_of
from probekit.presentation.tokens import clipped


@plot("kind", "layer", "position", "token", "change", "restored")
def patch_map(
    patches: pd.DataFrame,
    kind: str | None = None,
    *,
    ax: Axes | None = None,
    value: str | None = None,
    high: float | None = None,
    cmap: str | colors.Colormap = DIVERGING,
) -> Axes:
    """Layer by position, bottom to top: blue where the patch moves the answer's way, red where against it.

    Parameters
    ----------
    patches: what `probekit.patch` returns, or its table.
    kind: "residual", "attention" or "mlp"; by default the first that the table has.
    value: "restored", "change", "kl" or "logit_difference"; by default what was restored, or of an ablation the change.
    high: the value where the colours end, on both sides of 0, to share it between maps; of the data by default.
    cmap: a diverging one.

    `plots.colours_of(ax)` is what a colour bar needs. Raises InputError for a kind or a value that the table has not.
    """
    ax = axes_or_current(ax)
    if patches.empty:
        nothing_to_show(ax, "nothing was patched")
        return ax
    kinds = list(dict.fromkeys(patches["kind"]))
    kind = kinds[0] if kind is None else kind
    if kind not in kinds:
        raise InputError(f"no {kind!r} was patched: there are {', '.join(kinds)}.")
    rows = patches[patches["kind"] == kind]
    value = value or ("change" if rows["restored"].isna().all() else "restored")
    if value not in ("restored", "change", "kl", "logit_difference") or value not in rows:
        raise InputError(f"patches have no value {value!r}: there are restored, change, kl and logit_difference.")
    grid = rows.pivot(index="layer", columns="position", values=value).astype(float)
    reach = high or float(np.nanmax(np.abs(grid.to_numpy()), initial=0.0)) or 1.0
    shades = colors.ListedColormap(colormap(cmap)(np.linspace(0.06, 0.94, 256)))
    sns.heatmap(grid, cmap=shades, vmin=-reach, vmax=reach, cbar=False, ax=ax, linewidths=0)
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.minorticks_off()
    step = max(1, math.ceil(1.1 * label_points() / (points_of(ax)[1] / len(grid))))  # names that do not touch
    ticks = range(0, len(grid), step)
    ax.set_yticks([place + 0.5 for place in ticks], [str(grid.index[place]) for place in ticks], rotation=0)
    texts = rows.drop_duplicates("position").set_index("position")["token"].loc[grid.columns]
    names = [clipped(text, 9, drawable) for text in texts]
    token_ticks(ax, names)
    ax.set_xlabel("token that is read")
    ax.set_ylabel("residual after layer" if kind == "residual" else f"{kind} of layer")
    return ax
