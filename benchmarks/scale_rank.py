"""What `scale.py` runs in each of some processes: python benchmarks/scale_rank.py RANK SIZE HOST PORT JOBS OUT.

JOBS is a file with a list of jobs in JSON, which all processes do together; each makes a run as `steadyrank train`
does. A job that is `alone` is done by rank 0 while the others sleep. In one that `counts`, every collective is waited
for where it begins, and what it sends and how long it takes is noted under the part of the step that asked for it.
"""

import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives

from steadyrank import session
from steadyrank.config import RunConfig
from steadyrank.distributed import engine, sharded
from steadyrank.launch import create_folder
from steadyrank.ranks import ALONE, Ranks, join
from steadyrank.sequential import run
from steadyrank.train import fit

PARTS = (
    # a part of the path of a caller's file, its function (any when empty), the part of the step
    ("distributed/engine.py", "average_rows", "tables, replicated"),
    ("torchrec/distributed/dist_data.py", "", "TorchRec: ids"),
    ("torchrec/distributed/comm_ops.py", "", "TorchRec: embeddings"),
    ("torchrec/", "", "TorchRec: ids"),
    ("_fully_shard/", "", "dense, FSDP2"),
    ("ddp_comm_hooks/", "", "dense gradients, DDP"),
    ("steadyrank/guard.py", "", "verdict"),
    ("models/embeddings.py", "", "statistics of numbers"),
    ("steadyrank/optim/", "", "norms of shards"),
    ("data/deal.py", "_tell", "log: heads of pieces"),
    ("data/deal.py", "_cut", "log: sums of weights"),
    ("data/deal.py", "", "log: rows dealt"),
    ("steadyrank/scoreboard.py", "_agree", "metrics: sums of batches"),
    ("steadyrank/scoreboard.py", "_by_group", "metrics: rows to the rank of their group"),
    ("steadyrank/scoreboard.py", "state_dict", "checkpoint"),
    ("steadyrank/baselines.py", "", "metrics: means of ids"),
    ("steadyrank/metrics/", "", "metrics: windows"),
    ("steadyrank/distributed/merging.py", "", "readings to rank 0"),
    ("steadyrank/instruments.py", "", "readings to rank 0"),
    ("steadyrank/monitors/", "", "readings to rank 0"),
    ("steadyrank/stopping.py", "", "agreeing to stop"),
    ("steadyrank/checkpoints.py", "", "checkpoint"),
    ("steadyrank/shards.py", "", "checkpoint"),
    ("steadyrank/", "checkpoint", "checkpoint"),
    ("steadyrank/session.py", "", "decisions of rank 0"),
    ("steadyrank/rescue.py", "", "decisions of rank 0"),
)


