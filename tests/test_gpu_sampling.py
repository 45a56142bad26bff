"""Sampling by graphs: right log-probabilities, the weights as they are, every size of a batch.

What a CPU can run of it, the kept decoder without its graphs, it runs in the suite.
"""

from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT
from gpu_parts import everywhere, kept_backend, sample, tokens
from test_decode import EOS, small_gpt2

from adaptiverl import AdamMini, OnlineAdamW, OnlineRMSProp, OnlineSGD
from adaptiverl.rl.check import allowed_gap, check_policy
from adaptiverl.rl.loading import load_policy, load_tokenizer
from adaptiverl.rl.policy import Policy
from adaptiverl.rl.sampling.generate import GenerateBackend
from adaptiverl.rl.sampling.stop import StopStrings

TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {
    "adam_mini": lambda named: AdamMini([p for _, p in named], lr=1e-2),
    "sgd": lambda named: torch.optim.SGD([p for _, p in named], lr=0.1, momentum=0.9),
    "rmsprop": lambda named: torch.optim.RMSprop([p for _, p in named], lr=1e-2),
    "adamw": lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-2, fused=True),
    "online_sgd": lambda named: OnlineSGD(named, lr=0.1),
    "online_rmsprop": lambda named: OnlineRMSProp(named, lr=1e-2),
    "online_adamw": lambda named: OnlineAdamW(named, lr=1e-2, fused=True),
    "adamw_8bit": lambda named: adamw_8bit([p for _, p in named]),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # peft corrects it itself
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft's
]


def adamw_8bit(parameters):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-2, min_8bit_size=16)


def autocast(device: str, kind: str):
    return torch.autocast(device, TYPES[kind]) if TYPES[kind] else nullcontext()


def has_graphs(ways, device: str) -> bool:
    """As many as there should be: on a CPU none."""
    return bool(ways.kept and ways.kept.graphs) == (device == "cuda")


@everywhere("log-probabilities")
@pytest.mark.parametrize("kind", TYPES)
def test_log_probabilities_are_those_of_an_unpadded_pass(device, kind, record_property):
    """Sampled, of the reference's pass and of the loss, against the library's own model in fp32."""
    policy = Policy(small_gpt2(300, initializer_range=0.1).to(device))
    ways, exact = kept_backend(policy), kind == "fp32"
    with autocast(device, kind):
        rollout = sample(ways, device, rows=13)
        worst = check_policy(policy, rollout, exact)
        measured = policy(rollout).logprobs
    assert policy.plain_head and has_graphs(ways, device)
    gap = (measured - rollout.logprobs).abs()
    assert (gap.max() if exact else gap.mean()) <= allowed_gap(exact)
    record_property(f"largest gap, {kind}, nats", worst)


@everywhere("same samples")
@pytest.mark.parametrize("rows", [1, 2, 7, 32, 33])
def test_the_same_numbers_give_the_same_samples_with_graphs_and_without(device, rows):
    """Beside the same decoder without graphs to the bit, beside `generate` to rounding.

    EOS is one word of seven: completions end at all times, and slots move.
    """
    policy = Policy(small_gpt2(7, initializer_range=0.2).to(device))
    ways, eager = kept_backend(policy), kept_backend(policy)
    first = sample(ways, device, rows, 40)
    sample(eager, device, rows, 40)
    eager.kept.graphs.clear()
    for seed in range(3):
        own, theirs = (sample(each, device, rows, 40, seed) for each in (ways, eager))
        assert torch.equal(own.completion_ids, theirs.completion_ids)
        assert torch.equal(own.logprobs, theirs.logprobs)
        library = sample(GenerateBackend(policy, tokens(device)), device, rows, 40, seed)
        assert own.tokens() == library.tokens()
        torch.testing.assert_close(own.logprobs, library.logprobs, rtol=0, atol=1e-4)
    again = sample(ways, device, rows, 40)
    assert torch.equal(again.logprobs, first.logprobs) and has_graphs(ways, device)
    assert has_graphs(eager, "cpu"), "the other has none"
    assert rows < 7 or len({len(row) for row in first.tokens()}) > 2, "all ended together"


