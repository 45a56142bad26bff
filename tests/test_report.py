"""The report: written by every run, one offline page, small, escaped; and progress.jsonl."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, read_jsonl, without_clock, written_run

from adaptiverl.__main__ import main as adaptiverl
from adaptiverl.commands.curves import read_run
from adaptiverl.commands.report import write_report
from adaptiverl.commands.report_charts import report_charts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
EVIL = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"


def metrics(steps: int, **more) -> list[dict]:
    return [
        {
            "step": k, "reward": 0.5 + 0.3 * k / steps + 0.02 * (-1) ** k, "reward_std": 0.2,
            "frac_reward_zero_std": 0.0, "entropy": 2.5, "kl": 0.001 * k, "lr": 1e-4 * (1 + k % 3),
            "kl_per_completion": 0.03 * k, "kl_coef": 0.05, "grad_norm": 3.0, "update_kl": 1e-3,
            "update_kl_target": 1e-3, "update_scale": 1.0, "completions/mean_length": 20.0,
            "rewards/a/mean": 0.5, "rewards/b/mean": 0.1, "rewards/a/share": 0.6,
            "rewards/b/share": 0.4, "held_out/rewards/c/mean": 0.4, "tokens_per_second": 900.0,
            "seconds/rollout": 0.2, "seconds/update": 0.6,
        }
        | {key: value(k) for key, value in more.items()}
        for k in range(1, steps + 1)
    ]  # fmt: skip


def samples(steps: int, count: int, text: str = "and it was") -> list[dict]:
    return [
        {
            "step": step, "prompt": f"Prompt {k // 4}", "completion": f"{text} {step}.{k}",
            "completion_ids": [1, 2, 3], "reward": ((step * 7 + k * 13) % 101) / 100,
            "rewards/a": 0.5 + (k % 3) / 10, "rewards/b": 0.1 * (k % 2),
        }
        for step in range(1, steps + 1)
        for k in range(count)
    ]  # fmt: skip


REWARDS = [
    {"TYPE": "length", "NAME": "a", "WEIGHT": 1.0},
    {"TYPE": "regex", "NAME": "b", "WEIGHT": 1.0},
]
CONFIG = {"STEPS": 40, "REWARDS": REWARDS, "NUM_GENERATIONS": 4, "BATCH_SIZE": 8}


def a_run(folder: Path, steps: int = 40, count: int = 8, text: str = "and it was") -> Path:
    return written_run(
        folder,
        metrics(steps),
        CONFIG | {"STEPS": steps, "BATCH_SIZE": count},
        samples=samples(steps, count, text),
        controller=[
            {"step": k, "hyperparameter": "lr", "rule": "trust_region", "signal": "kl",
             "value": 1e-3, "old": 1e-4, "new": 2e-4}
            for k in range(1, steps + 1)
        ],
        progress=[
            {"step": step, "prompt": "This", "completion": f"{text} after {step}"}
            for step in (0, steps // 2, steps)
        ],
        events=[{"step": 3, "kind": "constant", "message": "rewards were equal", "action": "warn"}],
    )  # fmt: skip


def rows_of(page: str, id: str) -> dict:
    return json.loads(re.search(rf'id="{id}">(.*?)</script>', page, re.DOTALL)[1])


# Written by a run


def test_a_run_writes_its_report_and_the_same_prompts_before_halfway_and_after(main, settings):
    out = Path(settings["OUTPUT_DIR"])
    assert main(settings | {"STEPS": 5}) == 0
    page = (out / "report.html").read_text()
    assert "step 5 of 5 · finished" in page and "short run, of 5 steps" in page
    rows = read_jsonl(out / "progress.jsonl")
    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4 + [5] * 4
    prompts = [row["prompt"] for row in json.loads(Path(settings["TRAIN_FILE"]).read_text())]
    assert [row["prompt"] for row in rows] == prompts[:4] * 3
    assert "before the first step" in page and "after step 5 (the last)" in page


def test_report_false_leaves_both_out_and_trains_the_same(main, settings):
    out = Path(settings["OUTPUT_DIR"])
    assert main(settings) == 0
    with_report = without_clock(read_jsonl(out / "metrics.jsonl"))
    weights = (out / "final/model.safetensors").read_bytes()
    assert main(settings | {"REPORT": False}) == 0
    assert not (out / "report.html").exists() and not (out / "progress.jsonl").exists()
    assert without_clock(read_jsonl(out / "metrics.jsonl")) == with_report
    assert (out / "final/model.safetensors").read_bytes() == weights


def test_prompts_of_eval_file_come_first(main, settings, tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps([{"prompt": "Never trained on"}]))
    assert main(settings | {"EVAL_FILE": str(path)}) == 0
    rows = read_jsonl(Path(settings["OUTPUT_DIR"]) / "progress.jsonl")
    assert {row["prompt"] for row in rows} == {"Never trained on"} and len(rows) == 3


@pytest.mark.parametrize("at", [2, 3])  # 2 is half way: a checkpoint comes after its rows
def test_a_resumed_run_writes_progress_once(main, settings, tmp_path, at):
    keys = settings | {"STEPS": 4, "SAVE_EVERY": at, "TRUST_REGION_SCHEDULE": "constant"}
    out = Path(settings["OUTPUT_DIR"])
    assert main(keys) == 0
    whole = read_jsonl(out / "progress.jsonl")
    shutil.rmtree(out / "final")  # as if it had been killed in the last step
    assert main(keys | {"RESUME": "auto"}) == 0
    assert read_jsonl(out / "progress.jsonl") == whole
    assert [row["step"] for row in whole] == [0] * 4 + [2] * 4 + [4] * 4


def test_a_report_that_cannot_be_written_is_a_warning_and_the_run_is_saved(
    main, settings, caplog, capsys
):
    out = Path(settings["OUTPUT_DIR"])
    (out / "report.html/in the way").mkdir(parents=True)
    assert main(settings) == 0
    (text,) = [text for text in caplog.messages if "report.html" in text]
    assert "was not written (IsADirectoryError: " in text and "adaptiverl report" in text
    assert (out / "final/model.safetensors").exists()
    assert not list(out.glob(".report.html*")), "nothing half written stays"
    said = capsys.readouterr().out
    assert "report: " not in said and f" report {out}\n" in said, "it is made by a command"


def test_why_a_run_paused_is_in_its_folder_its_report_and_the_doctors_words(
    main, settings, tmp_path, monkeypatch, capsys
):
    (tmp_path / "broken_in_step_three.py").write_text(
        "def broken(completions, trainer_state, **_):\n"
        "    if trainer_state.global_step == 3:\n        raise KeyError('score')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    keys = settings | {
        "REWARDS": [{"TYPE": "python", "FUNCTION": "broken_in_step_three:broken"}],
        "STEPS": 4,
    }
    assert main(keys) == 3
    out = Path(settings["OUTPUT_DIR"])
    (event,) = read_jsonl(out / "events.jsonl")
    assert event["step"] == 2 and event["kind"] == "paused" and event["action"] == "stop"
    assert "KeyError" in event["message"]
    assert "KeyError" in (out / "report.html").read_text()
    capsys.readouterr()
    assert adaptiverl(["doctor", str(out)]) == 1
    text = capsys.readouterr().out
    assert "1. a reward failed, so the run paused" in text and "before step 3" in text
    (tmp_path / "broken_in_step_three.py").write_text(
        "def broken(completions, **_):\n    return [1.0] * 8\n"
    )
    sys.modules.pop("broken_in_step_three")
    assert main(keys | {"RESUME": "auto"}) == 0
    assert adaptiverl(["doctor", str(out)]) == 1
    text = capsys.readouterr().out
    assert "1. the code of a reward has changed in the run" in text
    assert "2. " not in text, "what was mended is not wrong"


# From a folder alone


def test_the_key_that_named_the_evaluations_is_said(main, settings):
    keys = {"EVAL_SPLIT": 0.4, "EVAL_EVERY": 1}
    assert main(settings | keys) == 0
    page = (Path(settings["OUTPUT_DIR"]) / "report.html").read_text()
    shown = page.split("Changed keys")[0]
    assert "in the first, on EVAL_SPLIT" in shown and "EVAL_FILE" not in shown
    assert "<h3>Evaluations</h3><small>on EVAL_SPLIT</small>" in page
    assert ">of EVAL_SPLIT<" in page


@pytest.mark.parametrize(
    ("steps", "value", "more"),
    [
        (8, "8", "in the last step, 1 in the first"),
        (12, "10.5", "mean of the last 4 steps, 2.5 of the first"),
        (60, "55.5", "mean of the last 10 steps, 5.5 of the first"),
    ],
)
def test_a_tile_says_which_steps_it_is_of(tmp_path, steps, value, more):
    run = written_run(
        tmp_path / "run", metrics(steps, reward=float), CONFIG | {"STEPS": steps}, samples=[]
    )
    page = write_report(run).read_text()
    assert f"<span>Reward</span><b>{value}</b><span>{more}</span>" in page


def test_what_the_charts_of_variety_and_of_equal_rewards_count_is_said(tmp_path):
    run = a_run(tmp_path / "run")
    shapes = {f"completions/distinct_{n}": 0.5 for n in (1, 2)}
    rows = [row | shapes for row in metrics(40)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run).read_text()
    assert "<h3>Variety</h3><small>shares of tokens, of their pairs and triples</small>" in page
    assert "distinct tokens" in page and "of words" not in page
    assert (
        "<h3>Prompts whose completions all got the same reward</h3><small>share of the prompts"
        in page
    )


def test_a_page_that_cannot_be_written_is_told_before_with_the_option(tmp_path, capsys):
    """A name that leaves no room for that of the new file beside it."""
    run, out = a_run(tmp_path / "run"), tmp_path / ("x" * 250 + ".html")
    assert adaptiverl(["report", str(run), "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"error: {out} cannot be written (File name too long): name another file by --out\n"
    )
    (run / "report.html").mkdir()
    assert adaptiverl(["report", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"error: {run}/report.html cannot be written (it is a folder): name another file by --out\n"
    )
    assert [path for path in run.iterdir() if path.name.startswith(".")] == []


def test_the_page_is_one_file_that_names_no_other(tmp_path):
    page = write_report(a_run(tmp_path / "run")).read_text()
    assert not re.search(r"""(?:src|href)=["']?(?!["'#]|data:,)""", page), "nothing is loaded"
    assert not re.search(r"https?://", page)
    assert "In 40 steps the reward rose from a mean of 0.5" in page
    for title in ("Reward", "Held-out rewards", "Share of each component", "Entropy", "Length"):
        assert f"<h3>{title}</h3>" in page
    assert 'role="img" aria-label="Reward. reward: 0.4' in page, "told to who does not see it"
    assert "rewards were equal" in page and "× 5.5e+11 in 39 steps" in page


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((), "0 of 40 updates."),
        ((7,), "1 of 40 updates: step 7."),
        ((1, 7), "2 of 40 updates: steps 1 and 7."),
        ((1, 2, 5, 6, 7, 9), "6 of 40 updates: steps 1, 2, 5 to 7 and 9."),
        ((1, 3, 5, 7, 9, 11, 13), "7 of 40 updates: first in steps 1, 3, 5, 7, 9 and 11."),
    ],
)
def test_the_steps_that_the_line_search_scaled_are_named(tmp_path, steps, said):
    rows = metrics(40, update_scale=lambda k: 0.5 if k in steps else 1.0)
    charts = report_charts(read_run(written_run(tmp_path / "run", rows, CONFIG)))
    (note,) = [chart.note for chart in charts if chart.title == "Learning rate"]
    assert note == f"The line search scaled {said}"


