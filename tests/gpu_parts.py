"""What the tests of `make gpu` share: their marks, and a small policy on any device.

Many have a twin on the CPU, so that what they do is tried where there is no card. With
TRY_WITHOUT_CARD=1 the others run there, too, as far as they go. Leaves out the command:
benchmarks/gpu.py.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_decode import EOS, PROMPTS

from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import Rollout, uniforms
from adaptiverl.rl.sampling.sampler import Backend
from adaptiverl.rl.sampling.static_cache import StaticCacheBackend
from adaptiverl.rl.sampling.tokens import TokenSampler

CARD = torch.cuda.is_available()
needs_card = pytest.mark.skipif(
    not CARD and "TRY_WITHOUT_CARD" not in os.environ, reason="there is no CUDA card"
)
WHERE = "cuda" if CARD else "cpu"  # of what only a card is meant to run


def on_card(item: str) -> Callable[[Any], Any]:
    """A test that only a card can run, of the row `item` of the table."""
    return lambda test: pytest.mark.gpu(item)(needs_card(test))


def everywhere(item: str) -> pytest.MarkDecorator:
    """A test that the CPU runs in the suite, and a card in the row `item` of the table."""
    card = pytest.param("cuda", marks=[pytest.mark.gpu(item), needs_card])
    return pytest.mark.parametrize("device", ["cpu", card])


def tokens(device: str, **settings: Any) -> TokenSampler:
    return TokenSampler(torch.tensor([EOS], device=device), EOS, **settings)


def kept_backend(policy: Policy, **settings: Any) -> StaticCacheBackend:
    """As on CUDA: its decoder is kept, and has graphs there. `settings` are TokenSampler's."""
    return StaticCacheBackend(policy, tokens(policy.device.type, **settings), static=True)


def sample(ways: Backend, device: str, rows: int = 8, length: int = 24, seed: int = 0) -> Rollout:
    """Completions of PROMPTS, which have different lengths."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[EOS] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    of = torch.arange(rows) % len(PROMPTS)
    with torch.no_grad():
        inputs = (ids, mask, of, uniforms(seed, 1, rows, length))
        return ways(*(x.to(device) for x in inputs))
