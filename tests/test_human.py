"""Rewards from people: labels, the queue, who is asked, the head that learns; and the terminal."""

import asyncio
import fcntl
import json
import os
import random
import re
import select
import signal
import sqlite3
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, read_jsonl
from warm import Server

from adaptiverl.commands.doctor import doctor
from rewards import CompositeReward, HumanReward, Interrupted, Reward
from rewards.head import MIN_LABELS, RidgeHead
from rewards.label_queue import LabelQueue, Question
from rewards.labels import Labels
from rewards.opinions import agreement, asking_order
from rewards.scores import as_list
from rewards.terminal import ESC, KEY_ALIASES, Terminal, printable


@pytest.fixture
def labels(tmp_path) -> Iterator[Labels]:
    with closing(Labels(tmp_path / "labels.sqlite", "Good?", "binary")) as made:
        yield made


@pytest.fixture
def queue(labels) -> LabelQueue:
    return LabelQueue(labels, "binary")


def questions(queue: LabelQueue, *completions: str) -> list[Question]:
    return [Question(queue.labels.key("p", c), "p", c) for c in completions]


def asked(queue: LabelQueue, *completions: str) -> threading.Thread:
    """A run that waits for labels of `completions`, once they are in the queue."""
    thread = threading.Thread(target=queue.ask, args=(questions(queue, *completions), None))
    thread.start()
    assert queue.wait_next("nobody")
    queue.shown.clear()
    return thread


# Labels


def test_a_label_is_kept_once_and_by_question_and_scale(labels, tmp_path):
    assert labels.find(labels.key("p", "c")) is None
    assert labels.add("p", "c", 1.0, "a")
    assert not labels.add("p", "c", -1.0, "b"), "the first one counts"
    assert labels.add("p", "d", None, "a")
    assert labels.find(labels.key("p", "c")) == (1.0,)
    assert labels.find(labels.key("p", "d")) == (None,), "skipped"
    with closing(Labels(tmp_path / "labels.sqlite", "Good?", "binary")) as again:
        assert again.find(again.key("p", "c")) == (1.0,), "on disk, before anything is closed"
    with closing(Labels(tmp_path / "labels.sqlite", "Good?", "1-5")) as other:
        assert other.find(other.key("p", "c")) is None
        assert labels.learned(9) == [("c", 1.0)] and other.learned(9) == []


# The queue


def test_two_people_share_the_work_and_each_label_counts_once(queue):
    run = asked(queue, "x", "y", "z")
    first, second = queue.next("ann"), queue.next("bob")
    assert (first.completion, second.completion) == ("x", "y"), "not the same one"
    assert queue.next("ann") == first, "asking again does not move on"
    assert queue.answer("ann", first.key, "+")
    assert queue.next("ann").completion == "z"
    assert queue.answer("ann", queue.next("ann").key, "-")
    assert queue.next("ann") is None, "the last is with bob"
    queue.absence_timeout = 0.0
    assert queue.next("ann") == second, "bob has gone"
    assert queue.answer("bob", second.key, "skip"), "he is back, and first"
    assert not queue.answer("ann", second.key, "+"), "too late"
    run.join()
    find = queue.labels.find
    assert [find(q.key) for q in questions(queue, "x", "y", "z")] == [(1.0,), (None,), (-1.0,)]


