"""README.md and docs/ are true: every block runs, links lead somewhere, tables are generated ones.

Each page is gone through in order, in a folder of its own: files that it shows are written, configs
are checked, commands and snippets run. Runs are cut to two steps where their length is not said,
and completions to eight tokens.
What cannot run says why, in `<!-- not run: … -->` before the block, and `<!-- needs … -->` names a
module without which it is left out.
"""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import json5
import pytest
from conftest import ROOT, in_this_process, read_jsonl
from pydantic import ValidationError

from adaptiverl.__main__ import main as adaptiverl
from adaptiverl.commands.keys import SECTIONS, sections
from adaptiverl.config.loading import load_config
from adaptiverl.training.keys import RunConfig
from rewards import REWARD_TYPES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- (?:not run: ([^\n]+)|needs (\w+)) -->\n)?^```(\w*)\n(.*?)^```",
    re.MULTILINE | re.DOTALL,
)
TEXT = {"", "jinja"}  # what a command prints, and what other tests read
HELD_BY_CI = "make train    # environment"
NAMED = re.compile(r"^(?:#|//) ([\w/]+\.\w+)\n")  # a block that is a file says so first


class Block(NamedTuple):
    not_run: str
    needs: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    found = [Block(*match) for match in FENCE.findall(page.read_text(encoding="utf-8"))]
    return [block for block in found if block.language not in TEXT]


def commands(code: str) -> list[str]:
    """The commands of a shell block; a here-document belongs to its command."""
    found: list[str] = []
    end = None
    for line in code.splitlines():
        if end is not None:
            found[-1] += f"\n{line}"
            end = None if line == end else end
        elif line.strip():
            found.append(line)
            here = re.search(r"<<'(\w+)'", line)
            end = here[1] if here else None
    return found


