"""The bound: the job's matrix products alone, forward and both ways backward."""

import time

import torch
from job import BATCH, EXPERT, EXPERTS, INPUT, TASKS, TOWER, WARM_UP, Job, Outcome
from torch import Tensor

STEPS = 100
SHAPES = [  # of a layer: how many there are, inputs, outputs
    (EXPERTS, INPUT, EXPERT[0]),
    (EXPERTS, EXPERT[0], EXPERT[1]),
    (len(TASKS), INPUT, EXPERTS),
    (len(TASKS), EXPERT[1], TOWER),
    (len(TASKS), TOWER, 1),
]


def measure(job: Job, matmul: str, dtype: str = "float32") -> Outcome:
    """Multiply the matrices of a step, over and over: outputs, gradients of inputs, gradients of weights."""
    torch.set_float32_matmul_precision(matmul)
    kind = getattr(torch, dtype)
    layers = [
        (torch.randn(BATCH, n, dtype=kind), torch.randn(m, n, dtype=kind), torch.randn(BATCH, m, dtype=kind))
        for count, n, m in SHAPES
        for _ in range(count)
    ]
    start = 0.0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            start = time.perf_counter()
        for x, weight, gradient in layers:
            _multiply(x, weight, gradient)
    return Outcome(STEPS * BATCH, time.perf_counter() - start, predict=None)


def _multiply(x: Tensor, weight: Tensor, gradient: Tensor) -> None:
    torch.mm(x, weight.t())
    torch.mm(gradient, weight)
    torch.mm(gradient.t(), x)
