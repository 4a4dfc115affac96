"""A look inside one continuation: the states of every generated step and layer, and what each layer would say."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.self_check import generated, reproduces
from probekit.errors import InputError
from probekit.foreign.special_tokens import begins_twice, remark_on_bos
from probekit.foreign.text import check_text
from probekit.hooks.capture import Capture
from probekit.lens.lens import Kind, Lens
from probekit.models.loaded import Loaded, as_loaded


@dataclass(frozen=True, eq=False)
class Exit:
    """What the model would say if it stopped after `layer` at `step`.

    embedding: (width,), the residual of the last token; logits, probabilities: (vocabulary,), float32.
    """

    step: int
    layer: int
    embedding: Tensor
    logits: Tensor
    probabilities: Tensor
    token_id: int
    text: str


@dataclass(frozen=True, eq=False)
class Inspection:
    """The states of a greedy continuation, step by step.

    states: steps x (layers + 1) tensors, (batch = 1, tokens, width). The first step holds the whole prompt, each
    later one the token that was generated before it; layer 0 is the embedding output, the last is before the norm.
    """

    loaded: Loaded
    prompt_ids: list[int]
    tokens: list[int]
    states: list[list[Tensor]]
    lens: Lens

    def __repr__(self) -> str:
        return f"Inspection({self.loaded.name}: {len(self.states)} steps x {self.loaded.depth + 1} layers)"

    def _repr_html_(self) -> str:
        return self.table().to_html()

    @torch.inference_mode()
    def exit(self, step: int, layer: int) -> Exit:
        """What `layer` says at `step`. Raises InputError for a step or layer that does not exist."""
        if step not in range(len(self.states)):
            raise InputError(f"step {step!r} does not exist: this continuation has steps 0..{len(self.states) - 1}.")
        self.loaded.anatomy.check_site(layer)
        embedding = self.states[step][layer][0, -1]
        logits = self.lens(embedding, layer)
        token_id = int(logits.argmax())
        return Exit(
            step, layer, embedding, logits, logits.softmax(-1), token_id, self.loaded.tokenizer.decode([token_id])
        )

    def table(self) -> pd.DataFrame:
        """The text of each layer's top token: one row a layer, one column a step."""
        rows = {
            layer: [self.exit(step, layer).text for step in range(len(self.states))]
            for layer in self.loaded.anatomy.sites
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=range(len(self.states))).rename_axis(
            index="layer", columns="step"
        )


def inspect_prompt(
    loaded: Loaded | str | Path, prompt: str, *, max_new_tokens: int = 10, lens: Kind = "final-norm"
) -> Inspection:
    """Continue `prompt` greedily and keep the residual stream of every step and layer.

    Everything is kept in memory: (prompt + max_new_tokens) x (layers + 1) x width numbers. `probekit.trace` reads
    whole corpora in bounded memory instead.

    Examples
    --------
    >>> import probekit
    >>> found = probekit.inspect_prompt("tales-tied", "Once upon a time", max_new_tokens=3)
    >>> found
    Inspection(tales-tied: 3 steps x 13 layers)
    >>> found.exit(step=0, layer=12).token_id == found.tokens[0]  # the last layer is the model
    True
    """
    loaded = as_loaded(loaded)
    if loaded.tokenizer is None:
        raise InputError(f"{loaded.name} has no tokenizer, so it cannot read a text.", "Wrap it with its tokenizer.")
    prompt_ids = loaded.tokenizer(check_text(prompt, "the prompt"))["input_ids"]
    if begins_twice(prompt_ids, loaded.tokenizer):
        warnings.warn(remark_on_bos((), loaded.tokenizer), stacklevel=2)
    reads, engine = Lens(loaded.anatomy, lens), reproduces(loaded)
    with Capture(loaded.anatomy) as capture:
        if engine:
            tokens = Autoregressive(loaded).decode([prompt_ids], max_new_tokens=max_new_tokens)[0].tokens
        else:
            tokens = generated(loaded, prompt_ids, max_new_tokens)
    states = [[step[site] for site in loaded.anatomy.sites] for step in capture.passes]
    return Inspection(loaded, list(prompt_ids), tokens, states, reads)


look_inside = inspect_prompt  # its name until 0.1
