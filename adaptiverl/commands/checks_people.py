"""The doctor's checks of people's labels: those that were lost, and why some were never given.

That scores are missing at all is found in checks_rewards.py.
"""

from collections.abc import Iterator

from adaptiverl.commands.curves import Row, Run
from adaptiverl.commands.finding import Finding
from rewards.head import MIN_LABELS


def labels_lost(run: Run) -> Iterator[Finding]:
    events = [event for event in run.events if event["kind"] == "labels lost"]
    for event in events[-1:]:
        yield Finding(
            "labels lost",
            "the run went on without labels that it had",
            f"from step {event['step'] + 1} on: {event['message']}",
            "what that says: RESUME=auto goes on with the labels",
        )


def left_out_by_ask(run: Run, reward: Row) -> float:
    """The share of the completions that nobody is asked about, because ASK says so."""
    size = run.config.get("BATCH_SIZE", 0)
    asked = reward.get("ASK") if reward["TYPE"] == "human" else None
    return max(1 - asked / size, 0.0) if asked and size else 0.0


def unlabelled(run: Run, reward: Row) -> tuple[str, str]:
    """Why a human reward has no score for many completions, and what to change."""
    name = reward["NAME"]
    why = "people skipped them"
    advice = f"change QUESTION of {name!r} so that people skip fewer"
    if reward.get("TIMEOUT"):
        why += ", or gave no label in time"
        advice = f"raise TIMEOUT of {name!r}"
    if reward.get("REWARD_MODEL") != "online":
        return why, f"{advice}, or let a head fill in (REWARD_MODEL online)"
    known = run.series(f"{name}/head_error")
    before = f" before step {known[0][0]}" if known else ""
    return (
        f"{why}, and its head had fewer than the {MIN_LABELS} labels that it needs{before}",
        f"{advice}, or set LABELS to a file that has {MIN_LABELS} labels of the same QUESTION",
    )
