"""The watch for a reward that is gamed: held-out rewards, diversity, and the word of the report."""

import json
from pathlib import Path

import pytest
from conftest import read_jsonl, without_clock

from adaptiverl.commands.explain import explain
from adaptiverl.rl.diversity import distinct, equal_pairs, repetition


def test_distinct_and_repetition_by_hand():
    rows = [[1, 2, 1, 2, 1], [1, 2, 3]]
    assert distinct(rows, 1) == 3 / 8
    assert distinct(rows, 2) == 3 / 6, "12, 21, 23 of six"
    assert repetition(rows, 2) == 1 - (2 + 2) / 6, "the first says 12 and 21 twice"
    assert repetition(rows) == 1 - (2 + 1) / 4
    assert (distinct([[1], []], 2), repetition([[1], []])) == (1.0, 0.0), "too short for any"


@pytest.mark.parametrize("prompts", ["abcdef", "aabbcc", "aaabbb", "aaaaaa", "abbaac"])
def test_texts_of_one_prompt_and_of_two_are_compared_pair_by_pair(prompts):
    texts = [[1], [1], [1, 2], [1], [1, 2], []]
    pairs = [(prompts[i] == prompts[j], texts[i] == texts[j]) for j in range(6) for i in range(j)]
    for same, share in zip((True, False), equal_pairs(texts, prompts), strict=True):
        found = [equal for one, equal in pairs if one is same]
        assert share == (sum(found) / len(found) if found else 0)


def test_what_is_held_out_is_logged_and_changes_nothing(main, settings):
    out = Path(settings["OUTPUT_DIR"])
    assert main(settings) == 0
    without = read_jsonl(out / "metrics.jsonl")
    watch = [{"TYPE": "length", "TARGET": 3}, {"TYPE": "regex", "PATTERNS": "a"}]
    assert main(settings | {"HELD_OUT": watch}) == 0
    rows = read_jsonl(out / "metrics.jsonl")
    names = {"held_out/rewards/length/mean", "held_out/rewards/regex/mean"}
    for row, plain in zip(without_clock(rows), without_clock(without), strict=True):
        assert {k: v for k, v in row.items() if k not in names} == plain
        assert all(0 <= row[name] <= 1 for name in names)


def report(tmp_path, reward: list[float], held_out: list[float]) -> str:
    rows = [
        {"step": k + 1, "lr": 1e-3, "reward": a, "held_out/rewards/judge/mean": b}
        for k, (a, b) in enumerate(zip(reward, held_out, strict=True))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "controller.jsonl").write_text("")
    return explain(tmp_path)


UP = [k / 30 + (-1) ** k * 0.01 for k in range(30)]


@pytest.mark.parametrize(
    ("held_out", "warned"), [(UP, False), ([0.5] * 30, False), ([1 - x for x in UP], True)]
)
def test_the_report_says_when_trained_and_held_out_part(tmp_path, held_out, warned):
    text = report(tmp_path, UP, held_out)
    assert ("WARNING" in text and "probably gamed" in text) == warned
    assert "held_out/rewards/judge/mean" in text
