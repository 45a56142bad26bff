"""The constants of all rules: defaults, ranges and what they mean. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Constant:
    """A number that an argument of the same name sets; `range` is an interval like "(0, inf)"."""

    default: float | None
    range: str
    meaning: str
    whole: bool = False

    @property
    def shown(self) -> str:
        return "None" if self.default is None else f"{self.default:g}"

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError for what is out of range, and TypeError for what is no number."""
        if value is None and self.default is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is {value!r}; it must be a number in {self.range}")
        low, high = map(float, self.range[1:-1].split(","))
        above = value >= low if self.range[0] == "[" else value > low
        below = value <= high if self.range[-1] == "]" else value < high
        if not (above and below) or (self.whole and value != int(value)):
            whole = "a whole number " if self.whole else ""
            raise ValueError(f"{name} is {value}; it must be {whole}in {self.range}")


POSITIVE, NOT_NEGATIVE, SHARE = "(0, inf)", "[0, inf)", "[0, 1]"
# Names and defaults are those of the design documents where these have them.
CONSTANTS = {
    "up_factor": Constant(1.05, "[1, inf)", "factor on the rate when the loss falls"),
    "down_factor": Constant(0.7, "(0, 1]", "factor on the rate when the loss rises"),
    "reward_up": Constant(1.03, POSITIVE, "factor on the rate when the reward rises"),
    "reward_down": Constant(0.9, POSITIVE, "factor on the rate when the reward falls"),
    "momentum_up": Constant(0.01, SHARE, "added to the momentum when things get better"),
    "momentum_down": Constant(0.9, SHARE, "factor on the momentum when things get worse"),
    "wd_up": Constant(1.05, POSITIVE, "factor on the weight decay when the loss rises"),
    "wd_down": Constant(0.95, POSITIVE, "factor on the weight decay when the loss falls"),
    "loss_k": Constant(0.01, NOT_NEGATIVE, "k of loss_decay, per unit of a loss above 0"),
    "loss_a": Constant(1.0, NOT_NEGATIVE, "a of the momentum rule exp, per unit of the loss"),
    "var_damp_base": Constant(1.0, POSITIVE, "denominator of variance without excess variance"),
    "var_damp_scale": Constant(1.0, NOT_NEGATIVE, "weight of the excess variance in variance"),
    "grad_power": Constant(1.0, NOT_NEGATIVE, "exponent of grad_norm"),
    "big_drop": Constant(0.5, "(0, 1]", "factor on the rate on a plateau"),
    "reward_center": Constant(0.0, "(-inf, inf)", "reward at which scaling gives a factor of 1"),
    "reward_span": Constant(1.0, POSITIVE, "reward above the center at which scaling gives 2"),
    "reward_alpha": Constant(1.0, NOT_NEGATIVE, "weight of the reward's variance"),
    "kelly_gain": Constant(0.2, "[0, 1)", "largest relative change of the rate per step"),
    "kelly_temp": Constant(1.0, POSITIVE, "reward at which kelly's bet is tanh(1)"),
    "cycle_length": Constant(200, "[1, inf)", "steps of the first cycle"),
    "cycle_mult": Constant(2.0, "[1, inf)", "length of each cycle over the one before"),
    "eta_min_scale": Constant(0.2, SHARE, "lowest factor of a schedule"),
    "trend_window": Constant(
        None, "[2, inf)", "values that a trend is tested on; None: 2 / (1 − beta)", whole=True
    ),
    "trend_threshold": Constant(3.0, NOT_NEGATIVE, "standard errors that a trend stands out by"),
    "min_rel_improve": Constant(1e-4, NOT_NEGATIVE, "least change of a trend over the mean"),
    "var_window": Constant(20, "[2, inf)", "values whose variance is taken", whole=True),
    "patience": Constant(20, "[1, inf)", "half of the values that must not fall", whole=True),
    "cooldown": Constant(50, "[1, inf)", "values after which a drop is judged", whole=True),
    "trust_region_kl": Constant(
        None, POSITIVE,
        "nats per token that an update may move the policy at first; None: 0.004, times 60 / steps "
        "(at most 4) in a run of fewer than 60 steps",
    ),
    "loss_beta": Constant(0.9, "[0, 1)", "smoothing of the loss"),
    "reward_beta": Constant(0.9, "[0, 1)", "smoothing of the reward"),
    "memory": Constant(100.0, "(1, inf]", "steps over which a stateful rule mean-reverts"),
    "max_drift": Constant(
        None, "[1, inf]",
        "largest factor of a stateful rule either way; None: 3, or none if the rate is bounded",
    ),
    "min_lr": Constant(None, NOT_NEGATIVE, "lower bound of the rate; None: 1e-9"),
    "max_lr": Constant(None, POSITIVE, "upper bound of the rate; None: 10"),
    "min_momentum": Constant(0.0, SHARE, "lower bound of the momentum"),
    "max_momentum": Constant(0.999, SHARE, "upper bound of the momentum"),
    "steps": Constant(None, "[1, inf)", "length of the run in steps; None: unknown", whole=True),
}  # fmt: skip
# Hyperparameters stay inside these; those of the rate and of momentum can be chosen.
BOUNDS = {
    "lr": (1e-9, 10.0),
    "momentum": (0.0, 0.999),
    "beta1": (0.0, 0.999),
    "beta2": (0.5, 0.9999),
    "alpha": (0.5, 0.9999),
    "weight_decay": (0.0, 1.0),
}


def whole(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, which was checked, with ints where constants are whole: 3e1 counts as 30."""
    floats = {name for name, x in given.items() if CONSTANTS[name].whole and isinstance(x, float)}
    return {name: int(x) if name in floats else x for name, x in given.items()}


def lr_bounds(min_lr: float | None, max_lr: float | None) -> tuple[float, float]:
    """Of the rate that a step takes; None is the widest."""
    low, high = BOUNDS["lr"]
    return (low if min_lr is None else min_lr, high if max_lr is None else max_lr)
