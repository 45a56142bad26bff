"""Fine-tunes a language model by REINFORCE on composite rewards.

    python train.py config.json [KEY=VALUE ...] [--dry-run]

The algorithm is here, in order. adaptiverl/training/ makes its parts from the config, and writes
down what it did.
"""

import sys

from adaptiverl.commands.arguments import Command, read_command

if __name__ == "__main__":  # before the seconds of the imports below: a mistake is told at once
    COMMAND = read_command()

import logging
import math
from contextlib import closing

import torch

from adaptiverl.config.schema import ConfigError
from adaptiverl.files.checkpoint import BEST
from adaptiverl.files.console import Console, forgiving_console, printable
from adaptiverl.files.process import Paused, StopSignal, Stopwatch
from adaptiverl.files.room import cause
from adaptiverl.rl.reinforce import (
    adapt_kl_coef,
    advantages,
    is_informative,
    kl_per_token,
    token_weights,
    updated_ema,
)
from adaptiverl.training import metrics as log
from adaptiverl.training.advice import room_advice
from adaptiverl.training.build import Parts, build
from adaptiverl.training.collapse import Collapsed
from adaptiverl.training.dry_run import dry_run
from adaptiverl.training.evaluation import evaluate
from adaptiverl.training.folder import RunFolder
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.rollback import may_roll_back, roll_back
from adaptiverl.training.samples import sample_rows
from adaptiverl.training.update import update


def train(c: RunConfig, parts: Parts, folder: RunFolder, stop: StopSignal) -> None:
    """REINFORCE (Williams 1992), with a KL penalty to the policy at the start."""
    runtime, progress, batches = parts.runtime, parts.progress, parts.batches
    policy, sampler, scoring = parts.policy, parts.sampler, parts.scoring
    guards, best = parts.guards, parts.best
    while not (parts.done or runtime.largest(stop.number)):
        progress.step += 1
        step, clock = progress.step, Stopwatch()

        # Sample completions of the step's prompts from the policy as it is now, y ~ π(·|x).
        batch = batches.at(step)
        rollout = parts.checked.sample(batch["prompt"], batches.uniforms(step))
        completions = sampler.decode(rollout)
        clock.lap("rollout")

        # Reward them, R(x, y); a slow reward answers while the reference is computed.
        pending = scoring.begin(batch, rollout, completions, step)
        clock.lap("reward")
        reference = rollout.logprobs
        if c.KL_COEF:
            reference = runtime.no_grad(sampler.policy.reference_logprobs, rollout, c.GRAD_ACCUM)
        clock.lap("reference")
        scores = scoring.wait(pending)
        reward = scoring.rewards.combine(scores.trained, step, c.NUM_GENERATIONS).float()
        clock.lap("reward")

        # Penalise the distance to the reference, R − β KL(π ‖ π₀). From here on [B] is the batch
        # of all processes, and NaN marks a missing reward.
        kl = kl_per_token(rollout.logprobs, reference, c.KL_ESTIMATOR) * rollout.completion_mask
        kl = runtime.gather(kl.sum(-1))
        penalised = reward - progress.kl_coef * kl

        # Compare with a baseline, A = R − b.
        advantage, unit = advantages(
            penalised,
            c.BASELINE,
            group_size=c.NUM_GENERATIONS,
            ema=progress.reward_ema,
            normalize=c.NORMALIZE_ADVANTAGES,
        )

        # The loss is minus the mean of A log π(y|x), summed over tokens with their weights.
        weights = token_weights(
            rollout.logprobs,
            rollout.completion_mask,
            advantage[batches.rows].to(rollout.logprobs),
            reference=reference,
            kl_coef=(progress.kl_coef * unit)[batches.rows].to(rollout.logprobs),
            estimator=c.KL_ESTIMATOR,
        )
        sums = torch.zeros(4, device=runtime.device)
        micro_batches = rollout.with_weights(weights).micro_batches(c.GRAD_ACCUM)
        for part in micro_batches:
            with runtime.accumulate(last=part is micro_batches[-1]):
                measured = policy(part)
                loss = -measured.score
                runtime.accelerator.backward(loss)
            sums = log.add_sums(sums, loss, measured, part)
        grad_norm = runtime.accelerator.clip_grad_norm_(
            policy.parameters(), c.MAX_GRAD_NORM or math.inf
        )

        # Step within the trust region, with the hyperparameters that loss and reward ask for.
        lengths = runtime.gather(rollout.completion_mask.sum(-1)).float()
        metrics = log.reward_metrics(reward, c.NUM_GENERATIONS)
        metrics |= log.loss_metrics(runtime.gather(sums[None]), lengths, grad_norm)
        prompts, truncated = batch["prompt"], sampler.truncated(rollout)
        metrics |= log.completion_metrics(runtime, rollout, prompts, truncated, lengths)
        metrics |= log.kl_metrics(kl, lengths, progress.kl_coef) if c.KL_COEF else {}
        informative = is_informative(reward, c.BASELINE, c.NUM_GENERATIONS)
        metrics |= update(c, parts, rollout, metrics, informative)
        clock.lap("update")
        if c.KL_COEF_TARGET:
            progress.kl_coef = adapt_kl_coef(progress.kl_coef, kl.mean().item(), c.KL_COEF_TARGET)
        progress.reward_ema = updated_ema(progress.reward_ema, penalised)

        # Write down what happened.
        metrics |= scoring.metrics(scores)
        metrics |= scoring.rewards.balance(scores.trained, step, c.NUM_GENERATIONS)
        metrics |= log.time_metrics(runtime, clock, lengths.sum().item())
        samples = sample_rows(c, parts, batch, rollout, completions, reward, scores)
        if parts.eval_prompts and c.EVAL_EVERY and step % c.EVAL_EVERY == 0:
            metrics |= evaluate(c, parts, parts.eval_prompts)
        guards.look(step, reward, advantage, metrics)
        best.look(step, metrics)
        folder.record(metrics, samples)
        guards.act()
        if best.improved:
            folder.save(BEST, metrics)
        if c.SAVE_EVERY and step % c.SAVE_EVERY == 0:
            guards.checkpointed(step)
            folder.save()


