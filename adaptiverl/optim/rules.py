"""How one hyperparameter answers a signal: pure functions of numbers, the formulas of the seeds.

A drive is (old, base, reading, options) → new: it moves the value that is kept from step to step.
A factor is (reading, options) → number or (time, options) → number: computed afresh each step and
never accumulated. docs/rules.md has all of them on one page. Bounds are controller.py's.
"""

import math
from collections.abc import Callable

from adaptiverl.optim.options import Options
from adaptiverl.optim.signals import Reading

LEAST = 0.01  # of scaling: a rate of 0 would learn nothing more
Drive = Callable[[float, float, Reading, Options], float]
Factor = Callable[[Reading, Options], float]
Clock = Callable[[int, Options], float]


def _ratio(sign: int, up: float, down: float) -> float:
    return up if sign > 0 else down if sign < 0 else 1.0


# lr, from the loss

LR_DRIVES: dict[str, Drive] = {
    "loss_decay": lambda old, base, r, o: old / max(1 + o.loss_k * r.ema, 0.5),
    "trend": lambda old, base, r, o: old * _ratio(-r.trend, o.up_factor, o.down_factor),
    "patience": lambda old, base, r, o: min(old * o.big_drop**r.plateau, 1.0),
}
LR_FACTORS: dict[str, Factor] = {
    "variance": lambda r, o: 1 / (o.var_damp_base + o.var_damp_scale * r.excess),
}
GRAD_FACTORS: dict[str, Factor] = {
    "grad_norm": lambda r, o: min(1.0, r.usual / r.value) ** o.grad_power if r.value > 0 else 1.0,
}


def cyclical(step: int, o: Options) -> float:
    """A triangle from 1 down to eta_min_scale and back (Smith 2017)."""
    place = step % o.cycle_length / o.cycle_length
    return o.eta_min_scale + (1 - o.eta_min_scale) * abs(1 - 2 * place)


def cosine(step: int, o: Options) -> float:
    """From 1 to eta_min_scale in cycle_length steps, and back in as many."""
    return _cosine(step / o.cycle_length, o)


def cosine_restart(step: int, o: Options) -> float:
    """From 1 to eta_min_scale, then at once to 1; each cycle cycle_mult times as long (SGDR)."""
    length = float(o.cycle_length)
    while step >= length:
        step, length = int(step - length), float(int(length * o.cycle_mult))
    return _cosine(step / length, o)


def _cosine(place: float, o: Options) -> float:
    return o.eta_min_scale + (1 - o.eta_min_scale) * (1 + math.cos(math.pi * place)) / 2


LR_CLOCKS: dict[str, Clock] = {
    "cyclical": cyclical,
    "cosine": cosine,
    "cosine_restart": cosine_restart,
}

# lr, from the reward

REWARD_DRIVES: dict[str, Drive] = {
    "trend": lambda old, base, r, o: old * _ratio(r.trend, o.reward_up, o.reward_down),
    "kelly": lambda old, base, r, o: old * (1 + o.kelly_gain * math.tanh(r.ema / o.kelly_temp)),
}
REWARD_FACTORS: dict[str, Factor] = {
    "scaling": lambda r, o: (
        max(1 + (r.ema - o.reward_center) / o.reward_span, LEAST) if r.warm else 1.0
    ),
    "variance": lambda r, o: 1 / (1 + o.reward_alpha * r.variance),
}

# momentum, betas, alpha, weight decay


def _nudged(old: float, better: int, o: Options) -> float:
    """Up by a little when better, down by a share when worse."""
    return old + o.momentum_up if better > 0 else old * o.momentum_down if better < 0 else old


def _longer(base: float, r: Reading) -> float:
    """A decay whose memory 1 / (1 − decay) grows with the variance."""
    return 1 - (1 - base) / (1 + r.excess)


def _normalized(base: float, r: Reading) -> float:
    """1 − momentum in proportion to the loss over its usual size, within a factor of 2."""
    return 1 - (1 - base) * min(max(abs(r.ema) / r.usual, 0.5), 2.0) if r.usual else base


MOMENTUM: dict[str, Drive] = {
    "inverse": lambda old, base, r, o: 1 - 1 / (1 + max(r.ema, 0.0)),
    "exp": lambda old, base, r, o: 1 - math.exp(-o.loss_a * max(r.ema, 0.0)),
    "relative": lambda old, base, r, o: _nudged(old, -r.trend, o),
    "normalized": lambda old, base, r, o: _normalized(base, r),
}
MOMENTUM_BY_REWARD: dict[str, Drive] = {"trend": lambda old, base, r, o: _nudged(old, r.trend, o)}
BETA1: dict[str, Drive] = {"relative": MOMENTUM["relative"]}
BETA2: dict[str, Drive] = {"variance": lambda old, base, r, o: _longer(base, r)}
ALPHA: dict[str, Drive] = {"stable": lambda old, base, r, o: _longer(base, r)}
WEIGHT_DECAY: dict[str, Drive] = {
    "trend": lambda old, base, r, o: old * _ratio(r.trend, o.wd_up, o.wd_down),
}

# lr, from the KL


def kl_target(rate: float, kl: float, target: float) -> float:
    """KL grows with the square of the rate: half of the way in log space, at most a factor of 2."""
    if not kl > 0:
        return 2 * rate
    return rate * min(max((target / kl) ** 0.25, 0.5), 2.0)
