"""A run's model after and before its training, and its rewards, loaded from the run's folder.

All of it is loaded as the training loads it. Leaves out which checkpoint (run_folder.py).
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.utils import logging as transformers_logging

from adaptiverl.commands.run_folder import Checkpoint
from adaptiverl.config.schema import ConfigError
from adaptiverl.files.process import Paused
from adaptiverl.rl.chat import Prompt, PromptError, tokenize
from adaptiverl.rl.rollout import Rollout
from adaptiverl.rl.sampling.sampler import Sampler
from adaptiverl.training import inputs, reward_code
from adaptiverl.training.build import make_accelerator, make_sampler
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.metrics import is_own
from adaptiverl.training.runtime import Runtime
from adaptiverl.training.scoring import PendingScores, Scores, Scoring
from rewards import CompositeReward, Reward


class TrainedModel:
    """The policy of `checkpoint`, which samples and is measured as in the run.

    With `start` also the model before the first step: where weights were trained it is a second
    model, which needs MODEL; where an adapter was, it is the same model without it. `sampler` has
    the policy and the tokenizer. Raises ConfigError for what cannot be loaded.
    """

    def __init__(self, c: RunConfig, checkpoint: Checkpoint, start: bool = False):
        transformers_logging.disable_progress_bar()
        update: dict[str, Any] = {"VLLM_SERVER": None, "KL_COEF": float(start)}  # 0: no reference
        if c.FP16 and not torch.cuda.is_available():
            logging.warning("FP16 needs a GPU, and there is none: computing in fp32")
            update["FP16"] = False
        resumed: Path | None = checkpoint.path
        if c.FULLTUNE and not start:  # a checkpoint is a model by itself: MODEL need not exist
            update["MODEL"], resumed = str(checkpoint.path), None
        if c.CHAT_TEMPLATE:  # transformers' name for what the run has saved
            update["CHAT_TEMPLATE"] = str(checkpoint.path / "chat_template.jinja")
        self.config = c.model_copy(update=update)
        self.checkpoint = checkpoint
        inputs.use_hub(self.config)
        self.runtime = Runtime(make_accelerator(self.config))
        longest = inputs.max_prompt_tokens(self.config)
        with inputs.as_config_error(f"{checkpoint.path}"):
            self.sampler = make_sampler(self.config, self.runtime, resumed, longest)
        self._start = _with_own_backend(self.sampler)
        self._said_cut = False

    def sample(self, prompts: list, numbers: Tensor, start: bool = False) -> Rollout:
        """A completion of each prompt from the random numbers [B, T]; raises ConfigError."""
        sampler = self._start if start else self.sampler
        try:
            with self._as(start):
                rollout = self.runtime.no_grad(sampler, prompts, numbers)
        except PromptError as error:
            raise ConfigError(f"{self.config.PROMPT_COLUMN}: {error}") from error
        if rollout.logprobs.isnan().any():
            of = f"MODEL {self.config.MODEL}" if start else self.checkpoint.path
            raise ConfigError(f"{of}: its log-probabilities are not finite (NaN): broken weights")
        longest = self.sampler.max_prompt
        if longest and not self._said_cut and (rollout.prompt_mask.sum(-1) >= longest).any():
            self._said_cut = True
            logging.warning(
                "a prompt fills the %d tokens that MAX_NEW_TOKENS leaves: what is longer loses "
                "its beginning",
                longest,
            )
        return rollout

    def fits(self, prompt: Prompt) -> bool:
        """Whether a conversation leaves MAX_NEW_TOKENS of the context; raises ConfigError."""
        try:
            tokens = len(tokenize(self.sampler.tokenizer, [prompt]).input_ids[0])
        except PromptError as error:
            raise ConfigError(f"{self.config.PROMPT_COLUMN}: {error}") from error
        return not self.sampler.max_prompt or tokens <= self.sampler.max_prompt

    def logprobs(
        self, rollout: Rollout, start: bool = False, temperature: float | None = None
    ) -> Tensor:
        """log π of the completions' tokens [B, T], at TEMPERATURE unless another is given."""
        policy = self.sampler.policy
        own, policy.temperature = policy.temperature, temperature or policy.temperature
        try:
            with self._as(start):
                return self.runtime.no_grad(policy.logprobs, rollout)
        finally:
            policy.temperature = own

    def _as(self, start: bool) -> AbstractContextManager[None]:
        return self.sampler.policy.as_reference() if start else nullcontext()


