"""The doctor's checks of the policy: whether it moves, how far, and whether its texts end."""

import statistics
from collections.abc import Iterator

from adaptiverl.commands.curves import Run
from adaptiverl.commands.finding import Finding
from adaptiverl.commands.sample_facts import SampleFacts
from adaptiverl.files.console import counted
from adaptiverl.optim.constants import lr_bounds
from adaptiverl.rl.diversity import is_answering

FAR = 1.0  # nats per token to the first policy; sound runs come to 0.75 where texts get short,
VERY_FAR = 20.0  # and nats per completion, of which they have 7
REPEATS = 0.1  # nats of entropy per token; so does the guard of a run say
SHARE_LEFT = 0.2  # of the first entropy
STILL = 0.01  # nats per completion, at most, in the whole run
TIGHT = 0.1  # nats that one standard deviation of the reward may cost, at most
NARROW = 0.3  # nats of entropy per token in the first step, at a TEMPERATURE below 0.5
SKIPPED = 0.05  # share of the steps
NO_END = 0.01  # share of completions that end before MAX_NEW_TOKENS
HELD = 0.5  # of the lowest rate: a step that took less was scaled far below it
AT_ONCE = 1.5  # tokens of a completion on average, its end included


def policy_findings(run: Run, facts: SampleFacts) -> Iterator[Finding]:
    yield from _gradient(run)
    yield from _held(run)
    yield from _temperature(run)
    yield from _movement(run)
    yield from _ends(run, facts)


def _gradient(run: Run) -> Iterator[Finding]:
    rows = run.metrics
    if not rows:
        return
    skipped = rows[-1].get("skipped", 0)
    if skipped >= 2 and skipped > SKIPPED * len(rows):
        first = next(row["step"] for row in rows if row.get("skipped"))
        yield Finding(
            "gradient not finite",
            "steps are skipped because their gradient is NaN or infinite",
            f"{skipped} of {len(rows)} steps, the first is {first}",
            "use BF16 instead of FP16, or a smaller LRATE; look for a reward of enormous size",
        )
    told = [row for row in rows if row.get("frac_reward_zero_std", 0.0) < 1]
    zero = [row["step"] for row in told if row.get("grad_norm") == 0]
    if len(zero) >= 3 and len(zero) > len(told) / 2:
        yield Finding(
            "gradient zero",
            "the gradient is exactly 0 although the rewards differ: nothing is learned",
            f"in {len(zero)} of {len(told)} such steps, the first is {zero[0]}",
            "look at LORA_TARGETS, LOAD_4BIT and LOAD_8BIT (layers without a backward pass), and "
            "at FP16, which rounds small gradients to 0",
        )
    if all(row.get("lr") == 0 for row in rows):
        yield Finding(
            "rate zero",
            "the learning rate is 0: nothing is trained",
            f"in {len(rows)} of {counted(len(rows), 'step')}",
            'set LRATE, or leave it at "auto" with LR_RULE trust_region',
        )


def _held(run: Run) -> Iterator[Finding]:
    """A rate that begins each step at its lower bound, and is scaled down from there."""
    key, (low, _) = run.config.get("MIN_LR"), lr_bounds(run.config.get("MIN_LR"), None)
    rows = [row for row in run.metrics if row.get("update_scale") is not None and "lr" in row]
    far = [row for row in rows if 0 < row["lr"] < HELD * low]
    if len(far) < 3 or len(far) <= len(rows) / 2:
        return
    least = min(far, key=lambda row: row["update_scale"])
    yield Finding(
        "rate held",
        "the lowest rate is too large for the trust region, so its line search does all the work",
        f"{len(far)} of {len(rows)} updates were scaled down to a rate far below {low:g}, where "
        f"each step begins again: the first in step {far[0]['step']}, the most in step "
        f"{least['step']}, × {least['update_scale']:.2g}",
        "lower MIN_LR, or leave it out: the rate then follows"
        if key is not None
        else "raise TRUST_REGION_KL, or leave it out: no larger rate keeps within it",
    )


def _temperature(run: Run) -> Iterator[Finding]:
    entropy, temperature = run.values("entropy"), run.config.get("TEMPERATURE", 1.0)
    if entropy and temperature < 0.5 and entropy[0] < NARROW:
        flat = run.values("frac_reward_zero_std")
        yield Finding(
            "temperature",
            "the temperature is so low that the completions hardly differ",
            f"TEMPERATURE {temperature:g}: entropy {entropy[0]:.2g} nats per token in the first "
            f"step; {statistics.mean(flat):.0%} of the prompts had equal rewards",
            "raise TEMPERATURE, to 0.7 or 1.0",
        )


