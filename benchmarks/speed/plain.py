"""The job in plain PyTorch, as one writes it down."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own convention
from job import BATCH, EXPERT, EXPERTS, IDS, INPUT, RATE, TASKS, TOWER, WIDTH, Clock, Job, Outcome, Rows
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer


class MMoE(nn.Module):
    """Four experts, and a gate and a tower for each task."""

    def __init__(self) -> None:
        super().__init__()
        wide, narrow = EXPERT
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(INPUT, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU()) for _ in range(EXPERTS)
        )
        self.gates = nn.ModuleList(nn.Linear(INPUT, EXPERTS, bias=False) for _ in TASKS)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(narrow, TOWER), nn.ReLU(), nn.Linear(TOWER, 1)) for _ in TASKS
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        logits = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            shares = torch.softmax(gate(x), 1)
            logits.append(tower((shares.unsqueeze(2) * outputs).sum(1)))
        return torch.cat(logits, 1)


class Batch(NamedTuple):
    ids: Tensor
    numbers: Tensor
    labels: Tensor


def batches(rows: Rows) -> Iterator[Batch]:
    """Cut tensors in memory into batches: the quickest way to feed a loop."""
    whole = Batch(*map(torch.from_numpy, rows))
    for start in range(0, len(whole.ids), BATCH):
        yield Batch(*(part[start : start + BATCH] for part in whole))


class DenseTables(nn.Module):
    """A table for each feature, with gradients as large as the table."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(job.rows_each, WIDTH) for _ in range(IDS))
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], 1)


class OneTable(nn.Module):
    """All tables one below the other, looked up at once, with a sparse gradient."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.table = nn.Embedding(IDS * job.rows_each, WIDTH, sparse=True)
        nn.init.normal_(self.table.weight, std=0.01)
        self.starts = torch.arange(IDS) * job.rows_each

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids + self.starts).flatten(1)


def train_dense(job: Job, **adagrad: Any) -> Outcome:
    """Learn with dense gradients; `adagrad` has further options of torch's Adagrad."""
    embed, dense = DenseTables(job), MMoE()
    return learn(job, embed, dense, [Adagrad([*embed.parameters(), *dense.parameters()], RATE, **adagrad)])


def train_sparse(job: Job, matmul: str = "highest", autocast: bool = False) -> Outcome:
    """Learn with one table and sparse gradients; the layers by the fused Adagrad."""
    torch.set_float32_matmul_precision(matmul)
    torch.sparse.check_sparse_tensor_invariants.disable()  # else torch's own Adagrad warns of what it builds
    embed, dense = OneTable(job), MMoE()
    optimizers = [Adagrad(embed.parameters(), RATE), Adagrad(dense.parameters(), RATE, fused=True)]
    return learn(job, embed, dense, optimizers, autocast)


def learn(job: Job, embed: nn.Module, dense: MMoE, optimizers: list[Optimizer], autocast: bool = False) -> Outcome:
    """Learn the log once."""
    clock, rows = Clock(), job.load("train")

    def score(batch: Batch) -> Tensor:
        x = torch.cat([embed(batch.ids), batch.numbers], 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return dense(x).float()

    for batch in clock.over(batches(rows)):
        loss = len(TASKS) * F.binary_cross_entropy_with_logits(score(batch), batch.labels)  # the sum over tasks
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    def predict() -> np.ndarray:
        with torch.no_grad():
            return torch.cat([score(batch) for batch in batches(job.load("valid"))]).numpy()

    return clock.outcome(len(rows.ids), predict)
