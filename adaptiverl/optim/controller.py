"""Rules, signals and bounds → the next hyperparameters, with the reason for each change.

Every rule of the rate keeps a ratio of its own, so that the rate is the base rate times all of
them. What a loss or a reward drives leans back to 1 over `memory` steps and stays within
`max_drift`: a signal that rises is no evidence that a larger rate is better.
Leaves out when to observe and who owns the rate: adaptive.py, schedulers.py.
"""

import copy
import inspect
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from adaptiverl.optim import rules
from adaptiverl.optim.hyperparams import (
    BOUNDS,
    clamp,
    first_device,
    get,
    one_of_each_rate,
    places,
    put,
    scaled,
)
from adaptiverl.optim.learned import Learned
from adaptiverl.optim.options import KNOWN, Options, check
from adaptiverl.optim.signals import Reading, Signal

RATE_BY = {
    "loss": (rules.LR_DRIVES, rules.LR_FACTORS),
    "grad_norm": ({}, rules.GRAD_FACTORS),
    "reward": (rules.REWARD_DRIVES, rules.REWARD_FACTORS),
}
FROM_LOSS = {
    "momentum": rules.MOMENTUM,
    "beta1": rules.BETA1,
    "beta2": rules.BETA2,
    "alpha": rules.ALPHA,
    "weight_decay": rules.WEIGHT_DECAY,
}
RULE_OF = {
    "momentum": "momentum_rule", "beta1": "betas_rule", "beta2": "betas_rule",
    "alpha": "alpha_rule", "weight_decay": "wd_rule",
}  # fmt: skip
LR_RULES = (
    *rules.LR_DRIVES, *rules.LR_FACTORS, *rules.GRAD_FACTORS, *rules.LR_CLOCKS,
    "kl_target", "learned",
)  # fmt: skip
REWARD_RULES = (*rules.REWARD_DRIVES, *rules.REWARD_FACTORS)
log = logging.getLogger(__name__)
CALLS = {  # how a signal is given
    "loss": "step_loss(loss)",
    "reward": "step_reward(reward), or observe(R=reward)",
    "grad_norm": "observe(model=model)",
}
TINY = 0.01  # Adam's bias correction takes beta as constant while beta^t is above this


