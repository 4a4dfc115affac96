"""The command line: the only place that parses arguments or prints."""

from __future__ import annotations

from probekit.cli.app import main

__all__ = ["main"]
