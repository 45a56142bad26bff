"""The rows of samples.jsonl: what the model wrote in a step, and what each reward said of it."""

from torch import Tensor

from adaptiverl.files.logs import Row
from adaptiverl.rl.rollout import Rollout
from adaptiverl.training.batches import Batch
from adaptiverl.training.build import Parts
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.scoring import Scores, columns_of


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
    columns = columns_of(scores.trained, rewards.names)
    for i, row in enumerate(rows):
        row["reward"] = reward[i].item()
        row |= {f"rewards/{name}": column[i] for name, column in columns.items()}
    return rows
