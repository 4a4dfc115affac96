"""Drafters by the names that the command line knows. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from probekit.drafting.drafters import Drafter, ExitLayer, traced_drafters
from probekit.drafting.imported import import_drafter
from probekit.drafting.keys import EXIT, IMPORTED, MODEL, TREE
from probekit.drafting.text_drafters import lookup_named
from probekit.drafting.tree_drafters import TreeDrafts
from probekit.drafting.trees import tree_shape_named
from probekit.errors import InputError

if TYPE_CHECKING:
    from probekit.traces.trace import Trace

KNOWN = "exit, model, ngram:2, ngram:2-3:vllm, suffix, imported:FILE or tree:4x2x1"


def drafters_named(
    text: str, trace: Trace, exit_layers: Iterable[int] | None = None, *, draft_rows: int | None = None
) -> list[Drafter]:
    """The drafters that a text names, along a trace: `exit` and `tree:SHAPE` one of each exit, every other name one.

    exit_layers, draft_rows: as `traced_drafters` takes them, for names that draft from exits.

    Raises InputError for a name that means nothing, and for one that the trace does not answer for.

    Examples
    --------
    >>> import probekit
    >>> trace = probekit.trace("tales-layerskip", ["Once upon a time"], max_new_tokens=16)
    >>> [drafter.key.label for drafter in drafters_named("tree:2x1", trace, [3, 4])]
    ['layer 3, tree:2x1', 'layer 4, tree:2x1']
    """
    kind, _, rest = text.partition(":")
    if kind not in (EXIT, TREE) and exit_layers is not None:
        raise InputError(f"{text} drafts from no exit, and exit layers were named.", "Leave the exit layers out.")
    if kind != EXIT and draft_rows is not None:
        raise InputError(f"{text} drafts with no smaller head, and draft rows were named.", "Leave the draft rows out.")
    if text == EXIT:
        return traced_drafters(trace, exit_layers, draft_model=False, draft_rows=draft_rows)
    if text == MODEL:
        return traced_drafters(trace, (), draft_model=True)
    if kind == TREE and rest:
        shape = tree_shape_named(rest)
        exits = traced_drafters(trace, exit_layers, draft_model=False)
        return [TreeDrafts(each, shape) for each in exits if isinstance(each, ExitLayer)]
    if kind == IMPORTED and rest:
        return [import_drafter(Path(rest), trace)]
    lookup = lookup_named(text)
    if lookup is None:
        raise InputError(f"{text!r} names no drafter.", f"Write {KNOWN}.")
    return [lookup]


def drafter_named(text: str, exit_layer: int | None = None) -> Drafter:
    """The one drafter that a name means by itself: a lookup; `exit` or `tree:SHAPE` from a layer that is given.

    Raises InputError for other names, for a layer that is missing, and for one that a lookup has no use for.

    Examples
    --------
    >>> drafter_named("tree:2x1", 3).key.label, drafter_named("ngram:2").key.label
    ('layer 3, tree:2x1', 'ngram:2')
    """
    kind, _, rest = text.partition(":")
    if text == EXIT or (kind == TREE and rest):
        if exit_layer is None:
            raise InputError(f"{text} drafts from an exit layer, and none was given.", "Name the exit layer.")
        drafter = ExitLayer(exit_layer)
        return drafter if text == EXIT else TreeDrafts(drafter, tree_shape_named(rest))
    lookup = lookup_named(text)
    if lookup is None:
        raise InputError(f"{text!r} names no drafter that needs no trace.", "Write ngram:2, suffix or tree:4x2x1.")
    if exit_layer is not None:
        raise InputError(f"{text} drafts from no exit, and an exit layer was named.", "Leave the exit layer out.")
    return lookup


def levels_of(drafters: Iterable[Drafter], lengths: Iterable[int] | None) -> list[int]:
    """Draft lengths as a table needs them: 1..8 by default, and of trees no more than they have levels.

    Raises InputError for lengths that no tree reaches.
    """
    deepest = [each.shape.depth for each in drafters if isinstance(each, TreeDrafts)]
    if not deepest:
        return list(range(1, 9) if lengths is None else lengths)
    if lengths is None:
        return list(range(1, max(deepest) + 1))
    beyond = [length for length in lengths if length > max(deepest)]
    if beyond:
        raise InputError(
            f"draft length {beyond[0]} is out of range: this tree has {max(deepest)} levels.", "A length counts levels."
        )
    return list(lengths)
