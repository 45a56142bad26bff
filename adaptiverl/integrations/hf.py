"""HF Trainer, and TRL's trainers: their loop reports to an optimizer or scheduler of ours."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback

from adaptiverl.optim.adaptive import AdaptiveOptimizer
from adaptiverl.optim.hyperparams import mean_over_processes
from adaptiverl.optim.online import Online
from adaptiverl.optim.schedulers import AdaptiveScheduler

KEPT_AS = "adaptiverl.RewardObserveCallback"  # in trainer_state.json


class _LogsRates(TrainerCallback):
    """Puts the rates that the last step took where a Trainer logs the scheduled ones."""

    def __init__(self, stepped: AdaptiveOptimizer | Optimizer):
        self.adaptive = stepped if isinstance(stepped, AdaptiveOptimizer) else None
        self.rates: list[float] = []  # of the last step, before its line search,
        self.taken: list[float] = []  # and after it
        base: Any = self.adaptive.base if self.adaptive else stepped
        base.register_step_pre_hook(self._note_rates)

    def _note_rates(self, optimizer: Optimizer, *_: Any) -> None:
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]

    def log_rates(self, scheduler: Any) -> None:
        """Until `scheduler`, the Trainer's, steps."""
        info = self.adaptive.info if self.adaptive else None
        scale = info.scale if info else 1.0
        if scale:  # else the step was left out
            self.taken = [rate * scale for rate in self.rates]
        if self.taken:
            scheduler._last_lr = self.taken


