"""The tokens of prompts and completions in one row, without padding."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import Rollout

PROMPTS, COMPLETIONS = (2, 4, 1), (5, 1, 3, 2)  # lengths
PROMPT_OF = (0, 2, 1, 0)


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Policy(GPT2LMHeadModel(config), temperature=0.7)


def make(completions: tuple[int, ...] = COMPLETIONS) -> Rollout:
    """Padding is an id of its own, which would be seen in any number that it enters."""
    torch.manual_seed(1)
    place = torch.arange(4) >= 4 - torch.tensor(PROMPTS)[:, None]
    mask = torch.arange(max(completions)) < torch.tensor(completions)[:, None]
    ids = torch.randint(1, 11, place.shape) * place
    answers = torch.randint(1, 11, mask.shape) * mask
    weights = torch.randn(mask.shape) * mask
    zeros = torch.zeros(mask.shape)
    return Rollout(ids, place.long(), torch.tensor(PROMPT_OF), answers, mask.long(), zeros, weights)


def one_by_one(policy: Policy, rollout: Rollout) -> torch.Tensor:
    """log π [B, T] by the model's own forward pass, of each completion without padding."""
    rows = []
    for b, of in enumerate(PROMPT_OF):
        prompt = rollout.prompt_ids[of, rollout.prompt_mask[of].bool()]
        tokens = rollout.completion_ids[b, rollout.completion_mask[b].bool()]
        logits = policy.base(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        table = (logits / policy.temperature).log_softmax(-1)
        own = table.gather(1, tokens[:, None])[:, 0]
        rows.append(torch.nn.functional.pad(own, (0, rollout.logprobs.shape[1] - len(own))))
    return torch.stack(rows)


@pytest.mark.parametrize("completions", [COMPLETIONS, (1, 1, 1, 1), (12, 12, 12, 11)])
def test_logprobs_and_gradients_are_those_of_completions_alone(policy, completions):
    rollout = make(completions)
    expected = one_by_one(policy, rollout)
    (rollout.weights * expected).sum().backward()
    wanted = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    measured = policy(rollout)
    measured.score.backward()
    torch.testing.assert_close(measured.logprobs, expected.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(policy.logprobs(rollout), expected.detach(), rtol=0, atol=1e-5)
    for p, grad in zip(policy.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("completions", "computed"),
    [
        # 7 of prompts, and each completion's but the last, which predicts nothing here
        (COMPLETIONS, 7 + 4 + 0 + 2 + 1),
        ((5, 5, 5, 5), 7 + 4 * 4),
        ((12, 12, 12, 12), 3 * 4 + 4 * 11),  # 51 of 56 are needed: all are computed
    ],
)
def test_layers_compute_no_padding_where_there_is_much(policy, completions, computed):
    rows = []  # of each layer's products: prompts and completions are in one
    for block in policy.base.transformer.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:2]))
    policy.logprobs(make(completions))
    assert rows == [(1, computed)] * 8
