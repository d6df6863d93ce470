"""A log dealt to three processes: slices of the batches of one, and the same errors in the same places."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steadyrank.data.deal import find_owners, plan_exchange, share_of
from steadyrank.data.logs import LogsConfig, ParquetLog, Reader, ReaderConfig
from steadyrank.data.source import Source
from steadyrank.data.stream import Stream, StreamConfig
from steadyrank.ranks import Ranks

from .deal_processes import CONFIGS, SCHEMA, SIZE, SPOILT, write_log
from .together import needs_gloo, run_together


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_follow_one_another_and_differ_by_a_row_at_most(rows: int, size: int) -> None:
    bounds = [share_of(rows, rank, size) for rank in range(size)]
    assert [row for low, high in bounds for row in range(low, high)] == list(range(rows))
    lengths = {high - low for low, high in bounds}
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=9), st.data())
@settings(max_examples=60, deadline=None)
def test_a_plan_brings_every_row_where_it_is_wanted(
    size: int, parts: list[tuple[int, int]], data: st.DataObject
) -> None:
    """A twin in plain lists: everybody's rows are sent by hand."""
    lengths, owners = [length for length, _ in parts], [owner % size for _, owner in parts]
    names = [
        (j, i) for j, length in enumerate(lengths) for i in range(length)
    ]  # a row is its part, and its place there
    order = data.draw(st.permutations(range(len(names))))
    wanted = [list(order[low:high]) for low, high in (share_of(len(order), r, size) for r in range(size))]
    held = [[name for name in names if owners[name[0]] == r] for r in range(size)]
    owner_W, place_W = find_owners(lengths, owners, size)
    plans = [
        plan_exchange([torch.tensor(w, dtype=torch.int64) for w in wanted], owner_W, place_W, r) for r in range(size)
    ]
    for rank, plan in enumerate(plans):
        came = [held[s][i] for s in range(size) for i in plans[s].send[rank].tolist()]
        assert plan.received == [len(plans[s].send[rank]) for s in range(size)]
        placed: list[Any] = [None] * len(came)
        for name, place in zip(came, plan.order.tolist(), strict=True):
            placed[place] = name
        assert placed == [names[i] for i in wanted[rank]]


def test_units_are_known_without_reading(tmp_path: Path) -> None:
    path = str(write_log(tmp_path))
    log = ParquetLog(LogsConfig(path=path), "time")
    sizes = [13, 13, 13, 11, 37, 3, 20, 20, 20, 20, 10]
    assert [unit.rows for unit in log.units()] == sizes
    assert [unit.first_row for unit in log.units()] == [sum(sizes[:j]) for j in range(len(sizes))]
    assert [unit.rows for unit in ParquetLog(LogsConfig(path=path, max_rows=30), "time").units()] == [13, 13, 4]
    stream = Stream(StreamConfig(rows=600, users=100, items=100, block_rows=256))
    assert [tuple(unit) for unit in stream.units()] == [(0, 256), (256, 256), (512, 88)]
    for source in (log, stream):
        assert isinstance(source, Source)
        pieces, row = list(source.pieces(0, None)), 0
        ends = {unit.first_row + unit.rows for unit in source.units()}
        for table, _ in pieces:
            assert not ends & set(range(row + 1, row + len(table)))  # no piece lies in two units
            row += len(table)


def test_one_rank_of_one_reads_as_before(tmp_path: Path) -> None:
    source = ParquetLog(LogsConfig(path=str(write_log(tmp_path))), "time")
    reader = Reader(source, SCHEMA, ReaderConfig(batch_size=1), ranks=Ranks())
    assert reader.idle_ranks == 0
    assert all(batch.share is None and len(batch) == 1 for batch, _ in reader.batches())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("deal")
    run_together("deal_processes", SIZE, path)
    read: dict[str, Any] = json.loads((path / "found.json").read_text())
    return read


@needs_gloo
def test_slices_make_the_batches_of_one_process(found: dict[str, Any]) -> None:
    cases = found["batches"]
    assert set(cases) == {*CONFIGS, "late_hours", "cut", "stream"}
    for name, case in cases.items():
        assert (case["wrong"], case["error"]) == ([], None), name
        assert case["batches"] >= 3, name
    assert cases["late_hours"]["told"] > 4  # four pieces, of which one was cut again


@needs_gloo
def test_every_row_is_decoded_once(found: dict[str, Any]) -> None:
    # Units of 13, 13, 13, 11, 37, 3, 20, 20, 20, 20 and 10 rows go round.
    assert found["rows"]["read"] == [13 + 11 + 20 + 20, 13 + 37 + 20 + 10, 13 + 3 + 20]
    assert found["rows"]["batches"] == 12


@needs_gloo
def test_a_log_of_one_row_group_feeds_all(found: dict[str, Any]) -> None:
    assert found["rows"]["idle"] == [0, 2, {"wrong": [], "error": None, "batches": 3}]


@needs_gloo
def test_reading_goes_on_from_any_cursor_and_may_be_left_anywhere(found: dict[str, Any]) -> None:
    assert found["resume"] == []


@needs_gloo
def test_an_error_on_one_rank_is_raised_by_all_where_one_process_raises_it(found: dict[str, Any]) -> None:
    cases = dict(found["errors"])
    tired = cases.pop("tired")
    assert set(cases) == {*SPOILT, "bytes"}
    for name, case in cases.items():
        assert case["wrong"] == [], name
        assert case["error"].startswith("DataError: "), name
    assert "row group 1, row 25, column 'weight'" in cases["value_hours"]["error"]  # rank 1 decodes it
    assert [count for count, _ in tired] == [4, 4, 4]
    said = "RuntimeError: rank 1 failed while it read the log, and all stop with it: ValueError: the disk is tired"
    assert [error for _, error in tired] == [said, "ValueError: the disk is tired", said]


@needs_gloo
def test_what_cannot_be_shared_is_refused_by_all(found: dict[str, Any]) -> None:
    refusals = found["refusals"]
    for name, said in refusals.items():
        assert len(set(said)) == 1, name
    assert refusals["batch"][0].startswith("ConfigError: reader.batch_size = 2 rows a step are fewer than the 3 ranks")
    assert refusals["rows"][0].startswith("ConfigError: the log's 2 row(s) are fewer than the 3 ranks that share it")
    assert refusals["log"][0].startswith("DataError: rank 2 sees a log of 100 rows in 7")
    assert "rank 0 one of 180 in 11" in refusals["log"][0]
    assert "number 6 has 16 rows there, and 20 here" in refusals["units"][0]


@needs_gloo
def test_a_process_ends_though_it_left_a_reader_in_the_middle(found: dict[str, Any]) -> None:
    assert found["exit_s"] < 10
