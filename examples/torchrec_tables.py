"""Your own TorchRec model and loop, with Clippy on its tables: at a rate that is far too high, and at a good one.

Run it with `torchrun --nproc-per-node 2 examples/torchrec_tables.py` (on CPUs, within half a minute). Users and items
have hidden tastes, and a table of vectors for each has to learn their products; every fiftieth step has wild labels, as
logs do. The model is trained by TorchRec's own fused row-wise Adagrad, which steps inside of backward, and then through
`sparse_gradients()` by optimizers that step after it. One factor for each row learns at both rates; one for a whole
table is safe at both, but the row that needs it most slows all others down.
"""

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology

from steadyrank import ClippyAdagrad, RowWiseAdagrad
from steadyrank.distributed import sparse_gradients, table_parameters

USERS, ITEMS, WIDTH = 400, 100, 8


class Model(nn.Module):
    """The product of a user's and an item's vector, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = EmbeddingBagCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=WIDTH, feature_names=[name])
                for name, rows in (("user", USERS), ("item", ITEMS))
            ],
        )
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        found = self.tables(ids)
        return (found["user"] * found["item"]).sum(1) + self.bias


def make(fused: dict[str, object] | None) -> DistributedModelParallel:
    """Shard the model as always. The planner may lay a table whole on a rank or cut it by rows, not by columns."""
    model, world = Model(), dist.get_world_size()
    allowed = ParameterConstraints(
        sharding_types=["table_wise", "row_wise", "table_row_wise"], compute_kernels=["fused"]
    )
    sharders = [EmbeddingBagCollectionSharder(fused_params=fused)]
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world, local_world_size=world, compute_device="cpu"),
        constraints={"user": allowed, "item": allowed},
    )
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def draw(step: int, rows: int) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    """Return this rank's rows of a step: ids, and what the vectors' product should be; now and then a wild one."""
    tastes = torch.Generator().manual_seed(0)
    users, items = (torch.randn(n, WIDTH, generator=tastes) / WIDTH**0.25 for n in (USERS, ITEMS))
    generator = torch.Generator().manual_seed(1 + step * dist.get_world_size() + dist.get_rank())
    u, i = (torch.randint(n, (rows,), generator=generator) for n in (USERS, ITEMS))
    labels = (users[u] * items[i]).sum(1)
    if step % 50 == 49:
        labels[0] *= 1000.0
    one_each = torch.ones(2 * rows, dtype=torch.int64)
    return KeyedJaggedTensor(["user", "item"], torch.cat([u, i]), lengths=one_each), labels


def train(
    rate: float, optimizer_class: Callable[..., torch.optim.Optimizer] | None = None, steps: int = 300
) -> tuple[float, float]:
    """Return the loss on clean rows after training, and the least clip factor; TorchRec's own optimizer when None."""
    torch.manual_seed(dist.get_rank())
    if optimizer_class is None:
        model = make({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": rate})
    else:
        with sparse_gradients():  # the one line, and nothing for the fused kernel
            model = make(None)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD([model.module.bias], lr=0.01)]
    if optimizer_class is not None:
        optimizers.append(optimizer_class(table_parameters(model), lr=rate, initial_accumulator_value=0.0, eps=1e-10))
    least = 1.0
    for step in range(steps):
        ids, labels = draw(step, 128)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(ids) - labels).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        factors = [state["clip_factor"] for state in optimizers[-1].state.values() if "clip_factor" in state]
        least = min([least, *(factor.item() for factor in factors)])
    with torch.no_grad():
        ids, labels = draw(10**6, 4096)
        loss = (model(ids) - labels).square().mean()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size(), least


def main() -> None:
    warnings.filterwarnings("ignore")  # what TorchRec says of itself
    logging.disable(logging.WARNING)  # likewise
    dist.init_process_group("gloo")
    for rate in (0.2, 5.0):
        for name, optimizer_class in (
            ("fused row-wise Adagrad", None),
            ("RowWiseAdagrad", RowWiseAdagrad),
            ("ClippyAdagrad, by row", partial(ClippyAdagrad, granularity="row")),
            ("ClippyAdagrad, by table", ClippyAdagrad),
        ):
            loss, least = train(rate, optimizer_class)
            if dist.get_rank() == 0:
                print(f"rate {rate:<5g} {name:24s} loss {loss:12.4g}   least clip factor {least:.4f}", flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that winds down by itself


if __name__ == "__main__":
    main()
