"""The job by torch-rechub: its MMOE, DataGenerator and MTLTrainer, as its README has them.

Its layers have a batch norm each, which cannot be left out.
"""

from typing import Any

import numpy as np
from job import BATCH, EXPERT, EXPERTS, ID_NAMES, NUMBER_NAMES, RATE, TASKS, TOWER, WIDTH, Clock, Job, Outcome, Rows
from torch.optim import Adagrad
from torch.utils.data import DataLoader
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import MMOE
from torch_rechub.trainers import MTLTrainer
from torch_rechub.utils.data import DataGenerator, PredictDataset


def train(job: Job, workers: int = 0, **adagrad: Any) -> Outcome:
    """Train for one epoch, with `workers` processes that read; `adagrad` has further options of torch's Adagrad."""
    rows, valid, kinds, clock = job.load("train"), job.load("valid"), ["classification"] * len(TASKS), Clock()
    features = [SparseFeature(name, vocab_size=job.rows_each, embed_dim=WIDTH) for name in ID_NAMES]
    features += [DenseFeature(name) for name in NUMBER_NAMES]
    towers = [{"dims": [TOWER]} for _ in TASKS]
    model = MMOE(features, kinds, EXPERTS, expert_params={"dims": list(EXPERT)}, tower_params_list=towers)
    x_valid, first = _by_name(valid), slice(BATCH)  # it validates in `fit`, of which nothing is needed
    x_first = {name: values[first] for name, values in x_valid.items()}
    train_loader, valid_loader, _ = DataGenerator(_by_name(rows), rows.labels).generate_dataloader(
        x_val=x_first,
        y_val=valid.labels[first],
        x_test=x_first,
        y_test=valid.labels[first],
        batch_size=BATCH,
        num_workers=workers,
    )
    trainer = MTLTrainer(model, kinds, Adagrad, {"lr": RATE, **adagrad}, n_epoch=1, model_path=str(job.folder))
    trainer.fit(clock.over(train_loader), valid_loader)
    loader = DataLoader(PredictDataset(x_valid), batch_size=BATCH)
    return clock.outcome(len(rows.ids), lambda: np.array(trainer.predict(model, loader)))


def _by_name(rows: Rows) -> dict[str, np.ndarray]:
    columns = {name: rows.ids[:, i].copy() for i, name in enumerate(ID_NAMES)}
    return columns | {name: rows.numbers[:, i].copy() for i, name in enumerate(NUMBER_NAMES)}
