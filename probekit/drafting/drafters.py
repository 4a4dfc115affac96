"""Who drafts. A drafter is a value: it names itself, reads off a trace what it would draft, and drafts in a decoder.

Predictions, costs, choices, decoders and validations pass it on whole. To read a trace it needs a name only; to draft
in a decoder it must also hold what it drafts with (a model, a head): `equipped` puts it in. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from probekit.drafting.keys import DrafterKey, check_exits
from probekit.drafting.policies import CONFIDENCES, Policy, ResidualPolicy, drafts_allowed, looks_at
from probekit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from probekit.drafting.proposers import BoundDrafter
    from probekit.models.loaded import Loaded
    from probekit.traces.trace import Trace


@runtime_checkable
class Drafter(Protocol):
    """What every way of drafting is.

    Arrays are over the output positions of one prompt's text, (N,).
    """

    @property
    def key(self) -> DrafterKey: ...

    def signal(self, trace: Trace, prompt: int) -> np.ndarray:
        """bool: each position would be accepted if it was drafted; for text that is not greedy the chance, w."""
        ...

    def near_ties(self, trace: Trace, prompt: int) -> np.ndarray:
        """bool: within the measured noise, what it drafts could fall either way. Greedy text only."""
        ...

    def overlap(self, trace: Trace, prompt: int) -> np.ndarray:
        """The sum over tokens of min(p, q)."""
        ...

    def confidence(self, trace: Trace, prompt: int, of: str = "probability") -> np.ndarray:
        """What a policy sees in a decoder of a draft at each position: one of `policies.CONFIDENCES`.

        One without `of` knows the probability only.
        """
        ...

    def on(self, loaded: Loaded) -> BoundDrafter:
        """Ready to draft for a model. Raises InputError where it cannot."""
        ...


class Outlook(NamedTuple):
    """What a drafter would do in a round that starts at each output position of one text.

    run: (N,) int32, leading drafts that are the text's own tokens. drafted: (N,) int32, tokens that it has to draft.
    Of a tree both count levels.
    """

    run: np.ndarray
    drafted: np.ndarray


@runtime_checkable
class TextDrafter(Drafter, Protocol):
    """A drafter whose drafts follow from the text and from where their round starts: nothing is left to chance."""

    def outlook(self, trace: Trace, prompt: int, longest: int) -> Outlook:
        """What a round of at most `longest` drafts would do at each output position."""
        ...


def outlook(drafter: Drafter, trace: Trace, prompt: int, longest: int) -> Outlook:
    """The outlook of any drafter on greedy text, of a text drafter on any."""
    return outlooks(drafter, trace, [prompt], longest)[0]


def outlooks(drafter: Drafter, trace: Trace, prompts: Sequence[int], longest: int) -> list[Outlook]:
    """The same for several prompts."""
    if isinstance(drafter, TextDrafter):  # a question that takes longer than an answer: asked once
        return [drafter.outlook(trace, prompt, longest) for prompt in prompts]
    signals = [drafter.signal(trace, prompt) for prompt in prompts]
    return [Outlook(runs_of(agrees), np.full(len(agrees), longest, dtype=np.int32)) for agrees in signals]


def sizes_of(drafter: Drafter, longest: int) -> np.ndarray:
    """(longest + 1,) tokens that a round of at most 0, 1, .. levels drafts: as many, but for a tree."""
    shape = getattr(drafter, "shape", None)
    levels = np.arange(longest + 1)
    return levels if shape is None else shape.sizes[np.minimum(levels, shape.depth)]


def allowed_by(policy: Policy, drafter: Drafter, trace: Trace, prompt: int, longest: int) -> np.ndarray:
    """(N,) int32: the most drafts that a policy lets a round have that starts at each output position."""
    sure = None
    if isinstance(policy, ResidualPolicy):
        sure = np.asarray(policy.of_residuals(residuals_of(drafter, policy, trace, prompt)))
    elif policy.needs_confidence:
        of = looks_at(policy)
        sure = drafter.confidence(trace, prompt, *(() if of == CONFIDENCES[0] else (of,)))
    return drafts_allowed(policy, sure, len(trace.outputs(prompt)), longest)


def check_reads(key: DrafterKey, policy: Policy) -> None:
    """Raise InputError where a policy reads the residuals of another exit than the one that drafts."""
    if isinstance(policy, ResidualPolicy) and key != DrafterKey.exit(
        policy.exit_layer, rows=key.rows, exit_heads=key.exit_heads
    ):
        raise InputError(
            f"this policy reads the residuals of exit layer {policy.exit_layer}, and {key.label} drafts.",
            f"Draft from layer {policy.exit_layer}, or fit a probe for the one that drafts.",
        )


def residuals_of(drafter: Drafter, policy: ResidualPolicy, trace: Trace, prompt: int) -> np.ndarray:
    """(N, width) float32: the residuals that the exit drafts each output token from, as the run kept them."""
    check_reads(drafter.key, policy)
    settings = trace.manifest.settings
    if settings.residual_dtype not in (None, settings.dtype):
        raise InputError(
            f"this run kept its residuals as {settings.residual_dtype}, and a decoder reads {settings.dtype}.",
            "Trace again without --residual-dtype.",
        )
    found = trace.residuals_of(prompt, policy.exit_layer)
    tokens = len(trace.outputs(prompt))
    if len(found) != tokens:
        raise InputError(
            f"this run kept the residuals of {len(found)} of the {tokens} tokens of prompt {prompt}.",
            "Trace again without --residual-share.",
        )
    return found


def runs_of(agrees: np.ndarray) -> np.ndarray:
    """(..., N) int32: how many positions from each one on agree, up to the first that does not, or the end."""
    place = np.arange(agrees.shape[-1], dtype=np.int32)
    ahead = np.where(agrees, np.int32(agrees.shape[-1]), place)
    return np.minimum.accumulate(ahead[..., ::-1], axis=-1)[..., ::-1] - place


@dataclass(frozen=True, eq=False)
class ExitLayer:
    """The model's first `exit_layer` layers, its norm and its head; the rest of it verifies.

    Parameters
    ----------
    rows: F, to draft among the first F tokens of a draft vocabulary only; None: among all.
    exit_heads: the fingerprint of the exit heads that drafts go through; None: none.
    draft_ids: the F token ids; to be known when it drafts in a decoder.
    exit_head: the map itself, (..., width) -> (..., width); the same holds.
    packed_heads: where the map can be read from when it is needed: the contents of a file of exit heads.
    read: in place of the trace's own signal: given a prompt's index, (L+1, N).
    """

    exit_layer: int
    rows: int | None = None
    exit_heads: str | None = None
    draft_ids: Sequence[int] | Tensor | None = field(default=None, repr=False)
    exit_head: Callable[..., Any] | None = field(default=None, repr=False)
    packed_heads: Callable[[], bytes | None] | None = field(default=None, repr=False)
    read: Callable[[int], np.ndarray] | None = field(default=None, repr=False)

    @property
    def key(self) -> DrafterKey:
        return DrafterKey.exit(self.exit_layer, rows=self.rows, exit_heads=self.exit_heads)

    def signal(self, trace: Trace, prompt: int) -> np.ndarray:
        if self.read is not None:
            return self._given(trace, prompt, self.read)
        if self.rows is not None:
            return trace.draft_head_agreement(prompt, self.rows, rounded=True)[self.exit_layer]
        if trace.manifest.settings.text != "greedy":
            return trace.accept_probability(prompt)[self.exit_layer]
        return trace.agreement(prompt, rounded=trace.rounds_logits)[self.exit_layer]

    def _given(self, trace: Trace, prompt: int, read: Callable[[int], np.ndarray]) -> np.ndarray:
        layers = np.asarray(read(prompt))
        expected = trace.depth + 1, len(trace.outputs(prompt))
        if layers.shape != expected:
            raise InputError(f"the agreement of prompt {prompt} has shape {layers.shape}; expected {expected}.")
        return layers[self.exit_layer]

    def near_ties(self, trace: Trace, prompt: int) -> np.ndarray:
        if self.rows is None:
            return trace.near_ties(prompt)[self.exit_layer]
        return trace.draft_head_near_ties(prompt, self.rows)[self.exit_layer]

    def overlap(self, trace: Trace, prompt: int) -> np.ndarray:
        return trace.values(prompt, "overlap")[self.exit_layer]

    def confidence(self, trace: Trace, prompt: int, of: str = "probability") -> np.ndarray:
        if self.rows is not None or self.read is not None:
            raise InputError(
                "a trace does not say how sure a draft head with fewer rows is, so no policy that asks for it can be "
                "predicted.",
                "Leave the draft rows out, or draft with a fixed length.",
            )
        return trace.values(prompt, of)[self.exit_layer]

    def on(self, loaded: Loaded) -> BoundDrafter:
        from probekit.drafting.proposers import ExitLayerDrafts

        return ExitLayerDrafts(loaded, self.key, self.draft_ids, self._head_of(loaded))

    def _head_of(self, loaded: Loaded) -> Callable[..., Any] | None:
        """The map that drafts go through: the one at hand, else out of the file that it was traced with."""
        packed = None if self.exit_head is not None or self.packed_heads is None else self.packed_heads()
        if packed is None:
            return self.exit_head
        from probekit.lens.exit_heads import fingerprint, unpack_heads

        heads = unpack_heads(packed, loaded.anatomy, "the run's file of exit heads")
        if self.exit_heads != fingerprint(heads):
            raise InputError(f"these exit heads are not those that were traced ({self.exit_heads}).", "Trace again.")
        return heads.get(self.exit_layer)


@dataclass(frozen=True, eq=False)
class DraftModel:
    """A second model with the same tokenizer. `loaded`: the model itself, to be known when it drafts in a decoder."""

    name: str
    loaded: Loaded | None = field(default=None, repr=False)

    @property
    def key(self) -> DrafterKey:
        return DrafterKey.draft_model(self.name)

    def signal(self, trace: Trace, prompt: int) -> np.ndarray:
        if trace.manifest.settings.text != "greedy":
            return trace.drafter_accept_probability(prompt)
        return trace.drafter_agreement(prompt, rounded=trace.rounds_logits)

    def near_ties(self, trace: Trace, prompt: int) -> np.ndarray:
        return trace.drafter_values(prompt, "near_tie")

    def overlap(self, trace: Trace, prompt: int) -> np.ndarray:
        return trace.drafter_values(prompt, "overlap")

    def confidence(self, trace: Trace, prompt: int, of: str = "probability") -> np.ndarray:
        raise InputError(
            "a trace does not say how sure the draft model is, so no policy that asks for it can be predicted.",
            "Predict exit layers, or draft with a fixed length.",
        )

    def on(self, loaded: Loaded) -> BoundDrafter:
        from probekit.drafting.proposers import DraftModelDrafts

        if self.loaded is None:
            raise InputError(f"drafting with {self.name} needs that model.", "Give it as the draft model.")
        return DraftModelDrafts(loaded, self.key, self.loaded)


def traced_drafters(
    trace: Trace,
    exit_layers: Iterable[int] | None = None,
    *,
    draft_model: bool | None = None,
    draft_rows: int | None = None,
    read: Callable[[int], np.ndarray] | None = None,
) -> list[Drafter]:
    """The drafters that a trace answers for: its exits, and last its draft model.

    Parameters
    ----------
    exit_layers: 1..L-1 by default.
    draft_model: the trace's draft model, too; by default where it has one and no exit layers were named.
    draft_rows: F, for exits that draft among the first F tokens of the trace's draft vocabulary only.
    read: of the exits, as in ExitLayer.

    Raises InputError for an exit layer, a draft head or a draft model that the trace does not know.
    """
    manifest = trace.manifest
    ids = None if draft_rows is None else trace.draft_head_ids(draft_rows)
    exits = check_exits(exit_layers, trace.depth)
    found: list[Drafter] = [
        ExitLayer(
            exit_layer,
            rows=None if ids is None else len(ids),
            exit_heads=manifest.heads_name,
            draft_ids=None if ids is None else ids.tolist(),
            packed_heads=(lambda: trace.exit_heads) if _has_head(trace, exit_layer) else None,
            read=read,
        )
        for exit_layer in exits
    ]
    if draft_model or (draft_model is None and exit_layers is None and manifest.drafter is not None):
        if manifest.drafter is None:
            raise InputError("this trace has no draft model.", "Trace again with --draft-model.")
        found.append(DraftModel(manifest.drafter.name))
    if not found and exit_layers is None:
        raise InputError(
            f"{manifest.model.name} has one layer, and so no exit to draft from.", "Trace it with a draft model."
        )
    return found


def _has_head(trace: Trace, exit_layer: int) -> bool:
    record = trace.manifest.settings.exit_heads
    return record is not None and exit_layer in record.exits


def equipped(
    drafter: Drafter,
    *,
    draft_model: Loaded | None = None,
    exit_heads: Mapping[int, Any] | None = None,
) -> Drafter:
    """The same drafter with what it runs with. exit_heads: {exit: head}."""
    if isinstance(drafter, DraftModel):
        return drafter if draft_model is None else replace(drafter, loaded=draft_model)
    if isinstance(drafter, ExitLayer) and exit_heads:
        return replace(drafter, exit_head=exit_heads.get(drafter.exit_layer))
    return drafter
