"""The doctor's checks of the rewards: those that say nothing, are missing, or are gamed."""

import statistics
from collections.abc import Iterator

from adaptiverl.commands.curves import Row, Run
from adaptiverl.commands.finding import Finding
from adaptiverl.commands.sample_facts import SampleFacts
from adaptiverl.files.console import counted
from rewards.head import MIN_LABELS

FLAT = 0.95  # share of the steps, or of the prompts, without a difference
MISSING = 0.2  # share of the scores
DOMINATES, CONFLICTS = 0.98, -0.5  # a share of the variance, a correlation
LARGE = 1e12  # a sum of means beyond it: single sums may be beyond 1e16
CANCELS = 1.5  # a share beyond it: the others nearly cancel it, which is a conflict
PARTED = 3.0  # standard errors,
FELL = 0.2  # and the share of its first value that a held-out reward lost: less is no harm yet


def reward_findings(run: Run, facts: SampleFacts) -> Iterator[Finding]:
    yield from _labels_lost(run)
    yield from _missing(run)
    yield from _too_large(run, facts)
    yield from _flat(run, facts)
    yield from _gamed(run)
    yield from _unbalanced(run, facts)
    yield from _conflicts(run, facts)


def _labels_lost(run: Run) -> Iterator[Finding]:
    events = [event for event in run.events if event["kind"] == "labels lost"]
    for event in events[-1:]:
        yield Finding(
            "labels lost",
            "the run went on without labels that it had",
            f"from step {event['step'] + 1} on: {event['message']}",
            "what that says: RESUME=auto goes on with the labels",
        )


def _missing(run: Run) -> Iterator[Finding]:
    for reward in run.rewards:
        name = reward["NAME"]
        rows = [row.get(f"rewards/{name}/missing", 0.0) for row in run.metrics]
        share = statistics.mean(rows) if rows else 0.0
        left_out = _left_out_by_ask(run, reward)
        if share - left_out < MISSING:
            continue
        odd = run.series(f"rewards/{name}/quarantined")  # how many up to each step
        why, advice = "it gives None", f"correct {name!r} in REWARDS (TYPE {reward['TYPE']})"
        if odd:
            (first, _), (_, count) = odd[0], odd[-1]
            why = f"it gives NaN, infinity or numbers beyond 1e16 ({count}, first in step {first})"
            if (others := round(sum(rows) * run.config.get("BATCH_SIZE", 0)) - count) > 0:
                why += f" and None ({others})"
        elif reward["TYPE"] == "human":
            why, advice = _unlabelled(run, reward)
        yield Finding(
            "reward missing",
            f"the reward {name!r} is missing for many completions: {why}",
            f"{share:.0%} of its scores in {counted(len(rows), 'step')}"
            + (f"; its ASK leaves out {left_out:.0%} of all scores" if left_out else ""),
            advice,
        )


def _left_out_by_ask(run: Run, reward: Row) -> float:
    """The share of the completions that nobody is asked about, because ASK says so."""
    size = run.config.get("BATCH_SIZE", 0)
    asked = reward.get("ASK") if reward["TYPE"] == "human" else None
    return max(1 - asked / size, 0.0) if asked and size else 0.0


def _unlabelled(run: Run, reward: Row) -> tuple[str, str]:
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


def _too_large(run: Run, facts: SampleFacts) -> Iterator[Finding]:
    """Completions that have scores and no reward: their weighted sum is beyond what is summed."""
    names = [reward["NAME"] for reward in run.rewards]
    steps = [
        row["step"]
        for row in run.metrics
        if row.get("reward") is None
        and any(row.get(f"rewards/{name}/mean") is not None for name in names)
    ]
    share = len(steps) / len(run.metrics) if run.metrics else 0.0
    sampled = facts.too_large / facts.count if facts.count else 0.0
    if max(share, sampled) < MISSING:
        return
    why = "a run writes one wherever there is a score"
    advice = (
        "see which other program wrote to metrics.jsonl or samples.jsonl, and put them back from a "
        "copy if there is one"
    )
    if _largest_sum(run) > LARGE:
        why = "the sum by WEIGHT is beyond 1e16, and left out"
        advice = "give the entries of REWARDS a smaller WEIGHT"
    where = f"{sampled:.0%} of {facts.count} completions"
    if share >= sampled:
        many = f"{len(steps)} of {len(run.metrics)} steps, the first is {steps[0]}"
        where = f"no completion has a reward in {many}"
    weights = ", ".join(f"{reward['NAME']} {reward.get('WEIGHT', 1.0)}" for reward in run.rewards)
    yield Finding(
        "reward missing",
        f"completions have scores and no reward: {why}",
        f"{where}; WEIGHT: {weights}",
        advice,
    )


