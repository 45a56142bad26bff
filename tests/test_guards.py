"""Runs whose rewards are equal, missing, not finite or in the way: what is said, what is kept."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import read_jsonl, without_clock

from adaptiverl.__main__ import main as adaptiverl
from adaptiverl.training.guards import Guards
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.trends import trend
from rewards import Interrupted

ONE = [{"TYPE": "length", "MAX": 500}]  # 1.0 for every completion


@pytest.fixture
def reward(monkeypatch) -> Callable[[Callable], dict]:
    """Makes a function of the test an entry of REWARDS."""

    def entry(function: Callable) -> dict:
        module = ModuleType("rewards_of_a_test")
        module.mine = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return {"TYPE": "python", "FUNCTION": f"{module.__name__}:mine"}

    return entry


def rows(settings: dict) -> list[dict]:
    return read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")


def warnings(caplog, words: str) -> list[str]:
    return [text for text in caplog.messages if words in text]


# Nothing to learn from


@pytest.mark.parametrize(("steps", "at"), [(7, 5), (3, 3)])
def test_equal_rewards_are_warned_of_once(main, settings, caplog, steps, at):
    assert main(settings | {"REWARDS": ONE, "STEPS": steps}) == 0
    assert [row["frac_reward_zero_std"] for row in rows(settings)] == [1.0] * steps
    (text,) = warnings(caplog, "the same reward")
    assert text.startswith(
        f"step {at}: in each of the last {at} steps all completions got the same reward, so only "
    )
    assert "Change REWARDS" in text and "NUM_GENERATIONS" in text


def test_equal_rewards_without_a_comparison_train_noise(main, settings, caplog):
    assert main(settings | {"REWARDS": ONE, "KL_COEF": 0, "BASELINE": "none"}) == 0
    assert min(row["grad_norm"] for row in rows(settings)) > 0
    (text,) = warnings(caplog, "the same reward")
    assert "so what is trained is noise: BASELINE none compares no completions" in text


def test_equal_rewards_without_a_penalty_leave_the_weights_alone(main, settings, tiny):
    from safetensors.torch import load_file

    assert main(settings | {"REWARDS": ONE, "KL_COEF": 0}) == 0
    trained = load_file(Path(settings["OUTPUT_DIR"]) / "final/model.safetensors")
    before = load_file(tiny / "model.safetensors")
    assert all(torch.equal(trained[name], before[name]) for name in before)
    assert [row["grad_norm"] for row in rows(settings)] == [0.0] * 3


def test_rewards_that_differ_now_and_then_are_not_warned_of(main, settings, caplog, reward):
    """Equal in all steps but the fourth and the eighth."""

    def rare(completions, trainer_state, **_):
        hit = float(trainer_state.global_step % 4 == 0)
        return [hit * (k == 0) for k in range(len(completions))]

    assert main(settings | {"REWARDS": [reward(rare)], "STEPS": 8}) == 0
    flat = [row["frac_reward_zero_std"] for row in rows(settings)]
    assert flat == [1, 1, 1, 0.5, 1, 1, 1, 0.5], "one of two prompts differs"
    assert caplog.messages == []


@pytest.mark.parametrize(("baseline", "said"), [("rloo", True), ("batch", False)])
def test_rewards_that_differ_between_prompts_only(main, settings, caplog, reward, baseline, said):
    """BASELINE batch learns from them, rloo does not."""

    def by_prompt(prompts, **_):
        return [float(prompt == prompts[0]) for prompt in prompts]

    assert main(settings | {"REWARDS": [reward(by_prompt)], "BASELINE": baseline}) == 0
    assert bool(warnings(caplog, "equal")) == said


@pytest.mark.parametrize(
    ("baseline", "place", "key"),
    [("rloo", "no prompt", "NUM_GENERATIONS"), ("batch", "no step", "BATCH_SIZE")],
)
def test_rewards_that_are_too_few_to_compare(
    main, settings, caplog, capsys, reward, baseline, place, key
):
    """With one reward per prompt, or per batch, no change of REWARDS tells completions apart."""

    def rare(completions, **_):
        own = 4 if baseline == "rloo" else len(completions)
        return [float(k) if k % own == 0 else None for k in range(len(completions))]

    keys = {"REWARDS": [reward(rare)], "BASELINE": baseline, "STEPS": 5}
    assert main(settings | keys) == 0
    (text,) = warnings(caplog, "missing")
    assert f"that {place} has two to compare" in text and text.endswith(f"or raise {key}")
    assert not warnings(caplog, "same reward") and not warnings(caplog, "equal")
    capsys.readouterr()
    adaptiverl(["doctor", settings["OUTPUT_DIR"]])
    told = capsys.readouterr().out
    assert "is missing for many completions" in told and "the same reward" not in told


def test_a_collapse_is_warned_of_at_once(main, settings, caplog):
    keys = {"LRATE": 50, "LR_RULE": "none", "STEPS": 6, "REWARDS": settings["REWARDS"][:1]}
    keys |= {"ON_COLLAPSE": "warn"}
    assert main(settings | keys) == 0
    assert rows(settings)[1]["entropy"] < 0.1, "or the test would show nothing"
    (text,) = warnings(caplog, "collapsed")
    assert text.startswith("step 2: the policy repeats itself (entropy ")
    event = read_jsonl(Path(settings["OUTPUT_DIR"]) / "events.jsonl")[0]
    assert (event["step"], event["kind"], event["action"]) == (2, "collapsed", "warn")
    assert text == f"step 2: {event['message']}"
    assert "LRATE" in text and "LR_RULE" in text


@pytest.mark.parametrize("start", [0.0, 1e9])
def test_differences_that_32_bits_lose_are_told_from_none(main, settings, caplog, reward, start):
    def mine(completions, **_):
        return [start + (start > 0) * i / 10 for i in range(len(completions))]

    assert main(settings | {"REWARDS": [reward(mine)]}) == 0
    (text,) = warnings(caplog, "all completions got the same reward")
    said = "of the size of 1e+09 they are equal if they differ by less than about 1.2e+02"
    assert (said in text) == (start > 0)


@pytest.mark.parametrize("value", [None, float("nan"), 1e39])
def test_rewards_that_are_all_missing_are_warned_of_once(main, settings, caplog, reward, value):
    keys = {"REWARDS": [reward(lambda completions, **_: [value] * len(completions))]}
    assert main(settings | keys) == 0
    assert [row["reward"] for row in rows(settings)] == [None] * 3
    (text,) = warnings(caplog, "no completion has a reward")
    assert text.startswith("step 1: ") and "mine gave None" in text and "REWARDS" in text
    odd = warnings(caplog, "reward 'mine' is not finite, or beyond 1e+16, for 8 of 8 completions")
    assert len(odd) == (0 if value is None else 1), "once"
    counts = [row.get("rewards/mine/quarantined") for row in rows(settings)]
    assert counts == ([None] * 3 if value is None else [8, 16, 24])


def test_people_who_give_no_label_are_not_said_to_give_no_numbers(main, settings, caplog, tmp_path):
    human = {"TYPE": "human", "WHERE": "web", "PORT": 0, "TIMEOUT": 0.05}
    human["LABELS"] = str(tmp_path / "labels.sqlite")
    assert main(settings | {"REWARDS": [human], "STEPS": 1}) == 0
    assert warnings(caplog, "no completion has a reward") == [
        "step 1: no completion has a reward: human has no label: nobody answered within TIMEOUT, "
        "or all were skipped. Such a step trains nothing; look at REWARDS"
    ]


def test_a_resumed_run_warns_no_second_time(main, settings, caplog):
    keys = settings | {"REWARDS": ONE, "STEPS": 5, "TRUST_REGION_SCHEDULE": "constant"}
    assert main(keys) == 0
    caplog.clear()
    assert main(keys | {"STEPS": 7, "RESUME": "auto"}) == 0
    assert warnings(caplog, "equal") == []


def test_what_was_quarantined_is_counted_on_after_a_resume(main, settings, reward):
    """Bit for bit; of held-out rewards, too."""

    def odd(completions, **_):
        return [float("nan"), 1e39] + [float(len(text)) for text in completions[2:]]

    entry = reward(odd)
    keys = settings | {"REWARDS": [entry], "HELD_OUT": [entry | {"NAME": "watched"}]}
    keys |= {"STEPS": 4, "SAVE_EVERY": 2, "RESUME": "auto"}
    assert main(keys) == 0
    whole = rows(settings)
    assert [row["rewards/mine/quarantined"] for row in whole] == [2, 4, 6, 8]
    assert [row["held_out/rewards/watched/quarantined"] for row in whole] == [2, 4, 6, 8]
    out = Path(settings["OUTPUT_DIR"])
    for name in ("final", "step-000004"):
        (out / name / "trainer.pt").unlink()
    assert main(keys) == 0
    assert without_clock(rows(settings)) == without_clock(whole)


# Evaluations without a reward


def fails(prompts, **_):
    raise KeyError("no such prompt")


def stopped(prompts, **_):
    raise Interrupted("the labelling was stopped")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda prompts, **_: [None] * len(prompts), ""),
        (fails, "evaluation left out: reward 'mine' failed (KeyError: 'no such prompt')"),
        (stopped, "evaluation left out: the labelling was stopped"),
    ],
)
def test_an_evaluation_without_a_reward_says_so(
    main, settings, capsys, caplog, tmp_path, reward, answer, said
):
    """And the run goes on: a line on the console is due in the same step."""
    (tmp_path / "eval.json").write_text(json.dumps([{"prompt": "odd"}, {"prompt": "odd"}]))

    def mine(prompts, completions, **_):
        return answer(prompts) if "odd" in prompts else [float(len(text)) for text in completions]

    keys = {"REWARDS": [reward(mine)], "EVAL_FILE": str(tmp_path / "eval.json"), "EVAL_EVERY": 2}
    assert main(settings | keys | {"LOG_EVERY": 1}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("Step 2/3 |") and " | Eval reward: missing | ETA" in lines[1]
    assert "Eval reward" not in lines[2] and lines[3].startswith("finished: 3 steps")
    assert [row.get("eval/reward", "none") for row in rows(settings)] == ["none", None, "none"]
    assert said in caplog.text


# What rewards report


@pytest.mark.parametrize(
    "name",
    ["reward", "step", "loss", "eval/reward", "rewards/mine/mean", "kl_coef", "sampling/mine"],
)
def test_a_reward_may_not_report_under_the_runs_own_names(main, settings, capsys, reward, name):
    def mine(completions, log_metric, **_):
        log_metric(name, 7.0)
        return [0.0] * len(completions)

    assert main(settings | {"REWARDS": [reward(mine)], "KL_COEF": 0}) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        f"paused before step 1: reward 'mine' failed (ValueError: log_metric({name!r}, …): the run "
        "logs something of its own under this name; choose another)"
    )


@pytest.mark.parametrize("value", ["abc", None, np.ones(2)])
def test_a_metric_that_is_no_number_is_named(main, settings, capsys, reward, value):
    def mine(completions, log_metric, **_):
        log_metric("size", value)
        return [0.0] * len(completions)

    assert main(settings | {"REWARDS": [reward(mine)]}) == 3
    said = f"(ValueError: log_metric('size', …): {value!r} is not one number)"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompt", "completion", "logprobs", "step", "rewards/mine"])
def test_nor_columns_of_samples(main, settings, capsys, reward, name):
    def mine(completions, log_extra, **_):
        log_extra(name, list(completions))
        return [0.0] * len(completions)

    assert main(settings | {"REWARDS": [reward(mine)]}) == 3
    assert f"reward 'mine' failed (ValueError: log_extra({name!r}, …)" in capsys.readouterr().err


def test_a_column_of_another_length_is_refused(main, settings, capsys, reward):
    def mine(completions, log_extra, **_):
        log_extra("note", ["one"])
        return [0.0] * len(completions)

    assert main(settings | {"REWARDS": [reward(mine)]}) == 3
    assert "log_extra('note', …): 1 values for 8 rows" in capsys.readouterr().err


def test_every_name_that_a_run_logs_is_its_own(main, settings):
    from adaptiverl.training.metrics import is_own

    keys = {"EVAL_FILE": settings["TRAIN_FILE"], "EVAL_EVERY": 1, "LR_RULE": "trust_region"}
    assert main(settings | keys | {"HELD_OUT": ONE, "STEPS": 1}) == 0
    samples = read_jsonl(Path(settings["OUTPUT_DIR"]) / "samples.jsonl")
    names = {name for row in rows(settings) + samples for name in row}
    assert names > {"step", "reward", "prompt", "eval/reward", "held_out/rewards/length/mean"}
    assert [name for name in names if not is_own(name)] == []
    assert not is_own("human/asked") and not is_own("accuracy")


def test_numbers_of_numpy_and_torch_are_logged(main, settings, reward):
    def mine(completions, log_metric, log_extra, **_):
        log_metric("numpy", np.float32(0.5))
        log_metric("torch", torch.tensor(3))
        log_metric("lost", np.float64("nan"))
        count = len(completions)
        log_extra("tensor", torch.arange(count))
        log_extra("array", np.ones((count, 2)))
        log_extra("odd", [float("inf"), np.float32("nan"), {1.5}, Path("a")] + [(1, None)] * 4)
        return np.zeros(count)

    assert main(settings | {"REWARDS": [reward(mine)], "STEPS": 1}) == 0
    (row,) = rows(settings)
    assert (row["numpy"], row["torch"], row["lost"]) == (0.5, 3.0, None)
    samples = read_jsonl(Path(settings["OUTPUT_DIR"]) / "samples.jsonl")
    assert [sample["tensor"] for sample in samples] == list(range(8))
    assert [sample["array"] for sample in samples] == [[1.0, 1.0]] * 8
    assert [sample["odd"] for sample in samples] == [None, None, "{1.5}", "a"] + [[1, None]] * 4


def test_a_length_that_no_completion_reaches_is_warned_of(main, settings, caplog):
    lengths = [{"TARGET": 9}, {"MIN": 8}, {"MAX": 99}, {"TARGET": 9, "UNIT": "words"}]
    rewards = [{"TYPE": "length", "NAME": str(i)} | keys for i, keys in enumerate(lengths)]
    keys = {"REWARDS": rewards, "HELD_OUT": [{"TYPE": "length", "MIN": 10}], "MAX_NEW_TOKENS": 8}
    assert main(settings | keys, "--dry-run") == 0
    assert warnings(caplog, "no completion reaches") == [
        "REWARDS.0: no completion reaches TARGET 9: it has at most 8 tokens (MAX_NEW_TOKENS)",
        "HELD_OUT.0: no completion reaches MIN 10: it has at most 8 tokens (MAX_NEW_TOKENS)",
    ]


def test_a_rate_of_zero_is_warned_of_at_the_first_step(main, settings, caplog):
    assert main(settings | {"LRATE": 0, "STEPS": 2}) == 0
    told = [text for text in caplog.messages if "the learning rate is 0" in text]
    assert len(told) == 1 and told[0].startswith("step 1:")


def test_of_several_processes_the_main_one_warns(caplog):
    numbers = {"grad_norm": 0.0, "lr": 0.0, "reward": 1.0, "entropy": 1.0}
    numbers |= {"sampling/sampling_logp_difference/mean": 0.0, "completions/distinct_2": 1.0}
    numbers |= {"completions/clipped_ratio": 0.5, **OWN_TEXTS}
    for is_main in (False, True):
        guards = Guards(RunConfig(), last_step=100, allowed_gap=1e-3, is_main=is_main)
        guards.look(1, torch.rand(32), torch.ones(32), numbers)
        assert guards.warned == ["no gradient", "rate"], "all processes remember alike"
        assert len(caplog.messages) == 2 * is_main


# Figures that drift: by the step in which each guard first speaks

OWN_TEXTS = {"completions/equal_within_prompts": 1.0, "completions/equal_across_prompts": 0.5}
SAME_TEXT = {"completions/equal_across_prompts": 0.9}


def told(rows: list[dict], **keys) -> list[tuple[int, str]]:
    """Step and kind of all that Guards say of such steps; `flat`: rewards are equal."""
    guards = Guards(RunConfig(**keys), last_step=1000, allowed_gap=1e-3)
    for step, row in enumerate(rows, 1):
        sound = {
            "grad_norm": 1.0, "lr": 1e-4, "reward": 0.5, "entropy": 2.5, "kl": 0.1,
            "kl_per_completion": 3.2, "completions/distinct_2": 0.7,
            "completions/clipped_ratio": 0.8, "sampling/sampling_logp_difference/mean": 0.0,
            **OWN_TEXTS,
        }  # fmt: skip
        rewards = torch.full((32,), 0.5) if row.pop("flat", False) else torch.arange(32.0)
        guards.look(step, rewards, torch.ones(32), sound | row)
    said = [(event["step"], event["kind"]) for event in guards.events]
    collapse = guards.collapse
    return [*said, (collapse.step, collapse.kind)] if collapse else said


def test_unsound_figures_tell_against_the_checkpoint_of_the_step_before():
    guards = Guards(RunConfig(), last_step=1000, allowed_gap=1e-3, sound_steps=[2, 4])
    row = {
        "grad_norm": 1.0, "lr": 1e-4, "reward": 0.5, "entropy": 2.5, "kl": 0.1,
        "kl_per_completion": 3.2, "completions/distinct_2": 0.7, "completions/clipped_ratio": 0.8,
        "sampling/sampling_logp_difference/mean": 0.0, **OWN_TEXTS,
    }  # fmt: skip
    for step, kl, left in ((5, 0.1, [2, 4]), (6, 9.0, [2, 4]), (5, 9.0, [2])):
        far = {"kl": kl, "kl_per_completion": 32 * kl}
        guards.look(step, torch.arange(32.0), torch.ones(32), row | far)
        assert guards.sound_steps == left


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{}] * 60, []),
        ([{}] * 5 + [{"entropy": 0.5}] * 5, [(10, "entropy")]),
        ([{}] * 5 + [{"completions/distinct_2": 0.2}] * 5, [(10, "distinct")]),
        ([{}] * 5 + [{"kl": 1.2, "kl_per_completion": 38.0}] * 5, [(10, "kl")]),
        ([{}] * 5 + [{"kl": 3.0, "kl_per_completion": 6.0}] * 5, []),  # two tokens each
        ([{"kl": 6.0, "kl_per_completion": 190.0}] * 3, [(3, "kl beyond reason")]),
        ([{}, {"kl": 6.0, "kl_per_completion": 190.0}, {}], []),  # once is an outlier
        ([{"completions/clipped_ratio": 1.0}] * 20, [(20, "cut off")]),
        ([{"completions/clipped_ratio": 1.0}] * 19 + [{}] * 19, []),
        ([{"grad_norm": float("nan")}], [(1, "nan gradient")]),
        ([{}, {"flat": True, "entropy": 0.01}], [(2, "collapsed")]),
        ([{}, {"flat": True, "completions/distinct_2": 0.05}], [(2, "collapsed")]),
        ([{}, {"flat": True, "entropy": 0.01, "reward": 0.9}], [(2, "solved")]),
        ([{}, SAME_TEXT | {"flat": True, "entropy": 0.01, "reward": 0.9}], [(2, "collapsed")]),
        ([{}, {"flat": True, "entropy": 0.01, "reward": 0.9, "kl": 6.0}], [(2, "collapsed")]),
        ([{"flat": True, "entropy": 0.05}] * 2, [(1, "deterministic")]),  # from the start
        ([{}] + [{"flat": True}] * 19, []),  # rare rewards
        ([{}] + [{"flat": True}] * 20, [(21, "constant")]),
    ],
)
def test_each_guard_speaks_when_its_figure_says_so(rows, said):
    assert told([dict(row) for row in rows]) == said


def noisy(slope: float, count: int = 40) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2 * count, generator=generator).tolist()
    return [0.5 + slope * k + 0.05 * noise[k + (slope < 0) * count] for k in range(count)]


@pytest.mark.parametrize(
    ("up", "down", "said"),
    [(0.01, -0.005, True), (0.01, 0.0, False), (0.0, -0.005, False), (0.01, 0.005, False)],
)
def test_a_held_out_reward_that_falls_while_the_reward_rises(up, down, said):
    name = "held_out/rewards/judge/mean"
    pairs = zip(noisy(up), noisy(down), strict=True)
    found = told([{"reward": a, name: b} for a, b in pairs])
    assert [kind for _, kind in found] == [f"parted: {name}"] * said
    assert all(step >= 20 for step, _ in found)


def test_no_trend_is_found_in_noise():
    """In 400 series of 50 values; 4 standard errors are passed once in some ten thousand."""
    generator = torch.Generator().manual_seed(1)
    values = [abs(trend(row.tolist())) for row in torch.randn(400, 50, generator=generator)]
    assert max(values) < 4
    assert sum(value > 2 for value in values) / 400 == pytest.approx(0.05, abs=0.03)
    assert trend([1.0, 2.0, 3.0]) == float("inf") and trend([1.0, 1.0, 1.0]) == 0


def test_rewards_that_differ_between_prompts_only_name_the_group(main, settings, caplog, reward):
    def by_prompt(prompts, **_):
        return [float(prompt == prompts[0]) for prompt in prompts]

    keys = {"REWARDS": [reward(by_prompt)], "BASELINE": "rloo"}
    assert main(settings | keys | {"STEPS": 5}) == 0
    (text,) = warnings(caplog, "equal")
    assert "the 4 completions of one prompt" in text and "NUM_GENERATIONS" in text
    assert "BASELINE batch" in text
