"""The decoding of a validation: every method takes its turn at every prompt, beside autoregressive decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from probekit.decoding.decoder import Decoder
from probekit.decoding.results import Decoded
from probekit.progress import Progress, usual_progress
from probekit.settings import Sampling
from probekit.traces.trace import Trace
from probekit.validation.kept_texts import KeptTexts, Turn

WARM_UP_TOKENS = 8
PLAIN = "autoregressive"
Runs = list[list[Decoded]]
"""What one method decoded: [prompt][repeat]."""


def decode_all(
    trace: Trace,
    plainly: Decoder,
    methods: Mapping[str, Decoder],
    repeats: int,
    kept: KeptTexts,
    progress: Progress | None,
    *,
    whole: bool = False,
) -> dict[str, tuple[Runs, Runs]]:
    """Decode every prompt with every method, `repeats` times, in turns with autoregressive decoding.

    {name of a method: (what autoregressive decoding did, what the method did)}. What is kept is not decoded again.

    whole: decode every prompt whole beforehand, so that nothing has to be recorded while the clock runs.
    """
    manifest = trace.manifest
    setting = {"temperature": manifest.settings.decoding["temperature"], "top_p": manifest.settings.decoding["top_p"]}
    prompts = {prompt: trace.prompt_ids(prompt).tolist() for prompt in trace.prompts}
    budget = manifest.settings.max_new_tokens
    greedy, top_k = manifest.settings.text == "greedy", int(manifest.settings.decoding["top_k"])
    done, total, report = 0, repeats * len(prompts) * (len(methods) + 1), usual_progress(progress)
    turns = {
        (repeat, prompt): [name for name in methods if (name, prompt, repeat) not in kept.turns]
        for repeat in range(repeats)
        for prompt in prompts
    }
    rest = {name: methods[name] for names in turns.values() for name in names}
    decoders = [plainly, *rest.values()] if rest else []
    for method in decoders:  # the first passes of a process are slow
        method.decode([prompts[trace.prompts[0]]], max_new_tokens=min(budget, WARM_UP_TOKENS))
    warm_up = Sampling(**setting, top_k=top_k, seed=manifest.settings.seed)
    for ids in prompts.values() if whole else []:
        for method in reversed(decoders):  # the longest drafts first: their buffers serve the others
            method.decode([ids], max_new_tokens=budget, sampling=warm_up)
    for place, ((repeat, prompt), names) in enumerate(turns.items()):
        # other random numbers than the trace's, and others each time: the decoder's texts are its own
        seed = manifest.settings.seed if greedy else manifest.settings.seed + 1 + repeat
        sampling = Sampling(**setting, top_k=top_k, seed=seed)
        done += len(methods) + 1 - (len(names) + 1 if names else 0)
        found: dict[str, Decoded] = {}
        these = {PLAIN: plainly, **{name: methods[name] for name in names}} if names else {}
        for turn in range(len(these)):
            which = list(these)[(turn + place % len(prompts) + repeat) % len(these)]
            [found[which]] = these[which].decode(
                [prompts[prompt]], max_new_tokens=budget, sampling=sampling, indices=[prompt]
            )
            done += 1
            report("validate", done, total)
        if found:
            kept.add(prompt, repeat, found.pop(PLAIN), found)
    return {
        name: _sides([[kept.turns[name, prompt, repeat] for repeat in range(repeats)] for prompt in prompts])
        for name in methods
    }


def _sides(turns: Sequence[Sequence[Turn]]) -> tuple[Runs, Runs]:
    """The two sides of what was decoded in turns, each [prompt][repeat]."""
    plain, own = ([[turn[side] for turn in repeats] for repeats in turns] for side in (0, 1))
    return plain, own
