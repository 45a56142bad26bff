"""You will see the rate follow the reward of a bandit under four rules: reward_scheduler.png.

    python examples/reward_scheduler.py [FOLDER]

A policy of ten arms learns by REINFORCE, whose rewards become noisier half-way.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from adaptiverl import RewardAdaptiveScheduler

RULES = ("scaling", "trend", "variance", "kelly")
STEPS, ARMS, BATCH = 300, 10, 16


def train(rule: str) -> tuple[list[float], list[float]]:
    """Mean rewards and rates of all steps."""
    torch.manual_seed(0)
    logits = torch.zeros(ARMS, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5, momentum=0.9)
    scheduler = RewardAdaptiveScheduler(optimizer, rule=rule, min_lr=1e-3, max_lr=2.0)
    value = torch.linspace(0, 1, ARMS)
    rewards, rates = [], []
    for step in range(STEPS):
        noise = 0.1 if step < STEPS // 2 else 2.0
        policy = torch.distributions.Categorical(logits=logits)
        arms = policy.sample((BATCH,))
        reward = value[arms] + noise * torch.randn(BATCH)
        (-(policy.log_prob(arms) * (reward - reward.mean())).mean()).backward()
        rates.append(scheduler.get_lr()[0])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.observe(R=reward.mean())
        rewards.append(reward.mean().item())
    return rewards, rates


def main(folder: str = ".") -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for rule in RULES:
        rewards, rates = train(rule)
        print(f"{rule:9} reward {rewards[0]:.2f} → {sum(rewards[-20:]) / 20:.2f}, "
              f"rate {min(rates):.3f} to {max(rates):.3f}")  # fmt: skip
        left.plot(rewards, label=rule, linewidth=0.8)
        right.semilogy(rates, label=rule)
    left.set(xlabel="step", ylabel="reward")
    right.set(xlabel="step", ylabel="learning rate")
    left.legend()
    path = Path(folder, "reward_scheduler.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
