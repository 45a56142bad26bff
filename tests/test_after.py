"""What follows a run: generate, evaluate, export, each from the run's folder alone."""

import contextlib
import io
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ENVIRONMENT, PROMPTS, ROOT, in_this_process, read_jsonl
from test_quantized import llama as llama
from test_quantized import stored as stored
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from adaptiverl.__main__ import main as adaptiverl
from adaptiverl.commands.model_card import _reward
from adaptiverl.commands.paired import compare, estimate
from adaptiverl.config.loading import load_config
from adaptiverl.files.checkpoint import lock
from adaptiverl.rl.loading import load_policy
from adaptiverl.rl.merging import merged
from adaptiverl.training.keys import RunConfig
from rewards import ClassifierReward, LengthReward

pytestmark = [
    # what peft says of GPT-2, and corrects by itself
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"FULLTUNE": False},
    "4bit": {"FULLTUNE": False, "LOAD_4BIT": True},
}
# Appended to by the reward `seen`, which runs in this process
SEEN = """
ROWS = []
def seen(prompts, completion_ids, **columns):
    ROWS.append(list(zip(prompts, completion_ids)))
    return [0.0 for _ in prompts]
"""
# Gives no score to half of all completions
PICKY = """
GIVEN = []
def picky(completions, **columns):
    GIVEN.append([None if len(text) % 2 else len(text) / 10 for text in completions])
    return GIVEN[-1]
"""


@pytest.fixture(scope="module")
def train(tiny, tmp_path_factory):
    """Trains on keys and returns the run's folder; `where` has modules of python rewards."""
    import train as program

    where = tmp_path_factory.mktemp("after")
    (where / "prompts.json").write_text(json.dumps(PROMPTS))
    (where / "seen_by_reward.py").write_text(SEEN)
    (where / "picky.py").write_text(PICKY)
    common = {
        "MODEL": str(tiny),
        "TRAIN_FILE": str(where / "prompts.json"),
        "REWARDS": [{"TYPE": "regex", "PATTERNS": "th"}, {"TYPE": "length", "TARGET": 6}],
        "HELD_OUT": [{"TYPE": "python", "FUNCTION": "seen_by_reward:seen"}],
        "BATCH_SIZE": 8,
        "NUM_GENERATIONS": 4,
        "MAX_NEW_TOKENS": 8,
        "TEMPERATURE": 0.7,
        "LRATE": 0.02,
        "LR_RULE": "none",
        "STEPS": 2,
        "SAVE_EVERY": 1,
        "LOG_EVERY": 0,
    }

    def run(name: str, **keys: Any) -> Path:
        file = where / f"{name}.json"
        file.write_text(json.dumps(common | {"OUTPUT_DIR": str(where / name)} | keys))
        config = load_config(file, schema=RunConfig)
        with pytest.MonkeyPatch.context() as patch, in_this_process():
            patch.syspath_prepend(where)
            with contextlib.redirect_stdout(io.StringIO()):
                assert program.main((config, False)) == 0
        return where / name

    return run


@pytest.fixture(scope="module", params=KINDS)
def trained(request, train) -> Path:
    """A run that moved the policy, of each kind."""
    return train(request.param, **KINDS[request.param])


@pytest.fixture(scope="module")
def full(train) -> Path:
    return train("of-all-weights")


@pytest.fixture
def command(train, full, monkeypatch, capsys):
    """Runs the command line in this process: its status, stdout and stderr."""
    monkeypatch.syspath_prepend(full.parent)  # where modules of rewards are
    # With it, 4-bit layers would compute in bf16 in plain transformers
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with in_this_process():
            status = adaptiverl([str(word) for word in words])
        return status, *capsys.readouterr()

    return run


def figures(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())["figures"]


