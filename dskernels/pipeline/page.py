"""The interactive page: two schedules side by side, one file, no network."""

from __future__ import annotations

from pathlib import Path

_WEB = Path(__file__).parent / "web"


def html() -> str:
    """A self-contained HTML document: style and scripts are inlined, nothing is fetched."""
    page = (_WEB / "page.html").read_text()
    for name in ("style.css", "schedules.js", "app.js"):
        marker = f"/*{name}*/"
        if page.count(marker) != 1:
            raise RuntimeError(f"page.html must name {marker} once")
        page = page.replace(marker, (_WEB / name).read_text())
    return page
