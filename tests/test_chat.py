"""Chat models: templates, stop strings and ends of turns, what rewards get, what people read."""

import io
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, in_this_process, read_jsonl, without_clock
from datasets import Dataset
from jinja2 import Environment
from safetensors.torch import load_file
from test_distributed import TWO_PROCESSES
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from adaptiverl.__main__ import main as adaptiverl
from adaptiverl.config.loading import load_config
from adaptiverl.rl.chat import PromptError, given_prompt, readable
from adaptiverl.rl.data import load_prompts
from adaptiverl.rl.loading import load_policy, load_tokenizer
from adaptiverl.rl.rollout import Rollout, uniforms
from adaptiverl.rl.sampling.generate import GenerateBackend
from adaptiverl.rl.sampling.sampler import BACKENDS, Sampler, eos_ids
from adaptiverl.rl.sampling.static_cache import StaticCacheBackend
from adaptiverl.rl.sampling.stop import StopStrings
from adaptiverl.rl.sampling.tokens import TokenSampler
from adaptiverl.training.keys import RunConfig
from rewards.messages import transcript

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TEMPLATES = {"llama": LLAMA, "qwen": CHATML, "gpt2": CHATML}
TURN_ENDS = {"llama": "<|eot_id|>", "qwen": "<|im_end|>", "gpt2": "<|im_end|>"}
SYSTEM = "Be brief."


def user(*contents: str) -> list[dict[str, str]]:
    """A conversation of a user, who speaks first and last, with an assistant."""
    roles = ["user", "assistant"] * len(contents)
    return [{"role": r, "content": text} for r, text in zip(roles, contents, strict=False)]


ROWS = [
    {"prompt": user("This?"), "reference": "a film"},
    {"prompt": user("What is the acting in this film like, and why?"), "reference": "good"},
    {"prompt": [{"role": "system", "content": "Be long."}, *user("Well")], "reference": "no"},
    {"prompt": user("One of the best", "What?", "The film"), "reference": "yes"},
]


def make(kind: str, folder: Path) -> Path:
    """A random model of two layers with a chat template, whose log-probabilities tell positions."""
    backend = AutoTokenizer.from_pretrained(ROOT / "adaptiverl/assets/policy").backend_tokenizer
    names = {"eos_token": "<|endoftext|>"}
    marks = ["<|im_start|>", "<|im_end|>"]
    if kind == "llama":
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        marks = [*names.values(), "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend.add_special_tokens(marks)
    if kind == "llama":  # texts begin with a BOS token, as do all conversations by the template
        bos = names["bos_token"]
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = TEMPLATES[kind]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    eos = tokenizer.eos_token_id
    ids = {"bos_token_id": eos, "eos_token_id": eos, "vocab_size": len(tokenizer)}
    small = {"initializer_range": 0.3, **ids}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 96,
    }
    if kind == "gpt2":
        lm: Any = GPT2LMHeadModel(
            GPT2Config(n_positions=96, n_embd=32, n_layer=2, n_head=2, **small)
        )
    elif kind == "qwen":
        lm = Qwen2ForCausalLM(Qwen2Config(**sizes, **small))
    else:
        lm = LlamaForCausalLM(LlamaConfig(**sizes, **small))
        lm.generation_config.eos_token_id = [eos, tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    lm.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def model(kind: str) -> str:
        if kind not in made:
            made[kind] = str(make(kind, tmp_path_factory.mktemp(kind)))
        return made[kind]

    return model


@pytest.fixture
def keys(settings, models, tmp_path) -> dict[str, Any]:
    """A run of a second that trains a Qwen on conversations."""
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(ROWS))
    return settings | {"MODEL": models("qwen"), "TRAIN_FILE": str(path)}


@pytest.fixture
def sampler(models) -> Callable[..., Sampler]:
    def make_sampler(kind: str, **options) -> Sampler:
        return Sampler(load_policy(models(kind)), load_tokenizer(models(kind)), **options)

    return make_sampler