def test_what_a_model_writes_stays_text(tmp_path):
    run = a_run(tmp_path / "run", text=EVIL)
    page = write_report(run).read_text()
    assert "<script>document" not in page and "<img" not in page
    assert rows_of(page, "sample-rows")["rows"][0][3].startswith(EVIL)
    # The one script that the browser may run is ours
    assert len(re.findall(r"<script>", page)) == 1 and "script-src 'sha256-" in page


def test_a_long_run_stays_small_and_says_what_is_left_out(tmp_path):
    run = a_run(tmp_path / "run", 1000, 32, "a completion of some words " * 16)
    out = write_report(run, tmp_path / "page.html")
    assert out == tmp_path / "page.html" and 3e5 < out.stat().st_size <= 1.5e6
    data = rows_of(out.read_text(), "sample-rows")
    by_step: dict[int, list] = {}
    for row in data["rows"]:
        by_step.setdefault(row[0], []).append(row)
    sizes = {step: len(rows) for step, rows in by_step.items()}
    assert sizes[1] == sizes[1000] == 32 and set(sizes.values()) == {3, 32}
    step = next(step for step, size in sizes.items() if size == 3)
    rewards = [((step * 7 + k * 13) % 101) / 100 for k in range(32)]
    kept = {row[1]: row[4] for row in by_step[step]}
    assert kept["best"] == max(rewards) and kept["worst"] == min(rewards)
    whole, others = (list(sizes.values()).count(size) for size in (32, 3))
    assert (
        f"all of {whole} steps, and the best, the worst and a random one of {others}"
        in (data["note"])
    )
    assert f"Left out: {1000 - whole - others} steps" in data["note"]


