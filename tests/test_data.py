"""Prompts: every file format, what is wrong with a file, and which rows each step takes."""

import csv
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptiverl.rl import data
from adaptiverl.rl.data import indices_at, load_prompts
from adaptiverl.training.inputs import check_names
from adaptiverl.training.keys import RunConfig

ROWS = [
    {"prompt": "This", "reference": "is a film, or so.", "year": 1999},
    {"prompt": 'He said "no",\nand left', "reference": "{'a': [1]}", "year": 2001},
    {"prompt": " ünï \\n ☃ ", "reference": "snow", "year": 0},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps a copy of what it reads: here, not in the user's home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict]) -> Path:
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# Files


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = load_prompts(str(write(tmp_path / f"prompts{suffix}", ROWS)), "prompt")
    assert rows.column_names == ["prompt", "reference", "year"]
    assert rows.to_list() == ROWS


def test_any_column_can_be_the_prompt(tmp_path):
    rows = load_prompts(str(write(tmp_path / "prompts.json", ROWS)), "reference")
    assert rows["reference"] == [row["reference"] for row in ROWS]


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "prompts.json"
    for rows in (ROWS, ROWS[:1]):
        assert load_prompts(str(write(path, rows)), "prompt").to_list() == rows


@pytest.mark.parametrize("name", ["film[s].json", "film*.json"])
def test_a_file_name_is_no_pattern(tmp_path, name):
    write(tmp_path / "films.json", ROWS)
    path = write(tmp_path / name, ROWS[:1])
    assert load_prompts(str(path), "prompt").to_list() == ROWS[:1]


def test_what_is_no_file_is_a_hub_id(monkeypatch):
    asked = []

    def load_dataset(source, split):
        asked.append((source, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_prompts("someone/films", "prompt").to_list() == ROWS
    assert load_prompts("someone/films", "prompt", split="test").to_list() == ROWS
    assert asked == [("someone/films", "train"), ("someone/films", "test")]


def test_a_missing_file(tmp_path):
    path = tmp_path / "nowhere.json"
    with pytest.raises(FileNotFoundError) as caught:
        load_prompts(str(path), "prompt")
    assert str(caught.value) == f"there is no file {path}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.csv", "", "is empty"),
        ("a.parquet", "", "is empty"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", "\n", "has no rows"),
        ("a.csv", "prompt,reference\n", "has no rows"),
        ("a.json", '[{"text": "a", "id": 1}]', "has no column 'prompt', only text, id"),
        ("a.csv", "Prompt\nThis\n", "has no column 'prompt', only Prompt"),
        ("a.txt", "This\n", "must end in one of .json, .jsonl, .csv, .parquet"),
        ("a", "This\n", "must end in one of .json, .jsonl, .csv, .parquet"),
    ],
)
def test_a_file_without_prompts(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_prompts(str(path), "prompt")
    assert str(caught.value) == f"{path} {message}"


def test_a_parquet_file_without_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], "string")}), path)
    with pytest.raises(ValueError) as caught:
        load_prompts(str(path), "prompt")
    assert str(caught.value) == f"{path} has no rows"


def test_a_folder_is_no_prompt_file(tmp_path):
    with pytest.raises(ValueError) as caught:
        load_prompts(str(tmp_path), "prompt")
    assert str(caught.value) == f"{tmp_path} must end in one of .json, .jsonl, .csv, .parquet"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"prompt": "This"'),
        ("a.json", '[{"prompt": This}]'),
        ("a.jsonl", '{"prompt": "This"}\n{"prompt":'),
        ("a.parquet", "This is no parquet file"),
        ("a.csv", 'prompt\n"This\n'),
    ],
)
def test_a_malformed_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_prompts(str(path), "prompt")
    message = str(caught.value)
    start = f"{path} cannot be read as {path.suffix[1:]}: "
    assert message.startswith(start) and len(message) > len(start)
    assert "\n" not in message


