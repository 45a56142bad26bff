"""HF Trainer, and TRL's trainers: their loop reports to an optimizer or scheduler of ours."""

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback

from adaptiverl.optim.adaptive import CHOOSE, AdaptiveOptimizer
from adaptiverl.optim.hyperparams import mean_over_processes
from adaptiverl.optim.online import Online
from adaptiverl.optim.schedulers import AdaptiveScheduler

log = logging.getLogger(__name__)
Part = str | Sequence[int]  # a text, or its token ids
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
        if not isinstance(scheduler, AdaptiveScheduler | AdaptiveOptimizer | Online):
            raise TypeError(
                f"scheduler is {scheduler!r:.60}; it must be an AdaptiveScheduler, an "
                "AdaptiveOptimizer or an online optimizer"
            )
        if not callable(reward_fn):
            raise TypeError(
                f"reward_fn is {reward_fn!r:.60}; it must be a function of the step, such as "
                "RewardTap.last"
            )
        self.scheduler, self.reward_fn = scheduler, reward_fn
        self.applied: Any = None
        if isinstance(scheduler, AdaptiveScheduler):
            scheduler.controller.owns_lr = False
            super().__init__(scheduler.optimizer)
            reads = scheduler.controller.reads("reward")
        else:
            super().__init__(scheduler)
            reads = isinstance(scheduler, Online) or scheduler.reads_reward
        if not reads:
            log.warning("RewardObserveCallback: no rule reads rewards. %s", CHOOSE)

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
                of a prompt and its completion, of which only the completion counts. Each part of a
                pair is a text or a list of token ids. `RewardTap.texts` are such pairs, of the
                last batch
    informative     says whether any rewards of the step differ (TrustRegion.step); default: always.
                    It is true if it is true in any process
    count       texts per process; default 4
    length      how many of the last tokens of each the model is given; default: all that it has
                positions for. With fewer the KL is that of a shorter context
    temperature     of the policy; default: that of the trainer's arguments, 1 where they have none

    Log-probabilities of all words are computed at each token before the step, and once or a few
    times within it; KL(before ‖ now) is exact, in nats per token, the mean over all processes. The
    model is in eval mode while it is measured: dropout would count as a difference. The
    `learning_rate` of the Trainer's log is the rate that the step took.

    Raises TypeError for what is no AdaptiveOptimizer and for `texts` that cannot be called, and
    ValueError for an optimizer whose rules use no KL and for numbers out of range.
    """

    def __init__(
        self,
        optimizer: AdaptiveOptimizer,
        tokenizer: Any,
        texts: Callable[[], Sequence[str | tuple[Part, Part]]],
        informative: Callable[[], bool] | None = None,
        count: int = 4,
        length: int | None = None,
        temperature: float | None = None,
    ):
        wanted = 'AdaptiveOptimizer(base, lr_rule="trust_region")'
        if not isinstance(optimizer, AdaptiveOptimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; it must be an {wanted}")
        if not (optimizer.trust_region or optimizer.learned or optimizer.online):
            raise ValueError(f"no rule of the optimizer uses the KL of an update: make an {wanted}")
        if not callable(texts):
            raise TypeError(f"texts is {texts!r:.60}; it must be a function, such as tap.texts")
        for name, value in (("count", count), ("length", length)):
            if value is not None and (value < 1 or value % 1):
                raise ValueError(f"{name} is {value}; it must be a whole number, at least 1")
        if temperature is not None and not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; it must be in (0, inf)")
        super().__init__(optimizer)
        self.tokenizer, self.texts, self.count, self.length = tokenizer, texts, count, length
        self.temperature = temperature
        self.optimizer, self.informative = optimizer, informative
        self.model: Any = None
        self.inputs: Any = None
        self.kept = 0  # tokens that may be measured: the last ones
        self.counted = torch.empty(0)  # [texts, kept], at which of them the policy is measured
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
        config = getattr(self.model, "config", None)
        positions = getattr(config, "max_position_embeddings", None)
        most = min((each for each in (self.length, positions) if each), default=None)
        ids, rows = [], []
        for whole, first, end in map(self._tokens, texts):
            left = max(len(whole) - most, 0) if most else 0
            ids.append(whole[left:])
            rows.append([first <= place < end for place in range(left, len(whole))])
        width = max(map(len, rows))
        counted = torch.tensor([row + [False] * (width - len(row)) for row in rows])
        if not counted.any():
            raise ValueError("TrustRegionCallback: texts() gave only empty texts or completions")
        self.inputs = self.tokenizer.pad(
            {"input_ids": ids}, padding_side="right", return_tensors="pt"
        ).to(args.device)
        self.kept = width - int(counted.any(0).nonzero()[0])
        self.counted = counted[:, -self.kept :].to(args.device)
        self.old = self._logprobs()

    def _tokens(self, text: str | tuple[Part, Part]) -> tuple[list[int], int, int]:
        """The token ids of a text, and the first and the end of those that are measured.

        A token is measured where it is predicted: from the last one of the prompt on.
        """
        if isinstance(text, str):
            ids = self.tokenizer(text).input_ids
            return ids, 0, len(ids)
        prompt, completion = text
        before = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else [*prompt]
        first = max(len(before) - 1, 0)
        if not isinstance(completion, str):  # as they were sampled: nothing follows the last one
            ids = [*before, *completion]
            return ids, first, len(ids) - 1
        if isinstance(prompt, str):  # a word may begin in the prompt and end in the completion
            ids = self.tokenizer(prompt + completion).input_ids
        else:
            ids = before + self.tokenizer(completion, add_special_tokens=False).input_ids
        return ids, first, len(ids)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log_rates(kwargs["lr_scheduler"])

    @torch.no_grad()
    def _logprobs(self) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        base = getattr(self.model, "get_base_model", lambda: self.model)()  # of a PeftModel
        named = "logits_to_keep" in inspect.signature(base.forward).parameters
        own = {"logits_to_keep": self.kept} if named else {}  # else it has those of all prompts
        logits = self.model(**self.inputs, **own).logits[:, -self.kept :]
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
