"""Agreement without the full product, exact: one token that beats the model's own disproves agreement.

Most rows of most layers disagree with the model, and a layer that disagrees mostly says one of few tokens. So a few
candidates are tried first: the layer's frequent argmaxes, and the tokens of the text around. A candidate counts as a
witness only with a margin above the noise and above twice the error that any float32 product of that length can
have, so that no product could see it otherwise. Rows without a witness, those that agree among them, get the full
product; they are pooled across layers, because products of many rows run at a multiple of the rate of few. Where the
processor is faster in bfloat16, a product in that dtype is tried before: with a bound on its error, it proves the
agreement of most rows that agree (`probekit.lens.bf16_bound`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from probekit.lens.bf16_bound import GAIN, Bf16Bound, bf16_bytes, worthwhile
from probekit.lens.lens import Lens, check_model_row, head_logits, head_scratch_bytes, not_finite
from probekit.lens.noise import Noise
from probekit.lens.reductions import block_maxima, rounded_argmax, topk_lowest_id
from probekit.lens.work_skipped import WorkSkipped
from probekit.models.anatomy import Anatomy

POOL_ROWS = {"cpu": 256, "else": 2048}  # rows of one full product
CALIBRATION_TOKENS = 4  # of the first rows seen: full products in every layer; more is learned on the way
FREQUENT = 256  # most candidates that a layer keeps
UNIT_ROUNDOFF = 2.0**-24  # of float32
INPUT_ROUNDOFF = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}  # torch's settings of float32 products


class AgreementSearch:
    """The exact method, and what it has learned so far: which tokens each layer says often.

    What was learned decides how many rows are spared, never a result: make one for a run, and hand it to every
    call of `layer_statistics`. `savings` counts over all calls.
    """

    def __init__(self, parts: Anatomy) -> None:
        self.parts = parts
        self.savings = WorkSkipped(vocabulary=parts.vocabulary)
        device = parts.head.weight.device
        self._counts = torch.zeros(parts.depth, parts.vocabulary, dtype=torch.int32, device=device)
        self._calibrate = CALIBRATION_TOKENS  # tokens still to be looked at in full
        self._longest = _longest_row(parts.head.weight)
        self._pool_rows = POOL_ROWS.get(device.type, POOL_ROWS["else"])
        self._screen: Bf16Bound | None = None
        self._try_screen = worthwhile(parts.head.weight)  # with the first full pool

    @torch.no_grad()
    def agreement(
        self,
        residuals: Tensor,
        input_ids: Tensor,
        *,
        noise: float | Noise = 0.0,
        rounded_dtype: torch.dtype | None = None,
        heads: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
        model_logits_check: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"agrees", "near_tie"[, "agrees_rounded"]}: (layers + 1, rows), bool, of the final-norm lens.

        The parameters, the meaning of the names and the errors are those of `layer_statistics`.
        """
        run = _Search(self, residuals, noise, rounded_dtype, Lens(self.parts, "final-norm", heads))
        for start in range(0, residuals.shape[1], self._pool_rows):
            rows = slice(start, min(residuals.shape[1], start + self._pool_rows))
            check = None if model_logits_check is None else model_logits_check[rows]
            target = run.model_rows(rows, check)
            nearby = torch.cat([input_ids[rows].long(), target.argmax]).unique()
            settled = self._calibration(run, target, rows)
            for layer in range(self.parts.depth):
                run.search(layer, rows, target, self._candidates(layer, nearby), settled)
        run.flush()
        return run.found

    def _calibration(self, run: _Search, target: _Target, rows: slice) -> Tensor:
        """Full products for some of the first tokens. Returns (tokens,) bool: those that are settled."""
        tokens = rows.stop - rows.start
        settled = torch.zeros(tokens, dtype=torch.bool, device=target.argmax.device)
        count = min(self._calibrate, tokens)
        if count:
            self._calibrate -= count
            settled[torch.linspace(0, tokens - 1, count).long()] = True
            for layer in range(self.parts.depth):
                run.queue(layer, rows, run.states(layer, rows), target, settled)
            run.flush()
        return settled

    def _candidates(self, layer: int, nearby: Tensor) -> Tensor:
        frequent = self._counts[layer].topk(min(FREQUENT, self.parts.vocabulary))
        return torch.cat([frequent.indices[frequent.values > 0], nearby]).unique()

    def _learn(self, layers: Tensor, tokens: Tensor) -> None:
        """Count what layers said. layers, tokens: (rows,)."""
        places = layers * self.parts.vocabulary + tokens
        self._counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def _count(self, **more: int) -> None:
        self.savings = replace(
            self.savings, **{name: getattr(self.savings, name) + each for name, each in more.items()}
        )

    def _make_screen(self, states: Tensor, logits: Tensor, seconds: float, rounding: float) -> None:
        """Keep a screen if, on a whole pool of rows, it is right and worth it. seconds: of the product in float32."""
        self._try_screen = False
        screen = Bf16Bound.of(self.parts.head.weight, self._longest, rounding, len(states))
        screen.products(states)  # to warm up
        began = perf_counter()
        screen.products(states)
        fast = GAIN * (perf_counter() - began) < seconds
        if fast and all(map(screen.holds, states.float().split(16), logits.split(16))):
            self._screen = screen

    @staticmethod
    def peak_bytes(parts: Anatomy, rows: int) -> int:
        """Upper bound of the memory that `agreement` takes beside its arguments, the counts included, in bytes."""
        pool = POOL_ROWS.get(parts.device.type, POOL_ROWS["else"])
        tokens = min(pool, rows)
        candidates = min(parts.vocabulary, FREQUENT + 2 * tokens)
        logits = 4 * pool * parts.vocabulary
        counts = 8 * (parts.depth + 2) * parts.vocabulary
        search = 16 * tokens * candidates + 8 * (candidates + 6 * tokens) * parts.width
        pooled = 16 * (pool + tokens) * parts.width + 64 * (pool + tokens)
        results = 4 * (parts.depth + 1) * rows
        screen = bf16_bytes(parts.vocabulary, parts.width, pool) if worthwhile(parts.head.weight) else 0
        return logits + counts + search + 2 * pooled + results + head_scratch_bytes(parts, pool) + screen