def unpadded(model: str, prompt: list[dict], completion: list[int]) -> list[float]:
    """The slow reference, by transformers alone: log-probabilities of one completion."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    ids = torch.tensor([asked["input_ids"] + completion])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(ids).logits[0]
    table = logits[-len(completion) - 1 : -1].log_softmax(-1)
    return table.gather(-1, ids[0, -len(completion) :, None])[:, 0].tolist()


# Runs


@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
def test_a_chat_model_trains_from_end_to_end(main, keys, models, tmp_path, kind):
    """Three steps; log-probabilities are those of a pass without padding over the template."""
    keys |= {"MODEL": models(kind), "SYSTEM": SYSTEM, "EVAL_FILE": keys["TRAIN_FILE"]}
    assert main(keys | {"EVAL_EVERY": 3}) == 0
    samples = read_jsonl(tmp_path / "run/samples.jsonl")
    asked = [given_prompt(row["prompt"], SYSTEM) for row in ROWS]
    assert len(samples) == 24 and all(row["prompt"] in asked for row in samples)
    assert {row["prompt"][0]["content"] for row in samples} == {SYSTEM, "Be long."}
    first = [row for row in samples if row["step"] == 1]
    assert len({row["prompt"][-1]["content"] for row in first}) == 2, "or nothing is padded"
    tokenizer = AutoTokenizer.from_pretrained(models(kind))
    for row in first[::3]:
        want = unpadded(models(kind), row["prompt"], row["completion_ids"])
        assert row["logprobs"] == pytest.approx(want, abs=1e-4)
        text = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert row["completion"] == text
    metrics = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert len(metrics) == 3 and all(row["grad_norm"] > 0 for row in metrics)
    assert metrics[-1]["eval/reward"] is not None
    before, after = (
        load_file(Path(each, "model.safetensors"))
        for each in (models(kind), tmp_path / "run/final")
    )
    assert any(not torch.equal(before[name], after[name]) for name in after)
    again = AutoTokenizer.from_pretrained(tmp_path / "run/final")
    assert again.chat_template == TEMPLATES[kind]


def test_after_a_run_lines_are_messages_and_a_chat_remembers(
    main, keys, tmp_path, monkeypatch, capsys
):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert main(keys | {"STEPS": 1, "SYSTEM": SYSTEM, "STOP": ["zzz"]}) == 0
    run = str(tmp_path / "run")
    capsys.readouterr()
    with in_this_process():
        assert adaptiverl(["generate", run, "Hello", "-n", "1"]) == 0
        one = capsys.readouterr().out
        assert f"> system: {SYSTEM}\nuser: Hello\n" in one
        monkeypatch.setattr("sys.stdin", Terminal("Hello\nAnd then?\n"))
        assert adaptiverl(["generate", run]) == 0
        first, second = capsys.readouterr().out.split("\n> system: ")[1:]
        answer = first.split("\n[1] ")[1].split("\n    reward")[0]
        turns = second.replace("assistant:  ", "assistant: ")  # a first space is not shown
        assert f"user: Hello\nassistant: {answer}\nuser: And then?\n" in turns
        assert adaptiverl(["export", run, str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["stop_strings"] == [
        "zzz"
    ]


def test_the_code_of_the_card_asks_as_the_run_did(main, keys, tmp_path):
    """A conversation after SYSTEM, which stop strings end."""
    system = 'Say "hi" 🎬 <b>'
    assert main(keys | {"STEPS": 1, "SYSTEM": system, "STOP": ["e", "t"]}) == 0
    with in_this_process():
        assert adaptiverl(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(card.split("```python\n")[1].split("```")[0], names)
    tokenizer = load_tokenizer(keys["MODEL"])
    asked = [{"role": "system", "content": system}, *user("Your prompt")]
    assert tokenizer.decode(names["inputs"].input_ids[0]) == tokenizer.apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    assert names["output"].shape[1] > names["inputs"].input_ids.shape[1]
    assert "keeps the stop string that ended it, which the rewards did not see.\n\n## Data" in card


def test_a_chat_that_is_full_begins_anew(main, keys, tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert main(keys | {"STEPS": 1}) == 0
    capsys.readouterr()
    lines = ["One " * 30, "Two " * 30, "Three " * 100, "   ", "Four"]
    monkeypatch.setattr("sys.stdin", Terminal("\n".join(lines)))
    with in_this_process():
        assert adaptiverl(["generate", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    shown = [each.split("\n[1]")[0] for each in out.split("\n> user: ")[1:]]
    assert len(shown) == 3 and shown[:2] == ["One " * 30, "Two " * 30]
    assert shown[2].startswith(shown[1] + "\nassistant: ") and shown[2].endswith("\nuser: Four")
    assert err.splitlines()[2:] == [
        "The conversation is full: this line begins a new one.",
        "This line does not fit the model's context: shorten it.",
    ]


def test_a_resumed_run_is_the_uninterrupted_one(main, keys, tmp_path):
    keys |= {"SYSTEM": SYSTEM, "STOP": ["e"], "TRUST_REGION_SCHEDULE": "constant"}
    outputs = []
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        folder = tmp_path / name
        for last in steps:
            run = keys | {"OUTPUT_DIR": str(folder), "STEPS": last, "RESUME": "auto"}
            assert main(run) == 0
        metrics = without_clock(read_jsonl(folder / "metrics.jsonl"))
        outputs.append(
            (
                metrics,
                read_jsonl(folder / "samples.jsonl"),
                load_file(folder / "final/model.safetensors"),
            )
        )
    (metrics, samples, weights), (again, same, final) = outputs
    assert metrics == again and samples == same
    assert all(torch.equal(weights[name], final[name]) for name in weights)
    assert any("e" not in row["completion"] for row in samples)


def test_two_processes_sample_what_one_does(main, run, keys, tmp_path):
    # AdamW's first steps turn rounding errors into whole steps
    keys |= {"SYSTEM": SYSTEM, "STOP": ["the"], "STEPS": 2, "OPTIM": "sgd", "LRATE": 1e-2}
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert main(keys | {"OUTPUT_DIR": one}) == 0
    result = run(keys | {"OUTPUT_DIR": two}, launcher=TWO_PROCESSES)
    assert result.returncode == 0, result.stderr
    names = ("prompt", "completion", "completion_ids")
    samples = [read_jsonl(Path(each) / "samples.jsonl") for each in (one, two)]
    for left, right in zip(*samples, strict=True):
        assert [left[name] for name in names] == [right[name] for name in names]


def test_a_dry_run_shows_turns_without_markup(main, keys, capsys):
    assert main(keys | {"SYSTEM": SYSTEM}, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "…" not in shown.split("user: This?")[0].split("\n")[-1]
    assert "system: Be brief. user: This?" in shown
    assert "<|im_start|>" not in shown and "'role'" not in shown
    assert " in this film like, and why?" in shown, "the end of what is too long"


def blocks(language: str) -> str:
    """The block of docs/chat.md in this language."""
    return (ROOT / "docs/chat.md").read_text().split(f"```{language}\n")[1].split("```")[0]


def test_the_example_of_the_documentation(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(blocks("json"))
    assert load_config(path, schema=RunConfig).STOP == ["\n\n"]
    names: dict[str, Any] = {}
    exec(blocks("python"), names)
    answers = [[{"role": "assistant", "content": text}] for text in ("It is 84.", "Five")]
    assert names["correct"](answers, answer=["84", "4"]) == [1.0, 0.0]
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(blocks("jinja"))
    assert template.render(messages=user("Hi", "Ho", "So?")) == (
        "user: Hi\nassistant: Ho\nuser: So?\nassistant:"
    )


def test_a_base_model_is_given_a_template_and_stop_strings(main, settings, keys, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text(blocks("jinja"))
    keys |= {"MODEL": settings["MODEL"], "CHAT_TEMPLATE": str(template), "STOP": ["\n", "user:"]}
    assert main(keys) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/final")
    assert tokenizer.chat_template == template.read_text()
    samples = read_jsonl(tmp_path / "run/samples.jsonl")
    assert not any("\n" in row["completion"] for row in samples)
    template.unlink()  # the run has kept it
    with in_this_process():
        asked = ["generate", "Hello", "-n", "1", "--base"]
        for words in (asked, ["export", str(tmp_path / "out")]):
            assert adaptiverl([words[0], str(tmp_path / "run"), *words[1:]]) == 0
    assert (tmp_path / "out/chat_template.jinja").exists()


INSTRUCTIONS = ROOT.parent / "shared/data/instruction/instruction-data.json"


@pytest.mark.skipif(not INSTRUCTIONS.exists(), reason="the data set is not part of the repository")
def test_a_data_set_of_whole_conversations(main, keys, tmp_path):
    """TRL's column `messages`: the last answer is not given to the model, rewards may read it."""
    rows = []
    for row in json.loads(INSTRUCTIONS.read_text()):
        asked = f"{row['instruction']}\n{row['input']}".strip()
        if len(asked) < 80:
            rows.append({"messages": user(asked, row["output"])})
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps(rows))
    cosine = {"TYPE": "python", "FUNCTION": "test_chat:longer_than_the_answer"}
    keys |= {"TRAIN_FILE": str(path), "PROMPT_COLUMN": "messages", "REWARDS": [cosine]}
    assert len(rows) > 400 and main(keys | {"STEPS": 2}) == 0
    for sample in read_jsonl(tmp_path / "run/samples.jsonl"):
        assert [message["role"] for message in sample["prompt"]] == ["user"]
        (row,) = [row for row in rows if row["messages"][0] == sample["prompt"][0]][:1]
        assert sample["reward"] == len(sample["completion"]) - len(row["messages"][1]["content"])


