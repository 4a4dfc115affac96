"""Interventions: what a model says when one value of its stream is another text's, or none.

Activation patching (Vig et al., arXiv 2004.12265; Meng et al., arXiv 2202.05262; Heimersheim and Nanda, arXiv
2404.15255): the model reads the corrupted text, and at one site and position has the value of the clean one. Ablation:
it reads the clean text, and has there zeros, a mean, or the value of another text. The model starts at the changed
site, so that no layer before it runs again, and all positions of a site are rows of one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.hooks.components import Component, Site, depth_of
from probekit.hooks.stop_resume import Resume
from probekit.html_tables import HtmlCell, html_table
from probekit.lens.lens import Lens, head_logits
from probekit.probing.patch_plan import How, PatchPlan, Text, plan_patches

TOKENS = 4096  # tokens of the texts in one batch


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the model says after the last token of a run.

    difference: logit of the answer less that of its rival. kl: of the clean run's distribution from this one, nats.
    agrees: its most probable token is that of the clean run. By exit: whether the lens has the model's own most
    probable token (greedy acceptance), and the sum over tokens of min(p, q) (the expected acceptance of a sampled
    draft). Arrays of one shape, (..., ) and (..., exits).
    """

    difference: np.ndarray
    kl: np.ndarray
    agrees: np.ndarray
    exit_agrees: np.ndarray
    exit_acceptance: np.ndarray


@dataclass(frozen=True, eq=False)
class Patching:
    """The outcome of every patch, (sites, positions), beside those of the two runs that it lies between.

    tokens: the text that was read, by position. base: that text's run unchanged; clean: the run of the clean text (for
    an ablation the same).
    """

    model: str
    how: str
    tokens: tuple[str, ...]
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    exits: tuple[int, ...]
    answers: tuple[int, int]
    answer_texts: tuple[str, str]
    clean: Outcome
    base: Outcome
    patched: Outcome

    @property
    def change(self) -> np.ndarray:
        """(sites, positions): logit difference less that of the unchanged run."""
        return self.patched.difference - self.base.difference

    @property
    def restored(self) -> np.ndarray | None:
        """(sites, positions): 0 as corrupted, 1 as clean; None for an ablation, or where both runs say the same."""
        whole = float(self.clean.difference - self.base.difference)
        return None if self.how not in ("patch", "gradient") or whole == 0 else self.change / whole

    def table(self) -> pd.DataFrame:
        """A row for each patch: site, kind, layer, position, token, logit_difference, change, restored, kl, agrees."""
        shape = self.change.shape
        restored = self.restored
        columns = {
            "site": np.repeat(self.sites, shape[1]),
            "kind": np.repeat([site.partition(":")[0] for site in self.sites], shape[1]),
            "layer": np.repeat(self.layers, shape[1]),
            "position": np.tile(self.positions, shape[0]),
            "token": np.tile([self.tokens[position] for position in self.positions], shape[0]),
            "logit_difference": self.patched.difference.ravel(),
            "change": self.change.ravel(),
            "restored": np.full(self.change.size, np.nan) if restored is None else restored.ravel(),
            "kl": self.patched.kl.ravel(),
            "agrees": self.patched.agrees.ravel(),
        }
        return pd.DataFrame(columns)

    def to_pandas(self) -> pd.DataFrame:
        """The same, as plots ask for it: `plots.patch_map(found)`."""
        return self.table()

    def exit_table(self) -> pd.DataFrame:
        """A row for each patch and exit: site, position, exit_layer, agrees, acceptance, acceptance_change."""
        frame = self.table()[["site", "kind", "layer", "position", "token"]]
        frame = frame.loc[frame.index.repeat(len(self.exits))].reset_index(drop=True)
        acceptance = self.patched.exit_acceptance
        return frame.assign(
            exit_layer=np.tile(self.exits, self.change.size),
            agrees=self.patched.exit_agrees.ravel(),
            acceptance=acceptance.ravel(),
            acceptance_change=(acceptance - self.base.exit_acceptance).ravel(),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model, "how": self.how, "tokens": list(self.tokens), "sites": list(self.sites),
            "positions": list(self.positions), "exits": list(self.exits), "answers": list(self.answers),
            "answer_texts": list(self.answer_texts), "clean": _plain(self.clean), "base": _plain(self.base),
            "patched": _plain(self.patched), "change": _numbers(self.change),
            "restored": None if self.restored is None else _numbers(self.restored),
        }  # fmt: skip

    def to_html(self) -> str:
        """A table for each kind of site, layer by position, of what was restored, or of the change."""
        values = self.change if self.restored is None else self.restored
        most = max(1e-9, float(np.abs(values).max()))
        heads = [f"{position} {self.tokens[position]}" for position in self.positions]
        tables = []
        for kind in dict.fromkeys(site.partition(":")[0] for site in self.sites):
            rows = [
                (self.sites[row], [_cell(value, most) for value in values[row]])
                for row in reversed(range(len(self.sites)))
                if self.sites[row].partition(":")[0] == kind
            ]
            tables.append(html_table(f"{kind}: {self.measure}", "site", heads, rows))
        return "".join(tables)

    @property
    def measure(self) -> str:
        """What the tables show, in words."""
        right, wrong = self.answer_texts
        difference = f"logit of {right!r} less that of {wrong!r}"
        if self.restored is None:
            return f"change of the {difference}, {self.how} ablation"
        return f"share restored of the {difference} (0 as corrupted, 1 as clean)"

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        return f"Patching({self.model}, {self.how}: {len(self.sites)} sites x {len(self.positions)} positions)"


