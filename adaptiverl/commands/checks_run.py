"""The doctor's checks of the run itself: how it ended, its files, its prompts, its batch."""

import re
from collections.abc import Iterator, Sequence

from adaptiverl.commands.curves import Row, Run, damaged, mend_config
from adaptiverl.commands.endings import ENDED, in_words, lost
from adaptiverl.commands.finding import Finding
from adaptiverl.commands.sample_facts import SampleFacts
from adaptiverl.files.console import counted
from adaptiverl.files.manifest import MANIFEST
from adaptiverl.training.collapse import COLLAPSES

FEW = 4  # completions per step, at most, that one prompt each cannot be learned from
SHOWN = 4  # damaged lines, at most, that are named
MANY_PROMPTS = 4  # times that a prompt is drawn, at least, before its being the only one shows
JUDGES = ("judge", "local_judge")


def run_findings(run: Run, facts: SampleFacts) -> Iterator[Finding]:
    yield from _ended(run)
    yield from _reward_code(run)
    yield from _taken_back(run)
    yield from _torn(run)
    yield from _odd(run)
    yield from _odd_samples(facts)
    yield from _damaged(run)
    yield from _config(run)
    yield from _prompts(run, facts)
    yield from _batch(run)


def _ended(run: Run) -> Iterator[Finding]:
    steps, goes_on = run.config.get("STEPS", "?"), "the same command with RESUME=auto goes on"
    if run.state == "stopped":
        event = run.events[-1]
        message, step = event["message"], event["step"]
        if event["kind"] == "paused":
            named = re.search(r"'([^']*)'", message)
            kinds = {reward["NAME"]: reward["TYPE"] for reward in run.rewards}
            kind, what, advice = "reward raises", "a reward", "correct that entry of REWARDS"
            if named and kinds.get(named[1]) in JUDGES:
                kind, what = "judge", f"the judge {named[1]!r}"
                keys = f"BASE_URL, MODEL, KEY_ENV of {named[1]!r}, MAX_MISSING"
                advice = f"see that its endpoint answers ({keys})"
                if "its budget is spent" in message:
                    advice = f"raise MAX_COST or MAX_CALLS of {named[1]!r}, whichever is used up"
            yield Finding(
                kind,
                f"{what} failed, so the run paused",
                f"before step {step + 1}: {message}",
                f"{advice}; {goes_on}",
            )
        elif event["kind"] not in ENDED:
            if event["kind"] in COLLAPSES:
                advice = "what that says, in a new run: RESUME=auto would make the same steps again"
            elif run.checkpoints:
                advice = f"what that says; {goes_on} from the last checkpoint"
            else:
                advice = "what that says; no checkpoint was written, so it starts anew"
            yield Finding(
                event["kind"], "the run could not go on", f"step {step}: {message}", advice
            )
    elif run.state == "killed" and "final" not in damaged(run):  # else it may have finished
        saved = max(run.checkpoints.values(), default=None)
        kept = (
            "no checkpoint was written" if saved is None else f"the last checkpoint is of {saved}"
        )
        advice = goes_on if saved is not None else _start_again(run.config.get("SAVE_EVERY"))
        yield Finding(
            "killed",
            "the run ended without saying so: it was killed, its machine went off, its disk was "
            "full, or an error in the program ended it, which its console shows",
            f"metrics.jsonl ends at step {run.step} of {steps}, and {kept}",
            advice + "; if memory was short, a smaller BATCH_SIZE or a larger GRAD_ACCUM helps",
        )


def _start_again(every: int | None) -> str:
    """Of a run without a checkpoint; a SAVE_EVERY of 0 writes none before the end."""
    if every == 0:
        return "start it again, with a SAVE_EVERY above 0, so that less is lost the next time"
    return "start it again" + (", with a smaller SAVE_EVERY" if every != 1 else "")


def _reward_code(run: Run) -> Iterator[Finding]:
    if told := [event for event in run.events if event["kind"] == "reward code"]:
        again = in_words([event["step"] for event in told[1:]]) if told[1:] else ""
        yield Finding(
            "reward code",
            "the code of a reward has changed in the run: rewards before and after cannot be "
            "compared",
            f"after step {told[0]['step']}: {told[0]['message']}"
            + f"; again after {again}" * bool(again),
            "for rewards that can be compared, a new run with another OUTPUT_DIR; nothing where "
            "only an error was corrected",
        )


def _taken_back(run: Run) -> Iterator[Finding]:
    back = [event for event in run.events if event["action"] == "rollback"]
    if back and not run.trust_region:  # what was taken back is in no curve that would show it
        ended = [event for event in run.events if event["action"] == "stop"]
        broke = [*back, *(event for event in ended if event["kind"] in COLLAPSES)]
        yield Finding(
            "rate too large",
            f"the policy broke, {counted(len(broke), 'time')}: the learning rate was too large",
            _when(run, broke),
            "use LR_RULE trust_region, or a much smaller LRATE",
        )
    elif back:
        yield Finding(
            "rolled back",
            "the run collapsed and was taken back to a sound checkpoint, "
            f"{counted(len(back), 'time')}",
            _when(run, back),
            "what that says, or a smaller TRUST_REGION_KL",
        )


