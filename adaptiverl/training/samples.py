"""The rows of samples.jsonl and progress.jsonl: what the model writes, step by step.

Samples are what it is trained on, with what each reward said. Progress is the same few prompts
before the first step, halfway and at the end: they have random numbers of their own, the same each
time, so what differs is the policy. No reward scores them: a judge or a person would be asked for
more than the run needs.
"""

from torch import Tensor

from adaptiverl.files.logs import Row
from adaptiverl.rl.rollout import Rollout, uniforms
from adaptiverl.training.batches import Batch, columns
from adaptiverl.training.build import Parts
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.scoring import Scores, columns_of

PROMPTS = 4  # of progress.jsonl
STREAM = 1_000_002  # of its random numbers: a step that no run reaches


def sample_rows(
    c: RunConfig,
    parts: Parts,
    batch: Batch,
    rollout: Rollout,
    completions: list[str],
    reward: Tensor,
    scores: Scores,
) -> list[Row]:
    """One per completion of all processes, every SAMPLES_EVERY steps; else none."""
    step, rewards = parts.progress.step, parts.scoring.rewards
    if not c.SAMPLES_EVERY or step % c.SAMPLES_EVERY:
        return []
    ids, logprobs = rollout.tokens(), rollout.logprobs.tolist()
    rows: list[Row] = parts.runtime.gather_objects(
        [
            {
                "step": step,
                "prompt": batch["prompt"][i],
                "completion": completions[i],
                "completion_ids": ids[i],
                "logprobs": [round(value, 6) for value in logprobs[i][: len(ids[i])]],
            }
            | {name: values[i] for name, values in rewards.extras.items()}
            for i in range(len(ids))
        ]
    )
    by_reward = columns_of(scores.trained, rewards.names)
    for i, row in enumerate(rows):
        row["reward"] = reward[i].item()
        row |= {f"rewards/{name}": column[i] for name, column in by_reward.items()}
    return rows


def progress_rows(c: RunConfig, parts: Parts, ended: bool = False) -> list[Row]:
    """One per prompt at steps 0, last // 2 and last, or where the run has `ended` before that.

    At other steps, or without REPORT, none. All processes call it together.
    """
    step, last = parts.progress.step, parts.last_step
    if not c.REPORT or not (ended or step in (0, last // 2, last)):
        return []
    rows = parts.eval_prompts if parts.eval_prompts is not None else parts.batches.prompts
    prompts = columns(c, rows, list(range(min(PROMPTS, len(rows)))))["prompt"]
    numbers = uniforms(c.SEED, STREAM, len(prompts), c.MAX_NEW_TOKENS)
    rollout = parts.runtime.no_grad(parts.sampler, prompts, numbers)
    completions = parts.sampler.decode(rollout)
    return [
        {"step": step, "prompt": prompt, "completion": completion}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
