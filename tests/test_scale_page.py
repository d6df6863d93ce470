"""docs/scale.md: its tables are those of the committed results, and its formulas agree with what was counted."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scale_tables")


@pytest.fixture
def found() -> dict[str, Any]:
    newest = max((ROOT / "benchmarks").glob("scale_*.json"), key=lambda path: path.stem[-10:])
    return dict(json.loads(newest.read_text(encoding="utf-8")))


def test_the_page_shows_the_committed_results(made: Any, found: dict[str, Any]) -> None:
    page, tables = PAGE.read_text(encoding="utf-8"), made.tables(found)
    assert set(re.findall(r"<!-- (.*) -->", page)) == tables.keys()
    assert made.fill(page, tables) == page, "run: python benchmarks/scale.py --write"


def test_tables_are_put_in_their_places(made: Any) -> None:
    page = "<!-- A -->\n| old |\n| --- |\n\ntext\n<!-- B -->\n\nend"
    assert made.fill(page, {"A": "| new |", "B": "| b |"}) == "<!-- A -->\n| new |\n\ntext\n<!-- B -->\n| b |\n\nend"


def test_the_formulas_agree_with_what_was_counted(made: Any, found: dict[str, Any]) -> None:
    runs = [(run, made.counts_of(run)) for run in found["bytes"]]
    for part, (_, formula) in made.FORMULAS.items():
        name = part.replace(", whole", "").replace(", cut", "")
        chosen = [
            (run, c) for run, c in runs if name in run["sent"] and (name == part or c["cut"] == (", cut" in part))
        ]
        assert chosen, part
        for run, counts in chosen:
            assert run["sent"][name] == pytest.approx(formula(counts), rel=0.05, abs=200), (part, run["name"])
    for run, _ in runs:  # nothing that crosses is missing, besides headers and what TCP repeats
        total = sum(run["sent"].values())
        crossed = run["network"] - made.OVERHEAD * run["packets"] - made.FRAME * run["again"]
        assert crossed == pytest.approx(total, rel=0.01), run["name"]


def test_what_gpus_would_send(made: Any) -> None:
    job = made.Job(10**9, 16, 8)
    sent = made.tables_sent(job, {"table_wise": 24})
    # Three features on each of 8 GPUs: ids (16 bytes with their lengths) come, embeddings and gradients go, to 7 of 8.
    assert sent.inside == pytest.approx(4096 * 24 * (16 + 2 * 64) * 7 / 8)
    assert sent.between == 0
    cut = made.tables_sent(job, {"row_wise": 1})
    assert cut.inside == pytest.approx(4096 * (8 * 7 + 8 * 7 / 8 + 2 * 64 * 7))
    many = made.tables_sent(job._replace(ranks=64), {"row_wise": 1})
    assert many.between / (many.inside + many.between) == pytest.approx(56 / 63)
    over_machines = made.tables_sent(job._replace(ranks=64), {"table_row_wise": 8})
    assert over_machines.between == pytest.approx(4096 * 8 * 7 / 8 * (2 * 64 + 16))
    dense = made.dense_sent(job._replace(ranks=64))
    assert dense.inside + dense.between == pytest.approx(8 * 20e6 * 63 / 64)
    assert dense.seconds() == pytest.approx(dense.between / 50e9)
