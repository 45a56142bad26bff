"""How far a run came, what ended it, and which of its steps and files are lost."""

from collections.abc import Sequence

from adaptiverl.commands.curves import Run, damaged, mend_config

# What every run has, also where nothing was to be written there, and what is not known without it
LOGS = {
    "config.json": "what depends on keys and rewards is not checked",
    "samples.jsonl": "what depends on completions is not checked",
    "controller.jsonl": "what moved the rate or another hyperparameter is not known",
    "progress.jsonl": "the same prompts before and after are not known",
    "environment.jsonl": "where and with which versions it ran is not known",
}
ENDED = ("stopped", "stopped early")  # kinds of events that say why a run ended as it should


def reached(run: Run) -> int:
    """The last step that was made: of a finished run that of final/, whatever is lost."""
    return run.checkpoints["final"] if run.state == "finished" else run.step


def lost(run: Run) -> list[int]:
    """The steps that metrics.jsonl lacks: it has a line for each."""
    return sorted({*range(1, reached(run) + 1)} - {row["step"] for row in run.metrics})


def missing(run: Run) -> list[str]:
    """A sentence on each file that the run must have had, and what is not known without it."""
    gone = {name: why for name, why in LOGS.items() if not (run.path / name).exists()}
    if not run.config.get("REPORT"):  # without a report, no progress is written
        gone.pop("progress.jsonl", None)
    said = [f"{name} is missing, so {why}" for name, why in gone.items()]
    if "config.json" in gone and (mend := mend_config(run.path)):
        said[0] += f"; {mend}"
    return said


def without_config(run: Run) -> str | None:
    """Why the keys of the run are not known, and what to do; None where they are."""
    if run.config:
        return None
    file = run.path / "config.json"
    wrong = "is no JSON object with keys" if file.exists() else "is missing"
    return f"{file} {wrong}; {mend_config(run.path) or 'put it back from a copy'}"


def outcome(run: Run) -> str:
    """Its state, and what ended it before STEPS or stopped it, where that is known."""
    last = run.events[-1] if run.events else None
    if last and last["kind"] in ENDED and last["step"] == reached(run):
        return last["message"].replace(f" after step {last['step']},", " by")
    epochs, steps = run.config.get("EPOCHS"), run.config.get("STEPS", 0)
    if epochs is not None and run.state == "finished" and reached(run) < steps:
        return f"finished: EPOCHS {epochs} came before STEPS"
    if run.state == "killed" and "final" in damaged(run):
        return "finished or killed: final/ is damaged"
    return run.state


def in_words(steps: Sequence[int]) -> str:
    """`step 3`, `steps 3, 4 and 6 to 9`: rising numbers, of which neighbours are put together."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and parts[-1][-1] == step - 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    *texts, last = [
        text
        for part in parts
        for text in (map(str, part) if len(part) < 3 else [f"{part[0]} to {part[-1]}"])
    ]
    return f"step{'s' * (len(steps) > 1)} " + ", ".join(texts) + " and " * bool(texts) + last
