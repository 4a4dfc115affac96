"""A trace after all checks that need no forward pass: models, prompts as token ids, and the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import probekit
from probekit.decoding.sampling import warp
from probekit.drafting.keys import check_draft_model
from probekit.errors import InputError
from probekit.foreign.special_tokens import begins_twice, remark_on_bos
from probekit.lens.exit_heads import ExitHead, check_heads, fingerprint, load_heads, unpack_heads
from probekit.lens.lens import KINDS
from probekit.models import families
from probekit.models.anatomy import check_unchanged
from probekit.models.loaded import Loaded, as_loaded, batch_invariant, load, unchanged
from probekit.models.memory import free_bytes
from probekit.settings import Sampling, TraceSettings
from probekit.traces.draft_vocabulary import DraftVocabulary
from probekit.traces.manifest import AdapterRecord, ExitHeadsRecord, Manifest, ModelRecord
from probekit.traces.trace import Trace
from probekit.tracing.backends import check_backend
from probekit.tracing.prompt_store import PromptStore
from probekit.tracing.prompts import Encoded, Prompt, bundled_prompts_for, chat_template, each_prompt, encode

# A batch of the plan: at most so many rows, and so many bytes of residuals, and so many prompts.
MOST_ROWS = 4096
MOST_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
MOST_PROMPTS = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True, eq=False)
class TracePlan:
    """A trace after all checks that need no forward pass.

    heads: {exit: head} of the final-norm lens. encoded: each prompt's ids, by its index. sampling: of the text.
    written: whether the texts come with the prompts: given, or out of a log of the model's own, which is checked.
    warp: logits -> log-probabilities of the decoder; None for greedy text. manifest: the run's settings and its
        batches; `segment_rows` is the row budget.
    """

    loaded: Loaded
    drafter: Loaded | None
    heads: Mapping[int, ExitHead] | None
    encoded: PromptStore
    sampling: Sampling
    warp: Callable[[Tensor], Tensor] | None
    manifest: Manifest
    written: bool = False
    logged: bool = False


def plan_trace(
    loaded: Loaded,
    prompts: Iterable[Prompt | str | Sequence[int] | Mapping[str, Any]] | None,
    settings: TraceSettings,
    *,
    draft_model: Loaded | str | Path | None = None,
    draft_vocabulary: DraftVocabulary | Trace | str | Path | Iterable[int] | None = None,
    exit_heads: Mapping[int, ExitHead] | str | Path | None = None,
) -> TracePlan:
    """Check everything, encode the prompts, and lay out the batches. Raises InputError."""
    unchanged(loaded)
    if settings.batch_invariant or loaded.anatomy.batch_invariant:
        loaded, settings = batch_invariant(loaded), replace(settings, batch_invariant=True)
    check_backend(settings.backend)
    for reader in (loaded, draft_model):
        if isinstance(reader, Loaded) and check_unchanged(reader.anatomy).family.decodes:
            reader.anatomy.family.kinds(reader.anatomy.config)  # raises for a window that no cache keeps to
    given, sampling, max_new_tokens = settings.written, settings.sampling, settings.max_new_tokens
    if settings.batch_invariant:
        families.check_decodes(loaded.anatomy.family, loaded.name)
    if settings.batch_invariant and draft_vocabulary is not None:
        raise InputError(
            "draft heads with fewer rows are not read batch-invariantly.", "Leave the draft vocabulary out."
        )
    if draft_vocabulary is not None and settings.text != "greedy":
        raise InputError(
            "draft heads with fewer rows are predicted for greedy text only.", "Leave the draft vocabulary out."
        )
    order = _draft_vocabulary(draft_vocabulary, loaded)
    heads, heads_record = _exit_heads(exit_heads, loaded)
    kept = settings.keep_residuals
    wanted = loaded.anatomy.sites if kept.layers is None else kept.layers
    sites = tuple(sorted({loaded.anatomy.check_site(site) for site in wanted}))
    drafter = draft_model if draft_model is None or isinstance(draft_model, Loaded) else _load_like(draft_model, loaded)
    chosen = bundled_prompts_for(loaded.name) if prompts is None else prompts
    encoded, twice = _encoded(each_prompt(chosen, chat=settings.chat, given=given), loaded, drafter, settings)
    if drafter is not None:
        check_draft_model(loaded, drafter)
        drafter = batch_invariant(drafter) if settings.batch_invariant else drafter

    sizes = encoded.sizes
    budget = max(tokens - context for tokens, context in sizes.values()) if given else max_new_tokens
    rows = {index: tokens + (0 if given else max_new_tokens) - 1 for index, (tokens, _) in sizes.items()}
    row_budget = _row_budget(loaded)
    libraries = ("torch", "transformers", "numpy", *(["nnsight"] if settings.backend.startswith("nnsight") else []))
    if find_spec(libraries[-1]) is None:
        raise InputError(f"{libraries[-1]} is not installed.", f"pip install {libraries[-1]}, or use --backend hooks.")
    decoding = Sampling(temperature=1.0) if settings.given else sampling
    manifest = Manifest.of(
        model=_record(loaded),
        drafter=None if drafter is None else _record(drafter),
        draft_vocabulary=order,
        exit_heads=heads_record,
        prompts_hash=encoded.hash,
        prompts_source=encoded.source,
        batches=_batches(rows, row_budget, _most_prompts(loaded, drafter, settings)),
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=loaded.device.type,
        text=settings.text,
        decoding={"temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": decoding.top_p},
        seed=sampling.seed,
        max_new_tokens=budget,
        statistics=settings.statistics,
        lenses=KINDS if settings.statistics == "all" else KINDS[:1],
        keep_residuals=sites,
        residual_dtype=kept.dtype if sites else None,
        residual_rows=kept.rows if sites else "all",
        residual_share=kept.share if sites else 1.0,
        top_prompts=max(0, settings.top_prompts) if settings.statistics == "all" else 0,
        backend=settings.backend,
        batch_invariant=settings.batch_invariant,
        segment_rows=row_budget,
        remarks=(remark_on_bos(twice, loaded.tokenizer),) if twice else (),
        ignored_processors=loaded.ignored_processors,
        versions={"probekit": probekit.__version__, "threads": str(torch.get_num_threads())}
        | {name: version(name) for name in libraries},
    )
    warping = None if settings.text == "greedy" else partial(warp, sampling=decoding)
    return TracePlan(loaded, drafter, heads, encoded, sampling, warping, manifest, settings.written, settings.logged)


def _draft_vocabulary(
    given: DraftVocabulary | Trace | str | Path | Iterable[int] | None, loaded: Loaded
) -> DraftVocabulary | None:
    if given is None:
        return None
    if isinstance(given, (str, Path)):
        given = Trace.open(given)
    if isinstance(given, Trace):
        given = given.frequent_tokens()
    if not isinstance(given, DraftVocabulary):
        given = DraftVocabulary("given", tuple(int(token) for token in given))
    return given.fit(loaded.anatomy.vocabulary)


def _exit_heads(
    given: Mapping[int, ExitHead] | str | Path | None, loaded: Loaded
) -> tuple[dict[int, ExitHead] | None, ExitHeadsRecord | None]:
    if given is None:
        return None, None
    if isinstance(given, (str, Path)):
        heads, source = load_heads(given, loaded.anatomy), str(given)
    else:
        heads, source = check_heads(given, loaded.anatomy), "given"
    return heads, ExitHeadsRecord(source, fingerprint(heads), tuple(heads))


def traced_heads(trace: Trace, loaded: Loaded) -> dict[int, ExitHead]:
    """{exit: head} that a trace was read through, for the model that was traced; empty where there were none."""
    loaded = as_loaded(loaded)
    record, packed = trace.manifest.settings.exit_heads, trace.exit_heads
    if record is None or packed is None:
        return {}
    heads = unpack_heads(packed, loaded.anatomy, "the run's file of exit heads")
    if fingerprint(heads) != record.fingerprint:
        raise InputError(
            f"the exit heads in this run are not those that it was traced with ({record.fingerprint}).", "Trace again."
        )
    return heads


def _load_like(reference: str | Path, loaded: Loaded) -> Loaded:
    return load(reference, device=loaded.device, dtype=loaded.dtype)


def _encoded(
    prompts: Iterable[Prompt], loaded: Loaded, drafter: Loaded | None, settings: TraceSettings
) -> tuple[PromptStore, list[int]]:
    """The prompts that are traced, checked one after the other, and the indices of those whose text begins twice.

    Raises InputError, also where none is left by `skip_long`.
    """
    store, twice = PromptStore(), list[int]()
    new = 0 if settings.written else settings.max_new_tokens
    room = min(reader.anatomy.context for reader in (loaded, drafter) if reader is not None) - new
    with chat_template(loaded.tokenizer) as template:
        for prompt in prompts:
            if settings.logged and not prompt.response_ids:
                raise InputError(
                    f"prompt {prompt.index} has no text of token ids, as a log has.", "Read one by load_log."
                )
            one = encode(prompt, loaded.tokenizer, given=settings.written, template=template)
            if settings.skip_long and len(one.ids) > room:
                continue
            _check_encoded(one, loaded, drafter, settings.max_new_tokens, settings.written)
            store.add(one)
            if prompt.ids is None and begins_twice(one.ids, loaded.tokenizer):  # token ids are taken as they are
                twice.append(prompt.index)
    if not store:
        raise InputError(f"every prompt is longer than the {room} tokens that are left for one.", "Shorten them.")
    return store, twice


def _check_encoded(one: Encoded, loaded: Loaded, drafter: Loaded | None, budget: int, given: bool) -> None:
    """Refuse what the models cannot read: nothing, foreign ids, too much."""
    name, tokens = f"prompt {one.prompt.index}", len(one.ids)
    if tokens == 0:
        raise InputError(f"{name} encodes to no token.", "Write a longer one.")
    if given and tokens == one.context:
        raise InputError(f"{name} has no text to score: all of its {tokens} tokens are context.", "Give a response.")
    if not 0 <= min(one.ids) <= max(one.ids) < loaded.anatomy.vocabulary:
        raise InputError(f"{name} has token ids outside 0..{loaded.anatomy.vocabulary - 1} of {loaded.name}.")
    for reader in (loaded, *([drafter] if drafter is not None else [])):
        context = reader.anatomy.context
        if tokens > context:
            raise InputError(
                f"{name} has {tokens} tokens: longer than the context of {context} tokens of {reader.name}.",
                "Shorten it, or leave such prompts out with skip_long (--skip-long).",
            )
        if not given and tokens + budget > context:
            raise InputError(
                f"{name} has {tokens} tokens; with {budget} new ones it exceeds the context of {context} tokens of "
                f"{reader.name}.",
                (f"Ask for at most {context - tokens} new tokens" if context > tokens else "Shorten it")
                + ", or leave such prompts out with skip_long (--skip-long).",
            )
    if drafter is not None and one.prompt.ids is None and drafter.tokenizer is not None:
        theirs = encode(one.prompt, drafter.tokenizer, given=given).ids if one.prompt.messages is None else one.ids
        if theirs != one.ids:
            raise InputError(
                f"the draft model {drafter.name} encodes {name} otherwise than {loaded.name}.",
                "Take a draft model with the same tokenizer.",
            )


def _row_budget(loaded: Loaded) -> int:
    """Most rows whose residuals are held at once."""
    parts = loaded.anatomy
    most = MOST_BYTES[loaded.device.type]
    free = free_bytes(loaded.device)
    if free is not None:
        most = min(most, free // 4)
    row = (parts.depth + 1) * parts.width * torch.empty((), dtype=parts.dtype).element_size()
    return max(1, min(MOST_ROWS, most // row))


def _most_prompts(loaded: Loaded, drafter: Loaded | None, settings: TraceSettings) -> int:
    """Most prompts of a batch; one where it is not known what padding does to a model."""
    if not all(reader.anatomy.family.decodes for reader in (loaded, drafter) if reader is not None):
        return 1
    return settings.batch_size or MOST_PROMPTS[loaded.device.type]


def _batches(rows: Mapping[int, int], row_budget: int, most: int) -> tuple[tuple[int, ...], ...]:
    """Prompts of similar length together: longest row count x prompts within the budget, or one prompt alone."""
    batches: list[list[int]] = []
    for index in sorted(rows, key=lambda index: (rows[index], index)):
        # lengths ascend, so this prompt would be the longest of its batch
        if batches and len(batches[-1]) < most and rows[index] * (len(batches[-1]) + 1) <= row_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return tuple(map(tuple, batches))


def _record(loaded: Loaded) -> ModelRecord:
    parts, added = loaded.anatomy, loaded.adapter
    layer_bytes, head_bytes = parts.stored_bytes or (None, None)
    return ModelRecord(
        name=loaded.name,
        reference=str(loaded.reference),
        revision=loaded.revision,
        weights_hash=loaded.weights_hash,
        depth=parts.depth,
        width=parts.width,
        vocabulary=parts.vocabulary,
        tied=parts.tied,
        parameters=parts.parameters,
        context=parts.context,
        eos_ids=tuple(sorted(loaded.eos_ids)),
        key_value_width=parts.key_value_width,
        layer_bytes=layer_bytes,
        head_bytes=head_bytes,
        adapter=None if added is None else AdapterRecord(added.reference, added.kind, added.weights_hash),
        embeddings=parts.embeddings,
    )
