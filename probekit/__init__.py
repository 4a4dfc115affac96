"""probekit: from which layer should this model draft, how many tokens, and what will it gain?

The public names are loaded on first use, so that importing one room never pays for another.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = {
    "Capture": "probekit.hooks",
    "Edit": "probekit.hooks",
    "InputError": "probekit.errors",
    "Lens": "probekit.lens.lens",
    "ProbekitError": "probekit.errors",
    "Resume": "probekit.hooks",
    "Sampling": "probekit.decoding.sampling",
    "Stop": "probekit.hooks",
    "Trace": "probekit.tracing.traces",
    "anatomy": "probekit.models.anatomy",
    "choose": "probekit.prediction.choice",
    "decode": "probekit.decoding.decode",
    "load": "probekit.models.loading",
    "load_prompts": "probekit.tracing.prompts",
    "look_inside": "probekit.tracing.inner_look",
    "measure_costs": "probekit.prediction.costs",
    "predict": "probekit.prediction.acceptance",
    "run_study": "probekit.study",
    "trace": "probekit.tracing.tracer",
    "validate": "probekit.prediction.validation",
}

__all__ = sorted(_ROOMS)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from probekit.decoding.decode import decode as decode
    from probekit.decoding.sampling import Sampling as Sampling
    from probekit.errors import InputError as InputError
    from probekit.errors import ProbekitError as ProbekitError
    from probekit.hooks import Capture as Capture
    from probekit.hooks import Edit as Edit
    from probekit.hooks import Resume as Resume
    from probekit.hooks import Stop as Stop
    from probekit.lens.lens import Lens as Lens
    from probekit.models.anatomy import anatomy as anatomy
    from probekit.models.loading import load as load
    from probekit.prediction.acceptance import predict as predict
    from probekit.prediction.choice import choose as choose
    from probekit.prediction.costs import measure_costs as measure_costs
    from probekit.prediction.validation import validate as validate
    from probekit.study import run_study as run_study
    from probekit.tracing.inner_look import look_inside as look_inside
    from probekit.tracing.prompts import load_prompts as load_prompts
    from probekit.tracing.tracer import trace as trace
    from probekit.tracing.traces import Trace as Trace


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'probekit' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(_ROOMS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