def longer_than_the_answer(completions, messages, **_):
    pairs = zip(completions, messages, strict=True)
    return [len(ours[0]["content"]) - len(theirs[-1]["content"]) for ours, theirs in pairs]


# The template


def test_conversations_have_the_templates_tokens_and_one_bos(sampler, models):
    llama = sampler("llama")
    own = AutoTokenizer.from_pretrained(models("llama"))
    prompts = [row["prompt"] for row in ROWS]
    rollout = llama([*prompts, prompts[0]], uniforms(0, 1, 5, 4))
    assert len(rollout.prompt_ids) == 4, "each prompt once"
    assert rollout.prompt_of.tolist() == [0, 1, 2, 3, 0]
    ids = [
        row[mask.bool()].tolist()
        for row, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    ]
    want = own.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)
    assert ids == want["input_ids"]
    assert [row.count(own.bos_token_id) for row in ids] == [1] * 4
    text = llama(["This"], uniforms(0, 1, 1, 4)).prompt_ids[0].tolist()
    assert text == own("This").input_ids and text.count(own.bos_token_id) == 1


def test_a_text_that_begins_with_bos_is_given_one(sampler):
    """Where the tokenizer adds it and where it does not."""
    for kind, adds in (("llama", True), ("gpt2", False)):
        ours = sampler(kind)
        bos, one = ours.tokenizer.bos_token or ours.tokenizer.eos_token, uniforms(0, 1, 1, 4)
        ours.tokenizer.bos_token = bos
        marked = ours([f"{bos}This film"], one)
        plain = ours(["This film"], one).prompt_ids[0].tolist()
        first = ours.tokenizer.bos_token_id
        assert plain.count(first) == adds
        assert marked.prompt_ids[0].tolist() == (plain if adds else [first, *plain])
        two = ours([f"{bos}{bos}This film"], one).prompt_ids[0].tolist()
        assert two.count(first) == 2, "as it was written"


