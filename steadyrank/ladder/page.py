"""The page of a ladder: its scores and what they are, pictures over the rates, and a contact sheet of its runs."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import read_text, replace, writing
from ..report import markup
from ..report.words import VERDICTS
from ..runs import RunFolder
from .contact import Sheet, contact_sheet
from .figures import draw_ladder
from .grid import Ladder
from .laboratory import CELLS, LADDER, OUTCOMES, Found
from .outcomes import Outcome
from .scores import Score, choose, rows, score_ladder
from .tables import COLUMNS, SCORES, Line, compare_scores, conclusions, csv_rows, place_of, plain, short

PAGE = "report.html"
_CELLS_SHOWN = 2000
_READINGS = ("loss", "spikes", "headroom", "moved", "factor")
_RATES = {"optimizer.dense.lr": "learning rate", "optimizer.tables.lr": "learning rate of the tables"}


def write_page(ladder: Ladder, found: Found, folder: Path) -> Path:
    """Write scores.csv and report.html into a ladder's folder, whether all of its cells have ended or not.

    Returns:
        The page's path.

    Raises:
        ConfigError: They cannot be written.
    """
    scores = score_ladder(found.outcomes)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(csv_rows(rows(scores, scores[0].optimizer if scores else "")))
    page = render(ladder, found, folder, scores)
    with writing(folder, ConfigError, "choose another --out"):
        replace(folder / SCORES, out.getvalue())
        replace(folder / PAGE, page)
    return folder / PAGE


def render(ladder: Ladder, found: Found, folder: Path, scores: Sequence[Score]) -> str:
    """Return the page as text."""
    endings = {
        outcome.cell: ending
        for score in scores
        for outcome, ending in zip(score.cells.outcomes, score.cells.endings, strict=True)
    }
    lines, chosen = compare_scores(scores), choose(scores)
    config = folder / LADDER
    return markup.fill(
        "ladder.html.j2",
        draw_ladder(scores, _RATES.get(ladder.config.vary, ladder.config.vary)) if scores else [],
        name=ladder.name,
        headline=_headline(list(endings.values())),
        progress=_progress(ladder, found),
        conclusions=[
            {"name": score.optimizer, "place": place_of(score), "words": words, "mark": _mark(score)}
            for score, words in conclusions(scores)
        ],
        columns=[{"title": column.heading, "how": column.how, "files": column.files} for column in COLUMNS],
        groups=_groups(lines, chosen),
        sheet=_sheet(folder, endings),
        cells=_cell_table(found.outcomes[:_CELLS_SHOWN], endings),
        cells_left_out=max(len(found.outcomes) - _CELLS_SHOWN, 0),
        failed=[(name, _hide(reason, folder)) for name, reason in found.failed.items()],
        files={"outcomes": OUTCOMES, "scores": SCORES, "cells": CELLS},
        config=read_text(config) if config.exists() else "",
    )


def _headline(endings: Sequence[str]) -> str:
    """Return how the runs ended in a sentence.

    >>> _headline(["healthy", "full_divergence", "healthy"])
    'Of 3 runs 1 diverged for good, 2 were healthy.'
    """
    counts = Counter(endings)
    if not counts:
        return "No run has ended yet."
    if counts["healthy"] == len(endings):
        return "The run was healthy." if len(endings) == 1 else f"All {len(endings):,} runs were healthy."
    words = {
        "full_divergence": "diverged for good",
        "never_learned": "never learned",
        "miscalibrated": "ended worse than a constant in log loss, but still ranked",
        "micro_divergence": "diverged and came back",
        "healthy": "was healthy" if counts["healthy"] == 1 else "were healthy",
    }
    parts = [f"{counts[kind]:,} {told}" for kind, told in words.items() if counts[kind]]
    return f"Of {len(endings):,} run{'s' if len(endings) > 1 else ''} {', '.join(parts)}."


def _progress(ladder: Ladder, found: Found) -> str:
    """Say what is still to come; empty for a ladder that is whole."""
    ended, failed = len(found.outcomes), len(found.failed)
    parts = [f"{failed} cell{'s' if failed > 1 else ''} failed (see below)"] if failed else []
    if not found.whole:
        total = len(ladder.cells())
        parts.insert(0, f"stopped early: {ended + failed:,} of {total:,} cells were tried; the same command goes on")
    return f"{'; '.join(parts).capitalize()}." if parts else ""


def _mark(score: Score) -> str:
    """Return how a setting's card is coloured: by its runs at the best rate and at twice that rate."""
    near = [rung for rung in (score.best, score.double) if rung is not None]
    if not near or score.unstable_at_best:
        return "bad"
    return "warn" if any(ending != "healthy" for rung in near for ending in rung.endings) else "good"


def _groups(lines: Sequence[Line], chosen: Sequence[Score]) -> list[dict[str, Any]]:
    """Return the table's rows under model and incident; of several settings of a method the chosen one is marked."""
    settings = Counter((line.score.incident, line.score.model, line.score.family) for line in lines)
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        score = line.score
        of_several = settings[score.incident, score.model, score.family] > 1
        row = {
            "name": score.optimizer,
            "family": score.family if of_several and score.family != score.optimizer else "",
            "chosen": of_several and any(score is one for one in chosen),
            "cells": [column.tell_widely(line) for column in COLUMNS],
        }
        groups.setdefault(place_of(score), []).append(row)
    return [{"title": place, "measure": _measure(lines, place), "rows": of} for place, of in groups.items()]


def _measure(lines: Sequence[Line], place: str) -> str:
    return next(line.score.measure for line in lines if place_of(line.score) == place)


def _sheet(folder: Path, endings: Mapping[str, str]) -> Sheet:
    found = [folder / CELLS / name for name in endings]
    return contact_sheet([RunFolder(path) for path in found if path.is_dir()], endings, base=f"{CELLS}/")


def _cell_table(outcomes: Sequence[Outcome], endings: Mapping[str, str]) -> dict[str, Any]:
    """Return a row for each cell, with the columns that any of them has."""
    tasks = list(dict.fromkeys(task for outcome in outcomes for task in outcome.verdicts))
    titles = ["cell", "verdict", "valid", "test", "NRMSE", *_READINGS, "episodes", "steps", "ms a step"]
    made = []
    for outcome in outcomes:
        readings = [getattr(outcome, name) for name in _READINGS]
        mark, words = VERDICTS.get(endings.get(outcome.cell, "no_verdict"), ("", "No verdict"))
        cells = [outcome.cell, words, short(outcome.quality("valid")), short(outcome.quality()), short(outcome.nrmse())]
        cells += [*map(plain, readings), str(outcome.episodes), f"{outcome.steps:,}"]
        cells.append(plain(1000 * outcome.seconds / outcome.steps) if outcome.steps else "–")
        made.append({"mark": mark, "cells": cells, "told": _tell_tasks(outcome, tasks)})
    kept = [i for i in range(len(titles)) if i < 2 or any(row["cells"][i] != "–" for row in made)]
    return {
        "titles": [titles[i] for i in kept],
        "rows": [{**row, "cells": [row["cells"][i] for i in kept]} for row in made],
    }


def _tell_tasks(outcome: Outcome, tasks: Sequence[str]) -> str:
    told = [f"{task}: {outcome.verdicts[task].replace('_', ' ')}" for task in tasks if task in outcome.verdicts]
    return f"{outcome.status}; {', '.join(told)}"


def _hide(reason: str, folder: Path) -> str:
    """Return a reason without the path of this machine."""
    for path in {str(folder.absolute()), str(folder)} - {"."}:
        reason = reason.replace(path + "/", "").replace(path, folder.name)
    return reason