class RewardObserveCallback(_LogsRates):
    """After each step of the optimizer `scheduler` observes `reward_fn(step)`.

    scheduler   an AdaptiveScheduler, RewardAdaptiveScheduler, AdaptiveOptimizer or OnlineAdamW and
                its like
    reward_fn   gives the latest reward of this process, or None where there is none; the mean over
                processes is observed

    A Trainer always has a scheduler of its own, so the rate is that one's times what the rules
    make of it, and so is the `learning_rate` of the Trainer's log (not with ReduceLROnPlateau or
    GreedyLR, for which a Trainer logs what they have set). `scheduler` may be given to the Trainer
    as its own, too; if it is not, its state is in the Trainer's checkpoints all the same
    (trainer_state.json), and comes back on resuming.
    """

    def __init__(
        self,
        scheduler: AdaptiveScheduler | AdaptiveOptimizer | Online,
        reward_fn: Callable[[int], float | None],
    ):
        self.scheduler, self.reward_fn = scheduler, reward_fn
        self.applied: Any = None
        if isinstance(scheduler, AdaptiveScheduler):
            scheduler.controller.owns_lr = False
            super().__init__(scheduler.optimizer)
        else:
            super().__init__(scheduler)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = (state.stateful_callbacks or {}).get(KEPT_AS)
        if kept and isinstance(self.scheduler, AdaptiveScheduler):
            self.scheduler.load_state_dict(kept)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Whether a checkpoint will follow is not known yet. Not as transformers' ExportableState:
        a Trainer makes such a callback anew from what JSON can keep, which reward_fn is not."""
        if isinstance(self.scheduler, AdaptiveScheduler):
            state.stateful_callbacks[KEPT_AS] = self.scheduler.state_dict()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.scheduler, AdaptiveScheduler):  # an optimizer does it by itself
            self.applied = self.scheduler.controller.applied()
            self.applied.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        own = {"reward": self.reward_fn(state.global_step + 1)}
        reward = mean_over_processes(own, args.device).get("reward")
        if isinstance(self.scheduler, AdaptiveScheduler):
            self.applied.__exit__(None, None, None)
            self.scheduler.observe(R=reward)
        else:
            self.scheduler.observe(reward=reward)
        self.log_rates(kwargs["lr_scheduler"])


class TrustRegionCallback(_LogsRates):
    """Measures the KL of each update in a Trainer, for an AdaptiveOptimizer with trust_region.

        optimizer = AdaptiveOptimizer(AdamW(model.parameters()), lr_rule="trust_region", steps=100)
        trainer = RLOOTrainer(…, reward_funcs=tap, optimizers=(optimizer, None))
        trainer.add_callback(
            TrustRegionCallback(optimizer, tokenizer, tap.texts, tap.informative)
        )

    optimizer   the AdaptiveOptimizer that the Trainer steps
    tokenizer   of the model
    texts       gives what to measure on, the first `count` of them at each step: texts, or pairs
                of a prompt and its completion, of which only the completion counts.
                `RewardTap.texts` are such pairs, of the last batch
    informative     says whether any rewards of the step differ (TrustRegion.step); default: always.
                    It is true if it is true in any process
    count, length       texts per process and last tokens of each; default 4 and 64
    temperature     of the policy; default: that of the trainer's arguments, 1 where they have none

    Log-probabilities of all words are computed at each token before the step, and once or a few
    times within it; KL(before ‖ now) is exact, in nats per token, the mean over all processes. The
    model is in eval mode while it is measured: dropout would count as a difference. The
    `learning_rate` of the Trainer's log is the rate that the step took.
    """

    def __init__(
        self,
        optimizer: AdaptiveOptimizer,
        tokenizer: Any,
        texts: Callable[[], Sequence[str | tuple[str, str]]],
        informative: Callable[[], bool] | None = None,
        count: int = 4,
        length: int = 64,
        temperature: float | None = None,
    ):
        super().__init__(optimizer)
        self.tokenizer, self.texts, self.count, self.length = tokenizer, texts, count, length
        self.temperature = temperature
        self.optimizer, self.informative = optimizer, informative
        self.model: Any = None
        self.inputs: Any = None
        self.counted = torch.empty(0)  # [texts, tokens], at which of them the policy is measured
        self.old = torch.empty(0)  # [tokens, words], of the policy before the step
        optimizer.measure_kl = self.measure_kl

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model, texts = kwargs["model"], [*self.texts()][: self.count]
        self.divisor = self.temperature or getattr(args, "temperature", 1.0)  # TRL's have one
        if not texts:
            raise ValueError("TrustRegionCallback: texts() gave no text to measure the KL on")
        if self.informative:
            own: dict[str, float | None] = {"share": float(self.informative())}
            self.optimizer.informative = mean_over_processes(own, args.device)["share"] > 0
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        pairs = [("", each) if isinstance(each, str) else each for each in texts]
        whole = self.tokenizer([prompt + completion for prompt, completion in pairs]).input_ids
        ids = [each[-self.length :] for each in whole]
        self.inputs = self.tokenizer.pad(
            {"input_ids": ids}, padding_side="right", return_tensors="pt"
        ).to(args.device)
        # A token is measured where it is predicted: from the last one of the prompt on
        prompts = [len(self.tokenizer(prompt).input_ids) if prompt else 1 for prompt, _ in pairs]
        left = [
            max(of_prompt - 1 - (len(each) - len(kept)), 0)
            for of_prompt, each, kept in zip(prompts, whole, ids, strict=True)
        ]
        mask = self.inputs["attention_mask"].bool()
        places = torch.arange(mask.shape[1], device=mask.device)
        self.counted = mask & (places >= torch.tensor(left, device=mask.device)[:, None])
        self.old = self._logprobs()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log_rates(kwargs["lr_scheduler"])

    @torch.no_grad()
    def _logprobs(self) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        logits = self.model(**self.inputs).logits
        self.model.train(was_training)
        return (logits[self.counted].float() / self.divisor).log_softmax(-1)

    def measure_kl(self) -> float:
        """KL(policy before this step ‖ policy now), nats per token."""
        if self.inputs is None:
            raise ValueError("add the TrustRegionCallback to the Trainer: it saw no step begin")
        new = self._logprobs()
        kl = torch.where(self.old == new, 0.0, self.old.exp() * (self.old - new)).sum(-1)
        total = torch.stack([kl.sum(), torch.full_like(kl[0], len(kl))])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)  # NaN in one process is NaN in all: too far
        return (total[0] / total[1]).item()
