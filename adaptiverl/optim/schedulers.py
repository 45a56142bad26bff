"""AdaptiveScheduler and RewardAdaptiveScheduler: the controller as a torch scheduler.

Thin faces: they rename arguments of the seeds and own the rate of the optimizer they are given.
Another scheduler beside them is refused; adaptive.py's wrapper works beside any.
"""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adaptiverl.optim.controller import Controller
from adaptiverl.optim.hyperparams import gradient_norm, number
from adaptiverl.optim.rules import LR_CLOCKS

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


class AdaptiveScheduler(LRScheduler):
    """Moves the rate and momentum of `optimizer` by loss, reward, gradient norm and time.

    `lr_rule` None is trend, variance and patience; `use_cosine` adds cosine restarts.
    `reward_rule` None is "trend" with `use_reward`, else "none". All other arguments are those of
    Controller and Options, under their names or the seeds' (ALIASES).

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
        lr_rule: str | None = None,
        momentum_rule: str = "none",
        reward_rule: str | None = None,
        use_reward: bool = False,
        use_cosine: bool = False,
        eta_min_scale: float = 0.1,
        last_epoch: int = -1,
        **arguments: Any,
    ):
        if last_epoch != -1:
            raise ValueError("last_epoch: continue with load_state_dict, which has all of the past")
        rules = ["trend", "variance", "patience"] if lr_rule is None else lr_rule.split("+")
        if use_cosine and "cosine_restart" not in rules:
            rules.append("cosine_restart")
        if use_reward and reward_rule == "none":
            raise ValueError('use_reward contradicts reward_rule "none"')
        if {*rules} & {*LR_CLOCKS} or eta_min_scale != 0.1:
            arguments["eta_min_scale"] = eta_min_scale
        self.controller = Controller(
            optimizer,
            lr_rule="+".join(rules),
            momentum_rule=momentum_rule,
            reward_rule=reward_rule or ("trend" if use_reward else "none"),
            **{ALIASES.get(name, name): value for name, value in arguments.items()},
        )
        self._pending: dict[str, float | None] = {}
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

    def step_loss(self, loss: float | Tensor, reward: float | Tensor | None = None) -> list[Any]:
        """Adapts to a loss, and a reward where there is one; the rates of all groups."""
        self.set_metrics(loss, reward)
        return self.step()

    def observe(
        self,
        loss: float | Tensor | None = None,
        R: float | Tensor | None = None,
        model: nn.Module | None = None,
    ) -> list[Any]:
        """As `step_loss`, all of it optional."""
        self.set_metrics(loss, R)
        if model is not None and "grad_norm" in self.controller.lr_rules:
            self._pending["grad_norm"] = gradient_norm(model.parameters())
        return self.step()

    def set_metrics(
        self, loss: float | Tensor | None, reward: float | Tensor | None = None
    ) -> None:
        """Keeps the signals for the next `step()`."""
        given = {"loss": loss, "reward": reward}
        self._pending = {k: None if v is None else number(v) for k, v in given.items()}

    def step(self, epoch: int | None = None) -> list[Any]:  # type: ignore[override]
        """One step of time, with the signals of `set_metrics` if there are any."""
        signals, self._pending = self._pending, {}
        if signals or not self._has_observed:
            self._has_observed = bool(signals)
            self.last_epoch += 1
            self._step_count += 1
            self.controller.observe(**signals)
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
        self.controller.load_state_dict(state_dict["controller"])
        self.last_epoch = self._step_count = state_dict["last_epoch"]
        self._last_lr = self.get_lr()


class RewardAdaptiveScheduler(AdaptiveScheduler):
    """The rate follows the reward alone: `rule` is scaling, trend, variance, kelly or none."""

    def __init__(self, optimizer: Optimizer, rule: str = "trend", **arguments: Any):
        super().__init__(optimizer, lr_rule="none", reward_rule=rule, **arguments)