def _when(run: Run, back: list[Row]) -> str:
    """The first collapse and the last, and from where to where rollbacks brought what they move."""
    said = f"in step {back[0]['step']}: {back[0]['message']}"
    if len(back) > 1:
        said = f"first {said}; last in step {back[-1]['step']}"
    if changes := [change for change in run.changes if change["rule"] == "rollback"]:
        first, last = changes[0], changes[-1]
        said += f"; {last['hyperparameter']} went from {first['old']:.3g} to {last['new']:.3g}"
    return said


def _torn(run: Run) -> Iterator[Finding]:
    if not run.torn or run.state == "running":
        return
    where = _few([f"line {each.line} of {each.file}" for each in run.torn])
    gone = lost(run)
    lacks = f"; metrics.jsonl lacks {in_words(gone)}" if gone else ""
    if all(each.is_last for each in run.torn):  # else something else has written there
        done = run.state == "finished"
        yield Finding(
            "torn line",
            "a last line was written in part: the disk was full, or the power failed",
            f"{where}: no whole line; the last step that can be read is {run.step}{lacks}",
            "make room on the disk of OUTPUT_DIR; RESUME=auto cuts the line off"
            + ("; nothing else is lost" if done and not gone[1:] else "")
            + ("; the run is finished" if done else " and goes on"),
        )
    else:
        yield Finding(
            "torn line",
            "lines of a file cannot be read" if run.torn[1:] else "a line of a file cannot be read",
            f"{where}: no JSON{lacks}",
            "nothing brings back what stood there, and the checkpoints do not need it; delete what "
            "cannot be read, and this is not said again",
        )


def _few(lines: Sequence[str], between: str = ", ") -> str:
    """The first of them, and how many more there are."""
    more = f" and {counted(len(lines) - SHOWN, 'line')} more" if len(lines) > SHOWN else ""
    return between.join(lines[:SHOWN]) + more


def _odd(run: Run) -> Iterator[Finding]:
    if run.odd:
        yield Finding(
            "no number",
            "a file has values that are no finite numbers, or steps twice: they are left out",
            _few(run.odd, "; "),
            "a run writes no such values: see which other program wrote there, and put the file "
            "back from a copy if there is one",
        )


def _odd_samples(facts: SampleFacts) -> Iterator[Finding]:
    if facts.odd:
        yield Finding(
            "odd samples",
            "samples.jsonl has rows without a step, a prompt or a completion: they are left out",
            f"line {_few([*map(str, facts.odd)])}",
            "a run writes no such rows: see which other program wrote there, and put the file back "
            "from a copy if there is one",
        )


def _damaged(run: Run) -> Iterator[Finding]:
    if wrong := damaged(run):
        others = in_words(sorted({*run.checkpoints.values()})) if run.checkpoints else "none"
        yield Finding(
            "damaged checkpoint",
            "a checkpoint is damaged, and no command uses it",
            "; ".join(f"{name}/{MANIFEST}: {why}" for name, why in wrong.items())
            + f"; others: {others}",
            f"put {MANIFEST} back from a copy; without it nothing shows whether the weights beside "
            "it are whole",
        )


def _config(run: Run) -> Iterator[Finding]:
    file = run.path / "config.json"
    if run.config or not file.exists():
        return
    yield Finding(
        "config",
        "config.json cannot be read, so what depends on keys and rewards is not checked",
        f"{file}: no JSON object with keys",
        mend_config(run.path) or "put it back: it has the keys that the run was started with",
    )


def _prompts(run: Run, facts: SampleFacts) -> Iterator[Finding]:
    for event in run.events:
        if event["kind"] == "prompts cut":
            yield Finding(
                "prompts cut",
                "prompts are cut: the model does not see their beginnings",
                event["message"],
                "raise MAXSEQ, lower MAX_NEW_TOKENS, or shorten the prompts of TRAIN_FILE",
            )
            break
    drawn = facts.count // max(1, run.config.get("NUM_GENERATIONS", 1))
    if len(facts.prompts) == 1 and drawn >= MANY_PROMPTS:
        (prompt,) = facts.prompts
        shown = prompt if len(prompt) < 60 else prompt[:59] + "…"
        yield Finding(
            "one prompt",
            "there is only one prompt: what is learned holds for it alone",
            f"all {facts.count} completions of {counted(facts.steps, 'step')} continue {shown!r}",
            "give TRAIN_FILE different prompts",
        )


def _batch(run: Run) -> Iterator[Finding]:
    c = run.config
    alone, size = c.get("NUM_GENERATIONS") == 1, c.get("BATCH_SIZE", 0)
    if not alone or size > FEW or (rose := run.change(run.reward)) is None or rose.z > 3:
        return
    yield Finding(
        "batch too small",
        "too few completions are compared in each step, so the updates are mostly noise",
        f"{size} completions per step of as many prompts; the reward went from {rose.first:.3g} to "
        f"{rose.last:.3g} (± {rose.error:.2g})",
        "raise BATCH_SIZE, and NUM_GENERATIONS to 2 or more",
    )
