"""Every statistic of rows of logits in one Triton kernel: a row and its model's row are read twice.

One program reduces one row, tile by tile of the vocabulary. The first pass finds the leaders, the text's rank, KL, and
log-sum-exp and entropy by rescaling to the running maximum (Milakov and Gimelshein, arXiv 1805.02867). The second one
needs what the first found: the overlap, and the rank in the model's row. Of a large vocabulary it reads memory again:
the rows of all programs that run at once do not fit into the second-level cache.

Imported only where it is used: nothing else needs Triton. Without a GPU it runs in Triton's interpreter, when
TRITON_INTERPRET=1 was set before Triton was imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probekit.errors import InputError
from probekit.models.kernel_language import launched_on, round_to

BLOCK = 2048  # logits that a program holds at once
WARPS = 8
NUMBERS = (
    "margin",
    "log_probability",
    "probability",
    "entropy",
    "kl",
    "overlap",
    "accept_probability",
    "behind",
    "scale",
)
COUNTS = ("argmax", "argmax_rounded", "rank", "model_rank")
_ROUNDED = {None: None, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def row_statistics(
    logits: Tensor,
    model: Tensor,
    input_ids: Tensor,
    text_ids: Tensor,
    *,
    noise: float | Tensor = 0.0,
    rounding: float = 0.0,
    temperature: float | None = None,
    rounded_dtype: torch.dtype | None = None,
    block: int | None = None,
) -> dict[str, Tensor]:
    """The figures of `layer_statistics` in mode "all", by the same names, for rows of logits.

    Parameters
    ----------
    logits: (tokens, sites, vocabulary), float32 or a smaller float, the last dimension contiguous; left alone.
    model: (tokens, vocabulary), the model's own logits of each token; may be a view of `logits`.
    input_ids, text_ids: (tokens,), integers below the vocabulary: the token read, and the text's next one.
    noise: logits, (sites,) or one number; bounds `near_tie`, with rounding: relative to the contested logit.
    temperature: of the decoder that draws from the softmax of logits / temperature. With it, `overlap` is at that
        temperature and there is `accept_probability`; None: temperature 1.
    rounded_dtype: torch.bfloat16 or torch.float16; adds `argmax_rounded` and `agrees_rounded`.
    block: logits that a program holds at once, a power of 2.

    Returns {name: (tokens, sites)}, with `finite` (False: the row has NaN or +infinity, or nothing else than
    -infinity; its other figures mean nothing). A token at -infinity has probability 0 and adds 0 to the entropy;
    `kl` is infinite where only the row's is. Formulas as in `layer_statistics`; sums in float32, tile by tile.

    Raises InputError for shapes, dtypes and settings that do not fit.
    """
    _check(logits, model, input_ids, text_ids, temperature, rounded_dtype)
    tokens, sites, vocabulary = logits.shape
    rows = tokens * sites
    width = block or min(BLOCK, triton.next_power_of_2(vocabulary))
    own = torch.empty(2 if temperature is None else 3, tokens, device=logits.device)
    tops = torch.empty(2, tokens, dtype=torch.int32, device=logits.device)
    numbers = torch.empty(len(NUMBERS), rows, device=logits.device)
    counts = torch.empty(len(COUNTS), rows, dtype=torch.int32, device=logits.device)
    setting = {
        "vocabulary": vocabulary,
        "inverse": 1.0 if temperature is None else 1 / temperature,
        "WARM": temperature is not None,
        "ROUNDED": _ROUNDED[rounded_dtype],
        "BLOCK": width,
        "num_warps": WARPS,
    }
    with launched_on(logits):
        _model_rows[(tokens,)](model, model.stride(0), own, tops, tokens, **setting)
        _rows[(rows,)](
            logits, logits.stride(0), logits.stride(1), model, model.stride(0), own, tops, text_ids, numbers, counts,
            tokens, sites, **setting,
        )  # fmt: skip
    return _named(numbers, counts, tops, input_ids, (tokens, sites), noise, rounding, temperature, rounded_dtype)


def _named(
    numbers: Tensor,
    counts: Tensor,
    tops: Tensor,
    input_ids: Tensor,
    shape: tuple[int, int],
    noise: float | Tensor,
    rounding: float,
    temperature: float | None,
    rounded_dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """What the kernel left, by name, with the bits that follow from it."""
    found = dict(zip((*NUMBERS, *COUNTS), [*numbers.view(-1, *shape), *counts.view(-1, *shape)], strict=True))
    scale, behind = found.pop("scale"), found.pop("behind")  # largest + log-sum-exp; largest less the model's token's
    found["finite"] = scale.isfinite()
    found["agrees"] = found["argmax"] == tops[0, :, None]
    tolerance = noise
    if rounding:  # relative to the logit of the model's token
        tolerance = noise + rounding * (scale + found["probability"].log() - behind).abs()
    found["near_tie"] = torch.where(found["agrees"], found["margin"], behind) < tolerance
    found["echo"] = found["argmax"] == input_ids[:, None]
    if temperature is None:
        del found["accept_probability"]
    if rounded_dtype is None:
        del found["argmax_rounded"]
    else:
        found["agrees_rounded"] = found["argmax_rounded"] == tops[1, :, None]
    return found


def _check(
    logits: Tensor,
    model: Tensor,
    input_ids: Tensor,
    text_ids: Tensor,
    temperature: float | None,
    rounded_dtype: torch.dtype | None,
) -> None:
    if logits.dim() != 3 or not logits.numel() or not logits.is_floating_point() or logits.dtype == torch.float64:
        raise InputError(
            f"the logits are {tuple(logits.shape)} of {logits.dtype}; expected (tokens, sites, vocabulary), float32 "
            "or smaller, with at least one row."
        )
    tokens, _, vocabulary = logits.shape
    if model.shape != (tokens, vocabulary) or logits.stride(2) != 1 or model.stride(1) != 1:
        raise InputError(
            f"the model's logits are {tuple(model.shape)}; expected ({tokens}, {vocabulary}), and both contiguous "
            "along the vocabulary."
        )
    if input_ids.shape != (tokens,) or text_ids.shape != (tokens,):
        raise InputError(f"ids must have shape ({tokens},), not {tuple(input_ids.shape)} and {tuple(text_ids.shape)}.")
    if temperature is not None and not temperature > 0:
        raise InputError(f"the temperature must exceed 0, not {temperature}.", "None is for greedy decoding.")
    if rounded_dtype not in _ROUNDED:
        raise InputError(f"logits are rounded to torch.bfloat16 or torch.float16, not {rounded_dtype}.")


# mypy: disable-error-code="no-untyped-def"
# Triton would read annotations as its own types.
@triton.jit
def _model_rows(
    model, stride, own, tops, tokens, vocabulary, inverse,
    WARM: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The model's row of each token by itself. own: largest, log-sum-exp (, tempered); tops: argmax, rounded."""
    token = tl.program_id(0)
    row = model + token.to(tl.int64) * stride
    largest, _, total, warm_total, argmax, rounded, _, _, _ = _scan(
        row, row, 0.0, 0.0, 0.0, 0, vocabulary, inverse, WARM, ROUNDED, False, BLOCK
    )
    tl.store(own + token, largest)
    tl.store(own + tokens + token, tl.log(total))
    if WARM:
        tl.store(own + 2 * tokens + token, tl.log(warm_total))
    tl.store(tops + token, argmax)
    tl.store(tops + tokens + token, rounded)


