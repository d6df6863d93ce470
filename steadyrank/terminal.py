"""Lines and progress bars in the terminal: what the command line needs before torch is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import visible

console = Console()
errors = Console(stderr=True)


def escape(text: str) -> str:
    """Return a text, perhaps a name of the log, in which neither rich nor the terminal finds an order."""
    return escape_markup(visible(text))


def say(text: str) -> None:
    """Print a line as it is: paths and commands must survive copying."""
    console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


def complain(error: Exception) -> None:
    """Print an error."""
    errors.print(f"error: {visible(str(error))}", style="red", markup=False, highlight=False, soft_wrap=True)


def say_event(step: int, kind: str, message: str) -> None:
    """Print what a user should see at once, above the progress bar."""
    say(f"step {step:,}: {kind.replace('_', ' ')}: {message}")


@contextmanager
def bar(what: str, unit: str) -> Iterator[Any]:
    """Show a progress bar; yields a function of (done, total)."""
    with Progress(
        TextColumn(f"[bold]{escape(what)}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()
    ) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
