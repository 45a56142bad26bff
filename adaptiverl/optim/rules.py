"""One object for each rule: what it reads, what it moves, how, and why. Imports no torch.

RULES is the only list: names, arguments, the tables of docs/rules.md, the reasons that reports give
and what a config may say all come from it. `python -m scripts.rules_tables` writes the tables.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from adaptiverl.optim.constants import CONSTANTS

ARGUMENTS = ("lr_rule", "reward_rule", "momentum_rule", "betas_rule", "alpha_rule", "wd_rule")
MEAN_REVERSION = "mean reversion"  # in records, where a stateful rule has not acted
MIN_SCALING = 0.01  # of scaling: a rate of 0 would learn nothing more
C = TypeVar("C", bound=type)
# (old value, value at the start, what was read, constants) → new value
Update = Callable[[float, float, Any, Any], float]
Value = str | Mapping[str, Any] | Sequence["str | Mapping[str, Any]"]


@dataclass(frozen=True)
class Rule:
    """How one hyperparameter responds to one signal.

    A stateful rule moves a value that is kept from step to step, and mean-reverts. A multiplier (of
    a signal) and a schedule (of time) are computed anew each step and never accumulate. `update` is
    a pure function of (old, base, what it reads, constants): a Reading of signals.py, or the number
    of steps for a schedule. It is None where the rule is a class of its own.
    """

    name: str
    argument: str
    moves: Literal["lr", "momentum", "beta1", "beta2", "alpha", "weight_decay"]
    reads: Literal["loss", "reward", "grad_norm", "time", "kl"]
    kind: Literal["stateful", "multiplier", "schedule"]
    update: Update | None
    constants: tuple[str, ...]
    formula: str
    reason: str
    smoothed: bool = True  # whether loss_beta or reward_beta, whichever it reads, matters to it

    @property
    def label(self) -> str:
        """Its name in records: "trend" of the loss, "reward trend" of the reward."""
        return f"reward {self.name}" if self.argument == "reward_rule" else self.name

    def reads_constant(self, name: str) -> bool:
        """Its own constants, and those that it shares with others of its kind."""
        if name in ("loss_beta", "reward_beta"):
            own = self.smoothed and name == f"{self.reads}_beta"
            return own or self.name == "learned"
        if name in ("min_momentum", "max_momentum"):
            return self.moves == "momentum"
        return name in self.constants

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are the rule itself."""
        return _same, (self.argument, self.name, self.moves)


def _same(argument: str, name: str, moves: str) -> Rule:
    wanted = (argument, name, moves)
    return next(rule for rule in RULES if (rule.argument, rule.name, rule.moves) == wanted)


def _scaled(old: float, better: int, up: float, down: float) -> float:
    return old * up if better > 0 else old * down if better < 0 else old


def _nudged(old: float, better: int, c: Any) -> float:
    return old + c.momentum_up if better > 0 else old * c.momentum_down if better < 0 else old


def _longer(old: float, base: float, r: Any, c: Any) -> float:
    """A decay whose memory 1 / (1 − decay) grows with the variance."""
    return 1 - (1 - base) / (1 + r.excess_variance)


def _normalized(old: float, base: float, r: Any, c: Any) -> float:
    return 1 - (1 - base) * min(max(abs(r.ema) / r.mean_abs, 0.5), 2.0) if r.mean_abs else base


def between(height: Any, c: Any) -> Any:
    """The factor of a schedule whose curve is at `height`, from 0 to 1."""
    return c.eta_min_scale + (1 - c.eta_min_scale) * height


def _cyclical(old: float, base: float, step: int, c: Any) -> float:
    return between(abs(1 - 2 * (step % c.cycle_length / c.cycle_length)), c)


def _cosine(place: float, c: Any) -> float:
    return between((1 + math.cos(math.pi * place)) / 2, c)


def _cosine_restart(old: float, base: float, step: int, c: Any) -> float:
    length = float(c.cycle_length)
    while step >= length:
        step, length = int(step - length), float(int(length * c.cycle_mult))
    return _cosine(step / length, c)