def _movement(run: Run) -> Iterator[Finding]:
    entropy, kl = run.values("entropy"), run.values("kl")
    if len(entropy) < 2:
        return
    narrowed = run.late("entropy") or 0.0
    lost = narrowed < min(REPEATS, entropy[0]) or narrowed < SHARE_LEFT * entropy[0]
    lost = lost and not _solved(run)
    far = run.late("kl") or 0.0
    exploded = far > FAR and (run.late("kl_per_completion") or 0.0) > VERY_FAR
    where = f"entropy {entropy[0]:.2f} → {narrowed:.2f} nats per token"
    if kl:
        where += f", KL {far:.2f} nats per token at last"
    if lost or exploded:
        began = _first_step(run, entropy[0])
        if not run.trust_region:
            yield Finding(
                "rate too large",
                "the policy broke: the learning rate is too large",
                f"{where}; it shows from step {began} on, at a rate of {run.metrics[0]['lr']:.3g}",
                "use LR_RULE trust_region, or a much smaller LRATE",
            )
        elif exploded:
            yield Finding(
                "KL explodes",
                "the policy has gone far from the model that it started as",
                f"{where}; it shows from step {began} on",
                "raise KL_COEF, or lower TRUST_REGION_KL",
            )
        else:
            yield Finding(
                "entropy collapse",
                "the policy says nearly the same every time: its entropy collapsed",
                f"{where}; it shows from step {began} on",
                "raise KL_COEF, lower TRUST_REGION_KL or STEPS, or reward what is varied",
            )
    elif kl and len(kl) >= 10:
        yield from _stillness(run)


def _solved(run: Run) -> bool:
    """Whether it learned one text per prompt: the reward rose, and prompts have their own texts."""
    pairs = [run.late(f"completions/equal_{of}_prompts") for of in ("within", "across")]
    known = [share for share in pairs if share is not None]  # earlier versions wrote none
    return len(known) == 2 and is_answering(*known) and _rose(run)


def _rose(run: Run) -> bool:
    """Whether the reward rose, beyond chance."""
    seen = run.change(run.reward)
    return seen is not None and seen.z > 3


def _first_step(run: Run, entropy: float) -> int:
    """From which on the entropy is lost or the KL too large."""
    for row in run.metrics:
        now = entropy if row.get("entropy") is None else row["entropy"]
        if now < max(SHARE_LEFT * entropy, REPEATS) or (row.get("kl") or 0.0) > FAR:
            return row["step"]
    return run.step


def _stillness(run: Run) -> Iterator[Finding]:
    if _rose(run) or not any(run.values("lr")):
        return
    spread, coef = run.values("reward_std"), run.values("kl_coef")
    most = max(abs(value) for value in run.values("kl_per_completion"))
    room = statistics.mean(spread) / coef[-1] if spread and coef[-1] else None
    if room and room < TIGHT:
        yield Finding(
            "KL_COEF too large",
            "the KL penalty is so large that the policy cannot move",
            f"KL_COEF {coef[-1]:g}: {room:.2g} nats per completion cost as much as a standard "
            f"deviation of the reward brings ({statistics.mean(spread):.2g})",
            "lower KL_COEF, to 0.05 for example",
        )
    elif most < STILL and not run.trust_region and run.values("reward_std"):
        yield Finding(
            "rate too small",
            "the policy does not move: the learning rate is too small",
            f"a rate of {run.metrics[-1]['lr']:.3g} moved it by {most:.1g} nats per completion at "
            f"most in {len(run.metrics)} steps",
            "use LR_RULE trust_region, which finds the rate, or a larger LRATE",
        )


def _ends(run: Run, facts: SampleFacts) -> Iterator[Finding]:
    if facts.count < 40:
        return
    length = run.late("completions/mean_length")
    if length is not None and length <= AT_ONCE:
        yield Finding(
            "empty completions",
            "completions end at once: there is nothing to reward",
            f"{length:.2f} tokens on average at last, the end included; in all, {facts.empty} of "
            f"{facts.count} have no other token",
            "see that the prompts of TRAIN_FILE do not end with the end-of-text token, and that "
            "no entry of REWARDS pays for nothing",
        )
    shares = run.values("completions/clipped_ratio")
    if not shares or 1 - (cut := statistics.mean(shares)) >= NO_END:
        return
    tokens = run.config.get("MAX_NEW_TOKENS")
    limit = "MAX_NEW_TOKENS" if tokens is None else f"{tokens} tokens"
    most = f"{100 * cut:.3g} % of the completions were cut at {limit}"
    if facts.inner:
        token, count = facts.inner.most_common(1)[0]
        yield Finding(
            "wrong EOS",
            "completions go on after the model's end of text: the tokenizer names another token",
            f"{count} of {facts.count} completions have token {token}, eos_token_id of the model's "
            f"config.json, inside; {most}",
            "correct eos_token in tokenizer_config.json and eos_token_id in generation_config.json "
            "of MODEL",
        )
    else:
        yield Finding(
            "truncated",
            "almost all completions are cut off at MAX_NEW_TOKENS",
            f"{most}, over {counted(len(shares), 'step')}",
            "raise MAX_NEW_TOKENS, or reward what is short; if none ends at any length, the "
            "end-of-text token of MODEL is wrong",
        )
