"""Who takes part, and one contestant's run, in a process of its own.

    python benchmarks/speed/contestants.py NAME FOLDER [--table-rows N]

Prints one line of JSON: rows a second while training, AUC of each task on the validation part, the largest memory that
the process held until training ended, and its version.
"""

import argparse
import importlib
import json
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """One way to do the job."""

    words: str
    """What it is, for the table."""
    package: str
    """The package whose version counts."""
    module: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def version(self) -> str | None:
        """Return the version of its package, None if that is not installed."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def _ours(words: str, function: str, **options: Any) -> Contestant:
    return Contestant(f"steadyrank, {words}", "steadyrank", "ours", function, options)


def _plain(words: str, function: str, **options: Any) -> Contestant:
    return Contestant(f"plain PyTorch, {words}", "torch", "plain", function, options)


def _bound(words: str, **options: Any) -> Contestant:
    return Contestant(f"bound: the matrix products alone, {words}", "torch", "bound", "measure", options)


CONTESTANTS = {
    "steadyrank": _ours("a whole run, as `steadyrank init` starts it", "train_whole"),
    "steadyrank-float32": _ours("a whole run, in float32", "train_whole", overrides=["train.precision=float32"]),
    "steadyrank-adagrad": _ours("a whole run, Adagrad as the others have it", "train_whole", optimizers="adagrad"),
    "step": _ours("the step alone, of that run", "train_step"),
    "step-adagrad": _ours("the step alone, Adagrad as the others have it", "train_step", optimizers="adagrad"),
    "torch-rechub": Contestant("torch-rechub, MMOE", "torch-rechub", "with_rechub", "train"),
    "torch-rechub-fused": Contestant(
        "torch-rechub, MMOE, torch's fused Adagrad", "torch-rechub", "with_rechub", "train", {"fused": True}
    ),
    "deepctr-torch": Contestant("DeepCTR-Torch, MMOE", "deepctr-torch", "with_deepctr", "train"),
    "deepctr-torch-fused": Contestant(
        "DeepCTR-Torch, MMOE, torch's fused Adagrad", "deepctr-torch", "with_deepctr", "train", {"fused": True}
    ),
    "fuxictr": Contestant("FuxiCTR, MMoE of its blocks", "fuxictr", "with_fuxictr", "train"),
    "torchrec": Contestant("TorchRec's fused tables, plain layers", "torchrec", "with_torchrec", "train"),
    "dense": _plain("dense gradients, Adagrad", "train_dense"),
    "dense-foreach": _plain("dense gradients, Adagrad by lists", "train_dense", foreach=True),
    "dense-fused": _plain("dense gradients, fused Adagrad", "train_dense", fused=True),
    "sparse": _plain("one table with sparse gradients", "train_sparse"),
    "sparse-medium": _plain("one table with sparse gradients, products `medium`", "train_sparse", matmul="medium"),
    "sparse-bf16": _plain("one table with sparse gradients, bf16 autocast", "train_sparse", autocast=True),
    "bound-float32": _bound("float32 as torch has it", matmul="highest"),
    "bound-medium": _bound("float32, `medium`", matmul="medium"),
    "bound-bf16": _bound("bf16", matmul="highest", dtype="bfloat16"),
}


def run(name: str, folder: Path, table_rows: int) -> dict[str, Any]:
    """Let one contestant do the job."""
    import torch  # here, so that the contest, which imports this file, stays small
    from job import TASKS, Job

    contestant, job = CONTESTANTS[name], Job(folder, table_rows)
    torch.manual_seed(0)
    outcome = getattr(importlib.import_module(contestant.module), contestant.function)(job, **contestant.options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux
    found = {
        "contestant": name,
        "version": contestant.version(),
        "rows_per_s": outcome.rows / outcome.seconds,
        "rows": outcome.rows,
        "seconds": outcome.seconds,
        "peak_mb": peak,
    }
    if outcome.predict is not None:
        from sklearn.metrics import roc_auc_score  # after the memory was read

        labels, scores = job.load("valid").labels, outcome.predict()
        found |= {f"auc_{task}": float(roc_auc_score(labels[:, i], scores[:, i])) for i, task in enumerate(TASKS)}
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("name", choices=list(CONTESTANTS))
    options.add_argument("folder", type=Path)
    options.add_argument("--table-rows", type=int, default=1_000_000)
    arguments = options.parse_args()
    print(json.dumps(run(arguments.name, arguments.folder, arguments.table_rows)), flush=True)


if __name__ == "__main__":
    main()
