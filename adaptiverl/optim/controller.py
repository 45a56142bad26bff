"""Rules, signals and bounds → the next hyperparameters, with a record of each change.

Each rule of the rate keeps a ratio of its own, and the rate is the base rate times all of them.
Stateful rules mean-revert to 1 over `memory` steps and stay within `max_drift`: a signal that rises
is no evidence that a larger rate is better. Leaves out momentum, betas, alpha and weight decay,
which are values.py's.
"""

import copy
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import Optimizer

from adaptiverl.optim import hyperparams
from adaptiverl.optim.constants import BOUNDS, CONSTANTS, lr_bounds, whole
from adaptiverl.optim.hyperparams import Hyperparameters, Scalar, clamp, get, numbers
from adaptiverl.optim.rules import (
    ARGUMENTS,
    MEAN_REVERSION,
    Rule,
    check_constants,
    documented,
    parse_rules,
)
from adaptiverl.optim.signals import LARGEST, State, read
from adaptiverl.optim.values import Move, Values

log = logging.getLogger(__name__)
CALLS = {  # how a signal is given
    "loss": "step_loss(loss)",
    "reward": "step_reward(reward), or observe(R=reward)",
    "grad_norm": "observe(model=model)",
}
PATIENCE = 20  # steps without a signal after which a warning is due


@dataclass(frozen=True)
class _Active:
    """A rule that was chosen, with its constants."""

    rule: Rule
    constants: SimpleNamespace
    reader: str  # rules with the same one share the state of their signal

    def update(self, old: float, base: float, reading: Any) -> float:
        assert self.rule.update is not None
        return self.rule.update(old, base, reading, self.constants)


