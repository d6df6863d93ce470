"""The job with TorchRec's fused tables; it has no MMoE, so that the layers are those of plain PyTorch."""

import torch
from job import ID_NAMES, RATE, WIDTH, Job, Outcome
from plain import MMoE, learn
from torch import Tensor, nn
from torch.optim import Adagrad
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection


class FusedTables(nn.Module):
    """TorchRec's tables, which take their own step within the backward pass."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(
                name=f"table_{name}",
                embedding_dim=WIDTH,
                num_embeddings=job.rows_each,
                feature_names=[name],
                weight_init_min=-0.017,
                weight_init_max=0.017,
            )
            for name in ID_NAMES
        ]
        self.tables = FusedEmbeddingBagCollection(tables, Adagrad, {"lr": RATE})

    def forward(self, ids: Tensor) -> Tensor:
        values = ids.t().reshape(-1)
        features = KeyedJaggedTensor(keys=ID_NAMES, values=values, offsets=torch.arange(len(values) + 1))
        return self.tables(features).values()


def train(job: Job) -> Outcome:
    """Learn with TorchRec's fused tables; the layers by the fused Adagrad."""
    embed, dense = FusedTables(job), MMoE()
    return learn(job, embed, dense, [Adagrad(dense.parameters(), RATE, fused=True)])