@triton.jit
def _rows(
    logits, token_stride, site_stride, model, model_stride, own, tops, text_ids, numbers, counts,
    tokens, sites, vocabulary, inverse,
    WARM: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: numbers (NUMBERS, rows) and counts (COUNTS, rows), with q the row's softmax and p the model's."""
    program = tl.program_id(0)
    rows = tl.num_programs(0)
    token = program // sites
    row = logits + token.to(tl.int64) * token_stride + (program % sites).to(tl.int64) * site_stride
    model_row = model + token.to(tl.int64) * model_stride

    model_largest = tl.load(own + token)
    model_log_sum = tl.load(own + tokens + token)
    model_warm_log_sum = tl.load(own + 2 * tokens + token) if WARM else 0.0
    text = tl.load(text_ids + token).to(tl.int32)
    text_logit = tl.load(row + text).to(tl.float32)
    text_in_model = tl.load(model_row + text).to(tl.float32)
    largest, second, total, warm_total, argmax, rounded, weighted, rank, apart = _scan(
        row, model_row, model_largest, model_log_sum, text_logit, text, vocabulary, inverse, WARM, ROUNDED, True, BLOCK
    )
    log_sum = tl.log(total)
    warm_log_sum = tl.log(warm_total) if WARM else log_sum
    top_in_model = tl.load(model_row + argmax).to(tl.float32)
    models_logit = tl.load(row + tl.load(tops + token)).to(tl.float32)

    overlap = tl.zeros([BLOCK], tl.float32)
    model_rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = _read(row, at, vocabulary)
        y = _read(model_row, at, vocabulary)
        model_rank += ((y > top_in_model) | ((y == top_in_model) & (at < argmax))).to(tl.int32)
        if WARM:
            q = tl.exp((x - largest) * inverse - warm_log_sum)
            p = tl.exp((y - model_largest) * inverse - model_warm_log_sum)
        else:
            q = tl.exp(x - largest - log_sum)
            p = tl.exp(y - model_largest - model_log_sum)
        overlap += tl.minimum(q, p)

    out = numbers + program
    tl.store(out, largest - second)
    tl.store(out + rows, text_logit - largest - log_sum)
    tl.store(out + 2 * rows, tl.exp(-log_sum))
    tl.store(out + 3 * rows, log_sum - weighted / total)
    kl = apart + (largest - model_largest) + (log_sum - model_log_sum)
    tl.store(out + 4 * rows, tl.maximum(kl, 0.0))
    tl.store(out + 5 * rows, tl.sum(overlap, 0))
    if WARM:
        log_q = (text_logit - largest) * inverse - warm_log_sum
        log_p = (text_in_model - model_largest) * inverse - model_warm_log_sum
        chance = tl.exp(tl.minimum(log_q - log_p, 0.0))
        tl.store(out + 6 * rows, tl.where(text_logit == -float("inf"), 0.0, chance))
    tl.store(out + 7 * rows, largest - models_logit)
    tl.store(out + 8 * rows, largest + log_sum)
    tl.store(counts + program, argmax)
    tl.store(counts + rows + program, rounded)
    tl.store(counts + 2 * rows + program, rank)
    tl.store(counts + 3 * rows + program, tl.sum(model_rank, 0))


@triton.jit
def _scan(
    row, model_row, model_largest, model_log_sum, text_logit, text, vocabulary, inverse,
    WARM: tl.constexpr, ROUNDED: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row in one pass: largest, second largest, sum of exp above the largest (and at the temperature), argmax, argmax
    after rounding; and of a PAIR: the sum of exp times its exponent, the text's rank, the sum of p (model's - row's).

    Of equal logits the lowest id is the argmax. A tile is summed before the sums so far are rescaled to its maximum."""
    lanes = tl.arange(0, BLOCK)
    lowest = tl.full([BLOCK], -float("inf"), tl.float32)
    first, second, first_id = lowest, lowest, lanes
    rounded_first, rounded_id = lowest, lanes
    top = -float("inf")
    total, warm_total, weighted, apart = 0.0, 0.0, 0.0, 0.0
    rank = 0
    for start in range(0, vocabulary, BLOCK):
        at = start + lanes
        x = _read(row, at, vocabulary)
        larger = tl.maximum(top, tl.max(x, 0))
        base = tl.where(larger == -float("inf"), 0.0, larger)  # nothing but holes so far
        before, above = tl.exp(top - base), x - base
        e = tl.exp(above)
        if PAIR:
            moved = tl.where(total > 0, (top - base) * total, 0.0)
            weighted = (weighted + moved) * before + tl.sum(tl.where(e > 0, e * above, 0.0), 0)
            y = _read(model_row, at, vocabulary)
            p = tl.exp(y - model_largest - model_log_sum)
            apart += tl.sum(tl.where(p > 0, p * (y - x), 0.0), 0)
            rank += tl.sum(((x > text_logit) | ((x == text_logit) & (at < text))).to(tl.int32), 0)
        total = total * before + tl.sum(e, 0)
        if WARM:
            warm_total = warm_total * tl.exp((top - base) * inverse) + tl.sum(tl.exp(above * inverse), 0)
        top = larger
        leads = x > first  # an equal logit comes later, so it is the second
        second = tl.where(leads, first, tl.maximum(second, x))
        first_id = tl.where(leads, at, first_id)
        first = tl.maximum(first, x)
        if ROUNDED is not None:
            x = round_to(x, ROUNDED)
            rounded_id = tl.where(x > rounded_first, at, rounded_id)
            rounded_first = tl.maximum(rounded_first, x)

    largest, argmax = _leader(first, first_id)
    runner_up = tl.max(tl.where(lanes == argmax % BLOCK, second, first), 0)
    rounded = argmax
    if ROUNDED is not None:
        _, rounded = _leader(rounded_first, rounded_id)
    return largest, runner_up, total, warm_total, argmax, rounded, weighted, rank, apart


@triton.jit
def _leader(values, ids):
    """The largest value over all lanes, and the lowest id that has it. In each lane the id is its lowest already."""
    largest = tl.max(values, 0)
    return largest, tl.min(tl.where(values == largest, ids, 2147483647), 0)


@triton.jit
def _read(row, at, vocabulary):
    """A block of a row in float32; -infinity past the end."""
    return tl.load(row + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
