"""A 4-bit model under LoRA: the same numbers, and gradients, on every CPU."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from adaptiverl.rl.loading import load_policy, load_tokenizer
from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import uniforms
from adaptiverl.rl.sampling.sampler import Sampler

EMBEDDED = ROOT / "adaptiverl/assets/policy"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama: no bias anywhere, 64 columns, a block of NF4."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = load_tokenizer(str(EMBEDDED))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stored(llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with its weights in 4 bits, as some are published."""
    folder = tmp_path_factory.mktemp("stored")
    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=kind).save_pretrained(folder)
    load_tokenizer(str(llama)).save_pretrained(folder)
    return folder


def measured(policy: Policy, folder: Path) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities of two completions, and the gradient of their sum."""
    sampler = Sampler(policy, load_tokenizer(str(folder)))
    with torch.no_grad():
        rollout = sampler(["This", "The acting in this film"], uniforms(0, 1, 2, 4))
    trained = [p for p in policy.parameters() if p.requires_grad]
    score = policy(rollout.with_weights(rollout.completion_mask.float())).score
    return rollout.logprobs, list(torch.autograd.grad(score, trained))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # peft corrects it itself
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's
@pytest.mark.parametrize("model", ["embedded", "llama", "stored"])
def test_4bit_trains_the_same_with_avx512_bf16_and_without(
    llama, stored, monkeypatch, tmp_path, model
):
    """With it, bitsandbytes would repack weights for inference, which have no gradient."""
    folder = {"embedded": EMBEDDED, "llama": llama, "stored": stored}[model]
    found = []
    for instruction in (False, True):
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda has=instruction: has)
        torch.manual_seed(0)
        quantize = None if model == "stored" else "4bit"
        options = {"full_tune": False, "quantize": quantize, "reference": False}
        policy = load_policy(str(folder), **options)
        found.append(measured(policy, folder))
        assert any(gradient.any() for gradient in found[-1][1])
        policy.save(tmp_path)
        again = load_policy(str(folder), checkpoint=tmp_path, **options)
        assert torch.equal(measured(again, folder)[0], found[-1][0])
    assert torch.equal(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_weights_that_are_stored_in_4_bits_are_not_tuned(stored):
    with pytest.raises(ValueError, match="quantised weights cannot be trained: use LoRA"):
        load_policy(str(stored))
