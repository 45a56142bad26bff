"""Fine-tunes a language model by REINFORCE on composite rewards.

    python train.py config.json [KEY=VALUE ...] [--dry-run]

The algorithm is here, in order. What it runs on (model, data, rewards, checkpoints) is made from
the config by adaptiverl/program.py.
"""

import sys

from adaptiverl.run.command import Command, read_command

if __name__ == "__main__":  # before the seconds of the imports below: a mistake is told at once
    COMMAND = read_command()

import logging
import math
from contextlib import closing, nullcontext
from functools import partial

import torch
from torch import Tensor

from adaptiverl import guards, report, saving
from adaptiverl.program import Run
from adaptiverl.rl.reinforce import advantages, kl_per_token, token_weights
from adaptiverl.rl.rollout import Rollout
from adaptiverl.run.config import UserError
from adaptiverl.run.console import Console, printable
from adaptiverl.run.process import Clock, Paused, StopSignal, peak_memory
from adaptiverl.run.tracking import RunLog, table


def train(run: Run, log: RunLog | None, stop: StopSignal) -> None:
    """REINFORCE (Williams 1992), with a KL penalty to where the policy began."""
    c, state = run.config, run.state
    while state.step < run.last_step and not run.stopped_by(stop):
        state.step += 1
        clock = Clock()

        # Sample completions of the step's prompts from the policy as it is now, y ~ π(·|x).
        batch = run.batch_at(state.step)
        rollout = run.sample(batch, state.step)
        completions = run.sampler.decode(rollout)
        clock.lap("rollout")

        # Reward them, R(x, y); a slow reward answers while the reference is computed.
        scoring = run.begin_scoring(batch, rollout, completions)
        clock.lap("reward")
        reference = run.reference_logprobs(rollout) if c.KL_COEF else rollout.logprobs
        clock.lap("reference")
        scores, held_out = run.scoring.scores(scoring)  # of all processes
        total = run.rewards.combine(scores, state.step, c.NUM_GENERATIONS)
        reward = torch.tensor([math.nan if r is None else r for r in total])  # NaN: missing
        clock.lap("reward")

        # Penalise the distance to the reference, R − β KL(π ‖ π₀).
        kl = kl_per_token(rollout.logprobs, reference, c.KL_ESTIMATOR) * rollout.completion_mask
        kl = run.gather(kl.sum(-1))
        penalised = reward - state.kl_coef * kl

        # Compare with a baseline, A = R − b.
        advantage, weight = advantages(
            penalised,
            c.BASELINE,
            group_size=c.NUM_GENERATIONS,
            ema=state.reward_ema,
            normalize=c.NORMALIZE_ADVANTAGES,
        )

        # Step along the gradient of the mean of A log π(y|x), within a trust region.
        sums = policy_gradient(run, rollout, advantage, state.kl_coef * weight, reference)
        limit = c.MAX_GRAD_NORM or math.inf
        grad_norm = run.accelerator.clip_grad_norm_(run.policy.parameters(), limit)
        metrics = run.step(rollout, grad_norm)
        run.optimizer.zero_grad()
        clock.lap("update")

        # Let what was seen move the hyperparameters of the next step.
        metrics |= report.summary(run, rollout, reward, kl, sums, grad_norm)
        report.warn(run, advantage, metrics)
        metrics |= run.scoring.said(scores, held_out)
        metrics |= run.rewards.balance(scores, state.step, c.NUM_GENERATIONS)
        guards.warn(run, reward, metrics)
        run.adapt(penalised, kl, metrics)
        metrics |= report.timed(run, clock, metrics["completions/mean_length"])
        samples = report.samples(run, batch, rollout, completions, reward, scores)
        if run.eval_prompts and c.EVAL_EVERY and state.step % c.EVAL_EVERY == 0:
            metrics |= report.evaluate(run, run.eval_prompts)
        run.record(metrics, samples, log)
        if c.SAVE_EVERY and state.step % c.SAVE_EVERY == 0:
            saving.save(run, log)


