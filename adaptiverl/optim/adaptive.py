"""AdaptiveOptimizer: any optimizer, with hyperparameters that respond to loss, reward and KL.

It is a real torch optimizer, so LRScheduler, GradScaler, accelerate and HF Trainer work with it.
Whoever schedules the rate goes on doing so: what the rules make of it is applied around each step.
"""

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adaptiverl.optim.controller import Controller
from adaptiverl.optim.hyperparams import (
    Scalar,
    check_optimizer,
    clamp,
    get,
    gradient_norm,
    needs_closure,
    numbers,
    scaled_rates,
)
from adaptiverl.optim.online import Online
from adaptiverl.optim.online.learned import LearnedRate
from adaptiverl.optim.rules import Value, documented, parse_rules
from adaptiverl.optim.trust_region import (
    Record,
    TrustRegion,
    UpdateInfo,
    default_kl,
    falling,
    measured,
)
from adaptiverl.optim.update import alignment, copyable, has_gradient

log = logging.getLogger(__name__)
CHOOSE = 'Choose a reward_rule, such as "trend"'


class _Wrapper(Optimizer):
    """Stands for `base`, with which it shares the groups and the state."""

    def __init__(self, base: Optimizer):
        check_optimizer(base, "base")
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base, which may refuse it."""
        if "base" not in vars(self):  # torch's constructor adds the base's groups too
            super().add_param_group(param_group)
            return
        self.base.add_param_group(param_group)
        self._share()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)


@documented
class AdaptiveOptimizer(_Wrapper):
    """`base`, whose rate is the scheduled one times what the rules make of it.

        optimizer = AdaptiveOptimizer(AdamW(model.parameters(), lr=1e-4), lr_rule="trust_region")
        optimizer.step(measure_kl=measure_kl)

    base            the optimizer; after wrapping it must not be stepped, scheduled or unscaled
    measure_kl      gives the KL from the policy before the last step to the policy now, in nats per
                    token and the same in every process; also an argument of `step`, and an
                    attribute. trust_region needs it, learned and the Online optimizers use it
    min_kl          lowest target; set it where rounding disturbs the KL; default 0. This and the
                    next are refused where nothing uses a KL
    trust_region_schedule       "linear": the target falls over `steps`, where these are given;
                    "constant": it stays. Default "linear"
    record          called with a dict for each change: step, hyperparameter, rule, signal, value
                    (of the signal), old, new

    "none" everywhere is `base` itself.
    """

    def __init__(
        self,
        base: Optimizer,
        lr_rule: Value = "none",
        *,
        measure_kl: Callable[[], float] | None = None,
        min_kl: float = 0.0,
        trust_region_schedule: str = "linear",
        record: Record | None = None,
        **arguments: Any,
    ):
        if trust_region_schedule not in ("linear", "constant"):
            raise ValueError(
                f'trust_region_schedule is {trust_region_schedule!r}; it is "linear" or "constant"'
            )
        if isinstance(base, AdaptiveOptimizer):
            raise TypeError("base is an AdaptiveOptimizer already: give the rules of both to one")
        _check_min_kl(min_kl)
        for name, value in (("measure_kl", measure_kl), ("record", record)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} is {value!r:.60}; it must be a function, or None")
        super().__init__(base)
        self.measure_kl, self.min_kl, self.record = measure_kl, min_kl, record
        self.informative = True  # whether any rewards of the step differ; see TrustRegion.step
        self.online = base if isinstance(base, Online) else None
        by_kl = {rule.name: own for rule, own in parse_rules("lr_rule", lr_rule) if not rule.update}
        self._uses_kl = bool(by_kl) or self.online is not None
        given = {"min_kl": min_kl, "trust_region_schedule": trust_region_schedule != "linear"}
        self._refuse_without_kl(given)
        self.controller = Controller(
            base, lr_rule=lr_rule, owns_lr=False, record=self._record_of_controller, **arguments
        )
        self.steps, self._bounds = self.controller.steps, self.controller.bounds["lr"]
        given_kl = [own["trust_region_kl"] for own in by_kl.values() if own]
        kl: float | None = next(iter(given_kl), arguments.get("trust_region_kl"))
        self.kl = default_kl(self.steps) if kl is None else kl
        self.falls_over = self.steps if trust_region_schedule == "linear" else None
        self.trust_region = self.learned = None
        # What adapts, by name: the objects whose state_dict belongs to a checkpoint
        self.parts: dict[str, Any] = {"controller": self.controller}
        if "trust_region" in by_kl:
            self.parts["trust_region"] = self.trust_region = TrustRegion(
                base, kl=self.kl, steps=self.falls_over, min_lr=self._bounds[0],
                max_lr=self._bounds[1], record=self._record,
            )  # fmt: skip
        if "learned" in by_kl:
            betas = {k: v for k, v in arguments.items() if k in ("loss_beta", "reward_beta")}
            self.parts["learned"] = self.learned = LearnedRate(**betas)
        self.info: UpdateInfo | None = None  # of the last step, where its KL was measured
        self._has_grad_norm = False  # of the step to come
        self._warned = False  # of rewards that nothing reads

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle. As with torch's optimizers, hooks stay behind; so do callbacks."""
        return copyable(self) | {"measure_kl": None, "record": None}

    def step_loss(self, loss: Scalar) -> None:
        """Adapts to the loss; call it once before each `step`. A tensor is fetched from its device.

        With gradient accumulation give the mean over all pieces: each call counts as a step.
        """
        self.observe(loss=loss)

    def step_reward(self, reward: Scalar) -> None:
        """Adapts to a reward, higher is better; call it once before each `step`.

        With gradient accumulation give the mean over all pieces: each call counts as a step.
        """
        if not self.reads_reward and not self.controller.inert and not self._warned:
            self._warned = True
            log.warning("step_reward: no rule reads rewards, so this one moves nothing. %s", CHOOSE)
        self.observe(reward=reward)

    @property
    def reads_reward(self) -> bool:
        """Whether a reward moves anything."""
        return self.controller.reads("reward") or bool(self.learned or self.online)

    def observe(
        self, *, loss: Scalar = None, reward: Scalar = None, grad_norm: Scalar = None
    ) -> None:
        """Adapts to the signals of a step; call it before `step`. The rule grad_norm computes the
        norm itself where it is not given."""
        signals = numbers(loss=loss, reward=reward, grad_norm=grad_norm)
        self._has_grad_norm |= "grad_norm" in signals
        self.controller.observe(**signals)
        if self.learned:
            self.learned.observe(**signals)
        if self.online:
            self.online.observe(loss=signals.get("loss"), reward=signals.get("reward"))

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        measure_kl: Callable[[], float] | None = None,
        min_kl: float | None = None,
        informative: bool | None = None,
    ) -> Any:
        """One step of `base`; what `closure` returns. Arguments replace the attributes of their
        names; `informative` is TrustRegion.step's. Raises ValueError where trust_region is given no
        KL, and where none of its rules uses the one that is given."""
        _check_min_kl(min_kl or 0.0)
        is_bare = self.controller.inert and not self._uses_kl
        if not is_bare:  # the same loop may run with "none"
            self._refuse_without_kl({"measure_kl": measure_kl is not None, "min_kl": min_kl})
        if is_bare or (closure is None and self._is_phantom()):
            return self.base.step(closure)
        measure, floor = measure_kl or self.measure_kl, self.min_kl if min_kl is None else min_kl
        if self.trust_region and measure is None:
            raise ValueError(
                "lr_rule trust_region measures how far each update moves the policy: give "
                "step(measure_kl=f), or set optimizer.measure_kl = f, where f() is the KL from the "
                "policy before the step to the policy now, in nats per token"
            )
        needs_norm = self.controller.reads("grad_norm") and not self._has_grad_norm
        loss: Any = None
        if closure is not None and (self.trust_region or self.learned or needs_norm):
            with torch.enable_grad():  # these look at the gradients before the step
                loss = closure()
            if not needs_closure(self.base):
                closure = None
        if needs_norm:
            own = (p for group in self.param_groups for p in group["params"])
            self.controller.observe(grad_norm=gradient_norm(own))
        self._has_grad_norm, self.info = False, None
        cosine = alignment(self.base) if self.learned else None
        with ExitStack() as rates:
            rates.enter_context(self.controller.applied())
            if self.learned:
                rates.enter_context(scaled_rates(self.base, self.learned.ratio, self._bounds))
            if self.trust_region and measure:
                known = self.informative if informative is None else informative
                self.info = self.trust_region.step(measure, min_kl=floor, informative=known)
            elif closure is not None:
                loss = self.base.step(closure)
            else:
                self.base.step()
            if measure and not self.trust_region and (self.learned or self.online):
                target = max(falling(self.kl, self.controller.step, self.falls_over), floor)
                rate = float(self.param_groups[0]["lr"])
                self.info = UpdateInfo(rate, measured(measure), target)
        kl, target = (self.info.kl, self.info.target) if self.info else (None, 0.0)
        if self.learned and kl is not None:
            self.learned.observe_update(kl, target, cosine)
        if self.online:
            done = (self.controller.step + 1) / self.steps if self.steps else None
            self.online.observe(kl=kl, trust_region_kl=target, done=done)
        self.tick()
        return loss

    def _is_phantom(self) -> bool:
        """Whether no rate is above 0 and no gradient is: torch.distributed.checkpoint makes such a
        step, to have a state to read, and no time passes in it."""
        rates = [group["lr"] for group in self.param_groups]
        if any(rate.device.type != "cpu" if isinstance(rate, Tensor) else rate for rate in rates):
            return False  # a rate on a device is not waited for
        return not any(map(float, rates)) and not has_gradient(self.base)

    def _refuse_without_kl(self, given: dict[str, Any]) -> None:
        """Raises ValueError for what of `given` nothing would read."""
        for name in [name for name, value in given.items() if value and not self._uses_kl]:
            raise ValueError(
                f"{name} is given, and nothing uses a KL: choose lr_rule trust_region or learned, "
                "or an Online optimizer"
            )

    def tick(self) -> None:
        """One step of time; `step` calls it. Call it for a step that was left out."""
        self.controller.tick()
        if self.trust_region:
            self.trust_region.time = self.controller.step
        if self.learned:
            old, ratio = self.lr, self.learned.ratio
            self.learned.tick()
            if self.learned.ratio != ratio and self.info:  # it answers to a KL, and to no other
                time = self.learned.time
                entry = {"step": time, "hyperparameter": "lr", "rule": "learned", "signal": "kl"}
                self._record(entry | {"value": self.info.kl, "old": old, "new": self.lr})

    def state_dict(self) -> dict[str, Any]:
        """The base's, and those of `parts`."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self.base.state_dict() | {k: part.state_dict() for k, part in self.parts.items()}
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The base's state, and those of `parts` that were saved with it."""
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state = before(self, state) or state
        if "param_groups" not in state:
            raise ValueError("this is no state of an optimizer: it has no param_groups")
        saved = {name: state.pop(name, None) for name in ("controller", "trust_region", "learned")}
        self.base.load_state_dict(state)
        self._share()
        for name, own in saved.items():
            if own is not None and name in self.parts:
                self.parts[name].load_state_dict(own)
            elif own is not None:
                log.warning(
                    "the state is of lr_rule %s, which is not chosen here: what it had found is "
                    "left out", name,
                )  # fmt: skip
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @property
    def lr(self) -> float:
        """The rate that the next step starts from, of the first group."""
        return self._rate(self.controller.rate(float(self.param_groups[0]["lr"])))

    @property
    def wd(self) -> float:
        return self._get("weight_decay") or 0.0

    @property
    def momentum(self) -> float | None:
        """Of the first group that has one; None where the optimizer has none, or one of 0."""
        return self._get("momentum")

    @property
    def betas(self) -> tuple[float, float] | None:
        first, second = self._get("beta1"), self._get("beta2")
        return None if first is None or second is None else (first, second)

    def _get(self, name: str) -> float | None:
        place = self.controller.values.places[name]
        found = (get(group, place) for group in self.param_groups)
        return next((value for value in found if value is not None), None)

    def _rate(self, rate: float) -> float:
        """What the parts beside the controller make of its rate."""
        for part in (self.learned, self.trust_region):
            if part and rate:
                rate = clamp(rate * part.ratio, self._bounds)
        return rate

    def _record(self, entry: dict[str, Any]) -> None:
        if self.record:
            self.record(entry)

    def _record_of_controller(self, entry: dict[str, Any]) -> None:
        if entry["hyperparameter"] == "lr":
            entry |= {name: self._rate(entry[name]) for name in ("old", "new")}
        self._record(entry)


def _check_min_kl(min_kl: float) -> None:
    if not 0 <= min_kl < math.inf:
        raise ValueError(f"min_kl is {min_kl}; it must be in [0, inf): nats per token")