def plain(run: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model after and before the training, by transformers and peft alone."""
    c = json.loads((run / "config.json").read_text())
    kind: dict[str, Any] = {}
    if c["LOAD_4BIT"]:
        kind["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4"
        )
    start = AutoModelForCausalLM.from_pretrained(c["MODEL"], **kind).eval()
    if c["FULLTUNE"]:
        return AutoModelForCausalLM.from_pretrained(run / "final").eval(), start
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(c["MODEL"], **kind)
    return PeftModel.from_pretrained(base, run / "final").eval(), start


def log_probability(
    model: torch.nn.Module, prompt: list[int], completion: list[int], temperature: float = 1.0
) -> float:
    """Of a completion, in one unpadded pass."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        table = (model(ids).logits[0].float() / temperature).log_softmax(-1)
    return sum(table[len(prompt) - 1 + t, i].item() for t, i in enumerate(completion))


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_run_is_equal_to_its_start_exactly(train, command, kind):
    run = train(f"untrained-{kind}", LRATE=0, STEPS=1, **KINDS[kind])
    assert command("evaluate", run, "-n", 12)[0] == 0
    found = figures(run)
    zero, half = {"mean": 0.0, "se": 0.0}, {"mean": 0.5, "se": 0.0}
    for name in ("reward", "rewards/regex", "rewards/length"):
        assert found[name]["difference"] == zero and found[name]["win_rate"] == half
        assert found[name]["trained"] == found[name]["start"]
    assert found["completions/mean_length"]["difference"] == zero
    assert found["kl_per_completion"]["trained"] == zero
    for name in ("completions/distinct_2", "perplexity_under_start"):
        assert found[name]["trained"] == found[name]["start"]
    status, out, _ = command("generate", run, "This film", "I saw", "--base", "-n", 3)
    lines = re.findall(r"^\[(\d), (.*?)\] (.*)$\n    (.*)$", out, flags=re.MULTILINE)
    assert status == 0 and len(lines) == 2 * 3 * 2
    for after, before in zip(lines[::2], lines[1::2], strict=True):
        assert after[1] == "trained" and before[1] == "before training"
        assert after[2:] == before[2:]


def test_evaluate_gives_what_plain_transformers_computes(trained, command):
    """KL at the run's temperature, perplexity under the start at 1, length and distinct-n."""
    import seen_by_reward

    seen_by_reward.ROWS.clear()
    status, out, _ = command("evaluate", trained, "-n", 12)
    assert status == 0
    found = figures(trained)
    after, before = plain(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    # Batches of 8 and 4 completions, by the trained model and the start in turn
    assert [len(rows) for rows in seen_by_reward.ROWS] == [8, 8, 4, 4]
    sampled = {"trained": seen_by_reward.ROWS[::2], "start": seen_by_reward.ROWS[1::2]}
    ids = {}
    for who, batches in sampled.items():
        rows = [(tokenizer(prompt).input_ids, ids) for batch in batches for prompt, ids in batch]
        ids[who] = [completion for _, completion in rows]
        tokens = sum(map(len, ids[who]))
        nats = -sum(log_probability(before, *row) for row in rows)
        value = found["perplexity_under_start"][who]["mean"]
        assert value == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert found["completions/mean_length"][who]["mean"] == tokens / 12
        pairs = [pair for each in ids[who] for pair in pairwise(each)]
        assert found["completions/distinct_2"][who]["mean"] == len(set(pairs)) / len(pairs)
        if who == "trained":
            kl = [log_probability(after, *row, 0.7) - log_probability(before, *row, 0.7)
                  for row in rows]  # fmt: skip
            assert found["kl_per_completion"][who]["mean"] == pytest.approx(
                sum(kl) / 12, abs=1e-3, rel=1e-3
            )
            assert abs(sum(kl) / 12) > 0.01, "the policy did not move"
    assert ids["trained"] != ids["start"]
    hits = {who: ["th" in tokenizer.decode(each) for each in rows] for who, rows in ids.items()}
    row = found["rewards/regex"]
    assert row["trained"]["mean"] == pytest.approx(sum(hits["trained"]) / 12)
    assert row["start"]["mean"] == pytest.approx(sum(hits["start"]) / 12)
    wins = [(a > b) + (a == b) / 2 for a, b in zip(hits["trained"], hits["start"], strict=True)]
    assert row["win_rate"]["mean"] == pytest.approx(sum(wins) / 12)
    assert f"{row['difference']['mean']:+.3f} ± {row['difference']['se']:.3f}" in out


def test_generate_repeats_itself_with_the_same_seed_and_scores_what_it_shows(trained, command):
    words = ("generate", trained, "This film", "The plot", "-n", 3, "--seed", 5)
    status, out, err = command(*words)
    assert status == 0 and f"model  {trained / 'final'}, after 2 steps" in err
    assert command(*words)[1] == out
    assert command(*words[:-1], 6)[1] != out
    assert re.findall(r"^> (.*)$", out, flags=re.MULTILINE) == ["This film", "The plot"]
    scored = r"^\[\d\] (.*)$\n    reward (\S+) \(raw: regex (\S+), length (\S+),"
    rows = re.findall(scored, out, re.M)
    assert len(rows) == 6
    for text, total, regex, length in rows:
        assert float(regex) == ("th" in text)
        assert float(total) == pytest.approx(float(regex) + float(length), abs=0.002)


def test_generate_samples_from_the_checkpoint_that_is_asked_for(trained, command):
    """Beside the start, whose texts stay the same while those of the checkpoints differ."""
    words = ("generate", trained, "This film", "My wife", "-n", 4, "--base", "--checkpoint")
    first, last = command(*words, 1), command(*words, "final")
    assert first[0] == last[0] == 0 and "step-000001, after 1 step\n" in first[2]
    texts = [re.findall(r"^\[\d, (.*?)\] (.*)$", out, re.M) for _, out, _ in (first, last)]
    (trained_1, start_1), (trained_2, start_2) = (
        [[text for w, text in found if w == who] for who in ("trained", "before training")]
        for found in texts
    )
    assert start_1 == start_2 and len(start_1) == 8
    assert trained_1 != trained_2 != start_2


@pytest.mark.parametrize("given", ["argument", "stdin", "stdin that lets bytes through", "chat"])
def test_a_prompt_that_is_not_utf8_is_told(given, full, command, monkeypatch):
    errors = "surrogateescape" if "lets" in given else "strict"
    piped = io.TextIOWrapper(io.BytesIO(b"This \xff film\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(piped, "isatty", lambda: given == "chat")
    monkeypatch.setattr("sys.stdin", piped)
    typed = ["This \udcff film"] if given == "argument" else []
    status, _, err = command("generate", full, *typed)
    what = "line 1 of the input" if "stdin" in given else "the prompt"
    assert status == 2 and f"error: {what} is not UTF-8: " in err


def piped(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


def test_newlines_alone_end_a_prompt_of_stdin(full, command, monkeypatch):
    monkeypatch.setattr("sys.stdin", piped("This\u2028film\x0c is\rone\r\nI saw\r\n".encode()))
    status, out, err = command("generate", full, "-n", 1)
    assert status == 0, err
    typed = command("generate", full, "This\u2028film\x0c is\rone", "I saw", "-n", 1)
    assert out == typed[1]
    monkeypatch.setattr("sys.stdin", piped(b"This\n\nI \xff saw\nThis\n"))
    status, _, err = command("generate", full, "-n", 1)
    assert (status, err) == (2, "error: line 3 of the input is not UTF-8: b'I \\xff saw'\n")


def test_prompts_come_from_a_file_or_from_stdin(full, command, monkeypatch, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "This film"}\n{"prompt": "I saw"}\n')
    typed = command("generate", full, "This film", "I saw", "-n", 2)
    assert typed[0] == 0
    assert command("generate", full, "--file", file, "-n", 2)[1] == typed[1]
    monkeypatch.setattr("sys.stdin", piped(b"This film\n\nI saw\n"))
    assert command("generate", full, "-n", 2)[1] == typed[1]
    monkeypatch.setattr("sys.stdin", piped(b""))
    assert command("generate", full) == (
        2, "", "error: there is no prompt, or an empty one: give text to complete\n"
    )  # fmt: skip
    assert "give prompts or --file" in command("generate", full, "a", "--file", file)[2]


def test_a_terminal_without_a_prompt_is_a_chat_until_its_end(full, command, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("This film\n\n \t\nThis film\n"))
    status, out, _ = command("generate", full)
    answers = re.findall(r"^\[1\] (.*)$", out, re.M)
    assert status == 0 and len(answers) == 2
    assert answers[0] != answers[1], "the same random numbers"
    monkeypatch.setattr("sys.stdin", Terminal("This film\n"))
    assert re.findall(r"^\[1\] (.*)$", command("generate", full)[1], re.M) == answers[:1]


def test_what_steers_a_terminal_is_not_printed(full, command):
    status, out, _ = command("generate", full, "hi\x1b[2J", "-n", 1)
    assert status == 0 and "> hi�[2J" in out and "\x1b" not in out


@pytest.mark.parametrize("merge", [False, True])
def test_what_is_exported_is_the_model(trained, command, train, tmp_path, merge):
    """Its logits are the run's, and it is the MODEL of another run."""
    c = json.loads((trained / "config.json").read_text())
    out = tmp_path / "exported"
    words = ("export", trained, out, *["--merge"] * merge)
    status, _, err = command(*words)
    if c["FULLTUNE"] and merge:
        assert status == 2 and "there is no adapter to merge" in err and not out.exists()
        return
    assert status == 0, err
    assert (out / "adapter_config.json").exists() == (not merge and not c["FULLTUNE"])
    assert not list(out.glob("*.bin")) and not (out / "trainer.pt").exists()
    after, _ = plain(trained)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("The acting in this film", return_tensors="pt").input_ids
    if merge or c["FULLTUNE"]:
        exported = AutoModelForCausalLM.from_pretrained(out).eval()
        assert "quantization_config" not in exported.config.to_dict()
        with torch.no_grad():
            torch.testing.assert_close(
                exported(ids).logits, after(ids).logits, rtol=1e-5, atol=1e-5
            )
    settings = GenerationConfig.from_pretrained(out)
    assert (settings.temperature, settings.max_new_tokens, settings.top_k) == (0.7, 8, 0)
    assert settings.do_sample and settings.eos_token_id == tokenizer.eos_token_id

    more = {} if merge else KINDS[next(k for k in KINDS if trained.name == k)]
    again = train(f"again-{trained.name}-{merge}", MODEL=str(out), STEPS=1, **more)
    row = read_jsonl(again / "samples.jsonl")[0]
    prompt = tokenizer(row["prompt"]).input_ids
    expected = log_probability(after, prompt, row["completion_ids"], 0.7)
    assert sum(row["logprobs"]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("model", "quantize"),
    [(model, how) for model in ("tiny", "llama") for how in (None, "4bit", "8bit")]
    + [("stored", None)],
)
def test_an_adapter_merges_into_linear_and_transposed_layers(
    request, model, quantize, tmp_path, monkeypatch
):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    folder = request.getfixturevalue(model)
    options = {"full_tune": False, "quantize": quantize, "reference": False}
    policy = load_policy(str(folder), **options)
    torch.manual_seed(1)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    policy.save(tmp_path / "adapter")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        logits = policy.lm(ids).logits
        with policy.lm.disable_adapter():
            without = policy.lm(ids).logits
    lm = merged(policy, tmp_path / "adapter")
    lm.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        gap = (again(ids).logits - logits).abs().max()
    # int8 layers round what they multiply, too, which merged ones do not
    assert gap <= (0.1 if quantize == "8bit" else 1e-5) * (logits - without).abs().max()


def test_the_card_says_what_the_run_was_and_its_code_runs(trained, command, tmp_path, monkeypatch):
    assert command("evaluate", trained, "-n", 6)[0] == 0
    assert command("export", trained, tmp_path / "out", "--checkpoint", "final")[0] == 0
    card = (tmp_path / "out/README.md").read_text()
    row = figures(trained)["reward"]["trained"]
    assert re.search(rf"^\| reward +\| {row['mean']:.3f} ± {row['se']:.3f} +\|", card, re.M)
    for row in read_jsonl(trained / "metrics.jsonl"):
        assert f"| {row['step']} | {row['reward']:.3f} | {row['kl_per_completion']:z.3f} |" in card
    assert "| regex | 1.0 |" in card and '`PATTERNS` ["th"]' in card
    assert "`LRATE` | 0.02" in card
    assert "| seen | What the Python function or class `seen_by_reward:seen` returns. |" in card
    assert ("| `LORA_R` | 8 |" in card) == (trained / "final/adapter_config.json").exists()
    assert str(trained.parent) not in card.replace(str(tmp_path), ""), "a path of this machine"
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    assert code
    torch.manual_seed(0)
    exec(code[1], namespace)
    assert namespace["text"].startswith("Your prompt")
    # Of another step than was evaluated
    assert command("export", trained, tmp_path / "first", "--checkpoint", 1)[0] == 0
    assert (
        "`adaptiverl evaluate` was not run on this step"
        in (tmp_path / "first/README.md").read_text()
    )


def test_an_export_never_overwrites(full, command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    status, _, err = command("export", full, tmp_path / "out")
    assert status == 2 and "exists and is not empty" in err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out/mine").unlink()
    assert command("export", full, tmp_path / "out")[0] == 0
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "safetensors writes its files for their owner alone"
    assert {file.name for file in tmp_path.iterdir()} == {"out"}


def test_without_the_hub_nothing_is_pushed(full, command, tmp_path):
    status, _, err = command("export", full, tmp_path / "out", "--push", "me/mine")
    assert status == 2 and "--push me/mine: https://huggingface.co cannot be reached" in err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(monkeypatch) -> dict[str, bytes]:
    """A hub that takes everything: the files that it was sent, in their last version."""
    from huggingface_hub import HfApi, ModelCard, get_session
    from huggingface_hub.errors import EntryNotFoundError

    sent: dict[str, bytes] = {}

    def create_commit(self, repo_id, operations, **_):
        assert repo_id == "me/mine"
        for each in operations:
            content = each.path_or_fileobj
            at = content if isinstance(content, bytes) else Path(content).read_bytes()
            sent[each.path_in_repo] = at

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
        assert repo_id == "me/mine"
        sent[path_in_repo] = Path(path_or_fileobj).read_bytes()

    def no_card(*_, **__):
        raise EntryNotFoundError("none yet")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(type(get_session()), "head", lambda *_, **__: None)
    monkeypatch.setattr(ModelCard, "load", no_card)
    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **__: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "upload_file", upload_file)
    return sent


def test_what_is_pushed_is_the_folder(full, hub, command, tmp_path):
    out = tmp_path / "out"
    status, said, err = command("export", full, out, "--push", "me/mine")
    assert status == 0 and "pushed to https://huggingface.co/me/mine" in said, err
    assert hub == {file.name: file.read_bytes() for file in out.iterdir()}
    assert b'from_pretrained("me/mine")' in hub["README.md"]


def test_a_push_that_fails_leaves_the_folder(full, hub, command, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("401: you are not me")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    status, _, err = command("export", full, tmp_path / "out", "--push", "me/mine")
    assert status == 2 and "--push me/mine: 401: you are not me" in err and "hf upload" in err
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_adapter_of_a_folder_is_not_pushed(train, hub, command, tmp_path):
    run = train("adapter-to-push", STEPS=1, **KINDS["lora"])
    status, _, err = command("export", run, tmp_path / "out", "--push", "me/mine")
    assert status == 2 and "which others do not have: use --merge" in err and not hub


# Which checkpoint


@pytest.fixture
def copy(full, tmp_path) -> Path:
    """A copy of a run, with checkpoints of steps 1 and 2 and the final one, to damage."""
    return Path(shutil.copytree(full, tmp_path / "copy"))


def damage(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-8, io.SEEK_END)
        file.write(b"12345678")


def used(command, run: Path, *words: str) -> tuple[int, str]:
    status, _, err = command("generate", run, "This", "-n", 1, *words)
    return status, err


def test_the_best_checkpoint_is_used_if_there_is_one(copy, command):
    assert f"model  {copy}/final, after 2 steps" in used(command, copy)[1]
    (copy / "step-000001").rename(copy / "best")
    assert f"model  {copy}/best, after 1 step\n" in used(command, copy)[1]
    assert f"model  {copy}/final, after 2 steps" in used(command, copy, "--checkpoint", "final")[1]
    assert f"model  {copy}/step-000002," in used(command, copy, "--checkpoint", "2")[1]


def test_of_a_run_that_has_not_finished_the_newest_checkpoint_is_used(copy, command, caplog):
    shutil.rmtree(copy / "final")
    assert f"model  {copy}/step-000002, after 2 steps" in used(command, copy)[1]
    assert "has not finished: using its newest checkpoint, step-000002" in caplog.text
    (copy / "step-000001").rename(copy / "best")
    assert f"model  {copy}/best, after 1 step\n" in used(command, copy)[1]
    assert caplog.messages[1:] == [f"{copy} has not finished: using its best checkpoint, best"]


def test_a_damaged_checkpoint_is_not_used(copy, command, caplog):
    damage(copy / "final")
    status, err = used(command, copy, "--checkpoint", "final")
    assert status == 2 and err == (
        f"error: {copy}/final is damaged (model.safetensors has changed): choose another by "
        "--checkpoint\n"
    )
    assert f"model  {copy}/step-000002, after 2 steps" in used(command, copy)[1]
    assert f"{copy}/final is damaged (model.safetensors has changed)" in caplog.text
    for name in ("step-000001", "step-000002"):
        damage(copy / name)
    assert used(command, copy) == (2, f"error: all checkpoints in {copy} are damaged\n")


def test_a_best_checkpoint_that_is_damaged_is_told_with_the_one_that_is_used(copy, command, caplog):
    (copy / "step-000001").rename(copy / "best")
    damage(copy / "best")
    wrong = f"{copy}/best is damaged ({{}}): using the newest checkpoint, final"
    assert f"model  {copy}/final, after 2 steps" in used(command, copy)[1]
    assert caplog.messages == [wrong.format("model.safetensors has changed")]
    caplog.clear()
    for file in (copy / "best").glob("*.json"):
        file.unlink()
    assert f"model  {copy}/final, after 2 steps" in used(command, copy)[1]
    assert caplog.messages == [wrong.format("manifest.json is missing")]


@pytest.mark.parametrize("name", ["generate", "evaluate", "export"])
def test_a_folder_without_a_run_is_refused(copy, command, tmp_path, name):
    def error(run: Path, *words: str) -> str:
        status, _, err = command(name, run, *["out"] * (name == "export"), *words)
        assert status == 2
        return err.removeprefix("error: ").strip()

    nowhere = tmp_path / "nowhere"
    assert error(nowhere) == f"{nowhere} is not a folder: name the OUTPUT_DIR of a run"
    assert error(ROOT) == f"{ROOT} holds no run: name the OUTPUT_DIR of a run"
    (copy / "config.json").unlink()
    assert error(copy) == (
        f"{copy}/config.json is missing, with the keys of the run; put "
        f"{copy}/final/run_config.json in its place: it has the same keys"
    )
    shutil.copy(copy / "final/run_config.json", copy / "config.json")
    assert error(copy / "step-000001") == (
        f"{copy}/step-000001 is a checkpoint: name the folder of its run, {copy}, and choose the "
        "checkpoint by --checkpoint 1"
    )
    assert error(copy, "--checkpoint", "7") == (
        f"--checkpoint 7: {copy} has no such checkpoint; there is: 1, 2, final"
    )
    for checkpoint in ("step-000001", "step-000002", "final"):
        shutil.rmtree(copy / checkpoint)
    assert error(copy) == f"{copy} ended before it wrote a checkpoint: start it anew"
    with lock(copy):
        assert error(copy) == (
            f"{copy} has no checkpoint yet: wait for SAVE_EVERY 1, or stop the run by Ctrl-C, "
            "which saves"
        )


def test_a_mistake_is_told_without_torch():
    code = (
        "import sys\n"
        "from adaptiverl.__main__ import main\n"
        "status = main(['export', 'tests', 'out']), main(['generate', 'nowhere'])\n"
        "print(status, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.stdout == "(2, 2) []\n", result.stderr


# What the run's folder does not hold


def test_weights_that_were_trained_need_no_model_but_the_run(train, command, tiny, tmp_path):
    start = Path(shutil.copytree(tiny, tmp_path / "start"))
    run = train("model-is-gone", MODEL=str(start), STEPS=1)
    shutil.rmtree(start)
    assert command("generate", run, "This", "-n", 1)[0] == 0
    assert command("export", run, tmp_path / "out")[0] == 0
    status, _, err = command("generate", run, "This", "-n", 1, "--base")
    assert status == 2 and f"there is no folder {start}" in err


@pytest.mark.parametrize("out", ["runs/one", "ABSOLUTE", "../beside"])
def test_relative_paths_are_those_of_where_the_run_was_started(
    train, command, tiny, tmp_path, monkeypatch, out
):
    """Whatever the working directory is now; what is typed is relative to that."""
    run = tmp_path.with_name("beside") if out == "../beside" else tmp_path / "runs/one"
    out = out.replace("ABSOLUTE", str(run))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "start")
    Path("mine.json").write_text(json.dumps(PROMPTS))
    keys = {"MODEL": "./start", "TRAIN_FILE": "mine.json", "OUTPUT_DIR": out}
    train("relative", STEPS=1, **keys, **KINDS["lora"])
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert command("evaluate", run, "-n", 4, "--json", "here.json")[0] == 0
    assert json.loads(Path("here.json").read_text())["prompts"] == "mine.json"
    assert command("export", run, "out")[0] == 0
    base = json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "start") and Path.cwd() == tmp_path / "elsewhere"
    if out == "runs/one":  # a project that was moved, or is on another machine
        environment = run / "environment.jsonl"
        environment.write_text(environment.read_text().replace(str(tmp_path), "/nowhere"))
        assert command("evaluate", "../runs/one", "-n", 4, "--json", "here.json")[0] == 0


def test_rewards_that_cost_or_cannot_score_are_left_out_and_named(copy, command):
    config = json.loads((copy / "config.json").read_text())
    config["REWARDS"] += [
        {"TYPE": "judge", "MODEL": "m", "RUBRIC": "good?", "BASE_URL": "http://127.0.0.1:9",
         "RETRIES": 0, "CACHE": str(copy / "judge.sqlite")},
        {"TYPE": "human", "LABELS": str(copy / "labels.sqlite")},
        {"TYPE": "cosine", "MODEL": "nowhere"},
    ]  # fmt: skip
    (copy / "config.json").write_text(json.dumps(config))
    status, out, err = command("generate", copy, "This", "-n", 2)
    partial = "reward without judge, human, cosine"  # no figure that one takes for the run's
    assert status == 0 and out.count(f"\n    {partial} ") == out.count("(raw: regex ") == 2
    for name in ("judge", "human"):
        assert f"left out  {name}: it asks people or a paid service; --all-rewards" in err
    assert "left out  cosine: a prompt that is typed has no column 'reference' (COLUMN)" in err
    assert not (copy / "judge.sqlite").exists() and not (copy / "labels.sqlite").exists()
    assert command("evaluate", copy, "-n", 4)[0] == 0
    written = json.loads((copy / "evaluation.json").read_text())
    assert set(written["left_out"]) == {"judge", "human", "cosine"}
    assert partial in written["figures"] and "reward" not in written["figures"]
    status, _, err = command("generate", copy, "This", "-n", 2, "--all-rewards")
    assert status == 2 and "judge" in err  # nobody listens at port 9


def test_a_running_scale_is_the_run_s(train, command):
    """Not one of the evaluation, which would have another unit for each set of prompts."""
    reward = {"TYPE": "regex", "PATTERNS": "th", "NORMALIZE": "zscore", "WEIGHT": 3}
    run = train("scaled", REWARDS=[reward])
    assert command("evaluate", run, "-n", 16)[0] == 0
    state = torch.load(run / "final/trainer.pt", weights_only=True)["rewards"]["scales"]["regex"]
    deviation = state["first_deviation"]
    found = figures(run)
    raw = found["rewards/regex"]["difference"]["mean"]
    assert abs(raw) > 0.01
    assert found["reward"]["difference"]["mean"] == pytest.approx(3 * raw / deviation)
    assert command("export", run, run.parent / "scaled model")[0] == 0
    card = (run.parent / "scaled model/README.md").read_text()
    assert "| steps | reward, on a fixed scale | KL" in card, "the unit of the evaluation"
    for row in read_jsonl(run / "metrics.jsonl"):
        assert f"| {row['step']} | {row['reward_fixed_scale']:z.3f} |" in card


def test_a_new_run_takes_the_evaluation_of_the_old_one_away(train, command):
    run = train("twice", STEPS=1)
    assert command("evaluate", run, "-n", 2)[0] == 0
    train("twice", STEPS=1)
    assert not (run / "evaluation.json").exists()
    assert (run / "earlier-001/evaluation.json").exists()


def test_scores_that_are_missing_are_counted_and_not_borrowed(train, command):
    """The sum is of the pairs of which neither, or both, lack a score."""
    rewards = [{"TYPE": "python", "FUNCTION": "picky:picky"}, {"TYPE": "length", "TARGET": 6}]
    run = train("picky", REWARDS=rewards, HELD_OUT=[], BATCH_SIZE=16)
    import picky

    picky.GIVEN.clear()
    status, out, _ = command("evaluate", run, "-n", 16)
    assert status == 0
    trained, start = picky.GIVEN
    lacking = {who: each.count(None) for who, each in (("trained", trained), ("start", start))}
    assert lacking["trained"] != lacking["start"], "or the test shows nothing"
    assert json.loads((run / "evaluation.json").read_text())["missing"] == {
        "rewards/picky": lacking
    }
    said = f"missing   rewards/picky: {lacking['trained']} of 16 trained, "
    assert f"{said}{lacking['start']} of 16 start\n" in out
    found = figures(run)
    pairs = [(a, b) for a, b in zip(trained, start, strict=True) if None not in (a, b)]
    raw = found["rewards/picky"]
    assert raw["difference"]["mean"] == pytest.approx(statistics.mean(a - b for a, b in pairs))
    both = [(a is None) == (b is None) for a, b in zip(trained, start, strict=True)]
    assert 0 < sum(both) < 16
    wins = found["reward"]["win_rate"]["mean"] * sum(both) * 2
    assert wins == pytest.approx(round(wins)), "of so many pairs"


def test_where_to_write_is_known_before_the_work(full, command, tmp_path, capsys):
    for words, said in (
        (("evaluate", full, "--json", tmp_path), f"--json: {tmp_path} is a folder: name a file"),
        (("report", full, "--out", tmp_path / "no/x"), f"--out: there is no folder {tmp_path}/no"),
        (("evaluate", full, "-n", "0"), "-n/--n: '0' is no whole number above 0"),
        (
            ("generate", full, "--seed", "-1"),
            "is no whole number from 0 to 4294967295",
        ),
    ):
        with pytest.raises(SystemExit):
            command(*words)
        assert said in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_before_the_work(full, command, tmp_path):
    """A name that leaves no room for that of the new file beside it; and folders of the kernel."""
    import seen_by_reward

    seen_by_reward.ROWS.clear()
    to = tmp_path / ("x" * 250 + ".json")
    status, out, err = command("evaluate", full, "--json", to, "-n", 2)
    assert (status, out) == (2, "") and err == (
        f"error: {to} cannot be written (File name too long): name another file by --json\n"
    )
    assert not seen_by_reward.ROWS and not list(tmp_path.iterdir())
    status, _, err = command("export", full, tmp_path / ("x" * 254) / "model")
    assert (status, err) == (
        2,
        f"error: {tmp_path}/{'x' * 254} cannot be written (File name too long): name another "
        "folder\n",
    )


def test_a_line_that_is_lost_does_not_keep_a_model_from_its_export(copy, command, tmp_path):
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join([lines[0][:50], lines[1], ""]))
    assert command("export", copy, tmp_path / "out")[0] == 0
    card = (tmp_path / "out/README.md").read_text()
    assert re.search(r"^\| 2 \| \d", card, re.M) and not re.search(r"^\| 1 \| \d", card, re.M)


def test_a_card_of_one_completion_and_of_no_kl(copy, command, tmp_path):
    file = copy / "metrics.jsonl"
    rows = [row | {"kl_per_completion": -1e-9} for row in read_jsonl(file)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command("evaluate", copy, "-n", 1)[0] == 0
    assert command("export", copy, tmp_path / "out")[0] == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "\n1 completion of 1 prompt of `prompts.json`" in card
    assert "| 0.000 |" in card and "-0.000" not in card


def test_a_card_has_the_evaluation_that_the_run_made_of_its_step(copy, command, tmp_path):
    file = copy / "metrics.jsonl"
    rows = [row | {"eval/reward": row["step"] / 7} for row in read_jsonl(file)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command("export", copy, tmp_path / "out", "--checkpoint", 1)[0] == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "own evaluation of it gave a mean reward of 0.143.\nThe rewards in the table" in card


def test_a_card_says_what_a_reward_scores_where_that_is_its_default():
    given = _reward(ClassifierReward())["given"]
    assert re.sub(r" \S*sentiment,", " sentiment,", given) == (
        "`MODEL` sentiment, `LABEL` positive, `OUTPUT` probability"
    )
    assert _reward(LengthReward(target=6))["given"] == "`TARGET` 6, `UNIT` tokens"


def test_an_evaluation_that_is_replaced_is_said(full, command, tmp_path):
    words = ("evaluate", full, "--json", tmp_path / "own.json", "-n")
    (tmp_path / "own.json").write_bytes(b"\xff, no evaluation")
    assert command(*words, 8)[1].endswith("own.json\n")
    assert command(*words, 1)[1].endswith("own.json, which had 8 completions\n")


# Statistics


def test_a_standard_error_counts_prompts_not_their_completions():
    values = torch.tensor([1.0, 2.0, 4.0, torch.nan, 9.0])
    mean, se = estimate(values, [0, 1, 2, 3, 4])
    assert mean == 4.0
    assert se == pytest.approx(statistics.stdev([1, 2, 4, 9]) / 2)
    # Each value twice for its prompt says no more than once
    twice = values.repeat_interleave(2)
    assert estimate(twice, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]) == (mean, pytest.approx(se))
    # One prompt: of completions of it
    assert estimate(values, [7] * 5) == (mean, pytest.approx(se))
    assert estimate(values[:1], [0]) == (1.0, None)
    assert estimate(values[3:4], [0]) == (None, None)


def test_wins_and_differences_are_of_pairs_that_both_have_a_score():
    nan = torch.nan
    found = compare(
        torch.tensor([1.0, 2.0, 3.0, nan, 5.0]), torch.tensor([0.0, 2.0, 4.0, 1.0, nan]), range(5)
    )
    assert found["trained"].mean == 2.75 and found["start"].mean == 1.75
    assert found["difference"] == (0.0, pytest.approx(1 / math.sqrt(3)))
    assert found["win_rate"].mean == 0.5
    found = compare(torch.tensor([1.0, 1.0, nan, nan]), torch.zeros(4), range(4))
    assert found["win_rate"] == (1.0, 0.0), "a pair of which one is missing is no tie"
