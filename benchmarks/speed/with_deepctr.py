"""The job by DeepCTR-Torch: its MMOE, compiled and fitted as its documentation has it.

Its regularisation is off, as that of the others: with it, each step goes over the whole tables. Its loss is a sum over
the batch's rows where others take the mean, which is one to Adagrad.
"""

import time
from typing import Any, NoReturn

import numpy as np
import requests
from job import BATCH, EXPERT, EXPERTS, ID_NAMES, NUMBER_NAMES, RATE, TASKS, TOWER, WARM_UP, WIDTH, Job, Outcome, Rows
from torch.optim import Adagrad


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise OSError("a benchmark asks nobody for a newer version")


requests.get = _refuse  # by the import that follows, in a thread
from deepctr_torch.callbacks import Callback  # noqa: E402
from deepctr_torch.inputs import DenseFeat, SparseFeat  # noqa: E402
from deepctr_torch.models import MMOE  # noqa: E402


class _Clock(Callback):
    """Takes the time of an epoch, which is all that its callbacks are told of."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = time.perf_counter() - self.start


def train(job: Job, **adagrad: Any) -> Outcome:
    """Fit the first steps, then the rest under the clock; `adagrad` has further options of torch's Adagrad."""
    rows, clock, warm = job.load("train"), _Clock(), WARM_UP * BATCH
    columns = [SparseFeat(name, vocabulary_size=job.rows_each, embedding_dim=WIDTH) for name in ID_NAMES]
    columns += [DenseFeat(name) for name in NUMBER_NAMES]
    model = MMOE(
        columns,
        num_experts=EXPERTS,
        expert_dnn_hidden_units=EXPERT,
        gate_dnn_hidden_units=(),
        tower_dnn_hidden_units=(TOWER,),
        l2_reg_linear=0,
        l2_reg_embedding=0,
        task_names=TASKS,
    )
    model.compile(Adagrad(model.parameters(), RATE, **adagrad), loss=["binary_crossentropy"] * len(TASKS))
    for part in (slice(0, warm), slice(warm, None)):
        model.fit(
            _by_name(rows, part), rows.labels[part], batch_size=BATCH, verbose=0, shuffle=False, callbacks=[clock]
        )
    x_valid = _by_name(job.load("valid"), slice(None))
    return Outcome(len(rows.ids) - warm, clock.seconds, lambda: np.asarray(model.predict(x_valid, BATCH)))


def _by_name(rows: Rows, part: slice) -> dict[str, np.ndarray]:
    columns = {name: rows.ids[part, i] for i, name in enumerate(ID_NAMES)}
    return columns | {name: rows.numbers[part, i] for i, name in enumerate(NUMBER_NAMES)}