@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
def test_a_turns_end_ends_a_completion(sampler, models, kind):
    """Also where neither tokenizer nor generation config names it, as in a base Qwen.

    The model takes the end of the turn for a token that it would write.
    """
    greedy = sampler(kind, top_k=1)
    tokenizer, lm = greedy.tokenizer, greedy.policy.lm
    named = (
        {"<|endoftext|>", "<|im_end|>"} if kind != "llama" else {"<|end_of_text|>", "<|eot_id|>"}
    )
    ends = eos_ids(greedy.policy, tokenizer).tolist()
    assert {tokenizer.decode([token]) for token in ends} == named
    prompts, numbers = [row["prompt"] for row in ROWS[:2]], uniforms(0, 1, 2, 8)
    free = greedy(prompts, numbers).tokens()
    end, row = tokenizer.convert_tokens_to_ids(TURN_ENDS[kind]), free[0]
    place = next(n for n in range(2, 8) if row[n] not in row[:n])
    if kind == "gpt2":  # its head is its embedding
        lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach().clone())
    head = lm.lm_head.weight.data
    head[[row[place], end]] = head[[end, row[place]]]
    ended = Sampler(greedy.policy, tokenizer, top_k=1)(prompts, numbers)
    assert ended.tokens()[0] == [*row[:place], end]
    assert ended.completion_mask[0].sum() == place + 1 < ended.completion_mask.shape[1]
    assert greedy.decode(ended)[0] == tokenizer.decode(row[:place])


# Stop strings


def stopped(
    way: str, chat: Sampler, stop: list[str], prompts: list, numbers
) -> tuple[Rollout, list[str]]:
    """The completions by one of the backends, and their text."""
    policy, tokenizer = chat.policy, chat.tokenizer
    static = way == "static"
    ours = Sampler(policy, tokenizer, stop=stop, backend="static_cache" if static else way)
    if static:  # as on CUDA: buffers are kept, slots move every 16 tokens
        ours.backend = StaticCacheBackend(policy, ours.backend.token_sampler, static=True)
        ours(prompts[::-1], numbers)  # and leave something behind
    rollout = ours(prompts, numbers)
    return rollout, ours.decode(rollout)


