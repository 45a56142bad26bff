"""A config may be YAML: the same keys, comments and anchors, and its mistakes with their lines."""

import json
from collections.abc import Callable

import json5
import pytest
import yaml
from conftest import ROOT

from adaptiverl.config.loading import load_config
from adaptiverl.config.schema import ConfigError
from adaptiverl.training.keys import RunConfig

ANCHORS = """\
# A comment
MODEL: gpt2            # and another
STEPS: "20"            # text is read as what it stands for, as in JSON
LRATE: 1e-5
BF16: no
LR_RULE: {name: patience, big_drop: 5e-1}
REWARDS:
  - &short {TYPE: length, NAME: short, MAX: 12, WEIGHT: 2e-1}
  - <<: *short
    NAME: long
    MAX: 24
  - &judge {TYPE: local_judge, MODEL: gpt2, RUBRIC: "Is it good?", YES: yes, NO: no}
HELD_OUT: [*judge]
"""


@pytest.fixture
def load(tmp_path) -> Callable[..., RunConfig]:
    def load(text: str, *overrides: str, name: str = "config.yaml") -> RunConfig:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides, schema=RunConfig)

    return load


@pytest.mark.parametrize("path", ["config.json", "configs/human.json", "configs/judge.json"])
@pytest.mark.parametrize("name", ["config.yaml", "config.yml"])
def test_yaml_is_read_as_the_same_json_is(path, name, load):
    keys = json5.loads((ROOT / path).read_text(encoding="utf-8"))
    assert load(yaml.safe_dump(keys), name=name) == load_config(ROOT / path, schema=RunConfig)


def test_comments_anchors_and_words_that_yaml_1_1_misreads(load):
    config = load(ANCHORS)
    assert (config.STEPS, config.LRATE, config.BF16) == (20, 1e-5, False)
    assert config.LR_RULE == {"name": "patience", "big_drop": 0.5}
    short, long, judge = config.REWARDS
    assert (short.name, short.max, short.weight) == ("short", 12, 0.2)
    assert (long.name, long.max, long.weight) == ("long", 24, 0.2)
    assert (judge.yes, judge.no) == ("yes", "no"), "no keys and words are booleans"
    assert [judge] == config.HELD_OUT


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1E+2", 100.0),
        (".5", 0.5),
        ("010", 10),
        ("0x10", 16),
        ("0o10", 8),
        ("True", True),
        ("~", None),
        ("1:30", "1:30"),
        ("2026-11-21", "2026-11-21"),
        ("1_000", "1_000"),
        ("'1e-5'", "1e-5"),
        ("off", "off"),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(text, value, load):
    config = load(f"REWARDS: [{{TYPE: python, FUNCTION: 'm:f', ARGS: {{x: {text}}}}}]")
    found = config.REWARDS[0].args["x"]
    assert found == value and type(found) is type(value)


def test_an_empty_file_and_overrides(load):
    assert load("{}") == RunConfig()
    assert load("STEPS: 3", "STEPS=4").STEPS == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("STEPS: 1\nLRATE: 1\nSTEPS: 3", "config.yaml, line 3: STEPS is given twice"),
        ("REWARDS:\n  - {TYPE: length, MAX: 3,\n     MAX: 4}", "line 3: MAX is given twice"),
        ("STEPS: 1\nSTOP: [a\nLRATE: 1", "line 3: expected ',' or ']', but got ':'"),
        ("STEPS: 1\n\tLRATE: 2", "line 2: found character '\\t' that cannot start any token"),
        ("MODEL: !!python/name:os.system", "line 1: could not determine a constructor for the tag"),
        ("STOP: *unknown", "line 1: found undefined alias 'unknown'"),
        ("STOP: &own [*own]", "Circular reference detected"),
        ("STEPS: 1\n---\nSTEPS: 2", "line 2: but found another document"),
        ("- STEPS", "must hold keys with their values, KEY: value"),
        ("", "must hold keys with their values, KEY: value"),
        ("MODEL: a\x07b", "unacceptable character #x0007"),
        ("STEP: 3", "config.yaml: unknown key STEP; the nearest is STEPS"),
        ("LRATE: .inf", "LRATE"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_place(text, message, load):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_by_a_yaml_file(settings, main, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(path, "STEPS=1") == 0
    written = json.loads((tmp_path / "run/config.json").read_text())
    assert written["STEPS"] == 1 and written["TRAIN_FILE"] == settings["TRAIN_FILE"]
    assert "finished: 1 step," in capsys.readouterr().out
