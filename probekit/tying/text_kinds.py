"""What kind of text: the model's own or given, kinds of prompts, places in the text, kinds of tokens, and loops.

The figure is always the acceptance of one draft: the share of generated positions at which a draft of the layer would
be accepted, if it was made. On greedy text that is agreement; on other text the mean of w = min(1, q / p). Needs no
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from probekit.prediction.intervals import SHARE, Share
from probekit.prediction.predict import predict
from probekit.prediction.rounds import CUT
from probekit.traces.token_text import LOOP_TOKENS
from probekit.traces.trace import Trace

TOKEN_KINDS = ("word start", "word inside", "digit", "punctuation", "white space", "end of text")
PLACES = (0, 8, 16, 32, 64)
"""Where the bands of output positions begin."""


# ----------------------------------------------------------------------------------------------------- loops
def loop_start(tokens: Sequence[int], length: int = LOOP_TOKENS) -> int:
    """Output index at which the first repeated run of `length` tokens begins; the text's length without one.

    Repeated as in `tracing.traces.looped`: the same run began earlier in the same text.
    """
    seen: set[tuple[int, ...]] = set()
    for start in range(len(tokens) - length + 1):
        run = tuple(tokens[start : start + length])
        if run in seen:
            return start
        seen.add(run)
    return len(tokens)


def before_loops(trace: Trace) -> Trace:
    """The same texts, each cut where its first loop begins: what was said before is the model's text all the same.

    Rounds of a text that was cut are those of a decoder whose budget ended there. Shorter texts hold more rounds that
    the budget cuts short, so of the rounds' figures the acceptance rate and alpha compare better than tokens per round.
    """
    cut = {prompt: loop_start(trace.outputs(prompt).tolist()) for prompt in trace.prompts}
    texts = trace.texts.copy()
    ends = texts["prompt"].map(cut)
    texts.loc[ends < texts["new_tokens"], "ended"] = CUT
    texts["new_tokens"], texts["looped"] = ends, 0.0

    def kept(frame: pd.DataFrame) -> pd.DataFrame:
        return frame[frame["output"] < frame["prompt"].map(cut)]

    wanted = set(trace.prompts)
    batches = [tuple(prompt for prompt in batch if prompt in wanted) for batch in trace.manifest.plan.batches]
    return Trace.from_frames(
        trace.manifest.but(batches=tuple(batch for batch in batches if batch)),
        texts,
        kept(trace.tokens),
        kept(trace.layers),
        drafter=None if trace.drafter is None else kept(trace.drafter),
        top=None if trace.top is None else kept(trace.top),
        residuals={layer: trace.whole_residuals(layer) for layer in trace.manifest.settings.keep_residuals},
    )


# ------------------------------------------------------------------------------------------ kinds of tokens
def token_kind(text: str, before: str) -> str:
    """One of TOKEN_KINDS (but the end of a text) for a token, as `tracing.traces.visible` shows it.

    before: the token before it, "" for none. A token that begins with a letter is inside a word when it has no
    white space of its own and the token before it ends in a letter; else it starts one.
    """
    body = text.lstrip("␣⏎⇥␍")
    if not body:
        return "white space"
    if body[0].isdigit():
        return "digit"
    if not body[0].isalpha():
        return "punctuation"
    return "word inside" if body == text and before[-1:].isalpha() else "word start"


def token_kinds(trace: Trace) -> dict[int, np.ndarray]:
    """{prompt: (N,) kinds of its generated tokens}."""
    ends = set(trace.manifest.model.eos_ids)
    kinds = {}
    for prompt, rows in trace.tokens.sort_values(["prompt", "position"]).groupby("prompt"):
        texts = rows["text"].astype(str).tolist()
        named = [token_kind(text, before) for text, before in zip(texts, ["", *texts[:-1]], strict=True)]
        named = ["end of text" if token in ends else kind for token, kind in zip(rows["text_id"], named, strict=True)]
        kinds[int(prompt)] = np.array(named)[rows["output"].to_numpy() >= 0]  # type: ignore[arg-type]
    return kinds


# ---------------------------------------------------------------------------------------- acceptance by kind
def accepted_if_drafted(trace: Trace, prompt: int) -> np.ndarray:
    """(L+1, N): 1 or 0 on greedy text, w elsewhere."""
    if trace.manifest.settings.text == "greedy":
        return trace.agreement(prompt)
    return trace.accept_probability(prompt)


def acceptance_where(trace: Trace, marked: Mapping[int, np.ndarray] | None = None) -> Share:
    """(L+1,): acceptance of one draft over the positions marked for each prompt, (N,) bool; over all without marks."""
    above, below = [], []
    for prompt in trace.prompts:
        accepted = accepted_if_drafted(trace, prompt)
        if marked is not None:
            accepted = accepted[:, marked[prompt]]
        above.append(accepted.sum(axis=1, dtype=np.float64))
        below.append(np.full(len(accepted), accepted.shape[1], dtype=np.float64))
    return Share(np.stack(above, axis=-1), np.stack(below, axis=-1), tuple(trace.prompts), SHARE)


def positions_by_kind(trace: Trace) -> dict[tuple[str, str], dict[int, np.ndarray]]:
    """{(by, group): {prompt: (N,) bool}}: the generated positions of each group; every `by` parts all of them."""
    tokens = {int(prompt): int(n) for prompt, n in zip(trace.texts["prompt"], trace.texts["new_tokens"], strict=True)}
    prompt_kind = dict(zip(trace.texts["prompt"], trace.texts["kind"].astype(str), strict=True))
    kinds = token_kinds(trace)
    marks = {("all", "all"): {prompt: np.ones(n, dtype=bool) for prompt, n in tokens.items()}}
    for kind in sorted(set(prompt_kind.values()) - {""}):
        marks["kind of prompt", kind] = {
            prompt: np.full(n, prompt_kind[prompt] == kind) for prompt, n in tokens.items()
        }
    for start, end in zip(PLACES, (*PLACES[1:], None), strict=True):
        name = f"{start} and on" if end is None else f"{start}-{end - 1}"
        places = slice(start, end)
        marks["place in the text", name] = {prompt: _within(n, places) for prompt, n in tokens.items()}
    for kind in TOKEN_KINDS:
        marks["kind of token", kind] = {prompt: kinds[prompt] == kind for prompt in tokens}
    return {key: marked for key, marked in marks.items() if any(mask.any() for mask in marked.values())}


def _within(tokens: int, places: slice) -> np.ndarray:
    mask = np.zeros(tokens, dtype=bool)
    mask[places] = True
    return mask


def acceptance_by_kind(trace: Trace, layers: Iterable[int] | None = None) -> pd.DataFrame:
    """Acceptance of one draft at each layer, apart by kind.

    One row for each layer and group: model, text, by ("all", "kind of prompt", "place in the text", "kind of token"),
    group, layer, positions, acceptance, low, high.
    """
    wanted = list(range(trace.depth + 1)) if layers is None else list(layers)
    parts = []
    for (by, group), marked in positions_by_kind(trace).items():
        share = acceptance_where(trace, marked).at(wanted)
        low, high = share.interval()
        named = {"model": trace.manifest.model.name, "text": trace.manifest.settings.text, "by": by, "group": group}
        figures = {"positions": share.denominators.sum(axis=1).astype(int), "acceptance": share.values}
        parts.append(pd.DataFrame({**named, "layer": wanted, **figures, "low": low, "high": high}))
    return pd.concat(parts, ignore_index=True)


def side_by_side(
    traces: Mapping[str, Trace], exit_layers: Iterable[int] | None = None, draft_lengths: Iterable[int] = (4,)
) -> pd.DataFrame:
    """Acceptance of the same cells on several texts of one model, with and without loops.

    traces: {name of the text: trace}. One row for each text, loops ("with", "without") and cell: acceptance of one
    draft at the layer with its interval, then rounds' figures as `predict` has them.
    """
    exits = None if exit_layers is None else list(exit_layers)
    lengths = list(draft_lengths)
    rows = []
    for name, trace in traces.items():
        for loops, chosen in (("with", trace), ("without", before_loops(trace))):
            share = acceptance_where(chosen)
            low, high = share.interval()
            looped = looped_tokens(chosen)
            few, many = looped.interval()
            for cell in predict(chosen, exits, lengths, drafter=False).cells:
                rate, per_round = cell.acceptance_rate_interval, cell.tokens_per_round_interval
                rows.append(
                    {
                        "model": trace.manifest.model.name,
                        "text": name,
                        "loops": loops,
                        "looped": float(looped.values),
                        "looped_low": float(few),
                        "looped_high": float(many),
                        "tokens": int(chosen.texts["new_tokens"].sum()),
                        "exit_layer": cell.exit_layer,
                        "draft_length": cell.draft_length,
                        "acceptance": share.values[cell.exit_layer],
                        "acceptance_low": low[cell.exit_layer],
                        "acceptance_high": high[cell.exit_layer],
                        "acceptance_rate": cell.acceptance_rate,
                        "acceptance_rate_low": rate[0] if rate else np.nan,
                        "acceptance_rate_high": rate[1] if rate else np.nan,
                        "alpha": cell.alpha,
                        "tokens_per_round": cell.tokens_per_round,
                        "tokens_per_round_low": per_round[0] if per_round else np.nan,
                        "tokens_per_round_high": per_round[1] if per_round else np.nan,
                    }
                )
    return pd.DataFrame(rows)


def looped_tokens(trace: Trace) -> Share:
    """Generated tokens inside a repeated run: the share of them over all texts, (); it can be drawn again."""
    tokens = trace.texts["new_tokens"].to_numpy(np.float64)
    return Share(trace.texts["looped"].to_numpy(np.float64) * tokens, tokens, tuple(trace.texts["prompt"]), SHARE)


def looped_share(trace: Trace) -> float:
    """Share of generated tokens inside a repeated run, over all texts."""
    return float(looped_tokens(trace).values)
