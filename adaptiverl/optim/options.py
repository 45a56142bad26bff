"""The constants of all rules: their defaults, their ranges, and which rules read them.

What would crash at the first signal, or be read by no rule that was chosen, is refused here.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """The constants of all rules; names and values are the seeds' where those have them."""

    up_factor: float = 1.05  # lr × when the loss falls
    down_factor: float = 0.7  # lr × when it rises
    reward_up: float = 1.03  # lr × when the reward rises
    reward_down: float = 0.9  # lr × when it falls
    momentum_up: float = 0.01  # momentum + when better
    momentum_down: float = 0.9  # momentum × when worse
    wd_up: float = 1.05  # weight decay × when the loss rises
    wd_down: float = 0.95  # weight decay × when it falls
    loss_k: float = 0.01  # k of loss_decay
    loss_a: float = 1.0  # a of the momentum rule exp
    var_damp_base: float = 1.0
    var_damp_scale: float = 1.0
    grad_power: float = 1.0  # of grad_norm
    big_drop: float = 0.5  # lr × on a plateau
    reward_center: float = 0.0
    reward_span: float = 1.0
    reward_alpha: float = 1.0  # α of the reward rule variance
    kelly_gain: float = 0.2
    kelly_temp: float = 1.0
    cycle_length: int = 200  # steps of the first cycle
    cycle_mult: float = 2.0  # each cycle of cosine_restart is so many times as long as the last
    eta_min_scale: float = 0.2  # the lowest factor of cosine, cosine_restart and cyclical


TRENDS = (
    "lr_rule trend", "reward_rule trend", "momentum_rule relative", "betas_rule relative",
    "wd_rule trend",
)  # fmt: skip
WINDOWS = ("lr_rule variance", "reward_rule variance", "betas_rule variance", "alpha_rule stable")
CYCLES = ("lr_rule cyclical", "lr_rule cosine", "lr_rule cosine_restart")
FROM_REWARD = (
    "reward_rule scaling", "reward_rule trend", "reward_rule variance", "reward_rule kelly",
    "lr_rule learned",
)  # fmt: skip
MOMENTUM = (
    "momentum_rule inverse", "momentum_rule exp", "momentum_rule relative",
    "momentum_rule normalized", "reward_rule trend",
)  # fmt: skip
NUDGES = ("momentum_rule relative", "betas_rule relative", "reward_rule trend")
# name → its range, and the rules that read it; none named: not one rule's alone
KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "up_factor": ("(0, inf)", ("lr_rule trend",)),
    "down_factor": ("(0, inf)", ("lr_rule trend",)),
    "reward_up": ("(0, inf)", ("reward_rule trend",)),
    "reward_down": ("(0, inf)", ("reward_rule trend",)),
    "momentum_up": ("[0, 1]", NUDGES),
    "momentum_down": ("[0, 1]", NUDGES),
    "wd_up": ("(0, inf)", ("wd_rule trend",)),
    "wd_down": ("(0, inf)", ("wd_rule trend",)),
    "loss_k": ("[0, inf)", ("lr_rule loss_decay",)),
    "loss_a": ("[0, inf)", ("momentum_rule exp",)),
    "var_damp_base": ("(0, inf)", ("lr_rule variance",)),
    "var_damp_scale": ("[0, inf)", ("lr_rule variance",)),
    "grad_power": ("[0, inf)", ("lr_rule grad_norm",)),
    "big_drop": ("(0, 1]", ("lr_rule patience",)),
    "reward_center": ("(-inf, inf)", ("reward_rule scaling",)),
    "reward_span": ("(0, inf)", ("reward_rule scaling",)),
    "reward_alpha": ("[0, inf)", ("reward_rule variance",)),
    "kelly_gain": ("[0, 1)", ("reward_rule kelly",)),
    "kelly_temp": ("(0, inf)", ("reward_rule kelly",)),
    "cycle_length": ("[1, inf)", CYCLES),
    "cycle_mult": ("[1, inf)", ("lr_rule cosine_restart",)),
    "eta_min_scale": ("[0, 1]", CYCLES),
    "trend_window": ("[2, inf)", TRENDS),
    "trend_threshold": ("[0, inf)", TRENDS),
    "min_rel_improve": ("[0, inf)", TRENDS),
    "var_window": ("[2, inf)", WINDOWS),
    "patience": ("[1, inf)", ("lr_rule patience",)),
    "cooldown": ("[1, inf)", ("lr_rule patience",)),
    "loss_beta": ("[0, 1)", ()),
    "reward_beta": ("[0, 1)", FROM_REWARD),
    "memory": ("(1, inf]", ()),
    "max_drift": ("[1, inf]", ()),
    "min_lr": ("[0, inf)", ()),
    "max_lr": ("(0, inf)", ()),
    "min_momentum": ("[0, 1]", MOMENTUM),
    "max_momentum": ("[0, 1]", MOMENTUM),
    "kl_step_target": ("(0, inf)", ("lr_rule kl_target", "lr_rule learned")),
    "steps": ("[1, inf)", ()),
}
WHOLE = ("var_window", "trend_window", "patience", "cooldown")
# An example of the documentation gives it without a cycle.
TOLERATED = ("cycle_length",)


def check(given: Mapping[str, Any], defaults: Mapping[str, Any], chosen: set[str]) -> None:
    """Raises ValueError for what is out of its range, or is read by none of the `chosen` rules.

    `given` are numbers by name, None where there is none; `chosen` are like "lr_rule trend".
    """
    for low, high in (("min_lr", "max_lr"), ("min_momentum", "max_momentum")):
        one, other = given[low], given[high]
        if one is not None and other is not None and one > other:
            raise ValueError(f"{low} {one:g} is above {high} {other:g}")
    for name, value in given.items():
        interval, readers = KNOWN[name]
        if value is None or (value == defaults.get(name) and name in defaults):
            continue
        if not _inside(value, interval) or (name in WHOLE and value != int(value)):
            whole = "a whole number " if name in WHOLE else ""
            raise ValueError(f"{name} is {value}; it must be {whole}in {interval}")
        if readers and not chosen.intersection(readers):
            message = f"{name} is read by {' and '.join(readers)}, and not by a rule that is chosen"
            if name not in TOLERATED:
                raise ValueError(message)
            log.warning(message)


def _inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    if math.isnan(value):
        return False
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)
