"""The trust region: no update moves a policy further than a target KL, whatever the learning rate.

1. Line search within the step: an update that went too far is scaled by sqrt(target / KL). A policy
   that has collapsed does not recover, so this happens before the next sample is drawn.
2. Steering between steps: the rate moves towards the one whose updates meet the target.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from adaptiverl.optim.constants import lr_bounds
from adaptiverl.optim.hyperparams import check_rate, clamp, needs_closure, numbers, scaled_rates
from adaptiverl.optim.line_search import MAX_RESCALE, is_short, search
from adaptiverl.optim.signals import SignalToNoise
from adaptiverl.optim.update import (
    LastUpdate,
    alignment_and_finite,
    has_gradient,
    supports_alignment,
)

log = logging.getLogger(__name__)
ROUNDING = 0.01, 1e-6  # as a share of the target, and in nats: a KL further below 0 is no KL
EVIDENCE_SCALE = 2.0  # the signal-to-noise ratio at which the whole target is used
MIN_CONFIDENCE = 0.25  # rare rewards are too few for evidence, and without movement none come
TRUSTED = 10  # informative alignments before evidence counts: until then it is mostly chance
DEFAULT_KL = 0.004  # nats per token
SHORT_RUN, MOST = 60, 4.0  # shorter runs have larger targets, in proportion, at most so many times

Record = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class UpdateInfo:
    """What one update did."""

    lr: float  # the rate that the step took, after the line search, which heeds no lower bound
    kl: float | None  # nats per token; None where it was not measured, or never finite
    target: float  # nats per token
    scale: float = 1.0  # the factor of the line search; 1 if there was none, 0: left out
    signal_to_noise: float = 0.0  # of the alignments


class TrustRegion:
    """Makes the steps of `optimizer` so that each one's KL meets a target.

    optimizer   any torch optimizer but LBFGS, whose step needs a closure. Around each step its
                rates are multiplied by `ratio`, the factor that has been found; afterwards they are
                what they were, so that any learning-rate scheduler can be used.
    kl          nats per token that an update may move the policy; default None: 0.004, times
                60 / steps (at most 4) in a run of fewer than 60 steps
    steps       length of the run in steps, over which the target falls linearly to kl / steps;
                default None: the target stays
    min_lr, max_lr      bounds of the rate that a step takes; default 1e-9 and 10
    record      called with a dict for each change of the rate: step, hyperparameter ("lr"), rule
                ("line_search", "trust_region", or "min_lr" where a rate that the line search has
                brought below it goes back there), signal ("kl"), value (its KL), old and new rate

    target = kl · (share of the run that is left) · confidence. Confidence begins at 1. After ten
    informative steps it is the signal-to-noise ratio of `alignment` over 2, from 0.25 to 1: where
    rewards are mostly noise, gradients of fresh samples do not agree with the last update, and the
    whole target would be spent on noise. It stays at 1 for optimizers whose state does not
    determine the last update (see `supports_alignment`).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        kl: float | None = None,
        steps: int | None = None,
        min_lr: float | None = None,
        max_lr: float | None = None,
        record: Record | None = None,
    ):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is {optimizer!r:.60}; it must be a torch.optim.Optimizer")
        if needs_closure(optimizer):
            raise ValueError(
                f"the trust region cannot search the step of {type(optimizer).__name__}: it takes "
                "a closure, which moves the weights several times. Use another optimizer or rule"
            )
        self.bounds = lr_bounds(min_lr, max_lr)
        check_steps(steps)
        kl = default_kl(steps) if kl is None else numbers(kl=kl)["kl"]
        if not 0 < kl < math.inf:
            raise ValueError(f"kl is {kl}; it must be in (0, inf): nats per token of an update")
        if not 0 <= self.bounds[0] <= self.bounds[1]:
            raise ValueError(f"min_lr {self.bounds[0]:g} is above max_lr {self.bounds[1]:g}")
        for group in optimizer.param_groups:
            check_rate(float(group["lr"]), self.bounds)
        self.optimizer, self.kl, self.steps, self.record = optimizer, kl, steps, record
        self.ratio = 1.0  # the factor on the rate
        self.time = 0  # steps that have been made
        self.initialized = False  # whether the KL of an update has met the target before
        self.informative_steps = 0  # whose alignment was taken in
        self.alignments = SignalToNoise()
        self.warned: set[str] = set()

    @property
    def confidence(self) -> float:
        """The share of the target that the signal-to-noise ratio allows."""
        if self.informative_steps < TRUSTED or not supports_alignment(self.optimizer):
            return 1.0
        return clamp(self.alignments.value / EVIDENCE_SCALE, (MIN_CONFIDENCE, 1.0))

    @property
    def target(self) -> float:
        """Nats per token for the next update."""
        return falling(self.kl, self.time, self.steps) * self.confidence

    def observe_alignment(self, cosine: float | None) -> None:
        """Takes in one `alignment`; None and NaN carry no information."""
        if cosine is not None and math.isfinite(cosine):
            self.informative_steps += 1
            self.alignments.observe(cosine)

    def step(
        self, measure_kl: Callable[[], float], *, min_kl: float = 0.0, informative: bool = True
    ) -> UpdateInfo:
        """Makes one step and scales its update until the KL is within twice the target.

        measure_kl  gives KL(policy before this step ‖ policy now) in nats per token, the same
                    number in every process. What it needs of the policy before is computed by the
                    caller beforehand. It is called once or a few times, up to 13, without
                    gradient. NaN is too far. What it raises takes the update back
        min_kl      the target is never below this, for a KL that is measured with rounding errors
        informative     whether rewards differ, within some prompt. Where none do, the gradient is
                    that of a penalty alone, and its alignment is no evidence about the rewards

        The first update is also scaled up where it falls short. If its KL stays exactly the same,
        update and rate stay, and the next update counts as the first. Where that is because 32 bits
        have lost the update, the rate is multiplied by 30. While all gradients are 0 before that,
        the KL is not measured.

        An update that no scale brings within bounds is taken back; where its KL was never finite
        the rate is halved. A KL below 0 is no information: update and rate stay as they are. A
        gradient that is not finite, or whose square is not, is no step: weights, optimizer state
        and rate stay. After that, and where the KL was never finite, the info has a scale of 0 and
        no KL.
        Under a GradScaler, which may skip a step, wrap the optimizer in AdaptiveOptimizer instead.
        """
        base = self._base_rate()
        with scaled_rates(self.optimizer, self.ratio, self.bounds):
            rate = clamp(base * self.ratio, self.bounds) if base else 0.0
            if not base or not (self.initialized or has_gradient(self.optimizer)):
                self.optimizer.step()
                info = UpdateInfo(rate, None, max(self.target, min_kl))
            else:
                cosine, finite = alignment_and_finite(self.optimizer)
                if finite:
                    info = self._searched(measure_kl, min_kl, base, rate, cosine, informative)
                else:
                    self._warn(
                        "a gradient is not finite: the step is left out, and so is every such one"
                    )
                    info = UpdateInfo(rate, None, max(self.target, min_kl), scale=0.0)
        self.time += 1
        return info

    def _searched(
        self,
        measure_kl: Callable[[], float],
        min_kl: float,
        base: float,
        rate: float,
        cosine: float | None,
        informative: bool,
    ) -> UpdateInfo:
        """A step with its line search, and the rate for the next; `rate` is that of this one."""
        if informative:
            self.observe_alignment(cosine)
        target, update = max(self.target, min_kl), LastUpdate(self.optimizer)
        room = min(self.bounds[1] / rate, update.max_scale)
        self.optimizer.step()
        measure = partial(measured, measure_kl)
        try:
            scale, kl = self.line_search(measure, update.rescale, target, room)
        except BaseException:  # also an interrupt: nobody has searched this update
            update.rescale(0.0)
            raise
        if math.isnan(kl):  # the step is as if it had been left out
            info, kl = UpdateInfo(rate, None, target, 0.0, self.alignments.value), 0.0
        else:
            info = UpdateInfo(rate * scale, kl, target, scale, self.alignments.value)
        if 0 < info.lr < self.bounds[0]:
            self._warn(
                f"an update had to be scaled down below min_lr {self.bounds[0]:g}, from which the "
                "next step begins again: a smaller min_lr lets the rate follow"
            )
        self._set_ratio(base, self.ratio * scale, "line_search", kl, info.lr)
        # That nothing is left of an update is no sign that the rate was too small, and the
        # next one is searched too.
        if update.scale and not _is_none(kl, target):
            if not self.initialized and scale == 1 and is_short(kl, target, room):
                self._stay(base, kl, update)
            else:
                self.initialized = True
                self.steer(base, kl, target)
        return info

    def _stay(self, base: float, kl: float, update: LastUpdate) -> None:
        """After a first update whose KL was the same at every scale: the next one is the first."""
        if update.is_lost():  # and scaling nothing gives nothing
            self._set_ratio(base, self.ratio * MAX_RESCALE, "line_search", kl)
            return
        self._warn(
            "the KL of the first update is the same at every scale, so the rate stays: does "
            "measure_kl compute the policy as it is when it is called? If it is 0, max_lr may be "
            "too small to move the policy"
        )

    def line_search(
        self,
        measure_kl: Callable[[], float],
        rescale: Callable[[float], None],
        target: float,
        max_scale: float = math.inf,
    ) -> tuple[float, float]:
        """The factor that the update was scaled by, and its KL at that scale: see `search`.

        The KL is NaN where it was never finite. Only the first update is also scaled up. Warns of a
        KL that is no KL.
        """
        upwards = not self.initialized
        scale, kl, known = search(measure_kl, rescale, target, max_scale, upwards)
        if not known:
            self._warn(
                "the KL of an update was NaN or infinite at every scale, so it is taken back and "
                "the rate halved: look at what measure_kl computes"
            )
            kl = math.nan
        if _is_none(kl, target):
            self._warn(
                "measure_kl gave a KL below 0, which says nothing, so the rate stays: is it "
                "KL(before ‖ now), exact or by k3? The mean of log-ratios may be below 0"
            )
            if scale > 1:  # searched in vain
                rescale(1 / scale)
                scale = 1.0
        return scale, kl

    def steer(self, base: float, kl: float, target: float) -> None:
        """Moves the rate half of the way to the target in log space, at most by a factor of 2.

        `base` is the rate without `ratio`. η ← η · clip((target / KL)^¼, ½, 2), since KL ∝ η².
        """
        factor = clamp((target / kl) ** 0.25, (0.5, 2.0)) if kl > 0 else 2.0
        self._set_ratio(base, self.ratio * factor, "trust_region", kl)

    def _set_ratio(
        self, base: float, ratio: float, rule: str, kl: float, took: float = math.inf
    ) -> None:
        """Not beyond the bounds of the rate, or the ratio would wind up behind them.

        `took` is the rate that the step took, if it was scaled: it may be below them.
        """
        low, high = self.bounds
        old, self.ratio = self.ratio, clamp(ratio, (low / base, high / base))
        rates = [clamp(base * ratio, self.bounds) for ratio in (old, self.ratio)]
        if took < low:
            self._note(rule, kl, rates[0], took)
            self._note("min_lr", kl, took, rates[1])
        elif self.ratio != old:
            self._note(rule, kl, *rates)

    def _note(self, rule: str, kl: float, old: float, new: float) -> None:
        if self.record:
            entry = {"step": self.time, "hyperparameter": "lr", "rule": rule, "signal": "kl"}
            self.record(entry | {"value": kl, "old": old, "new": new})

    def _warn(self, message: str) -> None:
        """Once; its steps count from 1."""
        if message not in self.warned:
            self.warned.add(message)
            log.warning("trust_region, step %d: %s", self.time + 1, message)

    def _base_rate(self) -> float:
        """Of the first group that has one above 0."""
        rates = (float(group["lr"]) for group in self.optimizer.param_groups)
        return next((rate for rate in rates if rate), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        own = {
            name: getattr(self, name)
            for name in ("ratio", "time", "initialized", "informative_steps")
        }
        return own | asdict(self.alignments)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state with other names."""
        if wrong := state.keys() ^ self.state_dict().keys():
            how = "unknown" if min(wrong) in state else "missing"
            raise ValueError(f"this is no state of a trust region: {min(wrong)} is {how}")
        for name, value in state.items():
            setattr(self if name in vars(self) else self.alignments, name, value)


@torch.no_grad()
def measured(measure_kl: Callable[[], Any]) -> float:
    """The number that it gives; a tensor would keep its graph."""
    if not callable(measure_kl):
        raise TypeError(
            f"measure_kl is {measure_kl!r:.60}; it must be a function without arguments that "
            "returns the KL in nats per token, called after the step"
        )
    kl = measure_kl()
    if kl is None:
        raise TypeError("measure_kl returned None; it must return the KL in nats per token")
    return numbers(kl=kl)["kl"]


def _is_none(kl: float, target: float) -> bool:
    """Whether it is below 0 by more than rounding."""
    return kl < -max(ROUNDING[0] * target, ROUNDING[1])


def check_steps(steps: int | None) -> None:
    """Raises ValueError for what is no length of a run."""
    if steps is not None and (steps < 1 or steps % 1):
        raise ValueError(
            f"steps is {steps}; it must be at least 1 and whole, or None: a constant target"
        )


def default_kl(steps: int | None) -> float:
    """Nats per token: a policy moves as far in a short run as in one of SHORT_RUN steps."""
    return DEFAULT_KL * (clamp(SHORT_RUN / steps, (1.0, MOST)) if steps else 1.0)


def falling(kl: float, time: int, steps: int | None) -> float:
    """`kl` after `time` steps: falls linearly over `steps` to kl / steps; constant for None."""
    return kl * (1.0 if not steps else max(steps - time, 1) / steps)
