"""The verdict on a run in a sentence or two: what moved beyond its noise, and what is wrong."""

from collections.abc import Sequence

from adaptiverl.commands.charts import number
from adaptiverl.commands.curves import SHORT, Change, Run
from adaptiverl.commands.finding import Finding

SURE = 3.0  # standard errors
ERRORS = "± is one standard error of the difference"


def verdict(run: Run, found: Sequence[Finding]) -> str:
    """Reward, KL, held-out rewards, and the first finding; a short run is said to be short."""
    wrong = ""
    if found:
        more = f" (and {len(found) - 1} more below)" if len(found) > 1 else ""
        wrong = f" Something is wrong: {found[0].says}{more}."
    steps = len(run.metrics)
    if not steps:
        return "No step is finished." + wrong
    rose = run.change(run.reward)
    if rose:
        said = moved("the reward", rose)
    elif run.values(run.reward):
        said = "too few steps to say whether the reward moved"
    else:
        said = "no completion had a reward"
    kl = run.late("kl_per_completion")
    if kl is not None:
        said += f", at a KL of {number(kl)} nats per completion to the first policy"
    for name in run.names("held_out/rewards/", "/mean"):
        if held := run.change(name):
            said += "; " + moved(f"the held-out {name.split('/')[2]}", held)
    begin = f"In {steps} steps "
    if steps < SHORT:
        begin = f"This is a short run, of {steps} step{'s' * (steps > 1)}, which says little: "
    going = f" It is running, at step {run.step}." if run.state == "running" else ""
    errors = f" {ERRORS}." if "±" in said else ""
    return begin + said + "." + errors + going + wrong


def moved(what: str, seen: Change) -> str:
    """Rose, fell, or neither beyond its noise."""
    ends = f"from {number(seen.first)} to {number(seen.last)} (± {number(seen.error, 2)})"
    if abs(seen.z) <= SURE:
        return f"{what} did not move beyond its noise, {ends}"
    return f"{what} {'rose' if seen.z > 0 else 'fell'} {ends}"