def sizes_of(tokenizer, ids: list[int]) -> list[int]:
    """The characters of the text after each number of tokens."""
    return [len(tokenizer.decode(ids[:n])) for n in range(len(ids) + 1)]


def stop_string(kind: str, tokenizer, ids: list[int]) -> str:
    """A string of the text of `ids` that has the property `kind`."""
    text, sizes = tokenizer.decode(ids), sizes_of(tokenizer, ids)
    long = [n for n, (a, b) in enumerate(pairwise(sizes)) if b - a > 2]
    match kind:
        case "one token":
            return text[sizes[5] : sizes[6]]
        case "several tokens":
            return text[sizes[4] : sizes[7]]
        case "ends inside a token":
            n = next(n for n in long if n > 2)
            return text[sizes[n - 1] : sizes[n] + 1]
        case "begins and ends inside tokens":
            place = sizes[next(n for n in long if n > 2 and n - 1 in long)]
            return text[place - 1 : place + 2]
        case "the first token":
            return text[: sizes[1]]
        case _:
            return "never§"


KINDS = [
    "one token", "several tokens", "ends inside a token", "begins and ends inside tokens",
    "the first token", "never",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_end_masks_at_the_right_token(sampler, kind):
    """That is the first one after which the text has the string; all backends agree."""
    chat = sampler("gpt2")
    prompts, numbers = [row["prompt"] for row in ROWS] * 2, uniforms(0, 1, 8, 24)
    free = chat(prompts, numbers)
    tokenizer, ids = chat.tokenizer, free.tokens()
    # the first of which the text is no part of a character
    own = next(n for n, row in enumerate(ids) if "�" not in tokenizer.decode(row[:16]))
    string = stop_string(kind, tokenizer, ids[own][:16])
    ends = [
        next((n for n in range(1, len(row)) if string in tokenizer.decode(row[:n])), len(row))
        for row in ids
    ]
    text, sizes = tokenizer.decode(ids[own]), sizes_of(tokenizer, ids[own])
    begin = text.find(string)
    if kind == "never":
        assert ends == [len(row) for row in ids]
    else:
        assert ends[own] < 16
        assert (begin in sizes) == (kind != "begins and ends inside tokens")
        assert (begin + len(string) in sizes) == ("ends inside" not in kind)
        assert (ends[own] == 1) == (kind == "the first token")
    for way in (*BACKENDS, "static"):
        rollout, texts = stopped(way, chat, [string, "another§"], prompts, numbers)
        assert rollout.tokens() == [row[:end] for row, end in zip(ids, ends, strict=True)], way
        full = [tokenizer.decode(row, skip_special_tokens=True) for row in rollout.tokens()]
        assert texts == [each.split(string)[0] for each in full]
        for row, end in enumerate(ends):
            assert rollout.logprobs[row, :end] == pytest.approx(free.logprobs[row, :end], abs=1e-4)
            assert rollout.logprobs[row, end:].tolist() == [0.0] * (rollout.logprobs.shape[1] - end)


def test_rows_that_move_take_their_last_tokens_along(sampler):
    """Of 32 completions each ends at its own time, by a string of three tokens."""
    chat = sampler("gpt2")
    prompts, numbers = [row["prompt"] for row in ROWS] * 8, uniforms(0, 5, 32, 24)
    ids, decode = chat(prompts, numbers).tokens(), chat.tokenizer.decode
    parts = [row[2 + n // 2 : 5 + n // 2] for n, row in enumerate(ids)]
    strings = [text for part in parts if "�" not in (text := decode(part)) and len(part) == 3]
    ends = [
        next(
            (n for n in range(1, len(row)) if any(x in decode(row[:n]) for x in strings)), len(row)
        )
        for row in ids
    ]
    assert len(set(ends)) > 8
    for way in ("static_cache", "static"):
        rollout, _ = stopped(way, chat, strings, prompts, numbers)
        assert rollout.tokens() == [row[:end] for row, end in zip(ids, ends, strict=True)], way


def test_what_ends_with_its_last_token_is_not_truncated(sampler):
    """By an end of text or a stop string; what is only as long as it may be, is."""
    chat = sampler("gpt2")
    tokenizer, policy = chat.tokenizer, chat.policy
    (dot,) = tokenizer(".").input_ids
    ids = torch.tensor([[5, 6, tokenizer.eos_token_id], [5, 6, 7], [5, 6, dot], [5, dot, 0]])
    mask = torch.ones_like(ids)
    mask[3, 2] = 0
    rollout = Rollout(ids[:1], mask[:1], torch.zeros(4).long(), ids, mask, torch.zeros(4, 3))
    assert chat.truncated(rollout).tolist() == [False, True, True, True]
    stopping = Sampler(policy, tokenizer, stop=["."])
    assert stopping.truncated(rollout).tolist() == [False, True, False, False]


def test_a_stop_string_begins_in_its_own_completion(sampler):
    """Not in the prompt, whose template ends with a new line, nor in an earlier rollout."""
    chat = sampler("gpt2")
    prompts = [user("§ the end §"), *(row["prompt"] for row in ROWS)]
    before, numbers = uniforms(0, 3, 5, 6), uniforms(0, 4, 5, 6)
    earlier, free = chat(prompts, before).tokens(), chat(prompts, numbers)
    decode = chat.tokenizer.decode
    firsts = [decode(row[:1]) for row in free.tokens()]
    lasts = [decode(row[-1:]) for row in earlier]
    whole = [n for n in range(5) if "�" not in lasts[n] + firsts[n]]
    stop = ["§", "assistant\n", *("\n" + firsts[n] for n in whole)]
    stop += [lasts[n] + firsts[n] for n in whole]
    texts = [decode(row) for row in [*earlier, *free.tokens()]]
    assert whole and not any(string in text for string in stop for text in texts)
    ours = Sampler(chat.policy, chat.tokenizer, stop=stop)
    how = ours.backend.token_sampler
    static = StaticCacheBackend(chat.policy, how, static=True)
    for backend in (static, GenerateBackend(chat.policy, how)):
        ours.backend = backend
        assert ours(prompts, before).tokens() == earlier
        rollout = ours(prompts, numbers)
        assert rollout.tokens() == free.tokens() and ours.decode(rollout) == chat.decode(free)


def test_the_same_samples_by_all_backends(main, keys, models, tmp_path):
    keys |= {"MODEL": models("gpt2"), "STOP": ["th", "e "], "STEPS": 1, "SYSTEM": SYSTEM}
    rows = []
    for name in BACKENDS:
        assert main(keys | {"SAMPLER": name, "OUTPUT_DIR": str(tmp_path / name)}) == 0
        rows.append(read_jsonl(tmp_path / name / "samples.jsonl"))
    for one, *others in zip(*rows, strict=True):
        for other in others:
            assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)
            assert {**one, "logprobs": 0} == {**other, "logprobs": 0}
    lengths = {len(row["completion_ids"]) for row in rows[0]}
    assert len(lengths) > 1 and min(lengths) < 8, "some ended early"


def test_the_space_before_the_first_word_belongs_to_a_stop_string():
    """SentencePiece's decoder leaves it out; a later one ends the completion where it is."""
    words = ["▁a", "▁stop", "s", "top", "[UNK]", "▁abcdef"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[UNK]")
    stop = StopStrings(tokenizer, [" stop"])
    rows = torch.tensor([[1, 0, 0], [0, 1, 0], [2, 3, 1]])
    assert stop.ends(rows).tolist() == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]
    assert [stop.cut(tokenizer.decode(row)) for row in ([1], [0, 1], [2, 3, 1])] == [
        "",
        "a",
        "stop",
    ]
    both = StopStrings(tokenizer, [" a stop"])  # whatever stands before a completion: here id 0
    assert both.ends(torch.tensor([[1, 0, 1]])).tolist() == [[False, False, True]]


def test_an_end_of_text_before_a_stop_string_ends_first(sampler):
    chat = sampler("gpt2")
    stop = StopStrings(chat.tokenizer, ["b"])
    a, b, end = (chat.tokenizer.convert_tokens_to_ids(each) for each in ("a", "b", "<|im_end|>"))
    how = TokenSampler(torch.tensor([end]), end, stop=stop)
    rows = torch.tensor([[a, end, b, a], [a, b, end, b], [b, b, a, a], [a, a, a, a]])
    assert how.live(rows).sum(-1).tolist() == [2, 2, 1, 4]


# What rewards get


SEEN: list[dict[str, Any]] = []


def record(prompts, completions, **columns):
    SEEN.append({"prompts": prompts, "completions": completions} | columns)
    return [float(i) for i in range(len(prompts))]


@pytest.mark.filterwarnings("ignore")
def test_rewards_get_what_trl_hands_them(main, keys, models, tmp_path):
    """Of the same rows: TRL's RLOOTrainer and a run here, each by one call of the reward."""
    from trl import RLOOConfig, RLOOTrainer

    SEEN.clear()
    RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(models("qwen")),
        processing_class=load_tokenizer(models("qwen")),
        reward_funcs=record,
        train_dataset=Dataset.from_list(ROWS),
        args=RLOOConfig(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=8, num_generations=2,
            max_steps=1, max_completion_length=8, report_to=[], use_cpu=True, bf16=False,
            save_strategy="no", logging_steps=10, disable_tqdm=True,
        ),
    ).train()  # fmt: skip
    reward = {"TYPE": "python", "FUNCTION": "test_chat:record"}
    assert main(keys | {"REWARDS": [reward], "NUM_GENERATIONS": 2, "STEPS": 1}) == 0
    theirs, ours = SEEN[0], sys.modules["test_chat"].SEEN[-1]
    assert ours is not theirs
    tokenizer = load_tokenizer(models("qwen"))
    for each in (theirs, ours):
        texts = tokenizer.batch_decode(each["completion_ids"], skip_special_tokens=True)
        assert each["completions"] == [[{"role": "assistant", "content": text}] for text in texts]
        rows = zip(each["prompts"], each["reference"], strict=True)
        assert sorted(({"prompt": p, "reference": r} for p, r in rows), key=str) == sorted(
            ROWS * 2, key=str
        )
    assert ours.keys() <= theirs.keys()
    assert theirs.keys() - ours.keys() <= {"environments"}, "TRL's tools"


# What people and judges read


def test_turns_are_shown_readably():
    prompt = [{"role": "system", "content": SYSTEM}, *user("Hi\nyou", "Ho", "So?")]
    lines = "system: Be brief.\nuser: Hi\nyou\nassistant: Ho\nuser: So?"
    assert readable(prompt) == transcript(prompt) == lines
    assert readable("any text") == transcript("any text") == "any text"
    assert readable(user("Hi")) == "user: Hi" and transcript(user("Hi")) == "Hi"
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ]
    assert readable(parts) == "user: ab"


