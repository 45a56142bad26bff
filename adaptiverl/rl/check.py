"""The check that sampling and the loss use the log-probabilities of the library's own model."""

import torch
from torch import Tensor

from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import Rollout


def allowed_gap(sampler_matches_policy: bool) -> float:
    """Nats per token by which sampling and the loss may differ.

    `sampler_matches_policy`: both compute in fp32 throughout, with the same weights.
    """
    return 1e-3 if sampler_matches_policy else 0.05


@torch.no_grad()
def check_policy(policy: Policy, rollout: Rollout, sampler_matches_policy: bool) -> float:
    """Compares a rollout and the policy's measurement of it with the library's forward pass.

    Returns the largest gap in nats; raises ValueError as `check_logprobs` does, or with what the
    model does that no policy may.
    """
    library = torch.zeros_like(rollout.logprobs)
    for row, completion in enumerate(rollout.tokens()):
        prompt = rollout.prompt_of[row]
        ids = rollout.prompt_ids[prompt][rollout.prompt_mask[prompt].bool()]
        tokens = torch.tensor(completion, device=ids.device)
        # Without autocast: its rounding is what this measures.
        with torch.autocast(ids.device.type, enabled=False):
            logits = policy.lm(input_ids=torch.cat([ids, tokens])[None]).logits
        table = (logits[0, len(ids) - 1 : -1].float() / policy.temperature).log_softmax(-1)
        library[row, : len(tokens)] = table.gather(-1, tokens[:, None])[:, 0]
    measured = policy.logprobs(rollout)
    try:
        return check_logprobs(rollout.logprobs, measured, library, rollout, sampler_matches_policy)
    except ValueError as error:
        if why := _why_unfit(policy, rollout):
            raise ValueError(why) from error
        raise


def _why_unfit(policy: Policy, rollout: Rollout) -> str | None:
    """What no policy may do, if the model does it: heed later tokens, or padding."""
    name = type(policy.base).__name__
    mask = rollout.prompt_mask[rollout.prompt_of[0]].bool()
    prompt = rollout.prompt_ids[rollout.prompt_of[0]][mask]
    ids = torch.cat([prompt, prompt[:1], prompt[:1]])[None]
    changed, full = ids.clone(), torch.ones_like(ids)
    changed[:, -1] = (prompt[0] + 1) % len(policy.base.get_input_embeddings().weight)
    cut = full.clone()
    cut[:, 0] = 0
    with torch.autocast(ids.device.type, enabled=False):
        first, again, other, without = (
            policy.lm(input_ids=each, attention_mask=mask).logits[:, 1:-1]
            for each, mask in ((ids, full), (ids, full), (changed, full), (ids, cut))
        )
    if not torch.equal(first, again):  # dropout is on: nothing can be compared
        return None
    if not torch.allclose(first, other, rtol=1e-3, atol=1e-3):
        return (
            f"it is not a decoder-only causal language model ({name}): what it says of a token "
            "depends on later ones"
        )
    if torch.equal(first, without):
        return (
            f"{name} ignores the attention mask, so that its padding changes what it says of a "
            "prompt: it cannot be trained here"
        )
    return None


def check_logprobs(
    sampled: Tensor,
    measured: Tensor,
    library: Tensor,
    rollout: Rollout,
    sampler_matches_policy: bool,
) -> float:
    """Raises ValueError, with the likely cause, if log-probabilities are wrong.

    `sampled` and `measured` (by the loss) are compared with `library`, all [B, T]: one unpadded
    pass per completion by the model's own code. If `sampler_matches_policy`, `allowed_gap` holds
    for each token. Otherwise rounding moves single tokens, and it holds for the mean. Returns the
    largest gap in nats.
    """
    gap = torch.maximum((sampled - library).abs(), (measured - library).abs())
    mean = (gap.sum() / rollout.completion_mask.sum()).item()
    worst = gap.max().item()
    if (worst if sampler_matches_policy else mean) <= allowed_gap(sampler_matches_policy):
        return worst
    padded = rollout.prompt_mask[rollout.prompt_of].min(-1).values == 0
    by_row = gap.max(-1).values
    if padded.any() and not padded.all() and by_row[padded].min() > 10 * by_row[~padded].max():
        cause = "only padded prompts are off: the model ignores position_ids or the attention mask"
    else:
        cause = "all prompts are off: dropout is on, or the model's cache and its full pass differ"
    raise ValueError(
        f"the log-probabilities of the samples and of the loss differ by up to {worst:.2g} nats "
        f"per token ({mean:.2g} on average); training on them would be wrong. Likely cause: {cause}"
    )