class RunRewards:
    """The rewards of a run, with the scales that they had learned at the checkpoint.

    `left_out` says by name which cannot be used, and why: those that ask people or a paid service
    unless `ask_all`, those that compare completions unless there are `several` of each prompt, and
    those that cannot be started or miss a column of `prompts`. `source` names the prompts.
    `notes` says which have other code than in the run, and so does a warning.
    """

    def __init__(
        self,
        model: TrainedModel,
        prompts: Dataset,
        source: str,
        ask_all: bool = False,
        several: bool = True,
    ):
        c, self.left_out = model.config, dict[str, str]()
        files = {source: prompts}
        made = {}
        saved = torch.load(
            model.checkpoint.path / "trainer.pt", weights_only=True, map_location="cpu", mmap=True
        )
        for key, state in (("REWARDS", "rewards"), ("HELD_OUT", "held_out")):
            rewards: list[Reward] = []
            for declared in getattr(c, key):
                if declared.external and not ask_all:
                    why = "it asks people or a paid service; --all-rewards includes it"
                elif declared.compares and not several:
                    why = "it compares completions of one prompt"
                else:
                    try:
                        one = c.model_copy(update={key: [declared]})
                        started = inputs.make_rewards(one, key, files, model.runtime)
                        rewards += started.rewards.values()  # type: ignore[arg-type]
                        continue
                    except ConfigError as error:
                        why = str(error).removeprefix(f"{key}.0: ")
                self.left_out[declared.name] = why
            made[key] = CompositeReward(rewards, reserved=is_own)
            made[key].load_state_dict(saved[state])
        self.step, self.trained, self.held_out = model.checkpoint.step, *made.values()
        self.notes: list[str] = []
        now = reward_code.sources(self.trained, self.held_out)
        if other := reward_code.changed(model.checkpoint.path, now):
            self.notes.append(
                f"the code of {reward_code.in_words(c, other)} has changed since the run wrote "
                f"{model.checkpoint.path}: these scores are not those of the run"
            )
            logging.warning(self.notes[0])
        self.scoring = Scoring(c, model.runtime, self.trained, self.held_out, self.step)

    def begin(
        self, batch: Mapping[str, list], rollout: Rollout, completions: list[str]
    ) -> PendingScores:
        """Starts to score completions of `batch`, which has a column of prompts, `prompt`."""
        return self.scoring.begin(dict(batch), rollout, completions, self.step)

    def wait(self, pending: Sequence[PendingScores]) -> Scores:
        """The scores of one batch after the other; raises ConfigError where a reward fails."""
        try:
            return self.scoring.wait(*pending, pairs=False)
        except Paused as reason:
            raise ConfigError(str(reason)) from reason

    @property
    def sum_name(self) -> str:
        """What `total` is: `reward`, or `reward without judge` where that one is left out."""
        declared = [reward.name for reward in self.scoring.config.REWARDS]
        missing = ", ".join(name for name in declared if name in self.left_out)
        return f"reward without {missing}" if missing else "reward"

    def total(self, scores: Scores, groups: int) -> Tensor:
        """[B]: the weighted sum, as eval/reward is made; NaN without any reward."""
        if not self.trained.names:
            return torch.full((len(scores.trained),), torch.nan, dtype=torch.float64)
        return self.trained.measure(scores.trained, groups)

    def columns(self, scores: Scores) -> dict[str, Tensor]:
        """Each reward's scores [B], by its name in metrics.jsonl without /mean."""
        result: dict[str, Tensor] = {}
        for prefix, names, values in (
            ("rewards/", self.trained.names, scores.trained),
            ("held_out/rewards/", self.held_out.names, scores.held_out),
        ):
            result |= {prefix + name: column for name, column in zip(names, values.T, strict=True)}
        return result

    def close(self) -> None:
        self.scoring.close()


def _with_own_backend(sampler: Sampler) -> Sampler:
    """A sampler of the same policy that has not sampled yet, for `Policy.as_reference`."""
    result = copy.copy(sampler)
    result.backend = copy.copy(sampler.backend)
    return result
