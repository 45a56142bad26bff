"""What a step leaves: its metrics, its samples, and what an evaluation of the policy says.

Writing them to files is run/tracking.py's.
"""

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from adaptiverl.rl.diversity import distinct, repetition
from adaptiverl.rl.reinforce import zero_std_share
from adaptiverl.rl.rollout import Rollout, allowed_gap, uniforms
from adaptiverl.run.process import Clock, Paused
from adaptiverl.scoring import Batch, Begun
from rewards.composite import Scores

if TYPE_CHECKING:
    from adaptiverl.program import Run

Metrics = dict[str, Any]  # name → number, None where there is none


def summary(
    run: "Run", rollout: Rollout, reward: Tensor, kl: Tensor, sums: Tensor, grad_norm: Tensor
) -> Metrics:
    """The step's metrics; `sums` is what policy_gradient returned in this process."""
    lengths = run.gather(rollout.completion_mask.sum(-1)).float()
    every = run.gather(sums[None])  # [processes, 4]
    loss, entropy, gap, _ = every.mean(0).tolist()
    tokens = lengths.sum().item() / run.accelerator.num_processes
    completions = gather_object(rollout.tokens())
    known = reward[~reward.isnan()]
    run.state.skipped += not grad_norm.isfinite()
    result: Metrics = {
        "reward": known.mean().item() if len(known) else None,
        "reward_std": known.std().item() if len(known) > 1 else None,
        "frac_reward_zero_std": zero_std_share(reward, run.config.NUM_GENERATIONS),
        "loss": loss,
        "entropy": entropy / tokens,
        "sampling/sampling_logp_difference/mean": gap / tokens,
        "sampling/sampling_logp_difference/max": every[:, 3].max().item(),
        "grad_norm": grad_norm.item(),
        "completions/mean_length": lengths.mean().item(),
        "completions/distinct_1": distinct(completions, 1),
        "completions/distinct_2": distinct(completions, 2),
        "completions/repetition": repetition(completions),
        "skipped": run.state.skipped,
    }
    if run.config.KL_COEF:
        result["kl"] = (kl.sum() / lengths.sum()).item()  # per token, as TRL has it
        result["kl_per_completion"] = kl.mean().item()
        result["kl_coef"] = run.state.kl_coef
    return result


def warn(run: "Run", advantage: Tensor, metrics: Metrics) -> None:
    """Warns, once each, of numbers that training cannot build on."""
    if metrics["grad_norm"] == 0 and advantage.any():
        run.warn_once(
            "no gradient",
            "the gradient is exactly 0 although the rewards differ: nothing is learned. Likely "
            "cause: layers without a backward pass (quantised ones), LORA_TARGETS that the model "
            "does not use, or gradients that FP16 rounds to 0",
        )
    gap, allowed = metrics["sampling/sampling_logp_difference/mean"], allowed_gap(run.exact)
    if gap > allowed:
        cause = "the model computes otherwise with its cache than without (recurrent layers)"
        if run.config.VLLM_SERVER:
            cause = "the server has other weights, or less precision"
        run.warn_once(
            "gap",
            f"the log-probabilities of the samples and of the loss differ by {gap:.2g} nats per "
            f"token on average, more than the {allowed:g} that rounding explains: the gradient is "
            f"not that of the policy. Likely cause: {cause}",
        )


def timed(run: "Run", clock: Clock, length: float) -> Metrics:
    """Seconds of each lap, the mean over processes, and tokens a second of all completions."""
    laps = torch.tensor(list(clock.laps.values()), device=run.accelerator.device)
    seconds = run.accelerator.reduce(laps, "mean").tolist()
    speed = {"tokens_per_second": round(run.config.BATCH_SIZE * length / sum(seconds), 1)}
    named = zip(clock.laps, seconds, strict=True)
    return speed | {f"seconds/{name}": round(lap, 4) for name, lap in named}


def samples(
    run: "Run",
    batch: Batch,
    rollout: Rollout,
    completions: list[str],
    reward: Tensor,
    scores: Scores,
) -> list[dict[str, Any]]:
    """The step's rows of samples.jsonl: what the model wrote and what each reward said."""
    if not run.config.SAMPLES_EVERY or run.state.step % run.config.SAMPLES_EVERY:
        return []
    ids = rollout.tokens()
    logprobs = rollout.logprobs.tolist()
    rows = gather_object(
        [
            {
                "step": run.state.step,
                "prompt": batch["prompt"][i],
                "completion": completions[i],
                "completion_ids": ids[i],
                "logprobs": [round(value, 6) for value in logprobs[i][: len(ids[i])]],
            }
            | {name: values[i] for name, values in run.rewards.extras.items()}
            for i in range(len(ids))
        ]
    )
    for i, row in enumerate(rows):
        row["reward"] = reward[i].item()
        row |= {f"rewards/{name}": column[i] for name, column in scores.items()}
    return rows


def evaluate(run: "Run", prompts: Dataset) -> Metrics:
    """One completion of every held-out prompt, always from the same random numbers."""
    c = run.config
    rank, processes = run.accelerator.process_index, run.accelerator.num_processes
    # As many rows in each process, because a sharded policy is sampled by all at once.
    own = range(rank, math.ceil(len(prompts) / processes) * processes, processes)
    chance = uniforms(c.SEED, 0, len(prompts), c.MAX_NEW_TOKENS)
    begun: list[Begun] = []
    size = run.own_rows.stop - run.own_rows.start
    for start in range(0, len(own), size):
        rows = [row % len(prompts) for row in own[start : start + size]]
        real = sum(row < len(prompts) for row in own[start : start + size])
        batch = run.columns(prompts, rows)
        rollout = run.complete(batch["prompt"], chance[rows])
        one = run.begin_scoring(batch, rollout, run.sampler.decode(rollout))
        begun.append(partial(_first, one, real))
    try:
        scores, held_out = run.scoring.scores(*begun, pairs=False)
    except Paused as reason:  # the step is made: pausing here would make it twice
        if run.is_main:
            logging.warning("evaluation left out: %s", reason)
        return {"eval/reward": None}
    known = [value for value in run.rewards.combine(scores) if value is not None]
    mean = {"eval/reward": sum(known) / len(known) if known else None}
    return mean | run.scoring.said(scores, held_out, "eval/")


def _first(begun: Begun, count: int) -> tuple[Scores, Scores]:
    """Without the rows that only fill up a batch."""
    one, other = ({k: column[:count] for k, column in part.items()} for part in begun())
    return one, other
