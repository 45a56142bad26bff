"""Comparing runs, and the curves that its page and the report draw."""

import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest
from conftest import read_jsonl, written_run

from adaptiverl.__main__ import main as adaptiverl
from adaptiverl.commands.charts import POINTS, Series, chart, number
from adaptiverl.commands.compare import frontier_of, paired
from adaptiverl.commands.curves import read_run, smoothed

KEYS = {
    "SEED": 3, "TRAIN_FILE": "p.json", "BATCH_SIZE": 8, "NUM_GENERATIONS": 4, "KL_COEF": 0.05,
    "REWARDS": [{"TYPE": "length", "NAME": "a", "WEIGHT": 1.0}], "STEPS": 48,
}  # fmt: skip


def a_run(folder: Path, gain: float, seed: int, **keys) -> Path:
    """Its reward rises by `gain`; prompts move the rewards of all runs alike."""
    draws, prompts = random.Random(seed), random.Random(0)
    rows = [
        {
            "step": k, "lr": 1e-4, "entropy": 2.0, "kl_per_completion": 0.1 * k,
            "reward": gain * k / 48 + prompts.gauss(0, 1) + draws.gauss(0, 0.05),
        }
        for k in range(1, 49)
    ]  # fmt: skip
    return written_run(folder, rows, KEYS | {"OUTPUT_DIR": str(folder)} | keys)


def test_pairing_finds_what_the_prompts_would_hide(tmp_path):
    one, other = (read_run(a_run(tmp_path / n, g, s)) for n, g, s in (("a", 0.2, 1), ("b", 0.6, 2)))
    mean, half, steps = paired(one, other, "reward")
    differences = [
        b["reward"] - a["reward"] for a, b in zip(one.metrics, other.metrics, strict=True)
    ]
    blocks = [statistics.mean(differences[k : k + 6]) for k in range(0, 48, 6)]
    assert steps == 48 and mean == pytest.approx(statistics.mean(differences))
    assert half == pytest.approx(2.365 * statistics.stdev(blocks) / math.sqrt(8))
    assert 0.1 < mean < 0.3 and mean - half > 0
    unpaired = statistics.stdev(one.values("reward")) * math.sqrt(2 / 48)
    assert unpaired > mean / 2, "without pairs it would be within two standard errors"
    assert paired(one, one, "reward") == (0.0, 0.0, 48)
    assert paired(one, other, "eval/reward") is None


