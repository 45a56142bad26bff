"""An evaluation of the policy: one completion of each prompt of EVAL_FILE or EVAL_SPLIT."""

import logging
import math
from functools import partial

import torch
from datasets import Dataset

from adaptiverl.files.process import Paused
from adaptiverl.rl.reinforce import kl_per_token
from adaptiverl.rl.rollout import uniforms
from adaptiverl.training.batches import columns
from adaptiverl.training.build import Parts
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.metrics import Metrics
from adaptiverl.training.scoring import PendingScores, Scores


def evaluate(c: RunConfig, parts: Parts, prompts: Dataset) -> Metrics:
    """Metrics under eval/, from the same random numbers each time.

    eval/reward is None where no completion has a reward. eval/score is the reward less KL_COEF per
    nat of KL, whatever KL_COEF_TARGET has made of the coefficient.
    """
    runtime, scoring, step_rows = parts.runtime, parts.scoring, parts.batches.rows
    size = step_rows.stop - step_rows.start
    # As many rows in each process, because a sharded policy is sampled by all at once.
    total = math.ceil(len(prompts) / runtime.processes) * runtime.processes
    own = range(runtime.rank, total, runtime.processes)
    numbers = uniforms(c.SEED, 0, len(prompts), c.MAX_NEW_TOKENS)
    pending: list[PendingScores] = []
    reports: list[tuple[dict[str, float], dict[str, float]]] = []  # of each batch, by its rewards

    def first(begun: PendingScores, count: int) -> Scores:
        """Without the rows that only fill up a batch."""
        found = begun()
        reports.append((scoring.rewards.metrics, scoring.held_out.metrics))
        return Scores(found.trained[:count], found.held_out[:count])

    kl = torch.zeros(1, device=runtime.device)  # nats, over this process's completions
    for start in range(0, len(own), size):
        rows = [row % len(prompts) for row in own[start : start + size]]
        real = sum(row < len(prompts) for row in own[start : start + size])
        batch = columns(c, prompts, rows)
        rollout = parts.checked.sample(batch["prompt"], numbers[rows])
        begun = scoring.begin(batch, rollout, parts.sampler.decode(rollout), parts.progress.step)
        pending.append(partial(first, begun, real))
        if c.KL_COEF:
            reference = runtime.no_grad(
                parts.sampler.policy.reference_logprobs, rollout, c.GRAD_ACCUM
            )
            tokens = kl_per_token(rollout.logprobs, reference, c.KL_ESTIMATOR)
            kl += (tokens * rollout.completion_mask)[:real].sum()
    try:
        scores = scoring.wait(*pending, pairs=False)
    except Paused as reason:  # the step is made: pausing here would make it twice
        if runtime.is_main:
            logging.warning("evaluation left out: %s", reason)
        return {"eval/reward": None}
    total_scores = scoring.rewards.measure(scores.trained)
    known = total_scores[~total_scores.isnan()].tolist()
    reward = sum(known) / len(known) if known else None
    mean: Metrics = {"eval/reward": reward, "eval/score": reward}
    if c.KL_COEF:
        mean["eval/kl_per_completion"] = each = runtime.reduce(kl)[0] / len(prompts)
        mean["eval/score"] = None if reward is None else reward - c.KL_COEF * each
    trained, held_out = zip(*reports, strict=True)
    scoring.rewards.metrics = scoring.rewards.over_batches(trained)
    scoring.held_out.metrics = scoring.held_out.over_batches(held_out)
    return mean | scoring.metrics(scores, "eval/")
