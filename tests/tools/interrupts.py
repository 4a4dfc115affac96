"""Exceptions raised at random points of every public call that touches a model: `python tests/tools/interrupts.py`.

A point is a call of torch, anywhere below the public call: in the model, in the lens, in the choice of a token, between
two hooks. The models carry what a user may have put there: hooks, a `forward` of an instance's own, an adapter. After
each exception everything of the model is as it was, and the next call gives what it gave before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

import probekit  # noqa: E402
from probekit.hooks.capture import Capture  # noqa: E402
from probekit.hooks.edit import Edit  # noqa: E402
from probekit.hooks.stop_resume import Resume, Stop  # noqa: E402
from probekit.lens.exit_heads import fit_heads  # noqa: E402
from probekit.models.synthetic import synthetic  # noqa: E402
from probekit.probing.attribution import attribute  # noqa: E402
from probekit.probing.attribution_patching import attribution_patch  # noqa: E402

IDS = [5, 9, 17, 3]


class Odd(BaseException):
    """An exception that nobody expects."""


KINDS: tuple[type[BaseException], ...] = (
    KeyboardInterrupt, StopIteration, RuntimeError, ValueError, MemoryError, GeneratorExit, SystemExit, OSError,
    torch.OutOfMemoryError, Odd,
)  # fmt: skip


class Raise(TorchFunctionMode):
    """Counts calls of torch; the one of number `at` raises."""

    def __init__(self, at: int = -1, kind: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.at, self.kind, self.calls = at, kind, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "set_grad_enabled" in getattr(function, "__name__", ""):  # torch's own way back from a context
            return function(*args, **(kwargs or {}))
        self.calls += 1
        if self.calls - 1 == self.at:
            raise self.kind("injected")
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------------- models
def with_hooks_and_forwards() -> Any:
    """Hooks before and after, one with arguments by name, and an instance's own forward."""
    model = synthetic("tiny", seed=1).model
    layers = model.model.layers
    layers[1].register_forward_hook(lambda module, inputs, output: None)
    layers[2].self_attn.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output)
    plain = type(layers[3]).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    layers[3].forward = types.MethodType(forward, layers[3])
    model.model.norm.weight.requires_grad_(True)
    return model


def with_an_adapter() -> Any:
    from models.held_states import adapted

    return adapted()


MODELS: dict[str, Callable[[], Any]] = {
    "as it is": lambda: synthetic("tiny", seed=1).model,
    "hooks and forwards of the user's": with_hooks_and_forwards,
    "an adapter": with_an_adapter,
}


