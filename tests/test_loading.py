"""Models to start from: adapters that earlier runs left, odd tokenizers, unusual architectures."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl, without_clock
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False"  # peft corrects it itself
)


@pytest.fixture
def adapter(main, settings) -> Path:
    """The checkpoint of a LoRA run of two steps that moved the policy."""
    keys = {"FULLTUNE": False, "STEPS": 2, "LRATE": 0.1, "LR_RULE": "none", "LORA_R": 4}
    out = Path(settings["OUTPUT_DIR"]).with_name("adapter")
    assert main(settings | keys | {"OUTPUT_DIR": str(out)}) == 0
    return out / "final"


def logprobs(model: torch.nn.Module, folder: Path, row: dict) -> list[float]:
    """Of a sample's completion, by the library, in one unpadded pass."""
    prompt = AutoTokenizer.from_pretrained(folder)(row["prompt"]).input_ids
    ids = torch.tensor([prompt + row["completion_ids"]])
    with torch.no_grad():
        table = model(ids).logits[0].log_softmax(-1)
    return [table[len(prompt) - 1 + t, i].item() for t, i in enumerate(row["completion_ids"])]


@pytest.mark.parametrize("full", [True, False])
def test_a_run_starts_from_an_adapter_and_is_compared_with_it(
    main, settings, tiny, adapter, full, capsys
):
    """Its first samples are those of the adapted policy, to which its KL is measured."""
    out = Path(settings["OUTPUT_DIR"])
    keys = settings | {"MODEL": str(adapter), "FULLTUNE": full, "SAVE_EVERY": 2, "STEPS": 4}
    assert main(keys) == 0, capsys.readouterr().err
    metrics, samples = (read_jsonl(out / name) for name in ("metrics.jsonl", "samples.jsonl"))
    adapted = AutoModelForCausalLM.from_pretrained(adapter).eval()
    base = AutoModelForCausalLM.from_pretrained(tiny).eval()
    for row in samples[:4]:
        assert row["logprobs"] == pytest.approx(logprobs(adapted, tiny, row), abs=1e-4)
        assert row["logprobs"] != pytest.approx(logprobs(base, tiny, row), abs=1e-2)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    for row in [row for row in samples if row["step"] == 3]:  # the reference stays where it was
        row["reference"] = logprobs(adapted, tiny, row)
    third = [row for row in samples if row["step"] == 3]
    kl = [sum(row["logprobs"]) - sum(row["reference"]) for row in third]
    assert metrics[2]["kl_per_completion"] == pytest.approx(sum(kl) / len(kl), abs=1e-3)
    assert abs(metrics[2]["kl_per_completion"]) > 1e-3, "the policy did not move"
    trained = AutoModelForCausalLM.from_pretrained(out / "final").eval()
    assert logprobs(trained, tiny, third[0]) != third[0]["reference"]
    assert not (out / "final" / "reference").exists(), "the reference was saved too"

    shutil.rmtree(out / "final")
    assert main(keys | {"RESUME": "auto"}) == 0
    assert without_clock(read_jsonl(out / "metrics.jsonl")) == without_clock(metrics)


def test_an_adapter_goes_on_with_the_rank_that_it_has(main, settings, adapter, capsys):
    keys = settings | {"MODEL": str(adapter), "FULLTUNE": False, "STEPS": 1}
    assert main(keys | {"LORA_R": 4, "LORA_TARGETS": ["c_attn"]}) == 0
    assert main(keys | {"LORA_R": 16, "LORA_ALPHA": 32}) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: LORA_R is 16, but the adapter in MODEL {adapter} has 4 and goes on as it is: "
        "leave LORA_R out"
    )


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(main, settings, adapter):
    for file in adapter.glob("tokenizer*"):
        file.unlink()
    assert main(settings | {"MODEL": str(adapter), "STEPS": 1}) == 0


def test_an_adapter_whose_base_is_gone(main, settings, adapter, capsys):
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": "./nowhere/model"}
    file.write_text(json.dumps(config))
    assert main(settings | {"MODEL": str(adapter)}) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: MODEL {adapter}: there is no folder ./nowhere/model, on which its adapter was "
        "trained"
    )


def test_a_lora_run_that_is_resumed_otherwise_is_told_to_start_from_its_checkpoint(
    main, settings, adapter, capsys
):
    keys = {"FULLTUNE": False, "STEPS": 3, "LRATE": 0.2, "LR_RULE": "none", "LORA_R": 4}
    keys |= {"RESUME": "auto", "OUTPUT_DIR": str(adapter.parent)}
    assert main(settings | keys) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"start a new run with MODEL={adapter} and another OUTPUT_DIR" in error
