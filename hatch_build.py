"""The README as a package index shows it: what it links to is in the repository, at the version's tag."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"(!?)(\[[^\]]*\])\((?!https?://|#)([^)\s]+)\)")


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        home, tag = metadata["urls"]["Homepage"], f"v{metadata['version']}"
        metadata["readme"] = {"content-type": "text/markdown", "text": with_addresses(text, home, tag)}


def with_addresses(markdown: str, home: str, tag: str) -> str:
    """Relative links as addresses in the repository at `home`: pictures the file itself, the rest its page."""
    return RELATIVE.sub(
        lambda found: f"{found[1]}{found[2]}({home}/{'raw' if found[1] else 'blob'}/{tag}/{found[3]})", markdown
    )
