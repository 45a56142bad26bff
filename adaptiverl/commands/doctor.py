"""`adaptiverl doctor RUN`: what is or went wrong in a run, with the evidence and the key to change.

Reads the run's folder alone. What comes first is likely to have caused what follows.
"""

from collections.abc import Iterable
from pathlib import Path

from adaptiverl.commands.checks_policy import policy_findings
from adaptiverl.commands.checks_rewards import reward_findings
from adaptiverl.commands.checks_run import run_findings
from adaptiverl.commands.curves import Row, Run, json_object, read_run
from adaptiverl.commands.endings import in_words, lost, missing, outcome, reached
from adaptiverl.commands.finding import Finding
from adaptiverl.commands.sample_facts import SampleFacts, facts_of
from adaptiverl.files.console import counted
from adaptiverl.training.collapse import COLLAPSES

# What is likely to have caused what follows it here; a kind that is not here comes first
ORDER = (
    "torn line", "no number", "odd samples", "damaged checkpoint",
    "config", "killed", "judge", "reward raises", "reward code",
    "rate zero", "rate held", "gradient not finite", "gradient zero", "rate too large",
    "labels lost", "reward missing", "hacked", "conflict", "one reward drowns", "dead reward",
    "prompts cut", "one prompt", "temperature", "wrong EOS", "empty completions",
    "KL_COEF too large", "rate too small", "KL explodes", "entropy collapse", "truncated",
    "batch too small",
    "collapsed", "kl beyond reason", "nan", "rolled back",  # what a run did about it
)  # fmt: skip
NO_PROGRESS = {"rate too small", "KL_COEF too large", "batch too small"}  # nothing is learned
# Each is listed with the kinds that follow from it, which are left out where it is found
FOLLOWS = {
    "rate too large": COLLAPSES
    | {"dead reward", "empty completions", "truncated", "batch too small"},
    "KL explodes": {"dead reward", "truncated"},
    "entropy collapse": {"dead reward", "truncated"},
    "hacked": {"entropy collapse", "KL explodes"},
    "reward missing": {"dead reward"},
    "temperature": {"dead reward", "entropy collapse", "truncated"},
    "torn line": {"killed"},
    "empty completions": {"dead reward", "temperature", "entropy collapse", "KL explodes"},
    "gradient not finite": {"rate too small", "KL_COEF too large"},
    **dict.fromkeys(("gradient zero", "rate zero", "rate held", "dead reward"), NO_PROGRESS),
}


def findings(run: Run, facts: SampleFacts | None = None) -> list[Finding]:
    """All that is wrong, causes first; what follows from a cause is left out."""
    facts = facts or facts_of(run, end_ids(run))
    found = [
        *run_findings(run, facts),
        *policy_findings(run, facts),
        *reward_findings(run, facts),
    ]
    kinds = [each.kind for each in found]
    implied = set().union(*(FOLLOWS.get(kind, set()) for kind in kinds))
    own = {each.kind: each for each in reversed(found) if each.kind not in implied}.values()
    return sorted(own, key=lambda each: ORDER.index(each.kind) if each.kind in ORDER else -1)


def end_ids(run: Run) -> list[int]:
    """What the model's own config says ends a text, from a checkpoint or from MODEL."""
    own = [Path(run.config["MODEL"])] if "MODEL" in run.config else []
    ids = model_config([*(run.path / name for name in run.checkpoints), *own]).get("eos_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def model_config(folders: Iterable[Path]) -> Row:
    """The first config.json of a model in `folders`; empty where there is none."""
    files = (folder / "config.json" for folder in folders)
    read = (json_object(file.read_text("utf-8")) for file in files if file.is_file())
    return next(filter(None, read), {})


def doctor(folder: Path) -> tuple[str, int]:
    """What is wrong in words, and the exit status: 1 if anything is, else 0."""
    run = read_run(folder)
    found = findings(run)
    steps = f"{counted(reached(run), 'step')} of {run.config.get('STEPS', '?')}"
    lines = [f"{folder}: {steps}, {outcome(run)}"]
    if (gone := lost(run)) and not run.torn:  # else a finding says it
        lines.append(f"metrics.jsonl lacks {in_words(gone)}")
    lines += missing(run)
    for number, each in enumerate(found, 1):
        lines += [
            "",
            f"{number}. {each.says}",
            f"   evidence: {each.evidence}",
            f"   change:   {each.advice}",
        ]
    if not found:
        nothing = "nothing else is wrong" if len(lines) > 1 else "nothing is wrong"
        lines += ["", f"{nothing}, as far as its files show"]
    return "\n".join(lines), int(bool(found))
