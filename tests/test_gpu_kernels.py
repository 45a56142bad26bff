"""The Triton kernels of sampling beside torch: on a card, or interpreted with TRITON_INTERPRET=1.

What they are for, the samples of a decoder, has its own tests on a card: test_gpu_sampling.py.
"""

import os

import pytest
import torch
from gpu_parts import everywhere, sample, tokens
from test_decode import small_gpt2
from torch.nn.functional import scaled_dot_product_attention

from adaptiverl.rl.policy import Policy
from adaptiverl.rl.sampling.static_cache import StaticCacheBackend, kernels_for
from adaptiverl.rl.sampling.tokens import inverse_cdf_sample_

BF16_ULP = 2**-7  # relative; what interprets kernels truncates
ALMOST_1 = 1 - 2**-53


@pytest.fixture
def kernels(device):
    pytest.importorskip("triton", reason="Triton is not installed")
    if device == "cuda":
        return kernels_for(torch.device(device))
    if "TRITON_INTERPRET" not in os.environ:
        pytest.skip("Triton interprets kernels only with TRITON_INTERPRET=1")
    from adaptiverl.rl.sampling import kernels

    return kernels


@everywhere("kernels")
@pytest.mark.parametrize("width", [48, 192, 768])
@torch.no_grad()
def test_sum_and_norm_are_torchs(kernels, device, width):
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(width, device=device)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, delta = torch.randn(2, 5, 1, width, device=device)
    for given in (delta, delta.bfloat16()):
        total, normed = kernels.add_norm(torch.float32, x, given, norm)
        assert torch.equal(total, x + given)
        torch.testing.assert_close(normed, norm(x + given), rtol=0, atol=2e-6)
        _, short = kernels.add_norm(torch.bfloat16, x, given, norm)
        assert short.dtype == torch.bfloat16
        torch.testing.assert_close(short.float(), normed, rtol=BF16_ULP, atol=0)


@everywhere("kernels")
@pytest.mark.parametrize(
    ("dtype", "size", "columns"),
    [(torch.float32, 48, 64), (torch.float32, 64, 300), (torch.bfloat16, 16, 200)],
)
@torch.no_grad()
def test_attention_is_torchs_and_the_cache_is_written(kernels, device, dtype, size, columns):
    """Beside float64. The first row sees itself alone; slots behind the live ones stay as they are.

    Caches are read in one block of columns, and in several.
    """
    torch.manual_seed(0)
    rows, heads, now = 3, 2, columns - 3
    held = torch.randn(2, rows + 2, heads, columns, size, device=device).to(dtype)
    qkv = torch.randn(rows, 1, 3, heads, size, device=device).to(dtype)
    seen = torch.rand(rows, 1, 1, columns, device=device) < 0.6
    seen[0] = False
    seen[..., now], seen[..., now + 1 :] = True, False
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    expected = held.clone()
    expected[0, :rows, :, now], expected[1, :rows, :, now] = key[:, :, 0], value[:, :, 0]
    keys, values = expected[:, :rows].double()
    exact = scaled_dot_product_attention(query.double(), keys, values, attn_mask=seen)
    attend = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
    own = kernels.attention(qkv, held, attend, torch.tensor([now], device=device))
    assert torch.equal(held, expected) and own.shape == (rows, 1, heads * size)
    near = BF16_ULP if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(own.double(), exact.transpose(1, 2).flatten(2), rtol=near, atol=1e-6)
    assert torch.equal(own[0, 0], qkv[0, 0, 2].flatten())
    # Layers of 8 bits give fp32: then, as under autocast, the result is of the cache's type
    wide = kernels.attention(qkv.float(), held, attend, torch.tensor([now], device=device))
    torch.testing.assert_close(wide, own, rtol=near, atol=1e-6)


@everywhere("kernels")
@pytest.mark.parametrize(("vocabulary", "rows"), [(7, 1), (256, 33), (5000, 64)])
def test_tokens_are_those_of_torchs_draw(kernels, device, vocabulary, rows):
    torch.manual_seed(0)
    logits = torch.randn(vocabulary, rows, device=device) * 3 - 100
    logits[: vocabulary // 2, 0] = -torch.inf  # whole blocks that are never drawn from
    for first in (0.0, ALMOST_1):
        uniform = torch.rand(rows, 2, dtype=torch.float64, device=device)[:, 0]  # not contiguous
        uniform[0] = first
        token, logprob = kernels.inverse_cdf_sample(logits, uniform)
        expected, exact = inverse_cdf_sample_(logits.clone(), uniform)
        assert torch.equal(token, expected) and logits[token[0], 0] > -torch.inf
        torch.testing.assert_close(logprob, exact, rtol=0, atol=2e-6)


@everywhere("kernels")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where it is interpreted
def test_logits_that_are_no_numbers_give_a_token_of_the_vocabulary_and_nan(kernels, device):
    logits = torch.zeros(300, 3, device=device)
    logits[7, 0], logits[:, 1], logits[3, 2] = torch.nan, torch.nan, torch.inf
    uniform = torch.tensor([0.0, 0.5, ALMOST_1], dtype=torch.float64, device=device)
    token, logprob = kernels.inverse_cdf_sample(logits, uniform)
    assert ((token >= 0) & (token < 300)).all() and logprob.isnan().all()


@everywhere("kernels")
@pytest.mark.parametrize("static", [True, False])
def test_a_decoder_samples_the_same_with_them(kernels, device, static):
    """EOS is one word of seven: completions end at all times, and slots move."""
    policy, found = Policy(small_gpt2(7, initializer_range=0.2).to(device)), []
    for chosen in (None, kernels):
        ways = StaticCacheBackend(policy, tokens(device), static)
        ways.kernels = chosen
        found.append([sample(ways, device, rows=5, length=20, seed=seed) for seed in range(2)])
    for own, fast in zip(*found, strict=True):
        assert torch.equal(own.completion_ids, fast.completion_ids)
        torch.testing.assert_close(fast.logprobs, own.logprobs, rtol=0, atol=1e-5)
