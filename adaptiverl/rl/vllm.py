"""Sampling by a vLLM server through TRL's client, for models too large to decode here.

The server draws its own random numbers, so a resumed run samples other completions; its
log-probabilities must be those of the sampled distribution (`--logprobs-mode processed_logprobs`),
which the check before the first step sees. Leaves out starting the server and adapters.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
        self.client.update_model_params(self.policy.base)
        self.client.reset_prefix_cache()  # keys and values of the old weights
        answer = self.client.generate(
            [prompt_ids[i][prompt_mask[i].bool()].tolist() for i in prompt_of],
            temperature=choice.temperature,
            top_k=choice.top_k,
            top_p=choice.top_p,
            max_tokens=uniform.shape[1],
            generation_kwargs={"stop_token_ids": choice.eos_ids.tolist()},
        )
        tokens = [torch.tensor(ids) for ids in answer["completion_ids"]]
        mask = [torch.ones_like(ids) for ids in tokens]
        logprobs = [torch.tensor([each[0] for each in row]) for row in answer["logprobs"]]
        columns = (tokens, choice.pad_id), (mask, 0), (logprobs, 0.0)
        written = [pad_sequence(rows, True, fill).to(prompt_ids.device) for rows, fill in columns]
        return Rollout(prompt_ids, prompt_mask, prompt_of, *written)
