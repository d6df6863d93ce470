"""Your own PyTorch loop, one line swapped: ClippyAdagrad in place of Adagrad, and its clip factors read.

Run it with `python examples/own_loop.py`. A two-layer network learns a product of two inputs at a rate that is far too
high; every fiftieth step has one wild row, as logs do.
"""

import torch
from torch import nn

from steadyrank import ClippyAdagrad


def train(optimizer_class: type[torch.optim.Optimizer], lr: float = 1.0, steps: int = 300) -> tuple[float, float]:
    """Return the loss on clean rows after training, and the smallest clip factor (1 where there is none)."""
    rows = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = optimizer_class(model.parameters(), lr=lr, initial_accumulator_value=0.1)  # the one line
    smallest = torch.tensor(1.0)
    for step in range(steps):
        x = torch.randn(256, 2, generator=rows)
        if step % 50 == 49:
            x[0] *= 1000.0
        loss = (model(x).squeeze(1) - x[:, 0] * x[:, 1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        factors = [state["clip_factor"] for state in optimizer.state.values() if "clip_factor" in state]
        smallest = torch.stack([smallest, *factors]).min()
    x = torch.randn(4096, 2, generator=rows)
    with torch.no_grad():
        return (model(x).squeeze(1) - x[:, 0] * x[:, 1]).square().mean().item(), smallest.item()


def main() -> None:
    for optimizer_class in (torch.optim.Adagrad, ClippyAdagrad):
        loss, smallest = train(optimizer_class)
        print(f"{optimizer_class.__name__:14s} loss {loss:10.3f}   smallest clip factor {smallest:.4f}")


if __name__ == "__main__":
    main()
