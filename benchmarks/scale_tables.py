"""Formulas for what ranks send, and the tables of docs/scale.md; from a results file, nothing is measured here.

Symbols: N ranks, B rows of a batch on all ranks together, P dense parameters, T dense tensors and weight matrices, K
tasks, F features looked up in tables, I of them one-valued, E elements of all lists of a row, X numbers, D width, U
touched rows of the tables on the rank that touches most, H features of baselines, A different ids of these among a
rank's rows that another rank holds. Bytes are what one rank sends in a step, on average.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from steadyrank.models.embeddings import BLOCK
from steadyrank.schema import Schema

ROWS, WIDTHS, WORLDS = (10**9, 10**10), (16, 64), (8, 64)
"""What the planner is asked for: rows of all tables, their width, ranks."""
OVERHEAD = 66
"""Bytes of a packet's headers: Ethernet 14, IP 20, TCP with time stamps 32."""
FRAME = 1514
"""Bytes of a full packet."""


class Hardware(NamedTuple):
    """What is published of a machine of eight H100; assumed, not measured."""

    per_host: int = 8
    budget: int = 72_000_000_000
    """Bytes of a GPU that are planned for: nine tenths of 80 GB."""
    inside: float = 450e9
    """NVLink, bytes a second from one GPU to those beside it."""
    between: float = 50e9
    """The network, 400 Gb/s, from one GPU to those of other machines."""
    memory: float = 3.35e12
    """HBM, bytes a second."""


HARDWARE = Hardware()


class Job(NamedTuple):
    """An imagined run: 26 ids, one of them with two fifths of all rows, two with baselines, 13 numbers, two tasks."""

    rows: int
    width: int
    ranks: int
    batch: int = 4096
    """Of one rank."""
    dense: int = 20_000_000
    tasks: int = 2
    ids: int = 26
    numbers: int = 13
    bases: int = 2

    @property
    def dense_bytes(self) -> int:
        """Weights, gradients and one accumulator."""
        return 12 * self.dense

    def schema(self) -> Schema:
        """Return its features."""
        shares = [0.4] + [0.6 / (self.ids - 1)] * (self.ids - 1)
        features: dict[str, Any] = {f"id_{i}": {"kind": "id", "rows": int(share * self.rows), "hashed": False}
                                    for i, share in enumerate(shares)}  # fmt: skip
        tasks = {f"task_{k}": {"kind": "binary"} for k in range(self.tasks)}
        return Schema(embedding_width=self.width, features=features, tasks=tasks)


