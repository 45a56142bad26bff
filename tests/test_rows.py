"""Values of a file of prompts: as they were written, whatever the rest of their column is."""

import json
import math
from pathlib import Path

import pytest

from adaptiverl.rl.data import load_prompts, split_prompts


def load(tmp_path: Path, name: str, text: str) -> list[dict]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return list(load_prompts(str(tmp_path / name), "prompt"))


def refused(tmp_path: Path, name: str, text: str) -> str:
    """What is said of the file, without its name."""
    with pytest.raises(ValueError) as caught:
        load(tmp_path, name, text)
    return str(caught.value).removeprefix(f"{tmp_path / name} ")


# .csv


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["12", "-3", "0"], [12, -3, 0]),
        (["12", "", "3"], [12, None, 3]),
        (["0.5", "-12.50", "3"], [0.5, -12.5, 3.0]),
        (["007", "12"], ["007", "12"]),
        (["+1", "2"], ["+1", "2"]),
        (["-0", "2.x"], ["-0", "2.x"]),
        (["1e5", "2"], ["1e5", "2"]),
        (["1_000", "2"], ["1_000", "2"]),
        (["\u0663", "2"], ["\u0663", "2"]),
        ([" 1", "2"], [" 1", "2"]),
        (["0.1234567890123456789", "2"], ["0.1234567890123456789", "2"]),
        (["9007199254740993", "0.5"], ["9007199254740993", "0.5"]),
        (["9223372036854775808", "2"], ["9223372036854775808", "2"]),
        (["nan", "inf"], ["nan", "inf"]),
        (["NA", "None", "null", ""], ["NA", "None", "null", None]),
        (["True", "False"], ["True", "False"]),
        (["2024-01-01", "2024-01-02"], ["2024-01-01", "2024-01-02"]),
    ],
)
def test_a_column_of_a_csv_is_of_numbers_only_if_nothing_is_lost(tmp_path, texts, values):
    text = "prompt,value\n" + "".join(f"This,{text}\n" for text in texts)
    found = [row["value"] for row in load(tmp_path, "a.csv", text)]
    assert found == values and list(map(type, found)) == list(map(type, values))


def test_a_csv_whose_last_row_is_another_kind(tmp_path):
    """20,000 rows: more than what a library reads at once."""
    count = 20_000
    lines = "".join(f"This,{row}\n" for row in range(count))
    rows = load(tmp_path, "a.csv", f"prompt,value\n{lines}This,x{count}\n")
    assert [row["value"] for row in rows] == [*map(str, range(count)), f"x{count}"]


def test_prompts_of_a_csv_are_texts(tmp_path):
    rows = load(tmp_path, "a.csv", "prompt\n12\n\nNA\n")
    assert rows == [{"prompt": "12"}, {"prompt": "NA"}]


def test_a_blank_line_of_a_csv_is_no_row_and_a_blank_field_is_one(tmp_path):
    rows = load(tmp_path, "a.csv", "\n  \nprompt\nThis\n\n   \nThat\n")
    assert rows == [{"prompt": "This"}, {"prompt": "That"}]
    rows = load(tmp_path, "b.csv", "prompt,genre\nThis,a\n   \n   ,b\n")
    assert rows == [{"prompt": "This", "genre": "a"}, {"prompt": "   ", "genre": "b"}]
    with pytest.raises(ValueError, match=r"prompt in row 1 \(counted from 0\) is missing"):
        load(tmp_path, "c.csv", 'prompt\nThis\n""\nThat\n')


def test_spaces_around_the_names_of_a_csv(tmp_path):
    rows = load(tmp_path, "a.csv", "genre, prompt \ndrama, This\n")
    assert rows == [{"genre": "drama", "prompt": " This"}]


def test_an_empty_name_of_a_csv(tmp_path):
    """As a table that pandas wrote with its index."""
    rows = load(tmp_path, "a.csv", ",prompt,\n0,This,a\n")
    assert rows == [{"Unnamed: 0": 0, "prompt": "This", "Unnamed: 2": "a"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'prompt,genre\n"This\nfilm",a\nThat\n',
            "line 4 has 1 field, and the first line names 2: an empty field has its comma, too",
        ),
        ("prompt, prompt\nThis,That\n", "line 1: two columns have the name 'prompt'"),
        (
            "prompt;genre\nThis, that;a\n",
            "line 2 has 2 fields, and the first line names 1: columns are separated by commas, "
            "and this file seems to use ;",
        ),
        (
            "prompt\tgenre\nThis, that\ta\n",
            "line 2 has 2 fields, and the first line names 1: columns are separated by commas, "
            "and this file seems to use tabs",
        ),
        (
            "prompt\nThis, that\n",
            "line 2 has 2 fields, and the first line names 1: put a text that has a comma in it "
            'into quotes, "like, this"',
        ),
        ('prompt\nThis\n"That\n', "line 3: a quote is not closed"),
        (
            'prompt\n"He said "no""\n',
            'line 2: a quote within quotes is written twice: "He said ""no"""',
        ),
    ],
)
def test_a_line_of_a_csv_that_cannot_be_read(tmp_path, text, message):
    assert refused(tmp_path, "a.csv", text) == f"cannot be read as csv: {message}"