def _largest_sum(run: Run) -> float:
    """About the largest weighted sum of a completion, by the means of the steps."""
    total = 0.0
    for reward in run.rewards:
        means = map(abs, run.values(f"rewards/{reward['NAME']}/mean"))
        total += max(map(abs, _weights(reward))) * max(means, default=0.0)
    return total


def _weights(reward: Row) -> list[float]:
    """Its WEIGHT; of a schedule that of each point."""
    weight = reward.get("WEIGHT", 1.0)
    return [point[1] for point in weight] if isinstance(weight, list) else [weight]


def _flat(run: Run, facts: SampleFacts) -> Iterator[Finding]:
    if run.config.get("BATCH_SIZE") == 1:  # there is nothing to be equal to
        return
    shares = run.values("frac_reward_zero_std")
    known = run.values("reward")
    if len(shares) >= 5 and known and statistics.mean(shares) >= FLAT:
        last = run.series("reward")[-1]
        yield Finding(
            "dead reward",
            "within each prompt all completions got the same reward, so nothing can be learned",
            f"equal in {statistics.mean(shares):.0%} of the prompts over {len(shares)} steps; the "
            f"reward is {last[1]:.4g} in step {last[0]}",
            "change REWARDS so that they tell completions apart; if a reward is rare, raise "
            "NUM_GENERATIONS and BATCH_SIZE",
        )
        return
    if len(run.rewards) > 1 and facts.steps >= 5:
        for name, count in facts.constant.items():
            if count >= FLAT * facts.steps:
                yield Finding(
                    "dead reward",
                    f"the reward {name!r} gives all completions of a step the same score",
                    f"in {count} of {facts.steps} steps",
                    f"change {name!r} in REWARDS, or leave it out",
                )


def _gamed(run: Run) -> Iterator[Finding]:
    rose = run.change(run.reward)
    if rose is None or rose.z < PARTED:
        return
    for name in run.names("held_out/rewards/", "/mean"):
        fell = run.change(name)
        if fell and fell.z < -PARTED and fell.first - fell.last > FELL * abs(fell.first):
            yield Finding(
                "hacked",
                f"the reward rises while {name} falls: the reward is probably gamed",
                f"from the first to the last steps, reward {rose.first:.3g} → {rose.last:.3g} "
                f"({rose.z:.1f} standard errors), {name} {fell.first:.3g} → {fell.last:.3g} "
                f"({-fell.z:.1f})",
                "read the best samples; raise KL_COEF, or add to REWARDS what is missing there",
            )


def _unbalanced(run: Run, facts: SampleFacts) -> Iterator[Finding]:
    for reward in run.rewards if len(run.rewards) > 1 else []:
        shares = run.values(f"rewards/{reward['NAME']}/share")
        others = [other["NAME"] for other in run.rewards if other is not reward]
        if all(facts.constant[name] >= FLAT * facts.steps for name in others):
            continue  # said of them
        if len(shares) >= 5 and DOMINATES < (share := statistics.mean(shares)) < CANCELS:
            yield Finding(
                "one reward drowns",
                f"the reward {reward['NAME']!r} drowns the others: they hardly count",
                # beyond 1 where another pulls against it a little
                f"it makes {min(share, 1):.1%} of the advantages' variance over {len(shares)} "
                "steps",
                f"give {reward['NAME']!r} a smaller WEIGHT, or all of them NORMALIZE zscore",
            )


def _conflicts(run: Run, facts: SampleFacts) -> Iterator[Finding]:
    last = {reward["NAME"]: _weights(reward)[-1] for reward in run.rewards}
    signs = {name: (weight > 0) - (weight < 0) for name, weight in last.items()}
    for (a, b), correlation in facts.correlations.items():
        if facts.count >= 40 and (pulling := correlation * signs[a] * signs[b]) < CONFLICTS:
            yield Finding(
                "conflict",
                f"the rewards {a!r} and {b!r} pull against each other",
                f"their correlation within prompts is {pulling:.2f} over {facts.count} completions",
                "leave one of them out of REWARDS, or decide by WEIGHT which one counts",
            )
