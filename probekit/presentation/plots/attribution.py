"""Who wrote a logit: what each layer's attention and MLP added to it, layer by position."""

from __future__ import annotations

import pandas as pd
from matplotlib import colors
from matplotlib.axes import Axes

from probekit.errors import InputError
from probekit.presentation.plots.calling import axes_or_current, plot
from probekit.presentation.plots.layer_maps import signed_map
from probekit.presentation.plots.style import DIVERGING, nothing_to_show

_KINDS = ("attention", "mlp")


@plot("position", "input", "term", "logit")
def attribution_map(
    shares: pd.DataFrame,
    kind: str = "attention",
    *,
    ax: Axes | None = None,
    high: float | None = None,
    cmap: str | colors.Colormap = DIVERGING,
) -> Axes:
    """Layer by position, the first layer at the bottom: blue where the logit of the model's token was raised.

    Parameters
    ----------
    shares: columns position, input (the token that is read there), term (`attention:N`, `mlp:N`, ..) and logit (what it
        wrote of the logit of the token that the model says next); of one text. With a column generated, a line stands
        between prompt and continuation.
    kind: "attention" or "mlp". high: the value where the colours end, on both sides of 0, to share it between maps.
    cmap: a diverging one.

    Layers count from 1: the layer l wrote what h[l] has and h[l - 1] has not. `plots.colours_of(ax)` is what a colour
    bar needs. Raises InputError for another kind, and for a table with two values in one place.
    """
    ax = axes_or_current(ax)
    if kind not in _KINDS:
        raise InputError(f"no {kind!r} writes a logit here: there are {' and '.join(_KINDS)}.")
    shares = shares.reset_index(drop=True)
    terms = shares["term"].astype(str)
    rows = shares[terms.str.startswith(f"{kind}:")]
    if rows.empty:
        nothing_to_show(ax, "it is not known who wrote")
        return ax
    rows = rows.assign(layer=terms[rows.index].str.rpartition(":")[2].astype(int) + 1)
    if rows.duplicated(["layer", "position"]).any():
        raise InputError("this table has several texts or models.", "Draw the rows of one text of one model.")
    grid = rows.pivot(index="layer", columns="position", values="logit").astype(float)
    heads = rows.drop_duplicates("position").set_index("position").loc[grid.columns]
    prompt = int((~heads["generated"].astype(bool)).sum()) if "generated" in heads else 0
    name = "MLP" if kind == "mlp" else kind
    return signed_map(grid, heads["input"].tolist(), ax, high, cmap, f"{name} of layer", prompt)
