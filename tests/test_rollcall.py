"""Processes meet and say what became of them: here as threads of one process, on one memory."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from steadyrank.errors import ConfigError, DataError, RankError
from steadyrank.ranks import rollcall
from steadyrank.ranks.rollcall import RollCall
from steadyrank.ranks.roster import Roster, forget, is_first_to_say, meet, recall, remember

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package here")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    held = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(held[0].port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    shorter = {"BEAT_S": 0.05, "PATIENCE_S": 0.8, "DEAD_S": 0.4, "LINGER_S": 0.3, "GRACE_S": 0.4, "STORE_S": 1.5}
    for name, seconds in shorter.items():
        monkeypatch.setattr(rollcall, name, seconds)
    return held


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Return what calls in threads return or raise."""
    found: list[Any] = [None] * len(calls)

    def do(i: int) -> None:
        try:
            found[i] = calls[i]()
        except (ConfigError, RankError) as error:
            found[i] = error

    threads = [threading.Thread(target=do, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def come(size: int) -> list[Roster]:
    return at_once(*(lambda rank=rank: meet(rank, size, 10.0) for rank in range(size)))


@pytest.fixture
def ended() -> list[RankError]:
    return []


@pytest.fixture
def calls(memory: list[Any], ended: list[RankError]) -> Iterator[list[RollCall]]:
    """Three ranks, each of which lives."""
    made = [RollCall(rank, roster, 60.0, ended.append) for rank, roster in enumerate(come(3))]
    for call in made:
        call.__enter__()
    yield made
    for call in made:
        call.__exit__()


def test_each_attempt_has_a_room_of_its_own(memory: list[Any]) -> None:
    first, again, more = come(3), come(3), come(2)
    for rosters, size in ((first, 3), (again, 3), (more, 2)):
        assert len({roster.room for roster in rosters}) == 1
        assert [roster.names for roster in rosters] == [rosters[0].names] * size
        assert len(rosters[0].names) == size
        assert rosters[0].name(1).startswith(f"rank 1 of {size} (")
    assert len({rosters[0].room for rosters in (first, again, more)}) == 3
    first[0].open().set("key", "old")
    assert not again[0].open().check(["key"])


def test_the_ones_that_do_not_come_are_named(memory: list[Any]) -> None:
    come(4)  # of whom nothing that they left is taken for a sign of life
    found = at_once(lambda: meet(0, 4, 0.6), lambda: meet(2, 4, 0.6))
    for error in found:
        assert isinstance(error, ConfigError)
        assert "2 of 4 ranks came within 0.6 s, not rank 1, 3 (at 127.0.0.1:" in str(error)
    (error,) = at_once(lambda: meet(1, 2, 0.1))
    assert "rank 1 of 2 met no others within 0.1 s: rank 0 did not come" in str(error)


def test_what_is_remembered_can_be_forgotten(memory: list[Any]) -> None:
    assert recall("folder") is None
    remember("folder", "runs/a")
    assert recall("folder") == "runs/a"
    forget("folder")
    assert recall("folder") is None
    assert is_first_to_say("no file")
    assert not is_first_to_say("no file")


def test_the_error_of_one_rank_reaches_the_others(calls: list[RollCall]) -> None:
    calls[2].tell("failed", "the disk is full")
    calls[1].kept = "runs/a"
    found = calls[1].ask(RuntimeError("Connection closed by peer"))
    assert "rank 2 of 3 (" in str(found)
    assert "failed: the disk is full. The run up to there is kept in runs/a" in str(found)
    assert calls[1].closing


def test_a_dead_rank_is_named(calls: list[RollCall]) -> None:
    calls[0].__exit__()
    found = at_once(*(lambda i=i: calls[i].ask(RuntimeError("Connection reset")) for i in (1, 2)))
    for error in found:
        assert "rank 0 of 3 (" in str(error)
        assert "is gone: no sign of life" in str(error)
    # On one machine one of them says so.
    assert not calls[1].is_told_by_another(found[0])
    assert calls[2].is_told_by_another(found[1])


def test_a_rank_that_is_stuck_is_named(calls: list[RollCall]) -> None:
    found = at_once(*(lambda i=i: calls[i].ask(RuntimeError("gloo: Timed out waiting 900ms")) for i in (0, 1)))
    for error in found:
        assert "rank 2 of 3 (" in str(error)
        assert "lives, but did not come" in str(error)


def test_a_bug_of_this_rank_is_not_laid_to_others(calls: list[RollCall], monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    assert calls[0].ask(RuntimeError("mat1 and mat2 cannot be multiplied")) is None
    assert time.monotonic() - begun < 2
    assert not calls[0].closing
    monkeypatch.setattr(rollcall, "_current", calls[0])
    with pytest.raises(RuntimeError, match="mat1"), rollcall.watched():
        raise RuntimeError("mat1 and mat2 cannot be multiplied")
    calls[1].tell("failed", "no space")
    noted: list[str] = []
    with pytest.raises(RankError, match="no space"), rollcall.watched("runs/a", noted.append):
        raise RuntimeError("mat1 and mat2 cannot be multiplied")
    assert len(noted) == 1


def test_a_bug_that_befalls_all_is_told_by_one(calls: list[RollCall], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollcall, "LINGER_S", 3.0)
    bug, words = RuntimeError("mat1 and mat2 cannot be multiplied"), "RuntimeError: mat1 and mat2 cannot be multiplied"

    def end(call: RollCall) -> bool:
        time.sleep(0.3 * (2 - call.rank))  # the first one is the last to notice
        assert call.ask(bug) is None
        call.tell("failed", words)
        call.linger()
        return call.is_told_by_another(bug)

    begun = time.monotonic()
    assert at_once(*(lambda call=call: end(call) for call in calls)) == [False, True, True]
    assert time.monotonic() - begun < 3.0  # nobody lingers for who has told already


def test_a_memory_that_is_gone_is_that_of_rank_0(calls: list[RollCall], memory: list[Any]) -> None:
    time.sleep(0.3)
    memory.clear()  # the server ends with its last reference
    time.sleep(0.3)
    found = calls[1].ask(RuntimeError("Connection reset by peer"))
    assert "the machine of rank 0 of 3 (" in str(found)
    assert "or the network to it, is gone" in str(found)


def test_who_hangs_where_no_exception_comes_is_ended(calls: list[RollCall], ended: list[RankError]) -> None:
    calls[1].tell("failed", "no space")
    calls[1].closing = True
    time.sleep(1.0)
    assert {str(error).partition(". ")[0].partition(") ")[2] for error in ended} == {"failed: no space"}


def test_all_may_fail_alike_and_go_on(calls: list[RollCall]) -> None:
    error = DataError("row 7")
    assert at_once(*(lambda call=call: call.have_failed_alike(error) for call in calls)) == [True] * 3
    assert calls[1].is_told_by_another(error)
    assert not calls[0].is_told_by_another(error)


def test_one_that_fails_alone_does_not_go_on(calls: list[RollCall], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollcall, "_current", calls[0])
    with pytest.raises(DataError):
        rollcall.fail_alike(DataError("row 7"))
    found = calls[1].ask(RuntimeError("Connection closed by peer"))
    assert "failed: DataError: row 7" in str(found)


def test_alone_nothing_is_watched() -> None:
    with pytest.raises(RuntimeError, match="gloo"), rollcall.watched():
        raise RuntimeError("gloo")
    rollcall.fail_alike(DataError("row 7"))