# Mistakes


def chats(folder: Path, *prompts: Any, column: str = "prompt") -> str:
    path = folder / "mistake.json"
    path.write_text(json.dumps([{column: prompt} for prompt in prompts]))
    return str(path)


GOOD = user("Hi")


ROW = "row {} (counted from 0) of column 'prompt' "


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([GOOD, user("Hi", "Ho")], ROW.format(1) + "ends with the assistant's message"),
        ([GOOD, "text"], ROW.format(1) + "is 'text', not a list of messages"),
        ([GOOD, []], ROW.format(1) + "is a conversation without messages"),
        ([[{"from": "human", "value": "Hi"}]], "not a list of messages {\"role\": …"),
        ([[{"role": "system", "content": "x"}]], ROW.format(0) + "has no message"),
        ([[{"role": "user", "content": None}]], "has a message of the user without content"),
        (
            [[{"role": "user", "content": [{"type": "image"}]}]],
            "has a content of type 'image': only text can be read",
        ),
    ],
)  # fmt: skip
def test_a_conversation_that_cannot_be_completed(tmp_path, prompts, message):
    with pytest.raises(ValueError) as caught:
        load_prompts(chats(tmp_path, *prompts), "prompt")
    assert message in str(caught.value)


def test_a_conversation_of_nothing_but_an_answer(tmp_path):
    rows = chats(tmp_path, [{"role": "assistant", "content": "Ho"}], column="messages")
    with pytest.raises(
        ValueError, match=r"row 0 \(counted from 0\) of column 'messages' has no message to answer"
    ):
        load_prompts(rows, "messages")


