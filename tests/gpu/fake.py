"""A CUDA device without numbers: tensors of any size that have shapes only, and a count of what would be launched.

`faked()` is torch's FakeTensorMode with the devices of CUDA. Attention goes to the kernel that CUDA would choose among
those that are enabled, so that its result has that kernel's layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from gpu.pretend import GIB, SYNCS, VIEWS, kernel_of, where
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from probekit.decoding.device_round import DeviceEngine, DeviceState, Round
from probekit.decoding.sampling import Sampler
from probekit.drafting.proposers import DraftHead
from probekit.hooks import fast_forward, fused_layers
from probekit.models.anatomy import anatomy
from probekit.models.synthetic import SHAPES
from probekit.settings import Sampling

GREEDY = Sampling()
MAYBE_VIEWS = {"to", "reshape", "contiguous", "_to_copy"}
aten = torch.ops.aten


class Launches(TorchDispatchMode):
    """What is launched inside: `kernels`, {(operation, lines): number}; what would make the host wait, in `waits`;
    copies that it need not wait for, in `copies`."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        written = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        devices = {leaf.device.type for leaf in (*read, *written) if leaf.device.type == "cuda" or leaf.dim()}
        if name in VIEWS or "cuda" not in devices:
            return made
        if name == "copy_" and len(devices) > 1 and True in (*args[2:3], (kwargs or {}).get("non_blocking")):
            self.copies += 1
        elif name in SYNCS or len(devices) > 1:
            self.waits[name, where()] += 1
        elif not (name in MAYBE_VIEWS and _same_storage(read, written)):
            self.kernels[name, where()] += 1
        return made

    @property
    def number(self) -> int:
        return sum(self.kernels.values())

    def of(self, name: str) -> int:
        return sum(number for (each, _), number in self.kernels.items() if each == name)


def _same_storage(read, written) -> bool:
    there = {each.untyped_storage()._cdata for each in read}
    return all(each.untyped_storage()._cdata in there for each in written)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    repeats = query.shape[1] != key.shape[1]
    kernel = kernel_of(query, key, attn_mask is not None, repeats)
    mask = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
    more = {"is_causal": is_causal, "scale": scale}
    if kernel == "flash":
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, **more)[0]
    if kernel == "efficient":
        return aten._scaled_dot_product_efficient_attention(query, key, value, mask, False, 0.0, **more)[0]
    assert kernel == "math", kernel
    return aten._scaled_dot_product_attention_math(query, key, value, mask, 0.0, enable_gqa=repeats, **more)[0]


@contextmanager
def faked() -> Iterator[None]:
    stands = {
        "is_available": lambda: True, "device_count": lambda: 1, "_lazy_init": lambda: None,
        "mem_get_info": lambda *_: (70 * GIB, 80 * GIB), "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0, "synchronize": lambda *_: None,
    }  # fmt: skip
    plain = torch.zeros  # pinned memory is the host's, and it is the driver that pins it
    patches = [patch.object(torch.cuda, name, stand) for name, stand in stands.items()]
    patches += [
        patch.object(torch, "zeros", lambda *size, pin_memory=False, **more: plain(*size, **more)),
        patch.object(functional, "scaled_dot_product_attention", attention),
        patch.object(fake_tensor, "init_gpu_context", lambda device: None),  # which would ask for a driver
        *(patch.object(room, "has_plain_weight", lambda module: True) for room in (fast_forward, fused_layers)),
    ]
    try:
        for each in patches:
            each.start()
        with FakeTensorMode(), torch.inference_mode():
            yield
    finally:
        for each in reversed(patches):
            each.stop()


def llama(shape: str, dtype: torch.dtype, **overrides) -> LlamaForCausalLM:
    """A Llama whose weights have shapes only, on the device."""
    config = replace(SHAPES[shape], **overrides).config()
    with _disable_current_modes():
        with torch.device("meta"):
            model = LlamaForCausalLM(config).eval()
        rotary = type(model.model.rotary_emb)(config=config)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                there = torch.empty(weight.shape, dtype=dtype, device="cuda")
                module._parameters[name] = torch.nn.Parameter(there, requires_grad=False)
    for name, numbers in rotary._buffers.items():
        rotary._buffers[name] = torch.empty(numbers.shape, dtype=numbers.dtype, device="cuda")
    model.model.rotary_emb = rotary
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def launches(
    fused, *, shape="llama-3-8b", dtype=torch.bfloat16, draft_length=0, rows=1, sampling=GREEDY, visible=128,
    **overrides,
) -> Launches:  # fmt: skip
    """What one round launches, within `faked()`; draft_length 0: an autoregressive step. E: an eighth of the depth."""
    parts = anatomy(llama(shape, dtype, **overrides))
    engine = DeviceEngine(parts, rows, 8192, fused=fused)
    assert (engine.fused is not None) == fused
    state = DeviceState.blank(rows, draft_length, 4, torch.device("cuda"), not sampling.greedy)
    exit_layer, head = (parts.depth // 8, DraftHead(parts)) if draft_length else (None, None)
    work = Round(engine, state, Sampler(sampling), visible, exit_layer, head)
    with Launches() as found:
        work()
    return found
