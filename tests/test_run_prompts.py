"""What `evaluate` and the card say of the run's prompts: trained on, evaluated on, how many."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import PROMPTS, in_this_process

from adaptiverl.__main__ import main as adaptiverl
from adaptiverl.training.inputs import as_given

CHOSEN = "This checkpoint was chosen by its score on"
BY_COLUMN = """
def score(score, **columns):
    return score
"""


@pytest.fixture
def trained(main, settings):
    """Trains with `keys` beside `settings`; the folder of the run."""

    def run(**keys: Any) -> Path:
        assert main(settings | {"EVAL_EVERY": 1, "STEPS": 1, "REPORT": False} | keys) == 0
        return Path(settings["OUTPUT_DIR"])

    return run


@pytest.fixture
def evaluated(capsys):
    """Evaluates a run: the lines that it prints, and evaluation.json."""

    def evaluate(run: Path, *words: object) -> tuple[list[str], dict[str, Any]]:
        capsys.readouterr()
        with in_this_process():
            assert adaptiverl(["evaluate", str(run), *map(str, words)]) == 0
        lines = capsys.readouterr().out.splitlines()
        return lines, json.loads((run / "evaluation.json").read_text())

    return evaluate


@pytest.fixture
def card(tmp_path):
    """Exports a run: the card's sections on data and on the evaluation, each in one line."""

    def export(run: Path, *words: str) -> tuple[str, str]:
        out = tmp_path / f"exported-{len([*tmp_path.glob('exported-*')])}"
        with in_this_process():
            assert adaptiverl(["export", str(run), str(out), *words]) == 0
        text = " ".join((out / "README.md").read_text().split())
        data, evaluation = (text.split(f" ## {name} ")[1] for name in ("Data", "Evaluation"))
        return data.split(" ## ")[0], evaluation.split(" | ")[0].split(" ## ")[0]

    return export


def write(path: Path, prompts: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(prompts))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "which"),
    [
        (PROMPTS, "all of these prompts"),
        ([*PROMPTS[:2], PROMPTS[1], {"prompt": "A new one"}], "2 of these 3 prompts"),
        ([{"prompt": "A new one"}], "none of these prompts"),
    ],
    ids=["all", "some", "none"],
)
def test_how_many_prompts_of_the_eval_file_were_trained_on(
    trained, evaluated, card, tmp_path, rows, which
):
    rows = [row | {"reference": "x"} for row in rows]
    run = trained(EVAL_FILE=write(tmp_path / "eval.json", rows))
    lines, found = evaluated(run, "-n", 8)
    different = len({row["prompt"] for row in rows})
    count = len({row["prompt"] for row in rows} & {row["prompt"] for row in PROMPTS})
    assert f"trained on  {count} of {different} prompt{'s' * (different > 1)}" in lines
    assert found["different_prompts"] == found["prompts_evaluated_on"] == different
    assert found["prompts_trained_on"] == count
    data, evaluation = card(run)
    said = f"The model was trained on {which}."
    assert data.endswith(f"Prompts of `eval.json` were evaluated on. {said}")
    assert f" {said} {CHOSEN} these prompts, so its figures are optimistic." in evaluation


def test_only_best_is_said_to_be_chosen_and_only_by_prompts_that_chose_it(
    trained, evaluated, card, tmp_path
):
    run = trained(EVAL_FILE=write(tmp_path / "eval.json", [{"prompt": "A"}, {"prompt": "B"}]))
    evaluated(run, "-n", 2)
    assert CHOSEN in card(run)[1]
    assert CHOSEN not in card(run, "--checkpoint", "final")[1]
    other = write(tmp_path / "other.json", [{"prompt": "A"}, {"prompt": "C"}])
    evaluated(run, "-n", 2, "--prompts", other)
    assert f"{CHOSEN} 1 of these 2 prompts, so its figures are optimistic." in card(run)[1]
    write(tmp_path / "other.json", [{"prompt": "C"}])
    evaluated(run, "-n", 2, "--prompts", other)
    assert CHOSEN not in card(run)[1]


def test_a_run_with_a_split_is_evaluated_on_what_was_held_out(trained, evaluated, card):
    run = trained(EVAL_SPLIT=0.4)
    lines, found = evaluated(run, "-n", 8)
    assert lines[0].endswith(": 8 completions of 2 prompts of prompts.json")
    assert "trained on  0 of 2 prompts" in lines
    assert (found["prompts_trained_on"], found["prompts_evaluated_on"]) == (0, 2)
    data, evaluation = card(run)
    none = "The model was trained on none of these prompts."
    assert data.endswith(f"The prompts that `EVAL_SPLIT` 0.4 holds out were evaluated on. {none}")
    assert f" {none} {CHOSEN} these prompts, so its figures are optimistic." in evaluation


def test_prompts_that_are_lost_or_changed_are_not_counted(
    trained, evaluated, card, settings, tmp_path, caplog
):
    train = Path(settings["TRAIN_FILE"])
    run = trained(EVAL_FILE=write(tmp_path / "eval.json", [{"prompt": "A"}]))
    caplog.clear()
    train.write_text(json.dumps(PROMPTS[1:]))
    lines, found = evaluated(run, "-n", 1)
    why = "TRAIN_FILE: the rows have changed since the run"
    assert f"trained on  not known: {why}" in lines
    assert (found["prompts_trained_on"], found["prompts_evaluated_on"]) == (None, None)
    data, evaluation = card(run)
    unknown = "How many of these prompts the model was trained on is not known."
    assert data.endswith(f"Prompts of `eval.json` were evaluated on. {unknown}")
    assert (
        f" {unknown} It is not known whether this checkpoint was chosen by its score on these "
        "prompts."
    ) in evaluation
    what = "how many of the prompts that were evaluated on the model was trained on"
    assert caplog.messages == [f"the card does not say {what}. {why}"]
    train.unlink()
    lines, _ = evaluated(run, "-n", 1)
    assert f"trained on  not known: TRAIN_FILE: there is no file {train}" in lines


def test_rows_of_one_prompt_are_one_cluster(trained, evaluated, tmp_path, monkeypatch):
    """Whatever their other columns: the reward of a row is that of its prompt here."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "by_column.py").write_text(BY_COLUMN)
    rows = [
        {"prompt": prompt, "score": float(score), "reference": f"number {copy}"}
        for copy in range(4)
        for score, prompt in enumerate("ABC")
    ]
    run = trained(
        REWARDS=[{"TYPE": "python", "FUNCTION": "by_column:score"}],
        TRAIN_FILE=write(tmp_path / "rows.json", rows),
        EVAL_EVERY=50,
    )
    lines, found = evaluated(run, "-n", 12)
    assert lines[0].endswith(": 12 completions of 3 prompts of rows.json")
    assert found["different_prompts"] == 3
    trained_reward = found["figures"]["reward"]["trained"]
    assert trained_reward == {"mean": 1.0, "se": pytest.approx(1 / 3**0.5)}  # of 0, 1 and 2


def test_one_prompt_is_what_the_model_is_given():
    asked = [{"role": "user", "content": "A"}]
    answered = [{"content": "A", "role": "user"}, {"content": "B", "role": "assistant"}]
    assert as_given(asked, None) == as_given(answered, None) != as_given("A", None)
    system = [{"role": "system", "content": "S"}, *asked]
    assert as_given(asked, "S") == as_given(system, "S") != as_given(asked, None)