@torch.no_grad()
def patch(
    model: Any,
    clean: Text,
    corrupted: Text | Sequence[Text] | None = None,
    sites: Any = None,
    positions: Iterable[int] | None = None,
    *,
    how: How = "patch",
    answers: Sequence[Any] | None = None,
    exits: Iterable[int] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Patching:
    """Change one value of the stream, for every site and position, and see what the model then says.

    Parameters
    ----------
    model: loaded, wrapped, or its name.
    clean, corrupted: texts, or their tokens; for patching of equally many tokens. An ablation by the mean or by
        resampling takes its values from one or more corrupted texts; zero ablation needs none.
    sites: residual sites by number, "attention:3", "mlp:3", or a kind ("residual", "attention", "mlp") for all of its
        sites; all of all by default.
    positions: of the text, 0..n-1, or from its end, -1..-n; all by default.
    how: "patch": the corrupted text with the clean text's value. "zero", "mean" (over every position of the
        corrupted texts), "resample" (the same position of a corrupted text drawn at random): the clean text with that.
    answers: two tokens whose logits are compared; by default the most probable ones of the clean and the corrupted run,
        or, where these are one, the two most probable ones of the clean run.
    exits: exits whose acceptance is read; all by default, none by ().
    batch_size: rows in one pass; as many as make 4,096 tokens by default.

    Raises InputError for texts, sites, positions or answers that do not fit. The model comes back as it was.

    Examples
    --------
    >>> import probekit
    >>> found = probekit.patch("tales-tied", "Tom saw a big dog", "Tom saw a big cat", ["residual"], exits=[6])
    >>> found
    Patching(tales-tied, patch: 13 sites x 6 positions)
    >>> bool(abs(found.restored[12, -1] - 1) < 1e-3)  # the last residual of the last token is the answer
    True
    """
    plan = plan_patches(
        model, clean, corrupted, sites, positions, how=how, answers=answers, exits=exits, seed=seed
    )  # fmt: skip
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected 1 or more.")
    parts, rows = plan.parts, batch_size or max(1, TOKENS // len(plan.base))
    whole = {site: None for site in (*parts.sites, *plan.sites)}
    clean_run = _run(plan, plan.clean, whole)
    base_run = clean_run if plan.how != "patch" else _run(plan, plan.base, whole)
    judge = _Judge(plan, clean_run, base_run)
    donors = _donors(plan, clean_run)
    found = [
        judge.outcome(*_patched(plan, site, base_run, donors[site], block))
        for site in plan.sites
        for block in _blocks(len(plan.positions), rows)
    ]
    shape = (len(plan.sites), len(plan.positions))
    return result_of(
        plan, judge.answers, judge.outcome(*judge.seen(clean_run)), judge.outcome(*judge.seen(base_run)),
        Outcome(*(_joined(found, name, shape) for name in Outcome.__dataclass_fields__)),
    )  # fmt: skip


def result_of(
    plan: PatchPlan, answers: tuple[int, int], clean: Outcome, base: Outcome, patched: Outcome, how: str | None = None
) -> Patching:
    """The outcomes of a plan, with the names of what they are of; clean and base are of one row each."""
    show = plan.loaded.tokenizer.decode if plan.loaded.tokenizer is not None else lambda ids: str(ids[0])
    first, second = (
        Outcome(*(getattr(each, name)[0] for name in Outcome.__dataclass_fields__)) for each in (clean, base)
    )
    return Patching(
        plan.loaded.name, how or plan.how, tuple(show([int(token)]) for token in plan.base),
        tuple(_name(site) for site in plan.sites), tuple(depth_of(site) for site in plan.sites), plan.positions,
        plan.exits, answers, (show([answers[0]]), show([answers[1]])), first, second, patched,
    )  # fmt: skip


def _name(site: Site) -> str:
    return str(site) if isinstance(site, Component) else f"residual:{site}"


def _run(plan: PatchPlan, ids: Tensor, sites: Iterable[Site]) -> dict[Site, Tensor]:
    """{site: (positions, width)} of one text."""
    with Capture(plan.parts, sites) as capture:
        plan.parts.decoder(input_ids=ids[None].to(plan.parts.device), use_cache=False)
    return {site: capture[site][0] for site in capture.sites}


def _donors(plan: PatchPlan, clean_run: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """{site: (positions of the text, width)}: the values that are put in."""
    if plan.how == "patch":
        return {site: clean_run[site] for site in plan.sites}
    if plan.how == "zero":
        return {site: torch.zeros_like(clean_run[site]) for site in plan.sites}
    runs = [_run(plan, ids, plan.sites) for ids in plan.donors]
    if plan.how == "mean":
        means = {site: torch.cat([run[site] for run in runs]).mean(0) for site in plan.sites}
        return {site: mean.expand_as(clean_run[site]) for site, mean in means.items()}
    drawn = np.random.default_rng(plan.seed).integers(len(runs), size=(len(plan.sites), len(plan.clean)))
    return {
        site: torch.stack([runs[text][site][position] for position, text in enumerate(row)])
        for site, row in zip(plan.sites, drawn.tolist(), strict=True)
    }


def _patched(
    plan: PatchPlan, site: Site, base: Mapping[Site, Tensor], donor: Tensor, block: slice
) -> tuple[Tensor, dict[int, Tensor]]:
    """(rows, width) after the final norm, and {exit: (rows, width)}, of the last token; a row a position."""
    places = torch.tensor(plan.positions[block], device=donor.device)
    changed = base[site].repeat(len(places), 1, 1)
    changed[torch.arange(len(places), device=donor.device), places] = donor[places]
    start = depth_of(site)
    first = start + 1 if isinstance(site, Component) else start
    behind = [layer for layer in plan.exits if layer >= first]
    seen: dict[int, Tensor] = {}
    with Resume(plan.parts, site) as resume, _reading(plan, behind, seen):
        if isinstance(site, Component):
            last = resume(base[start].repeat(len(places), 1, 1), changed, use_cache=False)
        else:
            last = resume(changed, use_cache=False)
    before = {layer: base[layer][-1].repeat(len(places), 1) for layer in plan.exits if layer < first}
    return last[:, -1], {**before, **seen}


def _reading(plan: PatchPlan, exits: list[int], seen: dict[int, Tensor]) -> Any:
    """A Capture of the last token at some exits, which may be none."""
    sites = exits or [plan.parts.depth]
    return Capture(plan.parts, sites, reduce=lambda site, residual: seen.__setitem__(site, residual[:, -1].clone()))


class _Judge:
    """Holds runs against the clean one."""

    def __init__(self, plan: PatchPlan, clean: Mapping[Site, Tensor], base: Mapping[Site, Tensor]) -> None:
        self.plan, self.lens = plan, Lens(plan.parts)
        logits = head_logits(plan.parts, self.seen(clean)[0])
        self.clean = logits.double().log_softmax(-1)
        self.top = logits.argmax(-1)
        other = head_logits(plan.parts, self.seen(base)[0])
        self.answers = plan.answers or two_answers(logits[0], other[0])

    def seen(self, run: Mapping[Site, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """What `outcome` reads, of a run of one text."""
        parts = self.plan.parts
        return parts.norm(run[parts.depth][-1:]), {layer: run[layer][-1:] for layer in self.plan.exits}

    def outcome(self, last: Tensor, exits: Mapping[int, Tensor]) -> Outcome:
        logits = head_logits(self.plan.parts, last)
        scores, top, (right, wrong) = logits.double().log_softmax(-1), logits.argmax(-1), self.answers
        kl = (self.clean.exp() * (self.clean - scores)).sum(-1).clamp(min=0)
        agrees, acceptance = [], []
        for layer in self.plan.exits:
            drafts = self.lens(exits[layer], layer)
            agrees.append(drafts.argmax(-1) == top)
            acceptance.append(torch.minimum(drafts.softmax(-1), logits.softmax(-1)).sum(-1))
        empty = logits.new_zeros(len(logits), 0)
        return Outcome(
            (logits[:, right] - logits[:, wrong]).cpu().numpy(), kl.cpu().numpy(), (top == self.top).cpu().numpy(),
            (torch.stack(agrees, -1) if agrees else empty.bool()).cpu().numpy(),
            (torch.stack(acceptance, -1) if acceptance else empty).cpu().numpy(),
        )  # fmt: skip


def two_answers(clean: Tensor, base: Tensor) -> tuple[int, int]:
    """The most probable tokens of two runs, or the two most probable of the clean one. clean, base: (vocabulary,)."""
    first, second = clean.topk(2).indices.tolist()
    other = int(base.argmax())
    return first, second if other == first else other


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _joined(found: Sequence[Outcome], name: str, shape: tuple[int, int]) -> np.ndarray:
    values = np.concatenate([getattr(each, name) for each in found])
    return values.reshape(*shape, *values.shape[1:])


def _cell(value: float, most: float) -> HtmlCell:
    return HtmlCell(f"{value:z.2f}", abs(value) / most, "blue" if value >= 0 else "orange")


def _numbers(values: np.ndarray) -> list:
    return np.asarray(values).tolist()


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {name: _numbers(getattr(outcome, name)) for name in Outcome.__dataclass_fields__}