def test_a_field_of_a_csv_may_be_long(tmp_path):
    (row,) = load(tmp_path, "a.csv", "prompt\n" + "a" * 200_000 + "\n")
    assert len(row["prompt"]) == 200_000


@pytest.mark.parametrize(
    ("name", "text"), [("a.CSV", "prompt\nThis\n"), ("a.Json", '[{"prompt": "This"}]')]
)
def test_the_end_of_a_name_in_any_case(tmp_path, name, text):
    assert load(tmp_path, name, text) == [{"prompt": "This"}]


# .json and .jsonl

VALUES = [
    ["2024-01-01", "2024-01-02T00:00:00"],
    [1, 1.5],
    [1, True],
    [1, "1", "[1]", '"x"', "null", None],
    [2**70, -(2**63), 2**63],
    [0.1234567890123456789, 1 / 3, 5e-324],
    [[1, 1.5], {"x": 1, "y": [1, 2]}, {"z": None}, []],
    [{"b": 1, "a": 2}],
    [True, None],
    [None, None],
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("values", VALUES)
def test_json_keeps_every_value(tmp_path, suffix, values):
    rows = [{"prompt": "This", "value": value} for value in values]
    text = json.dumps(rows)
    if suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    assert json.dumps(load(tmp_path, f"a{suffix}", text)) == json.dumps(rows)
    loaded = load_prompts(str(tmp_path / f"a{suffix}"), "prompt")
    numbers = list(range(len(rows)))[::-1]
    got = loaded.select(numbers)[: len(rows)]["value"]
    assert json.dumps(got) == json.dumps(values[::-1]), "as a step reads them"


def test_json_keeps_what_is_no_number(tmp_path):
    rows = load(tmp_path, "a.json", '[{"prompt": "a", "v": NaN}, {"prompt": "b", "v": [Infinity]}]')
    assert math.isnan(rows[0]["v"]) and rows[1]["v"] == [math.inf]


def test_mixed_values_survive_a_split(tmp_path):
    rows = [{"prompt": f"{k}", "value": k if k % 2 else [k]} for k in range(6)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    loaded = load_prompts(str(tmp_path / "a.json"), "prompt")
    train, held_out = split_prompts(loaded, "prompt", 0.5, seed=1)
    both = sorted([*train, *held_out], key=lambda row: row["prompt"])
    assert len(train) == 3 and both == rows


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '["This", "That"]'),
        ("a.jsonl", '"This"\n"That"\n'),
        ("a.json", '{"prompt": "This"}\n{"prompt": "That"}'),
        ("a.jsonl", '[{"prompt": "This"},\n{"prompt": "That"}]'),
        ("a.jsonl", '{\n"prompt": "This"\n}\n\n{"prompt": "That"}'),
        ("a.jsonl", '\ufeff{"prompt": "This"}\r\n{"prompt": "That"}\r\n'),
    ],
)
def test_shapes_of_json(tmp_path, name, text):
    assert load(tmp_path, name, text) == [{"prompt": "This"}, {"prompt": "That"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.json",
            '["This", 3]',
            'json: row 1 (counted from 0) is 3, and must be an object, such as {"prompt": "This"}',
        ),
        (
            "a.json",
            '{"data": [{"prompt": "This"}]}',
            "json: the rows are in 'data': make that list the whole file",
        ),
        ("a.json", '[{"prompt": "This"},\n{"prompt": ]', "json: line 2: Expecting value"),
        (
            "a.jsonl",
            '{"prompt": "This"}\n{"prompt": "That"\n{"prompt": "Then"}\n',
            "jsonl: line 2: Expecting ',' delimiter",
        ),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}',
            "jsonl: line 2: 'prompt' is given twice in one object",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "b": 1}\n{"prompt": "a", "b": ["\\ud83d"]}',
            "jsonl: row 1 (counted from 0) of column 'b' has half of a character, '\\ud83d'",
        ),
        (
            "a.json",
            "[" * 100_000,
            "json: line 1: maximum recursion depth exceeded while decoding a JSON array from a "
            "unicode string",
        ),
    ],
)
def test_json_that_cannot_be_read(tmp_path, name, text, message):
    assert refused(tmp_path, name, text) == f"cannot be read as {message}"
