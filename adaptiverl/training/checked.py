"""Finds a policy that is broken, and the likely cause: NaN, or wrong log-probabilities."""

import logging
from collections.abc import Mapping

import torch
from datasets import Dataset
from torch import Tensor, nn

from adaptiverl.config.schema import ConfigError
from adaptiverl.rl.chat import Prompt, PromptError, render, tokenize
from adaptiverl.rl.check import check_policy
from adaptiverl.rl.data import holds_chats, wordless
from adaptiverl.rl.rollout import Rollout, uniforms
from adaptiverl.rl.sampling.sampler import Sampler, no_tokens
from adaptiverl.training.batches import columns
from adaptiverl.training.collapse import Collapsed
from adaptiverl.training.inputs import as_config_error
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.runtime import Runtime
from adaptiverl.training.state import Progress


class CheckedPolicy:
    """The policy with its sampler; each method raises its errors in all processes at once.

    ConfigError where MODEL or the prompts are at fault, Collapsed where the training is.
    """

    def __init__(self, c: RunConfig, runtime: Runtime, sampler: Sampler, progress: Progress):
        self.config, self.runtime, self.progress = c, runtime, progress
        self.sampler = sampler
        self.notes: list[tuple[str, str]] = []  # kind and words of what was warned of at the start

    def sample(self, prompts: list[Prompt], numbers: Tensor) -> Rollout:
        """A completion of each of `prompts` from the random numbers [B, T], without gradient."""
        try:
            rollout = self.runtime.no_grad(self.sampler, prompts, numbers)
        except PromptError as error:
            raise ConfigError(f"{self.config.PROMPT_COLUMN}: {error}") from error
        self._refuse(rollout.logprobs.isnan().any(), "log-probabilities are")
        return rollout

    def refuse_broken_weights(self, policy: nn.Module) -> None:
        """A trained weight that is not finite must not be saved."""
        weights = [p for p in policy.parameters() if p.requires_grad]
        if self.runtime.sharded:
            weights = self.runtime.shards.local(weights)
        self._refuse(~torch.stack([p.isfinite().all() for p in weights]).all(), "weights are")

    def _refuse(self, broken: Tensor, what: str) -> None:
        """Raises in all processes where the policy of one is broken."""
        if not self.runtime.largest(int(broken)):
            return
        c, step = self.config, self.progress.step
        if not step:
            raise ConfigError(
                f"MODEL {c.MODEL}: its {what} not finite (NaN). Likely cause: broken weights"
                + (", or FP16 is too narrow for them: use BF16" if c.FP16 else "")
            )
        raise Collapsed(
            step,
            "nan",
            f"the policy's {what} not finite (NaN). Likely cause: an update that was too large"
            + (", or FP16 is too narrow: use BF16" if c.FP16 else "")
            + ". Use a smaller "
            + ("TRUST_REGION_KL" if c.uses_trust_region else "LRATE, or LR_RULE trust_region"),
        )

    def check_at_start(self, files: Mapping[str, Dataset], exact: bool) -> None:
        """Compares log-probabilities with the library's own, before the first step.

        On the two shortest and the two longest of the first prompts, so that there is padding.
        `files` are prompts by the name of their source, those to train on first; `exact` says that
        sampling and measuring differ by fp32 rounding alone.
        """
        c, most, tokenizer = self.config, self.sampler.max_prompt, self.sampler.tokenizer
        for source, rows in files.items():
            for text in (
                [] if holds_chats(rows, c.PROMPT_COLUMN) else wordless(rows, c.PROMPT_COLUMN)
            ):
                if not tokenizer(text).input_ids:
                    raise ConfigError(f"{source}: {no_tokens(text)}")
        prompts = next(iter(files.values()))
        first = columns(c, prompts, list(range(min(256, len(prompts)))))["prompt"]
        distinct = {render(tokenizer, prompt): prompt for prompt in first}
        counts = map(len, tokenize(tokenizer, list(distinct.values())).input_ids)
        sizes = dict(zip(distinct, counts, strict=True))
        if self.runtime.is_main and most and (cut := sum(n > most for n in sizes.values())):
            said = (
                f"{cut} of {len(sizes)} prompts are longer than the {most} tokens that "
                "MAX_NEW_TOKENS leaves: they lose their beginnings"
            )
            logging.warning(said)
            self.notes.append(("prompts cut", said))
        texts = sorted(sizes, key=lambda text: sizes[text])
        ends = [distinct[text] for text in texts[:2] + texts[-2:]]
        numbers = uniforms(c.SEED, 0, len(ends), min(8, c.MAX_NEW_TOKENS))
        rollout = self.sample(ends, numbers)
        with as_config_error(f"MODEL {c.MODEL}"):
            self.runtime.no_grad(check_policy, self.sampler.policy, rollout, exact)