Counts = Mapping[str, Any]
FORMULAS: dict[str, tuple[str, Callable[[Counts], float]]] = {
    "dense gradients, DDP": ("8 P (N-1)/N", lambda c: 8 * c["P"] * c["far"]),
    "dense, FSDP2: gather": ("8 P (N-1)/N", lambda c: 8 * c["P"] * c["far"]),
    "dense, FSDP2: gradients": ("8 P (N-1)/N; NCCL: half", lambda c: 8 * c["P"] * c["far"]),
    "tables, replicated": ("(N-1) (8 + 4 D) U", lambda c: (c["N"] - 1) * (8 + 4 * c["D"]) * c["U"]),
    "TorchRec, whole: ids": (
        "(8 F + w (I + E)) B/N (N-1)/N",
        lambda c: c["b"] * (8 * c["F"] + c["w"] * (c["I"] + c["E"])) * c["far"],
    ),
    "TorchRec, whole: embeddings": ("4 F D B/N (N-1)/N", lambda c: 4 * c["F"] * c["D"] * c["b"] * c["far"]),
    "TorchRec, whole: gradients": ("4 F D B/N (N-1)/N", lambda c: 4 * c["F"] * c["D"] * c["b"] * c["far"]),
    "TorchRec, cut: ids": (
        "8 F B/N (N-1) + w (I + E) B/N (N-1)/N",
        lambda c: c["b"] * (8 * c["F"] * (c["N"] - 1) + c["w"] * (c["I"] + c["E"]) * c["far"]),
    ),
    "TorchRec, cut: embeddings": (
        "8 F D B (N-1)/N; NCCL: half",
        lambda c: 8 * c["F"] * c["D"] * c["b"] * (c["N"] - 1),
    ),
    "TorchRec, cut: gradients": ("4 F D B (N-1)/N", lambda c: 4 * c["F"] * c["D"] * c["b"] * (c["N"] - 1)),
    "verdict": ("8 (N-1) (1 + K + T)", lambda c: 8 * (c["N"] - 1) * (1 + c["K"] + c["T"])),
    "statistics of numbers": ("24 (N-1) X", lambda c: 24 * (c["N"] - 1) * c["X"]),
    "log: rows dealt": (
        "(8 I + 8 L + 8 E + 8 S + 4 X + 12 K + 8) B/N (N-1)/N",
        lambda c: (8 * (c["I"] + c["L"] + c["E"] + c["S"]) + 4 * c["X"] + 12 * c["K"] + 8) * c["b"] * c["far"],
    ),
    "log: heads of pieces": ("8 B (N-1)/N", lambda c: 8 * c["b"] * (c["N"] - 1)),
    "log: sums of weights": ("8 (N-1) K a batch", lambda c: 8 * (c["N"] - 1) * c["K"]),
    "metrics: rows to the rank of their group": (
        "(8 H + 16 K + 24) B/N (N-1)/N",
        lambda c: (8 * c["H"] + 16 * c["K"] + 24) * c["b"] * c["far"],
    ),
    "metrics: means of ids": ("(20 K + 16) A", lambda c: (20 * c["K"] + 16) * c["A"]),
    "metrics: sums of batches": ("(16 K + 24) (N-1)", lambda c: (16 * c["K"] + 24) * (c["N"] - 1)),
}
"""Of each part the formula, in words and as a function."""


def counts_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the formulas' symbols for a counted run.

    L lists, S positions; w is 12 where a list is averaged (its shares go with the ids), else 8.
    """
    n = run["ranks"]
    return {
        "N": n, "far": (n - 1) / n, "b": run["batch"] / n, "P": run["dense"], "T": run["tensors"], "K": run["tasks"],
        "F": run["ids"] + run["lists"], "I": run["ids"], "L": run["lists"], "E": run["elements"], "X": run["numbers"],
        "S": run["positions"], "D": run["width"], "U": run["touched"], "w": 12, "H": run["bases"], "A": run["pairs"],
        "cut": any(kind == "row_wise" for kind, *_ in run["kinds"].values()),
    }  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return a median with the lowest and highest value."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def time_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return rows a second of every way to train, and over one core the ratio round by round."""
    cells: dict[tuple[str, int], dict[str, list[float]]] = {}
    for each in found:
        rates = cells.setdefault((each["size"], each["batch"]), {})
        rates.setdefault(each["name"], []).append(each["rows_per_s"])
    rows = []
    for (size, batch), rates in cells.items():
        for name, values in rates.items():
            ratios = [a / b for a, b in zip(values, rates["one core"], strict=True)]
            rows.append([size, f"{batch:,}", name, spread(values), "" if name == "one core" else spread(ratios, 2)])
    return table(["model", "batch", "how", "rows a second", "over one core"], rows)


