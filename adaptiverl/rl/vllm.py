"""Sampling by a vLLM server through TRL's client, for models too large to decode here.

The server draws its own random numbers, so a resumed run samples other completions; its
log-probabilities must be those of the sampled distribution (`--logprobs-mode processed_logprobs`),
which the check before the first step sees. Leaves out starting the server and adapters.
"""

from typing import Any

import torch
from torch import Tensor

from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import Choice, Rollout


class Server:
    """A vLLM server at `url` that samples from `policy` as it is at each call."""

    def __init__(self, url: str, policy: Policy, device: torch.device):
        from trl.generation.vllm_client import VLLMClient  # needs vllm, which is no requirement

        self.policy = policy
        self.client: Any = VLLMClient(base_url=url, connection_timeout=60.0)
        self.client.init_communicator(device=device)

    def __call__(
        self,
        choice: Choice,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        prompt_of: Tensor,
        uniform: Tensor,
    ) -> Rollout:
        """As Decoder; of `uniform` [B, T] only the shape counts."""
        rows, length = uniform.shape
        self.client.update_model_params(self.policy.base)
        self.client.reset_prefix_cache()  # keys and values of the old weights
        answer = self.client.generate(
            [prompt_ids[i][prompt_mask[i].bool()].tolist() for i in prompt_of],
            temperature=choice.temperature,
            top_k=choice.top_k,
            top_p=choice.top_p,
            max_tokens=length,
            generation_kwargs={"stop_token_ids": choice.eos_ids.tolist()},
        )
        tokens = torch.full((rows, length), choice.pad_id, device=prompt_ids.device)
        mask = torch.zeros_like(tokens)
        logprobs = torch.zeros(rows, length, device=prompt_ids.device)
        completions = zip(answer["completion_ids"], answer["logprobs"], strict=True)
        for row, (ids, measured) in enumerate(completions):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
            logprobs[row, : len(ids)] = torch.tensor([each[0] for each in measured])
        longest = int(mask.sum(-1).max())
        written = (x[:, :longest] for x in (tokens, mask, logprobs))
        return Rollout(prompt_ids, prompt_mask, prompt_of, *written)
