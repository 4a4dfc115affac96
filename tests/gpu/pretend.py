"""A CUDA device that is not there: tensors that say `cuda:0` and whose numbers lie in the processor's memory.

Within `pretended()` whole programs run on it. Mixed devices raise as they do on a GPU; whatever would make the host
wait, or carry numbers between host and device, is written down with its line. Attention comes out in the layout of the
kernel that CUDA would choose. Streams and events do nothing; a CUDA graph is a tape: while it is captured nothing
changes, and what Python decided meanwhile is baked in.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from probekit.models import states

CUDA = torch.device("cuda:0")
GIB = 2**30
VIEWS = set(
    "view _unsafe_view expand permute transpose t slice select unsqueeze squeeze alias detach split lift device "  # noqa: SIM905
    "split_with_sizes as_strided unbind _reshape_alias lift_fresh chunk unflatten flatten expand_as view_as".split()
)
SYNCS = {
    "_local_scalar_dense", "item", "nonzero", "_unique2", "unique_dim", "masked_select", "is_nonzero", "equal",
    "unique_consecutive",
}  # fmt: skip
CROSSING = ("_to_copy", "copy_", "to")
FULL, HALF = (torch.float32,), (torch.float16, torch.bfloat16)
KERNELS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}  # torch._C._SDPBackend
TORCHS_ORDER = [3, 1, 2, 0]  # what torch tries first on compute capability 9.0, when it is left to itself


class Cuda(torch.Tensor):
    """A tensor on `cuda:0`; its numbers are in `elem`, a tensor of the processor."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem):
        made = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            layout=elem.layout, device=CUDA, requires_grad=False,
        )  # fmt: skip
        made.elem = elem
        return made

    def tolist(self):
        note("wait", "tolist")
        return self.elem.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def data_ptr(self):
        return self.elem.data_ptr()

    def __repr__(self, **_):
        return f"Cuda({self.elem!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Log:
    """What happened: `calls`, a count of (what, operation, lines); `attention`, (kernel, keys, masked) of each call.

    what: "kernel", or what makes the host wait or moves numbers: "wait", "to device", "to host", "to pinned".
    """

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.attention: list[tuple[str, int, bool]] = []

    def clear(self) -> None:
        self.calls.clear()
        self.attention.clear()

    def count(self, *kinds: str) -> int:
        return sum(number for (kind, _, _), number in self.calls.items() if kind in kinds)

    def told(self, *kinds: str) -> dict[tuple[str, str, str], int]:
        return {call: number for call, number in self.calls.items() if call[0] in kinds}


LOG = Log()
PINNED: set[int] = set()  # storages of the host that a copy need not wait for
_tapes: list[Tape] = []


