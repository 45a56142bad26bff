"""The verdict on a run in a sentence or two: what moved beyond its noise, and what is wrong."""

from collections.abc import Sequence

from adaptiverl.commands.charts import number
from adaptiverl.commands.curves import SHORT, Change, Run, ends
from adaptiverl.commands.finding import Finding

SURE = 3.0  # standard errors
ERRORS = "± is one standard error of the difference"


def verdict(run: Run, found: Sequence[Finding]) -> str:
    """Reward, KL, held-out rewards, evaluations and the first finding, and that a run is short."""
    wrong = ""
    if found:
        more = f" (and {len(found) - 1} more below)" if len(found) > 1 else ""
        wrong = f" Something is wrong: {found[0].says}{more}."
    steps = len(run.metrics)
    if not steps:
        return "No step is finished." + wrong
    rose = run.change(run.reward)
    if rose:
        said = moved("the reward", rose, spans(run, run.reward))
    elif run.values(run.reward):
        said = "too few steps to say whether the reward moved"
    else:
        said = "no completion had a reward"
    if known := run.series("kl_per_completion"):
        (step, kl), seen = known[-1], run.change("kl_per_completion")
        mean, when = "", f"step {step}"
        if seen:
            mean, kl, when = "mean ", seen.last, spans(run, "kl_per_completion")[1]
        said += f", at a {mean}KL of {number(kl)} nats per completion to the first policy ({when})"
    for name in run.names("held_out/rewards/", "/mean"):
        if held := run.change(name):
            said += "; " + moved(f"the held-out {name.split('/')[2]}", held, spans(run, name))
    if len(evaluated := run.series("eval/reward")) > 1:
        (first, before), (last, now) = evaluated[0], evaluated[-1]
        said += f"; evaluations went from {number(before)} (step {first})"
        said += f" to {number(now)} (step {last})"
    begin = f"In {steps} steps "
    if steps < SHORT:
        begin = f"This is a short run, of {steps} step{'s' * (steps > 1)}, which says little: "
    going = f" It is running, at step {run.step}." if run.state == "running" else ""
    errors = f" {ERRORS}." if "±" in said else ""
    return begin + said + "." + errors + going + wrong


def moved(what: str, seen: Change, when: tuple[str, str]) -> str:
    """Rose, fell, or neither beyond its noise; `when` are the steps of both means."""
    places = (
        f"from a mean of {number(seen.first)} ({when[0]}) to {number(seen.last)} ({when[1]}), "
        f"± {number(seen.error, 2)}"
    )
    if abs(seen.z) <= SURE:
        return f"{what} did not move beyond its noise, {places}"
    return f"{what} {'rose' if seen.z > 0 else 'fell'} {places}"


def spans(run: Run, name: str) -> tuple[str, str]:
    """The first and the last steps that Run.change compares."""
    first, last = ends(run, name)
    return _span(first), _span(last)


def _span(known: list[tuple[int, float]]) -> str:
    """`steps 1 to 3`, or `3 steps from 2 to 6` where not each of them had a value."""
    (first, _), (last, _) = known[0], known[-1]
    every = last - first == len(known) - 1
    return f"steps {first} to {last}" if every else f"{len(known)} steps from {first} to {last}"
