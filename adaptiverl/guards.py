"""Warnings, once each, of a run that has nothing to learn from: why, and which keys change that."""

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from adaptiverl.report import Metrics
from adaptiverl.rl.reinforce import zero_std_share

if TYPE_CHECKING:
    from adaptiverl.program import Run

FLAT_STEPS = 5  # in a row without a difference between rewards; fewer may be chance
DETERMINISTIC = 0.1  # nats per token; a policy of less entropy repeats itself

MISSING = (
    "no completion has a reward: {rewards} gave None, or a score that is not finite, for all of "
    "them. Such a step trains nothing; look at REWARDS"
)
COLLAPSED = (
    "the policy repeats itself (entropy {entropy:.2f} nats per token), and all rewards that are "
    "compared are equal: it has probably collapsed. Start again with a smaller LRATE, or with "
    "LR_RULE kl_target; if it was so from the first step, raise TEMPERATURE"
)
CONSTANT = (
    "all rewards that are compared have been equal for {steps} steps (frac_reward_zero_std): there "
    "is nothing to learn from but the KL penalty. Change REWARDS so that they tell completions "
    "apart; if rewards are rare, raise NUM_GENERATIONS and BATCH_SIZE"
)


def warn(run: "Run", reward: Tensor, metrics: Metrics) -> None:
    """Looks at the step's rewards [B], NaN where one is missing, and at its metrics."""
    c, state = run.config, run.state
    # BASELINE rloo compares completions of one prompt, the others those of the batch.
    flat = zero_std_share(reward, c.NUM_GENERATIONS if c.BASELINE == "rloo" else 1) == 1
    state.flat_steps = state.flat_steps + 1 if flat else 0
    if metrics["reward"] is None:
        _once(run, "missing", MISSING.format(rewards=", ".join(run.rewards.rewards)))
    elif flat and metrics["entropy"] < DETERMINISTIC:
        _once(run, "collapsed", COLLAPSED.format(entropy=metrics["entropy"]))
    elif state.flat_steps >= min(FLAT_STEPS, run.last_step):
        _once(run, "constant", CONSTANT.format(steps=state.flat_steps))


def _once(run: "Run", kind: str, text: str) -> None:
    if kind not in run.state.warned:
        run.state.warned.append(kind)
        if run.is_main:
            logging.warning("step %d: %s", run.state.step, text)
