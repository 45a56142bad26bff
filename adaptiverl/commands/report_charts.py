"""The curves of a report, of whatever its run wrote down."""

from adaptiverl.commands.charts import Chart, Series, chart
from adaptiverl.commands.curves import FIXED, Run
from adaptiverl.commands.endings import in_words

SHAPES = {
    "completions/distinct_1": "distinct tokens",
    "completions/distinct_2": "distinct pairs",
    "completions/repetition": "repetition",
}


def report_charts(run: Run) -> list[Chart]:
    """In the order in which they are read; those without a value are left out."""
    means, shares = (_all(run, "rewards/", end) for end in ("/mean", "/share"))
    made = [
        _reward(run),
        chart("Held-out rewards", _all(run, "held_out/rewards/", "/mean"), unit="not trained on"),
        chart("Reward by component", means if len(run.rewards) > 1 else []),
        chart(
            "Share of each component",
            shares if len(run.rewards) > 1 else [],
            unit="of the advantages' variance",
        ),
        chart(
            "KL to the first policy",
            [Series("KL", run.series("kl_per_completion"))],
            unit="nats per completion",
            note=_kl_note(run),
        ),
        chart("Entropy", [Series("entropy", run.series("entropy"))], unit="nats per token"),
        _length(run),
        _rate(run),
        _update(run),
        chart(
            "Signal to noise of the updates",
            [Series("signal to noise", run.series("update_signal_to_noise"))],
            unit="it scales the trust region",
        ),
        chart(
            "Variety",
            [Series(SHAPES[name], run.series(name)) for name in SHAPES],
            unit="shares of tokens, of their pairs and triples",
        ),
        chart("Evaluations", _evaluations(run), unit=f"on {evaluated_on(run)}"),
        chart("Gradient norm", [Series("before clipping", run.series("grad_norm"))], log=True),
        chart(
            "Prompts whose completions all got the same reward",
            [Series("share", run.series("frac_reward_zero_std"))],
            unit="share of the prompts",
        ),
        chart("Missing scores", _all(run, "rewards/", "/missing"), unit="share of the completions"),
    ]
    return [each for each in made if each]


def evaluated_on(run: Run) -> str:
    """The key that named the prompts of the evaluations."""
    return "EVAL_SPLIT" if run.config.get("EVAL_SPLIT") else "EVAL_FILE"


def _reward(run: Run) -> Chart | None:
    rows = [row for row in run.metrics if row.get(run.reward) is not None]
    spread = [row.get("reward_std") or 0.0 for row in rows] if run.reward == "reward" else None
    points = [(row["step"], row[run.reward]) for row in rows]
    series = [Series("reward", points, spread)]
    if evaluated := run.series("eval/reward"):
        series.append(Series(f"of {evaluated_on(run)}", evaluated, dashed=True, smooth=False))
    note = "The band is one standard deviation of a step's completions to each side."
    if spread is None:
        note = f"The sum is {FIXED}: metrics.jsonl calls it {run.reward}."
    return chart("Reward", series, note=note)


def _all(run: Run, prefix: str, suffix: str) -> list[Series]:
    return [
        Series(name.removeprefix(prefix).removesuffix(suffix), run.series(name))
        for name in run.names(prefix, suffix)
    ]


def _evaluations(run: Run) -> list[Series]:
    names = [*run.names("eval/rewards/", "/mean"), *run.names("eval/held_out/rewards/", "/mean")]
    names += [name for name in ("eval/score",) if run.series(name)]
    short = {name: name.removeprefix("eval/").removesuffix("/mean") for name in names}
    return [Series(short[name], run.series(name), smooth=False) for name in names]


def _kl_note(run: Run) -> str:
    coefs = run.values("kl_coef")
    if coefs and min(coefs) != max(coefs):
        return f"KL_COEF moved from {coefs[0]:.3g} to {coefs[-1]:.3g}."
    return f"KL_COEF {coefs[0]:g} per nat." if coefs else ""


def _length(run: Run) -> Chart | None:
    points, most = run.series("completions/mean_length"), run.config.get("MAX_NEW_TOKENS")
    series = [Series("mean length", points)]
    if most:
        level = [(step, most) for step, _ in points]
        series.append(Series("MAX_NEW_TOKENS", level, dashed=True, smooth=False))
    return chart("Length", series, unit="tokens per completion")


def _rate(run: Run) -> Chart | None:
    """With the steps in which an update was made smaller."""
    points = run.series("lr")
    scaled = [row["step"] for row in run.metrics if row.get("update_scale", 1.0) != 1.0]
    note = ""
    if run.series("update_scale"):
        note = f"The line search scaled {len(scaled)} of {len(run.metrics)} updates"
        if scaled:
            note += ": " + "first in " * (len(scaled) > 6) + in_words(scaled[:6])
        note += "."
    return chart("Learning rate", [Series("rate", points, smooth=False)], log=True, note=note)


def _update(run: Run) -> Chart | None:
    series = [
        Series("of the update", run.series("update_kl")),
        Series("aimed at", run.series("update_kl_target"), dashed=True, smooth=False),
    ]
    return chart("KL of each update", series, unit="nats per token", log=True)