TREND = ("trend_window", "trend_threshold", "min_rel_improve")
NUDGED = ("momentum_up", "momentum_down", *TREND)
LOSS_TREND = "the loss rose or fell by more than its noise"
REWARD_TREND = "the reward rose or fell by more than its noise"
LOSS_NOISE = "the loss became noisier than usual, or calmer again"
RULES: tuple[Rule, ...] = (
    Rule("trust_region", "lr_rule", "lr", "kl", "stateful", None, ("trust_region_kl",),
         "line search within the step; then η · clip((target / KL)^¼, ½, 2)",
         "the KL of the last update was off its target"),
    Rule("learned", "lr_rule", "lr", "kl", "stateful", None, ("trust_region_kl",),
         "a GRU's answer to all signals, at most × √2 per step, within a factor of 100; "
         "mean-reverts by 3 % per step; holds while no KL is measured", "the GRU answered so"),
    Rule("loss_decay", "lr_rule", "lr", "loss", "stateful",
         lambda old, base, r, c: old / max(1 + c.loss_k * r.ema, 0.5),
         ("loss_k",), "η / max(1 + `loss_k` · ℓ̄, ½)",
         "the rate falls while the mean loss is above 0, and rises while it is below"),
    Rule("trend", "lr_rule", "lr", "loss", "stateful",
         lambda old, base, r, c: _scaled(old, -r.trend, c.up_factor, c.down_factor),
         ("up_factor", "down_factor", *TREND),
         "× `up_factor` when ℓ falls, × `down_factor` when it rises", LOSS_TREND),
    Rule("patience", "lr_rule", "lr", "loss", "stateful",
         lambda old, base, r, c: min(old * c.big_drop**r.plateau, 1.0),
         ("big_drop", "patience", "cooldown"),
         "× `big_drop` when the last 2 · `patience` losses do not fall (their slope is not below 0 "
         "by a standard error); undone after `cooldown` losses unless their mean is four standard "
         "errors below the line through those before; at most 1",
         "the loss had stopped falling, or a drop had not helped", smoothed=False),
    Rule("variance", "lr_rule", "lr", "loss", "multiplier",
         lambda old, base, r, c: 1 / (c.var_damp_base + c.var_damp_scale * r.excess_variance),
         ("var_damp_base", "var_damp_scale", "var_window"),
         "1 / (`var_damp_base` + `var_damp_scale` · excess)", LOSS_NOISE, smoothed=False),
    Rule("grad_norm", "lr_rule", "lr", "grad_norm", "multiplier",
         lambda old, base, r, c: (
             min(1.0, r.mean_abs / r.value) ** c.grad_power if r.value > 0 else 1.0
         ),
         ("grad_power",), "min(1, mean g / g) ^ `grad_power`",
         "the gradient was longer than usual, or no longer"),
    Rule("cyclical", "lr_rule", "lr", "time", "schedule", _cyclical,
         ("cycle_length", "eta_min_scale"),
         "triangle between 1 and `eta_min_scale` in `cycle_length` steps (Smith 2017)",
         "time passed"),
    Rule("cosine", "lr_rule", "lr", "time", "schedule",
         lambda old, base, step, c: _cosine(step / c.cycle_length, c),
         ("cycle_length", "eta_min_scale"),
         "1 to `eta_min_scale` in `cycle_length` steps, and back in as many", "time passed"),
    Rule("cosine_restart", "lr_rule", "lr", "time", "schedule", _cosine_restart,
         ("cycle_length", "cycle_mult", "eta_min_scale"),
         "1 to `eta_min_scale` in `cycle_length` steps, then at once 1; each cycle `cycle_mult` "
         "times as long, in whole steps (SGDR, Loshchilov & Hutter 2017)", "time passed"),
    Rule("scaling", "reward_rule", "lr", "reward", "multiplier",
         lambda old, base, r, c: (
             max(1 + (r.ema - c.reward_center) / c.reward_span, MIN_SCALING) if r.warm else 1.0
         ),
         ("reward_center", "reward_span"),
         "1 + (R̄ − `reward_center`) / `reward_span`, at least 0.01, once R̄ has forgotten its first "
         "value", "the rate follows the reward"),
    Rule("trend", "reward_rule", "lr", "reward", "stateful",
         lambda old, base, r, c: _scaled(old, r.trend, c.reward_up, c.reward_down),
         ("reward_up", "reward_down", *TREND),
         "× `reward_up` when R rises, × `reward_down` when it falls", REWARD_TREND),
    Rule("trend", "reward_rule", "momentum", "reward", "stateful",
         lambda old, base, r, c: _nudged(old, r.trend, c), NUDGED,
         "+ `momentum_up` when R rises, × `momentum_down` when it falls", REWARD_TREND),
    Rule("variance", "reward_rule", "lr", "reward", "multiplier",
         lambda old, base, r, c: 1 / (1 + c.reward_alpha * r.variance),
         ("reward_alpha", "var_window"), "1 / (1 + `reward_alpha` · Var(R̄))",
         "the reward became noisier, or calmer again"),
    Rule("kelly", "reward_rule", "lr", "reward", "stateful",
         lambda old, base, r, c: old * (1 + c.kelly_gain * math.tanh(r.ema / c.kelly_temp)),
         ("kelly_gain", "kelly_temp"),
         "η (1 + `kelly_gain` · tanh(R̄ / `kelly_temp`)) (after Kelly 1956)",
         "the rate bets on the reward"),
    Rule("inverse", "momentum_rule", "momentum", "loss", "multiplier",
         lambda old, base, r, c: 1 - 1 / (1 + max(r.ema, 0.0)), (),
         "1 − 1 / (1 + ℓ̄), practically 0 (1e-15) for a negative loss", "the loss changed"),
    Rule("exp", "momentum_rule", "momentum", "loss", "multiplier",
         lambda old, base, r, c: 1 - math.exp(-c.loss_a * max(r.ema, 0.0)), ("loss_a",),
         "1 − e^(−`loss_a` · ℓ̄), practically 0 (1e-15) for a negative loss", "the loss changed"),
    Rule("relative", "momentum_rule", "momentum", "loss", "stateful",
         lambda old, base, r, c: _nudged(old, -r.trend, c), NUDGED,
         "+ `momentum_up` when ℓ falls, × `momentum_down` when it rises", LOSS_TREND),
    Rule("normalized", "momentum_rule", "momentum", "loss", "multiplier", _normalized, (),
         "1 − (1 − μ₀) · clip(\\|ℓ̄\\| / its mean, ½, 2)", "the loss changed"),
    Rule("relative", "betas_rule", "beta1", "loss", "stateful",
         lambda old, base, r, c: _nudged(old, -r.trend, c), NUDGED,
         "+ `momentum_up` when ℓ falls, × `momentum_down` when it rises", LOSS_TREND),
    Rule("variance", "betas_rule", "beta2", "loss", "multiplier", _longer, ("var_window",),
         "1 − (1 − β₀) / (1 + excess)", LOSS_NOISE, smoothed=False),
    Rule("stable", "alpha_rule", "alpha", "loss", "multiplier", _longer, ("var_window",),
         "1 − (1 − α₀) / (1 + excess)", LOSS_NOISE, smoothed=False),
    Rule("trend", "wd_rule", "weight_decay", "loss", "stateful",
         lambda old, base, r, c: _scaled(old, r.trend, c.wd_up, c.wd_down),
         ("wd_up", "wd_down", *TREND),
         "× `wd_down` when ℓ falls, × `wd_up` when it rises", LOSS_TREND),
)  # fmt: skip