def wait_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return where the time of a step goes."""
    kinds = {
        "dense": ("dense",),
        "tables": ("tables,", "TorchRec"),
        "verdict": ("verdict",),
        "metrics": ("metrics",),
        "rank 0": ("decisions", "readings", "agreeing"),
    }
    cells: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for each in found:
        cells.setdefault((each["size"], each["batch"], each["name"]), []).append(each)
    rows = []
    for (size, batch, name), runs in cells.items():
        parts = [[sum(ms for part, ms in run["waited_ms"].items() if part.startswith(starts)) for run in runs]
                 for starts in kinds.values()]  # fmt: skip
        every = [sum(run["waited_ms"].values()) for run in runs]
        steps, batches = [run["step_ms"] for run in runs], [run["batches_ms"] for run in runs]
        middle = [statistics.median(each) for each in parts]
        rest = statistics.median([e - sum(of) for e, *of in zip(every, *parts, strict=True)])
        own = statistics.median([s - e - b for s, e, b in zip(steps, every, batches, strict=True)])
        shown = [statistics.median(steps), own, *middle, rest, statistics.median(batches)]
        rows.append([size, f"{batch:,}", name, *(f"{x:,.1f}" for x in shown)])
    head = ["model", "batch", "how", "step, ms", "own work", *kinds, "other collectives", "batches"]
    return table(head, rows)


def bytes_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the formula of every part, and in how many bytes it was counted; in brackets the ratio of both."""
    columns = list(dict.fromkeys((run["size"], run["batch"]) for run in found))
    rows = []
    for part, (words, formula) in FORMULAS.items():
        name = part.replace(", whole", "").replace(", cut", "")
        cells = []
        for column in columns:
            runs = [run for run in found if (run["size"], run["batch"]) == column and name in run["sent"]]
            if name != part:
                runs = [run for run in runs if counts_of(run)["cut"] == (", cut" in part)]
            counted = [(run["sent"][name], run["sent"][name] / formula(counts_of(run))) for run in runs]
            cells.append(f"{counted[0][0]:,.0f} ({counted[0][1]:.3f})" if counted else "")
        rows.append([part, words, *cells])
    return table(["part", "bytes", *(f"{size}, {batch:,} rows" for size, batch in columns)], rows)


def network_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the sum of the parts beside what the interface sent."""
    rows = []
    for run in found:
        total, headers, again = sum(run["sent"].values()), OVERHEAD * run["packets"], FRAME * run["again"]
        rest = run["network"] - total - headers - again
        rows.append([run["name"].replace("_", " "), run["size"], f"{run['batch']:,}", f"{total:,.0f}",
                     f"{run['network']:,.0f}", f"{run['network'] / total:.3f}", f"{headers:,.0f}", f"{again:,.0f}",
                     f"{rest / total:.1%}"])  # fmt: skip
    head = ["how", "model", "batch", "sum of the parts", "interface", "ratio", "headers", "sent again", "not explained"]
    return table(head, rows)


class Sent(NamedTuple):
    """Bytes of a step that one GPU sends, inside its machine and to others."""

    inside: float
    between: float

    def seconds(self) -> float:
        """Return the least time that takes."""
        return max(self.inside / HARDWARE.inside, self.between / HARDWARE.between)


def spread_out(job: Job, size: float) -> Sent:
    """Return bytes that go to all other ranks alike."""
    near = min(job.ranks, HARDWARE.per_host) - 1
    return Sent(size * near / (job.ranks - 1), size * (job.ranks - 1 - near) / (job.ranks - 1))


def ring(job: Job, size: float) -> Sent:
    """Return bytes that go round a ring: in every machine's ring one GPU of eight sends to the next machine."""
    across = size / HARDWARE.per_host if job.ranks > HARDWARE.per_host else 0.0
    return Sent(size - across, across)


def dense_sent(job: Job) -> Sent:
    """Return an all-reduce of the gradients, or what FSDP2 sends: half as much again."""
    return ring(job, 8 * job.dense * (job.ranks - 1) / job.ranks)


