"""You will see a regression's loss and rate, with AdaptiveScheduler and without: scheduler.png.

    python examples/scheduler.py [FOLDER]

SGD on 512 points, five epochs. The rate follows the loss's trend, its variance and plateaus, under
a cosine that restarts.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent))

from adaptiverl import AdaptiveScheduler


def make_toy_dataset(n: int = 512) -> TensorDataset:
    torch.manual_seed(0)
    x = torch.randn(n, 10)
    return TensorDataset(x, x @ torch.randn(10, 1) + 0.1 * torch.randn(n, 1))


def train(adaptive: bool, epochs: int = 5) -> tuple[list[float], list[float]]:
    """Losses and rates of all steps."""
    loader = DataLoader(make_toy_dataset(), batch_size=64, shuffle=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = AdaptiveScheduler(
        optimizer, up_factor=1.03, down_factor=0.8, patience=20, cooldown=40, use_cosine=True,
        T0=100, T_mult=2, lr_min=1e-5, lr_max=1.0,
    )  # fmt: skip
    losses, rates = [], []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            losses.append(loss.item())
            if adaptive:
                scheduler.step_loss(loss)
    return losses, rates


def main(folder: str = ".") -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, adaptive in (("AdaptiveScheduler", True), ("constant rate", False)):
        losses, rates = train(adaptive)
        print(f"{name}: loss {losses[0]:.3f} → {sum(losses[-8:]) / 8:.3f}, rate {rates[-1]:.4f}")
        left.semilogy(losses, label=name)
        right.plot(rates, label=name)
    left.set(xlabel="step", ylabel="loss")
    right.set(xlabel="step", ylabel="learning rate")
    left.legend()
    path = Path(folder, "scheduler.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