OTHER_REASONS = {  # by the labels of records that are no rule's
    MEAN_REVERSION: "no rule acted: what rules had moved went back towards its base",
    "line_search": "an update went too far, and was scaled down at once",
    "line_search up": "the first update fell short, and was scaled up at once",
    "min_lr": "the line search had gone below MIN_LR, where the next step began again",
    "rollback": "the policy had collapsed, and the run was taken back",
}


def names(argument: str) -> list[str]:
    """Of the rules that `argument` may name."""
    return list(dict.fromkeys(rule.name for rule in RULES if rule.argument == argument))


def reason(label: str, moves: str = "lr") -> str:
    """Why the rule `label` of a record has moved the hyperparameter `moves`, in one line.

    Of the line search: "line_search up" where it scaled up. "min_lr" is where the next step begins
    again, and a run that was taken back is labelled "rollback". Raises StopIteration for another.
    """
    own = (rule.reason for rule in RULES if (rule.label, rule.moves) == (label, moves))
    return OTHER_REASONS.get(label) or next(own)


def parse_rules(argument: str, value: Value) -> list[tuple[Rule, dict[str, float]]]:
    """The rules that `value` names, each with the constants that it gives.

    `value` is names joined by "+", {"name": "patience", "patience": 30} or a list of both; "none"
    is no rule and stands alone. Raises ValueError for a name that is unknown (with the nearest
    one), given twice or empty, and for a constant that is out of its range or that the rule does
    not read.
    """
    chosen: list[tuple[Rule, dict[str, float]]] = []
    named: list[str] = []
    for part in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(part, str) and not (isinstance(part, Mapping) and "name" in part):
            raise ValueError(
                f"{argument}: {part!r} names no rule; "
                'a rule is a name, like "trend", or {"name": "trend"} with constants'
            )
        given = {} if isinstance(part, str) else dict(part)
        text = part if isinstance(part, str) else str(given.pop("name"))
        for name in map(str.strip, [text] if given else text.split("+")):
            named.append(name)
            if "none" in named and (len(named) > 1 or given):
                raise ValueError(f'{argument}: "none" is no rule, and stands alone')
            if name == "none":
                continue
            own = [rule for rule in RULES if (rule.argument, rule.name) == (argument, name)]
            if not own:
                known = names(argument)
                near = difflib.get_close_matches(name, known, 1, 0.6 if len(known) > 1 else 0)
                nearest = "".join(f"the nearest is {one!r}, and " for one in near)
                others = [rule.argument for rule in RULES if rule.name == name]
                other = f". {name!r} is a rule of {others[0]}" if others else ""
                raise ValueError(
                    f"{argument}: there is no rule {name!r}; {nearest}all are {', '.join(known)}"
                    + other
                )
            if any(rule.name == name for rule, _ in chosen):
                raise ValueError(f"{argument}: {name!r} is named twice")
            readable = [constant for rule in own for constant in rule.constants]
            for constant, number in given.items():
                if constant not in readable:
                    raise ValueError(
                        f"{argument}: {name} does not read {constant!r}; it reads "
                        + (", ".join(dict.fromkeys(readable)) or "no constant")
                    )
                CONSTANTS[constant].check(constant, number)
            chosen += [
                (rule, {k: v for k, v in given.items() if k in rule.constants}) for rule in own
            ]
    return chosen