class Count:
    """Bytes that this rank has sent, and seconds that its steps have waited, by part."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.waited: Counter[str] = Counter()

    def note(self, part: str, size: float, seconds: float) -> None:
        """Take in one collective."""
        self.sent[part] += size
        self.calls[part] += 1
        if threading.current_thread() is threading.main_thread():
            self.waited[part] += seconds


COUNT = Count()


def part_of(operation: str) -> str:
    """Return which part of a step asks for a collective."""
    frame = sys._getframe(2)
    while frame is not None:
        for path, function, part in PARTS:
            if path in frame.f_code.co_filename and function in ("", frame.f_code.co_name):
                if part == "dense, FSDP2":
                    return f"{part}: {'gather' if 'gather' in operation else 'gradients'}"
                if part.endswith("embeddings") and frame.f_code.co_name.endswith("backward"):
                    return part.replace("embeddings", "gradients")
                return part
        frame = frame.f_back
    return "other"


def size_of(x: Any) -> int:
    """Return the bytes of tensors, however deep in lists."""
    return x.nbytes if isinstance(x, torch.Tensor) else sum(map(size_of, x))


def sent_by(operation: str, rank: int, size: int, args: tuple[Any, ...]) -> float:
    """Return the bytes that this rank sends in a collective, as gloo makes it.

    Rings: an all-reduce of S bytes sends 2 S (N - 1) / N, a gather to all S (N - 1). gloo has no reduce-scatter of its
    own here: it is an all-reduce. A broadcast is sent N - 1 times, counted with its root.
    """
    if operation in ("allreduce", "allreduce_coalesced"):
        return 2 * size_of(args[0]) * (size - 1) / size
    if operation in ("reduce_scatter_single", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"):
        return 2 * size_of(args[1]) * (size - 1) / size
    if operation in ("allgather", "all_gather_single", "_allgather_base"):
        return size_of(args[1]) * (size - 1)
    if operation in ("all_to_all_single", "alltoall_base"):
        rows = args[3] or [len(args[1]) // size] * size
        whole = sum(rows)
        return size_of(args[1]) * (whole - rows[rank]) / whole if whole else 0
    if operation == "broadcast":
        return size_of(args[0]) * (size - 1) if args[1].rootRank == rank else 0
    if operation == "gather":
        return size_of(args[1]) if args[2].rootRank != rank else 0
    raise NotImplementedError(operation)


OPERATIONS = ("allreduce", "allreduce_coalesced", "allgather", "all_gather_single", "_allgather_base", "alltoall_base",
              "all_to_all_single", "broadcast", "gather", "reduce_scatter_single", "_reduce_scatter_base")  # fmt: skip
FUNCTIONAL = {"reduce_scatter_tensor": "gradients", "all_gather_into_tensor": "gather"}


@contextmanager
def counting() -> Iterator[None]:
    """Note every collective, and wait for it where it begins."""
    kept: list[tuple[Any, str, Any]] = []

    def put(place: Any, name: str, value: Any) -> None:
        kept.append(
            (place, name, vars(place)[name])
        )  # as it lies there: a method of C++ is another when it is asked for
        setattr(place, name, value)

    def wrap(name: str) -> None:
        theirs = getattr(dist.ProcessGroup, name)

        def call(group: Any, *args: Any, **options: Any) -> Any:
            part, begun = part_of(name), time.perf_counter()
            work = theirs(group, *args, **options)
            if work is not None:
                work.wait()
            COUNT.note(part, sent_by(name, group.rank(), group.size(), args), time.perf_counter() - begun)
            return work

        put(dist.ProcessGroup, name, call)

    def wrap_functional(name: str) -> None:
        theirs = getattr(torch.ops._c10d_functional, name)

        def call(x: torch.Tensor, *args: Any) -> torch.Tensor:
            part, begun = part_of(name), time.perf_counter()
            found = torch.ops._c10d_functional.wait_tensor(theirs(x, *args))
            size, n = x.nbytes, dist.get_world_size()
            COUNT.note(
                part, 2 * size * (n - 1) / n if "reduce" in name else size * (n - 1), time.perf_counter() - begun
            )
            return found

        call.default = theirs.default  # type: ignore[attr-defined]  # as others ask for it
        put(torch.ops._c10d_functional, name, call)

    def replicate(*args: Any) -> Any:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        found = replicate_theirs(*args)
        found.register_comm_hook(None, allreduce_hook)  # else DDP's all-reduce is out of Python's sight
        return found

    replicate_theirs = engine._replicate
    for name in OPERATIONS:
        if hasattr(dist.ProcessGroup, name):
            wrap(name)
    for name in FUNCTIONAL:
        wrap_functional(name)
    put(engine, "_replicate", replicate)
    try:
        yield
    finally:
        for place, name, value in reversed(kept):
            setattr(place, name, value)


def sent_again() -> int:
    """Return how many packets TCP has sent a second time, in this network namespace."""
    head, values = (line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:"))
    return int(values[head.index("RetransSegs")])


class Marks:
    """Where the clock and the counters stand after every step."""

    def __init__(self, interface: str) -> None:
        self.paths = [Path(f"/sys/class/net/{interface}/statistics/{kind}_{what}")
                      for what in ("bytes", "packets") for kind in ("tx", "rx")] if interface else []  # fmt: skip
        self.found: list[dict[str, Any]] = []
        self.waited, self.touched, self.elements, self.pairs = 0.0, [0], 0, 0

    def mark(self) -> None:
        """Note them."""
        self.found.append({
            "s": time.perf_counter(), "network": [*(int(path.read_text()) for path in self.paths), sent_again()],
            "sent": dict(COUNT.sent), "calls": dict(COUNT.calls), "waited": dict(COUNT.waited),
            "batches_s": self.waited, "touched": self.touched[-1], "elements": self.elements, "pairs": self.pairs,
        })  # fmt: skip

    def stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Hand batches on, and note how long they are waited for."""
        each = iter(batches)
        while True:
            begun = time.perf_counter()
            batch = next(each, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            self.elements = sum(len(ragged.values) for ragged in batch.lists)
            yield batch

    def fit(self, model: Any, optimizers: Any, batches: Any, *args: Any, **options: Any) -> Iterator[Any]:
        """Train as `fit` does."""
        for made in fit(model, optimizers, self.stream(batches), *args, **options):
            self.mark()
            yield made

    def average_rows(self, theirs: Callable[..., None]) -> Callable[..., None]:
        """Note how many rows of replicated tables each step touches."""

        def call(tables: Any, ranks: Any) -> None:
            self.touched.append(sum(len(t.grad._indices()[0].unique()) for t in tables if t.grad is not None))
            theirs(tables, ranks)

        return call

    def ask(self, ranks: Ranks, columns: Any, owner: torch.Tensor, answer: Any) -> torch.Tensor:
        """Note for how many pairs of a step and an id the baselines ask another rank."""
        self.pairs += int((owner != ranks.rank).sum())
        return ASK(ranks, columns, owner, answer)


ASK = Ranks.ask


def do(job: dict[str, Any], ranks: Ranks, interface: str) -> dict[str, Any] | None:
    """Make a run; return its marks."""
    here = ALONE if job.get("alone") else ranks
    if job.get("alone") and ranks.rank:
        return None
    threads = job.get("threads", 1)
    os.sched_setaffinity(0, range(threads) if threads > 1 else {ranks.rank})
    torch.set_num_threads(threads)
    COUNT.__init__()  # type: ignore[misc]  # all from 0
    marks, plans = Marks(interface), []
    averages, plan_for = engine.average_rows, sharded.plan_for

    def plan(*args: Any, **options: Any) -> Any:
        kinds = job.get("kinds")
        options["sharding"] = {table: [kinds] for table in args[0].tables} if kinds else None
        plans.append(plan_for(*args, **options))
        return plans[-1]

    session.fit, sharded.plan_for = marks.fit, plan  # type: ignore[assignment]
    try:
        if job.get("counts"):
            engine.average_rows = marks.average_rows(averages)
            Ranks.ask = lambda *arguments: marks.ask(*arguments)  # type: ignore[method-assign]  # which passes itself
            with counting():
                summary, parts = train(job, here)
        else:
            summary, parts = train(job, here)
    finally:
        session.fit, sharded.plan_for, engine.average_rows = fit, plan_for, averages
        Ranks.ask = ASK  # type: ignore[method-assign]
    marks.mark()  # with the checkpoint at the end
    tensors = [p for o in parts.optimizers.values() for g in o.param_groups for p in g["params"]]
    names = set(parts.model.table_names())
    dense = {name: list(p.shape) for name, p in parts.model.named_parameters() if name not in names}
    plan_kinds = {t.table: [t.kind, t.slot.rows, t.slot.width] for t in plans[0].tables} if plans else {}
    return {"status": summary["status"], "marks": marks.found, "tensors": len(tensors), "dense": dense,
            "precision": summary["precision"], "kinds": plan_kinds}  # fmt: skip


def train(job: dict[str, Any], ranks: Ranks) -> tuple[dict[str, Any], Any]:
    """Make a run as the command does."""
    config, path = RunConfig.from_toml(job["toml"]), Path(job["folder"])
    parts = config.build(ranks=ranks)
    with create_folder(config, path, ranks) as folder:
        summary = run(parts, folder)
    parts.reader.close()
    if ranks.is_first:
        shutil.rmtree(path)
    return summary, parts


def main(rank: int, size: int, host: str, port: str, jobs: str, out: str) -> None:
    """Do all jobs, and write what was found."""
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.sched_setaffinity(0, {rank})  # gloo's threads stay there
    ranks = join(torch.device("cpu"), 300.0)
    interface, found = os.environ.get("GLOO_SOCKET_IFNAME", ""), []
    for job in json.loads(Path(jobs).read_text()):
        try:
            found.append(do(job, ranks, interface))
        except BaseException:
            print(f"rank {rank}, {job['name']}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            os._exit(1)
        ranks.gather_objects(rank)
    Path(out).write_text(json.dumps(found))
    ranks.gather_objects(rank)
    os._exit(0)  # gloo's threads now and then abort an interpreter that winds down by itself


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
