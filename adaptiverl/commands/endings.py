"""How far a run came, what ended it, and which of its steps are lost."""

from collections.abc import Sequence

from adaptiverl.commands.curves import Run

ENDED = ("stopped", "stopped early")  # kinds of events that say why a run ended as it should


def reached(run: Run) -> int:
    """The last step that was made: of a finished run that of final/, whatever is lost."""
    return run.checkpoints["final"] if run.state == "finished" else run.step


def lost(run: Run) -> list[int]:
    """The steps that metrics.jsonl lacks: it has a line for each."""
    return sorted({*range(1, reached(run) + 1)} - {row["step"] for row in run.metrics})


def outcome(run: Run) -> str:
    """Its state, and what ended it before STEPS or stopped it, where that is known."""
    last = run.events[-1] if run.events else None
    if last and last["kind"] in ENDED and last["step"] == reached(run):
        return last["message"].replace(f" after step {last['step']},", " by")
    epochs, steps = run.config.get("EPOCHS"), run.config.get("STEPS", 0)
    if epochs is not None and run.state == "finished" and reached(run) < steps:
        return f"finished: EPOCHS {epochs} came before STEPS"
    return run.state


def in_words(steps: Sequence[int]) -> str:
    """`step 3`, `steps 3, 6 to 9`: rising numbers, of which neighbours are put together."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and parts[-1][-1] == step - 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    texts = [
        ", ".join(map(str, part)) if len(part) < 3 else f"{part[0]} to {part[-1]}" for part in parts
    ]
    return f"step{'s' * (len(steps) > 1)} {', '.join(texts)}"
