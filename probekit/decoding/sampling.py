"""Temperature, top-k, top-p, and the accept/reject rule: pure functions of logits and of counted random numbers.

Randomness is counted, not drawn from a state: each number is a hash of (seed, prompt, output index, purpose, token).
So a prompt gets the same numbers alone and in any batch, rows need no generators of their own, and nothing waits for
the host. An output index may be drafted in several rounds and then sees the same numbers again. That is exact: a draft
is tried again only when an earlier position was rejected, which does not depend on the numbers of later positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probekit.settings import Sampling


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities that tokens are drawn from.

    Temperature, then top-k, then top-p, each as transformers' warper of that name does it (ties at the k-th logit
    are kept). Temperature 0 gives the limit: 0 at the argmax, minus infinity elsewhere.

    logits: (..., vocabulary), any float dtype. Returns (..., vocabulary), float32.
    """
    logits = logits.float()
    if sampling.greedy:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter_(-1, best, 0.0)
    if sampling.temperature != 1:
        # shifted first, so that a temperature near 0 cannot overflow
        logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    vocabulary = logits.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)
    return logits.log_softmax(-1)


def streams(seed: int, prompts: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The random stream of each prompt, (prompts,), int64. A prompt is named by its index, wherever it runs."""
    base = _mix(torch.tensor([_signed(seed)], device=device))
    return _mix(base + _GAMMA * (1 + torch.tensor(list(prompts), dtype=torch.int64, device=device)))


PURPOSES = FINAL, DRAFT, ACCEPT = range(3)
"""FINAL draws the token that is kept (first, bonus or corrected); DRAFT a draft; ACCEPT decides about a draft."""


def keys(stream: Tensor, outputs: Tensor, purpose: int) -> Tensor:
    """One key for each output index. stream and outputs broadcast, int64; so does the result."""
    return _mix(stream + _GAMMA * (len(PURPOSES) * outputs + purpose + 1))


def uniform(key: Tensor) -> Tensor:
    """One number in (0, 1] for each key, float32, the shape of `key`."""
    return (_shift(_mix(key + _GAMMA), 11) + 0.5) * 2.0**-53


def draw(probabilities: Tensor, key: Tensor) -> Tensor:
    """Draw a token from each row: argmax of p / exponential noise, which needs no sum and no host.

    probabilities: (..., vocabulary), float32, >= 0 and not all 0; they need not sum to 1.
    key: (...). Returns (...), int64.
    """
    counts = torch.arange(1, probabilities.shape[-1] + 1, device=key.device)
    bits = _shift(_mix(key[..., None] + _GAMMA * counts), 11)
    # log1p(-u) keeps small noise, which decides for rare tokens, at full relative precision;
    # u may round to 1, whose noise would be infinite
    noise = torch.log1p(-(bits.float() + 0.5) * 2.0**-53).neg_().clamp_(max=40.0)
    return (probabilities / noise).argmax(-1)


def scatter(probabilities: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    """Probabilities of the tokens `ids`, (rows, F), as a distribution over the whole vocabulary, 0 elsewhere."""
    whole = probabilities.new_zeros(probabilities.shape[0], vocabulary)
    whole[:, ids] = probabilities
    return whole


@dataclass(frozen=True)
class Verdict:
    """What verification decides for each row of a batch.

    run: (rows,) how many drafts were accepted. token: (rows,) the token after them: the model's own choice after a
    rejection, or after a whole draft.
    """

    run: Tensor
    token: Tensor


class Sampler:
    """How tokens are chosen and drafts judged: greedy by argmax, else by the rule of speculative sampling.

    A draft x from q is accepted with probability min(1, p(x) / q(x)); after a rejection the token is drawn from
    max(p - q, 0), normalised (Leviathan et al., arXiv 2211.17192, section 2.3). Then tokens are distributed as p.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def choose(self, logits: Tensor, stream: Tensor | None, outputs: Tensor | None) -> Tensor:
        """The token at each row's output index. logits: (rows, vocabulary); the rest (rows,), None when greedy."""
        if self.sampling.greedy or stream is None or outputs is None:
            return logits.argmax(-1)
        return draw(warp(logits, self.sampling).exp(), keys(stream, outputs, FINAL))

    def draft(
        self, logits: Tensor, stream: Tensor | None, outputs: Tensor | None, confidence: str | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """A draft for each row, the distribution that it was drawn from (None when greedy), and its confidence.

        confidence: which to give of the draft, (rows,), one of `drafting.policies.CONFIDENCES`: its "probability", or
        the "entropy" of its distribution, for greedy drafts at temperature 1; or the "margin" of the two top logits.
        """
        if self.sampling.greedy or stream is None or outputs is None:
            token = logits.argmax(-1)
            return token, None, None if confidence is None else _confidence(confidence, logits, token)
        log_q = warp(logits, self.sampling)
        probabilities = log_q.exp()
        token = draw(probabilities, keys(stream, outputs, DRAFT))
        return token, probabilities, None if confidence is None else _confidence(confidence, log_q, token)

    def verify(
        self,
        drafts: Tensor,
        drafted_from: Tensor | None,
        limits: Tensor | None,
        logits: Tensor,
        stream: Tensor | None,
        outputs: Tensor | None,
    ) -> Verdict:
        """Judge a round.

        drafts: (rows, k) tokens; drafted_from: (rows, k, vocabulary) their q, none when greedy; limits: (rows,) how
        many of the k count in each row, None: all; logits: (rows, k + 1, vocabulary) of the model; stream, outputs:
        (rows,) random streams and the output index of the first draft, None when greedy.
        """
        if self.sampling.greedy or stream is None or outputs is None:
            return judged(drafts, limits, logits.argmax(-1))

        length = drafts.shape[1]
        steps = torch.arange(length, device=drafts.device)
        p = warp(logits, self.sampling).exp()
        q = p[:, :0] if drafted_from is None else drafted_from
        u = uniform(keys(stream[:, None], outputs[:, None] + steps, ACCEPT))
        run = _run(u * _probability(q, drafts) < _probability(p[:, :length], drafts), steps, limits)
        target = p.gather(1, _row(run, p))[:, 0]
        if length:
            missed = q.gather(1, _row(run.clamp(max=length - 1), q))[:, 0]
            rejected = run < (length if limits is None else limits)
            target = torch.where(rejected[:, None], residual(target, missed), target)
        return Verdict(run, draw(target, keys(stream, outputs + run, FINAL)))


def judged(drafts: Tensor, limits: Tensor | None, chosen: Tensor) -> Verdict:
    """Judge a greedy round. drafts: (rows, k); limits: (rows,), None: all; chosen: (rows, k + 1), the model's own."""
    length = drafts.shape[1]
    run = _run(drafts == chosen[:, :length], torch.arange(length, device=drafts.device), limits)
    return Verdict(run, chosen.gather(1, run[:, None])[:, 0])


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What a rejection leaves to draw from: max(p - q, 0), not normalised. p, q: (rows, vocabulary).

    Where p and q are equal but for rounding nothing is left, and p is the limit.
    """
    rest = (p - q).clamp_(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def _confidence(which: str, logits: Tensor, token: Tensor) -> Tensor:
    """logits: (rows, vocabulary); token: (rows,) the drafts. Returns (rows,)."""
    if which == "margin":
        first, second = logits.float().topk(2, dim=-1).values.unbind(-1)
        return first - second
    log_q = logits.float().log_softmax(-1)
    if which == "entropy":
        return -(log_q.exp() * log_q.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
    return _probability(log_q.exp(), token)


def _run(accepted: Tensor, steps: Tensor, limits: Tensor | None) -> Tensor:
    """Length of the run of acceptances from the first draft, at most `limits`. accepted: (rows, k)."""
    if limits is not None:
        accepted = accepted & (steps < limits[:, None])
    return accepted.cumprod(1).sum(1)


def _probability(probabilities: Tensor, token: Tensor) -> Tensor:
    """probabilities: (..., vocabulary); token: (...). Returns (...)."""
    return probabilities.gather(-1, token[..., None])[..., 0]


def _row(index: Tensor, like: Tensor) -> Tensor:
    """Index for `gather` along dimension 1 that picks row `index` of (rows, k, vocabulary)."""
    return index[:, None, None].expand(-1, 1, like.shape[-1])


def _signed(number: int) -> int:
    """The low 64 bits of a number as a signed integer, the only kind that tensors multiply everywhere."""
    return (number + 2**63) % 2**64 - 2**63


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX = (30, _signed(0xBF58476D1CE4E5B9), 27, _signed(0x94D049BB133111EB), 31)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014), elementwise on int64."""
    first, multiply, second, again, last = _MIX
    bits = (bits ^ _shift(bits, first)) * multiply
    bits = (bits ^ _shift(bits, second)) * again
    return bits ^ _shift(bits, last)


def _shift(bits: Tensor, places: int) -> Tensor:
    """Shift right, filling with zeros: torch's own shift of int64 repeats the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)
