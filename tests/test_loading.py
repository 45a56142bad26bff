"""Models to start from: adapters that earlier runs left, odd tokenizers, unusual architectures."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl, without_clock
from tokenizers import normalizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2Model,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
)

from adaptiverl.rl.loading import LoraTargetsError, load_policy, load_tokenizer
from adaptiverl.training.inputs import adapters_own
from adaptiverl.training.keys import RunConfig

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
        f"error: LORA_R is 16, but the adapter in MODEL {adapter} has 4 and keeps it: "
        "leave LORA_R out"
    )


def test_a_run_writes_down_the_rank_that_its_adapter_has(main, settings, adapter):
    """And takes that for no change: the keys of the config are others."""
    own = {"LORA_R": 2, "LORA_ALPHA": 6, "LORA_TARGETS": ["c_attn", "c_fc"]}
    out = Path(settings["OUTPUT_DIR"])
    keys = settings | {"FULLTUNE": False, "STEPS": 1}
    assert main(keys | own | {"OUTPUT_DIR": str(out / "first")}) == 0
    keys |= {"MODEL": str(out / "first/final"), "OUTPUT_DIR": str(out / "second")}
    for step in ({}, {"STEPS": 2, "RESUME": "auto"}):
        assert main(keys | step) == 0
        for file in ("config.json", "final/run_config.json"):
            written = json.loads((out / "second" / file).read_text())
            assert written | own == written, file
    assert main(keys | {"FULLTUNE": True}) == 0
    assert json.loads((out / "second/config.json").read_text())["LORA_R"] == 8, "nothing reads it"


def test_an_adapter_of_another_kind_has_no_rank_to_write_down(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert adapters_own(RunConfig(MODEL=str(tmp_path), FULLTUNE=False)) == {}


def test_all_linear_layers_may_get_an_adapter(main, settings):
    assert main(settings | {"FULLTUNE": False, "STEPS": 1}, "LORA_TARGETS=all-linear") == 0
    out = Path(settings["OUTPUT_DIR"])
    assert json.loads((out / "config.json").read_text())["LORA_TARGETS"] == "all-linear"
    targets = json.loads((out / "final/adapter_config.json").read_text())["target_modules"]
    assert {name.rpartition(".")[-1] for name in targets} == {"c_attn", "c_proj", "c_fc"}


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
    assert f"start a new one with MODEL={adapter} and another OUTPUT_DIR" in error


# Odd tokenizers


def tokenizer_that_drops(tiny: Path, folder: Path, text: str) -> Path:
    """The folder of a model whose tokenizer makes nothing of `text`, nor of spaces alone."""
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    steps = [normalizers.Replace(text, ""), normalizers.Strip()]
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence(steps)
    end = tokenizer.eos_token
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end).save_pretrained(folder)
    return folder


def prompts(path: Path, texts: list[str]) -> str:
    path.write_text(json.dumps([{"prompt": text} for text in texts]))
    return str(path)


@pytest.mark.parametrize("key", ["TRAIN_FILE", "EVAL_FILE"])
@pytest.mark.parametrize("text", [" ", "\u200b"])
def test_a_prompt_of_no_tokens_is_told_before_the_first_step(
    main, settings, tiny, tmp_path, capsys, key, text
):
    """Beyond the first 256, of which lengths are looked at."""
    model = tokenizer_that_drops(tiny, tmp_path / "model", "\u200b")
    file = prompts(tmp_path / "a.json", ["This", "!"] * 150 + [text])
    assert main(settings | {"MODEL": str(model)} | {key: file}) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {file}: the tokenizer makes no token of the prompt {text!r} (to start from "
        "nothing, write the model's beginning-of-text token)"
    )
    assert not Path(settings["OUTPUT_DIR"]).exists()


def test_a_prompt_of_words_but_no_tokens_is_told_when_it_is_met(
    main, settings, tiny, tmp_path, capsys
):
    model = tokenizer_that_drops(tiny, tmp_path / "model", "xyz")
    file = prompts(tmp_path / "a.json", ["This"] * 256 + ["xyz"] * 800)
    assert main(settings | {"MODEL": str(model), "TRAIN_FILE": file}) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: prompt: the tokenizer makes no token of the prompt 'xyz' (")


def test_a_pad_token_that_the_model_lacks_is_none(main, settings, tiny, tmp_path):
    """What pads is masked: another token does not change a number."""
    rows = []
    for pad in (None, "[PAD]"):
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        if pad:
            tokenizer.add_special_tokens({"pad_token": pad})
        folder = tmp_path / f"model{pad}"
        shutil.copytree(tiny, folder)
        tokenizer.save_pretrained(folder)
        assert main(settings | {"MODEL": str(folder)}) == 0
        out = Path(settings["OUTPUT_DIR"])
        rows.append(without_clock(read_jsonl(out / "metrics.jsonl")))
        saved = AutoTokenizer.from_pretrained(out / "final")
        assert saved.pad_token_id == saved.eos_token_id
    assert rows[0] == rows[1]


def test_a_prompt_of_tokens_that_the_model_lacks(main, settings, tiny, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<chat>"])
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    tokenizer.save_pretrained(folder)
    file = prompts(tmp_path / "a.json", ["This", "<chat> is it"] * 3)
    assert main(settings | {"MODEL": str(folder), "TRAIN_FILE": file}) == 2
    words = len(tokenizer) - 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: prompt: the prompt '<chat> is it' has the token '<chat>' ({words}), but the model "
        f"has {words} tokens: it does not belong to this tokenizer"
    )


def test_an_end_of_text_that_the_model_lacks(main, settings, tiny, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    tokenizer.save_pretrained(folder)
    assert main(settings | {"MODEL": str(folder)}) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: MODEL {folder}: its tokenizer ends texts with '[END]', token ")


# What is no policy


def test_weights_that_are_cut_short(main, settings, tiny, tmp_path, capsys):
    """As a download that broke off."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    assert main(settings | {"MODEL": str(folder)}) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    start = f"error: MODEL {folder}: a .safetensors file is damaged or cut short ("
    assert error.startswith(start) and error.endswith("): get it anew")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (T5Config(architectures=["T5ForConditionalGeneration"]), "T5ForConditionalGeneration"),
        (BartConfig(), "bart"),
    ],
)
def test_a_model_with_an_encoder(main, settings, tmp_path, capsys, config, name):
    config.save_pretrained(tmp_path / "model")
    assert main(settings | {"MODEL": str(tmp_path / "model")}) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: MODEL {tmp_path / 'model'}: it is not a decoder-only causal language model "
        f"({name}): name one, as GPT-2, Llama and Qwen are"
    )