def tables_sent(job: Job, kinds: Mapping[str, int]) -> Sent:
    """Return ids out, embeddings back and gradients out, with NCCL, of the GPU that sends most.

    `kinds` says how many features lie how.

    Cut by rows over all ranks, every rank sends partial sums for the rows of all ranks. Cut over one machine, these
    stay inside it, and whole sums go to other machines.
    """
    n, b, d = job.ranks, job.batch, 4 * job.width
    hosts, near = max(1, n // HARDWARE.per_host), min(n, HARDWARE.per_host)
    inside = between = 0.0
    for kind, features in kinds.items():
        each = float(b * features)
        if kind == "table_row_wise":
            each *= -(-features // hosts) * hosts / features  # of the machine that holds most
            inside += each * (near - 1) * 2 * d + each * 16
            between += each * (hosts - 1) / hosts * (2 * d + 16)
            continue
        if kind == "table_wise":
            each *= -(-features // n) * n / features  # of the GPU that holds most
        size = each * (16 * (n - 1) / n + 2 * d * (n - 1) / n) if kind == "table_wise" else (
            each * (8 * (n - 1) + 8 * (n - 1) / n + 2 * d * (n - 1)))  # fmt: skip
        sent = spread_out(job, size)
        inside, between = inside + sent.inside, between + sent.between
    return Sent(inside, between)


def replicated_sent(job: Job) -> Sent:
    """Return what the sparse all-reduce sends, where nearly every looked-up row is another one."""
    return spread_out(job, (job.ranks - 1) * (8 + 4 * job.width) * job.batch * job.ids)


METRICS = ("metrics: rows to the rank of their group", "metrics: means of ids", "metrics: sums of batches")
LOG = ("log: rows dealt", "log: heads of pieces", "verdict", "statistics of numbers")


def host_sent(job: Job, parts: Sequence[str]) -> Sent:
    """Return what some parts make a rank send, where every id of a rank's rows is another one."""
    run = {"ranks": job.ranks, "batch": job.batch * job.ranks, "dense": job.dense, "tensors": 60, "tasks": job.tasks,
           "ids": job.ids, "lists": 0, "elements": 0, "numbers": job.numbers, "positions": 0, "width": job.width,
           "touched": 0, "kinds": {}, "bases": job.bases,
           "pairs": job.bases * job.batch * (job.ranks - 1) / job.ranks}  # fmt: skip
    counts = counts_of(run)
    return spread_out(job, sum(FORMULAS[part][1](counts) for part in parts))


def lookup_ms(job: Job) -> float:
    """Return the least time of a GPU's memory for the rows of tables.

    Each looked-up row is read, its gradient written, sorted and summed (read and written again), read by the optimizer,
    and the row read and written.
    """
    return 1e3 * job.batch * job.ids * 4 * job.width * 7 / HARDWARE.memory


def job_of(plan: Mapping[str, Any]) -> Job:
    """Return the job that the planner was asked for."""
    return Job(plan["rows"], plan["width"], plan["ranks"])


def show(size: float) -> str:
    """Return bytes for people."""
    return (
        f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB" if size < 1e7 else f"{size / 1e6:,.0f} MB"
    )


def plan_table(plans: Sequence[Mapping[str, Any]]) -> str:
    """Return memory and the planner's word."""
    rows = []
    for plan in plans:
        job = job_of(plan)
        size = job.rows * (4 * job.width + 4)
        head = [f"{job.rows:.0e}".replace("e+", "e"), f"{job.width}", f"{job.ranks}", show(size),
                show(size / job.ranks + job.dense_bytes)]  # fmt: skip
        if "refused" in plan:
            rows.append([*head, "refuses: does not fit", "", ""])
            continue
        kinds = ", ".join(f"{len(sizes)} {kind.replace('_', ' ')}" for kind, sizes in plan["kinds"].items())
        rows.append([*head, kinds, show(plan["bytes"]), f"{plan['ms']:,.1f} ({plan['least_ms']:,.1f})"])
    head = ["rows", "width", "GPUs", "tables and state", "a GPU's part, and the dense one", "the planner's choice",
            "its GB on the fullest GPU", "its ms on the slowest (fastest) GPU"]  # fmt: skip
    return table(head, rows)


def bound_table(plans: Sequence[Mapping[str, Any]]) -> str:
    """Return bytes of a step, and the least time that they take."""
    rows = []
    for plan in plans:
        job = job_of(plan)
        chosen = {kind: len(sizes) for kind, sizes in plan.get("kinds", {}).items()}
        ways = [("as planned", chosen)] if chosen else []
        if 0.4 * job.rows * (4 * job.width + 4) < HARDWARE.budget:
            ways += [("all whole", {"table_wise": job.ids})]
        ways += [("all cut over all GPUs", {"row_wise": job.ids})]
        for name, kinds in ways if chosen else []:
            sent, dense = tables_sent(job, kinds), dense_sent(job)
            moved = (sent.seconds() + dense.seconds()) * 1e3
            rows.append([f"{job.rows:.0e}".replace("e+", "e"), f"{job.width}", f"{job.ranks}", name, show(sent.inside),
                         show(sent.between), f"{1e3 * sent.seconds():.2f}", f"{1e3 * dense.seconds():.2f}",
                         f"{lookup_ms(job):.2f}", f"{moved + lookup_ms(job):.2f}"])  # fmt: skip
    head = ["rows", "width", "GPUs", "tables", "inside the machine", "to other machines", "tables, ms", "dense, ms",
            "memory, ms", "together, ms"]  # fmt: skip
    return table(head, rows)


def limit_table(rates: Mapping[str, float]) -> str:
    """Return what grows with the number of ranks."""
    rows = []
    for ranks in (8, 64, 512):
        job = Job(ROWS[0], WIDTHS[0], ranks)
        replicated, cut = replicated_sent(job), tables_sent(job, {"row_wise": job.ids})
        cells = [f"{job.batch / rates['judged_per_s'] * 1e3:,.0f}"]
        cells += [show(sum(host_sent(job, parts))) for parts in (METRICS, LOG)]
        for sent in (replicated, cut):
            cells += [show(sum(sent)), f"{sent.seconds() * 1e3:,.1f}"]
        rows.append([f"{ranks}", f"{job.batch * ranks:,}", *cells])
    head = ["GPUs", "rows of a step", "metrics on each rank, ms", "metrics out of each", "log out of each",
            "replicated tables out of each", "ms", "tables cut over all out of each", "ms"]  # fmt: skip
    return table(head, rows)


def start_table(rates: Mapping[str, float]) -> str:
    """Return what is drawn at the start and written in a checkpoint, by one process and by each of 64 ranks.

    With tables cut over all ranks: each has a piece of every table, and a piece lies in at most two blocks more than
    it would fill.
    """
    rows = []
    for count in ROWS:
        for width in WIDTHS:
            size, drawn = count * (4 * width + 4), count * width
            part = drawn / 64 + 2 * BLOCK * Job(count, width, 64).ids
            minutes = [f"{weights / rates['drawn_per_s'] / 60:,.2f}" for weights in (drawn, part)]
            rows.append([f"{count:.0e}".replace("e+", "e"), f"{width}", *minutes, show(size), show(size / 64)])
    head = ["rows", "width", "minutes to draw, one process", "each of 64 ranks, at most", "a checkpoint",
            "of it each of 64 ranks"]  # fmt: skip
    return table(head, rows)


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """Return every table of the page, by its title, of what was measured."""
    made: dict[str, str] = {}
    if "time" in found:
        made["Rows a second"] = time_table(found["time"])
    if "waits" in found:
        made["Where the time goes"] = wait_table(found["waits"])
    if "bytes" in found:
        made["Bytes by part"] = bytes_table(found["bytes"])
        made["Bytes at the interface"] = network_table(found["bytes"])
    if "plans" in found:
        made["The planner"] = plan_table(found["plans"])
        made["Least times"] = bound_table(found["plans"])
        made["What grows"] = limit_table(found["ranks"])
        made["The start"] = start_table(found["ranks"])
    return made


def fill(page: str, found: Mapping[str, str]) -> str:
    """Return a page with its tables renewed, each under a comment with its title.

    >>> fill("<!-- Rows -->\\n| a |\\n| - |\\n\\nText", {"Rows": "| b |"})
    '<!-- Rows -->\\n| b |\\n\\nText'
    """
    for name, text in found.items():
        page = re.sub(rf"(<!-- {re.escape(name)} -->\n)(\|.*\n)*", lambda match, text=text: f"{match[1]}{text}\n", page)
    return page
