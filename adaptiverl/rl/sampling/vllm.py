"""Sampling by a vLLM server through TRL's client, for models too large to decode here.

The server draws its own random numbers, so a resumed run samples other completions. Its
log-probabilities must be those of the sampled distribution (`--logprobs-mode processed_logprobs`);
the check before the first step finds out if they are not. Leaves out starting the server, and
adapters.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import Rollout
from adaptiverl.rl.sampling.tokens import TokenSampler


class VLLMBackend:
    """A vLLM server at `url`, which is sent the policy's weights before each call."""

    def __init__(self, url: str, policy: Policy, token_sampler: TokenSampler):
        from trl.generation.vllm_client import VLLMClient  # needs vllm, which is no requirement

        self.policy, self.token_sampler = policy, token_sampler
        self.client: Any = VLLMClient(base_url=url, connection_timeout=60.0)
        self.client.init_communicator(device=policy.device)

    def __call__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, prompt_of: Tensor, uniform: Tensor
    ) -> Rollout:
        """See `Backend`; only the shape of `uniform` [B, T] is used."""
        tokens, device = self.token_sampler, prompt_ids.device
        ends: dict[str, Any] = {"stop_token_ids": tokens.eos_ids.tolist()}
        if tokens.stop:  # it looks for them in text, here with special tokens, as is done here
            ends |= {"stop": tokens.stop.strings, "skip_special_tokens": False}
        self.client.update_model_params(self.policy.base)
        self.client.reset_prefix_cache()  # keys and values of the old weights
        answer = self.client.generate(
            [prompt_ids[i][prompt_mask[i].bool()].tolist() for i in prompt_of],
            temperature=tokens.temperature,
            top_k=tokens.top_k,
            top_p=tokens.top_p,
            max_tokens=uniform.shape[1],
            generation_kwargs=ends,
        )
        ids = [torch.tensor(row) for row in answer["completion_ids"]]
        mask = [torch.ones_like(row) for row in ids]
        logprobs = [torch.tensor([each[0] for each in row]) for row in answer["logprobs"]]
        columns = (ids, tokens.pad_id), (mask, 0), (logprobs, 0.0)
        drawn, sent, measured = (
            pad_sequence(rows, True, fill).to(device) for rows, fill in columns
        )
        live = tokens.live(drawn) & sent.bool()  # a server may go on behind a stop string
        return Rollout(
            prompt_ids,
            prompt_mask,
            prompt_of,
            drawn.where(live, tokens.pad_id),
            live.to(sent.dtype),
            measured.where(live, 0.0),
        )
