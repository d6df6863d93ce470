"""What test_scoreboard.py runs in each of three processes: python -m tests.scoreboard_processes RANK SIZE PORT FOLDER.

Each counts its slices of the same batches, and by itself all of them; the first writes down what both read.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from steadyrank import scoreboard
from steadyrank.data.deal import share_of
from steadyrank.metrics import DAY_US
from steadyrank.ranks import ALONE, Ranks
from steadyrank.schema import Batch, Schema
from steadyrank.scoreboard import Scoreboard

FEATURES = {"user": {"kind": "id", "rows": 50}, "item": {"kind": "id", "rows": 20}, "other": {"kind": "id", "rows": 9}}
TASKS = {"click": {"kind": "binary"}, "like": {"kind": "binary"}, "watch": {"kind": "regression"}}
STEPS, WINDOW, FLUSH = 36, 12, 4
CASES = {
    # capacities of the model's metrics and of the others', whether rows have groups, and weights other than 0 and 1
    "kept": (2**18, 2**14, True, True),
    "folded": (500, 130, True, False),
    "folded in part": (2**18, 700, True, True),
    "no groups": (900, 2**14, False, False),
    "not a number": (2**18, 2**14, True, False),
}

Steps = list[tuple[Batch, torch.Tensor]]


def make_schema(grouped: bool) -> Schema:
    return Schema.model_validate(
        {"features": FEATURES, "tasks": TASKS, "group": "user" if grouped else "", "baseline": ["user", "item"]}
    )


def make_steps(schema: Schema, weighted: bool, nan: bool) -> Steps:
    """Return whole batches of 2 to 120 rows, over four days that overlap, with labels that follow users and items."""
    draw, found = torch.Generator().manual_seed(3), list[tuple[Batch, torch.Tensor]]()
    for step in range(STEPS):
        rows = 2 if step % 9 == 5 else int(torch.randint(60, 120, (1,), generator=draw))
        ids = [torch.randint(feature.rows, (rows,), generator=draw) for feature in schema.id_features.values()]
        rate = torch.sigmoid((ids[0] % 5 - 2 + ids[1] % 3 - 1).float()[:, None] + torch.tensor([0.0, 0.5, 0.0]))
        labels = (torch.rand(rows, 3, generator=draw) < rate).float()
        labels[:, 2] += torch.randn(rows, generator=draw)
        weights = torch.randint(3 if weighted else 2, (rows, 3), generator=draw).float() * (0.7 if weighted else 1.0)
        scores = (torch.logit(rate) + torch.randn(rows, 3, generator=draw)).mul(4).round().div(4)  # with ties
        if nan and step == STEPS - 1:
            scores[7, 0] = torch.nan
            weights[7, 0] = 1.0
        day = 19_000 + step // 10 + torch.randint(-1, 2, (rows,), generator=draw)
        group = (ids[0] * 7919 - 100_000) * (schema.group is not None)  # below 0 too
        starts = torch.tensor([schema.slot(name).start for name in schema.id_features])
        batch = Batch(
            ids=torch.stack(ids, 1) + starts,
            lists=(),
            numbers=torch.zeros(rows, 0),
            positions=torch.zeros(rows, 0, dtype=torch.int64),
            labels=labels,
            weights=weights,
            time=day * DAY_US + torch.randint(DAY_US, (rows,), generator=draw),
            group=group,
            truth=rate,
        )
        found.append((batch, scores))
    return found


def flushes(steps: Sequence[tuple[Batch, torch.Tensor]], ranks: Ranks) -> Iterator[Steps]:
    """Yield a rank's slices, a few steps at a time."""
    own = []
    for batch, scores in steps:
        low, high = share_of(len(batch), ranks.rank, ranks.size)
        own.append((batch.take(torch.arange(low, high)), scores[low:high]))
    for low in range(0, len(own), FLUSH):
        yield own[low : low + FLUSH]


def read(board: Scoreboard, steps: Sequence[tuple[Batch, torch.Tensor]], ranks: Ranks) -> list[Any]:
    """Return all readings, the summary last."""
    found: list[Any] = []
    for i, flush in enumerate(flushes(steps, ranks), 1):
        board.add_steps([batch for batch, _ in flush], [scores for _, scores in flush])
        if i % (WINDOW // FLUSH) == 0:
            found += [board.close_window(), board.auc_so_far()]
    return [*found, board.close_window(), board.summary()]


def check(name: str, ranks: Ranks) -> dict[str, Any]:
    """Read one case together, alone, and across saved states of other numbers of ranks."""
    scoreboard.CAPACITY, scoreboard._OTHERS_CAPACITY, grouped, weighted = CASES[name]
    schema = make_schema(grouped)
    steps = make_steps(schema, weighted, name == "not a number")
    head, tail = steps[: STEPS // 2 + 2], steps[STEPS // 2 + 2 :]  # saved in the midst of a window

    def make(who: Ranks) -> Scoreboard:
        return Scoreboard(schema, truth=True, ranks=who)

    found: dict[str, Any] = {"one": read(make(ALONE), steps, ALONE), "three": read(make(ranks), steps, ranks)}
    one, three = make(ALONE), make(ranks)
    read(one, head, ALONE)
    read(three, head, ranks)
    saved_one, saved_three = one.state_dict(), three.state_dict()
    found["unbroken"] = read(three, tail, ranks)
    found["one on"] = read(one, tail, ALONE)
    for parts in saved_one["metrics"].values():
        for part in ("run", "window", "last_day"):
            del parts[part]["kept"]  # as in a state of before
    again, grown, shrunk = make(ranks), make(ranks), make(ALONE)
    again.load_state_dict(saved_three)
    grown.load_state_dict(saved_one)
    found["resumed"], found["one to three"] = read(again, tail, ranks), read(grown, tail, ranks)
    if ranks.is_first:
        two = scoreboard._deal(saved_three["ranks"], 2)
        shrunk.load_state_dict({"ranks": two})
        found["three to two to one"] = read(shrunk, tail, ALONE)
        found["kept"] = [len(state["metrics"]["model"]["run"]["rows"]["groups"]) for state in saved_three["ranks"]]
    return found


def main(rank: int, size: int, port: str, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    ranks = Ranks(rank, size, dist.group.WORLD, dist.group.WORLD)
    found = {name: check(name, ranks) for name in CASES}
    said = ranks.gather_objects(json.dumps([each["three"] for each in found.values()]))
    if rank == 0:
        Path(path).write_text(json.dumps({"found": found, "alike": len(set(said)) == 1}))
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that winds down by itself


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