def state(model: Any) -> dict[str, Any]:
    """All that a call might leave changed."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = tuple((each, id(value[each])) for each in value) if isinstance(value, dict) else ()
            plain = isinstance(value, (bool, int, float, str, type(None)))
            found[f"{name}.{key}"] = value if plain else (id(value) if not isinstance(value, dict) else 0, held)
        found[f"{name} is"] = type(module)
    for name, weights in model.named_parameters():
        numbers = weights.detach().float().contiguous().view(torch.uint8).numpy().tobytes()
        found[f"{name} weights"] = (hashlib.sha256(numbers).hexdigest(), weights.requires_grad, weights.grad is None)
    found["config"] = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    found["generation"] = json.dumps(model.generation_config.to_dict(), sort_keys=True, default=str)
    found["torch"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
                      torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())  # fmt: skip
    return found


# ----------------------------------------------------------------------------------------------------------- calls
def calls_of(loaded: Any, helper: Any, run: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    parts, ids = loaded.anatomy, torch.tensor([IDS])
    sampling = probekit.Sampling(temperature=1.0, seed=2)

    def within(context: Any) -> Any:
        with context:
            return loaded.model(ids).logits

    def nested() -> Any:
        """Contexts that close in another order than they were opened."""
        first, second = Capture(parts, [1, 3]), Edit(parts, skip=[2])
        first.__enter__()
        second.__enter__()
        try:
            return loaded.model(ids).logits
        finally:
            first.__exit__(None, None, None)
            second.__exit__(None, None, None)

    def traced(**how: Any) -> Any:
        return probekit.trace(loaded, [IDS, IDS[:2]], max_new_tokens=4, **how).texts["new_tokens"].tolist()

    def decoded(**how: Any) -> Any:
        return probekit.decode(loaded, IDS, max_new_tokens=6, **how).tokens

    return {
        "Capture": lambda: within(Capture(parts)),
        "Edit": lambda: within(Edit(parts, skip=[1])),
        "Stop": lambda: within(Stop(parts, 2)),
        "nested contexts": nested,
        "Resume": lambda: _resumed(loaded, parts, ids),
        "trace": traced,
        "trace, sampled": lambda: traced(sampling=sampling, draft_model=helper),
        "trace, agreement": lambda: traced(statistics="agreement"),
        "trace, residuals": lambda: probekit.trace(
            loaded, [IDS], Path(tempfile.mkdtemp(dir=folder)) / "run", max_new_tokens=3, keep_residuals=[1]
        ).outputs(0).tolist(),
        "decode": decoded,
        "decode, self-speculative": lambda: decoded(method="self-speculative", exit_layer=2, draft_length=2),
        "decode, sampled": lambda: decoded(method="self-speculative", exit_layer=2, draft_length=2, sampling=sampling),
        "decode, early exit": lambda: decoded(method="early-exit", exit_layer=2),
        "decode, draft model": lambda: decoded(method="speculative", draft_model=helper, draft_length=2),
        "inspect_prompt": lambda: str(probekit.inspect_prompt(loaded, "abc", max_new_tokens=2)),
        "measure_costs": lambda: probekit.measure_costs(loaded, 8, exit_layers=[2], draft_lengths=[1], repeats=1).depth,
        "validate": lambda: probekit.validate(loaded, run, [(2, 2)], limit=1).holds,
        "patch": lambda: type(probekit.patch(loaded, "abcd", "abxd", "residual")).__name__,
        "attribution_patch": lambda: type(attribution_patch(loaded, "abcd", "abxd", "residual")).__name__,
        "attribute": lambda: type(attribute(loaded, "abcd")).__name__,
        "fit_heads": lambda: sorted(fit_heads(parts, [ids])),
        "wrap": lambda: probekit.wrap(loaded.model, loaded.tokenizer, name="again").depth,
    }  # fmt: skip


def _resumed(loaded: Any, parts: Any, ids: Any) -> Any:
    with Capture(parts, [2]) as capture:
        loaded.model(ids)
    with Resume(parts, 2):
        return loaded.model(inputs_embeds=capture[2]).logits


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# ------------------------------------------------------------------------------------------------------------- run
def inject(exceptions: int, seed: int) -> dict[str, Any]:
    random, faults = Random(seed), list[str]()
    raised, by_call, by_kind, by_model = 0, Counter[str](), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="probekit-interrupts-") as folder:
        held = {}
        for name, make in MODELS.items():
            model = make()
            loaded = probekit.wrap(model, synthetic("tiny", seed=1).tokenizer, name="mine")
            helper = synthetic("tiny-draft", seed=3)
            run = probekit.trace(loaded, [IDS], max_new_tokens=6)
            calls = calls_of(loaded, helper, run, Path(folder))
            held[name] = loaded, helper, calls, {}
        while raised < exceptions:
            name = random.choice(list(MODELS))
            loaded, helper, calls, known = held[name]
            call = random.choice(list(calls))
            if call not in known:
                known[call] = _known(calls[call])
            count, expected = known[call]
            if not count:
                continue
            before = state(loaded.model), state(helper.model)
            kind, at = random.choice(KINDS), random.randrange(count)
            try:
                with Raise(at, kind) as counter:
                    calls[call]()
            except BaseException as error:
                came = type(error).__name__
            else:
                came = "nothing" if counter.calls > at else "not reached"
            if came == "not reached":  # a timed loop took fewer turns
                continue
            raised += 1
            by_call[call] += 1
            by_kind[kind.__name__] += 1
            by_model[name] += 1
            after = state(loaded.model), state(helper.model)
            where = f"{call} on {name}: {kind.__name__} at {at} of {count} ({came})"
            for one, other in zip(before, after, strict=True):
                if changed := sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)):
                    faults.append(f"{where} left {changed[:4]}")
            if random.random() < 0.2 and expected is not None and not same(calls[call](), expected):
                faults.append(f"{where}: the next call gives something else")
            if faults and len(faults) < 10:
                print(faults[-1], flush=True)
    return {"exceptions": raised, "by_call": dict(by_call), "by_kind": dict(by_kind), "by_model": dict(by_model),
            "faults": faults}  # fmt: skip


def _known(call: Callable[[], Any]) -> tuple[int, Any]:
    """How many calls of torch it makes, and what it gives; 0 for one that this model does not take."""
    with suppress(probekit.InputError):
        with Raise() as counter:
            given = call()
        return counter.calls, given
    return 0, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exceptions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="JSON")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    result = inject(asked.exceptions, asked.seed)
    print(json.dumps(result))
    if asked.output:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "schema": "probekit/interrupts/1", "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": asked.seed,
            "machine": {"system": platform.system(), "processor": platform.machine(),
            "python": platform.python_version()},
            "versions": {name: version(name) for name in ("probekit", "torch", "transformers", "peft")}, **result,
        }  # fmt: skip
        asked.output.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
