"""The main job: from which layer should each model draft, how many tokens, and what will it gain?

A study is a plan, checked before any work, and a list of named phases that every model goes through. What a phase
made stays on disk, so that an interrupted study goes on where it stopped.
"""

from __future__ import annotations

from typing import Any

from probekit.moved import look_up


def __getattr__(name: str) -> Any:
    return look_up("probekit.study", name)
