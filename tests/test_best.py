"""best/: the highest eval/score, whole at any moment; early stopping; a share of the prompts."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from conftest import in_this_process, read_jsonl, without_clock
from datasets import Dataset

import train
from adaptiverl.config.schema import Config
from adaptiverl.files import checkpoint
from adaptiverl.rl.data import split_prompts
from adaptiverl.training.best import Best
from adaptiverl.training.build import build
from adaptiverl.training.keys import RunConfig


def looked_at(scores: list[float | None], **keys) -> list[Best]:
    """One Best that has seen so many evaluations, as it was after each."""
    config = RunConfig(EVAL_FILE="x.json", **keys)
    best, seen = Best(config), []
    for step, score in enumerate(scores, 1):
        best.look(step, {"reward": 0.0, "eval/score": score})
        copy = Best(config, improved=best.improved)
        copy.load_state_dict(best.state_dict())
        seen.append(copy)
    return seen


def test_the_highest_score_is_the_best_a_tie_and_a_missing_one_are_not():
    seen = looked_at([0.1, None, 0.3, 0.3, 0.2, 0.4])
    assert [best.improved for best in seen] == [True, False, True, False, False, True]
    assert [best.best_step for best in seen] == [1, 1, 3, 3, 3, 6]
    assert [best.since for best in seen] == [0, 0, 0, 1, 2, 0]
    assert seen[-1].why_stop is None


def test_patience_counts_evaluations():
    seen = looked_at([0.1, 0.3, 0.2, None, 0.2], STOP_PATIENCE=2)
    assert [best.why_stop is not None for best in seen] == [False] * 4 + [True]
    assert seen[-1].why_stop == (
        "STOP_PATIENCE: 2 evaluations without a better eval/score (reward less KL penalty) than "
        "0.300, of step 2"
    )


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"STOP_KL": 5.0}, "STOP_KL: 5.50 nats per completion, mean of 10 steps, have reached 5"),
        (
            {"STOP_REWARD": 0.55},
            "STOP_REWARD: a reward of 0.550, mean of 10 steps, has reached 0.55",
        ),
    ],
)
def test_kl_and_reward_are_means_of_ten_steps(keys, why):
    best = Best(RunConfig(**keys))
    for step in range(1, 11):
        assert best.why_stop is None
        best.look(step, {"reward": step / 10, "kl_per_completion": float(step)})
    assert best.why_stop == why


@pytest.fixture
def evaluated(settings) -> dict:
    return settings | {"EVAL_FILE": settings["TRAIN_FILE"], "EVAL_EVERY": 2, "STEPS": 8}


def test_best_is_the_policy_that_was_evaluated(main, evaluated, capsys):
    """Its weights score in a new run of rate 0 what best.json says, at the same random numbers."""
    out = Path(evaluated["OUTPUT_DIR"])
    assert main(evaluated | {"KEEP_CHECKPOINTS": 1, "SAVE_EVERY": 1}) == 0
    scored = {row["step"]: row for row in read_jsonl(out / "metrics.jsonl") if "eval/score" in row}
    best = json.loads((out / "best" / "best.json").read_text())
    assert best["eval/score"] == max(row["eval/score"] for row in scored.values())
    assert best == {"step": best["step"]} | {
        name: value for name, value in scored[best["step"]].items() if name.startswith("eval/")
    }
    for row in scored.values():
        score = row["eval/reward"] - 0.05 * row["eval/kl_per_completion"]
        assert row["eval/score"] == pytest.approx(score)
    said = f"best: step {best['step']} (eval/score {best['eval/score']:.3f}), the model is in"
    assert said in capsys.readouterr().out
    again = {"MODEL": str(out / "best"), "OUTPUT_DIR": f"{out}-again", "LRATE": 0, "STEPS": 1}
    assert main(evaluated | again | {"LR_RULE": "none", "EVAL_EVERY": 1, "KL_COEF": 0}) == 0
    (row,) = read_jsonl(Path(f"{out}-again") / "metrics.jsonl")
    assert row["eval/reward"] == pytest.approx(best["eval/reward"], abs=1e-6)


def test_resumed_from_before_the_best_it_is_found_again(main, evaluated):
    """And a run does not go on from best/, whatever step it is of."""
    out = Path(evaluated["OUTPUT_DIR"])
    keys = evaluated | {"SAVE_EVERY": 3, "RESUME": "auto", "KEEP_CHECKPOINTS": 0}
    assert main(keys) == 0
    whole = without_clock(read_jsonl(out / "metrics.jsonl"))
    best = (out / "best" / "best.json").read_text()
    for name in ("final", "step-000006"):
        (out / name / "trainer.pt").unlink()
    checkpoint.save(out / "best", 8, lambda folder: (folder / "best.json").write_text("{}"))
    assert main(keys) == 0
    assert without_clock(read_jsonl(out / "metrics.jsonl")) == whole
    assert json.loads(best)["step"] > 3, "or the test would show nothing"
    assert (out / "best" / "best.json").read_text() == best


def test_a_kill_while_best_is_replaced_leaves_the_old_one(tmp_path):
    checkpoint.save(tmp_path / "best", 2, lambda folder: (folder / "w").write_text("old"))
    (tmp_path / "best").rename(tmp_path / ".old-best")  # between the renames
    assert checkpoint.newest(tmp_path) is None
    checkpoint.put_back(tmp_path)
    assert (tmp_path / "best" / "w").read_text() == "old"
    (tmp_path / ".old-best").mkdir()  # after both
    checkpoint.put_back(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_the_end_says_what_stopped_the_run_and_a_resume_may_go_on(main, evaluated, capsys):
    out = Path(evaluated["OUTPUT_DIR"])
    keys = evaluated | {"STEPS": 14, "STOP_REWARD": -100.0, "SEED": 1}
    assert main(keys) == 0
    lines = capsys.readouterr().out.splitlines()
    (said,) = [line for line in lines if line.startswith("stopped early")]
    assert said.startswith("stopped early after step 10, STOP_REWARD: a reward of ")
    assert said.endswith(f"has reached -100. The model is in {out / 'final'}")
    assert len(read_jsonl(out / "metrics.jsonl")) == 10
    assert main(keys | {"RESUME": "auto"}) == 0
    assert len(read_jsonl(out / "metrics.jsonl")) == 10
    assert main(keys | {"RESUME": "auto", "STOP_REWARD": None}) == 0
    assert len(read_jsonl(out / "metrics.jsonl")) == 14


def test_a_share_of_the_prompts_is_held_out_all_rows_of_a_prompt_on_one_side():
    rows = Dataset.from_dict({"prompt": [f"p{k % 20}" for k in range(50)]})
    train_rows, held_out = split_prompts(rows, "prompt", 0.25, seed=3)
    assert len(set(held_out["prompt"])) == 5 and len(train_rows) + len(held_out) == 50
    assert not set(train_rows["prompt"]) & set(held_out["prompt"])
    again = split_prompts(rows, "prompt", 0.25, seed=3)[1]["prompt"]
    assert list(again) == list(held_out["prompt"])
    assert list(split_prompts(rows, "prompt", 0.25, seed=4)[1]["prompt"]) != list(again)
    with pytest.raises(ValueError, match="all prompts are the same"):
        split_prompts(Dataset.from_dict({"prompt": ["a", "a"]}), "prompt", 0.5, seed=0)


def test_evaluations_that_never_come_are_warned_of(main, settings, caplog):
    assert main(settings | {"EVAL_SPLIT": 0.4, "EVAL_EVERY": 4}) == 0
    said = "EVAL_EVERY 4 is above the 3 steps of the run: nothing is evaluated"
    assert caplog.messages == [said]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("trust_region+cosine", ("cosine", 200)),
        ([{"name": "cyclical", "cycle_length": 4}], ("cyclical", 4)),
        ({"name": "cosine_restart", "cycle_length": 3}, None),
    ],
)
def test_a_cycle_that_the_run_does_not_come_through_is_warned_of(
    main, settings, caplog, rule, said
):
    assert main(settings | {"LR_RULE": rule}) == 0
    assert caplog.messages == [
        f"LR_RULE {name}: its cycle has {length} steps and the run 3, so the rate goes only a part "
        f'of the way. {{"name": "{name}", "cycle_length": 3}} is as long as the run'
        for name, length in ([said] if said else [])
    ]


def test_a_held_out_share_is_evaluated_and_never_sampled_in_training(main, settings):
    keys = settings | {"EVAL_SPLIT": 0.4, "EVAL_EVERY": 3, "STEPS": 6}
    assert main(keys) == 0
    out = Path(keys["OUTPUT_DIR"])
    prompts = {row["prompt"] for row in read_jsonl(out / "samples.jsonl")}
    assert len(prompts) == 3, "of five"
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/score" in row] == [3, 6]


# Trackers


class Noting(GeneralTracker):
    name, requires_logging_directory, main_process_only = "noting", False, True

    def __init__(self):
        super().__init__()
        self.numbers, self.tables = [], []

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        self.numbers.append((step, values))

    def log_table(self, name, columns=None, data=None, step=None, **_):
        self.tables.append((step, name, columns, data))


def test_a_tracker_with_tables_gets_samples(settings):
    tracker = Noting()
    config = RunConfig(**settings | {"LOG_EVERY": 2})
    with in_this_process():
        parts = build(config, Accelerator(cpu=True, log_with=tracker))
        assert train.run(config, parts) == 0
    assert [step for step, _ in tracker.numbers] == [1, 2, 3]
    assert [table[:3] for table in tracker.tables] == [
        (step, "samples", ["step", "prompt", "completion", "reward"]) for step in (1, 2, 3)
    ]
    rows = read_jsonl(Path(settings["OUTPUT_DIR"]) / "samples.jsonl")
    assert tracker.tables[2][3] == [
        [row[name] for name in ("step", "prompt", "completion", "reward")] for row in rows[-8:]
    ]


def test_tensorboard_gets_samples_as_text(main, settings):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    assert main(settings | {"TRACKERS": ["tensorboard"], "STEPS": 1}) == 0
    folder = Path(settings["OUTPUT_DIR"]) / "tensorboard" / "adaptiverl"
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    row = read_jsonl(Path(settings["OUTPUT_DIR"]) / "samples.jsonl")[0]
    assert text.count("\n") == 9, "a head, a rule and eight samples"
    assert " ".join(row["prompt"].split()) in text


def test_the_trackers_are_accelerates():
    schema = Config[dict].model_json_schema()["properties"]["TRACKERS"]
    assert set(schema["items"]["enum"]) == {str(name) for name in LOGGER_TYPE_TO_CLASS}
