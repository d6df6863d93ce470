"""The pictures of docs/stability.md: quality and effective rate of each model, and single runs as they diverge."""

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from results import LOGS, PAPER, SIZES, Result, Study, method

from steadyrank.ladder.figures import colours_of, moved_panel, quality_panel, write_png
from steadyrank.ladder.scores import Score
from steadyrank.report.plots import PALETTE, Panel, new_figure

ON_ADAGRAD = ("adagrad", "gc", "agc", "lamb", "clippy", "clippy_delayed", "clippy_tight")
ON_ADAM = ("adam", "agc_adam", "clippy_adam")
RUNS = {
    "healthy": "Adam, no incident",
    "micro": "Adam, incident",
    "full": "Adam at eight times the rate, incident",
    "clippy": "Clippy on Adam at that rate, incident",
}
"""The runs of figures.toml, and what they are called."""
FACTORS = {
    "factor_gc": "GC (0.1)",
    "factor_agc": "AGC (0.01)",
    "factor_clippy": "Clippy (0.5, 0.01)",
    "factor_lamb": "LAMB",
}
FACTORS_FILE = "figure_factors.csv"
NORMS = {"gradient_norm": "‖g‖", "gradient_over_weight": "‖g‖ / ‖w‖", "direction_max": "max |r|"}


class Picture:
    """A picture of the page."""

    def __init__(
        self, name: str, title: str, how: str, draw: Callable[[], go.Figure | None], size: tuple[int, int]
    ) -> None:
        self.name, self.title, self.how, self.draw, self.size = name, title, how, draw, size

    @property
    def link(self) -> str:
        """Return the picture and how to read it, for the page."""
        return f"![{self.title}](stability/{self.name}.png)\n\n*{self.title}.* {self.how}"


def model_pictures(study: Study, model: str) -> list[Picture]:
    """Return quality on either base, and the effective rate, of one of the paper's models."""
    result = study.get(PAPER[model])
    if result is None:
        return []
    title, found = SIZES[model], []
    for base, names in (("Adagrad", ON_ADAGRAD), ("Adam", ON_ADAM)):
        scores = [score for score in result.scores if score.optimizer in names]
        if scores:
            found.append(_panel_picture(f"{model}_{base.lower()}", f"{title}, {base}", quality_panel, scores, result))
    found.append(_panel_picture(f"{model}_moved", title, moved_panel, result.scores, result))
    return found


def log_picture(study: Study, log: str) -> list[Picture]:
    """Return the quality of all methods on a real log."""
    result = study.get(log)
    return [_panel_picture(log, LOGS[log], quality_panel, result.scores, result)] if result else []


def _panel_picture(
    name: str, title: str, panel: Callable[..., Panel], scores: Sequence[Score], result: Result
) -> Picture:
    """Return one of the laboratory's own panels as a picture."""
    drawn = panel(scores, colours_of(result.scores))

    def draw() -> go.Figure | None:
        if drawn.figure is None:
            return None
        figure = go.Figure(drawn.figure)
        if panel is moved_panel:  # a run that died moves nothing, which would make the axis linear
            figure.for_each_trace(lambda trace: trace.update(y=[y if y > 0 else None for y in trace.y]))
            figure.update_yaxes(type="log", tickformat="~g", dtick=1, range=[-4, -0.8])
        figure.for_each_trace(lambda trace: trace.update(visible=True, name=method(trace.name)))
        return figure

    how = drawn.how + (" A collapsed run is drawn by its losses, mostly as healthy." if panel is quality_panel else "")
    return Picture(name, f"{drawn.title}: {title}", how, draw, (760, 420))


Series = Mapping[str, Mapping[str, np.ndarray]]
"""By run (or layer): columns by name, with "step"."""


def read_series(path: Path, key: str) -> Series:
    """Return a figure's CSV by the values of one column, its others as numbers; nothing where there is no file."""
    if not path.exists():
        return {}
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows[row.pop(key)].append(row)
    return {
        name: {column: np.array([float(row[column] or math.nan) for row in of]) for column in of[0]}
        for name, of in rows.items()
    }


