"""Momentum, betas, alpha and weight decay: what rules make of them, by group.

The base of a value is what it was before any rule. Each rule has a part of its own, and the value
is the base plus what each part differs from it, so that rules can be joined in any order. Leaves
out the rate, which controller.py moves by ratios.
"""

import copy
import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch.optim import Optimizer

from adaptiverl.optim import hyperparams
from adaptiverl.optim.constants import BOUNDS
from adaptiverl.optim.hyperparams import Hyperparameters, clamp, get
from adaptiverl.optim.rules import Rule

log = logging.getLogger(__name__)
LEAST_MOMENTUM = 1e-15  # at 0 RMSprop makes no buffer, and misses it when the momentum rises
TINY = 0.01  # Adam's bias correction takes beta as constant while beta^t is above this
ByGroup = list[float | None]  # None: the group has no such thing


class Move(NamedTuple):
    """What a rule did to the first group that has the value."""

    old: float
    new: float
    acted: bool  # else its part only went back towards the base


class Values:
    """Those of `optimizer` that are named in `moved`, inside their `bounds`.

    memory  steps in which the part of a stateful rule returns to the base
    """

    def __init__(
        self,
        optimizer: Optimizer | Hyperparameters,
        moved: Collection[str],
        bounds: Mapping[str, tuple[float, float]],
        memory: float,
    ):
        self.optimizer, self.moved, self.bounds, self.memory = optimizer, moved, bounds, memory
        self.places = hyperparams.places(optimizer)
        self.base: dict[str, ByGroup] = {name: [] for name in BOUNDS if name != "lr"}
        self.values: dict[str, ByGroup] = {name: [] for name in self.base}
        self.parts: dict[str, dict[str, ByGroup]] = {}  # by name and rule
        self.warned: set[str] = set()

    def check(self, rules: Collection[Rule], steps: int | None) -> None:
        """Warns of a rule that moves nothing; ValueError where a beta is held for the whole run."""
        for rule in (rule for rule in rules if rule.moves != "lr"):
            known = [value for value in self.base[rule.moves] if value]
            if not known and rule.argument != "reward_rule":
                if self.places[rule.moves] in self.optimizer.param_groups[0]:
                    why = f"the {rule.moves.replace('_', ' ')} is 0"
                else:
                    own = isinstance(self.optimizer, Optimizer)  # else of another library
                    name = type(self.optimizer).__name__ if own else "the optimizer"
                    why = f"{name} has no {rule.moves}"
                log.warning("%s moves nothing: %s", rule.argument, why)
            if not known or not rule.moves.startswith("beta"):
                continue
            held = min(math.floor(math.log(TINY) / math.log(beta)) + 1 for beta in known)
            message = (
                f"betas_rule {rule.name} moves nothing in the first {held:,} steps: Adam's bias "
                f"correction takes {rule.moves} as constant while {rule.moves}^t is above {TINY:g}"
            )
            if steps and held >= steps:
                raise ValueError(f"{message}, and the run has {steps:,}")
            if not steps and held > 1000:
                log.warning(message)

    def adopt(self) -> None:
        """Takes as base what is new: a group, or a value that something else has set."""
        groups = self.optimizer.param_groups
        for name, base in self.base.items():
            news = [get(group, self.places[name]) for group in groups[len(base) :]]
            for each in (base, self.values[name], *self.parts.get(name, {}).values()):
                each += news
        for name in self.moved:
            for i, group in enumerate(groups):
                self._adopt_value(name, i, get(group, self.places[name]))

    def _adopt_value(self, name: str, i: int, now: float | None) -> None:
        """Where something like a scheduler of momentum has written it."""
        value = self.values[name][i]
        if now is None or (value is not None and math.isclose(now, value, rel_tol=1e-6)):
            return
        if value != self.base[name][i] and name not in self.warned:
            self.warned.add(name)
            log.warning("something else sets the %s too, so what rules make of it is lost", name)
        for each in (self.base[name], self.values[name], *self.parts.get(name, {}).values()):
            each[i] = now

    def move(self, rule: Rule, update: Callable[[float, float], float], step: int) -> Move | None:
        """Moves what `rule` moves in every group, by `update(old, base)`; None where there is none.

        `step` counts the optimizer's steps so far: a beta is held until beta^step is negligible.
        """
        name, result = rule.moves, None
        parts = self.parts.setdefault(name, {})
        own = parts.setdefault(rule.label, list(self.base[name]))
        for i, (before, base) in enumerate(zip(self.values[name], self.base[name], strict=True)):
            old = own[i]
            if before is None or base is None or old is None:
                continue
            new = asked = update(old, base)
            if rule.kind == "stateful":
                new = base + (asked - base) * (1 - 1 / self.memory)
            low, high = self.bounds[name]
            if name == "momentum":
                low = max(low, LEAST_MOMENTUM)
            if name.startswith("beta"):
                if base**step >= TINY:
                    continue
                high = min(high, max(base, TINY ** (1 / step)))
            own[i] = new = clamp(new, (low, high))
            others = [part[i] for part in parts.values() if part is not own]
            more = sum(part - base for part in others if part is not None)
            self.values[name][i] = value = clamp(new + more, (low, high))
            result = result or Move(before, value, asked != old)
        return result

    def write(self) -> None:
        """Writes the values into the parameter groups."""
        for i, group in enumerate(self.optimizer.param_groups):
            for name in self.moved:
                if (value := self.values[name][i]) is not None:
                    hyperparams.put(group, self.places[name] or name, value)

    def take(self, state: Mapping[str, Any], rules: Collection[Rule]) -> None:
        """Continues from `state`, of as many groups, but for what other rules had made there."""
        self.base = {name: [*state["base"][name]] for name in self.base}
        self.values = {name: [*state["values"][name]] for name in self.values}
        labels = {(rule.moves, rule.label) for rule in rules}
        self.parts = {
            name: {rule: copy.copy(part) for rule, part in parts.items() if (name, rule) in labels}
            for name, parts in state["parts"].items()
        }
