"""`make gpu` without a card: its one line, parts that crash, the table from faked results."""

import json
import re
import sys

import pytest
import torch
from conftest import ENVIRONMENT, ROOT

sys.path.append(str(ROOT / "benchmarks"))  # whose files import each other by name

from gpu import collect, keep, outcomes, run_parts
from gpu_table import BEGIN, END, ITEMS, table, with_table, write_table

PAGE = (ROOT / "docs/cuda.md").read_text(encoding="utf-8")
PARTS = """
import os, pytest
@pytest.mark.gpu("memory")
def test_one(record_property):
    record_property("gap", 0.25)
@pytest.mark.gpu("memory")
def test_two_takes_its_process_with_it():
    os._exit(3)
@pytest.mark.gpu("processes")
def test_three_fails():
    assert 1 + 1 == 3
@pytest.mark.gpu("processes")
@pytest.mark.skip(reason="needs two cards")
def test_four():
    pass
@pytest.mark.gpu("processes")
def test_five():
    pass
def test_of_the_suite():
    raise AssertionError("not a part")
"""
RUN = {
    "environment": {"card": "a card", "torch": "2.13.0", "CUDA": "13.0", "date": "2026-11-25"},
    "parts": [
        {"part": "a", "item": "memory", "outcome": "passed", "seconds": 2.0,
         "figures": {"growth, MiB": 0.5}, "why": ""},
        {"part": "b", "item": "memory", "outcome": "failed", "seconds": 1.0, "figures": {},
         "why": "assert 2 == 3"},
        {"part": "c", "item": "processes", "outcome": "skipped", "seconds": 0.0, "figures": {},
         "why": "needs two cards"},
        {"part": "d", "item": "throughput", "outcome": "left out", "seconds": 0.0, "figures": {},
         "why": "out of time"},
    ],
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so_in_one_line_and_changes_nothing(warm):
    before = PAGE, (ROOT / "benchmarks/gpu.json").exists()
    process = warm.start([sys.executable, "benchmarks/gpu.py"], ENVIRONMENT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "there is no CUDA card" in out and out.count("\n") == 1
    after = (ROOT / "docs/cuda.md").read_text(encoding="utf-8"), before[1]
    assert after == before


def test_no_part_hides_another(tmp_path, monkeypatch):
    """One fails and one ends its process: those after them run all the same."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # hypothesis takes a second to import
    (tmp_path / "test_parts.py").write_text(PARTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu(item)\n")
    items = collect(["test_parts.py"], tmp_path, tmp_path)
    assert [*items.values()] == ["memory"] * 2 + ["processes"] * 3
    one, two, three, four, five = run_parts(items, 60, tmp_path, tmp_path)
    assert (one["outcome"], one["figures"], one["item"]) == ("passed", {"gap": 0.25}, "memory")
    assert (two["outcome"], two["why"]) == ("failed", "its process ended")
    assert three["outcome"] == "failed" and "1 + 1" in three["why"]
    assert (four["outcome"], four["why"]) == ("skipped", "needs two cards")
    assert five["outcome"] == "passed"


def test_what_the_time_does_not_reach_is_said_to_be_left_out(tmp_path):
    results = run_parts({"a": "memory"}, -1.0, tmp_path, tmp_path)
    assert [(part["outcome"], part["why"]) for part in results] == [("left out", "out of time")]
    hung = outcomes([{"part": "a", "outcome": "started"}], out_of_time=True)
    assert hung["a"]["outcome"] == "failed" and hung["a"]["why"] == "out of time"


def cells(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows[2:] if row}


def test_the_table_says_what_passed_what_did_not_and_what_is_open():
    found = cells(table([RUN]))
    assert found[ITEMS["memory"]] == ["1 of 2 passed", "3", "growth, MiB: 0.5"]
    assert found[ITEMS["processes"]] == ["1 skipped (needs two cards)", "0", ""]
    assert found[ITEMS["throughput"]] == ["1 open: out of time", "0", ""]
    assert found[ITEMS["same samples"]] == ["open", "", ""]
    assert (
        table([RUN]).splitlines()[-1].startswith("a card, torch 2.13.0, CUDA 13.0, 2026-11-25: 1")
    )
    assert {value[0] for value in cells(table([])).values()} == {"open"}


def test_results_of_two_versions_of_torch_stand_beside_each_other(tmp_path):
    file, page = tmp_path / "gpu.json", tmp_path / "cuda.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter")
    for version in ("2.11.0", "2.13.0", "2.11.0"):
        keep(file, RUN["environment"] | {"torch": version}, RUN["parts"])
    versions = [run["environment"]["torch"] for run in json.loads(file.read_text())["runs"]]
    assert versions == ["2.11.0", "2.13.0"]
    text, failed = write_table(file, page)
    assert failed == 1 and text.count("torch 2.1") == 2
    assert page.read_text() == f"before\n{BEGIN}\n{text}\n{END}\nafter"


def test_readme_has_the_table_of_what_was_measured():
    file = ROOT / "benchmarks/gpu.json"
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    assert with_table(PAGE, runs) == PAGE, "run `python benchmarks/gpu.py --report`"


def test_every_row_of_the_table_has_parts_and_every_part_a_row():
    """But throughput, which is no test."""
    text = "".join(file.read_text() for file in (ROOT / "tests").glob("test_gpu_*.py"))
    named = {item for item in ITEMS if f'("{item}")' in text}
    assert named == set(ITEMS) - {"throughput"}
    calls = text.count('@everywhere("') + text.count('@on_card("')
    assert calls == sum(
        text.count(f'@everywhere("{i}")') + text.count(f'@on_card("{i}")') for i in ITEMS
    )


def test_every_test_that_docs_cuda_md_names_is_there():
    """Names may be cut short by an ellipsis at their end or beginning."""
    text = (ROOT / "docs/cuda.md").read_text(encoding="utf-8")
    sources = {file.name: file.read_text() for file in (ROOT / "tests").glob("test_*.py")}
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?", text)
    assert len(named) > 30
    for file, test in named:
        assert file in sources and f"def {test}" in sources[file] + "def ", f"{file}::{test}"
    for file in re.findall(r"`((?:rl|training|optim)/[\w/]+\.py)`", text):
        assert (ROOT / "adaptiverl" / file).exists(), file