def readers(constant: str) -> list[str]:
    """The rules that read `constant`, like "lr_rule trend"; none for one that all rules share."""
    own = [f"{rule.argument} {rule.name}" for rule in RULES if rule.reads_constant(constant)]
    return list(dict.fromkeys(own))


def check_constants(given: Mapping[str, Any], chosen: Sequence[Rule]) -> list[str]:
    """Warnings on `given`; raises for what is unknown, out of range, or read by no `chosen` rule.

    A constant at its default may be given without a rule that reads it.
    """
    for low, high in (("min_lr", "max_lr"), ("min_momentum", "max_momentum")):
        one, other = (given.get(name, CONSTANTS[name].default) for name in (low, high))
        if one is not None and other is not None and one > other:
            raise ValueError(f"{low} {one:g} is above {high} {other:g}")
    warnings = []
    for name, value in given.items():
        if name not in CONSTANTS:
            near = difflib.get_close_matches(name, [*CONSTANTS, *ARGUMENTS], n=1)
            text = "".join(f"; {one} is near" for one in near)
            raise TypeError(f"there is no argument {name!r}{text}")
        if value == CONSTANTS[name].default:
            continue
        CONSTANTS[name].check(name, value)
        # Without any rule, "none" everywhere, they may stay where they were
        moved = {rule.moves for rule in chosen} or {"lr"}
        if name in ("min_lr", "max_lr") and "lr" not in moved:
            raise ValueError(f"{name} bounds the rate, and no rule that is chosen moves the rate")
        if (by := readers(name)) and not any(rule.reads_constant(name) for rule in chosen):
            text = f"no chosen rule reads {name}; these do: {', '.join(by)}"
            if name != "cycle_length":  # an example of the design documents gives it alone
                raise ValueError(text)
            warnings.append(text)
    return warnings


def documented(cls: C, own: Mapping[str, str] = MappingProxyType({})) -> C:
    """Adds what its keyword arguments may be to the docstring of `cls`.

    `own` has the lines of those that `cls` takes otherwise.
    """
    lines = [
        'All other arguments are keywords. A rule argument is names joined by "+", a name with',
        'constants, like {"name": "patience", "patience": 30}, or a list of both. Formulas are in',
        "docs/rules.md. Under torch.distributed every process must give the same signals: average",
        "them with `mean_over_processes` first.",
        "",
    ]
    said = {name: f'{name}: {", ".join(names(name))}; default "none"' for name in ARGUMENTS}
    for name, constant in CONSTANTS.items():
        said[name] = f"{name} = {constant.shown}: {constant.meaning}; in {constant.range}"
    lines += (said | dict(own)).values()
    # Python 3.13 takes the indentation off by itself
    cls.__doc__ = "\n".join([inspect.cleandoc(f"{cls.__doc__}"), *lines, ""])
    return cls
