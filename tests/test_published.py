"""The published set-ups run: with the embedded model and classifier in place of the hub's."""

import json
import re
import shlex

import pytest
from conftest import ROOT, read_jsonl

from adaptiverl.config.loading import load_config
from adaptiverl.training.keys import RunConfig
from scripts import published_prompts

SETUPS = sorted((ROOT / "configs/published").glob("*.yaml"))
EMBEDDED = "adaptiverl/assets/policy"


def review(k: int) -> str:
    return " ".join(f"This film has a scene of {k + n} people and one dog." for n in range(20))


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps([{"text": review(k)} for k in range(40)] + [{"text": "No"}]))
    return path


def commands(path) -> list[list[str]]:
    """What the comments of a set-up say to type."""
    joined = re.sub(r"\\\n#\s+", "", path.read_text(encoding="utf-8"))
    return [shlex.split(line) for line in re.findall(r"^#   (python .*)$", joined, re.M)]


@pytest.mark.parametrize("path", SETUPS, ids=lambda path: path.stem)
def test_a_set_up_states_its_source_and_runs(path, texts, main, tmp_path, monkeypatch, capsys):
    text = path.read_text(encoding="utf-8")
    for said in ("# Source: ", "# There: ", "# Its ", "# What differs here: "):
        assert text.count(said) == 1
    write, *trains = [
        words for words in commands(path) if words[1] != "-m" or "scripts" in words[2]
    ]
    keys = load_config(path, schema=RunConfig)
    assert f"checkpoints/{path.stem}" == keys.OUTPUT_DIR

    assert write[:3] == ["python", "-m", "scripts.published_prompts"]
    assert write[4] == keys.MODEL and keys.TRAIN_FILE in write
    prompts = tmp_path / "prompts.jsonl"
    replaced = {write[3]: str(texts), keys.MODEL: EMBEDDED, keys.TRAIN_FILE: str(prompts)}
    monkeypatch.setattr("sys.argv", [replaced.get(word, word) for word in write[2:]])
    published_prompts.main()
    assert len(read_jsonl(prompts)) == 40, "without the text that is short"

    (reward,) = keys.REWARDS
    offline = reward.model_copy(
        update={"model": "adaptiverl/assets/sentiment", "label": "positive"}
    )
    rewards = json.dumps([{k.upper(): v for k, v in offline.model_dump().items() if v is not None}])
    for i, words in enumerate(trains):
        assert words[:3] == ["python", "train.py", str(path.relative_to(ROOT))]
        folder = tmp_path / f"run{i}"
        small = [f"MODEL={EMBEDDED}", f"TRAIN_FILE={prompts}", f"REWARDS={rewards}", "STEPS=5",
                 "BATCH_SIZE=8", f"MAX_NEW_TOKENS={min(keys.MAX_NEW_TOKENS, 8)}",
                 "REPORT=false", "SAVE_EVERY=0", f"OUTPUT_DIR={folder}"]  # fmt: skip
        if keys.EVAL_SPLIT:
            small.append("EVAL_EVERY=5")
        assert main(path, *words[3:], *small) == 0
        rows = read_jsonl(folder / "metrics.jsonl")
        assert [row["step"] for row in rows] == [*range(1, 6)]
        assert all(row["kl_per_completion"] == row["kl_per_completion"] for row in rows)
        assert ("kl_coef" in rows[0]) and (rows[0]["kl_coef"] != rows[-1]["kl_coef"]) == bool(
            keys.KL_COEF_TARGET
        )
    capsys.readouterr()
    assert len(trains) == (2 if path.stem == "lora-rank-1" else 1)


def test_lengths_of_prompts():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / EMBEDDED)
    sizes = [
        len(tokenizer.encode(prompt))
        for prompt in published_prompts.prompts([review(0)] * 50, tokenizer, 2, 8)
    ]
    assert {*sizes} == {*range(2, 9)}
    (end,) = published_prompts.prompts([review(0)], tokenizer, 8, 8, half=True)
    words = review(0).split(" ")
    assert " ".join(words[: len(words) // 2]).endswith(end.strip())


def test_without_the_hub_the_prompts_are_refused_in_a_line(tmp_path, monkeypatch, capsys):
    words = ["published_prompts", "no-one/no-data", EMBEDDED, "2", "8", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        published_prompts.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and "no-one/no-data" in err
    assert not (tmp_path / "out.jsonl").exists()
