"""Pages as a browser reads them, for the tests of the report."""

import base64
import gzip
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest


class Page(HTMLParser):
    """A page's tags with their attributes, its visible text, and the figures that lie in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")
        self.text += "" if tag in ("span", "strong", "code", "wbr") else " "

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data

    def links(self) -> list[str | None]:
        """What the page would fetch, or lead to."""
        return [
            v for _, attributes in self.tags for k, v in attributes.items() if k in ("src", "href", "srcset", "data")
        ]

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        """The attributes of the tags that have a class."""
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]

    def figures(self) -> dict[str, Any]:
        """The figures by key, as plotly's JSON."""
        packed = re.search(r'id="figure-data">(.*?)</script>', self.source, re.DOTALL)
        assert packed is not None
        found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed[1])))
        return found


def browse(path: Path, profile: Path, *, width: int = 1280, dark: bool = False) -> str:
    """Open a page in headless Chromium and return the document as it stands then."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on PATH")
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage"]
    flags = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    flags += [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run(
        [chromium, *flags, f"--user-data-dir={profile}", "--virtual-time-budget=8000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout
