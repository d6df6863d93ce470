"""What every page of ours is made of: templates, figures as JSON, and plotly's script, all of it in one file.

A page needs no network: plotly's script and the figures lie in it, compressed, and the browser inflates them. All text
from the log (names of tasks, columns and files, messages) is escaped by jinja2; base64 holds no tag.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.offline
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .figures import Section
from .words import format_count, format_number


def fill(template: str, sections: Sequence[Section], **values: Any) -> str:
    """Return a page as text: a template with its values and with the figures that could be drawn.

    Args:
        template: A file beside this one.
        sections: Figures under their headings; those that skipped themselves are listed with the reason.
        values: What the template asks for.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=format_number, count=format_count)
    panels = [panel for section in sections for panel in section.panels]
    figures = {
        panel.key: json.loads(panel.figure.to_json(engine="json")) for panel in panels if panel.figure is not None
    }
    drawn = [Section(s.title, [panel for panel in s.panels if panel.figure is not None]) for s in sections]
    return environment.get_template(template).render(
        sections=[section for section in drawn if section.panels],
        skipped=[panel for panel in panels if panel.figure is None],
        figures=pack(json.dumps(figures, separators=(",", ":"))),
        plotly=pack(plotly.offline.get_plotlyjs()) if figures else "",
        **values,
    )


def pack(script: str) -> str:
    """Return a text compressed, in base64: plotly's script takes 2 MB instead of 5.

    >>> gzip.decompress(base64.b64decode(pack("let a = 1"))).decode()
    'let a = 1'
    """
    return base64.b64encode(gzip.compress(script.encode(errors="surrogatepass"), mtime=0)).decode()
