"""Write docs/stability.md and its pictures from the results beside this script.

    python benchmarks/stability/page.py [--no-figures]

Every number, and every judgment, comes from NAME.csv and NAME.json, which paper.py writes; prose that does not depend
on results stands in notes.py. Pictures need kaleido and a Chromium. A test compares the page with what this makes.
"""

import argparse
import sys
from pathlib import Path

import claims
import notes
import tables
from ablation import arm_rows, read_arms, tell_arms
from pictures import Picture, log_picture, model_pictures, run_pictures, run_rows, tell_factors, write_pictures
from results import HERE, LOGS, PAPER, SIZES, Result, Study, method, tell_command, tell_source
from table2 import model_table, notes_on

from steadyrank.errors import SteadyRankError
from steadyrank.ladder.scores import choose, conclude

ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "stability.md"
PICTURES = ROOT / "docs" / "stability"


def make_page(study: Study) -> tuple[str, list[Picture]]:
    """Return the page, and the pictures on it."""
    pictures: list[Picture] = []
    sections = {
        "In short": _short(study),
        "What is measured": notes.MEASURED,
        "The paper's table 2": _table2(study),
        "Quality and effective rate by rate": _by_rate(study, pictures),
        "Tuning": _tuning(study),
        "The paper's ablation": _ablation(study),
        "Single runs, before and after": _runs(study, pictures),
        "What the paper lacks": _modern(study),
        "Set the bound, forget the rate": _bound(study),
        "Incidents": _incidents(study),
        "Real logs": _logs(study, pictures),
        "Limits": notes.LIMITS,
    }
    text = notes.HEAD + "".join(f"\n## {title}\n\n{body.rstrip()}\n" for title, body in sections.items())
    return text, pictures


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _short(study: Study) -> str:
    missing = [name for name in PAPER.values() if study.get(name) is None]
    parts = [tell_source(None, name) for name in missing]
    if len(missing) < len(PAPER):
        parts += [
            "**How high the rate may go.** Aims, on Large+DCN: eight times the largest stable rate of its base, four "
            "times that of the best rival.",
            _bullets(claims.aims(study)),
            tables.stable_table(study),
            "**How well each learns at its own best rate.**",
            _bullets(claims.qualities(study)),
            "**By how much the rate may be missed**: the rates within .01 AUC of a method's best one.",
            tables.methods_table(study, claims.tell_range),
            "**How many times its best rate a method stays stable**, which can be compared between methods whose rates "
            "are not the same thing.",
            tables.methods_table(study, claims.tell_room),
            "**What to take.**",
            _bullets(claims.recommend(study)),
        ]
    return "\n\n".join(part for part in parts if part)


def _table2(study: Study) -> str:
    parts = [notes.TABLE2.rstrip()]
    for model, name in PAPER.items():
        result = study.get(name)
        parts += [f"### {SIZES[model]}", tell_source(result, name)]
        if result is not None:
            parts += [model_table(study, model), _bullets(notes_on(study, model))]
    return "\n\n".join(part for part in parts if part)


def _by_rate(study: Study, pictures: list[Picture]) -> str:
    parts = []
    for model, name in PAPER.items():
        found = model_pictures(study, model)
        pictures += found
        parts += [picture.link for picture in found] or [f"{SIZES[model]}: not run yet: {tell_command(name)}."]
    return "\n\n".join(parts)


def _tuning(study: Study) -> str:
    result = study.get("tune")
    parts = [tell_source(result, "tune")]
    if result is not None:
        parts.append(notes.TUNING.rstrip())
        parts.append(tables.tuning_table(result))
    return "\n\n".join(parts)


def _ablation(study: Study) -> str:
    result = study.get("ablation")
    arms = read_arms(result) if result else []
    parts = [tell_source(result, "ablation")]
    if arms:
        titles = ["arm", "unstable", "95 % interval", "diverged / never learned / collapsed"]
        titles += ["p, against as it is", "the paper", "Clippy unstable"]
        parts += [
            notes.ABLATION.rstrip(),
            tables.markdown(titles, arm_rows(arms)),
            tell_arms(arms),
        ]
    return "\n\n".join(parts)


