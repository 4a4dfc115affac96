"""Capture, Stop, Resume, Edit: the only place that registers a hook or replaces a `forward`.

Each is a context manager. It checks its sites first, registers all of its hooks or none, and restores the
model exactly, also after an exception. No model's forward is copied: the layers run as transformers wrote them.
"""

from __future__ import annotations

from typing import Any

from probekit.moved import look_up


def __getattr__(name: str) -> Any:
    return look_up("probekit.hooks", name)
