"""Residuals of every layer -> per-token figures, in chunks: never a layers x tokens x vocabulary array.

All layers share the head, so a chunk of tokens is one product: its rows are the model's own row of each token and
the rows of every (lens, layer). The logits of a chunk are reduced block by block, each block while it is in the
processor's cache, with the model's row of the token beside it; then the next chunk takes their place. On a CUDA device
with Triton a kernel reduces them instead (`lens.row_kernel`; not yet run on a GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from probekit.errors import InputError
from probekit.lens.agreement import AgreementSearch
from probekit.lens.lens import KINDS, Kind, Lens, check_model_row, head_logits, head_scratch_bytes, not_finite
from probekit.lens.noise import Noise
from probekit.lens.reductions import block_maxima, rank_in_row, rank_of_token, rounded_argmax, topk_lowest_id
from probekit.lens.statistics import LogitsBlock, registered
from probekit.models.anatomy import Anatomy

Warp = Callable[[Tensor], Tensor]
Mode = Literal["all", "agreement"]
CHUNK_BYTES = {"cpu": 64 * 2**20, "else": 2**30}  # of logits in one product
BLOCK_BYTES = {"cpu": 2 * 2**20, "else": 2**28}  # of logits reduced at once: what the second-level cache holds
WARP_COPIES = 12  # copies of a block that a warp (sorted for top-p) may make
ROW_BYTES = 96  # of results for one (lens, layer, row), in whatever state of being put together
SLACK_BYTES = 16 * 2**20  # for the matrix library's packing and the allocator's rounding


@dataclass(frozen=True)
class StatisticsPlan:
    """What to compute for every (lens, layer, row).

    Parameters
    ----------
    lenses: "final-norm", "raw", or both.
    mode: "all" statistics, or "agreement" only (final-norm lens only, float32-exact, several times faster).
    warp: logits (rows, vocabulary) float32 -> log-probabilities that the decoder draws from, the same shape. With
        it, `overlap` is at the decoder's settings and there is `accept_probability`; None: temperature 1.
    rounded_dtype: the decoder's dtype where it is smaller than float32; adds the argmax after rounding.
    noise: logits; two that differ by less may change order when a row is computed alone or among others. By row, or
        one number for all.
    chunk_rows: tokens in one chunk; None: as many as CHUNK_BYTES of logits hold, at least one.
    top: how many of the most probable tokens to return for each row; 0: none.
    heads: {exit layer: map} put before norm and head, for the final-norm lens.
    """

    lenses: tuple[Kind, ...] = KINDS
    mode: Mode = "all"
    warp: Warp | None = None
    rounded_dtype: torch.dtype | None = None
    noise: float | Noise = 0.0
    chunk_rows: int | None = None
    top: int = 0
    heads: Mapping[int, Callable[[Tensor], Tensor]] | None = None

    def __post_init__(self) -> None:
        if not self.lenses or len(set(self.lenses)) != len(self.lenses) or not set(self.lenses) <= set(KINDS):
            raise InputError(f"lenses must be distinct, of {', '.join(KINDS)}, and at least one: {self.lenses}.")
        if self.mode not in ("all", "agreement"):
            raise InputError(f"there are no statistics {self.mode!r}; there are all and agreement.")
        Noise.of(self.noise)
        if (self.chunk_rows is not None and self.chunk_rows < 1) or self.top < 0:
            raise InputError(f"chunk_rows must be at least 1 and top at least 0: {self.chunk_rows}, {self.top}.")


@torch.no_grad()
def layer_statistics(
    parts: Anatomy,
    residuals: Tensor,
    input_ids: Tensor,
    text_ids: Tensor,
    plan: StatisticsPlan,
    model_logits_check: Tensor | None = None,
    *,
    witnesses: AgreementSearch | None = None,
) -> dict[str, Tensor]:
    """Every statistic of the plan for every lens, layer and row.

    Parameters
    ----------
    residuals: (layers + 1, rows, width), the sites 0..L of each row.
    input_ids, text_ids: (rows,), integers: the token that each row reads, and the text's next one.
    model_logits_check: (rows, vocabulary), the model's own logits: they must be those of the last row.
    witnesses: what was learned on earlier calls in mode "agreement"; made anew when None.

    Returns {name: (lenses, layers + 1, rows)}, and `top_ids`, `top_probabilities`, (lenses, layers + 1, rows, top),
    when asked for. The last layer of each lens is the model's own row. Names, with x the row's logits, q their
    softmax, p the model's, m the model's argmax (equal logits: the lowest id):

    argmax, probability (its, in q), margin (largest less second largest logit), agrees (argmax == m),
    log_probability (of the text's next token, nats), rank (of the text's next token: tokens that come before it),
    model_rank (tokens that come before the row's argmax in the model's logits), entropy (nats),
    kl (KL(p || q), nats), overlap (sum of min(p, q), after the warp if there is one), echo (argmax == input id),
    near_tie (`agrees` could flip within the noise: |x[m] - largest other x| < noise; on the last layer: the model's
    own margin is below the noise), accept_probability (min(1, q / p) of the text's next token after the warp; 0
    where q is 0), argmax_rounded, agrees_rounded (after rounding the logits, the model's as well).
    Mode "agreement" has agrees, near_tie and, with rounded_dtype, agrees_rounded: the same bits.

    Raises SelfCheckError for logits that are not finite (naming the layer), or a last row that is not the model's.
    """
    _check_shapes(parts, residuals, input_ids, text_ids, plan)
    if plan.mode == "agreement" and parts.changes_logits:
        return _agreement_of_all(parts, residuals, input_ids, text_ids, plan, model_logits_check)
    if plan.mode == "agreement":
        found = (witnesses or AgreementSearch(parts)).agreement(
            residuals,
            input_ids,
            noise=plan.noise,
            rounded_dtype=plan.rounded_dtype,
            heads=plan.heads,
            model_logits_check=model_logits_check,
        )
        return {name: bits[None] for name, bits in found.items()}

    engine = _Chunks(parts, plan, residuals.shape[1], residuals.device)
    for start in range(0, residuals.shape[1], engine.tokens):
        rows = slice(start, start + engine.tokens)
        check = None if model_logits_check is None else model_logits_check[rows]
        engine.run(rows, residuals[:, rows], input_ids[rows], text_ids[rows], check)
    return engine.results()


def _agreement_of_all(
    parts: Anatomy, residuals: Tensor, input_ids: Tensor, text_ids: Tensor, plan: StatisticsPlan, check: Tensor | None
) -> dict[str, Tensor]:
    """The bits of mode "agreement", out of all statistics: the search knows the head's products only."""
    found = layer_statistics(parts, residuals, input_ids, text_ids, replace(plan, mode="all", lenses=KINDS[:1]), check)
    return {name: found[name] for name in ("agrees", "near_tie", "agrees_rounded") if name in found}


def peak_bytes(parts: Anatomy, plan: StatisticsPlan, rows: int) -> int:
    """Upper bound of the memory, in bytes, that `layer_statistics` takes beside its arguments.

    It grows with `rows` only by the results themselves.
    """
    vocabulary, width, item = parts.vocabulary, parts.width, 4
    if plan.mode == "agreement":
        return AgreementSearch.peak_bytes(parts, rows) + SLACK_BYTES
    sites = _sites(parts, plan)
    tokens = _chunk_tokens(parts, plan, rows)
    block = _block_rows(parts, sites, tokens) * vocabulary * 4
    chunk = tokens * sites * vocabulary * 4
    states = tokens * sites * width * (2 * item + (4 if item != 4 else 0) + 8)  # stacked, widened, inside the norm
    beside = 3 * tokens * vocabulary * 4  # the model's row, its probabilities, the same after the warp
    scratch = block * (2 + (WARP_COPIES if plan.warp is not None else 0))
    results = rows * sites * (ROW_BYTES + 16 * plan.top)
    return chunk + states + beside + scratch + results + head_scratch_bytes(parts, tokens * sites) + SLACK_BYTES


def _check_shapes(parts: Anatomy, residuals: Tensor, input_ids: Tensor, text_ids: Tensor, plan: StatisticsPlan) -> None:
    rows = residuals.shape[1] if residuals.dim() == 3 else 0
    if not rows or residuals.shape != (parts.depth + 1, rows, parts.width):
        raise InputError(
            f"the residuals have shape {tuple(residuals.shape)}; "
            f"expected ({parts.depth + 1}, rows, {parts.width}) with at least one row."
        )
    if input_ids.shape != (rows,) or text_ids.shape != (rows,):
        raise InputError(f"ids must have shape ({rows},), not {tuple(input_ids.shape)} and {tuple(text_ids.shape)}.")
    if plan.top > parts.vocabulary:
        raise InputError(f"top {plan.top} exceeds the vocabulary of {parts.vocabulary}.")


def _budget(budget: Mapping[str, int], device: torch.device) -> int:
    return budget.get(device.type, budget["else"])


def _sites(parts: Anatomy, plan: StatisticsPlan) -> int:
    """Rows of the product for each token: the model's own, and layers 0..L-1 of each lens."""
    return 1 + len(plan.lenses) * parts.depth


def _chunk_tokens(parts: Anatomy, plan: StatisticsPlan, rows: int) -> int:
    token_bytes = _sites(parts, plan) * parts.vocabulary * 4
    tokens = plan.chunk_rows or max(1, _budget(CHUNK_BYTES, parts.device) // token_bytes)
    return min(rows, tokens)


def _block_rows(parts: Anatomy, sites: int, tokens: int) -> int:
    rows = max(1, _budget(BLOCK_BYTES, parts.device) // (parts.vocabulary * 4))
    return min(rows if rows < sites else rows - rows % sites, sites * tokens)


class _Chunks:
    """Buffers and results of one call, for all of its chunks."""

    def __init__(self, parts: Anatomy, plan: StatisticsPlan, rows: int, device: torch.device) -> None:
        self.parts = parts
        self.plan = plan
        self.rows = rows
        self.lenses = [Lens(parts, kind, plan.heads if kind == "final-norm" else None) for kind in plan.lenses]
        self.sites = _sites(parts, plan)
        self.tokens = _chunk_tokens(parts, plan, rows)
        self.block_rows = _block_rows(parts, self.sites, self.tokens)
        self.noise = Noise.of(plan.noise)
        table = torch.tensor(self.noise.at(parts.depth), device=device)
        self.base = torch.cat([table[-1:], *[table[:-1]] * len(plan.lenses)])  # (sites,)
        vocabulary = parts.vocabulary
        self.logits = torch.empty(self.tokens * self.sites, vocabulary, device=device)
        self.by_kernel = device.type == "cuda" and find_spec("triton") is not None
        self.scratch = torch.empty(0 if self.by_kernel else 2, self.block_rows, vocabulary, device=device)
        self.found: dict[str, Tensor] = {}  # (rows, sites) each

    def run(self, rows: slice, residuals: Tensor, input_ids: Tensor, text_ids: Tensor, check: Tensor | None) -> None:
        """One chunk. residuals: (layers + 1, tokens, width)."""
        depth = self.parts.depth
        states = [self.lenses[0].states(residuals[depth], depth)]
        states += [lens.states(residuals[layer], layer) for lens in self.lenses for layer in range(depth)]
        stacked = rearrange(states, "site token width -> (token site) width")
        logits = head_logits(self.parts, stacked, self.logits[: len(stacked)])
        logits = rearrange(logits, "(token site) vocabulary -> token site vocabulary", site=self.sites)
        model = _Model(logits[:, 0], text_ids, self.plan, probabilities=not self.by_kernel)
        texts = [] if self.by_kernel else text_ids.tolist()
        for tokens, sites in self._blocks(len(logits)):
            if self.by_kernel:
                block = self._reduce_by_kernel(logits[tokens, sites], model, tokens, sites, input_ids, text_ids)
            else:
                block = self._reduce(logits[tokens, sites], model, tokens, sites, input_ids, text_ids, texts)
            for name, figures in block.items():
                self._table(name, figures)[rows][tokens, sites] = figures
        self._check_finite(rows)
        if check is not None:
            check_model_row(self.parts, model.logits, check, self.noise.by_site[-1])

    def _blocks(self, tokens: int) -> Iterator[tuple[slice, slice]]:
        """Parts of a chunk that are contiguous in memory: some sites of one token, or some tokens whole."""
        at_once, sites = self.block_rows // self.sites, self.sites
        if at_once:
            for first in range(0, tokens, at_once):
                yield slice(first, min(tokens, first + at_once)), slice(0, sites)
            return
        for token in range(tokens):
            for site in range(0, sites, self.block_rows):
                yield slice(token, token + 1), slice(site, min(sites, site + self.block_rows))

    def _reduce(
        self,
        x: Tensor,
        model: _Model,
        tokens: slice,
        sites: slice,
        input_ids: Tensor,
        text_ids: Tensor,
        texts: list[int],
    ) -> dict[str, Tensor]:
        """Figures of a block of logits, which are used up. x: (tokens, sites, vocabulary), contiguous."""
        plan = self.plan
        q, scratch = (buffer[: x.shape[0] * x.shape[1]].view(x.shape) for buffer in self.scratch)
        text = text_ids[tokens, None, None].expand(x.shape[0], x.shape[1], 1)
        in_block = range(x.shape[0])
        first = tokens.start

        # What depends on the order of the logits comes first: shifted by their maximum, unequal ones may become equal.
        maxima = block_maxima(x)
        values, ids = topk_lowest_id(x, maxima, max(2, plan.top))
        argmax, largest = ids[..., 0], values[..., 0]
        agrees = argmax == model.argmax[tokens, None]
        margin = largest - values[..., 1]
        own = x.gather(-1, model.argmax[tokens, None, None].expand_as(text))[..., 0]
        found = {
            "argmax": argmax,
            "margin": margin,
            "agrees": agrees,
            "near_tie": torch.where(agrees, margin, largest - own) < self.noise.around(self.base[sites], own),
            "echo": argmax == input_ids[tokens, None],
            "rank": torch.stack([rank_of_token(x[i], texts[first + i], scratch[i]) for i in in_block]),
            "model_rank": torch.stack([rank_in_row(model.logits[first + i], argmax[i], scratch[i]) for i in in_block]),
        }
        if plan.rounded_dtype is not None:
            rounded = rounded_argmax(x, maxima, plan.rounded_dtype)
            found["argmax_rounded"] = rounded
            found["agrees_rounded"] = rounded == model.argmax_rounded[tokens, None]
        found |= self._warped(x, model, tokens, text, q)
        block = LogitsBlock(x, model.logits[tokens], input_ids[tokens], text_ids[tokens])
        found |= {each.name: each.reduce(block) for each in registered() if each.reduce is not None}

        x.sub_(largest[..., None])
        total = torch.exp(x, out=q).sum(-1)  # torch's softmax has an exponential of 20 bits only
        q.div_(total[..., None])
        log_sum = total.log()
        found["probability"] = 1 / total
        found["log_probability"] = x.gather(-1, text)[..., 0] - log_sum
        found["entropy"] = log_sum - torch.mul(q, x, out=scratch).sum(-1)
        # a matrix product would be quicker than multiply and sum, but adds up in a row: 2 digits less
        cross = log_sum - torch.mul(x, model.p[tokens, None], out=scratch).sum(-1)
        found["kl"] = (cross - model.entropy[tokens, None]).clamp_(min=0)
        if plan.warp is None:
            found["overlap"] = torch.minimum(q, model.p[tokens, None], out=q).sum(-1)
        if plan.top:
            found["top_ids"] = ids[..., : plan.top]
            found["top_probabilities"] = (values[..., : plan.top] - largest[..., None] - log_sum[..., None]).exp_()
        found["finite"] = (largest + log_sum).isfinite()
        return found

    def _warped(
        self, x: Tensor, model: _Model, tokens: slice, text: Tensor, out: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The figures at the decoder's settings. text: (tokens, sites, 1)."""
        if self.plan.warp is None:
            return {}
        warped = self.plan.warp(x.flatten(0, 1)).view(x.shape)
        text_q = warped.gather(-1, text)[..., 0]
        ratio = (text_q - model.text_log_p[tokens, None]).clamp_(max=0).exp_()
        return {
            "accept_probability": torch.where(text_q.isneginf(), 0.0, ratio),
            "overlap": torch.minimum(warped.exp_(), model.warped_p[tokens, None], out=out).sum(-1),
        }

    def _reduce_by_kernel(
        self, x: Tensor, model: _Model, tokens: slice, sites: slice, input_ids: Tensor, text_ids: Tensor
    ) -> dict[str, Tensor]:
        """The same figures, nothing of which the host waits for."""
        from probekit.lens.row_kernel import row_statistics

        plan, theirs = self.plan, model.logits[tokens]
        read, text = input_ids[tokens], text_ids[tokens]
        found = row_statistics(
            x, theirs, read, text, noise=self.base[sites], rounding=self.noise.rounding,
            rounded_dtype=plan.rounded_dtype,
        )  # fmt: skip
        found |= self._warped(x, model, tokens, text[:, None, None].expand(x.shape[0], x.shape[1], 1))
        block = LogitsBlock(x, theirs, read, text)
        found |= {each.name: each.reduce(block) for each in registered() if each.reduce is not None}
        if plan.top:
            values, found["top_ids"] = topk_lowest_id(x, block_maxima(x), plan.top)
            found["top_probabilities"] = (values - values[..., :1]).exp_() * found["probability"][..., None]
        return found

    def _table(self, name: str, figures: Tensor) -> Tensor:
        """Where the figures of a name are gathered: (rows, sites, ...)."""
        if name not in self.found:
            dtype = torch.int32 if figures.dtype == torch.int64 else figures.dtype
            shape = (self.rows, self.sites, *figures.shape[2:])
            self.found[name] = torch.empty(shape, dtype=dtype, device=figures.device)
        return self.found[name]

    def _check_finite(self, rows: slice) -> None:
        finite = self.found["finite"][rows].all(0)
        if not finite.all():
            raise not_finite(*min(map(self._name, (~finite).nonzero().flatten().tolist()), key=lambda name: name[1]))

    def _name(self, site: int) -> tuple[Kind, int]:
        """(lens, layer) of a row of the product."""
        lens, layer = divmod(site - 1, self.parts.depth) if site else (0, self.parts.depth)
        return self.plan.lenses[lens], layer

    def results(self) -> dict[str, Tensor]:
        """{name: (lenses, layers + 1, rows, ...)}: the model's row is the last layer of each lens."""
        del self.found["finite"]
        depth = self.parts.depth
        order = [[*range(1 + lens * depth, 1 + (lens + 1) * depth), 0] for lens in range(len(self.lenses))]
        index = torch.tensor(order, device=self.logits.device)  # (lenses, layers + 1)
        return {
            name: rearrange(table[:, index], "row lens layer ... -> lens layer row ...").contiguous()
            for name, table in self.found.items()
        }


class _Model:
    """What a chunk keeps of the model's own logits, (tokens, vocabulary)."""

    def __init__(self, logits: Tensor, text_ids: Tensor, plan: StatisticsPlan, *, probabilities: bool = True) -> None:
        self.logits = logits.clone()
        maxima = block_maxima(self.logits)
        values, ids = topk_lowest_id(self.logits, maxima, 1)
        self.argmax = ids[:, 0]
        if plan.rounded_dtype is not None:
            self.argmax_rounded = rounded_argmax(self.logits, maxima, plan.rounded_dtype)
        if plan.warp is not None:
            warped = plan.warp(self.logits)
            self.text_log_p = warped.gather(-1, text_ids[:, None])[:, 0]
            self.warped_p = warped.exp_()
        if not probabilities:
            return
        shifted = self.logits - values
        self.p = shifted.exp()
        total = self.p.sum(-1)
        self.p.div_(total[:, None])
        self.entropy = total.log() - shifted.mul_(self.p).sum(-1)
