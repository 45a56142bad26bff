"""Warnings, once each, of a run that learns nothing or something wrong: the cause and the key.

A collapse ends the step, or is warned of: ON_COLLAPSE. The words are guard_texts.py's.
"""

import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptiverl.rl.diversity import is_answering
from adaptiverl.rl.reinforce import (
    PER_PROMPT,
    are_compared,
    is_informative,
    zero_std_share,
)
from adaptiverl.training import guard_texts as say
from adaptiverl.training.collapse import COLLAPSES, Collapsed, sound_before
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.metrics import Metrics
from adaptiverl.training.trends import LEAST, OF_EVALUATIONS, SIGNIFICANT, parted
from rewards import HumanReward

Finding = tuple[str, str]  # kind, message
UNSOUND = COLLAPSES | {"kl", "entropy", "distinct"}  # a checkpoint of such a step is not sound
SUMS = {"reward", "reward_fixed_scale", "eval/reward"}
FLOAT32 = torch.finfo(torch.float32).eps  # of a number's size: what is closer is equal
LARGE_REWARD = 1e5  # from which rewards that differ by a hundredth are equal
FLAT_STEPS = 5  # in a row without a difference between rewards; fewer may be chance,
FLAT_STEPS_LATER = 20  # and so may be more, where rewards are rare but have differed before
RECENT = 5  # steps whose mean is compared with the first step
WINDOW = 50  # values in which a trend is looked for
DETERMINISTIC = 0.1  # nats per token; a policy of less entropy repeats itself
LEFT = 0.25  # of the first step's entropy, and
LEFT_DISTINCT = 0.3  # of its distinct-2: less is warned of
REPEATED = 0.1  # of its distinct-2: with equal rewards a collapse
KL_LARGE, KL_BEYOND = 1.0, 5.0  # nats per token: warned of; a collapse, where KL_STEPS in a row are
KL_STEPS = 3
FAR = 10.0  # nats per completion: of few tokens, each may well have moved further than KL_LARGE
CUT_STEPS = 20  # in a row without a completion that ends by itself
KEPT_SOUND = 100  # steps of checkpoints that are remembered