@dataclass(frozen=True)
class _Target:
    """The model's own tokens, which witnesses must beat. (tokens,) each, and their head rows (tokens, width)."""

    argmax: Tensor
    rounded: Tensor
    rows: Tensor
    rounded_rows: Tensor


class _Search:
    """One call: its results, its buffer of logits, and its pool of rows that wait for the full product."""

    def __init__(
        self,
        owner: AgreementSearch,
        residuals: Tensor,
        noise: float | Noise,
        rounded_dtype: torch.dtype | None,
        lens: Lens,
    ) -> None:
        self.owner = owner
        self.parts = owner.parts
        self.residuals = residuals
        self.noise = Noise.of(noise)
        self.base = torch.tensor(self.noise.at(self.parts.depth), device=residuals.device)
        self.rounded_dtype = rounded_dtype
        self.lens = lens
        names = ("agrees", "near_tie", *(("agrees_rounded",) if rounded_dtype is not None else ()))
        shape, device = residuals.shape[:2], residuals.device
        self.found = {name: torch.zeros(shape, dtype=torch.bool, device=device) for name in names}
        self.waiting: list[tuple[Tensor, ...]] = []  # (states, layer, row, argmax, rounded argmax) of pooled rows
        self.unproven: list[tuple[Tensor, ...]] = []  # the same, of rows that the screen did not settle
        largest = min(owner._pool_rows, max(1, shape[0] * shape[1]))
        self.buffer = torch.empty(largest, self.parts.vocabulary, device=device)
        # of a float32 product of that length, relative to |x| |w| (Higham, Accuracy and Stability, section 3.1)
        steps = self.parts.width * UNIT_ROUNDOFF
        self.rounding = steps / (1 - steps) + 2 * INPUT_ROUNDOFF[torch.get_float32_matmul_precision()]

    def states(self, layer: int, rows: slice) -> Tensor:
        return self.lens.states(self.residuals[layer, rows], layer)

    def model_rows(self, rows: slice, check: Tensor | None) -> _Target:
        """The last layer, in full: it agrees with itself."""
        depth, weight = self.parts.depth, self.parts.head.weight
        states = self.states(depth, rows)
        logits = head_logits(self.parts, states, self.buffer[: len(states)])
        maxima = block_maxima(logits)
        values, ids = topk_lowest_id(logits, maxima, 2)
        if not values[:, 0].isfinite().all():
            raise not_finite("final-norm", self._first_broken(rows))
        if check is not None:
            check_model_row(self.parts, logits, check, self.noise.by_site[-1])
        self.found["agrees"][depth, rows] = True
        tolerance = self.noise.around(self.base[depth], values[:, 0])
        self.found["near_tie"][depth, rows] = values[:, 0] - values[:, 1] < tolerance
        argmax = rounded = ids[:, 0]
        if self.rounded_dtype is not None:
            self.found["agrees_rounded"][depth, rows] = True
            rounded = rounded_argmax(logits, maxima, self.rounded_dtype)
        self.owner._count(rows=self.residuals.shape[0] * len(states), full=len(states))
        return _Target(argmax, rounded, weight[argmax].float(), weight[rounded].float())

    def search(self, layer: int, rows: slice, target: _Target, candidates: Tensor, settled: Tensor) -> None:
        """Look for a witness in every row of a layer that is not settled; queue the rows that have none."""
        states = self.states(layer, rows)
        x = states.float()
        tried = x @ self.parts.head.weight[candidates].float().T
        own = (x * target.rows).sum(-1)
        tried.masked_fill_(candidates == target.argmax[:, None], -torch.inf)
        needed = self.noise.around(self.base[layer], own).expand_as(own)
        if self.rounded_dtype is not None:
            own = torch.maximum(own, (x * target.rounded_rows).sum(-1))
            tried.masked_fill_(candidates == target.rounded[:, None], -torch.inf)
        best, place = tried.max(-1)
        if self.rounded_dtype is not None:  # rounding may move each of the two by that much
            unit = torch.finfo(self.rounded_dtype).eps / 2
            needed = torch.maximum(needed, 1.01 * unit * (best.abs() + own.abs()))
        witnessed = best - own > needed + self.product_errors(x)
        self.owner._count(candidates=tried.numel())
        learned = candidates[place[witnessed & ~settled]]
        self.owner._learn(torch.full_like(learned, layer), learned)
        self.queue(layer, rows, states, target, ~witnessed & ~settled)

    def queue(self, layer: int, rows: slice, states: Tensor, target: _Target, chosen: Tensor) -> None:
        """Let the chosen rows wait for the full product. chosen: (tokens,) bool."""
        index = chosen.nonzero()[:, 0]
        if len(index):
            places = torch.full_like(index, layer), index + rows.start
            self.waiting.append((states[index], *places, target.argmax[index], target.rounded[index]))
        while _length(self.waiting) >= len(self.buffer):
            self._settle()

    def flush(self) -> None:
        while self.waiting:
            self._settle()
        while self.unproven:
            self._full(self._pooled(self.unproven))

    def product_errors(self, x: Tensor) -> Tensor:
        """(rows,): this product and the full one may be off by the rounding error, for either of two tokens."""
        return 4 * 1.01 * self.rounding * self.owner._longest * torch.linalg.vector_norm(x, dim=-1)

    def _pooled(self, entries: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Take as many waiting rows as the buffer holds."""
        size = len(self.buffer)
        columns = [torch.cat(column) for column in zip(*entries, strict=True)]
        entries[:] = [tuple(column[size:] for column in columns)] if len(columns[0]) > size else []
        return tuple(column[:size] for column in columns)

    def _settle(self) -> None:
        """A pool of waiting rows: those that the screen proves agree; the others have the full product."""
        pool = self._pooled(self.waiting)
        if self.rounded_dtype is not None or self.owner._try_screen or self.owner._screen is None:
            self._full(pool)
            return
        states, layers, rows, argmax, _ = pool
        x = states.float()
        own = (x * self.parts.head.weight[argmax]).sum(-1)
        needed = self.noise.around(self.base[layers], own) + self.product_errors(x)
        proven = self.owner._screen.leads(x, argmax, own, needed)
        self.found["agrees"][layers[proven], rows[proven]] = True
        self.owner._count(screened=int(proven.sum()))
        if not proven.all():
            self.unproven.append(tuple(column[~proven] for column in pool))
        while _length(self.unproven) >= len(self.buffer):
            self._full(self._pooled(self.unproven))

    def _full(self, pool: tuple[Tensor, ...]) -> None:
        """The full product of a pool of rows."""
        states, layers, rows, argmax, rounded = pool
        began = perf_counter()
        logits = head_logits(self.parts, states, self.buffer[: len(states)])
        if self.owner._try_screen and len(states) == len(self.buffer) and self.rounded_dtype is None:
            self.owner._make_screen(states, logits, perf_counter() - began, self.rounding)
        if self.rounded_dtype is not None:
            agrees_rounded = rounded_argmax(logits, block_maxima(logits), self.rounded_dtype) == rounded
            self.found["agrees_rounded"][layers, rows] = agrees_rounded
        own = logits.gather(-1, argmax[:, None])
        logits.scatter_(-1, argmax[:, None], -torch.inf)
        other, other_id = topk_lowest_id(logits, block_maxima(logits), 1)
        ahead = (own - other)[:, 0]
        finite = torch.maximum(own, other).isfinite()[:, 0]
        if not finite.all():
            raise not_finite("final-norm", int(layers[~finite].min()))
        agrees = (ahead > 0) | ((ahead == 0) & (argmax < other_id[:, 0]))  # equal logits: the lowest id wins
        self.found["agrees"][layers, rows] = agrees
        self.found["near_tie"][layers, rows] = ahead.abs() < self.noise.around(self.base[layers], own[:, 0])
        self.owner._learn(layers[~agrees], other_id[~agrees, 0])
        self.owner._count(full=len(states))

    def _first_broken(self, rows: slice) -> int:
        """The first layer whose states are not finite; the last one when all are."""
        broken = [layer for layer in self.parts.sites if not self.states(layer, rows).isfinite().all()]
        return broken[0] if broken else self.parts.depth


def _length(entries: list[tuple[Tensor, ...]]) -> int:
    return sum(len(entry[0]) for entry in entries)


def _longest_row(weight: Tensor) -> float:
    """Largest Euclidean norm of a row of the head, (vocabulary, width), in blocks."""
    return max(float(torch.linalg.vector_norm(block.float(), dim=-1).max()) for block in weight.split(4096))
