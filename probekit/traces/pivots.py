"""Tidy rows -> arrays by prompt, and which parts of a run are read together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from probekit.errors import InputError

MOST_CELLS = 5_000_000  # (lens, layer, row) cells in a piece: some 50 bytes each while they are put in place


def pivoted(
    table: str,
    rows: tuple[np.ndarray, np.ndarray | int, np.ndarray, np.ndarray],
    prompts: np.ndarray,
    tokens: np.ndarray,
    layers: int,
) -> dict[int, np.ndarray]:
    """{prompt: (layers, N)}, not writable, of (prompt, layer, output, value) rows in any order.

    prompts, tokens: (prompts,) each, ascending indices and N. Raises InputError, which names the table, where a cell is
    missing or there twice.
    """
    prompt, layer, output, values = rows
    ends = np.cumsum(tokens * layers)
    starts = ends - tokens * layers
    place = np.searchsorted(prompts, prompt)
    known = place < len(prompts)
    place = np.where(known, place, 0)
    known &= (prompts[place] == prompt) & (output >= 0) & (output < tokens[place]) & (layer >= 0) & (layer < layers)
    cells = starts[place] + layer * tokens[place] + output
    if not known.all() or len(cells) != ends[-1] or len(np.unique(cells)) != len(cells):
        raise InputError(f"the {table!r} table is not whole: {len(cells)} rows where {ends[-1]} belong.")
    flat = np.empty(len(cells), dtype=values.dtype)
    flat[cells] = values
    flat.flags.writeable = False
    return {
        int(index): flat[start:end].reshape(layers, -1) for index, start, end in zip(prompts, starts, ends, strict=True)
    }


def parts_within(
    batches: Sequence[Sequence[int]], cells: Mapping[int, int], most: int
) -> list[tuple[list[int], list[int]]]:
    """(numbers of neighbouring parts, their prompts), whose cells stay within `most`, or one part that has more.

    cells: of each prompt that is wanted; parts without any are left out.
    """
    groups: list[tuple[list[int], list[int]]] = []
    held = 0
    for part, batch in enumerate(batches):
        prompts = [prompt for prompt in batch if prompt in cells]
        mine = sum(cells[prompt] for prompt in prompts)
        if not prompts:
            continue
        if not groups or held + mine > most:
            groups.append(([], []))
            held = 0
        groups[-1][0].append(part)
        groups[-1][1].extend(prompts)
        held += mine
    return [(parts, sorted(prompts)) for parts, prompts in groups]
