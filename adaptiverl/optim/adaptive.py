"""AdaptiveOptimizer: any optimizer, its hyperparameters moved by loss and reward.

A thin face of controller.py. It is a real torch optimizer, so LRScheduler, GradScaler, accelerate
and HF Trainer work with it; whoever schedules the rate goes on doing so, and the rules' ratio is
applied around each step.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from adaptiverl.optim.controller import Controller
from adaptiverl.optim.hyperparams import get, gradient_norm, number


class AdaptiveOptimizer(Optimizer):
    """`base`, whose rate is the scheduled one times what the rules make of it.

    `arguments` are Controller's and rules.Options': `momentum_rule`, `betas_rule`, `alpha_rule`,
    `wd_rule`, `reward_rule`, constants. Rules are names of docs/rules.md joined by "+"; "none"
    everywhere is `base` itself. Use it wherever `base` was used: after wrapping, `base` itself
    should not be stepped, scheduled or unscaled.
    """

    def __init__(self, base: Optimizer, lr_rule: str = "none", **arguments: Any):
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self._share()
        self.controller = Controller(base, lr_rule=lr_rule, owns_lr=False, **arguments)

    def _share(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle. As with torch's optimizers, hooks stay behind."""
        return super().__getstate__() | {"base": self.base, "controller": self.controller}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def step_loss(self, loss: float | Tensor) -> None:
        """Adapts to the loss; call it before `step`. A tensor is fetched from its device."""
        self.controller.observe(loss=number(loss))

    def step_reward(self, reward: float | Tensor) -> None:
        """Adapts to a reward, higher is better."""
        self.controller.observe(reward=number(reward))

    def step_kl(self, kl: float | Tensor) -> None:
        """Adapts to how far the last update moved a policy, nats a token: kl_target, learned."""
        self.controller.observe(kl=number(kl))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.controller.inert:
            return self.base.step(closure)
        if "grad_norm" in self.controller.lr_rules:
            own = (p for group in self.param_groups for p in group["params"])
            self.controller.observe(grad_norm=gradient_norm(own))
        with self.controller.applied():
            loss = self.base.step(closure)
        self.controller.tick()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict() | {"controller": self.controller.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The base's state, and the controller's if it was saved with it."""
        state = dict(state_dict)
        controller = state.pop("controller", None)
        self.base.load_state_dict(state)
        self._share()
        if controller is not None:
            self.controller.load_state_dict(controller)

    @property
    def lr(self) -> float:
        """The rate that the next step takes, of the first group; so are the others."""
        return self.controller.rate(float(self.param_groups[0]["lr"]))

    @property
    def wd(self) -> float | None:
        return self._get("weight_decay") or 0.0

    @property
    def momentum(self) -> float | None:
        """None for optimizers that have betas instead."""
        return self._get("momentum")

    @property
    def betas(self) -> tuple[float, float] | None:
        first, second = self._get("beta1"), self._get("beta2")
        return None if first is None or second is None else (first, second)

    def _get(self, name: str) -> float | None:
        return get(self.param_groups[0], self.controller.places[name])