def run_pictures(folder: Path) -> list[Picture]:
    """Return the pictures of single runs, as in the paper's figures 4 to 8; none where the runs are not there."""
    losses, aucs = (read_series(folder / f"figure_{name}.csv", "run") for name in ("loss", "auc"))
    layer = read_series(folder / "figure_layer.csv", "run")
    factors = read_series(folder / FACTORS_FILE, "layer")
    if not (losses and aucs and layer and factors):
        return []
    return [
        Picture(
            "runs",
            "Loss and AUC of four runs",
            "As the paper's figure 4. The loss is that of the click task, the mean of four readings, one every fifth "
            "step; AUC is that of each window of 20 steps, before it is learned.",
            lambda: draw_runs(losses, aucs),
            (760, 480),
        ),
        Picture(
            "layer",
            "The top shared layer of Adam at the high rate, about the incident",
            "As the paper's figures 5 and 6: gradient norm, gradient over weight, the largest coordinate of the "
            "direction; and the factor that each method would have given that very step.",
            lambda: draw_layer(layer),
            (760, 560),
        ),
        Picture(
            "factors",
            "Clippy's factor by layer",
            "As the paper's figure 8: the factor of each shared weight matrix, and of the towers' together, in the run "
            "with Clippy; the median of ten readings, one every fifth step.",
            lambda: draw_factors(factors),
            (760, 360),
        ),
    ]


def draw_runs(losses: Series, aucs: Series) -> go.Figure:
    """Draw loss above AUC, a line for each run."""
    figure = new_figure(make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06))
    for place, (run, words) in enumerate(RUNS.items()):
        line = {"color": PALETTE[place], "width": 2}
        for row, of, column in ((1, losses, "loss"), (2, aucs, "auc")):
            if run in of:
                columns = of[run]
                trace = go.Scatter(x=columns["step"], y=columns[column], name=words, line=line, mode="lines")
                figure.add_trace(trace.update(showlegend=row == 1), row=row, col=1)
    figure.update_yaxes(title_text="click loss", row=1, col=1)
    figure.update_yaxes(title_text="click AUC", row=2, col=1)
    figure.update_xaxes(title_text="", row=1, col=1)
    return figure


def draw_layer(layer: Series) -> go.Figure:
    """Draw norms above factors for the run that diverges."""
    columns = layer["full"]
    figure = new_figure(make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06))
    for row, names, first in ((1, NORMS, 0), (2, FACTORS, len(NORMS))):
        for place, (name, words) in enumerate(names.items()):
            line = {"color": PALETTE[first + place], "width": 2}
            trace = go.Scatter(x=columns["step"], y=columns[name], name=words, line=line, mode="lines")
            figure.add_trace(trace, row=row, col=1)
    figure.update_yaxes(type="log", tickformat="~g", dtick=1)
    first = int(columns["step"][np.nanargmax(columns["gradient_norm"])])
    figure.update_xaxes(range=[first - 80, first + 160])
    figure.update_yaxes(title_text="norms", row=1, col=1)
    figure.update_yaxes(title_text="factor it would give", row=2, col=1)
    figure.update_xaxes(title_text="", row=1, col=1)
    return figure


def draw_factors(factors: Series) -> go.Figure:
    """Draw the clip factor of each weight matrix, from the input up."""
    figure = new_figure()
    for place, (name, columns) in enumerate(factors.items()):
        line = {"color": PALETTE[place % len(PALETTE)], "width": 2, "dash": ("solid", "dash")[place // len(PALETTE)]}
        figure.add_trace(go.Scatter(x=columns["step"], y=columns["factor"], name=name, line=line, mode="lines"))
    figure.update_yaxes(title_text="factor", type="log", tickformat="~g", dtick="D2")
    return figure


def run_rows(folder: Path) -> list[list[str]]:
    """Return a row of the page's table for each of the single runs; none where they are not there."""
    path = folder / "figure_runs.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    kinds = ("healthy", "micro_divergence", "full_divergence", "never_learned")
    return [[RUNS[row["run"]], row["rate"], *(", ".join(row[kind].split()) for kind in kinds)] for row in found]


def tell_factors(folder: Path) -> str:
    """Say which layers Clippy clips most over its run."""
    middle = {name: float(np.median(of["factor"])) for name, of in read_series(folder / FACTORS_FILE, "layer").items()}
    ranked = sorted(middle, key=lambda name: middle[name])
    told = ", ".join(f"`{name}` {middle[name]:.2g}" for name in ranked)
    return f"Median factor over the run, the most clipped first: {told}."


def write_pictures(pictures: Iterable[Picture], folder: Path) -> None:
    """Write all PNGs; a fifth as large where Pillow is there."""
    for picture in pictures:
        figure = picture.draw()
        if figure is not None:
            shrink(write_png(figure, folder / f"{picture.name}.png", *picture.size))


def shrink(path: Path) -> None:
    """Give a picture 128 colours, which a drawing of lines does not miss."""
    if find_spec("PIL") is not None:
        image = import_module("PIL.Image")
        with image.open(path) as whole:
            few = whole.convert("RGB").quantize(128, dither=image.Dither.NONE)
        few.save(path, optimize=True)
