"""A ladder in the terminal while it is trained: a mark for each cell, and the time left."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..terminal import console, escape, say
from .grid import Cell
from .outcomes import Outcome, find_learnable
from .pool import News

MARKS = {
    "healthy": ("●", "green"),
    "micro_divergence": ("◐", "yellow"),
    "miscalibrated": ("▲", "blue"),
    "never_learned": ("○", "magenta"),
    "full_divergence": ("×", "red"),
    "failed": ("!", "red"),
    "training": ("▸", "cyan"),
    "waiting": ("·", "dim"),
}
"""How the state of a cell is shown."""
_MOST_ROWS = 40
Arm = tuple[str, str, str]
"""Incident, model and optimizer."""


class Board:
    """What is known of each cell of a ladder.

    >>> board = Board()
    >>> board.seconds_left() is None
    True
    """

    def __init__(self) -> None:
        self.cells: list[Cell] = []
        self.workers = 1
        self.outcomes: dict[str, Outcome] = {}
        self.failed: dict[str, str] = {}
        self._begun: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._costs: dict[str, float] = {}

    def begin(self, cells: Sequence[Cell], workers: int, outcomes: Sequence[Outcome]) -> None:
        """Take in all cells, and the outcomes of those that ended before."""
        self.cells, self.workers = list(cells), workers
        self.outcomes = {outcome.cell: outcome for outcome in outcomes}

    def hear(self, news: News, outcome: Outcome | None) -> None:
        """Take in what a cell's process says, with the outcome where it has ended."""
        now = time.monotonic()
        if news.kind == "began":
            self._begun[news.cell] = now
        elif news.kind == "progress":
            self._done[news.cell] = news.done
        else:
            self._done.pop(news.cell, None)
            self._costs[news.cell] = now - self._begun.pop(news.cell, now)
        if news.kind == "failed":
            self.failed[news.cell] = news.words
        if outcome is not None:
            self.outcomes[news.cell] = outcome

    def seconds_left(self) -> float | None:
        """Return the time left; None before a cell has ended. A cell costs what those of its model have cost so far."""
        model = {cell.name: cell.model for cell in self.cells}
        costs = defaultdict(list)
        for name, cost in self._costs.items():
            costs[model[name]].append(cost)
        if not costs:
            return None
        usual = {key: sum(found) / len(found) for key, found in costs.items()}
        anyone = sum(self._costs.values()) / len(self._costs)
        left = [cell for cell in self.cells if cell.name not in self.outcomes and cell.name not in self.failed]
        work = sum(usual.get(cell.model, anyone) * (1 - self._done.get(cell.name, 0.0)) for cell in left)
        return work / max(min(self.workers, len(left)), 1)

    def state(self, cell: Cell, learnable: Sequence[str]) -> str:
        """Return a key of `MARKS`."""
        if cell.name in self.outcomes:
            return self.outcomes[cell.name].ending(learnable)
        if cell.name in self.failed:
            return "failed"
        return "training" if cell.name in self._begun else "waiting"

    def tried(self) -> int:
        """Return how many cells are done with."""
        return len(self.outcomes) + len(self.failed)


@contextmanager
def showing(board: Board) -> Iterator[None]:
    """Show a board until the block ends; where nobody looks at a terminal, nothing moves."""
    if not console.is_terminal:
        yield
        return
    with Live(get_renderable=lambda: draw(board), console=console, refresh_per_second=2):
        yield


def tell_start(board: Board, folder: Path) -> None:
    """Say what is about to be trained, and where."""
    count, before = len(board.cells), len(board.outcomes)
    words = f"{count:,} cell{'' if count == 1 else 's'} in {folder}"
    if before == count:
        say(f"{words}: all have ended before")
    else:
        known = f", of which {before:,} {'has' if before == 1 else 'have'} ended before" if before else ""
        say(f"{words}{known}; {min(board.workers, count - before)} at once")


