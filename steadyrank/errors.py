"""Exceptions named by whose fault it is, and the checks that raise them.

A message says what was expected, what came, where, and what to do.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


class SteadyRankError(Exception):
    """The base of every error that this package raises on purpose."""


class ConfigError(SteadyRankError):
    """The configuration is wrong: a key, a value, a path, or two settings that contradict each other."""


class DataError(SteadyRankError):
    """The log is wrong: a file, a column, a type or a value."""


class DivergenceError(SteadyRankError):
    """Training left the finite numbers; the message names the step, the task and the parameter."""


class CheckpointError(SteadyRankError):
    """A checkpoint or a run folder cannot be read or written."""


class RankError(SteadyRankError):
    """A run of several processes has ended because of another one: it failed, is gone, or is not to be reached."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known name closest to `name`, or `""` when none is near.

    >>> nearest("rwos", ["rows", "width"])
    "; did you mean 'rows'?"
    >>> nearest("zzz", ["rows", "width"])
    ''
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


def visible(text: str) -> str:
    """Return a text in which what is not to be seen is spelt out: control characters, but for tabs and line breaks.

    A terminal would obey them. Half a surrogate, as in a file name that is no UTF-8, could not even be printed.

    >>> visible("click" + chr(27) + "]0;title" + chr(7)), visible(chr(0xD800))
    ('click\\\\x1b]0;title\\\\x07', '\\\\ud800')
    """
    return text.encode(errors="backslashreplace").decode().translate(_CONTROLS)


def near_path(path: str | Path) -> str:
    """Return a suggestion for a path that does not exist: the file beside it with the nearest name, or `""`."""
    parent = Path(path).expanduser().parent
    return nearest(Path(path).name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else ""


def check_known(name: object, known: Iterable[str], what: str, error: type[SteadyRankError] = ConfigError) -> None:
    """Raise `error` unless `name` is one of `known`; `what` says what the name stands for.

    >>> check_known("cick", ["click", "like"], "task")
    Traceback (most recent call last):
    ...
    steadyrank.errors.ConfigError: no task 'cick'; did you mean 'click'? (there are: click, like)
    """
    known = list(known)
    if name not in known:
        shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        raise error(f"no {what} '{name}'{nearest(str(name), known)} (there are: {shown})")
