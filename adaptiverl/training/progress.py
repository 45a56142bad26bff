"""The rows of progress.jsonl: the same few prompts before the first step, halfway and at the end.

They have random numbers of their own, the same each time, so what differs is the policy. No reward
scores them: a judge or a person would be asked for more than the run needs.
"""

from adaptiverl.files.logs import Row
from adaptiverl.rl.rollout import uniforms
from adaptiverl.training.batches import columns
from adaptiverl.training.build import Parts
from adaptiverl.training.keys import RunConfig

PROMPTS = 4
STREAM = 1_000_002  # of the random numbers: a step that no run reaches


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
