"""Every command, in the order in which a newcomer meets them."""

from __future__ import annotations

from collections.abc import Callable

from probekit.cli.deciding import choose, predict, validate
from probekit.cli.looking import compare, inspect, lens, models, report
from probekit.cli.running import decode, fit_heads, study, trace

ALL: tuple[Callable[..., None], ...] = (
    models,
    inspect,
    lens,
    trace,
    predict,
    choose,
    decode,
    validate,
    fit_heads,
    compare,
    report,
    study,
)


def name_of(command: Callable[..., None]) -> str:
    """What a command is called on the command line."""
    return command.__name__.rstrip("_").replace("_", "-")