def _runs(study: Study, pictures: list[Picture]) -> str:
    found = run_pictures(study.folder)
    pictures += found
    result, drawn = study.get("figures"), "`python benchmarks/stability/dynamics.py --from runs/paper/figures`"
    source = tell_source(result, "figures") if result or not found else f"{tell_command('figures')}."
    if not found:
        return f"{source} Then {drawn}."
    titles = ["run", "rate", "healthy", "diverged and came back", "diverged for good", "never learned"]
    table = tables.markdown(titles, run_rows(study.folder))
    links = [picture.link for picture in found]
    return "\n\n".join([source, f"Series by {drawn}.", notes.RUNS.rstrip(), table, *links, tell_factors(study.folder)])


def _modern(study: Study) -> str:
    both = study.joined(PAPER[claims.AIM_MODEL], "modern")
    parts = [tell_source(study.get("modern"), "modern")]
    if both is not None:
        parts.append(notes.MODERN.rstrip())
        parts += tables.modern_tables(both)
    return "\n\n".join(parts)


def _bound(study: Study) -> str:
    parts = [
        notes.BOUND.rstrip(),
        tables.one_rate_table(study) if claims.places(study) else "",
        _bullets([claims.tell_one_rate(study, name) for name in ("adam", "agc_adam", "clippy_adam")])
        if claims.places(study)
        else "",
        "### Other batches, and four times as long",
    ]
    bound = study.get("bound")
    parts.append(tell_source(bound, "bound"))
    for model in bound.models() if bound else []:
        scores = [score for score in bound.scores if score.model == model] if bound else []
        parts += [f"**{claims.BOUND.get(model, model)}**, AUC by rate:", tables.by_rate_table(scores)]
    thresholds = study.get("thresholds")
    parts += ["### Other thresholds", tell_source(thresholds, "thresholds")]
    if thresholds is not None:
        usual = study.of_model(claims.AIM_MODEL, "clippy_adam")
        parts += ["Clippy on Adam on Large+DCN, AUC by rate:", tables.thresholds_table(thresholds, usual)]
    return "\n\n".join(part for part in parts if part)


INCIDENTS = {
    "none": "Undisturbed, for comparison",
    "shift": "Tastes turn halfway, within a moment and for good",
    "units": "A label comes ten times as large for 2 % of the rows (rating)",
}


def _incidents(study: Study) -> str:
    result = study.get("incidents")
    parts = [tell_source(result, "incidents")]
    for incident in dict.fromkeys(score.incident for score in result.scores) if result else ():
        parts.append(f"### {INCIDENTS.get(incident, incident)}")
        parts.append(tables.incident_table(result, incident) if result else "")
    return "\n\n".join(parts)


def _logs(study: Study, pictures: list[Picture]) -> str:
    parts = [notes.LOGS.rstrip()]
    for log, title in LOGS.items():
        result = study.get(log)
        parts += [f"### {title}", tell_source(result, log)]
        if result is not None:
            found = log_picture(study, log)
            pictures += found
            parts += [tables.scores_table(result.scores), _conclusions(result), *(picture.link for picture in found)]
    return "\n\n".join(parts)


def _conclusions(result: Result) -> str:
    ours = [score for score in choose(result.scores) if "clippy" in score.optimizer]
    return _bullets([f"**{method(score.optimizer)}:** {conclude(score, result.scores)}" for score in ours])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-figures", action="store_true", help="write the page only, and leave its pictures")
    parser.add_argument("--results", type=Path, default=HERE, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=PAGE, help=argparse.SUPPRESS)
    given = parser.parse_args()
    text, pictures = make_page(Study(given.results))
    given.out.write_text(text)
    print(f"wrote {given.out}")
    if not given.no_figures:
        try:
            write_pictures(pictures, given.out.with_suffix(""))
        except SteadyRankError as error:
            sys.exit(f"the page is written; its pictures are not: {error}")
        print(f"wrote {len(pictures)} pictures")


if __name__ == "__main__":
    main()