def test_a_malformed_file_is_told_by_the_first_line_of_the_cause(tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        raise DatasetGenerationError("no use") from OSError("one\ntwo")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    path = write(tmp_path / "a.parquet", ROWS)
    with pytest.raises(ValueError) as caught:
        load_prompts(str(path), "prompt")
    assert str(caught.value) == f"{path} cannot be read as parquet: one"


NOTHING = " (to start from nothing, write the model's beginning-of-text token)"


@pytest.mark.parametrize(
    ("prompts", "row", "value"),
    [
        (["This", ""], 1, "prompt {} is empty" + NOTHING),
        (["", "This"], 0, "prompt {} is empty" + NOTHING),
        (["This", "That", None], 2, "prompt {} is missing" + NOTHING),
        ([12, 4], 0, "prompt 12 {} is a number, not text"),
        ([0.5], 0, "prompt 0.5 {} is a number, not text"),
        ([True], 0, "prompt True {} is true or false, not text"),
        ([[]], 0, "prompt {} is a conversation without messages"),
        ([["This"]], 0, "prompt ['This'] {} is a list, not text"),
        ([{"role": "user"}], 0, "prompt {{'role': 'user'}} {} is an object, not text"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_prompt_that_is_not_text(tmp_path, suffix, prompts, row, value):
    path = write(tmp_path / f"a{suffix}", [{"prompt": prompt} for prompt in prompts])
    with pytest.raises(ValueError) as caught:
        load_prompts(str(path), "prompt")
    assert str(caught.value) == f"{path}: " + value.format(f"in row {row} (counted from 0)")


def test_prompts_are_checked_all_at_once(tmp_path, monkeypatch):
    """One by one, they would take 50 times as long."""
    path = write(tmp_path / "a.json", [{"prompt": "This"}, {"prompt": "That"}])
    monkeypatch.setattr(
        "datasets.arrow_dataset.Column.__iter__", lambda _: pytest.fail("read one by one")
    )
    assert load_prompts(str(path), "prompt").num_rows == 2


def test_prompts_of_several_kinds(tmp_path):
    path = write(tmp_path / "a.json", [{"prompt": "This"}, {"prompt": 3}])
    with pytest.raises(ValueError, match=r"prompt 3 in row 1 \(counted from 0\) is a number"):
        load_prompts(str(path), "prompt")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_conversations_are_read(tmp_path, suffix):
    chats = [{"prompt": [{"role": "user", "content": text}]} for text in ("Hello", "ünï ☃", "")]
    rows = load_prompts(str(write(tmp_path / f"a{suffix}", chats)), "prompt")
    assert rows.to_list() == chats and data.holds_chats(rows, "prompt")
    texts = load_prompts(str(write(tmp_path / f"b{suffix}", ROWS)), "prompt")
    assert not data.holds_chats(texts, "prompt")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b'{"prompt": "This"}\n{"prompt":'), ("a.csv", b"prompt\nMod\xe8le\n")],
)
def test_an_unreadable_file_is_told_once(tmp_path, caplog, capfd, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as|is not UTF-8"):
        load_prompts(str(path), "prompt")
    assert caplog.records == []
    assert "ailed" not in capfd.readouterr().err
    assert logging.getLogger("datasets").level == logging.WARNING, "silent ever after"


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_prompts_that_are_not_utf8(tmp_path, name):
    path = tmp_path / name
    text = "prompt\nModèle\n" if name == "a.csv" else '{"prompt": "Modèle"}\n'
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        load_prompts(str(path), "prompt")
    message = str(caught.value)
    assert message.startswith(f"{path} is not UTF-8 (")
    assert message.endswith("): save it as UTF-8") and "\n" not in message


# Which rows a step takes

counts, totals = st.integers(1, 12), st.integers(1, 20)
seeds = st.integers(0, 2**32 - 1)


def stream(length: int, count: int, total: int, seed: int) -> list[int]:
    """The steps' rows one after another, until there are `length`."""
    steps = range(-(-length // count))
    return [row for step in steps for row in indices_at(step, count, total, seed)][:length]


@settings(deadline=None)
@given(counts, totals, seeds)
def test_every_row_comes_exactly_once_an_epoch(count, total, seed):
    rows = stream(4 * total, count, total, seed)
    for epoch in range(4):
        assert sorted(rows[epoch * total : (epoch + 1) * total]) == list(range(total))


@settings(deadline=None)
@given(counts, counts, totals, seeds)
def test_steps_of_any_size_cut_the_same_stream_without_gaps(count, other, total, seed):
    length = 3 * total + 5
    assert stream(length, count, total, seed) == stream(length, other, total, seed)


@settings(deadline=None)
@given(st.integers(0, 50), counts, totals, seeds)
def test_every_step_has_its_count_of_rows(step, count, total, seed):
    assert len(indices_at(step, count, total, seed)) == count


def test_epochs_and_seeds_differ():
    orders = [indices_at(epoch, 50, 50, seed) for seed in range(10) for epoch in range(10)]
    assert len(set(map(tuple, orders))) == 100
    assert list(range(50)) not in orders


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), counts, totals, st.integers(0, 3)), max_size=8),
    st.randoms(use_true_random=False),
)
def test_a_steps_rows_do_not_depend_on_what_was_asked_before(calls, random):
    want = {}
    for call in calls:
        data._shuffled.cache_clear()
        want[call] = indices_at(*call)
    for _ in range(2):
        random.shuffle(calls)
        for call in calls:
            torch.manual_seed(random.randrange(2**32))
            rows = indices_at(*call)
            assert rows == want[call]
            rows.clear()  # what the caller does with them is its own affair


def test_the_shuffle_leaves_torchs_random_numbers_alone():
    before = torch.get_rng_state()
    assert sorted(indices_at(0, 7, 7, 1)) == list(range(7))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_comma_in_a_text_that_is_not_quoted_is_told(tmp_path):
    path = tmp_path / "comma.csv"
    path.write_text("prompt,genre\nHello, my friend,drama\nfoo,b\n")
    with pytest.raises(ValueError, match=r"line 2 has 3 fields, and the first line names 2: put"):
        load_prompts(str(path), "prompt")
    path.write_text('prompt,genre\n"Hello, my\nfriend",drama\nfoo,b\n')
    assert load_prompts(str(path), "prompt")["prompt"] == ["Hello, my\nfriend", "foo"]
    path.write_text("prompt;genre\nfoo;b\n")
    with pytest.raises(ValueError, match=r"only prompt;genre: columns are sep.* to use ;$"):
        load_prompts(str(path), "prompt")


# Columns that rewards do not see


@pytest.mark.parametrize(
    ("column", "others", "said"),
    [
        ("prompt", ["completion", "reference"], ["completion"]),
        ("question", ["prompt"], ["prompt"]),
        ("prompts", ["reference"], []),
        ("completion", ["reference"], []),
    ],
)
def test_a_column_of_other_trainers_is_warned_of(caplog, column, others, said):
    """`prompts` and the like are refused: tests/test_mistakes.py."""
    rows = Dataset.from_list([dict.fromkeys([column, *others], "This")])
    config = RunConfig(PROMPT_COLUMN=column)
    for is_main in (False, True):
        check_names(config, {"a.json": rows}, SimpleNamespace(is_main=is_main))
    assert caplog.messages == [
        f"a.json has a column {name}: rewards do not see it, that name is taken" for name in said
    ]