def test_a_model_without_its_output_layer_is_refused(main, settings, tmp_path, capsys):
    """transformers would make one of random numbers."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, tie_word_embeddings=False)
    GPT2Model(config).save_pretrained(tmp_path / "model")
    load_tokenizer(settings["MODEL"]).save_pretrained(tmp_path / "model")
    assert main(settings | {"MODEL": str(tmp_path / "model")}) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: MODEL {tmp_path / 'model'}: its files lack weights, which would be random: "
        "lm_head.weight. Name a model that was trained to write, with its output layer"
    )


SMALL = {"hidden_size": 32, "num_hidden_layers": 2}
OTHERS = [
    (
        BertLMHeadModel,
        BertConfig(intermediate_size=32, num_attention_heads=2, initializer_range=0.3, **SMALL),
        "it is not a decoder-only causal language model (BertLMHeadModel): what it says of a token "
        "depends on later ones",
    ),
    (
        RwkvForCausalLM,
        RwkvConfig(attention_hidden_size=32, context_length=64, **SMALL),
        "RwkvForCausalLM ignores the attention mask, so that its padding changes what it says of a "
        "prompt: it cannot be trained here",
    ),
]


@pytest.mark.parametrize(("kind", "config", "message"), OTHERS)
def test_a_model_that_heeds_what_it_must_not(
    main, settings, tiny, tmp_path, capsys, kind, config, message
):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(tmp_path / "model")
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / "model")
    assert main(settings | {"MODEL": str(tmp_path / "model")}) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: MODEL {tmp_path / 'model'}: {message}"


# Unusual architectures


@pytest.fixture
def llama4(tiny, tmp_path) -> str:
    """Its `base_model` is itself: it names a part that it does not have."""
    folder = tmp_path / "llama4"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=None,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Llama4ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_a_model_that_is_its_own_base(main, settings, llama4):
    assert main(settings | {"MODEL": llama4}) == 0
    metrics = read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 for row in metrics)
    gaps = [row["sampling/sampling_logp_difference/max"] for row in metrics]
    assert max(gaps) < 1e-3


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (None, "peft has no layers in mind for a model of type llama4_text."),
        (["q"], "the model has no module q."),
        (["q_proj", "c_attn"], "the model has no module c_attn."),
    ],
)
def test_layers_for_adapters_that_have_to_be_named(main, settings, llama4, capsys, targets, reason):
    assert main(settings | {"MODEL": llama4, "FULLTUNE": False, "LORA_TARGETS": targets}) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: LORA_TARGETS: {reason}")
    assert error.endswith(
        "Name some of down_proj, gate_proj, k_proj, o_proj, q_proj, router, up_proj, v_proj"
    )


MAMBA = MambaConfig(vocab_size=99, hidden_size=16, state_size=4, num_hidden_layers=1)
MIXTRAL = MixtralConfig(
    vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "targets", "reason", "names"),
    [
        (MAMBA, None, "peft has no layers in mind for a model of type mamba.", {"in_proj"}),
        (MAMBA, ["in_proj", "out_proj"], "[PEFT:PeftType.LORA] Module 'out_proj'", {"in_proj"}),
        (MIXTRAL, None, "peft has no layers in mind for a model of type mixtral.", {"q_proj"}),
    ],
)
def test_layers_that_are_suggested_for_adapters_are_taken(tmp_path, config, targets, reason, names):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    given = {"r": 1, "lora_alpha": 1, "target_modules": targets}
    with pytest.raises(LoraTargetsError) as caught:
        load_policy(str(tmp_path), full_tune=False, lora=given)
    said, _, named = str(caught.value).partition(" Name some of ")
    assert said.startswith(reason) and names <= set(named.split(", "))
    suggested = given | {"target_modules": named.split(", ")}
    policy = load_policy(str(tmp_path), full_tune=False, lora=suggested)
    assert any(parameter.requires_grad for parameter in policy.parameters())
