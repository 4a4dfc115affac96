"""What the steps of a round cost: measured on the device at hand, or read off a roofline for one that is not.

A self-speculative round with k drafts costs k + 1 passes of layers 0..E-1 over one row, k heads, one pass of layers
E..L-1 with the head over k + 1 rows, and the accounting of a round. A two-model round costs k steps of the draft model,
the first over two rows, and one pass of the whole model over k + 1 rows. Drafts that are copied from the text cost
their verification, the same pass.

A calibration runs the decoder's own steps, in the order in which a round runs them, at a few exits. Times of the exits
between are read off a straight line in the number of layers; how far the measured points lie from it is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, TypeAdapter, ValidationError

from probekit.costs.trees import TreeCosts
from probekit.drafting.drafters import Drafter
from probekit.drafting.keys import MODEL, NO_PASSES, TREE, DrafterKey
from probekit.drafting.trees import TreeShape
from probekit.errors import InputError
from probekit.html_tables import HtmlCell, html_table

Size = Annotated[int, Field(ge=1, le=10_000)]  # of layers, and of rows in a pass


@dataclass(frozen=True)
class DraftHeadKey:
    """What exit layers draft with: rows of the head (None: all), the fingerprint of exit heads (None: none)."""

    rows: int | None = None
    exit_heads: str | None = None

    def __str__(self) -> str:
        whole = "drafts with the whole head" if self.rows is None else f"a draft head of {self.rows:,} rows"
        return whole if self.exit_heads is None else f"{whole} behind exit heads {self.exit_heads}"


@dataclass(frozen=True)
class DraftModelCosts:
    """Seconds of what a draft model's rounds take.

    step_s, first_s: a step, and the first of a round, over two rows. verify_s: {rows: the whole model over so many}.
    """

    name: str
    step_s: float
    first_s: float
    verify_s: Mapping[int, float]

    def round_seconds(self, drafts: int) -> float:
        drafting = self.first_s + (drafts - 1) * self.step_s if drafts else 0.0
        return drafting + self.verify_s[drafts + 1]


@dataclass(frozen=True)
class Costs:
    """Seconds of each step, for one sequence whose cache holds `context` tokens.

    Parameters
    ----------
    source: "measured" or "roofline". depth: L.
    autoregressive_s: a whole step of autoregressive decoding.
    early_s: {E: layers 0..E-1 over one row}; empty, as `verify_s`, where an engine drafts with no exit.
    head_s: norm, head and choice of one draft.
    heads_s: {E: the same after each exit, where that was timed: after few layers the head is still in the caches}.
    verify_s: {(E, rows): layers E..L-1, norm and head over `rows` rows}.
    overhead_s: what each round costs beside its steps.
    cold_s: {E: what the first pass and head of a round take longer than the next: the late layers were in the caches}.
    draft_head: what exit layers draft with; it is in `head_s` and `heads_s`.
    draft_model: what rounds of a draft model cost; None without one.
    trees: the steps of rounds that draft a tree; None where nobody timed them: they are then read off the others.
    quantiles: {step: [20 %, 50 %, 80 %] in seconds} of what was measured.
    fit_error: largest relative distance of a measured time from the straight line in the number of layers.
    seconds, sweeps: how long the calibration took, and how often it measured each step.
    blocks: {step: its median in each sweep}: what costs are drawn again from (`probekit.costs.blocks`).
    rows: rows in the batch; seconds are of all of them together.
    whole_s: {rows: the whole model over so many}, where that was timed; it is else read off the passes above exits.
    lookup_s: what each round of drafts that are copied from the text takes longer, also one that finds none.
    engine: who ran the rounds; a round that "cuda" recorded takes as long with fewer drafts in the budget.
    """

    source: str
    device: str
    dtype: str
    context: Annotated[int, Field(ge=0, le=2**31)]
    depth: Size
    autoregressive_s: float
    early_s: Mapping[Size, float]
    head_s: float
    verify_s: Mapping[tuple[Size, Size], float]
    overhead_s: float = 0.0
    heads_s: Mapping[int, float] = field(default_factory=dict)
    cold_s: Mapping[int, float] = field(default_factory=dict)
    draft_head: DraftHeadKey = DraftHeadKey()
    draft_model: DraftModelCosts | None = None
    trees: TreeCosts | None = None
    quantiles: Mapping[str, Sequence[float]] = field(default_factory=dict)
    fit_error: float | None = None
    seconds: float = 0.0
    sweeps: int = 0
    engine: str = "host"
    rows: int = 1
    blocks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    whole_s: Mapping[int, float] = field(default_factory=dict)
    lookup_s: float = 0.0

    def __post_init__(self) -> None:
        times = [self.autoregressive_s, self.head_s, *self.early_s.values(), *self.verify_s.values()]
        if not all(np.isfinite(each) and each > 0 for each in times) or not min(self.overhead_s, self.lookup_s) >= 0:
            raise InputError("a step takes more than 0 seconds; these costs hold other times.")

    @property
    def draft_rows(self) -> int | None:
        """Rows of the head that exit layers draft with; None: all of them."""
        return self.draft_head.rows

    @property
    def exit_heads(self) -> str | None:
        """The name (fingerprint) of the exit heads that exit layers draft through; None: none."""
        return self.draft_head.exit_heads

    @property
    def drafter(self) -> str | None:
        """The draft model's name; None without one."""
        return None if self.draft_model is None else self.draft_model.name

    @property
    def block_count(self) -> int:
        """Blocks that the calibration was made of; 0 where it was not measured."""
        return min((len(each) for each in self.blocks.values()), default=0)

    @cached_property
    def longest_draft(self) -> int:
        """The longest draft that these costs know."""
        return max((rows for _, rows in self.verify_s), default=max(self.whole_s, default=1)) - 1

    def knows(self, key: DrafterKey) -> bool:
        """Whether rounds of this drafter have a cost here, whatever it drafts with."""
        if key.is_exit:
            return key.exit_layer in self.early_s
        if key.kind == TREE:
            return key.exit_layer in self.early_s
        return key.kind in NO_PASSES or (key.kind == MODEL and self.drafter == key.model)

    def check_draft_head(self, keys: Iterable[DrafterKey]) -> None:
        """Raise InputError for exits that draft with another head than the one that was timed."""
        for key in keys:
            asked = DraftHeadKey(key.rows, key.exit_heads)
            if key.is_exit and asked != self.draft_head:
                raise InputError(
                    f"the prediction is for {asked}, and these costs are of {self.draft_head}.",
                    "Make the costs with the same draft head.",
                )

    def key_of(self, named: DrafterKey | int | None) -> DrafterKey:
        """The drafter of these costs that is meant: by its key, by an exit layer, or null for the draft model."""
        if isinstance(named, DrafterKey):
            return named
        if named is not None:
            return DrafterKey.exit(named, rows=self.draft_head.rows, exit_heads=self.draft_head.exit_heads)
        if self.draft_model is None:
            raise InputError("these costs know no draft model.", "Give `drafter` when they are made.")
        return DrafterKey.draft_model(self.draft_model.name)

    def round_seconds(self, drafter: DrafterKey | int | None, drafts: int) -> float:
        """Seconds of one round of a drafter (as `key_of` takes it) with `drafts` drafts, 0 or more."""
        key = self.key_of(drafter)
        self._check(key, drafts)
        if key.kind in NO_PASSES:
            return self.whole_pass_seconds(drafts + 1) + self.overhead_s + self.lookup_s
        if not key.is_exit and self.draft_model is not None:
            return self.draft_model.round_seconds(drafts) + self.overhead_s
        early, head = self.early_s[key.exit_layer], self.heads_s.get(key.exit_layer, self.head_s)
        once = self.overhead_s + self.cold_s.get(key.exit_layer, 0.0)
        return (drafts + 1) * early + drafts * head + self.verify_s[key.exit_layer, drafts + 1] + once

    def whole_pass_seconds(self, rows: int) -> float:
        """Seconds of the whole model over `rows` rows: as timed beside a draft model, else read off passes above exits.

        One layer takes what a pass above the first exit takes longer than one above the last, by the layers between.
        """
        if rows == 1:
            return self.autoregressive_s
        if self.draft_model is not None:
            return self.draft_model.verify_s[rows]
        if self.whole_s:
            return self.whole_s[rows]
        return self.verify_s[1, rows] + self._layer_seconds(rows)

    def tree_seconds(self, exit_layer: int, shape: TreeShape, levels: int) -> float:
        """Seconds of a round that drafts the first levels of a tree with an exit.

        Where no tree was timed, passes of the early layers, and heads, over several rows are read off the verification
        passes, which have as many rows, and take no less than over one row.
        """
        nodes = int(shape.sizes[levels])
        self._check(DrafterKey.exit(exit_layer), nodes)
        if self.trees is not None:
            verifying = self.verify_s[exit_layer, nodes + 1] + self.trees.longer_seconds(nodes)
            return self.trees.drafting_seconds(exit_layer, shape, levels) + verifying
        early = self.early_s[exit_layer]
        total = self.verify_s[exit_layer, nodes + 1] + self.overhead_s + self.cold_s.get(exit_layer, 0.0)
        for width in shape.widths[: levels + 1]:
            total += max(early, exit_layer * self._layer_seconds(width) if width > 1 else 0.0)
        return total + sum(self.head_seconds(exit_layer, rows) for rows in shape.parents_by_level[:levels])

    def head_seconds(self, exit_layer: int, rows: int) -> float:
        """Norm and head of an exit over so many rows: over one, and what the pass above the last exit grows by.

        What that pass takes besides (its mask, its places in the cache) is the same for any number of rows.
        """
        one = self.heads_s.get(exit_layer, self.head_s)
        grown = [self.verify_s[self.depth - 1, wide] - self._layer_seconds(wide) for wide in (self._least_rows, rows)]
        return one + max(0.0, grown[1] - grown[0])

    @cached_property
    def _least_rows(self) -> int:
        return min(wide for at, wide in self.verify_s if at == self.depth - 1)

    def _layer_seconds(self, rows: int) -> float:
        """One layer over so many rows: what passes above the first and above the last exit differ in."""
        above_first, above_last = self.verify_s[1, rows], self.verify_s[self.depth - 1, rows]
        return max(0.0, above_first - above_last) / max(1, self.depth - 2)

    def rounds_seconds_of(self, drafter: Drafter, draft_length: int) -> np.ndarray:
        """The same, with the seconds that the drafter itself says a draft takes (`step_s` of an imported one)."""
        shape: TreeShape | None = getattr(drafter, "shape", None)
        if shape is not None:
            levels = [min(level, shape.depth) for level in range(draft_length + 1)]
            return np.array([self.tree_seconds(drafter.key.exit_layer, shape, level) for level in levels])
        own = getattr(drafter, "step_s", 0.0) * np.arange(draft_length + 1)
        return self.rounds_seconds(drafter.key, draft_length) + own

    def rounds_seconds(self, drafter: DrafterKey | int | None, draft_length: int) -> np.ndarray:
        """(draft_length + 1,) seconds of a round with 0, 1, ... drafts."""
        if self.engine == "cuda":  # a recorded round always drafts them all
            return np.full(draft_length + 1, self.round_seconds(drafter, draft_length))
        return np.array([self.round_seconds(drafter, drafts) for drafts in range(draft_length + 1)])

    def _check(self, key: DrafterKey, drafts: int) -> None:
        if not self.knows(key):
            what = f"exit layer {key.exit_layer} is out of range" if key.is_exit else f"{key.model} was not timed"
            there = f"exits 1..{self.depth - 1}" if key.is_exit else f"the draft model {self.drafter or '(none)'}"
            raise InputError(f"{what}: these costs know {there}.")
        if not 0 <= drafts <= self.longest_draft:
            raise InputError(
                f"these costs know drafts of up to {self.longest_draft} tokens, not {drafts}.",
                "Make them with `draft_lengths` as long as you need.",
            )

    def to_json(self) -> dict[str, Any]:
        helper = self.draft_model
        return {
            "source": self.source,
            "device": self.device,
            "dtype": self.dtype,
            "context": self.context,
            "depth": self.depth,
            "autoregressive_s": self.autoregressive_s,
            "head_s": self.head_s,
            "overhead_s": self.overhead_s,
            "early_s": _listed(self.early_s),
            "heads_s": _listed(self.heads_s),
            "cold_s": _listed(self.cold_s),
            "verify_s": [
                {"exit_layer": exit_layer, "rows": rows, "seconds": each}
                for (exit_layer, rows), each in self.verify_s.items()
            ],
            "draft_rows": self.draft_head.rows,
            "exit_heads": self.draft_head.exit_heads,
            "drafter": None if helper is None else helper.name,
            "drafter_step_s": None if helper is None else helper.step_s,
            "drafter_first_s": None if helper is None else helper.first_s,
            "verify_all_s": None
            if helper is None
            else [{"rows": rows, "seconds": each} for rows, each in helper.verify_s.items()],
            **({} if self.trees is None else {"trees": self.trees.to_json()}),
            "quantiles": {name: list(each) for name, each in self.quantiles.items()},
            "fit_error": self.fit_error,
            "seconds": self.seconds,
            "sweeps": self.sweeps,
            "engine": self.engine,
            "rows": self.rows,
            "blocks": {name: list(each) for name, each in self.blocks.items()},
            **({"lookup_s": self.lookup_s} if self.lookup_s else {}),
            **({"whole_s": [{"rows": rows, "seconds": each} for rows, each in self.whole_s.items()]}
               if self.whole_s else {}),
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Costs:
        """What `to_json` wrote. Raises InputError for anything else."""
        try:
            return _ADAPTER.validate_python(cls._values(document))._whole()
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
        raise InputError(f"these are no costs as probekit writes them: {what}.", "Make them again.")

    @staticmethod
    def _values(document: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(document)
        values["blocks"] = {step: tuple(each) for step, each in document.get("blocks", {}).items()}
        for name in ("early_s", "heads_s", "cold_s"):
            values[name] = {row["exit_layer"]: row["seconds"] for row in document[name]}
        values["verify_s"] = {(row["exit_layer"], row["rows"]): row["seconds"] for row in document["verify_s"]}
        values["draft_head"] = {"rows": values.pop("draft_rows"), "exit_heads": values.pop("exit_heads")}
        values["whole_s"] = {row["rows"]: row["seconds"] for row in document.get("whole_s", ())}
        name, step, first, verify = (
            values.pop(key) for key in ("drafter", "drafter_step_s", "drafter_first_s", "verify_all_s")
        )
        if name is not None:
            widths = {row["rows"]: row["seconds"] for row in verify}
            values["draft_model"] = {"name": name, "step_s": step, "first_s": first, "verify_s": widths}
        if values.get("trees") is not None:
            values["trees"] = TreeCosts.values(values["trees"])
        return values

    def _whole(self) -> Costs:
        """The same where every exit, and every number of rows up to the longest draft's, has its time."""
        rows = range(2, self.longest_draft + 2)
        lacking: list[Any] = sorted({*range(1, self.depth)} ^ self.early_s.keys())
        if not self.early_s and not self.verify_s and self.whole_s:  # an engine's, of a draft model and lookups alone
            lacking = []
        lacking = lacking or [(exit_layer, each) for exit_layer in self.early_s for each in rows
                              if (exit_layer, each) not in self.verify_s]  # fmt: skip
        if self.draft_model is not None:
            lacking = lacking or sorted({*rows} - self.draft_model.verify_s.keys())
        if self.whole_s:
            lacking = lacking or sorted({*rows} - self.whole_s.keys())
        if lacking:
            raise ValueError(f"times are missing, or of other exits or rows: {lacking[:4]}")
        return self

    def __repr__(self) -> str:
        step = f"{1000 * self.autoregressive_s:.3g} ms an autoregressive step"
        return f"Costs({self.source}, {self.device}, {self.dtype}, context {self.context}: {step}, depth {self.depth})"

    def to_pandas(self) -> pd.DataFrame:
        """A row a step: columns step, exit_layer, rows, seconds."""
        rows: list[tuple[str, int | None, int, float]] = [
            ("autoregressive", None, 1, self.autoregressive_s),
            ("head", None, 1, self.head_s),
            ("overhead", None, 1, self.overhead_s),
        ]
        rows += [("early", exit_layer, 1, each) for exit_layer, each in self.early_s.items()]
        rows += [("head", exit_layer, 1, each) for exit_layer, each in self.heads_s.items()]
        rows += [("cold", exit_layer, 1, each) for exit_layer, each in self.cold_s.items()]
        rows += [("verify", exit_layer, count, each) for (exit_layer, count), each in self.verify_s.items()]
        if self.draft_model is not None:
            helper = self.draft_model
            rows += [("drafter", None, 1, helper.step_s), ("drafter first", None, 2, helper.first_s)]
            rows += [("verify all", None, count, each) for count, each in helper.verify_s.items()]
        return pd.DataFrame(rows, columns=["step", "exit_layer", "rows", "seconds"]).astype({"exit_layer": "Int64"})

    def _repr_html_(self) -> str:
        """Milliseconds of a draft step and of verification passes by exit layer, beside an autoregressive step's."""
        widths = sorted({count for _, count in self.verify_s})

        def cell(seconds: float) -> HtmlCell:
            return HtmlCell(f"{1000 * seconds:.3g}", seconds / (2 * self.autoregressive_s))

        rows = [
            (
                str(exit_layer),
                [cell(early + self.heads_s.get(exit_layer, self.head_s))]
                + [cell(self.verify_s[exit_layer, count]) for count in widths if (exit_layer, count) in self.verify_s],
            )
            for exit_layer, early in sorted(self.early_s.items(), reverse=True)
        ]
        return html_table(
            f"milliseconds a step: {self.source}, {self.device}, {self.dtype}, {self.context} tokens in the cache; an "
            f"autoregressive step takes {1000 * self.autoregressive_s:.3g}",
            "exit layer", ["draft one token", *(f"verify {count} rows" for count in widths)], rows,
        )  # fmt: skip


_ADAPTER = TypeAdapter(Costs)


def _listed(times: Mapping[int, float]) -> list[dict[str, Any]]:
    return [{"exit_layer": exit_layer, "seconds": seconds} for exit_layer, seconds in times.items()]
