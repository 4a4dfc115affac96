"""Every command, in the order in which a newcomer meets them."""

from __future__ import annotations

from collections.abc import Callable

from probekit.cli.choose import choose
from probekit.cli.compare import compare
from probekit.cli.decode import decode
from probekit.cli.export import export
from probekit.cli.figures import figures
from probekit.cli.fit_heads import fit_heads
from probekit.cli.geometry import geometry
from probekit.cli.inspect import inspect
from probekit.cli.lens import lens
from probekit.cli.measure_engine import costs
from probekit.cli.models import models
from probekit.cli.patch import patch
from probekit.cli.predict import predict
from probekit.cli.probe import probe
from probekit.cli.rank import rank
from probekit.cli.report import report
from probekit.cli.study import study
from probekit.cli.trace import trace
from probekit.cli.validate import validate
from probekit.cli.verify import verify

ALL: tuple[Callable[..., None], ...] = (
    models,
    inspect,
    lens,
    patch,
    trace,
    predict,
    choose,
    rank,
    probe,
    geometry,
    costs,
    export,
    decode,
    validate,
    fit_heads,
    compare,
    report,
    study,
    figures,
    verify,
)


def name_of(command: Callable[..., None]) -> str:
    """What a command is called on the command line."""
    return command.__name__.rstrip("_").replace("_", "-")
