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

Said = Iterator[tuple[str, str]]  # kind of event, message


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


def warnings(c: RunConfig, parts: Parts, newest: str, known_steps: int) -> Said:
    """What differs from the checkpoint `newest`; metrics.jsonl has `known_steps`."""
    yield from _missing_steps(parts.progress.step, known_steps)
    for said in parts.scoring.lost_labels():
        yield "labels lost", said
    if parts.other_code and not parts.done:
        yield from _other_code(c, parts, newest)


def _missing_steps(step: int, known: int) -> Said:
    """Lines that metrics.jsonl, beside a checkpoint, has lost: nobody else would say it."""
    if known < step:
        has = f"ends at step {known}" if known else "has no steps"
        what = f"steps {known + 1} to {step} are" if step > known + 1 else f"step {step} is"
        said = f"metrics.jsonl {has}, the checkpoint is of step {step}: {what} missing from it"
        yield "metrics lost", said


def _other_code(c: RunConfig, parts: Parts, newest: str) -> Said:
    """Of rewards; a best/ of before is put aside."""
    step, place = parts.progress.step, None
    said = (
        f"the code of {reward_code.in_words(c, parts.other_code)} has changed since the "
        f"checkpoint of step {step}: rewards up to this step and after it cannot be compared"
    )
    is_all = newest == checkpoint.BEST  # that is left
    if reward_code.trains(c, parts.other_code) and not is_all:
        place = checkpoint.set_best_aside(c.output_dir)
    if place:
        shown = Path(c.OUTPUT_DIR) / place.relative_to(c.output_dir)
        said += f". best/ is of before: it is now {shown}"
    advice = "For rewards that can be compared, start a new run with another OUTPUT_DIR"
    yield "reward code", f"{said}. {advice}"
