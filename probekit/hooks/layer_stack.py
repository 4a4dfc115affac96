"""One stack a module: what acts on a layer, in one order, however it was opened and closed.

On the way in: the residual of a Resume takes the input's place, or else Edits of site 0 rewrite it; Captures of site 0
read it; a Stop at site 0 ends the pass. Then the layer runs, unless a Resume or an Edit skips it. On the way out:
Edits rewrite what it wrote, in the order in which they were opened; Captures read what they left; a Stop ends the
pass. So a Capture sees an Edit of the same layer also where it was opened first. A layer that a Resume skips hands its
input on, whatever is edited there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor, nn

_ABSENT = object()


class Turn(IntEnum):
    """When an entry acts, first to last."""

    RESUME = 0
    EDIT = 1
    CAPTURE = 2
    STOP = 3


@dataclass(frozen=True, eq=False)
class Entry:
    """What one open context does at one layer.

    before: input -> the input that the layer gets. skips: asked at each call; a skipped layer hands its input on.
    runs: whether a skipped layer runs all the same, and what it writes is thrown away: where it is not known what it
    returns beside the residual. after: (input, output) -> the residual that is written. replays: does device work only,
    which a graph replays.
    """

    turn: Turn
    before: Callable[[Tensor], Tensor] | None = None
    skips: Callable[[], bool] | None = None
    runs: bool = False
    after: Callable[[Tensor, Tensor], Tensor] | None = None
    replays: bool = False


class LayerStack:
    """The open entries of one module, behind one hook on each side of it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._entries: list[Entry] = []
        self._undo: dict[str, Callable[[], None]] = {}

    def add(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._entries.sort(key=lambda each: each.turn)  # stable: within a turn, in the order of opening
        try:
            self._settle()
        except BaseException:
            self.remove(entry)
            raise

    def remove(self, entry: Entry) -> None:
        if entry in self._entries:
            self._entries.remove(entry)
        self._settle()
        if not self._entries:
            _stacks.pop(self._module, None)

    def _settle(self) -> None:
        """Have on the module what the entries need, and nothing else."""
        needed = {
            "before": any(entry.before for entry in self._entries),
            "skip": any(entry.skips and not entry.runs for entry in self._entries),
            "after": any(entry.after or entry.runs for entry in self._entries),
        }
        makers = {"before": self._hook_before, "skip": self._replace_forward, "after": self._hook_after}
        for name, wanted in needed.items():
            if wanted and name not in self._undo:
                self._undo[name] = makers[name]()
            elif not wanted and name in self._undo:
                self._undo.pop(name)()

    def _hook_before(self) -> Callable[[], None]:
        return self._module.register_forward_pre_hook(_Before(self), with_kwargs=True).remove

    def _hook_after(self) -> Callable[[], None]:
        return self._module.register_forward_hook(_After(self), with_kwargs=True).remove

    def _replace_forward(self) -> Callable[[], None]:
        """Replace the instance's forward; one that was there comes back, one that came on top of ours stays."""
        own = self._module.__dict__
        earlier = own.get("forward", _ABSENT)
        runs = self._module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            skipped = any(entry.skips() for entry in self._entries if entry.skips is not None and not entry.runs)
            return input_of(args, kwargs) if skipped else runs(*args, **kwargs)

        def restore() -> None:
            if own.get("forward") is not forward:
                return
            if earlier is _ABSENT:
                del own["forward"]
            else:
                own["forward"] = earlier

        own["forward"] = forward
        return restore

    def enter(self, residual: Tensor) -> Tensor:
        resumed = False
        for entry in list(self._entries):
            if entry.before is not None and not (resumed and entry.turn is Turn.EDIT):
                given, residual = residual, entry.before(residual)
                resumed |= entry.turn is Turn.RESUME and residual is not given
        return residual

    def leave(self, given: Tensor, written: Tensor) -> Tensor:
        skippers = [entry for entry in self._entries if entry.skips is not None and entry.skips()]
        resumed = any(entry.turn is Turn.RESUME for entry in skippers)
        if any(entry.runs for entry in skippers):
            written = given
        for entry in list(self._entries):
            if entry.after is not None and not (resumed and entry.turn is Turn.EDIT):
                before, written = written, entry.after(given, written)
                resumed |= entry.turn is Turn.RESUME and written is not before
        return written

    @property
    def replays(self) -> bool:
        return all(entry.replays for entry in self._entries)


class _Hook:
    """A hook of a stack; `replays` says whether a recorded graph replays all of it."""

    def __init__(self, stack: LayerStack) -> None:
        self._stack = stack

    @property
    def replays(self) -> bool:
        return self._stack.replays


class _Before(_Hook):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        given = input_of(args, kwargs)
        changed = self._stack.enter(given)
        if changed is given:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})


class _After(_Hook):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        written = residual_of(output)
        changed = self._stack.leave(input_of(args, kwargs), written)
        if changed is written:
            return None
        return type(output)([changed, *output[1:]]) if isinstance(output, (tuple, list)) else changed


_stacks: dict[nn.Module, LayerStack] = {}  # of the modules that have an entry


def stack_of(module: nn.Module) -> LayerStack:
    """The one stack of a module."""
    return _stacks.setdefault(module, LayerStack(module))


def input_of(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def residual_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output
