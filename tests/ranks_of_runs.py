"""What test_distributed.py runs in each of some processes: python -m tests.ranks_of_runs RANK SIZE PORT JOBS.

JOBS is a file with a list of jobs in JSON, which all processes do together, one after the other; each makes a run.
"""

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steadyrank import scoreboard, session
from steadyrank.config import RunConfig
from steadyrank.errors import SteadyRankError
from steadyrank.launch import create_folder, open_folder
from steadyrank.ranks import Ranks, join
from steadyrank.sequential import run
from steadyrank.train import fit

from .faults import feed


def do(job: dict[str, Any], ranks: Ranks) -> str:
    """Make a run, or go on with one; return its status, or the error's text."""
    config, path = RunConfig.from_toml(job["toml"]), Path(job["folder"])

    def fit_and_signal(*args: Any, **options: Any) -> Iterator[Any]:
        for step, made in enumerate(fit(*args, **options), 1):
            if step == job.get("signal_at") and ranks.rank == ranks.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield made

    session.fit = fit_and_signal  # type: ignore[assignment]
    scoreboard.counts_beside = lambda device: bool(job.get("beside"))  # as on a GPU
    try:
        resume = bool(job.get("resume"))
        sets = job.get("sets_of_last", [])
        if sets and ranks.rank == ranks.size - 1:
            config = RunConfig.from_toml(job["toml"], sets)
        parts = config.build(resume=resume, ranks=ranks)
        if job.get("spoils"):
            spoil_rows(parts.model)
        folder = open_folder(path, ranks) if resume else create_folder(config, path, ranks)
        with folder:
            on_event = partial(feed, job) if ranks.is_first else None
            status: str = run(parts, folder, resume=resume, on_event=on_event)["status"]
        parts.reader.close()
        return status
    except SteadyRankError as error:
        return f"{type(error).__name__}: {error}"


def spoil_rows(model: nn.Module) -> None:
    """Let the gradients of some rows of each table be NaN: the same ones wherever they lie."""

    def spoil(p: Tensor) -> None:
        assert p.grad is not None
        grad = p.grad.coalesce()
        ends, shifts = getattr(p, "sharded_rows", ([len(p)], [0]))
        whole = torch.arange(len(p))
        for start, end, shift in zip([0, *ends[:-1]], ends, shifts, strict=True):
            whole[start:end] += shift
        grad.values()[whole[grad.indices()[0]] % 101 == 7, 0] = torch.nan
        p.grad = grad

    for name, p in model.named_parameters():
        if name.startswith("tables."):
            p.register_post_accumulate_grad_hook(spoil)


def main(rank: int, size: int, port: str, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    ranks = join(torch.device("cpu"), 60.0)
    found = []
    for job in json.loads(Path(path).read_text()):
        try:
            found.append(do(job, ranks))
        except Exception:
            print(f"rank {rank}, {job['folder']}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            os._exit(1)
    Path(f"{path}.{rank}").write_text(json.dumps(found))
    ranks.gather_objects(rank)
    os._exit(0)  # gloo's threads now and then abort an interpreter that winds down by itself


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