def run(c: RunConfig, parts: Parts) -> int:
    """Trains to its end, or until a signal, a reward or a collapse stops it; the exit status."""
    with closing(RunFolder(c, parts)) as folder, StopSignal(folder.interrupt) as stop:
        del parts  # a rollback makes new ones
        folder.open()
        while True:
            try:
                train(c, folder.parts, folder, stop)
                return folder.finish(stop)
            except Paused as reason:
                return folder.pause(reason, stop)
            except ConfigError as mistake:
                folder.fail(mistake)
                raise
            except Collapsed as found:
                collapse = found.with_traceback(None)  # which would keep the policy in memory
            if not may_roll_back(c, folder):
                return folder.give_up(collapse)
            roll_back(c, folder, collapse)


@forgiving_console("stdout cannot be written to: the run goes on, and its folder has everything")
def main(command: Command | None = None) -> int:
    """Does what `command` says, or else the command line; the exit status."""
    config, only_try = command or read_command()
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[Console()]
    )
    try:
        if not only_try:
            return run(config, build(config))
        parts = build(config)
        with closing(parts.scoring):
            return dry_run(config, parts)
    except ConfigError as mistake:
        print(f"error: {printable(str(mistake))}", file=sys.stderr)
        return 2
    except Paused as reason:  # of a dry run
        print(f"error: {printable(str(reason))}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("stopped before the first step", file=sys.stderr)
        return 130
    except Exception as error:
        if cause(error) is None:
            raise
        print(f"error: {error}. {room_advice(config, error)}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main(COMMAND))