def test_an_open_page_that_nobody_is_at_keeps_nothing(queue, monkeypatch):
    """It goes on to ask what to show, and shows it still; others may answer it."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def polled(who: str, seconds: int, acted: bool = False) -> None:
        for _ in range(seconds):
            clock[0] += 1
            queue.next(who, acted)

    run = asked(queue, "x", "y")
    first = queue.next("ann")
    queue.answer("bob", queue.next("bob").key, "+")
    polled("ann", 50)
    assert queue.next("bob") is None and queue.here() >= {"ann", "bob"}, "ann may be reading"
    polled("ann", 1, acted=True)
    polled("ann", 50)
    assert queue.next("bob") is None, "she has scrolled"
    polled("ann", 20)
    assert queue.next("bob") == first == queue.next("ann", acted=False)
    assert queue.here() == {"bob"}
    assert queue.answer("bob", first.key, "-") and not queue.answer("ann", first.key, "+")
    run.join()
    assert queue.labels.find(first.key) == (-1.0,)


def test_undo_takes_back_ones_own_last_label_while_the_batch_waits(queue):
    run = asked(queue, "x", "y", "z")
    x, y = queue.next("ann"), queue.next("bob")
    queue.answer("ann", x.key, "+")
    queue.answer("bob", y.key, "+")
    assert queue.next("ann").completion == "z"
    assert queue.undo("ann")
    assert queue.labels.find(x.key) is None and queue.labels.find(y.key) == (1.0,)
    assert queue.next("ann") == x
    assert queue.next("bob").completion == "z", "ann has left it"
    queue.answer("ann", x.key, "-")
    queue.answer("bob", queue.next("bob").key, "-")
    run.join()
    assert not queue.undo("ann"), "the batch has gone on"
    assert queue.labels.find(x.key) == (-1.0,)


def test_what_is_no_answer_is_refused(queue):
    run = asked(queue, "x")
    key = queue.next("ann").key
    assert not queue.answer("ann", key, "5")
    assert not queue.answer("ann", "no such key", "+")
    assert queue.answer("ann", key, "+")
    run.join()


def test_what_another_run_has_had_labelled_is_not_shown(queue):
    """It has the same file of labels, and asked at the same time."""
    run = asked(queue, "x", "y", "z")
    x = queue.next("ann")
    queue.labels.add("p", "x", -1.0, "of another run")
    assert not queue.answer("ann", x.key, "+"), "she is told"
    assert not queue.undo("ann"), "it is not hers"
    queue.labels.add("p", "y", -1.0, "of another run")
    z = queue.next("ann")
    assert z.completion == "z" and list(queue.open) == [z.key]
    queue.labels.add("p", "z", None, "of another run")
    assert queue.next("ann") is None
    run.join()
    find = queue.labels.find
    assert [find(q.key) for q in questions(queue, "x", "y", "z")] == [(-1.0,), (-1.0,), (None,)]


def test_after_the_timeout_what_is_left_is_taken_away(queue):
    queue.ask(questions(queue, "x"), timeout=0.01)
    assert queue.next("ann") is None
    assert not queue.answer("ann", queue.labels.key("p", "x"), "+")


def test_a_closed_queue_interrupts_who_waits(queue):
    caught: list[Exception] = []

    def wait() -> None:
        try:
            queue.ask(questions(queue, "x"), None)
        except Interrupted as stopped:
            caught.append(stopped)

    thread = threading.Thread(target=wait)
    thread.start()
    assert queue.wait_next("ann")
    queue.close()
    thread.join()
    assert caught and queue.wait_next("ann") is None


def test_agreement_counts_pairs_that_labels_tell_apart():
    assert agreement([1, -1], [0.9, 0.1]) == 1
    assert agreement([1, -1], [0.1, 0.9]) == 0
    assert agreement([1, 1, -1], [0.5, 0.2, 0.2]) == 0.75, "one right, one tied"
    assert agreement([1, 1], [0, 1]) is None


# Who is asked


def test_those_are_asked_first_on_whom_opinions_disagree_most():
    one, other = [0.0, 1.0, 2.0, 3.0], [30.0, 100.0, 200.0, 0.0]
    # ranks -1, -1/3, 1/3, 1 against -1/3, 1/3, 1, -1
    assert asking_order([one, other], 4) == [3, 0, 1, 2], "the last differs most, the rest alike"
    assert asking_order([one, [None, None, 5.0, 1.0]], 4) == [3, 2, 0, 1]
    assert asking_order([one], 4) == [0, 1, 2, 3], "one opinion has nothing to disagree with"
    assert asking_order([], 2) == [0, 1]


class Robot:
    """People who answer at once, by a rule, and remember what they saw."""

    def __init__(self, queue: LabelQueue, rule: Callable[[str], str | None]):
        self.queue, self.rule, self.seen = queue, rule, []
        self.thread = threading.Thread(target=self.label)
        self.thread.start()

    def label(self) -> None:
        while question := self.queue.wait_next("robot"):
            self.seen.append(question.completion)
            self.queue.answer("robot", question.key, self.rule(question.completion) or "skip")


@pytest.fixture
def human(tmp_path):
    """Makes a HumanReward, and people who follow `rule`; without one, nobody answers."""
    made = []

    def make(
        rule: Callable[[str], str | None] | None = lambda text: "+", **keys
    ) -> tuple[HumanReward, Robot | None]:
        keys = {"labels": str(tmp_path / "labels.sqlite")} | keys
        reward = HumanReward(question="Good?", where="web", port=0, **keys)
        made.append((reward, Robot(reward.queue, rule) if rule else None))
        return made[-1]

    yield make
    for reward, robot in made:
        reward.close()
        if robot:
            robot.thread.join()


def call(reward: HumanReward, completions: list[str], **columns) -> list[float | None]:
    return asyncio.run(reward(["p"] * len(completions), completions, **columns))


def test_each_completion_is_asked_once(human):
    reward, people = human(lambda text: {"good": "+", "bad": "-"}.get(text))
    texts = ["good", "bad", "good", "odd"]
    assert call(reward, texts) == [1.0, -1.0, 1.0, None]
    assert call(reward, texts) == [1.0, -1.0, 1.0, None]
    assert people.seen == ["good", "bad", "odd"], "twice the same, and a skip: once each"


def test_conversations_are_labelled_as_their_text(human):
    """As TRL passes them; what was labelled as plain text is not asked again."""
    reward, people = human(lambda text: {"good": "+", "bad": "-"}.get(text))
    assert call(reward, ["good"]) == [1.0]
    texts = ["good", "bad"]
    prompts = [[{"role": "user", "content": "p"}]] * 2
    talk = [[{"role": "assistant", "content": text}] for text in texts]
    assert asyncio.run(reward(prompts, talk)) == [1.0, -1.0]
    assert people.seen == texts


def test_one_to_five(human):
    assert call(human(lambda text: text, scale="1-5")[0], list("12345")) == [-1, -0.5, 0, 0.5, 1]


def test_a_skip_is_no_label(human):
    reward, _ = human(lambda text: "+" if text != "odd" else None)
    told: dict = {}
    for _ in range(2):
        call(reward, ["a", "odd", "b", "c"], log_metric=told.__setitem__)
        assert told["human/labelled"] == 0.75
    assert told["human/asked"] == 0, "a skip is not asked again"


def test_only_so_many_are_asked_and_the_rest_are_missing(human):
    reward, people = human(ask=2)
    told: dict = {}
    scores = {"one": [0.0, 1.0, 2.0, 3.0], "other": [30.0, 100.0, 200.0, 0.0]}
    result = call(reward, list("abcd"), scores=scores, log_metric=told.__setitem__)
    assert result == [1.0, None, None, 1.0]
    assert people.seen == ["d", "a"]
    assert told["human/asked"] == 2 and told["human/labelled"] == 0.5
    assert call(reward, list("abcd"), scores=scores) == [1.0] * 4, "the other two, next time"
    assert people.seen == ["d", "a", "b", "c"]


def at(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=9)


def steps(reward: HumanReward, texts: list[str], numbers: range) -> list[tuple]:
    """Result and reports of each step of eight texts, half of them from the step before."""
    made = []
    for step in numbers:
        told: dict = {}
        own = texts[4 * step : 4 * step + 8]
        scores = {"size": [len(text) for text in own], "odd": [len(text) % 5 for text in own]}
        report = {"log_metric": told.__setitem__, "log_extra": told.__setitem__}
        result = call(reward, own, scores=scores, trainer_state=at(step), **report)
        made.append((result, told))
    return made


@pytest.mark.parametrize("reward_model", [None, "online"])
def test_a_run_that_is_killed_asks_and_scores_as_one_that_is_not(human, tmp_path, reward_model):
    """Killed in its tenth step, after two labels of three; its checkpoint is of the seventh."""
    texts, truth = spoken(60)
    good = {text for text, score in zip(texts, truth, strict=True) if score > 0}
    keys = {"ask": 3, "reward_model": reward_model}

    def rule(text: str) -> str:
        return "+" if text in good else "-"

    reward, people = human(rule, labels=str(tmp_path / "whole.sqlite"), **keys)
    whole = steps(reward, texts, range(12))
    assert [told["human/asked"] for _, told in whole] == [3] * 12

    reward, before = human(rule, **keys)
    assert steps(reward, texts, range(7)) == whole[:7]
    checkpoint = json.loads(json.dumps(reward.state_dict()))
    assert steps(reward, texts, range(7, 10)) == whole[7:10]
    undone = reward.queue.labels
    undone.remove(undone.key("p", before.seen.pop()))  # of the last step two are there,
    last = "asked = (SELECT MAX(asked) FROM batch_times)"  # and it was asked about until the kill
    undone.base.execute(f"UPDATE batch_times SET ended = NULL WHERE {last}")

    reward, after = human(rule, **keys)
    reward.load_state_dict(checkpoint)
    assert steps(reward, texts, range(7, 12)) == whole[7:], "the same, bit for bit"
    assert before.seen + after.seen == people.seen, "and nothing was asked twice"
    assert "human/agreement/size" in whole[-1][1]
    assert ("human/head_error" in whole[-1][1]) == (reward_model == "online")


def test_labels_of_a_later_step_and_of_nobodys_choice_stay_out_of_a_repeated_step(human):
    reward, people = human(ask=1)
    assert call(reward, ["a", "b"], trainer_state=at(1)) == [1.0, None]
    assert call(reward, ["b", "c"], trainer_state=at(2)) == [1.0, None]
    assert call(reward, ["a", "b"], trainer_state=at(1)) == [1.0, None], "as the first time"
    assert call(reward, ["a", "b", "c"], trainer_state=at(3)) == [1.0, 1.0, 1.0]
    assert people.seen == ["a", "b", "c"]


def test_what_nobody_answered_in_time_stays_missing_in_a_repeated_step(human):
    """Whoever labels it later: nobody is asked again, and the label counts from then on."""
    nobody, _ = human(None, timeout=0.05)
    assert call(nobody, ["a"], trainer_state=at(1)) == [None]
    reward, people = human()
    assert call(reward, ["a"], trainer_state=at(2)) == [1.0]
    assert call(reward, ["a"], trainer_state=at(1)) == [None], "as the first time"
    assert call(reward, ["a"], trainer_state=at(3)) == [1.0]
    assert people.seen == ["a"]


def test_a_file_of_labels_of_an_earlier_version_is_read(tmp_path, human):
    with closing(sqlite3.connect(tmp_path / "labels.sqlite")) as base, base:
        base.execute(
            "CREATE TABLE labels (key TEXT PRIMARY KEY, score REAL, who TEXT, "
            "time REAL, question TEXT, scale TEXT, prompt TEXT, completion TEXT)"
        )
        base.execute("CREATE TABLE batches (batch TEXT PRIMARY KEY, time REAL)")
        with closing(Labels(tmp_path / "other.sqlite", "Good?", "binary")) as other:
            key = other.key("p", "a")
        row = (key, -1.0, "ann", 1e9, "Good?", "binary", "p", "a")
        base.execute("INSERT INTO labels VALUES (?,?,?,?,?,?,?,?)", row)
    reward, people = human(ask=1)
    assert call(reward, ["a", "b", "c"], trainer_state=at(1)) == [-1.0, 1.0, None]
    assert people.seen == ["b"]


def test_several_people_report_under_their_names(human):
    (ann, _), (bob, _) = human(name="ann", ask=1), human(lambda _: "1", scale="1-5", name="bob")
    bob_told, told = {}, {}
    scores = {"up": [1.0, 2.0]}
    for reward, own in ((ann, told), (bob, bob_told)):
        reports = {"log_metric": own.__setitem__, "log_extra": own.__setitem__}
        call(reward, ["a", "b"], scores=scores, **reports)
    assert told == {
        "ann/asked": 1, "ann/labelled": 0.5, "ann/labelled_by": ["people", "nobody"]
    }  # fmt: skip
    assert bob_told["bob/asked"] == 2 and bob_told.keys().isdisjoint(told)


def test_nobody_answers_in_time(human):
    reward, _ = human(None, timeout=0.05)
    assert call(reward, ["a"]) == [None]


def test_agreement_with_other_rewards_is_told(human):
    reward, _ = human(lambda text: "+" if text > "b" else "-")
    told: dict = {}
    scores = {"up": [0.0, 1.0, 2.0, 3.0], "down": [3.0, None, 1.0, 0.0]}
    call(reward, list("abcd"), scores=scores, log_metric=told.__setitem__)
    assert told["human/agreement/up"] == 1 and told["human/agreement/down"] == 0


def test_a_composite_hands_people_the_others_scores(human):
    """Also of one that waits for a network, and in whatever order they are named."""

    async def slow(completions, **_):
        return [None if text == "b" else 5.0 for text in completions]

    seen: dict = {}

    class People(Reward):
        type: str = "people"

        @property
        def after_others(self) -> bool:
            return True

        async def __call__(self, prompts, completions, *, scores, **_):
            seen.update(scores)
            return [1.0, 2.0]

    rewards = {"people": People(), "slow": slow, "length": lambda completions, **_: [1.0, np.nan]}
    composite = CompositeReward(rewards)
    scores = composite.score(["p", "p"], ["a", "b"])
    assert seen == {"slow": [5.0, None], "length": [1.0, None]}
    assert composite.names == ["people", "slow", "length"]
    assert as_list(scores[:, 0]) == [1.0, 2.0]
    assert composite.quarantined["length"] == 1, "counted once"


def test_labels_that_a_resumed_run_does_not_find_are_named(human, tmp_path):
    reward, _ = human()
    call(reward, ["a", "b"])
    kept = json.loads(json.dumps(reward.state_dict()))
    reward.load_state_dict(kept)
    assert reward.lost_labels() is None
    other, _ = human(labels=str(tmp_path / "new.sqlite"))
    call(other, ["b"])
    other.load_state_dict(kept)
    assert other.lost_labels() == (
        f"'human': 1 of the last 2 labels of this run are not in its LABELS {other.labels}. Put "
        "their file back, or set LABELS to it, and resume again"
    )


def test_a_run_that_goes_on_without_its_labels_says_so(
    main, run_parts, settings, tmp_path, caplog, capsys
):
    def keys(labels: str, **more) -> dict:
        spec = {"TYPE": "human", "WHERE": "web", "PORT": 0, "LABELS": str(tmp_path / labels)}
        return settings | {"REWARDS": [spec | more], "RESUME": "auto"}

    people = []

    def answered(parts):
        people.append(Robot(parts.scoring.rewards.rewards["human"].queue, lambda text: "+"))
        return parts

    assert run_parts(keys("labels.sqlite") | {"STEPS": 1}, answered) == 0
    people[0].thread.join()
    caplog.clear()
    assert main(keys("new.sqlite", TIMEOUT=0.05) | {"STEPS": 2}) == 0
    message = (
        f"'human': 8 of the last 8 labels of this run are not in its LABELS "
        f"{tmp_path / 'new.sqlite'}. Put their file back, or set LABELS to it, and resume again"
    )
    assert f"step 1: {message}" in caplog.messages
    event = {"step": 1, "kind": "labels lost", "message": message, "action": "warn"}
    assert event in read_jsonl(tmp_path / "run/events.jsonl")
    assert f"\n   evidence: from step 2 on: {message}\n" in doctor(tmp_path / "run")[0]


# The head


def spoken(count: int, seed: int = 0) -> tuple[list[str], list[float]]:
    """Texts of six words; good where they hold more of the first five than of the second."""
    chance = random.Random(seed)
    good, bad = ["fine", "great", "lovely", "warm", "fun"], ["dull", "poor", "cold", "weak", "sad"]
    rows = [
        [chance.choice(good + bad + ["a", "the", "of"]) for _ in range(6)] for _ in range(count)
    ]
    scores = [sum((w in good) - (w in bad) for w in row) for row in rows]
    return [" ".join(row) for row in rows], [1.0 if s > 0 else -1.0 for s in scores]


def test_the_head_learns_and_knows_how_well():
    """What it says of its error from the labels alone holds for texts that it has not seen."""
    texts, truth = spoken(400)
    head = RidgeHead(texts[:200], truth[:200])
    said = np.array(head(texts[200:]))
    unseen = float(np.sqrt(((said - truth[200:]) ** 2).mean()))
    assert head.error == pytest.approx(unseen, rel=0.15)
    assert unseen < 0.75 * head.error_of_mean
    slope = np.polyfit(said, truth[200:], 1)[0]
    assert head.slope == pytest.approx(slope, rel=0.25)
    assert (np.sign(said) == truth[200:]).mean() > 0.85


def test_leave_one_out_is_leaving_one_out():
    """The formula against 25 ridge regressions that each miss one label, at the same penalty."""
    texts, truth = spoken(25)
    head = RidgeHead(texts, truth)
    x, y, left = head.features(texts), np.array(truth), []
    for i in range(25):
        others = [j for j in range(25) if j != i]
        own, mean = x[others] - x[others].mean(0), y[others].mean()
        inner = own @ own.T + head.ridge.alpha_ * np.eye(24)
        told = (x[i] - x[others].mean(0)) @ own.T @ np.linalg.solve(inner, y[others] - mean)
        left.append(mean + told)
    assert head.left_out == pytest.approx(np.array(left))
    assert head.error == pytest.approx(float(np.sqrt(np.mean((y - left) ** 2))))


def test_a_head_that_knows_nothing_is_no_better_than_the_mean():
    """Texts that share no word tell nothing of each other."""
    head = RidgeHead([f"a{i} b{i}" for i in range(20)], [1.0, -1.0, -1.0, 1.0] * 5)
    assert head.error == pytest.approx(head.error_of_mean, rel=1e-6)
    assert head.slope <= 0


def test_a_head_of_noise_says_little():
    texts, _ = spoken(200)
    chance = random.Random(1)
    head = RidgeHead(texts, [chance.choice([-1.0, 1.0]) for _ in texts])
    assert head.error > 0.95 * head.error_of_mean
    assert np.abs(head(texts)).max() < 0.6, "near the mean, which is what missing means too"


def test_the_head_fills_in_once_there_are_labels(human):
    texts, truth = spoken(60)
    good = {text for text, score in zip(texts, truth, strict=True) if score > 0}
    reward, _ = human(lambda text: "+" if text in good else "-", ask=10, reward_model="online")
    told: dict = {}
    assert call(reward, texts[:20]).count(None) == 10, "ten labels are too few for it"
    result = call(reward, texts[20:], log_metric=told.__setitem__, log_extra=told.__setitem__)
    assert told["human/asked"] == 10 and None not in result
    assert told["labelled_by"].count("people") == 10 and told["labelled_by"].count("head") == 30
    people = [x for x, by in zip(result, told["labelled_by"], strict=True) if by == "people"]
    assert set(people) == {1.0, -1.0}
    head = RidgeHead(*zip(*reward.queue.labels.learned(99), strict=True))
    assert told["human/head_error"] == head.error
    assert told["human/head_slope"] == head.slope
    with pytest.raises(ValueError, match=f"fewer than {MIN_LABELS}"):
        RidgeHead(texts[:3], truth[:3])


# The terminal


def test_a_model_cannot_steer_the_terminal():
    assert printable("\033[2Jhi\x07\nthere\r") == "�[2Jhi�\nthere�"


KEYS = {
    "up": "\033[A", "application up": "\033OA", "delete": "\033[3~", "page up": "\033[5~",
    "home": "\033[1~", "F5": "\033[15~", "console F1": "\033[[A", "control right": "\033[1;5C",
    "alt y": "\033y", "alt down": "\033\033[B", "escape": "\033", "é": "é",
}  # fmt: skip


@pytest.fixture
def pseudo(tmp_path):
    """A Terminal of the scale 1-5 on a pseudo terminal, and its other end."""
    master, slave = os.openpty()
    with closing(Labels(tmp_path / "labels.sqlite", "Good?", "1-5")) as labels:
        made = Terminal(LabelQueue(labels, "1-5"), "Good?", device=os.ttyname(slave))
        yield made, master
    for file in (master, slave, made.file):
        os.close(file)


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key_of_several_bytes_is_one_key_and_no_label(pseudo, key):
    terminal, master = pseudo
    with terminal._single_keys():
        os.write(master, f"{key}2".encode())
        if key == ESC:  # then it is Alt with 2
            os.write(master, b"2")
        pressed = [terminal._read_key()]
        while pressed[-1] != "2":
            pressed.append(terminal._read_key())
    assert not {*pressed[:-1]} & {"1", "2", "3", "4", "5", "s", "u", *KEY_ALIASES}


def test_keys_from_before_a_question_are_no_answer_to_it(pseudo):
    terminal, master = pseudo
    os.write(master, b"41\n")
    assert select.select([terminal.file], [], [], 60)[0], "the line has come through the terminal"
    with terminal._single_keys():
        os.write(master, b"5")
        assert terminal._read_key() == "5"


def test_a_scale_of_numbers_says_which_end_is_good(pseudo):
    terminal, master = pseudo
    terminal._show(Question("k", "p", "c"))
    assert "[1] worst  [2]  [3]  [4]  [5] best" in os.read(master, 4096).decode()


def test_a_question_that_goes_away_says_why(pseudo):
    terminal, master = pseudo
    assert terminal._key_for(Question("k", "p", "c")) is None
    assert os.read(master, 4096).decode() == "no answer within TIMEOUT\r\n"


def test_who_answers_too_late_is_told(pseudo):
    terminal, master = pseudo
    terminal.start()
    queue = terminal.queue
    run = ThreadPoolExecutor(1).submit(queue.ask, questions(queue, "x"), None)
    shown = ""
    while "[u] undo" not in shown:
        shown += os.read(master, 4096).decode()
    queue.labels.add("p", "x", -1.0, "of another run")
    os.write(master, b"5")
    run.result(60)
    queue.close()
    terminal.close()
    said = os.read(master, 4096).decode()
    assert said == "5\r\nthat one was labelled already, or timed out\r\n"


@pytest.mark.parametrize("when", ["before a question", "before a key"])
def test_a_terminal_that_goes_away_stops_the_run_and_is_named(queue, when, monkeypatch):
    """Its window was closed, and the run does not end by that (nohup)."""
    unhandled = []
    monkeypatch.setattr(threading, "excepthook", unhandled.append)
    master, slave = os.openpty()
    terminal = Terminal(queue, "Good?", device=os.ttyname(slave))
    os.close(slave)
    if when == "before a question":
        os.close(master)
    terminal.start()
    run = ThreadPoolExecutor(1).submit(queue.ask, questions(queue, "x"), None)
    if when == "before a key":
        shown = ""
        while "[u] undo" not in shown:
            shown += os.read(master, 4096).decode()
        os.close(master)
    with pytest.raises(Interrupted, match=r"^the terminal on which people were asked is gone"):
        run.result(60)
    terminal.close()
    os.close(terminal.file)
    assert unhandled == [] and not terminal.thread.is_alive()


class Typist:
    """train.py on a terminal of its own: what it shows, and fingers."""

    def __init__(self, warm: Server, *arguments: str):
        self.master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, b"\x28\x00\x50\x00" + bytes(4))  # 40 × 80
        self.modes = termios.tcgetattr(self.slave)
        self.shown = ""
        self.process = warm.start(
            [sys.executable, "train.py", *arguments],
            ENVIRONMENT | {"NO_COLOR": "1"},
            stdin=self.slave,
            output=self.slave,
            start_new_session=True,
        )

    def until(self, pattern: str) -> str:
        """What is shown from here on, up to the first match of `pattern`."""
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            ready = select.select([self.master], [], [], 120)[0]
            assert ready, f"nothing more came after {self.shown!r}"
            self.shown += os.read(self.master, 4096).decode().replace("\r\n", "\n")
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def question(self) -> str:
        return self.until(r"\[u\] undo  ")

    def press(self, key: str) -> None:
        os.write(self.master, key.encode())

    def end(self) -> int:
        """The exit status, after everything was read."""
        while self.process.poll() is None:
            if select.select([self.master], [], [], 0.1)[0]:
                self.shown += os.read(self.master, 4096).decode().replace("\r\n", "\n")
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def typist(tmp_path, warm):
    made = []

    def start(keys: dict | Path, *arguments: str) -> Typist:
        path = keys
        if isinstance(keys, dict):
            path = tmp_path / "config.json"
            path.write_text(json.dumps(keys))
        made.append(Typist(warm, str(path), *arguments))
        return made[-1]

    yield start
    for each in made:
        each.close()


def asked_keys(settings: dict, tmp_path: Path, **more) -> dict:
    spec = {"TYPE": "human", "LABELS": str(tmp_path / "labels.sqlite")} | more
    return settings | {
        "REWARDS": [spec, {"TYPE": "length", "TARGET": 6}], "BATCH_SIZE": 4, "SAVE_EVERY": 1,
    }  # fmt: skip


def test_labelling_on_the_terminal(typist, settings, tmp_path):
    """Every key, an undo, and Ctrl-C in the middle, which loses no label."""
    keys = asked_keys(settings, tmp_path)
    person = typist(keys)
    first = person.question()
    assert "Is this completion good?  (4 left)" in first
    assert "length" not in first, "what others say would sway people"
    for key, left in (("+", 3), ("-", 2), ("u", 3), ("x", None), ("y", 2), ("s", 1)):
        person.press(key)
        if left:
            assert f"({left} left)" in person.question()
    assert termios.tcgetattr(person.slave)[3] & termios.ECHO == 0, "keys come one by one"
    person.press("-")
    assert "(4 left)" in person.question(), "the next batch"
    person.press("u")
    assert "nothing to undo: you have labelled nothing in this batch" in person.question()
    person.press("+")
    person.question()
    person.press("\x03")
    assert person.end() == 128 + signal.SIGINT
    assert person.shown.endswith("RESUME=auto tries again\n")
    assert "paused before step 2: stopped while people were asked. Saved in" in person.shown
    assert termios.tcgetattr(person.slave) == person.modes, "the terminal is as it was"
    run = tmp_path / "run"
    head, found = doctor(run)[0].split("\n", 1)
    assert head == f"{run}: 1 step of 3, stopped by SIGINT after step 1"
    assert "failed" not in found and re.findall(r"^\d\. .*", found, re.MULTILINE) == [
        "1. the reward 'human' is missing for many completions: people skipped them"
    ]

    samples = read_jsonl(tmp_path / "run/samples.jsonl")
    assert [row["rewards/human"] for row in samples] == [1.0, 1.0, None, -1.0]
    assert [row["labelled_by"] for row in samples] == ["people", "people", "nobody", "people"]

    person = typist(keys | {"STEPS": 2}, "RESUME=auto")
    assert "(3 left)" in person.question(), "one of the four has its label"
    for _ in range(2):
        person.press("-")
        person.question()
    person.press("-")
    assert person.end() == 0 and "finished: 2 steps" in person.shown
    samples = read_jsonl(tmp_path / "run/samples.jsonl")[4:]
    assert [row["rewards/human"] for row in samples] == [1.0, -1.0, -1.0, -1.0]


def test_the_recipe_runs(typist, tmp_path):
    """configs/human.json from the command line: a dry run and ten steps of four labels.

    The first step asks for what the dry run asked for, which has its labels.
    """
    recipe = json.loads(re.sub(r"//.*", "", (ROOT / "configs/human.json").read_text()))
    recipe["REWARDS"][0]["LABELS"] = str(tmp_path / "labels.sqlite")
    small = ["BATCH_SIZE=8", "MAX_NEW_TOKENS=8", f"OUTPUT_DIR={tmp_path / 'run'}"]
    small.append(f"REWARDS={json.dumps(recipe['REWARDS'])}")
    for more, last in (("--dry-run", "nothing was trained"), ("STEPS=10", "finished: 10 steps")):
        person, asked = typist(ROOT / "configs/human.json", more, *small), 0
        while last not in person.until(rf"\[u\] undo  |{last}"):
            person.press("+-"[asked % 2])
            asked += 1
        assert person.end() == 0
        assert asked == (4 if more == "--dry-run" else 36)
    last = read_jsonl(tmp_path / "run/metrics.jsonl")[-1]
    assert last["human/asked"] == 4 and last["rewards/human/mean"] is not None
    assert "human/head_error" in last and "human/agreement/classifier" in last


def test_no_terminal(settings, tmp_path, warm):
    (tmp_path / "config.json").write_text(json.dumps(asked_keys(settings, tmp_path)))
    command = [sys.executable, "train.py", str(tmp_path / "config.json")]
    process = warm.start(command, ENVIRONMENT, start_new_session=True)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.endswith(
        "error: REWARDS.0: people cannot be asked: this process has no terminal; "
        '"WHERE": "web" needs none\n'
    )
