"""What is said where a run goes on, and something is no longer as it was.

Leaves out what is refused then (state.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path

from adaptiverl.files import checkpoint
from adaptiverl.training import reward_code
from adaptiverl.training.build import Parts
from adaptiverl.training.inputs import last_step_of
from adaptiverl.training.keys import RunConfig


def other_length(c: RunConfig, parts: Parts, newest: str) -> str | None:
    """Where the trust region's target falls over other steps than in the checkpoint `newest`."""
    kept = json.loads((c.output_dir / newest / "run_config.json").read_text("utf-8"))
    before = c.model_copy(update={key: kept[key] for key in ("STEPS", "EPOCHS") if key in kept})
    steps, last = last_step_of(before, len(parts.batches.prompts)), parts.last_step
    region = parts.optimizer.trust_region
    if not (region and region.steps) or steps == last or parts.done:
        return None
    return (
        f"the run had {steps} steps and has {last} now: from here on the trust region's "
        f"target falls over {last}"
    )


def warnings(
    c: RunConfig, parts: Parts, newest: str, known_steps: int
) -> Iterator[tuple[str, str]]:
    """Kinds of events with what differs from the checkpoint `newest`.

    `known_steps` are those that metrics.jsonl has.
    """
    step = parts.progress.step
    if known_steps < step:  # lines that it has lost, beside a checkpoint: nobody else would say it
        has = f"ends at step {known_steps}" if known_steps else "has no steps"
        first = known_steps + 1
        what = f"steps {first} to {step} are" if step > first else f"step {step} is"
        said = f"metrics.jsonl {has}, the checkpoint is of step {step}: {what} missing from it"
        yield "metrics lost", said
    for said in parts.scoring.lost_labels():
        yield "labels lost", said
    if parts.other_code and not parts.done:
        yield "reward code", _other_code(c, parts, newest)


def _other_code(c: RunConfig, parts: Parts, newest: str) -> str:
    """Of rewards; a best/ of before is put aside."""
    step = parts.progress.step
    said = (
        f"the code of {reward_code.in_words(c, parts.other_code)} has changed since the "
        f"checkpoint of step {step}: rewards up to this step and after it cannot be compared"
    )
    is_all = newest == checkpoint.BEST  # that is left
    moves = reward_code.trains(c, parts.other_code) and not is_all
    if moves and (place := checkpoint.set_best_aside(c.output_dir)):
        shown = Path(c.OUTPUT_DIR) / place.relative_to(c.output_dir)
        said += f". best/ is of before: it is now {shown}"
    return f"{said}. For rewards that can be compared, start a new run with another OUTPUT_DIR"