def test_a_chat_is_shown_by_its_turns(tmp_path):
    run = a_run(tmp_path / "run")
    turns = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]
    rows = [row | {"prompt": turns} for row in samples(40, 8)]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = rows_of(write_report(run).read_text(), "sample-rows")
    assert data["rows"][0][2] == "system: Be brief\nuser: Hello"


def test_before_the_first_step_there_is_a_page_too(tmp_path, capsys):
    stop = {"step": 0, "kind": "paused", "message": "reward 'a' failed", "action": "stop"}
    run = written_run(tmp_path / "run", [], CONFIG, events=[stop])
    page = write_report(run).read_text()
    assert "No step is finished. Something is wrong: a reward failed" in page
    assert adaptiverl(["report", str(tmp_path)]) == 2
    assert "holds no run: name the OUTPUT_DIR" in capsys.readouterr().err


def test_the_commands_that_read_a_folder_need_no_torch(tmp_path):
    run = a_run(tmp_path / "run")
    code = (
        "import sys; from adaptiverl.__main__ import main\n"
        f"run = {str(run)!r}\n"
        "assert main(['report', run]) == main(['explain', run]) == main(['doctor', run]) == 0\n"
        f"assert main(['compare', run, run + '/', '--out', run + '/c.html']) == 2\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout


def test_the_next_command_works_where_train_py_was_started_from(tmp_path):
    """In another folder than that of train.py, and without an installed package."""
    a_run(tmp_path / "run")
    code = f"""import sys
sys.path[0] = {str(ROOT)!r}  # as `python {ROOT}/train.py` has it
from pathlib import Path
from adaptiverl.training.advice import next_commands
print(next_commands(Path("run"), has_report=False)[0].removeprefix("next: "))"""
    bare = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    there = {"cwd": tmp_path, "env": bare, "check": True, "text": True}
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, **there).stdout
    subprocess.run(told, shell=True, **there)
    assert (tmp_path / "run/report.html").exists(), told


