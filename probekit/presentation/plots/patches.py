"""Patches: what one value of the stream restores, layer by position."""

from __future__ import annotations

import pandas as pd
from matplotlib import colors
from matplotlib.axes import Axes

from probekit.errors import InputError
from probekit.presentation.plots.calling import axes_or_current, plot
from probekit.presentation.plots.layer_maps import signed_map
from probekit.presentation.plots.style import DIVERGING, nothing_to_show


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
    texts = rows.drop_duplicates("position").set_index("position")["token"].loc[grid.columns]
    label = "residual after layer" if kind == "residual" else f"{kind} of layer"
    return signed_map(grid, texts.tolist(), ax, high, cmap, label)
