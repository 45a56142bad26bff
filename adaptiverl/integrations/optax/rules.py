"""The rules of adaptiverl.optim as an optax transformation, around one with injected numbers.

The rules themselves run on the host, by jax.pure_callback: they are the very functions that move
torch's optimizers. So that a jitted function has a state of one shape, what a rule remembers is
kept as text in an array of bytes; it survives any checkpoint to the bit.
"""

import json
from threading import Lock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptiverl.optim.controller import Controller
from adaptiverl.optim.hyperparams import Hyperparameters, get
from adaptiverl.optim.rules import Value

# What optax calls them → what a Controller calls them
NAMES = {
    "learning_rate": "lr",
    "momentum": "momentum",
    "b1": "beta1",
    "b2": "beta2",
    "decay": "alpha",
    "weight_decay": "weight_decay",
}
NUMBER = len("-1.2345678901234567e-300, ")


class AdaptiveState(NamedTuple):
    """State of `adaptive`: `inner.hyperparams` are the numbers that the next step starts from."""

    memory: Any  # Controller.state_dict() as JSON, in bytes
    inner: Any


def adaptive(
    inner: optax.GradientTransformation, lr_rule: Value = "none", **arguments: Any
) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose numbers follow the loss, the reward, the gradient norm and time.

        inner = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
        optimizer = adaptive(inner, lr_rule="trend+variance", reward_rule="kelly")
        updates, state = optimizer.update(grads, state, params, loss=loss, reward=reward)

    inner           made by optax.inject_hyperparams; its learning_rate, momentum, b1, b2, decay
                    (RMSprop's, which torch calls alpha) and weight_decay are moved. Its rate must
                    not be a schedule: the rules that read time are schedules
    lr_rule and the other arguments     those of adaptiverl.AdaptiveOptimizer, but for trust_region
                    and learned: `trust_region` is a transformation of its own

    `update` takes loss, reward and grad_norm, each of which may be left out; it computes the norm
    where a rule reads it. The rate moves before the step, as with AdaptiveOptimizer. Across
    processes every one must give the same signals.
    """
    moved = _Rules(arguments | {"lr_rule": lr_rule})

    def init(params: Any) -> AdaptiveState:
        state: Any = inner.init(params)
        if not hasattr(state, "hyperparams"):
            raise ValueError("adaptive moves injected numbers: wrap with optax.inject_hyperparams")
        if "learning_rate" in state.hyperparams_states:
            raise ValueError("the rate is a schedule, which would overwrite what the rules write")
        return AdaptiveState(jnp.zeros(moved.capacity, jnp.uint8), state)

    def update(
        updates: Any,
        state: AdaptiveState,
        params: Any = None,
        *,
        loss: Any = None,
        reward: Any = None,
        grad_norm: Any = None,
        **extra: Any,
    ) -> tuple[Any, AdaptiveState]:
        if grad_norm is None and moved.reads_norm:
            grad_norm = optax.tree.norm(updates)
        signals = {"loss": loss, "reward": reward, "grad_norm": grad_norm}
        given = {name: jnp.asarray(x) for name, x in signals.items() if x is not None}
        own = {k: v for k, v in state.inner.hyperparams.items() if k in NAMES}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (own, state.memory))
        (numbers, memory), after = jax.pure_callback(
            moved, (shapes, shapes[0]), state.memory, own, given, vmap_method="sequential"
        )
        now = state.inner._replace(hyperparams=state.inner.hyperparams | numbers)
        updates, then = optax.with_extra_args_support(inner).update(updates, now, params, **extra)
        return updates, AdaptiveState(memory, then._replace(hyperparams=then.hyperparams | after))

    return optax.GradientTransformationExtraArgs(init, update)


class _Rules:
    """A pure function of memory, numbers and signals; its Controller is but scratch paper."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments, self.lock = arguments, Lock()
        # Refuses what is wrong; a rate of 0 is inside all bounds. What the numbers of `inner` lack
        # is told once they are known
        all_numbers = Hyperparameters(
            lr=0.0, momentum=0.9, betas=(1e-3, 1e-3), alpha=0.9, weight_decay=0.1
        )
        known = Controller(all_numbers, owns_lr=True, **arguments)
        self.reads_norm = known.reads("grad_norm")
        self.capacity = 1000 + NUMBER * sum(_remembered(vars(a.constants)) for a in known.rules)
        self.scratch: Controller | None = None

    def __call__(self, memory: Any, numbers: dict[str, Any], signals: dict[str, Any]) -> Any:
        """(numbers of this step, memory) and the numbers that the next one starts from."""
        own = {NAMES[name]: float(x) for name, x in numbers.items()}
        group: dict[str, Any] = {k: x for k, x in own.items() if not k.startswith("beta")}
        if "beta1" in own:
            group["betas"] = (own["beta1"], own["beta2"])
        text = np.asarray(memory).tobytes().rstrip(b"\0").decode()
        with self.lock:
            if self.scratch is None or not text:
                self.scratch = Controller(Hyperparameters(**group), **self.arguments)
            controller = self.scratch
            if text:
                controller.load_state_dict(json.loads(text))
            controller.optimizer.param_groups[0].update(group)  # as they are: also if set since
            controller.observe(**{name: float(x) for name, x in signals.items()})
            now = self._read(controller, numbers)
            controller.tick()
            state = json.dumps(controller.state_dict()).encode()
            return (now, self._padded(state)), self._read(controller, numbers)

    def _read(self, controller: Controller, numbers: dict[str, Any]) -> dict[str, Any]:
        group = controller.optimizer.param_groups[0]
        values = {name: get(group, NAMES[name]) or 0.0 for name in numbers}
        return {name: np.asarray(x, numbers[name].dtype) for name, x in values.items()}

    def _padded(self, state: bytes) -> Any:
        if len(state) > self.capacity:
            raise ValueError(
                f"{len(state)} bytes of memory, and {self.capacity} were kept for them"
            )
        return np.frombuffer(state.ljust(self.capacity, b"\0"), np.uint8)


def _remembered(c: dict[str, Any]) -> int:
    """How many numbers signals.py may keep for a rule of the constants `c`."""
    beta = max(c["loss_beta"], c["reward_beta"])
    trend = c["trend_window"] or round(2 / (1 - beta)) + 2
    return (
        2 * c["var_window"] + trend + 2 * c["patience"] + max(2 * c["patience"], c["cooldown"]) + 20
    )
