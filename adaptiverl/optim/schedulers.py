"""AdaptiveScheduler and RewardAdaptiveScheduler: the controller as a torch scheduler.

They own the rate of the optimizer that they are given, so that another scheduler beside them is
refused; AdaptiveOptimizer works beside any.
"""

from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adaptiverl.optim.constants import CONSTANTS
from adaptiverl.optim.controller import Controller
from adaptiverl.optim.hyperparams import Scalar, check_optimizer, gradient_norm, numbers
from adaptiverl.optim.rules import RULES, Value, documented, names, parse_rules

ALIASES = {
    "lr_min": "min_lr",
    "lr_max": "max_lr",
    "momentum_min": "min_momentum",
    "momentum_max": "max_momentum",
    "T0": "cycle_length",
    "T_mult": "cycle_mult",
    "ema_loss_beta": "loss_beta",
    "ema_reward_beta": "reward_beta",
}


BY_SIGNAL = ", ".join(rule.name for rule in RULES if rule.argument == "lr_rule" and rule.update)


@partial(
    documented,
    own={
        "lr_rule": f"lr_rule: {BY_SIGNAL}; default trend + variance + patience",
        "reward_rule": f'reward_rule: {", ".join(names("reward_rule"))}; default "trend" with '
        '`use_reward`, else "none"',
        "eta_min_scale": "eta_min_scale = 0.1: "
        f"{CONSTANTS['eta_min_scale'].meaning}; in {CONSTANTS['eta_min_scale'].range}",
    },
)
class AdaptiveScheduler(LRScheduler):
    """Moves the rate and momentum of `optimizer` by loss, reward, gradient norm and time.

    optimizer       any torch optimizer, whose rates and momentum it writes
    use_reward      whether the reward moves the rate; default False
    use_cosine      whether the rule cosine_restart is added; default False
    record          called with a dict for each change, as by Controller
    lr_min, lr_max, momentum_min, momentum_max, T0, T_mult, ema_loss_beta, ema_reward_beta
                    are other names of min_lr, max_lr, min_momentum, max_momentum, cycle_length,
                    cycle_mult, loss_beta and reward_beta

        scheduler.step_loss(loss, reward=None)      after optimizer.step()
        scheduler.observe(loss=None, R=None, model=None)        the same, by other names
        scheduler.set_metrics(loss, reward=None); scheduler.step()      in two calls

    Each is one step of time, but for a bare `step()` after signals and before the next step of the
    optimizer: trainers step the scheduler that they are given, also where it has observed already.
    `model` gives the gradient norm that the rule grad_norm reads.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        lr_rule: Value | None = None,
        reward_rule: Value | None = None,
        use_reward: bool = False,
        use_cosine: bool = False,
        eta_min_scale: float = 0.1,
        last_epoch: int = -1,
        **arguments: Any,
    ):
        check_optimizer(optimizer, "optimizer")
        for name, value in (("use_reward", use_reward), ("use_cosine", use_cosine)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r:.60}; it must be True or False")
        if last_epoch != -1:
            raise ValueError("last_epoch: continue with load_state_dict, which has all of the past")
        rules = parse_rules("lr_rule", "trend+variance+patience" if lr_rule is None else lr_rule)
        if use_cosine and "cosine_restart" not in [rule.name for rule, _ in rules]:
            rules += parse_rules("lr_rule", "cosine_restart")
        if use_reward and reward_rule == "none":
            raise ValueError('use_reward contradicts reward_rule "none"')
        if any("eta_min_scale" in rule.constants for rule, _ in rules) or eta_min_scale != 0.1:
            arguments["eta_min_scale"] = eta_min_scale
        for name in ALIASES.keys() & arguments.keys():
            if ALIASES[name] in arguments:
                raise TypeError(f"{name} and {ALIASES[name]} are two names of one: give it once")
        self.controller = Controller(
            optimizer,
            lr_rule=[{"name": rule.name} | own for rule, own in rules],
            reward_rule=reward_rule or ("trend" if use_reward else "none"),
            **{ALIASES.get(name, name): value for name, value in arguments.items()},
        )
        self._pending: dict[str, float] | None = None  # signals for the next step
        self._has_observed = False  # since the optimizer's last step
        optimizer.register_step_post_hook(self._after_optimizer)
        super().__init__(optimizer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copy and pickle, which leave hooks of the optimizer behind."""
        self.__dict__.update(state)
        self.optimizer.register_step_post_hook(self._after_optimizer)

    def _after_optimizer(self, *_: Any) -> None:
        self._has_observed = False

    def _initial_step(self) -> None:
        """torch would make a step here; there is nothing to react to yet."""
        self._step_count, self.last_epoch = 0, 0
        self._last_lr = self.get_lr()

    def step_loss(self, loss: Scalar, reward: Scalar = None) -> list[Any]:
        """Adapts to a loss, and a reward where there is one; the rates of all groups."""
        return self.observe(loss, reward)

    def observe(
        self, loss: Scalar = None, R: Scalar = None, model: nn.Module | None = None
    ) -> list[Any]:
        """As `step_loss`, all of it optional."""
        self._pending = numbers(loss=loss, reward=R)
        if model is not None and self.controller.reads("grad_norm"):
            self._pending["grad_norm"] = gradient_norm(model.parameters())
        return self.step()

    def set_metrics(self, loss: Scalar, reward: Scalar = None) -> None:
        """Keeps the signals for the next `step()`."""
        self._pending = numbers(loss=loss, reward=reward)

    def step(self, epoch: int | None = None) -> list[Any]:  # type: ignore[override]
        """One step of time, with the signals of `set_metrics` if there are any."""
        signals, self._pending = self._pending, None
        if signals is not None or not self._has_observed:
            self._has_observed = signals is not None
            self.last_epoch += 1
            self._step_count += 1
            self.controller.observe(**signals or {})
            self.controller.tick()
        self._last_lr = self.get_lr()
        return self._last_lr

    def get_lr(self) -> list[Any]:
        """The rate of each group that the optimizer's next step takes."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        own = self.controller
        return rates if own.owns_lr else [own.rate(rate) for rate in rates]

    def state_dict(self) -> dict[str, Any]:
        return {"controller": self.controller.state_dict(), "last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "controller" not in state_dict:
            raise ValueError("this is no state of an AdaptiveScheduler: it has no controller")
        self.controller.load_state_dict(state_dict["controller"])
        self.last_epoch = self._step_count = state_dict["last_epoch"]
        self._last_lr = self.get_lr()


@partial(
    documented,
    own={
        "lr_rule": "lr_rule: refused; AdaptiveScheduler takes it",
        "reward_rule": "reward_rule: refused; it is called rule here",
    },
)
class RewardAdaptiveScheduler(AdaptiveScheduler):
    """An AdaptiveScheduler whose rate follows the reward alone.

    optimizer       any torch optimizer, whose rates and momentum it writes
    rule            scaling, trend, variance, kelly or none, as for `reward_rule`; default "trend"

    The arguments of AdaptiveScheduler are its own, too, but for lr_rule and reward_rule.
    """

    def __init__(self, optimizer: Optimizer, rule: Value = "trend", **arguments: Any):
        if "reward_rule" in arguments:
            raise TypeError("RewardAdaptiveScheduler calls reward_rule rule")
        if "lr_rule" in arguments:
            raise TypeError(
                "RewardAdaptiveScheduler takes no lr_rule: its rate follows the reward alone. "
                "AdaptiveScheduler takes an lr_rule and a reward_rule"
            )
        super().__init__(optimizer, lr_rule="none", reward_rule=rule, **arguments)
