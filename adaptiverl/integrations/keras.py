"""Keras: a callback that moves the rate by loss and reward, and the rules of time as a schedule.

Any backend of Keras 3. Momentum, betas and weight decay are left out: Keras compiles them in.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from adaptiverl.optim.controller import Controller
from adaptiverl.optim.hyperparams import Hyperparameters
from adaptiverl.optim.rules import ARGUMENTS, Value, between, parse_rules


class AdaptiveCallback(keras.callbacks.Callback):
    """After each batch the rules move the learning rate of the model's optimizer.

        model.fit(x, y, callbacks=[AdaptiveCallback("trend+variance", reward_rule="trend",
                                                    reward_fn=lambda batch: latest_reward())])

    lr_rule, reward_rule    as of adaptiverl.AdaptiveScheduler, but for those that need a KL
    reward_fn       gives the reward after batch `batch`, or None where there is none
    constants       of the rules, and min_lr and max_lr

    The loss is that of the batch, not Keras' mean over the epoch: the model must have been compiled
    with a loss. One batch is one step of time, also where Keras accumulates gradients over several.
    The rate must be a number: a schedule is refused by Keras. The log has the rate at the end of
    each epoch as `learning_rate`. `controller.state_dict()` is what a checkpoint needs.
    """

    def __init__(
        self,
        lr_rule: Value = "none",
        reward_rule: Value = "none",
        *,
        reward_fn: Callable[[int], float | None] | None = None,
        **constants: Any,
    ):
        super().__init__()
        if other := sorted(constants.keys() & set(ARGUMENTS)):
            raise TypeError(f"{', '.join(other)}: this callback moves the learning rate alone")
        for rule, _ in parse_rules("lr_rule", lr_rule) + parse_rules("reward_rule", reward_rule):
            if rule.reads == "grad_norm":
                raise ValueError("lr_rule grad_norm: Keras shows a callback no gradient")
        self.arguments = {"lr_rule": lr_rule, "reward_rule": reward_rule} | constants
        # Refuses what is wrong now; a rate of 0 is inside all bounds
        Controller(Hyperparameters(lr=0.0), owns_lr=True, **self.arguments)
        self.reward_fn = reward_fn
        self.controller: Controller | None = None
        self.seen = (0.0, 0.0)  # sum and count of the losses of the epoch so far

    def on_train_begin(self, logs: Any = None) -> None:
        rate = self._rate()
        if self.controller is None:
            self.controller = Controller(Hyperparameters(lr=rate), **self.arguments)
        if self.controller.reads("loss") and self._tracker() is None:
            raise ValueError("a rule reads the loss, and the model was compiled without one")
        self.model.optimizer.learning_rate = rate  # Keras refuses it where the rate is a schedule

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.seen = (0.0, 0.0)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        assert self.controller is not None
        reward = self.reward_fn(batch) if self.reward_fn else None
        group = self.controller.optimizer.param_groups[0]
        if not math.isclose(group["lr"], rate := self._rate(), rel_tol=1e-6):
            group["lr"] = rate  # something else has set it, which the controller refuses
        self.controller.observe(loss=self._loss(), reward=reward)
        self.controller.tick()
        self.model.optimizer.learning_rate = group["lr"]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            logs["learning_rate"] = self._rate()

    def _rate(self) -> float:
        return float(ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def _tracker(self) -> Any:
        """Keras' mean of the losses of an epoch."""
        means = [m for m in self.model.metrics if isinstance(m, keras.metrics.Mean)]
        return next((mean for mean in means if mean.name == "loss"), None)

    def _loss(self) -> float | None:
        """Of the batches since the last call."""
        tracker = self._tracker()
        if tracker is None:
            return None
        total, count = (float(ops.convert_to_numpy(x)) for x in (tracker.total, tracker.count))
        new, size = total - self.seen[0], count - self.seen[1]
        self.seen = total, count
        return new / size if size else None


@keras.saving.register_keras_serializable(package="adaptiverl")
class TimeSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """The rules of time as a schedule: cyclical, cosine, cosine_restart, or several joined by "+".

        keras.optimizers.Adam(TimeSchedule(1e-3, "cosine_restart", cycle_length=500))

    learning_rate   the rate that the rules scale
    rule            as lr_rule of adaptiverl.AdaptiveScheduler
    constants       cycle_length, cycle_mult, eta_min_scale, min_lr and max_lr
    """

    def __init__(self, learning_rate: float, rule: Value = "cosine_restart", **constants: Any):
        numbers = Hyperparameters(lr=learning_rate)
        controller = Controller(numbers, owns_lr=True, lr_rule=rule, **constants)
        for found in (active.rule for active in controller.rules):
            if found.kind != "schedule":
                raise ValueError(f"{found.name} reads the {found.reads}: use AdaptiveCallback")
            if found.name not in HEIGHTS:
                raise ValueError(f"{found.name} is not written for Keras: use AdaptiveCallback")
        self.given = {"learning_rate": learning_rate, "rule": rule} | constants
        self.learning_rate, self.bounds = learning_rate, controller.bounds["lr"]
        self.rules = [(HEIGHTS[each.rule.name], each.constants) for each in controller.rules]

    def __call__(self, step: Any) -> Any:
        rate = self.learning_rate
        for height, c in self.rules:
            rate = rate * between(height(ops.cast(step, "float32"), c), c)
        return ops.clip(rate, *self.bounds)

    def get_config(self) -> dict[str, Any]:
        return dict(self.given)


def _cyclical(step: Any, c: Any) -> Any:
    return ops.abs(1 - 2 * ops.mod(step, c.cycle_length) / c.cycle_length)


def _cosine(step: Any, c: Any) -> Any:
    place = ops.mod(step, 2 * c.cycle_length) / c.cycle_length
    return (1 + ops.cos(math.pi * place)) / 2


def _cosine_restart(step: Any, c: Any) -> Any:
    step, length = ops.while_loop(
        lambda step, length: step >= length,
        lambda step, length: (ops.floor(step - length), ops.floor(length * c.cycle_mult)),
        (step, ops.full_like(step, c.cycle_length)),
    )
    return (1 + ops.cos(math.pi * step / length)) / 2


# Rules of time in operations that Keras can compile; AdaptiveCallback has the others
HEIGHTS = {"cyclical": _cyclical, "cosine": _cosine, "cosine_restart": _cosine_restart}
