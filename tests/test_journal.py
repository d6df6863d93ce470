"""Journals: cut back exactly, bounded, and torn lines spoil nothing."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steadyrank.journal import Journal


def lines(*numbers: int) -> list[str]:
    return [json.dumps({"n": n, "pad": "x" * 50}) for n in numbers]


def numbers(journal: Journal) -> list[int]:
    return [row["n"] for row in journal.rows()]


@settings(max_examples=60, deadline=None)
@given(ops=st.lists(st.sampled_from(["append", "mark", "turn", "drop", "rewind", "tear", "reopen"]), max_size=30))
def test_after_a_rewind_it_is_as_it_was_at_the_mark(tmp_path_factory: pytest.TempPathFactory, ops: list[str]) -> None:
    folder = tmp_path_factory.mktemp("journal")
    journal, mark, at_mark, count = Journal(folder, "events"), [], [], 0
    Journal(folder, "events_of_others").append(lines(-1))  # a longer name is another journal
    for op in ops:
        if op == "append":
            journal.append(lines(count))
            count += 1
        elif op == "mark":
            mark, at_mark = journal.mark(), numbers(journal)
        elif op == "turn":
            journal.turn_over(200)
        elif op == "drop":
            journal.drop_old()
            mark, at_mark = journal.mark(), numbers(journal)  # as a checkpoint does
        elif op == "tear" and journal.parts():
            with journal.path(journal.parts()[-1]).open("ab") as file:
                file.write(b'{"n": 99')
        elif op == "reopen":
            journal = Journal(folder, "events")
        elif op == "rewind":
            after = [row["n"] for row in journal.tail(mark)]
            assert numbers(journal) == at_mark + after
            journal.rewind(mark)
            assert numbers(journal) == at_mark
    assert numbers(journal) == sorted(set(numbers(journal)))


def test_what_it_takes_is_bounded(tmp_path: Path) -> None:
    journal, most = Journal(tmp_path, "steps"), 2_000
    for n in range(500):
        journal.append(lines(n))
        journal.turn_over(most)
        journal.drop_old()
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1.5 * most
    kept = numbers(journal)
    assert kept == list(range(kept[0], 500))
    assert len(kept) > 10


def test_the_lines_that_were_marked_last_a_shorter_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "events")
    journal.append(lines(1, 2))
    mark = journal.mark()
    journal.path(0).unlink()
    journal.rewind(mark)
    assert numbers(journal) == []
    journal.append(lines(3))
    assert numbers(journal) == [3]