# In a browser


@pytest.fixture(scope="module")  # Playwright keeps an event loop in this thread
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Opens a file at a width in a colour scheme; fails where it says or asks for anything."""
    said, pages = [], []

    def at(path: Path, width: int, scheme: str = "light"):
        page = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        ).new_page()
        page.on("console", lambda line: said.append(line.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:"))
                or said.append(asked.url))  # fmt: skip
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield at
    for page in pages:
        page.context.close()
    assert said == []


@pytest.mark.parametrize(
    "odd", ['{"step": 2, "prompt": "p"}', '{"step": 2, "prompt": 1, "completion": "c"}', "[]"]
)
def test_a_row_of_samples_that_is_not_whole_is_left_out(tmp_path, odd):
    out = a_run(tmp_path / "run", steps=4, count=2)
    whole = (out / "samples.jsonl").read_text("utf-8")
    (out / "samples.jsonl").write_text(f"{odd}\n{whole}", "utf-8")
    assert [row["step"] for row in read_run(out).samples()] == [1, 1, 2, 2, 3, 3, 4, 4]
    write_report(out)


def test_a_checkpoint_whose_manifest_says_nothing_is_none_of_the_run(tmp_path):
    out = a_run(tmp_path / "run", steps=4, count=2)
    (out / "step-000002").mkdir()
    (out / "step-000002" / "manifest.json").write_text("[2]", "utf-8")
    assert "step-000002" not in read_run(out).checkpoints
    assert adaptiverl(["explain", str(out)]) == 0


@needs_browser
def test_samples_are_sorted_and_searched(tmp_path, opened):
    page = opened(write_report(a_run(tmp_path / "run", text=EVIL)), 1280)
    assert page.title() == "Report on run"
    table = page.locator("[data-rows=sample-rows]")

    def column(number: int) -> list[str]:
        return table.locator(f"tbody td:nth-child({number})").all_text_contents()

    assert column(5) == sorted(column(5), reverse=True), "the best come first"
    head = table.get_by_role("columnheader", name="reward")
    assert head.get_attribute("aria-sort") == "descending"
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(x) for x in column(5)] == sorted(float(x) for x in column(5))
    table.get_by_role("button", name="step").click()
    assert column(1)[0] == "40", "numbers fall first"
    table.get_by_label("Search").fill("</SCRIPT>")
    assert len(column(4)) == 12 and column(4)[0].startswith(EVIL)
    assert table.locator("mark").first.text_content() == "</script>"
    table.get_by_label("Search").fill(" 40.3")
    assert column(4) == [f"{EVIL} 40.3"]
    table.get_by_label("Search").fill("")
    table.get_by_label("Which").select_option("worst")
    assert set(column(2)) == {"worst"}
    table.get_by_label("Step").select_option("40")
    assert column(1) == ["40"]
    assert page.title() == "Report on run", "what the model wrote did nothing"


@needs_browser
def test_a_curve_tells_its_value_under_the_pointer(tmp_path, opened):
    page = opened(write_report(a_run(tmp_path / "run")), 1280)
    figure = page.locator("figure").filter(has_text="Entropy")
    figure.locator(".plot").hover()
    assert re.search(r"2\.5 \(step 2\d", figure.locator("output").text_content())


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = colors => {
    canvas.clearRect(0, 0, 1, 1);
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => {
      v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let worst = [99, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.getClientRects().length) continue;
    const grounds = [];
    for (let at = element; at; at = at.parentElement)
      grounds.unshift(getComputedStyle(at).backgroundColor);
    const ground = light(grounds), text = light([...grounds, getComputedStyle(element).color]);
    const ratio = (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 80)];
  }
  return worst;
}"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_read_in_the_dark_and_on_a_phone(tmp_path, opened, scheme, width):
    """Text and ground differ by WCAG's 4.5 at least; nothing is wider than the screen."""
    run = a_run(tmp_path / "run", text="a/very-long_word" * 30)
    stop = {"step": 40, "kind": "paused", "message": "reward 'a' failed", "action": "stop"}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(stop) + "\n")
    page = opened(write_report(run), width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("[data-rows=sample-rows]").get_by_label("Search").fill("word")  # marks
    ratio, where = page.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(20, 22, 26)") == (scheme == "dark")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_so_is_a_comparison(tmp_path, opened, scheme, width):
    runs = [str(a_run(tmp_path / name)) for name in ("one", "a-run-with-a-long-name" * 4)]
    assert adaptiverl(["compare", *runs, "--out", str(tmp_path / "compare.html")]) == 0
    page = opened(tmp_path / "compare.html", width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ratio, where = page.evaluate(CONTRAST)
    assert ratio >= 4.5, where


def test_events_of_steps_that_were_taken_back_say_so(tmp_path):
    """Steps 5 to 8 were made twice; what the second step 6 said holds."""
    run = a_run(tmp_path / "run")
    rows = [(3, "warn"), (6, "warn"), (8, "rollback"), (6, "warn"), (8, "warn")]
    (run / "events.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "kind": f"e{k}", "message": "m", "action": action}) + "\n"
            for k, (step, action) in enumerate(rows)
        )
    )
    change = {
        "step": 5, "hyperparameter": "lr", "rule": "rollback", "signal": "collapse", "value": 8,
        "old": 1e-2, "new": 1e-3,
    }  # fmt: skip
    (run / "controller.jsonl").write_text(json.dumps(change) + "\n")
    page = write_report(run).read_text()
    for k, said in enumerate(
        ("step 3", "step 6, taken back", "step 8, taken back", "step 6", "step 8")
    ):
        assert f'"quiet">{said}</span><span><span class="tag">e{k}</span>' in page
