"""The job by FuxiCTR: a model on its MultiTaskModel, FeatureEmbedding and MLP_Block, its loader and its fit.

Its package comes without the model zoo's MMoE, so that the model is written here as its README says a new one is. Its
numbers are features of width 1, as the others have them; the norm of all gradients is clipped in each step, which
cannot be left out.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import MultiTaskModel
from job import BATCH, EXPERT, EXPERTS, ID_NAMES, NUMBER_NAMES, RATE, TASKS, TOWER, WIDTH, Clock, Job, Outcome
from torch import Tensor, nn


class MMoE(MultiTaskModel):
    """Experts, and a gate and a tower for each task, of FuxiCTR's blocks."""

    def __init__(self, features: FeatureMap, folder: Path) -> None:
        kind = ["binary_classification"] * len(TASKS)
        super().__init__(
            features,
            "MMoE",
            task=kind,
            num_tasks=len(TASKS),
            verbose=0,
            model_root=str(folder),
            metrics=["AUC"],
        )
        width = features.sum_emb_out_dim()
        self.embedding = FeatureEmbedding(features, WIDTH)
        self.experts = nn.ModuleList(MLP_Block(width, list(EXPERT)) for _ in range(EXPERTS))
        self.gates = nn.ModuleList(
            MLP_Block(width, [], output_dim=EXPERTS, output_activation="softmax", use_bias=False) for _ in TASKS
        )
        self.towers = nn.ModuleList(MLP_Block(EXPERT[-1], [TOWER], output_dim=1) for _ in TASKS)
        self.compile("Adagrad", ["binary_crossentropy"] * len(TASKS), RATE)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.embedding(self.get_inputs(inputs), flatten_emb=True)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        scores = {}
        for i, (gate, tower) in enumerate(zip(self.gates, self.towers, strict=True)):
            mixed = (gate(x).unsqueeze(2) * outputs).sum(1)
            scores[f"{self.feature_map.labels[i]}_pred"] = self.output_activation[i](tower(mixed))
        return scores


class _Ending:
    """The first batch of the validation part, whose reading ends training: `fit` must validate, and needs no more."""

    def __init__(self, batches: Any, clock: Clock) -> None:
        self._batches, self._clock = batches, clock

    def __iter__(self) -> Iterator[Any]:
        self._clock.stop()
        return islice(self._batches, 1)


def train(job: Job, workers: int = 0, data_format: str = "npz") -> Outcome:
    """Fit for one epoch, from a file of arrays or from Parquet, with `workers` processes that read."""
    rows = {part: job.load(part) for part in ("train", "valid")}
    features = FeatureMap("job", str(job.folder))
    features.labels = list(TASKS)
    for name in ID_NAMES:
        features.features[name] = {"type": "categorical", "source": "", "vocab_size": job.rows_each}
    for name in NUMBER_NAMES:
        features.features[name] = {"type": "numeric", "source": "", "embedding_dim": 1}
    features.default_emb_dim, features.num_fields = WIDTH, features.get_num_fields()
    features.set_column_index()
    paths = {f"{part}_data": str(job.path(part).with_suffix(f".{data_format}")) for part in rows}
    if data_format == "npz":
        for part, of in rows.items():
            columns = dict(zip(ID_NAMES, of.ids.T, strict=True)) | dict(zip(NUMBER_NAMES, of.numbers.T, strict=True))
            np.savez(paths[f"{part}_data"], **columns, **dict(zip(TASKS, of.labels.T, strict=True)))
    (job.folder / "job").mkdir(exist_ok=True)  # for its checkpoint
    model, clock = MMoE(features, job.folder), Clock()
    train_loader, valid_loader = RankDataLoader(
        features, "train", **paths, batch_size=BATCH, shuffle=False, data_format=data_format, num_workers=workers
    )
    model.fit(clock.over(train_loader), epochs=1, validation_data=_Ending(valid_loader, clock))

    def predict() -> np.ndarray:
        scores = model.predict(valid_loader)
        return np.stack([scores[name] for name in TASKS], 1)

    return clock.outcome(len(rows["train"].ids), predict)