@documented
class Controller:
    """Moves the hyperparameters of `optimizer` by the signals that it observes.

    optimizer any torch optimizer
    owns_lr   whether it writes the rates. False where another scheduler may write them: then
              `ratio` is to be applied around each step, by `applied()`. Default True
    record    called with a dict for each change, of the first group that has the hyperparameter:
              step, hyperparameter, rule, signal, value (of the signal), old, new

    Raises ValueError for an unknown rule, a rate out of its bounds, and a constant that is out of
    its range or that no rule reads.
    """

    def __init__(
        self,
        optimizer: Optimizer | Hyperparameters,
        *,
        owns_lr: bool = True,
        record: Callable[[dict[str, Any]], None] | None = None,
        **arguments: Any,
    ):
        chosen = [
            pair for name in ARGUMENTS for pair in parse_rules(name, arguments.get(name, "none"))
        ]
        given = {name: value for name, value in arguments.items() if name not in ARGUMENTS}
        for warning in check_constants(given, [rule for rule, _ in chosen]):
            log.warning(warning)
        constants = {name: constant.default for name, constant in CONSTANTS.items()} | whole(given)
        self.optimizer, self.owns_lr, self.record = optimizer, owns_lr, record
        self.rules: list[_Active] = []
        for rule, own in chosen:
            if rule.update:
                reader = f"{rule.reads} of {rule.label}" if own else rule.reads
                self.rules.append(_Active(rule, SimpleNamespace(**constants | whole(own)), reader))
            elif owns_lr:
                raise ValueError(
                    f"{rule.argument} {rule.name} needs a KL, which AdaptiveOptimizer measures"
                )
        c = SimpleNamespace(**constants)
        self.memory, self.steps = c.memory, c.steps
        is_bounded = c.min_lr is not None or c.max_lr is not None
        self.max_drift = c.max_drift or (math.inf if is_bounded else 3.0)
        self.bounds = BOUNDS | {
            "lr": lr_bounds(c.min_lr, c.max_lr), "momentum": (c.min_momentum, c.max_momentum)
        }  # fmt: skip
        self.moves = {active.rule.moves for active in self.rules}
        self.values = Values(optimizer, self.moves - {"lr"}, self.bounds, c.memory)
        self.base: list[float | None] = []  # rates of the groups, before any rule
        self.ratios: dict[str, float] = {}  # rule → its own factor on the rate
        self.seen: dict[str, State] = {}  # reader → the state of its signal
        self.ignored = dict.fromkeys(CALLS, 0)
        self.step = 0
        self._adopt()
        self.values.check([active.rule for active in self.rules], c.steps)

    def _check_rates(self) -> None:
        """Raises RuntimeError if something else has set a rate that this controller writes."""
        if not self.owns_lr or "lr" not in self.moves:
            return
        for i, base in enumerate(self.base):
            expected, found = self.rate(base or 0.0), float(self.optimizer.param_groups[i]["lr"])
            if expected and not math.isclose(found, expected, rel_tol=1e-6):
                raise RuntimeError(
                    f"the rate of group {i} was {expected:g} and is {found:g}: something else "
                    "sets it too. AdaptiveOptimizer works beside other schedulers; "
                    "AdaptiveScheduler does not"
                )

    def _adopt(self) -> None:
        """Takes as base what is new: a group, a rate that has risen from 0, a value that something
        else has set."""
        groups = self.optimizer.param_groups
        for group in groups[len(self.base) :]:
            self.base.append(None)
            if "lr" in self.moves:
                hyperparams.check_rate(float(group["lr"]), self.bounds["lr"])
        self.base = [
            get(group, "lr") if base is None else base
            for group, base in zip(groups, self.base, strict=True)
        ]
        self.values.adopt()

    @property
    def inert(self) -> bool:
        """Whether every rule is "none"."""
        return not self.rules

    @property
    def ratio(self) -> float:
        """What all rules together make of the base rate, before bounds."""
        return math.prod(self.ratios.values())

    def reads(self, signal: str) -> bool:
        return any(active.rule.reads == signal for active in self.rules)

    def rate(self, base: float) -> float:
        """The effective rate of a group whose base rate is `base`; 0 stays 0."""
        moved = base and "lr" in self.moves
        return clamp(base * self.ratio, self.bounds["lr"]) if moved else base

    def applied(self) -> AbstractContextManager[None]:
        """The rates times `ratio` while the optimizer steps, where something else owns the rate."""
        if "lr" not in self.moves:
            return nullcontext()
        return hyperparams.scaled_rates(self.optimizer, self.ratio, self.bounds["lr"])

    def observe(
        self, *, loss: Scalar = None, reward: Scalar = None, grad_norm: Scalar = None
    ) -> None:
        """Lets the rules respond to signals; NaN and what is beyond LARGEST are only counted."""
        given = numbers(loss=loss, grad_norm=grad_norm, reward=reward)
        for signal, x in given.items():
            self.ignored[signal] += not abs(x) <= LARGEST
        self._respond({signal: x for signal, x in given.items() if abs(x) <= LARGEST})

    def tick(self) -> None:
        """One step of the optimizer has passed: schedules move."""
        self.step += 1
        if self.step == PATIENCE:
            self._warn_of_missing_signals()
        self._respond({"time": self.step})

    def _respond(self, signals: dict[str, float]) -> None:
        self._check_rates()
        self._adopt()
        for signal, x in signals.items():
            readings: dict[str, Any] = {}
            for active in [active for active in self.rules if active.rule.reads == signal]:
                reader, c = active.reader, active.constants
                if signal == "time":
                    readings[reader] = x
                elif reader not in readings:
                    beta = vars(c).get(f"{signal}_beta", 0.9)
                    self.seen[reader], readings[reader] = read(
                        self.seen.get(reader, {}), x, beta, c
                    )
                self._move(active, x, readings[reader])
        self.write()

    def _warn_of_missing_signals(self) -> None:
        for signal, call in CALLS.items():
            waiting = [active for active in self.rules if active.rule.reads == signal]
            if waiting and waiting[0].reader not in self.seen and not self.ignored[signal]:
                own = isinstance(self.optimizer, Optimizer)  # else of another library
                call = f"call {call}" if own else f"give it a {signal}"
                names = dict.fromkeys(f"{a.rule.argument} {a.rule.name}" for a in waiting)
                log.warning(
                    "no %s was observed in %d steps, so %s %s nothing: %s in each step",
                    signal, PATIENCE, ", ".join(names), "move" if len(names) > 1 else "moves", call,
                )  # fmt: skip
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        if "lr" in self.moves and not any(rates):
            log.warning("the learning rate is still 0 after 20 steps: rules scale it, and it stays")

    def _move(self, active: _Active, x: float, reading: Any) -> None:
        """Moves what the rule moves, and records it; `x` is the value of its signal."""
        rule = active.rule
        if rule.moves == "lr":
            move: Move | None = self._move_rate(active, reading)
        else:
            move = self.values.move(rule, partial(active.update, reading=reading), self.step)
        if self.record and move and move.new != move.old:
            label = rule.label if move.acted else MEAN_REVERSION
            entry = {"step": self.step, "hyperparameter": rule.moves, "rule": label}
            self.record(
                entry | {"signal": rule.reads, "value": x, "old": move.old, "new": move.new}
            )

    def _move_rate(self, active: _Active, reading: Any) -> Move:
        rule, old = active.rule, self.ratios.get(active.rule.label, 1.0)
        base = self._reference()
        new = asked = active.update(old, 1.0, reading)
        if rule.kind == "stateful":
            new = clamp(asked ** (1 - 1 / self.memory), (1 / self.max_drift, self.max_drift))
            new = self._within_bounds(old, new, base * self._kept_ratio(but=rule.label))
        before, self.ratios[rule.label] = self.rate(base), max(new, 0.0)
        return Move(before, self.rate(base), asked != old)

    def _kept_ratio(self, but: str) -> float:
        """What the other stateful rules make of the base rate."""
        kept = {active.rule.label for active in self.rules if active.rule.kind == "stateful"}
        return math.prod(ratio for label, ratio in self.ratios.items() if label in kept - {but})

    def _within_bounds(self, old: float, new: float, rate: float) -> float:
        """`new`, but no further than where the bounds of the rate are, or it would wind up there.

        Beyond them already, as after a scheduler's move, it stays: bounds move no ratio.
        """
        if not rate:
            return new
        low, high = (bound / rate for bound in self.bounds["lr"])
        return min(new, max(old, high)) if new > old else max(new, min(old, low))

    def _reference(self) -> float:
        """The rate that records are about: the first that is not 0, as it is now.

        A tensor is not read, so the device is not waited for: as it was at first.
        """
        for group, base in zip(self.optimizer.param_groups, self.base, strict=False):
            free = not self.owns_lr and not isinstance(group["lr"], torch.Tensor)
            if rate := (group["lr"] if free else base):
                return float(rate)
        return 0.0

    def write(self) -> None:
        """Writes what the rules came to into the parameter groups."""
        if self.owns_lr and "lr" in self.moves:
            for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
                if base:
                    hyperparams.put(group, "lr", self.rate(base))
        self.values.write()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        self._adopt()
        kept = {
            "base": self.values.base | {"lr": self.base},
            "values": self.values.values,
            "parts": self.values.parts,
        } | {name: getattr(self, name) for name in _KEPT}
        return copy.deepcopy(kept)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`, of an optimizer with as many groups; else raises ValueError.

        What other rules than its own had made of the rate is left out.
        """
        state = {"parts": {}} | state  # earlier versions kept none
        if missing := [name for name in ("base", "values", *_KEPT) if name not in state]:
            raise ValueError(f"this is no state of a controller: it has no {missing[0]}")
        was, own = len(state["base"].get("lr", [])), len(self.optimizer.param_groups)
        if was != own:
            raise ValueError(f"the state is of {was} parameter groups, the optimizer has {own}")
        for name in _KEPT:
            setattr(self, name, copy.deepcopy(state[name]))
        self.base = [*state["base"]["lr"]]
        self.values.take(state, [active.rule for active in self.rules])
        # What other rules had made of the rate would stay for ever: nothing moves it any more
        labels = {active.rule.label for active in self.rules if active.rule.moves == "lr"}
        for label, ratio in self.ratios.items():
            if label not in labels:
                log.warning(
                    "the state is also of the rule %s, which is not chosen here: the factor %.3g "
                    "that it had made of the rate is left out", label, ratio,
                )  # fmt: skip
        self.ratios = {label: ratio for label, ratio in self.ratios.items() if label in labels}
        readers = {active.reader for active in self.rules}
        self.seen = {reader: seen for reader, seen in self.seen.items() if reader in readers}
        self.write()


_KEPT = ("ratios", "seen", "ignored", "step")
