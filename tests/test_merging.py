"""An adapter merged into its base is the adapter, also where the base ties its embedding and head.

Compared with plain transformers and peft.
"""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptiverl.rl.loading import load_policy
from adaptiverl.rl.merging import merged

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:fan_in_fan_out is set to",
    "ignore:Model has `tie_word_embeddings=True`",
)
IDS = torch.arange(20, 40)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(IDS).logits


def of_folder(folder: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def adapter_of(tiny: Path, folder: Path, targets: list[str]) -> Path:
    """An adapter of `tiny` that moves what it computes."""
    torch.manual_seed(1)
    lm = AutoModelForCausalLM.from_pretrained(tiny)
    adapted = get_peft_model(lm, LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


TARGETS = [["lm_head"], ["wte"], ["wte", "lm_head", "c_attn"], ["c_attn"]]


@pytest.mark.parametrize("targets", TARGETS)
def test_a_merged_model_is_its_adapter(tiny, tmp_path, targets):
    adapter = adapter_of(tiny, tmp_path / "adapter", targets)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    want = logits(PeftModel.from_pretrained(base, adapter))
    assert (want - of_folder(tiny)).abs().max() > 0.1, "the adapter does nothing"
    lm = merged(load_policy(str(adapter), full_tune=False), adapter)
    lm.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(of_folder(tmp_path / "merged"), want, rtol=0, atol=1e-4)
    assert lm.config.tie_word_embeddings is (targets == ["c_attn"]), "untied for nothing"


@pytest.mark.parametrize("targets", TARGETS)
def test_all_weights_of_an_adapted_model_are_trained(tiny, tmp_path, targets):
    """And each layer has its own gradient, and its own weight in a checkpoint."""
    adapter = adapter_of(tiny, tmp_path / "adapter", targets)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    want = logits(PeftModel.from_pretrained(base, adapter))
    policy = load_policy(str(adapter))
    torch.testing.assert_close(logits(policy.lm), want, rtol=0, atol=1e-4)
    with policy.as_reference():
        torch.testing.assert_close(logits(policy.lm), want, rtol=0, atol=1e-4)
    policy.lm(IDS).logits.square().mean().backward()
    with torch.no_grad():
        for weight in policy.parameters():
            assert weight.grad is not None
            weight -= 0.1 * weight.grad
    assert (logits(policy.lm) - want).abs().max() > 1e-3, "no step was made"
    policy.save(tmp_path / "checkpoint")
    torch.testing.assert_close(of_folder(tmp_path / "checkpoint"), logits(policy.lm))
    sharded = {f"lm.{name}": weight for name, weight in policy.lm.state_dict().items()}
    policy.save(tmp_path / "sharded", sharded)
    torch.testing.assert_close(of_folder(tmp_path / "sharded"), logits(policy.lm))
    resumed = load_policy(str(adapter), checkpoint=tmp_path / "checkpoint")
    torch.testing.assert_close(logits(resumed.lm), logits(policy.lm))


def test_a_run_of_all_weights_from_an_adapted_head(main, settings, tiny, tmp_path, capsys):
    """It trains, and goes on from its checkpoint."""
    adapter = adapter_of(tiny, tmp_path / "adapter", ["lm_head"])
    keys = settings | {"MODEL": str(adapter), "STEPS": 3, "SAVE_EVERY": 2}
    assert main(keys) == 0, capsys.readouterr().err
    out = Path(settings["OUTPUT_DIR"])
    whole = of_folder(out / "final")
    shutil.rmtree(out / "final")
    assert main(keys | {"RESUME": "auto"}) == 0
    assert torch.equal(of_folder(out / "final"), whole)
