"""Warnings, once each, of a run that learns nothing or something wrong: the cause and the key."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adaptiverl.rl.reinforce import is_informative
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.metrics import Metrics

FLAT_STEPS = 5  # in a row without a difference between rewards; fewer may be chance
DETERMINISTIC = 0.1  # nats per token; a policy of less entropy repeats itself

NO_GRADIENT = (
    "the gradient is exactly 0 although the rewards differ: nothing is learned. Likely cause: "
    "layers without a backward pass (quantised ones), LORA_TARGETS that the model does not use, or "
    "gradients that FP16 rounds to 0"
)
RATE_OF_ZERO = "the learning rate is 0, and no rule moves it from there: nothing is trained (LRATE)"
DRIFT = (
    "the log-probabilities of the samples and of the loss differ by {gap:.2g} nats per token on "
    "average, more than the {allowed:g} that rounding explains: the gradient is not that of the "
    "policy. Likely cause: {cause}"
)
MISSING = (
    "no completion has a reward: {rewards} gave None, or a score that is not finite, for all of "
    "them. Such a step trains nothing; look at REWARDS"
)
COLLAPSED = (
    "the policy repeats itself (entropy {entropy:.2f} nats per token), and all rewards that are "
    "compared are equal: it has probably collapsed. Start again with a smaller LRATE, or with "
    "LR_RULE trust_region; if it was so from the first step, raise TEMPERATURE"
)
CONSTANT = (
    "all rewards that are compared have been equal for {steps} steps in a row, so only the KL "
    "penalty trains the policy (frac_reward_zero_std). Change REWARDS so that they tell "
    "completions apart; if rewards are rare, raise NUM_GENERATIONS and BATCH_SIZE"
)


@dataclass
class Guards:
    """Looks at each step's numbers; remembers in its state what was said."""

    config: RunConfig
    last_step: int
    allowed_gap: float  # nats per token by which sampling and the loss may differ
    is_main: bool = True  # whether this process logs
    flat_steps: int = 0  # steps in a row in which no rewards that are compared differed
    warned: list[str] = field(default_factory=list)

    def look(self, step: int, reward: Tensor, advantage: Tensor, metrics: Metrics) -> None:
        """`reward` [B] is NaN where it is missing. Every process calls it; the main one logs."""
        for kind, message in self._found(reward, advantage, metrics):
            if kind not in self.warned:
                self.warned.append(kind)
                if not self.is_main:
                    continue
                logging.warning("step %d: %s", step, message)

    def _found(
        self, reward: Tensor, advantage: Tensor, metrics: Metrics
    ) -> Iterator[tuple[str, str]]:
        c = self.config
        if metrics["grad_norm"] == 0 and advantage.any():
            yield "no gradient", NO_GRADIENT
        if metrics["lr"] == 0:
            yield "rate", RATE_OF_ZERO
        gap = metrics["sampling/sampling_logp_difference/mean"]
        if gap > self.allowed_gap:
            cause = "the model computes otherwise with its cache than without (recurrent layers)"
            if c.VLLM_SERVER:
                cause = "the server has other weights, or less precision"
            yield "drift", DRIFT.format(gap=gap, allowed=self.allowed_gap, cause=cause)
        flat = not is_informative(reward, c.BASELINE, c.NUM_GENERATIONS)
        self.flat_steps = self.flat_steps + 1 if flat else 0
        if metrics["reward"] is None:
            yield "missing", MISSING.format(rewards=", ".join(each.name for each in c.REWARDS))
        elif flat and metrics["entropy"] < DETERMINISTIC:
            yield "collapsed", COLLAPSED.format(entropy=metrics["entropy"])
        elif self.flat_steps >= min(FLAT_STEPS, self.last_step):
            yield "constant", CONSTANT.format(steps=self.flat_steps)

    def state_dict(self) -> dict[str, Any]:
        return {"flat_steps": self.flat_steps, "warned": list(self.warned)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.flat_steps, self.warned = state["flat_steps"], list(state["warned"])