def where() -> str:
    frame, found = sys._getframe(2), []
    while frame and len(found) < 2:
        name = frame.f_code.co_filename
        if "/probekit/" in name and "/tests/" not in name and "site-packages" not in name:
            found.append(f"{name.rsplit('/probekit/', 1)[-1]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


def note(what: str, name: str) -> None:
    if _tapes and what in ("wait", "to host", "to device"):
        raise RuntimeError(f"operation not permitted when stream is capturing: {name} at {where()}")
    LOG.calls[what, name, where()] += 1


def run(function: Any, args: tuple, kwargs: dict) -> Any:
    """Call an operation on the numbers behind its tensors, if the device would have taken it."""
    name = function._schema.name.split("::")[1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    mine = [tensor for tensor in tensors if isinstance(tensor, Cuda)]
    hosts = [tensor for tensor in tensors if not isinstance(tensor, Cuda) and tensor.device.type == "cpu"]
    asked = next((arg for arg in args if isinstance(arg, torch.device)), None)
    device = kwargs["device"] if kwargs.get("device") is not None else asked
    device = None if device is None else torch.device(device)
    pinned = kwargs.pop("pin_memory", None)
    if not mine and (device is None or device.type != "cuda"):
        made = function(*args, **kwargs)
        if pinned:
            PINNED.add(made.untyped_storage().data_ptr())
        return made
    crossing = name in CROSSING
    if mine and hosts and not crossing:
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            note("to device", name)
        elif any(tensor.dim() for tensor in hosts):
            devices = [(tuple(tensor.shape), tensor.device.type) for tensor in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} {devices} at {where()}")
    if name in SYNCS or (name == "repeat_interleave" and len(tensors) > 1):
        note("wait", name)
    if name in ("index", "index_put_", "index_put") and any(
        isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
    ):
        note("wait", f"{name} by a mask")
    if name == "copy_" and isinstance(args[0], Cuda) != isinstance(args[1], Cuda) and args[1].dim():
        _note_copy(args)
    elif crossing and name != "copy_" and mine and device is not None and device.type == "cpu":
        note("to host", name)
    elif crossing and name != "copy_" and not mine:
        note("to device", name)
    if _tapes:
        return _tapes[-1].take(function, args, kwargs)
    return _compute(function, name, args, kwargs, mine)


def _note_copy(args: tuple) -> None:
    if isinstance(args[0], Cuda):
        note("to device", "copy_")
        return
    waits = args[0].untyped_storage().data_ptr() not in PINNED or not (len(args) > 2 and args[2])
    note("to host" if waits else "to pinned", "copy_")


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, Cuda):
        return leaf.elem
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "cuda" else leaf


def _compute(function: Any, name: str, args: tuple, kwargs: dict, mine: list) -> Any:
    plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
    device = next((torch.device(arg) for arg in (*args, kwargs.get("device")) if isinstance(arg, torch.device)), None)
    if name == "mm" and function._overloadname.startswith("dtype"):
        left, right, dtype = plain_args[:3]
        out = torch.mm(left.to(dtype), right.to(dtype))
        if "out" in plain_kwargs:
            plain_kwargs["out"].copy_(out)
            LOG.calls["kernel", "mm", where()] += 1
            return kwargs["out"]
    else:
        out = function(*plain_args, **plain_kwargs)
    if device is not None and device.type == "cpu" and name in CROSSING:
        return out
    if name == "copy_" and not isinstance(args[0], Cuda):
        return args[0]
    known = {id(tensor.elem): tensor for tensor in mine}

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.device.type != "cpu":
            return leaf
        return known.get(id(leaf)) if id(leaf) in known else Cuda(leaf)

    if name not in VIEWS and name not in SYNCS and not _is_view(name, out, mine):
        LOG.calls["kernel", name, where()] += 1
    return tree_map(wrapped, out)


def _is_view(name: str, out: Any, mine: list) -> bool:
    made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    there = {tensor.elem.untyped_storage()._cdata for tensor in mine}
    same = bool(made) and all(tensor.untyped_storage()._cdata in there for tensor in made)
    return name in ("to", "reshape", "contiguous", "_to_copy") and same


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


# Attention, in the layout of the kernel that CUDA would choose.

_plain_attention = functional.scaled_dot_product_attention


def kernel_of(query: Any, key: Any, masked: bool, repeats: bool) -> str:
    """The first kernel that takes it, in torch's order or in the one that was asked for."""
    flags = torch.backends.cuda
    enabled = {
        0: flags.math_sdp_enabled(), 1: flags.flash_sdp_enabled(), 2: flags.mem_efficient_sdp_enabled(),
        3: flags.cudnn_sdp_enabled(),
    }  # fmt: skip
    order = [number for number in torch._C._get_sdp_priority_order() if number in KERNELS]
    if all(enabled.values()):
        order = TORCHS_ORDER
    half = query.dtype in HALF
    takes = {
        0: True, 1: half and not masked, 2: not repeats, 3: half and (query.shape[2] > 1 or key.shape[2] > 1),
    }  # fmt: skip
    found = next((number for number in order if enabled[number] and takes[number]), None)
    if found is None:
        raise RuntimeError("No available kernel. Aborting execution.")
    return KERNELS[found]


def attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    more = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if not isinstance(query, Cuda):
        return _plain_attention(query, key, value, attn_mask, dropout_p, **more)
    if not all(isinstance(each, Cuda) for each in (key, value, *([] if attn_mask is None else [attn_mask]))):
        raise RuntimeError("Expected query, key, value and attn_mask to be on the same device.")
    kernel = kernel_of(query, key, attn_mask is not None, query.shape[1] != key.shape[1])
    LOG.attention.append((kernel, key.shape[2], attn_mask is not None))
    return torch.ops.probekit_tests.attention(
        query, key, value, attn_mask, is_causal, scale, enable_gqa, kernel != "math"
    )


def _attention(query, key, value, mask, causal, scale, grouped, tokens_first):
    out = _plain_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped).contiguous()
    # flash, memory-efficient and cuDNN attention write (rows, tokens, heads, width)
    return out.transpose(1, 2).contiguous().transpose(1, 2) if tokens_first else out.clone()


_library = torch.library.Library("probekit_tests", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? m, bool causal, float? scale, bool grouped, bool first) -> Tensor"
)
_library.impl("attention", _attention, "CPU")


# Graphs.