def test_mistakes_are_told_before_the_policy_loads(main, keys, settings, tmp_path, capsys):
    """Each is one line, by the key; the weights of the model are not there."""
    bare = Path(without_weights(keys["MODEL"], tmp_path / "bare"))
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in bare.iterdir():
        if "jinja" not in file.name:
            (plain / file.name).write_bytes(file.read_bytes())
    strict = tmp_path / "strict.jinja"
    strict.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('No!') }}{% endif %}"
    )
    long = chats(tmp_path, GOOD, user("word " * 100))
    train, text = keys["TRAIN_FILE"], settings["TRAIN_FILE"]
    of_text = f"is for conversations, and {text} has prompts as text"
    for changes, message in [
        ({"MODEL": str(plain)}, f"{plain} has no chat template, which the messages of {train}"),
        ({"TRAIN_FILE": text, "SYSTEM": "x"}, f"SYSTEM {of_text}"),
        ({"EVAL_FILE": text, "CHAT_TEMPLATE": str(strict)}, f"CHAT_TEMPLATE {of_text}"),
        ({"CHAT_TEMPLATE": f"{tmp_path}/no"}, f"CHAT_TEMPLATE {tmp_path}/no: [Errno 2] No "),
        ({"CHAT_TEMPLATE": str(strict)}, "row 2 (counted from 0): the chat template refuses"),
        ({"TRAIN_FILE": long}, f"{long}: row 1 (counted from 0): a conversation of "),
        ({"TRAIN_FILE": long}, " tokens is longer than the 88 that MAX_NEW_TOKENS leaves"),
        ({"STOP": [""]}, "STOP.0"),
    ]:  # fmt: skip
        assert main(keys | {"MODEL": str(bare)} | changes) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert main(keys | {"MODEL": str(bare)}) == 2
    assert "safetensors" in capsys.readouterr().err, "what is next, after all of these"