def test_tables_and_page(tmp_path, capsys):
    evil = "<script>alert(1)</script>"
    runs = [a_run(tmp_path / "a", 0.2, 1), a_run(tmp_path / "b", 4.0, 2, KL_COEF=0.1, MODEL=evil)]
    out = tmp_path / "page.html"
    assert adaptiverl(["compare", *map(str, runs), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"KL_COEF\s+0\.05\s+0\.1", text) and "OUTPUT_DIR" not in text
    assert re.search(r"b\s+reward\s+48\s+1\.9\d*\s+\[0\.9\d+, 2\.[89]\d*\]\s+higher", text)
    assert re.search(r"b\s+entropy\s+48\s+0\s+\[0, 0\]\s+no difference shown", text)
    page = out.read_text()
    assert "b ends with the highest reward" in page and "Reward by KL" in page
    assert evil not in page and not re.search(r"https?://", page)


def test_other_prompts_are_not_paired(tmp_path, capsys):
    runs = [a_run(tmp_path / "a", 0.2, 1), a_run(tmp_path / "b", 0.2, 2, SEED=4)]
    out = str(tmp_path / "page.html")
    assert adaptiverl(["compare", *map(str, runs), "--out", out]) == 0
    text = capsys.readouterr().out
    assert "b is not compared step by step: other SEED." in text
    assert "no difference shown" not in text and "on the same prompts" not in text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a"], "two runs or more"),
        (["a", "a"], "named twice"),
        (["a", "none"], "name the OUTPUT_DIR"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, names, said):
    a_run(tmp_path / "a", 0.2, 1)
    words = [str(tmp_path / name) for name in names]
    assert adaptiverl(["compare", *words, "--out", str(tmp_path / "x.html")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_the_frontier_goes_by_kl(tmp_path):
    points = frontier_of(read_run(a_run(tmp_path / "a", 1.0, 1)))
    assert len(points) == 48 and points[20][0] == pytest.approx(2.1)


def test_figures_say_of_which_steps_they_are_the_mean(tmp_path, capsys):
    runs = [a_run(tmp_path / "a", 0.2, 1), a_run(tmp_path / "b", 0.2, 2)]
    out = tmp_path / "page.html"
    assert adaptiverl(["compare", *map(str, runs), "--out", str(out)]) == 0
    note = (
        "Means over the last 10 steps that have a value, fewer in a shorter run; eval/… is of the "
        "last evaluation. ± is one standard error."
    )
    assert f"\n{note}\n" in capsys.readouterr().out and f">{note}<" in out.read_text()
    assert "equally long" not in out.read_text()


def test_an_axis_of_zeros_begins_at_zero():
    assert chart("share", [Series("a", [(1, 0.0), (2, 0.0)])]).y_ticks[0] == (100.0, "0")


def test_an_evaluation_is_compared_by_the_last_one(tmp_path, capsys):
    """They lie many steps apart, so that a mean of several is one over the whole run."""
    runs = [a_run(tmp_path / name, 0.2, 1) for name in ("a", "b")]
    for run, every in zip(runs, (8, 24), strict=True):
        rows = read_jsonl(run / "metrics.jsonl")
        for row in rows[every - 1 :: every]:
            row["eval/reward"] = row["step"] / 100
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert adaptiverl(["compare", *map(str, runs), "--out", str(tmp_path / "x.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("run "))
    at = head.index("eval/reward")
    figures = [line[at : at + 11].strip() for line in lines if line[:2] in ("a ", "b ")]
    assert figures[:2] == ["0.48", "0.48"]


def test_a_verdict_on_runs_of_other_lengths_names_them(tmp_path, capsys):
    runs = [a_run(tmp_path / "a", 0.2, 1), a_run(tmp_path / "b", 4.0, 2)]
    rows = (runs[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs[1] / "metrics.jsonl").write_text("".join(rows[:12]))
    (runs[1] / "final/manifest.json").unlink()
    out = tmp_path / "page.html"
    assert adaptiverl(["compare", *map(str, runs), "--out", str(out)]) == 0
    assert " The runs are not equally long, in steps: a 48, b 12.</p>" in out.read_text()
    said = "b is not compared step by step: that needs at least 16 steps in both runs."
    assert said in capsys.readouterr().out


def test_steps_that_cannot_be_read_are_not_counted(tmp_path, capsys):
    runs = [a_run(tmp_path / "a", 0.2, 1), a_run(tmp_path / "b", 0.2, 2)]
    file = runs[1] / "metrics.jsonl"
    file.write_text(file.read_text()[:-30])
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"entropy": math.nan, "reward": "high"})
    (runs[0] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert adaptiverl(["compare", *map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^a +48  ", text, re.M) and re.search(r"^b +47 of 48  ", text, re.M)
    assert re.search(r"^b +reward +32 ", text, re.M) is None, "b and a have 46 in common: 40"
    assert re.search(r"^b +reward +40 ", text, re.M)


def test_a_file_that_is_no_page_is_not_replaced(tmp_path, capsys, monkeypatch):
    runs = [str(a_run(tmp_path / "a", 0.2, 1)), str(a_run(tmp_path / "b", 0.2, 2))]
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "compare.html"
    mine.write_text("mine")
    assert adaptiverl(["compare", *runs]) == 2
    assert mine.read_text() == "mine" and capsys.readouterr().err == (
        "error: compare.html exists and was not written by adaptiverl: name another file by --out\n"
    )
    mine.unlink()
    assert adaptiverl(["compare", *runs]) == adaptiverl(["compare", *runs]) == 0
    long = "x" * 250 + ".html"
    assert adaptiverl(["compare", *runs, "--out", long]) == 2
    assert capsys.readouterr().err == (
        f"error: {long} cannot be written (File name too long): name another file by --out\n"
    )


@pytest.mark.parametrize("lost", ["a", "b"])
def test_keys_that_are_not_known_are_not_said_to_be_other_ones(tmp_path, capsys, lost):
    runs = {name: a_run(tmp_path / name, 0.2, seed) for seed, name in enumerate("abc")}
    (runs["c"] / "config.json").write_text(json.dumps(KEYS | {"KL_COEF": 0.1}))
    (runs[lost] / "config.json").unlink()
    (runs[lost] / "final/run_config.json").write_text("{}")
    out = tmp_path / "page.html"
    assert adaptiverl(["compare", *map(str, runs.values()), "--out", str(out)]) == 0
    text, page = capsys.readouterr().out, out.read_text()
    said = (
        f"{runs[lost]}/config.json is missing; put {runs[lost]}/final/run_config.json in its "
        "place: it has the same keys."
    )
    assert f"\n{said}\n" in text and f">{said}<" in page
    known = "b" if lost == "a" else "a"
    assert re.search(rf"^key +{known} +c$", text, re.M) and "null" not in text
    assert re.search(r"^KL_COEF +0\.05 +0\.1$", text, re.M)
    assert f"b is not compared step by step: the keys of {lost} are not known." in text
    assert ("c is not compared step by step: the keys of a are not known." in text) == (lost == "a")
    assert "other SEED" not in text
    assert f">The rewards are not compared: the keys of {lost} are not known.<" in page


def test_two_runs_whose_keys_are_lost_are_not_paired(tmp_path, capsys):
    runs = [a_run(tmp_path / name, 0.2, seed) for seed, name in enumerate("ab")]
    (runs[0] / "config.json").unlink()
    (runs[1] / "config.json").write_text("{")
    out = tmp_path / "page.html"
    assert adaptiverl(["compare", *map(str, runs), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    copy = "put it back from a copy."
    assert text.startswith(
        f"{runs[0]}/config.json is missing; {copy} {runs[1]}/config.json is no JSON object with "
        f"keys; {copy}\n"
    )
    assert "b is not compared step by step: the keys of a and of b are not known." in text
    assert "no key differs" not in text and "None but OUTPUT_DIR." not in out.read_text()


# Curves


def test_smoothing_by_hand():
    assert smoothed([1.0, 2.0, 6.0, 3.0], 3) == [1.5, 3.0, 11 / 3, 4.5]
    assert smoothed([5.0] * 100) == pytest.approx([5.0] * 100)


def test_a_curve_in_the_corners_of_its_figure():
    made = chart("Reward", [Series("r", [(1, 0.0), (11, 1.0)], smooth=False)])
    (curve,) = made.curves
    assert curve.path == "M0 284L1000 16", "a margin of 6 % above and below"
    assert [text for _, text in made.y_ticks] == ["0", "0.25", "0.5", "0.75", "1"]
    assert [text for _, text in made.x_ticks] == ["2", "4", "6", "8", "10"]
    assert made.y_ticks[0][0] == pytest.approx(100 - 100 * 0.06 / 1.12)
    assert "r: 0 at first, 1 at step 11; lowest 0 (step 1), highest 1 (step 11)" in made.summary


def test_a_long_curve_is_thinned_and_keeps_its_peaks():
    points = [(k, 1.0 if k == 777 else 0.0) for k in range(5000)]
    (curve,) = chart("x", [Series("s", points)]).curves
    assert curve.path.count("L") < POINTS and not curve.raw
    assert " 16L" in curve.band, "the one step of 5,000 is in the band"


def test_a_rate_is_drawn_by_its_logarithm_and_what_is_no_number_is_left_out():
    points = [(1, 1e-6), (2, 0.0), (3, math.nan), (4, 1e-2)]
    made = chart("rate", [Series("r", points, smooth=False)], log=True)
    assert made.hover["curves"][0]["y"] == [1e-6, 1e-2]
    assert chart("nothing", [Series("n", [(1, math.nan)])]) is None
    assert len(chart("flat", [Series("f", [(1, 2.0), (2, 2.0)])]).y_ticks) >= 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.12345, "0.123"), (-2.5, "−2.5"), (1e-5, "1e−5"), (1234.5, "1,234"),
     (None, "missing"), (40, "40"), (100, "100"), (3e7, "3e7")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_a_page_holds_no_lone_surrogate(tmp_path):
    run = a_run(tmp_path / "a", 0.2, 1, MODEL="\ud83d")
    other = a_run(tmp_path / "b", 0.2, 1)
    out = tmp_path / "page.html"
    assert adaptiverl(["compare", str(run), str(other), "--out", str(out)]) == 0
    assert json.dumps(out.read_bytes().decode("utf-8"))


@pytest.mark.parametrize(("other", "paired"), [("one", True), ("two", False)])
def test_prompts_are_compared_in_a_step_that_both_have(tmp_path, capsys, other, paired):
    """Not the first samples of one, of step 1, with those of the other, of step 2."""
    runs = [a_run(tmp_path / name, 0.2, seed) for seed, name in enumerate("ab")]
    samples = [[(1, "first"), (2, "one")], [(2, other), (4, "four")]]
    for run, rows in zip(runs, samples, strict=True):
        texts = [{"step": step, "prompt": prompt, "completion": ""} for step, prompt in rows]
        lines = [json.dumps(row) + "\n" for row in texts]
        (run / "samples.jsonl").write_text("".join(lines))
    assert adaptiverl(["compare", *map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    text = capsys.readouterr().out
    assert ("on the same prompts" in text) == paired
    assert ("b is not compared step by step: other prompts." in text) != paired


def test_rewards_of_different_kinds_are_not_subtracted(tmp_path, capsys):
    other = {"REWARDS": [{"TYPE": "length", "NAME": "b", "WEIGHT": 1.0}]}
    runs = [a_run(tmp_path / "a", 0.2, 1), a_run(tmp_path / "b", 4.0, 2, **other)]
    assert adaptiverl(["compare", *map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"b\s+entropy\s+48", text) and not re.search(r"b\s+reward\s+48", text)


def test_a_file_of_prompts_that_has_changed_in_between_is_not_paired(tmp_path, capsys):
    """It has the same name: samples.jsonl says what was in it."""
    runs = [a_run(tmp_path / name, 0.2, seed) for seed, name in enumerate("ab")]
    for run, prompt in zip(runs, ("one", "two"), strict=True):
        row = {"step": 1, "prompt": prompt, "completion": ""}
        (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    assert adaptiverl(["compare", *map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    assert "on the same prompts" not in capsys.readouterr().out