def policy_gradient(
    run: Run, rollout: Rollout, advantage: Tensor, kl_coef: Tensor, reference: Tensor
) -> Tensor:
    """Adds minus the policy gradient to .grad, in GRAD_ACCUM pieces.

    Returns four numbers [4] of this process: the loss, the sum of entropies, and the sum and the
    largest of |log-probability when sampled − log-probability in the loss|. `advantage` and
    `kl_coef` are those of all processes' completions, `reference` is [B, T] of this process's. The
    mean over processes is DDP's.
    """
    c, sums = run.config, torch.zeros(4, device=run.accelerator.device)
    advantage, kl_coef = (x[run.own_rows].to(rollout.logprobs) for x in (advantage, kl_coef))
    weights = token_weights(
        rollout.logprobs,
        rollout.completion_mask,
        advantage,
        reference=reference,
        kl_coef=kl_coef,
        estimator=c.KL_ESTIMATOR,
    )
    pieces = rollout.pieces(c.GRAD_ACCUM)
    for rows in pieces:
        part = rollout.part(rows)
        width = part.completion_ids.shape[1]
        # FSDP would keep the gradients of the whole model on each GPU until they are reduced.
        reduce = run.sharded or rows is pieces[-1]
        with nullcontext() if reduce else run.accelerator.no_sync(run.policy):
            measure = partial(run.sampler.weighted_logprobs, part, weights[rows, :width])
            gain, logprobs, entropy = run.policy(measure)
            run.accelerator.backward(-gain)
        gap = (part.logprobs - logprobs).abs()
        sums[:3] += torch.stack([-gain.detach(), entropy.sum(), gap.sum()])
        sums[3] = torch.maximum(sums[3], gap.max())
    return sums


def dry_run(run: Run) -> int:
    """Samples, rewards and differentiates one batch, says what came of it, and trains nothing."""
    clock = Clock()
    batch = run.batch_at(1)
    rollout = run.sample(batch, 1)
    completions = run.sampler.decode(rollout)
    clock.lap("rollout")
    scores, _ = run.scoring.scores(run.begin_scoring(batch, rollout, completions))
    clock.lap("reward")
    reference = run.reference_logprobs(rollout) if run.config.KL_COEF else rollout.logprobs
    clock.lap("reference")
    ones = torch.ones(run.config.BATCH_SIZE)
    policy_gradient(run, rollout, ones, run.config.KL_COEF * ones, reference)
    clock.lap("update")
    if not run.is_main:
        return 0
    scores |= {"reward": run.rewards.combine(scores, groups=run.config.NUM_GENERATIONS)}
    own = {name: column[run.own_rows] for name, column in scores.items()}
    print(table({"prompt": batch["prompt"], "completion": completions} | own))
    counts = [(p.numel(), p.requires_grad) for p in run.policy.parameters()]
    total, trained = sum(n for n, _ in counts), sum(n for n, grad in counts if grad)
    print(f"trainable parameters  {trained:,} of {total:,} ({trained / total:.1%})")
    print(f"peak memory           {peak_memory() / 2**30:.2f} GiB")
    laps = ", ".join(f"{name} {lap:.2f}" for name, lap in clock.laps.items())
    print(f"seconds a step        {sum(clock.laps.values()):.2f} ({laps})")
    print("dry run: nothing was trained")
    return 0


def main(command: Command | None = None) -> int:
    """Does what `command` says, or else the command line; the exit status."""
    config, only_try = command or read_command()
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[Console()]
    )
    try:
        run = Run(config)
        with closing(run):
            if only_try:
                return dry_run(run)
            log, stop = run.start(), StopSignal(run.interrupt)
            with closing(log) if log else nullcontext():
                try:
                    train(run, log, stop)
                except Paused as reason:
                    return saving.pause(run, reason, stop, log)
                return saving.finish(run, stop, log)
    except UserError as mistake:
        print(f"error: {printable(str(mistake))}", file=sys.stderr)
        return 2
    except Paused as reason:  # of a dry run
        print(f"error: {printable(str(reason))}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("stopped before the first step", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(COMMAND))