class Tape:
    """The operations of a capture with their tensors; replaying makes them again, into the same tensors."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple, dict, Any, bool]] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of each storage: what it held
        self._own: set[int] = set()

    def take(self, function: Any, args: tuple, kwargs: dict) -> Any:
        name = function._schema.name.split("::")[1]
        mine = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Cuda)]
        if function._schema.is_mutable:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    self._remember(leaf.elem if isinstance(leaf, Cuda) else leaf)
        result = _compute(function, name, args, kwargs, mine)
        there = {leaf.elem.untyped_storage().data_ptr() for leaf in mine}
        fresh = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Cuda) and leaf.numel()]
        fresh = [leaf for leaf in fresh if leaf.elem.untyped_storage().data_ptr() not in there]
        self._own |= {leaf.elem.untyped_storage().data_ptr() for leaf in fresh}
        if fresh or function._schema.is_mutable:
            self.operations.append((function, args, kwargs, result, bool(fresh)))
        return result

    def _remember(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own and storage.data_ptr() not in self._before and storage.nbytes():
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._before[storage.data_ptr()] = whole, whole.clone()

    def undo(self) -> None:
        """A capture executes nothing."""
        for whole, held in self._before.values():
            whole.copy_(held)
        self._before.clear()

    def replay(self) -> None:
        for function, args, kwargs, result, fresh in self.operations:
            plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
            if function._schema.name == "aten::mm" and function._overloadname.startswith("dtype"):
                made = torch.mm(*(each.to(plain_args[2]) for each in plain_args[:2]))
                out = plain_kwargs.get("out")
                (result.elem if out is None else out).copy_(made)
                continue
            made = function(*plain_args, **plain_kwargs)
            if fresh:
                for old, new in zip(tree_leaves(result), tree_leaves(made), strict=True):
                    if isinstance(old, Cuda):
                        old.elem.copy_(new)


class Graph:
    """torch.cuda.CUDAGraph. made, replays: how many there were, since `pretended` was entered."""

    made = 0
    replays = 0

    def __init__(self, *_, **__) -> None:
        self.tape = Tape()

    def replay(self) -> None:
        Graph.replays += 1
        self.tape.replay()


@contextmanager
def capturing(graph: Graph, pool: Any = None, stream: Any = None, **_: Any) -> Iterator[None]:
    """torch.cuda.graph."""
    _tapes.append(graph.tape)
    try:
        yield
    finally:
        _tapes.pop()
        graph.tape.undo()
    Graph.made += 1


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = CUDA

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        note("wait", "Stream.synchronize")


class Event:
    """torch.cuda.Event; waits counts those that the host waited for, `order` what was done with each."""

    order: list[tuple[str, int]] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        import time

        self.at = time.perf_counter()
        Event.order.append(("sent", id(self)))

    def synchronize(self) -> None:
        Event.order.append(("waited", id(self)))

    def elapsed_time(self, other: Event) -> float:
        return max(1e-3, 1000 * (other.at - self.at))


def move(model: torch.nn.Module) -> torch.nn.Module:
    """`model.to(CUDA)`, which torch does in ways that no wrapped tensor survives."""
    moved: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = torch.nn.Parameter(Cuda(parameter.detach().clone()), requires_grad=False)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else Cuda(buffer.clone())
    return model


class _Modules:
    """torch.nn, whose Parameter is what a parameter on the pretended device is: an ordinary one."""

    Parameter = Cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn, name)


class _NoInference:
    """torch._C._InferenceMode."""

    def __init__(self, mode: bool = True) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return torch._C.Generator("cpu")


@contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Within it there is one CUDA device. LOG, Graph and Event start anew."""
    LOG.clear()
    Graph.made = Graph.replays = 0
    Event.order.clear()
    stands = {
        "is_available": lambda: True, "device_count": lambda: 1, "_lazy_init": lambda: None,
        "synchronize": lambda *_: note("wait", "cuda.synchronize"), "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (70 * GIB, 80 * GIB), "get_device_name": lambda *_: "pretended",
        "get_device_capability": lambda *_: (9, 0), "current_device": lambda: 0,
        "reset_peak_memory_stats": lambda *_: None, "memory_allocated": lambda *_: GIB,
        "memory_reserved": lambda *_: 2 * GIB, "max_memory_allocated": lambda *_: GIB,
        "graph_pool_handle": lambda: (0, 1), "current_stream": lambda *_: Stream(), "CUDAGraph": Graph,
        "graph": capturing, "Stream": Stream, "Event": Event, "stream": _nothing, "device": _nothing,
    }  # fmt: skip
    torch._C._set_only_lift_cpu_tensors(True)
    patches = [patch.object(torch.cuda, name, stand) for name, stand in stands.items()]
    patches += [
        patch.object(functional, "scaled_dot_product_attention", attention),
        patch.object(torch._C._nn, "scaled_dot_product_attention", attention),
        patch.object(torch, "Generator", _Generator),
        patch.object(states, "nn", _Modules()),
        patch.object(torch._C, "_InferenceMode", _NoInference),  # wrapped tensors are no inference tensors
    ]
    try:
        for each in patches:
            each.start()
        with Mode(), torch.no_grad():
            yield CUDA
    finally:
        for each in reversed(patches):
            each.stop()
        torch._C._set_only_lift_cpu_tensors(False)
