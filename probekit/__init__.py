"""probekit: from which layer should this model draft, how many tokens, and what will it gain?

The public names are loaded on first use, so that importing one room never pays for another.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from probekit import moved

__version__ = "0.1.0"

_ROOMS = {
    "Capture": "probekit.hooks.capture",
    "Edit": "probekit.hooks.edit",
    "InputError": "probekit.errors",
    "Lens": "probekit.lens.lens",
    "ProbekitError": "probekit.errors",
    "Resume": "probekit.hooks.stop_resume",
    "Sampling": "probekit.settings",
    "Stop": "probekit.hooks.stop_resume",
    "Trace": "probekit.traces.trace",
    "anatomy": "probekit.models.anatomy",
    "batch_invariant": "probekit.models.loaded",
    "choose": "probekit.choice.choose",
    "decode": "probekit.decoding.decode",
    "export": "probekit.handover.export",
    "inspect_prompt": "probekit.tracing.inspect_prompt",
    "load": "probekit.models.loaded",
    "load_log": "probekit.tracing.prompts",
    "load_prompts": "probekit.tracing.prompts",
    "look_inside": "probekit.tracing.inspect_prompt",
    "measure_costs": "probekit.costs.measure",
    "patch": "probekit.probing.patching",
    "predict": "probekit.prediction.predict",
    "probe": "probekit.probing.probe",
    "rank": "probekit.choice.rank",
    "run_study": "probekit.study.run",
    "stream_geometry": "probekit.probing.stream_geometry",
    "stream_prompts": "probekit.tracing.prompts",
    "trace": "probekit.tracing.tracer",
    "validate": "probekit.validation.run",
    "validate_ways": "probekit.validation.ways",
    "verify": "probekit.verification.verify",
    "wrap": "probekit.models.loaded",
}

_OLD_NAMES = {"look_inside"}  # they still work, and are no longer shown
__all__ = sorted(_ROOMS.keys() - _OLD_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]

moved.install()

if TYPE_CHECKING:
    from probekit.choice.choose import choose as choose
    from probekit.choice.rank import rank as rank
    from probekit.costs.measure import measure_costs as measure_costs
    from probekit.decoding.decode import decode as decode
    from probekit.errors import InputError as InputError
    from probekit.errors import ProbekitError as ProbekitError
    from probekit.handover.export import export as export
    from probekit.hooks.capture import Capture as Capture
    from probekit.hooks.edit import Edit as Edit
    from probekit.hooks.stop_resume import Resume as Resume
    from probekit.hooks.stop_resume import Stop as Stop
    from probekit.lens.lens import Lens as Lens
    from probekit.models.anatomy import anatomy as anatomy
    from probekit.models.loaded import batch_invariant as batch_invariant
    from probekit.models.loaded import load as load
    from probekit.models.loaded import wrap as wrap
    from probekit.prediction.predict import predict as predict
    from probekit.probing.patching import patch as patch
    from probekit.probing.probe import probe as probe
    from probekit.probing.stream_geometry import stream_geometry as stream_geometry
    from probekit.settings import Sampling as Sampling
    from probekit.study.run import run_study as run_study
    from probekit.traces.trace import Trace as Trace
    from probekit.tracing.inspect_prompt import inspect_prompt as inspect_prompt
    from probekit.tracing.inspect_prompt import look_inside as look_inside
    from probekit.tracing.prompts import load_log as load_log
    from probekit.tracing.prompts import load_prompts as load_prompts
    from probekit.tracing.prompts import stream_prompts as stream_prompts
    from probekit.tracing.tracer import trace as trace
    from probekit.validation.run import validate as validate
    from probekit.validation.ways import validate_ways as validate_ways
    from probekit.verification.verify import verify as verify


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'probekit' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(_ROOMS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