class Reader:
    """Does what a page says, in the working directory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch = monkeypatch

    def json(self, code: str) -> None:
        name = NAMED.match(code)
        path = Path(name[1] if name else "shown.json")
        path.write_text(code)
        values = json5.loads(code)
        if "TYPE" in values:  # one entry of REWARDS
            path.write_text(f'{{"REWARDS": [{code}]}}')
        load_config(path, schema=RunConfig)

    def python(self, code: str) -> None:
        if name := NAMED.match(code):
            Path(name[1]).write_text(code)
            sys.modules.pop(Path(name[1]).stem, None)
            return
        *_, last = code.strip().splitlines()
        namespace: dict[str, Any] = {"__name__": "snippet"}
        exec(compile(code, "snippet", "exec"), namespace)
        call, _, comment = last.partition("  # [")
        if comment:  # `call  # [what it gives]`
            assert eval(call, namespace) == json5.loads(f"[{comment}")

    def bash(self, code: str) -> None:
        for command in commands(code):
            if "<<" in command:
                subprocess.run(["bash", "-ec", command], check=True)
                continue
            words = shlex.split(command, comments=True)
            if words[:2] == ["python", "train.py"]:
                self.train(words[2:])
            elif words[:3] == ["python", "-m", "adaptiverl"] or words[0] == "adaptiverl":
                self.after(words[3:] if words[0] == "python" else words[1:])
            else:
                pytest.fail(f"{command}: nothing here runs it")

    def train(self, words: list[str]) -> None:
        import train

        is_long = "--dry-run" not in words and not any(w.startswith("STEPS=") for w in words)
        more = ["MAX_NEW_TOKENS=8", *(["STEPS=2"] if is_long else [])]
        self.monkeypatch.setattr("sys.argv", ["train.py", *words, *more])
        with in_this_process():
            assert train.main() == 0, words

    def after(self, words: list[str]) -> None:
        run = next((Path(word) for word in words[1:] if word == "checkpoints"), None)
        if run and not run.exists():
            self.train(["config.json", "FULLTUNE=false"])
        with in_this_process():
            status = adaptiverl(words)
            assert status == 0 or (words[0], status) == ("doctor", 1), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore")  # of other people's trainers
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    for name in ("config.json", "data.json", "configs", "adaptiverl"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    reader = Reader(monkeypatch)
    for block in blocks(page):
        lacks = block.needs and importlib.util.find_spec(block.needs) is None
        if block.not_run or lacks or block.code.startswith(HELD_BY_CI):
            continue
        getattr(reader, block.language)(block.code)
    sys.modules.pop("my_rewards", None)
    if page == PAGES[0]:  # "goes on from step 3"
        rows = read_jsonl(tmp_path / "checkpoints/metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_the_reader_fails_where_a_page_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = Reader(monkeypatch)
    with pytest.raises(AssertionError):
        reader.python("[1, 2]  # [1, 3]")
    with pytest.raises(Exception, match="STEPZ"):
        reader.json('{"REWARDS": [{"TYPE": "classifier"}], "STEPZ": 3}')
    with pytest.raises(AssertionError):
        reader.after(["explain", "nowhere"])
    with pytest.raises(SystemExit):
        reader.after(["report", "--no-such-option"])
    with pytest.raises(pytest.fail.Exception):
        reader.bash("curl example.org")


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "benchmarks/README.md", ROOT / "CONTRIBUTING.md"], ids=str
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_readme_is_short_and_leads_to_every_page():
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in text, page.name


def test_keys_shows_every_key_with_its_default_and_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert adaptiverl(["keys"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert SECTIONS.keys() <= RunConfig.model_fields.keys()
    for key in RunConfig.model_fields.keys() - {"SCHEMA"}:
        assert f"\n{key} " in text
    for kind in REWARD_TYPES:
        part = text.split(f'"TYPE": "{kind.model_fields["type"].default}". ')[1].split('"TYPE"')[0]
        for key in kind.model_fields.keys() - REWARD_TYPES[0].__base__.model_fields.keys():
            assert f"\n{key.upper()} " in part, key
    assert re.search(r"\nLORA_R +8 +Rank of the adapter; one in MODEL keeps its own\n", text)


def test_keys_finds_words_in_names_meanings_and_titles(capsys):
    assert adaptiverl(["keys", "stop_kl", "Nucleus"]) == 0
    names = re.findall("^[A-Z_]+(?=  )", capsys.readouterr().out, flags=re.MULTILINE)
    assert names == ["TOP_P", "STOP_KL"]
    assert adaptiverl(["keys", "judge"]) == 0
    assert "\nCONCURRENCY " in capsys.readouterr().out, "a key of the section of that title"
    assert adaptiverl(["keys", "nonsense"]) == 0
    assert capsys.readouterr().out == "no key and no meaning has nonsense\n"


def test_keys_says_what_held_out_refuses():
    rows = [row for rows in sections().values() for row in rows]
    keys = [key for key, _, meaning in rows if "; not in HELD_OUT" in meaning]
    assert keys == ["WEIGHT", "NORMALIZE", "CLIP", "MAX_MISSING"]
    for key, value in (("WEIGHT", 2), ("NORMALIZE", "rank"), ("CLIP", [0, 1]), ("MAX_MISSING", 0)):
        judge = {"TYPE": "judge", "MODEL": "m", "RUBRIC": "r", key: value}
        with pytest.raises(ValidationError, match=f"{key} is for REWARDS only"):
            RunConfig.model_validate({"HELD_OUT": [judge]})


def test_every_figure_of_a_run_is_named_in_a_page(main, settings):
    settings["REWARDS"][0] |= {"NORMALIZE": "zscore"}
    more = {"HELD_OUT": [{"TYPE": "regex", "NAME": "held", "PATTERNS": "a"}], "STEPS": 1}
    assert main(settings | more | {"EVAL_SPLIT": 0.4, "EVAL_EVERY": 1}) == 0
    (row,) = read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")
    names = {re.sub("rewards/(regex|length|held)/", "rewards/<name>/", name) for name in row}
    names = {re.sub("^seconds/.*", "seconds/<part>", name) for name in names}
    # of an evaluation they are named as without one
    names = {name.removeprefix("eval/") if "held_out" in name else name for name in names}
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {"rewards/<name>/scaled", "updates_scaled", "eval/score"} <= names
    assert sorted(name for name in names if f"`{name}`" not in text) == []


@pytest.mark.parametrize("target", ["train", "test"])
def test_make_has_the_two_commands(target):
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert f"make {target}" in PAGES[0].read_text(encoding="utf-8")