def without_weights(model: str, folder: Path, **config: Any) -> str:
    """A copy of which nothing but tokenizer and config can be loaded; `config` is changed."""
    folder.mkdir()
    for file in Path(model).iterdir():
        if "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    return str(folder)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = [
    *user("Hi"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "1"},
]


@pytest.mark.parametrize(
    ("each", "refused", "message"),
    [
        (
            "{{ m.content or raise_exception('No\nwords') }}",
            user(""),
            "a conversation of user: No words",
        ),
        (
            "{% for t in m.tool_calls or [] %}{{ '<call>' + t.function.arguments }}{% endfor %}",
            CALLED,
            'a conversation of user, assistant, tool: can only concatenate str (not "dict") to str',
        ),
    ],
)
@pytest.mark.parametrize("key", ["TRAIN_FILE", "EVAL_FILE"])
def test_each_conversation_that_the_template_refuses_is_told_with_its_row(
    main, keys, tmp_path, capsys, key, each, refused, message
):
    """Also where others of the same roles are not, and all are short for the model."""
    template = tmp_path / "strict.jinja"
    template.write_text("{% for m in messages %}" + each + "{% endfor %}")
    model = without_weights(keys["MODEL"], tmp_path / "long", max_position_embeddings=4096)
    rows = chats(tmp_path, GOOD, user("Ho"), refused)
    assert main(keys | {"MODEL": model, "CHAT_TEMPLATE": str(template), key: rows}) == 2
    assert capsys.readouterr().err == (
        f"error: {rows}: row 2 (counted from 0): the chat template refuses {message}\n"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{% for m in messages %}", "line 1: Unexpected end of template."),
        (b"{{ messages | nothing }}", "line 1: No filter named 'nothing'."),
        (b" \n", "the file is empty"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0"),
        (None, "[Errno 21] Is a directory"),
    ],
)
def test_a_file_that_is_no_template_is_told_by_its_name(
    main, keys, tmp_path, capsys, content, message
):
    file = tmp_path / "mine.jinja"
    file.mkdir() if content is None else file.write_bytes(content)
    assert main(keys | {"CHAT_TEMPLATE": str(file)}) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: CHAT_TEMPLATE {file}: {message}") and said.count("\n") == 1


def test_a_long_conversation_is_not_cut_when_it_is_sampled(sampler):
    chat = sampler("qwen", max_prompt=24)
    assert len(chat([user("This")], uniforms(0, 1, 1, 2))) == 1
    with pytest.raises(PromptError, match=r"is longer than the 24 that MAX_NEW_TOKENS leaves"):
        chat([user("This"), user("This film " * 20)], uniforms(0, 1, 2, 2))


def test_a_tokenizer_without_a_template_has_no_turns_end(settings):
    policy = SimpleNamespace(
        lm=SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None)), device="cpu"
    )
    tokenizer = load_tokenizer(settings["MODEL"])
    assert eos_ids(policy, tokenizer).tolist() == [tokenizer.eos_token_id]
