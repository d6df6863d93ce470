"""Each figure of a run as a PNG, by kaleido, which asks a Chrome or Chromium on this machine to draw it."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
import plotly.io

from ..errors import ConfigError
from ..runs import RunFolder
from .page import tell
from .plots import text

WIDTH = 1000
SCALE = 2
"""Pixels of the file for each of the page's."""


def write_pngs(run: RunFolder | str | Path, target: str | Path) -> list[Path]:
    """Write one PNG for each figure that the run has readings for.

    Args:
        run: The folder.
        target: The folder to write to; it is made when it is not there. Files of the same names are replaced.

    Returns:
        The files, `<figure>.png`, in the order of the page.

    Raises:
        ConfigError: kaleido is not installed, finds no browser, or the folder cannot be written.
        CheckpointError: It is no run folder, or is damaged.
    """
    check_kaleido()
    folder, target = run if isinstance(run, RunFolder) else RunFolder.open(run), Path(target)
    panels = [panel for section in tell(folder).sections for panel in section.panels]
    figures = {panel.key: _on_paper(panel.figure, panel.title) for panel in panels if panel.figure is not None}
    files = [target / f"{key}.png" for key in figures]
    draw_files(list(figures.values()), files, WIDTH, [figure.layout.height for figure in figures.values()])
    return files


def check_kaleido() -> None:
    """Refuse to begin where figures cannot be drawn.

    Raises:
        ConfigError: kaleido is not installed, or plotly is too old for it.
    """
    if importlib.util.find_spec("kaleido") is None or not hasattr(plotly.io, "write_images"):  # from plotly 6.1 on
        raise ConfigError('a PNG of a figure needs kaleido: pip install "steadyrank[png]"; the report needs nothing')


def draw_files(figures: Sequence[go.Figure], files: Sequence[Path], width: int, heights: Sequence[int]) -> None:
    """Write figures as PNGs into one folder, which is made when it is not there; files that are there are replaced.

    Args:
        figures: As they are to be drawn.
        files: One for each.
        width, heights: In pixels of a page; a file has `SCALE` times as many.

    Raises:
        ConfigError: kaleido is not installed, finds no browser, or the folder cannot be written.
    """
    check_kaleido()
    if not files:
        return
    target = files[0].parent
    try:
        target.mkdir(parents=True, exist_ok=True)
        plotly.io.write_images(list(figures), list(files), width=width, height=list(heights), scale=SCALE)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror or error}; choose another --png") from error
    except RuntimeError as error:  # kaleido's answer where no browser is found, or where it does not start
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(
            "a PNG of a figure needs Chrome or Chromium, and none could be started. Install one (Debian: apt install "
            f"chromium), or run plotly_get_chrome; BROWSER_PATH names one elsewhere. ({first})"
        ) from error


def _on_paper(figure: go.Figure, title: str) -> go.Figure:
    """Return the figure with its title, dark ink on white, and room for plotly's own legend."""
    height = figure.layout.height or 300
    figure.update_layout(
        title={"text": text(title), "x": 0.01, "y": 1, "yanchor": "top", "pad": {"t": 14}, "font": {"size": 16}},
        margin={"t": 90 if figure.layout.showlegend else 56, "r": 24},
        height=height + 60,
        font_color="#1d232b",
        paper_bgcolor="white",
    )
    figure.update_shapes({"line_color": "#5b6470"}, selector={"type": "line"})
    return figure
