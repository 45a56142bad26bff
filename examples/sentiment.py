"""You will see the mean sentiment of a tiny GPT-2's film reviews rise, from a typed rate of 1.

    python examples/sentiment.py [STEPS]

REINFORCE in twenty lines of the library: the loop of train.py without its penalty and its files.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from adaptiverl import AdamMini, AdaptiveOptimizer
from adaptiverl.rl.loading import load_policy, load_tokenizer
from adaptiverl.rl.reinforce import advantages, kl_per_token, token_weights
from adaptiverl.rl.rollout import uniforms
from adaptiverl.rl.sampling.sampler import Sampler
from rewards import ClassifierReward

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "adaptiverl/assets/policy")
PROMPTS = ["This film", "I watched it", "The acting", "My wife"]
EACH, LENGTH = 8, 16  # completions of each prompt, and their most tokens


def train(steps: int = 40) -> list[float]:
    """The mean reward of each step."""
    reward = ClassifierReward(model=str(ROOT / "adaptiverl/assets/sentiment"))
    policy = load_policy(MODEL, reference=False)
    sampler = Sampler(policy, load_tokenizer(MODEL))
    base = AdamMini(policy.parameters(), lr=1.0)
    optimizer = AdaptiveOptimizer(base, "trust_region", steps=steps)
    prompts = [prompt for prompt in PROMPTS for _ in range(EACH)]
    means = []
    for step in range(steps):
        rollout = sampler(prompts, uniforms(0, step, len(prompts), LENGTH))
        texts = sampler.decode(rollout)
        found = reward(prompts, texts)  # None of a blank text, which then teaches nothing
        scores = torch.tensor([math.nan if score is None else score for score in found])
        advantage, _ = advantages(scores, "rloo", group_size=EACH, normalize=True)
        weights = token_weights(rollout.logprobs, rollout.completion_mask, advantage)
        (-policy(rollout.with_weights(weights)).score).backward()

        def measure_kl(rollout=rollout) -> float:
            """Nats per token, on the tokens that were sampled."""
            with torch.no_grad():
                kl = kl_per_token(rollout.logprobs, policy.logprobs(rollout), "k3")
            return kl[rollout.completion_mask.bool()].mean().item()

        optimizer.step(measure_kl=measure_kl)
        optimizer.zero_grad()
        means.append(scores.nanmean().item())
        if step % 5 == 0 or step == steps - 1:
            said = f"reward {means[-1]:.3f}  rate {optimizer.lr:.1e}  {texts[0]!r}"
            print(f"step {step + 1:3}  {said}")
    return means


if __name__ == "__main__":
    train(*map(int, sys.argv[1:]))