def tell(board: Board, news: News, outcome: Outcome | None) -> None:
    """Say in a line how a cell ended, where no board is shown."""
    if console.is_terminal or news.kind not in ("ended", "failed"):
        return
    left = board.seconds_left()
    rest = f", {show_seconds(left)} left" if left is not None and board.tried() < len(board.cells) else ""
    words = f"failed: {news.words}"
    if outcome is not None:
        alike = [o for o in board.outcomes.values() if (o.incident, o.model) == (outcome.incident, outcome.model)]
        words = f"{outcome.ending(find_learnable(alike)).replace('_', ' ')}, quality {outcome.quality():.4f}"
    say(f"{board.tried()}/{len(board.cells)} {news.cell}: {words}{rest}")


def draw(board: Board) -> RenderableType:
    """Draw a board: an arm in a row, a rate in a column, a mark for each seed."""
    if not board.cells:
        return Text("looking at what is there")
    arms = list(dict.fromkeys((cell.incident, cell.model, cell.optimizer) for cell in board.cells))
    rates = sorted({cell.rate for cell in board.cells})
    learnable = {}
    for incident, model, _ in arms:
        found = [o for o in board.outcomes.values() if (o.incident, o.model) == (incident, model)]
        learnable[incident, model] = find_learnable(found)
    states: dict[tuple[Arm, float], list[str]] = defaultdict(list)
    for cell in board.cells:
        state = board.state(cell, learnable[cell.incident, cell.model])
        states[(cell.incident, cell.model, cell.optimizer), cell.rate].append(state)
    shown = arms if len(arms) <= _MOST_ROWS else _under_way(arms, states)
    table = _draw_marks(shown, rates, states)
    met = {state for of in states.values() for state in of}
    legend = Columns([Text.assemble(MARKS[state], f" {state.replace('_', ' ')}") for state in MARKS if state in met])
    left = board.seconds_left()
    line = f"{board.tried()} of {len(board.cells)} cells, {board.workers} at once" + (
        f", {show_seconds(left)} left" if left is not None and board.tried() < len(board.cells) else ""
    )
    foot = Table.grid()  # a bar alone does not end its line
    foot.add_row(ProgressBar(total=len(board.cells), completed=board.tried(), width=min(60, console.width)))
    foot.add_row(line)
    return Group(table, legend, foot)


def _draw_marks(
    arms: Sequence[Arm], rates: Sequence[float], states: Mapping[tuple[Arm, float], Sequence[str]]
) -> Table:
    """Draw the marks of each arm below its rates; where the terminal is too narrow for all rates, in one column."""
    names = [" ".join(part for part in arm if part) for arm in arms]
    marks = {place: Text.assemble(*(MARKS[state] for state in of)) for place, of in states.items()}
    widths = [max(len(f"{r:g}"), *(len(marks.get((arm, r), "")) for arm in arms)) + 3 for r in rates]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    if max(map(len, names)) + sum(widths) + 6 <= console.width:
        for rate in rates:
            table.add_column(f"{rate:g}", justify="center")
        for arm, name in zip(arms, names, strict=True):
            table.add_row(escape(name), *(marks.get((arm, rate), Text()) for rate in rates))
        return table
    table.add_column("rates", no_wrap=True)
    table.add_column("from the lowest upwards")
    for arm, name in zip(arms, names, strict=True):
        own = [rate for rate in rates if (arm, rate) in marks]
        table.add_row(escape(name), f"{own[0]:g}–{own[-1]:g}", Text(" ").join(marks[arm, rate] for rate in own))
    return table


def _under_way(arms: list[Arm], states: Mapping[tuple[Arm, float], Sequence[str]]) -> list[Arm]:
    """Return the arms that are trained now and those around them: a terminal shows no hundred rows."""
    active = [i for i, arm in enumerate(arms) if any("training" in of for (a, _), of in states.items() if a == arm)]
    first = max(min(active, default=0) - 5, 0)
    return arms[first : first + _MOST_ROWS]


def show_seconds(seconds: float) -> str:
    """Return a duration in words.

    >>> show_seconds(50.0), show_seconds(600.0), show_seconds(7_000.0)
    ('50 s', '10 min', '1 h 57 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
