"""Public names that have moved: imports of their old modules keep working, with a DeprecationWarning.

A finder at the end of the import system's list makes a module for an old name, which looks its contents up in the new
ones when they are asked for. Rooms that were single files (`probekit.hooks`, `probekit.study`) ask here themselves.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module: {name: new module, or new module:new name}.
MOVED: Mapping[str, Mapping[str, str]] = {
    "probekit.hooks": {
        "Capture": "probekit.hooks.capture",
        "Edit": "probekit.hooks.edit",
        "Resume": "probekit.hooks.stop_resume",
        "Stop": "probekit.hooks.stop_resume",
        "open_hooks": "probekit.hooks.sites",
    },
    "probekit.study": {"Study": "probekit.study.summary", "run_study": "probekit.study.run"},
    "probekit.models.loading": {
        "BundledModel": "probekit.models.shipped",
        "Loaded": "probekit.models.loaded",
        "bundled_models": "probekit.models.shipped",
        "describe": "probekit.models.loaded",
        "load": "probekit.models.loaded",
    },
    "probekit.lens.heads": dict.fromkeys(
        ("ExitHead", "HeadFit", "fingerprint", "fit_heads", "load_heads", "save_heads"), "probekit.lens.exit_heads"
    ),
    "probekit.lens.recipe": dict.fromkeys(("LayerSkip", "LayerSkipLoss", "exit_loss"), "probekit.training.layerskip"),
    "probekit.tracing.inner_look": {
        "Exit": "probekit.tracing.inspect_prompt",
        "InnerLook": "probekit.tracing.inspect_prompt:Inspection",
        "look_inside": "probekit.tracing.inspect_prompt:inspect_prompt",
    },
    "probekit.tracing.own_text": {"own_texts": "probekit.tracing.self_generated:self_generated_texts"},
    "probekit.tracing.traces": {
        "ExitHeadsRecord": "probekit.traces.manifest",
        "Manifest": "probekit.traces.manifest",
        "ModelRecord": "probekit.traces.manifest",
        "Trace": "probekit.traces.trace",
    },
    "probekit.prediction.acceptance": {
        "Cell": "probekit.prediction.table",
        "Prediction": "probekit.prediction.table",
        "closed_form_tokens_per_round": "probekit.prediction.rounds",
        "expected_rounds": "probekit.prediction.rounds",
        "predict": "probekit.prediction.predict",
        "rounds_of": "probekit.prediction.rounds",
        "run_lengths": "probekit.prediction.run_lengths",
    },
    "probekit.prediction.choice": {
        "Candidate": "probekit.choice.choose",
        "Choice": "probekit.choice.choose",
        "choose": "probekit.choice.choose",
        "export_choice": "probekit.engines.export",
        "speedups": "probekit.choice.choose",
        "transformers_settings": "probekit.engines.transformers",
    },
    "probekit.choice.export": {
        "Pretrained": "probekit.engines.engine",
        "check_export": "probekit.engines.export",
        "export_choice": "probekit.engines.export",
        "sampling_arguments": "probekit.engines.transformers",
        "transformers_settings": "probekit.engines.transformers",
    },
    "probekit.prediction.costs": {
        "Costs": "probekit.costs.profile",
        "measure_costs": "probekit.costs.measure",
        "roofline_costs": "probekit.costs.roofline",
    },
    "probekit.prediction.validation": {
        "CellValidation": "probekit.validation.results",
        "Difference": "probekit.validation.differences",
        "Validation": "probekit.validation.results",
        "transformers_accepted": "probekit.validation.transformers",
        "validate": "probekit.validation.run",
    },
    "probekit.decoding.policies": dict.fromkeys(
        ("ConfidenceThreshold", "FixedLength", "Policy"), "probekit.drafting.policies"
    ),
    "probekit.decoding.self_speculative": {"SelfSpeculative": "probekit.decoding.speculative"},
    "probekit.decoding.engine": {
        "Drafts": "probekit.drafting.trees:DraftTree",
        "Method": "probekit.decoding.decoder:Decoder",
        "Session": "probekit.decoding.batch:DecodeBatch",
    },
    "probekit.tying.comparison": dict.fromkeys(("Comparison", "compare_traces"), "probekit.tying.compare"),
}


def look_up(module: str, name: str) -> Any:
    """What `module` offered as `name`, from where it is now. Raises AttributeError for what it never offered."""
    place = MOVED[module].get(name)
    if place is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home, _, renamed = place.partition(":")
    warnings.warn(f"{module}.{name} has moved to {home}.{renamed or name}", DeprecationWarning, stacklevel=3)
    return getattr(import_module(home), renamed or name)


class _OldModules(MetaPathFinder, Loader):
    """Makes a module for each old name that no file has any more."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__doc__ = f"Moved: {', '.join(sorted(set(MOVED[name].values())))}."
        module.__getattr__ = lambda attribute: look_up(name, attribute)  # type: ignore[method-assign]


def install() -> None:
    """Answer imports of old modules from now on."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())
