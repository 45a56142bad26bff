"""The examples run offline, and show what their first lines say."""

import ast
import re

import pytest
from conftest import ROOT, in_this_process, read_jsonl

from examples import people, reward_scheduler, scheduler, sentiment, trl_trust_region

NEW = ["people", "reward_scheduler", "scheduler", "sentiment", "trl_trust_region"]


@pytest.mark.parametrize("name", NEW)
def test_an_example_is_short_and_says_what_you_will_see(name):
    text = (ROOT / f"examples/{name}.py").read_text("utf-8")
    assert len(text.splitlines()) <= 80
    first = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
    assert first.startswith("You will see ")


def test_sentiment_rises_from_a_rate_of_1(capsys):
    means = sentiment.train(steps=8)
    assert sum(means[-2:]) > sum(means[:2]) + 0.05
    assert capsys.readouterr().out.count("rate ") == 3


def test_the_scheduler_moves_the_rate_and_learns_no_worse(tmp_path):
    (losses, rates), (plain, constant) = scheduler.train(True), scheduler.train(False)
    assert {*constant} == {0.05} and len({*rates}) > 20
    assert sum(losses[-8:]) <= sum(plain[-8:]) < sum(plain[:8]) / 10
    assert scheduler.main(str(tmp_path)).read_bytes().startswith(b"\x89PNG")


def test_each_rule_follows_the_reward(tmp_path):
    spans = {}
    for rule in reward_scheduler.RULES:
        rewards, rates = reward_scheduler.train(rule)
        assert sum(rewards[-150:]) / 150 > sum(rewards[:5]) / 5 + 0.2
        spans[rule] = (min(rates), max(rates))
    assert spans["kelly"][1] > 1.0 and spans["scaling"][1] > 0.7, "larger, for the reward is high"
    assert spans["variance"][0] < 0.49 and spans["variance"][1] == 0.5, "smaller, where it is noisy"
    assert reward_scheduler.main(str(tmp_path)).read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore")
def test_the_trust_region_inside_trl(capsys):
    with in_this_process():
        rows = trl_trust_region.train(steps=3)
    assert [row["step"] for row in rows] == [1, 2, 3]
    found = re.search(r"the rate found: (\S+), of which 1 was typed", capsys.readouterr().out)
    assert found and 1e-6 < float(found[1]) < 1e-2


def test_labels_of_people_are_replayed(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with in_this_process():
        rows = people.run(tmp_path, "STEPS=6", "REPORT=false")
    assert [row["step"] for row in rows] == [*range(1, 7)]
    given = {(row["prompt"], row["completion"]): row["score"] for row in read_jsonl(people.FILE)}
    labelled = [
        row for row in read_jsonl(tmp_path / "run/samples.jsonl") if row["reward"] is not None
    ]
    assert labelled
    for row in labelled:
        assert given[row["prompt"], row["completion"]] == row["reward"]
    assert sum(row["reward"] for row in rows[3:]) > sum(row["reward"] for row in rows[:3])
