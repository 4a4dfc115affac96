"""A finished study's figures to an experiment tracker: Weights & Biases or MLflow, as the machine has them set up."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from probekit.errors import InputError

TRACKERS = ("wandb", "mlflow")


def check_tracker(name: str) -> str:
    """Return `name`, or raise InputError where there is no such tracker, or it is not installed."""
    if name not in TRACKERS:
        raise InputError(f"results are logged to {' or '.join(TRACKERS)}, not to {name!r}.")
    try:
        import_module(name)
    except ImportError as error:
        raise InputError(f"{name} cannot be imported: {error}.", f"Install it: pip install {name}.") from None
    return name


def log_study(tracker: str, folder: Path, summary: Mapping[str, Any]) -> None:
    """One run a model: settings as parameters, the choice's figures as metrics, report and tables as artifacts.

    Where a run goes (server, project, offline) is the tracker's own business: its environment variables hold.
    """
    check_tracker(tracker)
    files = [folder / "report.html", folder / "summary.json", *sorted((folder / "tables").glob("*.csv"))]
    for model in summary["models"]:
        settings = {name: str(value) for name, value in summary["settings"].items()}
        (_to_wandb if tracker == "wandb" else _to_mlflow)(
            f"probekit {model['name']}", settings | {"model": str(model["reference"])}, metrics_of(model), files
        )


def metrics_of(model: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one model, flat: what was predicted, what was measured, agreement by layer."""
    choice, measured = model["choice"], model["chosen_validation"] or {}
    low, high = choice["interval"] or (None, None)
    found = {
        "speculate": float(choice["speculate"]),
        "exit_layer": choice["exit_layer"],
        "draft_length": choice["draft_length"],
        "speedup_predicted": choice["speedup"],
        "speedup_predicted_low": low,
        "speedup_predicted_high": high,
        "speedup_measured": measured.get("speedup_measured"),
        **{f"agreement_layer_{layer:03d}": share for layer, share in enumerate(model["agreement"])},
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def _to_wandb(name: str, settings: dict[str, str], metrics: dict[str, float], files: list[Path]) -> None:
    wandb: Any = import_module("wandb")
    run = wandb.init(project="probekit", name=name, config=settings, reinit="create_new")
    try:
        run.log(metrics)
        artifact = wandb.Artifact("study", type="probekit-study")
        for file in files:
            artifact.add_file(str(file))
        run.log_artifact(artifact)
    finally:
        run.finish()


def _to_mlflow(name: str, settings: dict[str, str], metrics: dict[str, float], files: list[Path]) -> None:
    mlflow: Any = import_module("mlflow")
    with mlflow.start_run(run_name=name):
        mlflow.log_params(settings)
        mlflow.log_metrics(metrics)
        for file in files:
            mlflow.log_artifact(str(file))
