"""Maps of patches as one self-contained page, that runs no script and fetches nothing."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path

from probekit.files import atomic_text

STYLE = (
    ":root{color-scheme:light dark}body{font:14px/1.5 system-ui,sans-serif;margin:2em}"
    "div{overflow-x:auto}table{border-collapse:collapse;margin:0 0 2em}"
    "caption{text-align:left;font-weight:600;padding:.4em 0}th,td{padding:.15em .45em;text-align:right;"
    "white-space:pre;font-variant-numeric:tabular-nums}th{font-weight:400}"
)


def write_patch_page(tables: str, model: str, path: Path) -> None:
    """tables: HTML of `Patching.to_html`, in which texts are escaped."""
    # Cells carry their colours as style attributes, which a hash does not cover.
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src-elem 'sha256-{digest}'; style-src-attr 'unsafe-inline'"
    title = f"What patches of {model} restore"
    atomic_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1><div>{tables}</div></body></html>",
    )
