"""How a trace shows itself: agreement by layer, and which prompts there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from probekit.html_tables import HtmlCell, html_table
from probekit.traces.schema import LENSES


def agreement_html(texts: Sequence[np.ndarray]) -> str:
    """Agreement by layer, in one row. texts: (L+1, N) bool each."""
    generated = np.concatenate(texts, axis=1)
    shares = generated.mean(axis=1).tolist()
    cells = [HtmlCell(f"{share:.0%}", share) for share in shares]
    return html_table(
        f"agreement with the model over {generated.shape[1]} tokens, {LENSES[0]} lens; layer 0 is the embedding",
        "layer", [str(layer) for layer in range(len(shares))], [("agreement", cells)],
    )  # fmt: skip


def span(numbers: Sequence[int]) -> str:
    """Which numbers there are: the first two, the last, and how many, where they are many."""
    if len(numbers) > 6:
        return f"{numbers[0]}, {numbers[1]}, .. {numbers[-1]} ({len(numbers)} of them)"
    return ", ".join(map(str, numbers))
