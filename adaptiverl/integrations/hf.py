"""HF Trainer: its loop reports to a scheduler or optimizer of ours."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adaptiverl.optim.adaptive import AdaptiveOptimizer
from adaptiverl.optim.online import Online
from adaptiverl.optim.schedulers import AdaptiveScheduler


class RewardObserveCallback(TrainerCallback):
    """After each step of the optimizer `scheduler` observes `reward_fn(step)`.

    A Trainer always has a scheduler of its own, so the rate is that one's times what the rules
    make of it, and so is the `learning_rate` of the Trainer's log (not with ReduceLROnPlateau or
    GreedyLR, for which a Trainer logs what they have set). `scheduler` may be given to the Trainer
    as its own, too. It is an AdaptiveScheduler, RewardAdaptiveScheduler, AdaptiveOptimizer,
    OnlineAdamW or its like; `reward_fn` gives the latest reward, or None where there is none.
    """

    def __init__(
        self,
        scheduler: AdaptiveScheduler | AdaptiveOptimizer | Online,
        reward_fn: Callable[[int], float | None],
    ):
        self.scheduler, self.reward_fn = scheduler, reward_fn
        scheduler.controller.owns_lr = False
        self.applied: Any = None
        self.rates: list[float] = []  # of the step that is being made

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        own = self.scheduler.controller
        self.rates = [own.rate(float(group["lr"])) for group in own.optimizer.param_groups]
        if isinstance(self.scheduler, AdaptiveScheduler):  # the optimizer does it by itself
            self.applied = self.scheduler.controller.applied()
            self.applied.__enter__()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        reward = self.reward_fn(state.global_step + 1)
        if isinstance(self.scheduler, AdaptiveScheduler):
            self.applied.__exit__(None, None, None)
            self.scheduler.observe(R=reward)
        else:
            own = self.scheduler
            watched = own if isinstance(own, Online) else own.controller
            watched.observe(reward=reward)  # an Online's GRU sees it too
        kwargs["lr_scheduler"]._last_lr = self.rates  # what a Trainer logs, until its next step