class Controller:
    """Moves the hyperparameters of `optimizer`; each `*_rule` is names joined by "+", or "none".

    `memory` is in steps. `max_drift` is the largest factor by which one drive may move the rate
    either way: 3, or without limit where a bound of the rate is given. `constants` are the fields
    of Options. `owns_lr` is False where another scheduler may write the rate and `ratio` is
    applied around each step. `mean_over_processes` says what `observe` is given under
    torch.distributed: True, each process's own signals, to be averaged, so that every process must
    make the same calls; False, the same signals in every process. Raises ValueError for an unknown
    rule, a rate out of bounds, and a constant that is out of its range or that no rule reads.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        lr_rule: str = "none",
        momentum_rule: str = "none",
        betas_rule: str | tuple[str, ...] = "none",
        alpha_rule: str = "none",
        wd_rule: str = "none",
        reward_rule: str = "none",
        loss_beta: float = 0.9,
        reward_beta: float = 0.9,
        var_window: int = 20,
        trend_window: int | None = None,
        trend_threshold: float = 3.0,
        min_rel_improve: float = 1e-4,
        patience: int = 20,
        cooldown: int = 50,
        memory: float = 100.0,
        max_drift: float | None = None,
        min_lr: float | None = None,
        max_lr: float | None = None,
        min_momentum: float = BOUNDS["momentum"][0],
        max_momentum: float = BOUNDS["momentum"][1],
        kl_step_target: float = 0.004,
        steps: int | None = None,
        owns_lr: bool = True,
        mean_over_processes: bool | None = None,
        **constants: Any,
    ):
        given = {name: value for name, value in locals().items() if name in KNOWN} | constants
        self.optimizer = optimizer
        self.options = Options(**constants)
        self.memory, self.owns_lr = memory, owns_lr
        self.mean_over_processes = mean_over_processes
        limited = min_lr is not None or max_lr is not None
        self.max_drift = max_drift or (math.inf if limited else 3.0)
        low, high = BOUNDS["lr"]
        self.bounds = BOUNDS | {
            "lr": (low if min_lr is None else min_lr, high if max_lr is None else max_lr),
            "momentum": (min_momentum, max_momentum),
        }
        betas = betas_rule if isinstance(betas_rule, str) else "+".join(betas_rule)
        self.lr_rules = _names(lr_rule, LR_RULES, "lr_rule")
        self.reward_rules = _names(reward_rule, REWARD_RULES, "reward_rule")
        beta_rules = _names(betas, ("relative", "variance"), "betas_rule")
        self.value_rules = {
            "momentum": _names(momentum_rule, rules.MOMENTUM, "momentum_rule"),
            "beta1": [name for name in beta_rules if name in rules.BETA1],
            "beta2": [name for name in beta_rules if name in rules.BETA2],
            "alpha": _names(alpha_rule, rules.ALPHA, "alpha_rule"),
            "weight_decay": _names(wd_rule, rules.WEIGHT_DECAY, "wd_rule"),
        }
        chosen = {f"lr_rule {name}" for name in self.lr_rules}
        chosen |= {f"reward_rule {name}" for name in self.reward_rules}
        for value, names in self.value_rules.items():
            chosen |= {f"{RULE_OF[value]} {name}" for name in names}
        own = inspect.signature(Controller.__init__).parameters.items()
        check(given, vars(Options()) | {name: p.default for name, p in own}, chosen)
        read = Signal(
            window=var_window,
            trend_window=trend_window,
            threshold=trend_threshold,
            min_rel=min_rel_improve,
            patience=patience,
            cooldown=cooldown,
        )
        self.signals = {
            "loss": replace(read, beta=loss_beta),
            "grad_norm": replace(read, beta=0.9),
            "reward": replace(read, beta=reward_beta),
        }
        self.kl_step_target, self.steps, self.confidence = kl_step_target, steps, 1.0
        self.kl_floor = 0.0

        self.base: dict[str, list[float | None]] = {name: [] for name in BOUNDS}
        self.values: dict[str, list[float | None]] = {name: [] for name in FROM_LOSS}
        self.written: list[float | None] = []  # each group's rate, to see who else writes it
        self.places = places(optimizer)
        self.found: dict[str, list[float | None]] = {name: [] for name in FROM_LOSS}  # likewise
        self.warned: set[str] = set()
        self.ratios: dict[str, float] = {}  # rule → its own part of the rate
        self.seen: dict[str, dict[str, Any]] = {name: {} for name in self.signals}
        self.ignored = dict.fromkeys((*self.signals, "kl", "alignment"), 0)
        self.learned = Learned() if "learned" in self.lr_rules else None
        self.step = 0
        self.audit: list[dict[str, Any]] = []  # of this step; who reads it empties it
        self._take_in()
        self._check_betas()
        for name, names in self.value_rules.items():
            if names and not any(self.base[name]):
                kind = type(optimizer).__name__
                log.warning("%s moves nothing: %s has no %s", RULE_OF[name], kind, name)

    def _check_betas(self) -> None:
        """A rule whose beta is held for the whole run would do nothing."""
        for value, rule in (("beta1", "relative"), ("beta2", "variance")):
            known = [beta for beta in self.base[value] if beta]
            if not self.value_rules[value] or not known:
                continue
            held = min(math.floor(math.log(TINY) / math.log(beta)) + 1 for beta in known)
            message = (
                f"betas_rule {rule} moves nothing in the first {held:,} steps: Adam's bias "
                f"correction takes {value} as constant while {value}^t is above {TINY:g}"
            )
            if self.steps and held >= self.steps:
                raise ValueError(f"{message}, and the run has {self.steps:,}")
            if not self.steps and held > 1000:
                log.warning(message)

    def _take_in(self) -> None:
        """What is new begins where it is: a group, or a rate that was 0 and has risen."""
        for i, group in enumerate(self.optimizer.param_groups):
            if i == len(self.written):
                for name in BOUNDS:
                    self.base[name].append(get(group, self.places[name]))
                for name, values in self.values.items():
                    values.append(self.base[name][-1])
                    self.found[name].append(self.base[name][-1])
                rate, (low, high) = self.base["lr"][-1], self.bounds["lr"]
                self.written.append(rate)
                if self.rules_of_rate() and rate is not None and not low <= rate <= high:
                    raise ValueError(f"the rate {rate:g} is outside its bounds, {low:g} … {high:g}")
            elif self.base["lr"][i] is None:
                self.base["lr"][i] = self.written[i] = get(group, "lr")

    def _take_over(self) -> None:
        """What somebody else has set, a scheduler of momentum: from there on it is the base."""
        for name in filter(self._moves, self.values):
            for i, group in enumerate(self.optimizer.param_groups):
                now = get(group, self.places[name])
                if now is None or now == self.found[name][i]:
                    continue
                if self.values[name][i] != self.base[name][i]:
                    self._warn_once(
                        f"something else sets the {name} too, so what rules make of it is lost"
                    )
                self.base[name][i] = self.values[name][i] = self.found[name][i] = now

    def _moves(self, name: str) -> bool:
        """Whether a rule may move this momentum, beta, alpha or weight decay."""
        return bool(self.value_rules[name] or (name == "momentum" and "trend" in self.reward_rules))

    def _warn_once(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            log.warning(text)

    def rules_of_rate(self) -> list[str]:
        return self.lr_rules + self.reward_rules

    @property
    def inert(self) -> bool:
        """Whether every rule is "none"."""
        return not (self.rules_of_rate() or any(self.value_rules.values()))

    @property
    def ratio(self) -> float:
        """What all rules together make of the base rate, before bounds."""
        return math.prod(self.ratios.values())

    def rate(self, base: float) -> float:
        """The effective rate of a group whose base rate is `base`; 0 stays 0."""
        ratio = self.ratio
        return clamp(base * ratio, self.bounds["lr"]) if base and self.rules_of_rate() else base

    @property
    def kl_target(self) -> float:
        """Nats a token for the next step: falls linearly where the length of the run is known.

        `confidence` is for who has evidence (trust_region.py): the share of it that is to be used.
        Never below `kl_floor`, which is for who measures KL with rounding errors.
        """
        left = 1.0 if not self.steps else max(self.steps - self.step, 1) / self.steps
        return max(self.kl_step_target * left * self.confidence, self.kl_floor)

    def observe(
        self,
        *,
        loss: float | None = None,
        reward: float | None = None,
        grad_norm: float | None = None,
        kl: float | None = None,
        alignment: float | None = None,
    ) -> dict[str, float]:
        """Lets the rules answer what was seen; NaN and infinity are ignored and counted.

        What is returned is what they answered: finite, and with `mean_over_processes` the mean.
        """
        self._take_over()
        given = {"loss": loss, "grad_norm": grad_norm, "reward": reward}
        given |= {"kl": kl, "alignment": alignment}
        numbers: dict[str, float] = {}
        for signal, value in given.items():
            if value is not None:
                if math.isfinite(value):
                    numbers[signal] = float(value)
                else:
                    self.ignored[signal] += 1
        numbers = self._mean_over_processes(numbers, list(given))
        for signal, x in numbers.items():
            if signal == "kl":
                self._steer(x)
            elif signal == "alignment":
                if self.learned:
                    self.learned.observe_alignment(x)
            else:
                self.seen[signal], reading = self.signals[signal].read(self.seen[signal], x)
                self._answer(signal, reading)
        self.write()
        return numbers

    def _steer(self, kl: float) -> None:
        if "kl_target" in self.lr_rules:
            old = self.ratios.get("kl_target", 1.0)
            new = rules.kl_target(old, kl, self.kl_target)
            self._set_ratio("kl_target", self._within(old, new), "kl", kl)
        if self.learned:
            self.learned.observe_kl(kl, self.kl_target)

    def scale(self, rule: str, factor: float, kl: float) -> None:
        """Says that the last update was scaled by `factor`, and scales the rate alike."""
        if factor != 1.0:
            old = self.ratios.get("kl_target", 1.0)
            self._set_ratio("kl_target", self._within(old, old * factor), "kl", kl, rule)
            self.write()

    def tick(self) -> None:
        """A step of the optimizer has passed: what depends on time alone."""
        self.step += 1
        if self.step == 20:
            self._warn_of_what_is_missing()
        for name in self.lr_rules:
            if name in rules.LR_CLOCKS:
                factor = rules.LR_CLOCKS[name](self.step, self.options)
                self._set_ratio(name, factor, "time", self.step)
        if self.learned:
            new = self.learned.ratio(self.ratios.get("learned", 1.0), self.step)
            self._set_ratio("learned", new, "time", self.step)
        self.write()

    def _warn_of_what_is_missing(self) -> None:
        told = "kl_target" in self.ratios or (self.learned and self.learned.last)
        if {"kl_target", "learned"} & {*self.lr_rules} and not told:
            log.warning("no KL was told to kl_target or learned in 20 steps: they move nothing")
        waiting: dict[str, list[str]] = {
            signal: [name for name in self.lr_rules if name in drives or name in factors]
            for signal, (drives, factors) in RATE_BY.items()
        }
        waiting["reward"] = self.reward_rules
        waiting["loss"] += [
            f"{v} {name}" for v, names in self.value_rules.items() for name in names
        ]
        for signal, names in waiting.items():
            if names and not self.seen[signal] and not self.ignored[signal]:
                log.warning(
                    "no %s was observed in 20 steps, so %s moves nothing: call %s in each step",
                    signal, " and ".join(names), CALLS[signal],
                )  # fmt: skip
        if self.rules_of_rate() and not any(float(g["lr"]) for g in self.optimizer.param_groups):
            log.warning("the learning rate is still 0 after 20 steps: rules scale it, and it stays")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The rate times `ratio` while the optimizer steps, where somebody else owns the rate."""
        if not self.rules_of_rate():
            yield
            return
        own = one_of_each_rate(self.optimizer.param_groups)
        undo = [scaled(group, self.ratio, self.bounds["lr"]) for group in own]
        try:
            yield
        finally:
            for restore in undo:
                restore()

    def _mean_over_processes(self, own: dict[str, float], names: list[str]) -> dict[str, float]:
        """So that the rules of every process see the same, whichever has seen what."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or not self.mean_over_processes:
            if distributed and not self.inert:
                self.ask_for_processes()
            return own
        table = [[own.get(name, 0.0) for name in names], [float(name in own) for name in names]]
        device = first_device(self.optimizer)
        total = torch.tensor(table, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        columns = zip(names, *total.tolist(), strict=True)
        return {name: value / count for name, value, count in columns if count}

    def ask_for_processes(self) -> None:
        """Warns, under torch.distributed, where `mean_over_processes` was not said."""
        if self.mean_over_processes is None and torch.distributed.get_world_size() > 1:
            self._warn_once(
                "several processes, whose rules must see the same signals, or their weights will "
                "differ: give mean_over_processes=True and make the same calls in each process, or "
                "give the same signals in each and mean_over_processes=False"
            )

    def _answer(self, signal: str, reading: Reading) -> None:
        if self.learned:
            self.learned.observe(signal, reading)
        drives, factors = RATE_BY[signal]
        for name in self.reward_rules if signal == "reward" else self.lr_rules:
            key = f"reward {name}" if signal == "reward" else name
            if name in drives:
                new = drives[name](self.ratios.get(key, 1.0), 1.0, reading, self.options)
                new = clamp(new ** (1 - 1 / self.memory), (1 / self.max_drift, self.max_drift))
                self._set_ratio(key, new, signal, reading.value)
            elif name in factors:
                factor = max(factors[name](reading, self.options), 0.0)
                self._set_ratio(key, factor, signal, reading.value)
        if signal == "loss":
            for value, names in self.value_rules.items():
                for name in names:
                    self._drive(value, name, FROM_LOSS[value][name], signal, reading)
        if signal == "reward" and "trend" in self.reward_rules:
            drive = rules.MOMENTUM_BY_REWARD["trend"]
            self._drive("momentum", "reward trend", drive, signal, reading)

    def _drive(
        self, what: str, rule: str, drive: rules.Drive, signal: str, reading: Reading
    ) -> None:
        """Moves a momentum, beta, alpha or weight decay of every group that has one."""
        for i, (old, base) in enumerate(zip(self.values[what], self.base[what], strict=True)):
            if old is None or base is None:
                continue
            new = drive(old, base, reading, self.options)
            if rule in ("relative", "trend", "reward trend"):
                new = base + (new - base) * (1 - 1 / self.memory)
            low, high = self.bounds[what]
            if what in ("beta1", "beta2"):
                if base**self.step >= TINY:
                    continue
                high = min(high, max(base, TINY ** (1 / self.step)))
            new = clamp(new, (low, high))
            if new != old:
                self.values[what][i] = new
                if i == 0:
                    self._note(what, rule, signal, reading.value, old, new)

    def _set_ratio(
        self, key: str, new: float, signal: str, seen: float, rule: str | None = None
    ) -> None:
        base = self._reference()
        old_rate, old = self.rate(base), self.ratios.get(key, 1.0)
        self.ratios[key] = new
        if new != old:
            self._note("lr", rule or key, signal, seen, old_rate, self.rate(base))

    def _within(self, old: float, new: float) -> float:
        """`new`, but no further than the bounds: a controller must not wind up behind them."""
        base = self._reference()
        rest = base * self.ratio / old
        return (
            clamp(new, (self.bounds["lr"][0] / rest, self.bounds["lr"][1] / rest)) if rest else old
        )

    def _reference(self) -> float:
        """The rate that ratios are told of and bounded by: the first that is not 0, as it is now.

        A tensor is not read, so the device is not waited for: as it was at first.
        """
        for group, base in zip(self.optimizer.param_groups, self.base["lr"], strict=False):
            free = not self.owns_lr and not isinstance(group["lr"], torch.Tensor)
            if rate := (group["lr"] if free else base):
                return float(rate)
        return 0.0

    def _note(self, what: str, rule: str, signal: str, seen: float, old: float, new: float) -> None:
        entry = {"step": self.step, "what": what, "rule": rule, "signal": signal, "seen": seen}
        self.audit.append(entry | {"old": old, "new": new})

    def write(self) -> None:
        """Writes what the rules came to into the parameter groups."""
        self._take_in()
        if self.owns_lr and self.rules_of_rate():
            self._write_rates()
        for name in filter(self._moves, self.values):
            for i, group in enumerate(self.optimizer.param_groups):
                value = self.values[name][i]
                if value is not None and value != self.found[name][i]:
                    place = self.places[name] or name
                    put(group, place, value)
                    self.found[name][i] = get(group, place)

    def _write_rates(self) -> None:
        """All are looked at before one is written: groups may share one tensor."""
        groups = self.optimizer.param_groups
        for i, (group, expected) in enumerate(zip(groups, self.written, strict=True)):
            found = float(group["lr"])
            if expected is not None and not math.isclose(found, expected, rel_tol=1e-6):
                raise RuntimeError(
                    f"the rate of group {i} was {expected:g} and is {found:g}: something else sets "
                    "it too. AdaptiveOptimizer works beside other schedulers; AdaptiveScheduler "
                    "does not"
                )
        for i, group in enumerate(groups):
            if base := self.base["lr"][i]:
                put(group, "lr", self.rate(base))
                self.written[i] = float(group["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        self._take_over()
        names = ("base", "values", "ratios", "seen", "ignored", "step")
        state = {name: copy.deepcopy(getattr(self, name)) for name in names}
        return state | ({"learned": self.learned.state_dict()} if self.learned else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`, of an optimizer with as many groups; else raises ValueError."""
        self._check(state)
        for name, value in copy.deepcopy(state).items():
            if name != "learned":
                setattr(self, name, value)
            elif self.learned:
                self.learned.load_state_dict(value)
        groups = self.optimizer.param_groups
        self.written = [float(group["lr"]) for group in groups]
        self.found = {name: [get(g, self.places[name]) for g in groups] for name in self.values}
        self.write()

    def _check(self, state: dict[str, Any]) -> None:
        if missing := {"base", "values", "ratios", "seen", "ignored", "step"} - state.keys():
            raise ValueError(f"this is no state of a controller: it has no {min(missing)}")
        now = len(self.optimizer.param_groups)
        for name in BOUNDS:
            for kept in ("base", "values"):
                was = len(state[kept].get(name, [])) if name in getattr(self, kept) else now
                if was != now:
                    raise ValueError(
                        f"the state is of {was} parameter groups, the optimizer has {now}"
                    )


def _names(rule: str, known: Any, argument: str) -> list[str]:
    names = [name.strip() for name in rule.split("+") if name.strip() != "none"]
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: {name!r} is not one of {', '.join(known)}, none")
    return names