@dataclass
class Guards:
    """Looks at each step's numbers; remembers in its state what was said."""

    config: RunConfig
    last_step: int
    allowed_gap: float  # nats per token by which sampling and the loss may differ
    is_main: bool = True  # whether this process logs
    flat_steps: int = 0  # steps in a row in which rewards gave nothing to learn from
    moved: bool = False  # whether rewards have ever given something to learn from
    varied: bool = False  # whether rewards differed at all in these, or between them
    cut_steps: int = 0  # steps in a row in which all completions were cut off
    odd_gradients: int = 0  # steps in a row whose gradient was not finite
    first: dict[str, float] = field(default_factory=dict)  # figures of the first step
    series: dict[str, list[float]] = field(default_factory=dict)  # last WINDOW values by name
    warned: list[str] = field(default_factory=list)
    sound_steps: list[int] = field(default_factory=list)  # of checkpoints with sound figures
    events: list[dict[str, Any]] = field(default_factory=list)  # rows of events.jsonl
    sound: bool = True  # whether the last step's figures were; no state
    collapse: Collapsed | None = None  # found in the last step; no state

    def look(self, step: int, reward: Tensor, advantage: Tensor, metrics: Metrics) -> None:
        """`reward` [B] is NaN where it is missing. Every process calls it; the main one logs."""
        self.collapse = None
        found = dict(self._found(reward, advantage, metrics))
        self.sound = not UNSOUND & found.keys() and self._is_sound(metrics)
        if not self.sound:  # these are the figures of the policy that the step before has left
            self.sound_steps = [saved for saved in self.sound_steps if saved + 1 != step]
        collapses = [kind for kind in found if kind in COLLAPSES]
        if collapses and self.config.ON_COLLAPSE != "warn":
            self.collapse = Collapsed(step, collapses[0], found[collapses[0]])
            return  # the rest follows from it
        for kind, message in found.items():
            if kind not in self.warned:
                self.warned.append(kind)
                self.event(step, kind, message, "warn")

    def _is_sound(self, metrics: Metrics) -> bool:
        """Whether this step alone is within what is warned of in the mean of several."""
        far = metrics.get("kl", 0.0) > KL_LARGE and metrics["kl_per_completion"] > FAR
        return not far and all(
            metrics[name] >= share * self.first[name]
            for name, share in (("entropy", LEFT), ("completions/distinct_2", LEFT_DISTINCT))
        )

    def note(self, step: int, kind: str, message: str, action: str) -> None:
        """A row of events.jsonl."""
        self.events.append({"step": step, "kind": kind, "message": message, "action": action})

    def event(self, step: int, kind: str, message: str, action: str) -> None:
        """A row of events.jsonl, and a warning on the console."""
        self.note(step, kind, message, action)
        if self.is_main:
            logging.warning("step %d: %s", step, message)

    def act(self) -> None:
        """Raises Collapsed if the last step has shown a collapse that is not only warned of."""
        if self.collapse:
            raise self.collapse

    def checkpointed(self, step: int) -> None:
        """A checkpoint that a rollback may go back to is about to be written."""
        if self.sound:
            self.sound_steps = [*self.sound_steps, step][-KEPT_SOUND:]

    def needed(self, step: int) -> set[int]:
        """The checkpoints that a rollback from `step`, or from a later one, may go back to."""
        proven = sound_before(self.sound_steps, step)
        return {saved for saved in self.sound_steps if saved >= max(proven, default=0)}

    def forget_rewards(self) -> None:
        """Rewards are on another scale from here on: no trend goes across."""
        for known in (self.first, self.series):
            for name in filter(_is_reward, list(known)):
                del known[name]

    def _found(self, reward: Tensor, advantage: Tensor, metrics: Metrics) -> Iterator[Finding]:
        self._remember(metrics)
        yield from self._of_update(advantage, metrics)
        yield from self._of_rewards(reward, metrics)
        yield from self._of_policy(metrics)
        yield from self._of_held_out(metrics)

    def _remember(self, metrics: Metrics) -> None:
        named = ("entropy", "completions/distinct_2", "kl", "kl_per_completion")
        kept = [name for name in metrics if name in named or _is_reward(name)]
        for name in kept:
            if metrics[name] is not None:
                self.first.setdefault(name, metrics[name])
                self.series[name] = [*self.series.get(name, []), metrics[name]][-WINDOW:]

    def _mean(self, name: str) -> float | None:
        """Over the last RECENT steps; None before there are as many."""
        values = self.series.get(name, [])
        return sum(values[-RECENT:]) / RECENT if len(values) >= RECENT else None

    def _of_update(self, advantage: Tensor, metrics: Metrics) -> Iterator[Finding]:
        c = self.config
        if metrics["grad_norm"] == 0 and advantage.any():
            yield "no gradient", say.NO_GRADIENT
        odd = not math.isfinite(metrics["grad_norm"])
        self.odd_gradients = self.odd_gradients + 1 if odd else 0
        if self.odd_gradients >= (FLAT_STEPS if c.FP16 else 1):  # a scaler begins too high
            cause = (
                "FP16 is too narrow: use BF16" if c.FP16 else f"large updates: use {self._less()}"
            )
            yield "nan gradient", say.NAN_GRADIENT.format(steps=self.odd_gradients, cause=cause)
        if metrics["lr"] == 0:
            yield "rate", say.RATE_OF_ZERO
        gap = metrics["sampling/sampling_logp_difference/mean"]
        if gap > self.allowed_gap:
            cause = "the model computes otherwise with its cache than without (recurrent layers)"
            if c.VLLM_SERVER:
                cause = "the server has other weights, or less precision"
            yield "drift", say.DRIFT.format(gap=gap, allowed=self.allowed_gap, cause=cause)

    def _of_rewards(self, reward: Tensor, metrics: Metrics) -> Iterator[Finding]:
        c, group = self.config, self._group
        flat, mean = not is_informative(reward, c.BASELINE, c.NUM_GENERATIONS), metrics["reward"]
        differs = zero_std_share(reward) < 1
        self.varied = differs or (self.varied and self.flat_steps > 0)
        self.flat_steps = self.flat_steps + 1 if flat else 0
        self.moved |= not flat
        limit = FLAT_STEPS_LATER if self.moved else FLAT_STEPS
        trains = "only the KL penalty trains the policy" if c.KL_COEF else "nothing is trained"
        if c.BASELINE == "none" and reward.nan_to_num().any():
            trains = "what is trained is noise: BASELINE none compares no completions"
        if mean is None:
            yield "missing", _missing(c)
        elif flat and (message := self._collapsed(metrics)):
            yield message
        elif self.flat_steps >= min(limit, self.last_step):
            kind, text = "constant", say.CONSTANT
            if not are_compared(reward, c.BASELINE, c.NUM_GENERATIONS) and len(reward) > 1:
                kind, text = "alone", say.ALONE
            elif self.varied and group > 1:
                kind, text = "stuck", say.STUCK
            told = text.format(
                trains=trains,
                steps=self.flat_steps,
                group=group,
                baseline=c.BASELINE,
                place="no prompt" if group > 1 else "no step",
                key="NUM_GENERATIONS" if group > 1 else "BATCH_SIZE",
            )
            if (largest := reward.abs().nan_to_num().max().item()) >= LARGE_REWARD:
                told += say.ROUNDED.format(size=largest, least=largest * FLOAT32)
            yield kind, told

    def _collapsed(self, metrics: Metrics) -> Finding | None:
        """Of a step whose rewards give nothing to learn from."""
        equal = say.EQUAL_IN_PROMPTS if self._group > 1 else say.EQUAL
        entropy, distinct = metrics["entropy"], metrics["completions/distinct_2"]
        before = self.first["entropy"], self.first["completions/distinct_2"]
        if entropy < DETERMINISTIC and (entropy >= LEFT * before[0] or before[0] < DETERMINISTIC):
            return "deterministic", say.DETERMINISTIC.format(entropy=entropy, equal=equal)
        if entropy >= DETERMINISTIC and distinct >= REPEATED * before[1]:
            return None
        start, now = self.first.get("reward"), metrics["reward"]
        cause = say.TOO_LARGE.format(smaller=self._less())
        within, across = (metrics[f"completions/equal_{of}_prompts"] for of in ("within", "across"))
        if start is not None and now > start and metrics.get("kl", 0.0) < KL_BEYOND:
            if is_answering(within, across):
                numbers = {"within": within, "across": across, "before": start, "now": now}
                return "solved", say.SOLVED.format(equal=equal, **numbers)
            cause = say.HACKED.format(before=start, now=now, smaller=self._less())
        return "collapsed", say.COLLAPSED.format(
            entropy=abs(entropy),  # never "-0.00"
            start_entropy=before[0],
            distinct=distinct,
            start_distinct=before[1],
            equal=equal,
            cause=cause,
        )

    def _of_policy(self, metrics: Metrics) -> Iterator[Finding]:
        c, less = self.config, self._less()
        kls = self.series.get("kl", [])[-KL_STEPS:]
        kl, total = self._mean("kl"), self._mean("kl_per_completion")
        if len(kls) == KL_STEPS and min(kls) > KL_BEYOND and metrics["kl_per_completion"] > 2 * FAR:
            text = say.KL_BEYOND.format(kl=min(kls), steps=KL_STEPS, smaller=less)
            yield "kl beyond reason", text
        elif kl is not None and total is not None and kl > KL_LARGE and total > FAR:
            yield "kl", say.KL_LARGE.format(kl=kl, total=total, smaller=less)
        for kind, name, share, text in (
            ("entropy", "entropy", LEFT, say.ENTROPY),
            ("distinct", "completions/distinct_2", LEFT_DISTINCT, say.DISTINCT),
        ):
            now, before = self._mean(name), self.first[name]
            if now is not None and now < share * before:
                yield kind, text.format(before=before, now=now, smaller=less)
        cut = metrics["completions/clipped_ratio"] == 1
        self.cut_steps = self.cut_steps + 1 if cut else 0
        ended = self.first.setdefault("ended", float(not cut)) > 0
        if self.cut_steps >= CUT_STEPS:
            since = "but in the first step some ended" if ended else "from the first step on"
            text = say.CUT_OFF.format(steps=self.cut_steps, tokens=c.MAX_NEW_TOKENS, since=since)
            yield "cut off", text

    def _of_held_out(self, metrics: Metrics) -> Iterator[Finding]:
        for name in filter(_is_reward, metrics):
            at_eval = name.startswith("eval/")
            if name in SUMS:
                continue
            rising = "reward_fixed_scale" if "reward_fixed_scale" in metrics else "reward"
            rising = "eval/reward" if at_eval else rising
            up, down = self.series.get(rising, []), self.series.get(name, [])
            if parted(up, down, OF_EVALUATIONS if at_eval else LEAST):
                yield (
                    f"parted: {name}",
                    say.PARTED.format(
                        falling=name.removesuffix("/mean"),
                        rising=rising,
                        errors=SIGNIFICANT,
                        count=len(down),
                        what="evaluations" if at_eval else "steps",
                    ),
                )

    @property
    def _group(self) -> int:
        """How many completions are compared with each other, if not all; 1: all."""
        return self.config.NUM_GENERATIONS if self.config.BASELINE in PER_PROMPT else 1

    def _less(self) -> str:
        if self.config.uses_trust_region:
            return "a smaller TRUST_REGION_KL"
        return "a smaller LRATE or LR_RULE trust_region"

    def state_dict(self) -> dict[str, Any]:
        return {name: copy.copy(getattr(self, name)) for name in _KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _KEPT:
            setattr(self, name, state[name])


def _missing(c: RunConfig) -> str:
    """What is said where no completion has a reward."""
    people = [each for each in c.REWARDS if isinstance(each, HumanReward)]
    in_time = say.NO_LABELS_IN_TIME if any(each.timeout for each in people) else say.NO_LABELS
    others = [each for each in c.REWARDS if each not in people]
    why = [
        text.format(rewards=", ".join(each.name for each in rewards))
        for text, rewards in ((say.NO_NUMBERS, others), (in_time, people))
        if rewards
    ]
    return say.MISSING.format(why="; ".join(why))


def _is_reward(name: str) -> bool:
    """Whether a trend in it says how good the policy is."""
    held_out = name.startswith(("held_out/rewards/", "eval/held_out/rewards/"))
    return name in SUMS or (held_out and name.endswith("/mean"))


_KEPT = (
    "flat_steps", "moved", "varied", "cut_steps", "odd_gradients", "first", "series", "warned",
    "sound_steps", "events",
)  # fmt: skip