@everywhere("same samples")
@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.6}, {"stop": ["e", " th"]}])
def test_filters_and_stop_strings_are_the_same_in_graphs(device, settings):
    if "stop" in settings:
        tokenizer = load_tokenizer(str(ROOT / "adaptiverl/assets/policy"))
        settings = {"stop": StopStrings(tokenizer, settings["stop"], device)}
    policy = Policy(small_gpt2(4096).to(device))
    ways, eager = kept_backend(policy, **settings), kept_backend(policy, **settings)
    sample(eager, device, 7, 40)
    eager.kept.graphs.clear()
    own, theirs = (sample(each, device, 7, 40, 1) for each in (ways, eager))
    assert torch.equal(own.completion_ids, theirs.completion_ids)
    assert torch.equal(own.logprobs, theirs.logprobs) and has_graphs(ways, device)
    if "stop" in settings:
        assert own.completion_mask.sum(-1).min() < 40, "none ended"


@everywhere("same samples")
@pytest.mark.parametrize("rows", [1, 8])
def test_completions_may_end_at_once(device, rows):
    lm = small_gpt2(7)
    with torch.no_grad():
        lm.transformer.ln_f.bias.copy_(50 * lm.lm_head.weight[EOS])  # EOS is certain
    ways = kept_backend(Policy(lm.to(device)))
    for _ in range(2):
        assert sample(ways, device, rows, 40).tokens() == [[EOS]] * rows
    assert sample(ways, device, rows, 1).tokens() == [[EOS]] * rows


def is_seen(policy: Policy, device: str, change, kind: str = "fp32", same: bool = True) -> None:
    """Whether a kept decoder, which stays the `same`, samples from what `change` makes of it."""
    ways = kept_backend(policy)
    with autocast(device, kind):
        before = sample(ways, device)
        decoder = ways.kept
    change(before)
    with autocast(device, kind):
        after, fresh = sample(ways, device), sample(kept_backend(policy), device)
    assert not torch.equal(before.logprobs[:, 0], after.logprobs[:, 0]), "nothing has changed"
    torch.testing.assert_close(after.logprobs, fresh.logprobs, rtol=0, atol=1e-5)
    assert torch.equal(after.completion_ids, fresh.completion_ids)
    assert (ways.kept is decoder) == same


def steps(policy: Policy, optim: str, device: str, kind: str):
    """Two steps of an optimizer, on a random sum of log-probabilities."""
    named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[optim](named)

    def change(rollout) -> None:
        for seed in range(2):
            weights = torch.randn(rollout.logprobs.shape, generator=torch.manual_seed(seed))
            with autocast(device, kind):
                score = policy(rollout.with_weights(weights.to(device))).score
            (-score).backward()
            optimizer.step()
            optimizer.zero_grad()

    return change


@everywhere("new weights")
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_graph_sees_the_weights_after_a_step(device, optim, kind):
    policy = Policy(small_gpt2(300).to(device))
    is_seen(policy, device, steps(policy, optim, device, kind), kind)


@everywhere("new weights")
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_graph_sees_the_weights_after_load_state_dict(device, kind):
    policy = Policy(small_gpt2(300).to(device))
    other = {name: 1.2 * weight for name, weight in policy.state_dict().items()}
    is_seen(policy, device, lambda _: policy.load_state_dict(other), kind)


@everywhere("new weights")
@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
def test_a_graph_sees_an_adapter_after_a_step(device, tiny, quantize):
    """Of a model in bf16, 4 bits or 8 bits; that in 8 bits has no graph."""
    torch.manual_seed(0)
    policy = load_policy(
        str(tiny), full_tune=False, quantize=quantize, compute_dtype=torch.bfloat16,
        reference=False, device=device,
    )  # fmt: skip
    with autocast(device, "bf16"):  # bitsandbytes moves weights of 8 bits in their first pass
        sample(kept_backend(policy), device)
    is_seen(policy, device, steps(policy, "adam_mini", device, "bf16"), "bf16")


@everywhere("new weights")
def test_a_graph_sees_an_adapter_merged_and_unmerged(device, tiny):
    torch.manual_seed(0)
    policy = load_policy(str(tiny), full_tune=False, reference=False, device=device)
    change = steps(policy, "adam_mini", device, "fp32")
    is_seen(policy, device, change)
    ways = kept_backend(policy)
    apart = sample(ways, device)
    policy.lm.merge_adapter()
    together = sample(ways, device)
    fresh = sample(kept_backend(policy), device)
    assert torch.equal(together.logprobs, fresh.logprobs)
    torch.testing.assert_close(together.logprobs[:, 0], apart.logprobs[:, 0], rtol=0, atol=1e-3)
    policy.lm.unmerge_adapter()
    again = sample(ways, device)
    torch.testing.assert_close(again.logprobs[:, 0], apart.logprobs[:, 0], rtol=0, atol=1e-3)
