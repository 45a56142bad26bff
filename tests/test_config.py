"""The configuration: comments, overrides, types, contradictions and what each mistake is called."""

import json
import re
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from adaptiverl.commands import keys as commands
from adaptiverl.config.loading import load_config
from adaptiverl.config.schema import LR_BOUNDS, Config, ConfigError
from adaptiverl.optim.constants import BOUNDS
from adaptiverl.optim.rules import ARGUMENTS, names
from adaptiverl.rl.reinforce import BASELINES
from adaptiverl.rl.sampling.sampler import BACKENDS
from adaptiverl.training.build import ARGUMENTS as OF_THE_OPTIMIZER
from adaptiverl.training.build import adaptive, base_optimizer, try_rules
from adaptiverl.training.keys import RULE_KEYS, RunConfig
from rewards import (
    REWARD_TYPES,
    ClassifierReward,
    CosineReward,
    LengthReward,
    PythonReward,
    RegexReward,
    Reward,
)

JUDGE = {"TYPE": "judge", "MODEL": "m", "RUBRIC": "r"}
EXAMPLE = """\
{
  "MODEL": "gpt2",
  "TRAIN_FILE": "data.json",
  "OUTPUT_DIR": "checkpoints",
  "BATCH_SIZE": "2",
  "EPOCHS": "3",
  "LRATE": "5e-5",
  "STEPS": "1000",
  "OPTIM": "adamw",          // "sgd", "rmsprop", "adamw"
  "MAXSEQ": "512",
  "BF16": "false",
  "FP16": "true",
  "LOAD_4BIT": "false",
  "LOAD_8BIT": "false",
  "FULLTUNE": "true"
}
"""
TYPED = {
    "MODEL": "gpt2",
    "TRAIN_FILE": "data.json",
    "OUTPUT_DIR": "checkpoints",
    "BATCH_SIZE": 2,
    "EPOCHS": 3,
    "LRATE": 5e-5,
    "STEPS": 1000,
    "OPTIM": "adamw",
    "MAXSEQ": 512,
    "BF16": False,
    "FP16": True,
    "LOAD_4BIT": False,
    "LOAD_8BIT": False,
    "FULLTUNE": True,
}
REGEX = {"TYPE": "regex", "PATTERNS": "a"}


@pytest.fixture
def load(tmp_path) -> Callable[..., RunConfig]:
    """Loads a config given as text or keys, with overrides."""

    def load(source: str | dict, *overrides: str) -> RunConfig:
        path = tmp_path / "config.json"
        path.write_text(source if isinstance(source, str) else json.dumps(source))
        return load_config(path, overrides, schema=RunConfig)

    return load


@pytest.fixture
def mistake(load, tmp_path) -> Callable[..., str]:
    """What the user is told of a config that does not load: one line."""

    def mistake(source: str | dict, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(source, *overrides)
        message = str(caught.value)
        assert "\n" not in message
        return message.replace(str(tmp_path / "config.json"), "config.json")

    return mistake


# Reading


def test_the_example_with_strings_and_a_comment_gives_typed_values(load):
    config = load(EXAMPLE)
    values = {key: getattr(config, key) for key in TYPED}
    assert values == TYPED
    assert {key: type(value) for key, value in values.items()} == {
        key: type(value) for key, value in TYPED.items()
    }


def test_native_types_load_to_the_same_config(load):
    assert load(TYPED) == load(EXAMPLE)


def test_an_empty_config_is_the_default(load):
    config = load("{}")
    assert config == RunConfig()
    assert list(config.REWARDS) == [ClassifierReward()]


def test_each_type_of_reward_loads_with_its_name_and_arguments(load):
    rewards = load(
        {
            "REWARDS": [
                REGEX | {"WEIGHT": "2"},
                {"TYPE": "length", "MIN": "3", "UNIT": "words"},
                {"TYPE": "cosine", "NAME": "meaning"},
                {"TYPE": "classifier", "WITH_PROMPT": "true"},
                {"TYPE": "python", "FUNCTION": "my.module:my_reward"},
            ]
        }
    ).REWARDS
    assert [type(reward) for reward in rewards] == [
        RegexReward, LengthReward, CosineReward, ClassifierReward, PythonReward
    ]  # fmt: skip
    names = ["regex", "length", "meaning", "classifier", "my_reward"]
    assert [reward.name for reward in rewards] == names
    assert [reward.weight for reward in rewards] == [2.0, 1.0, 1.0, 1.0, 1.0]
    assert rewards[0] == RegexReward(patterns=["a"], weight=2.0)
    assert (rewards[0].literal, rewards[0].match, rewards[0].negate) == (False, "any", False)
    assert not rewards[0].ignore_case
    length = rewards[1]
    assert (length.target, length.min, length.max, length.unit) == (None, 3, None, "words")
    assert (rewards[2].model, rewards[2].column) == ("all-MiniLM-L6-v2", "reference")
    assert rewards[3] == ClassifierReward(with_prompt=True)
    classifier = rewards[3]
    assert (classifier.model, classifier.label, classifier.output) == (
        "adaptiverl/assets/sentiment", "positive", "probability"
    )  # fmt: skip
    assert (rewards[4].function, rewards[4].args) == ("my.module:my_reward", {})


def test_keys_of_rewards_are_upper_case(mistake):
    assert mistake({"REWARDS": [REGEX | {"negate": True}]}) == (
        "config.json: unknown key REWARDS.0.negate; the nearest is NEGATE"
    )


def test_the_schema_key_for_editors_is_accepted(load):
    assert load({"$schema": "config.schema.json"}).SCHEMA == "config.schema.json"


def test_the_resolved_config_of_a_run_loads_again(load):
    """OUTPUT_DIR/config.json, from which a run can be repeated."""
    config = load({"STEPS": 7})
    assert load(config.model_dump_json(by_alias=True, indent=2)) == config


def test_the_config_is_frozen(load):
    config = load({"REWARDS": [REGEX]})
    for thing, key in ((config, "STEPS"), (config.REWARDS[0], "weight")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(thing, key, 7)
    assert (config.STEPS, config.REWARDS[0].weight) == (100, 1.0)


# Comments


@pytest.mark.parametrize(
    "text",
    ["https://host/name", "a /* b */ c", "/*", "*/", "//", ',}"', ", ]", '\\"//', "\\", "{,}"],
)
def test_what_looks_like_a_comment_inside_a_string_survives(load, text):
    source = f'{{"MODEL": {json.dumps(text)}, // not "this"\n "STEPS": 7 /* nor, this */}}'
    config = load(source)
    assert config.model_dump(include={"MODEL", "STEPS"}) == {"MODEL": text, "STEPS": 7}


def test_both_halves_of_an_escaped_character_are_one(load):
    """json5 leaves them apart, and such a string can be written to no file."""
    assert load(r'{"MODEL": "\ud83d\ude00"}').MODEL == "😀"


def test_trailing_commas_are_dropped(load):
    rewards = '[{"TYPE": "regex", "PATTERNS": ["a", "b",], }, /* , */ ]'
    config = load(f'{{"REWARDS": {rewards},\n // the end\n "STEPS": 7,\n}}')
    assert list(config.REWARDS) == [RegexReward(patterns=["a", "b"])]
    assert config.STEPS == 7


@pytest.mark.parametrize(
    ("source", "where"),
    [
        (
            '{\n"STEPS": 7\n"SEED": 3}',
            """line 3: unexpected '"' at column 1; is a comma missing before it?""",
        ),
        (
            '{ /* one\n two\n three */ // four\n "STEPS": 7\n "SEED": 3}',
            """line 5: unexpected '"' at column 2; is a comma missing before it?""",
        ),
        ('{"STEPS": 7,\n\n\n "SEED": }', "line 4: unexpected '}' at column 10"),
        (
            '{"STEPS": 7,\n "MODEL": "gpt2\n}',
            r"line 2: unexpected '\n' at column 16; is a quote missing before it?",
        ),
        ('{"STEPS": 7', "line 1: the file ends too early; is a bracket or a quote not closed?"),
        (
            '{"STEPS": 7 /* open',
            "line 1: the file ends too early; is a bracket or a quote not closed?",
        ),
    ],
)
def test_malformed_json_is_told_by_its_line(mistake, source, where):
    assert mistake(source) == f"config.json, {where}"


@pytest.mark.parametrize("source", ["", " \n", "[1]", "3", "null", '"STEPS"'])
def test_json_that_is_no_object(mistake, source):
    assert mistake(source) == "config.json must hold one JSON object, { ... }"


def test_a_config_that_cannot_be_read(tmp_path):
    for path, reason in (
        (tmp_path / "nowhere.json", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path, schema=RunConfig)
        assert str(caught.value) == f"cannot read the config {path}: {reason}"


def test_a_config_that_is_not_utf8(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes('{"MODEL": "Modèle"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=re.escape(str(path)) + ".*(?i:utf-?8)"):
        load_config(path, schema=RunConfig)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.text(alphabet="\"'\\/*,:{}[] \n\ta"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='"/*,}]\\'), inner),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def read_args(tmp_path_factory) -> Callable[[str], object]:
    """What a config file makes of any JSON text: of a value in ARGS, which may be anything."""
    path = tmp_path_factory.mktemp("args") / "config.json"

    def read(text: str) -> object:
        reward = '{"TYPE": "python", "FUNCTION": "a:b", "ARGS": {"value": %s}}'
        path.write_text(f'{{"REWARDS": [{reward % text}]}}', encoding="utf-8")
        return load_config(path, schema=RunConfig).REWARDS[0].args["value"]

    return read


@settings(deadline=None)
@given(data=JSON, indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans())
def test_json_without_comments_is_left_equal(read_args, data, indent, ascii_only):
    """By the reader of JSON alone, and by that of JSON with comments."""
    text = json.dumps(data, indent=indent, ensure_ascii=ascii_only)
    assert read_args(text) == data == read_args(f"{text} /**/")


@settings(deadline=None)
@given(data=JSON)
def test_comments_and_trailing_commas_change_neither_data_nor_lines(read_args, data):
    """json.dumps writes line ends between tokens only, so comments may stand there."""
    text = re.sub(r"(\n *[}\]])", r",\1", json.dumps(data, indent=1))
    text = text.replace("\n", ' /* ", * / \n ] */// "]} /*\n') + ' // "the end\n'
    assert read_args(text) == data
    with pytest.raises(ConfigError, match=f", line {text.count(chr(10)) + 1}: unexpected '!'"):
        read_args(text + "!")


# KEY=VALUE


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("STEPS=7", "STEPS", 7),
        ("LRATE=1e-3", "LRATE", 1e-3),
        ("FP16=true", "FP16", True),
        ("EPOCHS=null", "EPOCHS", None),
        ("MODEL=gpt2", "MODEL", "gpt2"),
        ('MODEL="2024"', "MODEL", "2024"),
        ("MODEL=a=b", "MODEL", "a=b"),
        ("OUTPUT_DIR=runs/lr=1e-3,seed=1", "OUTPUT_DIR", "runs/lr=1e-3,seed=1"),
        ("PROMPT_COLUMN=", "PROMPT_COLUMN", ""),
        (
            'REWARDS=[{"TYPE": "length", "TARGET": 3}]',
            "REWARDS",
            [LengthReward(target=3)],
        ),
    ],
)
def test_an_override_is_json_or_else_a_string(load, override, key, value):
    file = {"STEPS": 1, "LRATE": 1, "EPOCHS": 1, "MODEL": "x", "OUTPUT_DIR": "x"}
    assert getattr(load(file, override), key) == value


def test_the_last_override_of_a_key_holds_and_others_stay(load):
    config = load({"STEPS": 1, "SEED": 5}, "STEPS=2", "STEPS=3")
    assert (config.STEPS, config.SEED) == (3, 5)


@pytest.mark.parametrize("override", ["STEPS", "STEPS:7", "steps 7", ""])
def test_an_override_without_an_equals_sign(mistake, override):
    assert mistake({}, override) == f"{override!r} is not KEY=VALUE"


# Unknown keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("BATCHSIZE", "BATCH_SIZE"),
        ("batch_size", "BATCH_SIZE"),
        ("LEARNING_RATE", "LRATE"),
        ("OPTIMIZER", "OPTIM"),
        ("REWARD", "REWARDS"),
        ("SCHEMA", "$schema"),
    ],
)
def test_an_unknown_key_names_its_nearest_neighbour(mistake, key, nearest):
    want = f"unknown key {key}; the nearest is {nearest}"
    assert mistake({key: 3}) == f"config.json: {want}"
    assert mistake({}, f"{key}=3") == f"the command line: {want}"


def test_a_mistake_is_told_where_it_is(mistake):
    """In the file, on the command line, in both, or between them."""
    wrong = {"STEPS": "ten", "SEED": -1}
    said = {
        "STEPS": 'STEPS is "ten": it must be a valid integer',
        "SEED": "SEED is -1: it must be greater than or equal to 0",
    }
    assert mistake(wrong) == f"config.json: {said['STEPS']}; {said['SEED']}"
    both = f"config.json: {said['SEED']}; the command line: {said['STEPS']}"
    assert mistake({"SEED": -1}, "STEPS=ten") == both
    assert mistake({"SEED": -1, "STEPS": 3}, "STEPS=ten") == both
    assert mistake({"FP16": True}, "BF16=true") == (
        "config.json and the command line: FP16 and BF16 exclude each other; BF16 needs no "
        "gradient scaler"
    )
    assert mistake({}, 'REWARDS=[{"TYPE": "regex"}]') == (
        "the command line: REWARDS.0.PATTERNS is missing"
    )


def test_the_keys_of_rules_are_the_arguments_of_the_optimizers():
    assert tuple(key.lower() for key in RULE_KEYS) == ARGUMENTS
    assert set(OF_THE_OPTIMIZER) <= Config.model_fields.keys()
    assert BOUNDS["lr"] == LR_BOUNDS


@pytest.mark.parametrize("key", RULE_KEYS)
def test_each_rule_that_the_optimizers_know_loads(load, key):
    fitting = {"MOMENTUM_RULE": {"OPTIM": "sgd"}, "ALPHA_RULE": {"OPTIM": "rmsprop"}}
    for name in names(key.lower()):
        keys = {key: name, "LRATE": 1e-4, "WEIGHT_DECAY": 0.1} | fitting.get(key, {})
        assert name in {rule.name for rule in load(keys).rules()}


@pytest.mark.parametrize(
    ("key", "value", "unknown", "nearest"),
    [
        ("LR_RULE", "cosin", "cosin", "cosine"),
        ("LR_RULE", "trust_region+cosine_restarts", "cosine_restarts", "cosine_restart"),
        ("REWARD_RULE", "kely", "kely", "kelly"),
        ("MOMENTUM_RULE", "Exp", "Exp", "exp"),
        ("BETAS_RULE", "variances", "variances", "variance"),
        ("ALPHA_RULE", "", "", "stable"),
        ("WD_RULE", "trend+", "", "trend"),
    ],
)
def test_an_unknown_rule_names_its_key_and_the_nearest_rule(mistake, key, value, unknown, nearest):
    told = mistake({key: value})
    assert told == (
        f"config.json: {key}: there is no rule {unknown!r}; the nearest is {nearest!r}, and all "
        f"are {', '.join(names(key.lower()))}"
    )


def test_rules_are_joined_with_or_without_spaces(load):
    assert load({"LR_RULE": "trust_region + cosine"}).LR_RULE == "trust_region+cosine"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            {"name": "patience", "patience": 0},
            "patience is 0; it must be a whole number in [1, inf)",
        ),
        (
            {"name": "patience", "patince": 30},
            "patience does not read 'patince'; it reads big_drop, patience, cooldown",
        ),
        (
            ["trend", {"patience": 30}],
            "{'patience': 30} names no rule; a rule is a name, like \"trend\", or "
            '{"name": "trend"} with constants',
        ),
        (
            3,
            '3 names no rule; a rule is a name, like "trend", or {"name": "trend"} with constants',
        ),
        (["patience", {"name": "patience", "patience": 3}], "'patience' is named twice"),
    ],
)
def test_a_wrong_rule_with_constants_is_told_in_the_words_of_the_file(mistake, rule, said):
    assert mistake({"LR_RULE": rule, "LRATE": 1e-4}) == f"config.json: LR_RULE: {said}"


def test_a_rule_with_constants_reaches_the_optimizer(load):
    rules = [{"name": "patience", "patience": 30}, {"name": "trust_region", "trust_region_kl": 0.1}]
    config = load({"LR_RULE": rules})
    assert [rule.name for rule in config.rules()] == ["patience", "trust_region"]
    base = base_optimizer(config, [("weight", torch.nn.Parameter(torch.zeros(1)))])
    optimizer = adaptive(config, base, config.STEPS, record=None)
    (patience,) = optimizer.controller.rules
    assert (patience.rule.name, patience.constants.patience) == ("patience", 30)
    assert optimizer.trust_region.kl == 0.1
    assert load(config.model_dump_json(by_alias=True)) == config


def test_a_constant_that_is_given_twice_is_refused(mistake):
    rule = {"name": "trust_region", "trust_region_kl": 0.1}
    assert mistake({"LR_RULE": rule, "TRUST_REGION_KL": 0.2}) == (
        "config.json: TRUST_REGION_KL is also given in LR_RULE, as trust_region_kl"
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("KL_STEP_TARGET", "TRUST_REGION_KL"),
        ("KL_STEP_FALLS", 'TRUST_REGION_SCHEDULE, "linear" or "constant"'),
        ("KL_TARGET", "KL_COEF_TARGET"),
    ],
)
def test_a_key_of_earlier_versions_is_refused_with_the_new_one_named(mistake, old, new):
    assert mistake({old: 1}) == f"config.json: {old} is now {new}"
    assert mistake({}, f"{old}=1") == f"the command line: {old} is now {new}"
    assert new.split(",")[0] in Config.model_fields


@pytest.mark.parametrize(
    "rule",
    ["kl_target", "kl_target+cosine", {"name": "kl_target"}, ["cosine", {"name": "kl_target"}]],
)
def test_a_rule_of_earlier_versions_is_refused_with_the_new_one_named(mistake, rule):
    assert mistake({"LR_RULE": rule}) == "config.json: LR_RULE: 'kl_target' is now 'trust_region'"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"LRATE": "1e3"}, "LRATE 1000 is above MAX_LR, which is 10"),
        ({"LRATE": 1e-12}, "LRATE 1e-12 is below MIN_LR, which is 1e-09"),
        ({"LRATE": 0.1, "MAX_LR": 0.01}, "LRATE 0.1 is above MAX_LR, which is 0.01"),
        ({"LRATE": 0.1, "MIN_LR": 0.2}, "LRATE 0.1 is below MIN_LR, which is 0.2"),
        ({"MIN_LR": 20}, "MIN_LR 20 is above MAX_LR, which is 10"),
        ({"MAX_LR": 1e-12}, "MIN_LR 1e-09 is above MAX_LR, which is 1e-12"),
    ],
)
def test_a_rate_beyond_its_bounds_is_told_with_the_bound(mistake, keys, message):
    assert mistake(keys) == f"config.json: {message}"


@pytest.mark.parametrize(
    ("keys", "rate"),
    [({}, 1e-3), ({"MAX_LR": 1e-5}, 1e-5), ({"MIN_LR": 1e-2}, 1e-2), ({"OPTIM": "sgd"}, 0.1)],
)
def test_the_automatic_rate_starts_within_its_bounds(load, keys, rate):
    config = load(keys)
    optimizer = base_optimizer(config, [("weight", torch.nn.Parameter(torch.zeros(1)))])
    assert optimizer.param_groups[0]["lr"] == rate
    try_rules(config, config.STEPS)  # raises where the rate is outside of its bounds


def test_a_rate_that_no_rule_moves_has_no_bounds(load):
    assert load({"LRATE": 1e3, "LR_RULE": "none"}).LRATE == 1e3
    assert load({"LRATE": 0}).LRATE == 0


def test_a_key_given_twice_is_refused(mistake):
    twice = '{"STEPS": 1, /* or */ "STEPS": 2}'
    assert mistake(twice) == "config.json: STEPS is given twice"
    inner = '{"REWARDS": [{"TYPE": "length", "MIN": 1, "MIN": 2}]}'
    assert mistake(inner) == "config.json: MIN is given twice"


def test_an_unknown_key_of_a_reward_names_the_nearest_of_that_reward(mistake):
    """Of the reward's own keys: LABEL is no key of a regex, PATTERNS none of a classifier."""
    rewards = [REGEX | {"IGNORECASE": True}, {"TYPE": "classifier", "LABLE": "positive"}]
    assert mistake({"REWARDS": rewards}) == (
        "config.json: unknown key REWARDS.0.IGNORECASE; the nearest is IGNORE_CASE; "
        "unknown key REWARDS.1.LABLE; the nearest is LABEL"
    )


# Contradictions


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"FP16": True, "BF16": True}, "FP16 and BF16 exclude each other"),
        (
            {"LOAD_4BIT": True, "LOAD_8BIT": True, "FULLTUNE": False},
            "LOAD_4BIT and LOAD_8BIT exclude each other",
        ),
        ({"LOAD_4BIT": True}, "a quantised model cannot be fully tuned: FULLTUNE false is LoRA"),
        ({"LOAD_8BIT": True}, "a quantised model cannot be fully tuned: FULLTUNE false is LoRA"),
        ({"LORA_R": 4}, "LORA_R needs FULLTUNE false"),
        (
            {"LORA_TARGETS": ["all-linear"], "FULLTUNE": False},
            'LORA_TARGETS "all-linear" stands alone, without brackets',
        ),
        (
            {"REWARDS": [{"TYPE": "regex", "PATTERNS": "a", "WEIGHT": 0}]},
            "every WEIGHT is 0: nothing is rewarded",
        ),
        (
            {"REWARDS": [{"TYPE": "regex", "PATTERNS": "a", "WEIGHT": [[1, 0], [9, 0]]}]},
            "every WEIGHT is 0: nothing is rewarded",
        ),
        ({"MIN_LR": 1, "MAX_LR": 0.1}, "MIN_LR 1 is above MAX_LR, which is 0.1"),
        (
            {"MAX_MOMENTUM": 0.5, "REWARD_RULE": "trend"},
            "MAX_MOMENTUM needs a MOMENTUM_RULE, or REWARD_RULE trend",
        ),
        (
            {"LORA_TARGETS": ["c_attn"], "LORA_ALPHA": 4},
            "LORA_ALPHA, LORA_TARGETS needs FULLTUNE false",
        ),
        ({"REWARDS": []}, "REWARDS is empty: name at least one reward"),
        (
            {"REWARDS": [{"TYPE": "human", "NAME": "eval"}]},
            "NAME eval is taken: metrics of the run begin so",
        ),
        ({"REWARDS": [REGEX, REGEX]}, "two rewards are named 'regex': give one of them a NAME"),
        (
            {
                "REWARDS": [
                    {"TYPE": "python", "FUNCTION": "one:score"},
                    {"TYPE": "python", "FUNCTION": "two:score"},
                ]
            },
            "two rewards are named 'score': give one of them a NAME",
        ),
        (
            {"REWARDS": [REGEX, {"TYPE": "length", "TARGET": 3, "NAME": "regex"}]},
            "two rewards are named 'regex': give one of them a NAME",
        ),
        (
            {"BATCH_SIZE": 6, "NUM_GENERATIONS": 4},
            "BATCH_SIZE 6 counts completions: it must be a multiple of NUM_GENERATIONS 4",
        ),
        (
            {"BATCH_SIZE": 8, "GRAD_ACCUM": 3},
            "BATCH_SIZE 8 must be a multiple of GRAD_ACCUM 3",
        ),
        (
            {"MAXSEQ": 32, "MAX_NEW_TOKENS": 32},
            "MAXSEQ leaves no room for a prompt before MAX_NEW_TOKENS",
        ),
        ({"KL_COEF": 0, "KL_COEF_TARGET": 1}, "KL_COEF_TARGET needs a KL_COEF above 0"),
        ({"KL_COEF": 0, "KL_ESTIMATOR": "k3"}, "KL_ESTIMATOR needs a KL_COEF above 0"),
        ({"EVAL_EVERY": 5}, "EVAL_EVERY needs an EVAL_FILE or EVAL_SPLIT"),
        ({"LR_RULE": "none", "LRATE": 1, "MAX_LR": 1}, "MAX_LR needs a rule of the rate"),
        (
            {"LR_RULE": "trend", "LRATE": 1, "TRUST_REGION_KL": 1},
            "TRUST_REGION_KL needs LR_RULE trust_region",
        ),
        (
            {"LR_RULE": "trend", "LRATE": 1, "TRUST_REGION_SCHEDULE": "constant"},
            "TRUST_REGION_SCHEDULE needs LR_RULE trust_region",
        ),
        ({"MIN_MOMENTUM": 0.5}, "MIN_MOMENTUM needs a MOMENTUM_RULE, or REWARD_RULE trend"),
        ({"LOSS_BETA": 0.5}, "LOSS_BETA needs a rule that smooths the loss"),
        ({"REWARD_BETA": 0.5}, "REWARD_BETA needs a REWARD_RULE"),
        (
            {"HELD_OUT": [{"TYPE": "length", "MAX": 9, "WEIGHT": 2}]},
            "HELD_OUT.0: WEIGHT is for REWARDS only",
        ),
        (
            {"REWARDS": [{"TYPE": "human"}], "HELD_OUT": [{"TYPE": "human", "QUESTION": "Funny?"}]},
            "a terminal asks for one human reward: give the other WHERE web",
        ),
        (
            {"REWARDS": [JUDGE | {"LOW": 0, "PAIRWISE": True}]},
            "REWARDS.0: LOW is for scores; PAIRWISE compares",
        ),
        (
            {"REWARDS": [JUDGE | {"PAIRWISE": True}], "NUM_GENERATIONS": 1, "BASELINE": "ema"},
            "judge is PAIRWISE: NUM_GENERATIONS 1 has only one",
        ),
        (
            {"REWARDS": [JUDGE | {"PAIRWISE": True}], "EVAL_FILE": "eval.json"},
            "EVAL_FILE has nothing to say: every reward is PAIRWISE",
        ),
        ({"RESUME": "checkpoints"}, """RESUME is "checkpoints": it must be 'auto'"""),
    ],
)
def test_contradictions(mistake, keys, part):
    assert part in mistake(keys)


@pytest.mark.parametrize("baseline", ["batch", "rloo"])
def test_what_compares_completions_needs_two(mistake, baseline):
    assert mistake({"BASELINE": baseline, "BATCH_SIZE": 1, "NUM_GENERATIONS": 1}) == (
        f"config.json: BASELINE {baseline} compares completions: BATCH_SIZE 1 has only one"
    )


@pytest.mark.parametrize(
    "keys",
    [
        {"FP16": True, "BF16": False},
        {"LOAD_4BIT": True, "FULLTUNE": False},
        {"LORA_R": 4, "LORA_ALPHA": 8, "LORA_TARGETS": ["c_attn"], "FULLTUNE": False},
        {"BATCH_SIZE": 8, "NUM_GENERATIONS": 4, "GRAD_ACCUM": 8},
        {"MAXSEQ": 33, "MAX_NEW_TOKENS": 32},
        {"BASELINE": "ema", "BATCH_SIZE": 1, "NUM_GENERATIONS": 1},
        {"KL_COEF": 0.1, "KL_COEF_TARGET": 1.0, "KL_ESTIMATOR": "k3"},
        {"EVAL_EVERY": 5, "EVAL_FILE": "held_out.json"},
        {"EVAL_EVERY": 0, "EVAL_FILE": None},
        {"RESUME": "auto"},
        {"RESUME": None},
    ],
    ids=lambda keys: ",".join(f"{key}={value}" for key, value in keys.items()),
)
def test_what_is_next_to_a_contradiction_loads(load, keys):
    config = load(keys)
    assert {key: getattr(config, key) for key in keys} == keys


@pytest.mark.parametrize(
    ("key", "reward"),
    [
        *[(key, {}) for key in ("MODEL", "TRAIN_FILE", "EVAL_FILE", "CHAT_TEMPLATE", "OUTPUT_DIR")],
        ("MODEL", {"TYPE": "classifier"}),
        ("MODEL", {"TYPE": "cosine"}),
        ("MODEL", {"TYPE": "local_judge", "RUBRIC": "r"}),
        ("CACHE", JUDGE),
        ("LABELS", {"TYPE": "human"}),
    ],
)
def test_the_home_folder_may_begin_a_path(load, monkeypatch, key, reward):
    """A folder named ~ would be removed by `rm -rf ~`, and the home folder with it."""
    monkeypatch.setenv("HOME", "/home/me")
    place = {key: "~/x.json"}
    config = load({"REWARDS": [reward | place]} if reward else place)
    assert getattr(config.REWARDS[0] if reward else config, key.lower() if reward else key) == (
        "/home/me/x.json"
    )


def test_two_rewards_of_a_type_are_told_apart_by_name(load):
    config = load({"REWARDS": [REGEX, REGEX | {"NAME": "other"}]})
    assert [reward.name for reward in config.REWARDS] == ["regex", "other"]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_must_be_installed(load, mistake, monkeypatch, tracker):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert list(load({"TRACKERS": [tracker]}).TRACKERS) == [tracker]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    want = f"config.json: TRACKERS: {tracker} is not installed: pip install {tracker}"
    assert mistake({"TRACKERS": [tracker]}) == want


# Types and ranges


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("BATCH_SIZE", "two", "valid integer"),
        ("BATCH_SIZE", 2.5, "valid integer"),
        ("BATCH_SIZE", None, "valid integer"),
        ("BATCH_SIZE", 0, "greater than or equal to 1"),
        ("LRATE", "fast", "valid number"),
        ("LRATE", -1e-5, "greater than or equal to 0"),
        ("LRATE", float("nan"), "finite number"),
        ("LRATE", float("inf"), "finite number"),
        ("LRATE", "1e400", "finite number"),
        ("MOMENTUM", 1, "less than 1"),
        ("TEMPERATURE", 0, "greater than or equal to 0.01"),
        ("TOP_P", 1.5, "less than or equal to 1"),
        ("TOP_P", 0, "greater than 0"),
        ("KL_COEF_TARGET", 0, "greater than 0"),
        ("SEED", -1, "greater than or equal to 0"),
        ("SEED", 2**32, "less than 4294967296"),
        ("EPOCHS", 0, "greater than or equal to 1"),
        ("FP16", "maybe", "valid boolean"),
        ("MODEL", 3, "valid string"),
        ("RESUME", True, "'auto'"),
        ("OPTIM", "adam", "'adam_mini', 'adamw', 'adamw_8bit', 'sgd', 'rmsprop'"),
        ("BASELINE", "mean", "'none', 'ema', "),
        ("KL_ESTIMATOR", "k2", "'k1' or 'k3'"),
        ("REWARDS", {"TYPE": "regex"}, "a list, for example"),
        ("LORA_TARGETS", "c_attn", 'valid list, such as ["c_attn"]'),
    ],
)
def test_a_wrong_value_is_told_with_its_key(mistake, key, value, reason):
    message = mistake({key: value})
    assert message.startswith(f"config.json: {key} is {json.dumps(value)}: it must be ")
    assert reason in message


def test_what_weights_and_limits_must_be(mistake):
    assert "need steps that rise" in mistake({"REWARDS": [REGEX | {"WEIGHT": [[5, 1], [5, 2]]}]})
    assert "first of CLIP, 2, is not" in mistake({"REWARDS": [REGEX | {"CLIP": [2, 1]}]})


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({}, "REWARDS.0: a reward needs a TYPE, one of {types}"),
        ({"TYPE": "regx"}, "REWARDS.0: TYPE is one of {types}, not 'regx'"),
        ({"TYPE": "regex"}, "REWARDS.0.PATTERNS is missing"),
        ({"TYPE": "python"}, "REWARDS.0.FUNCTION is missing"),
        (
            {"TYPE": "length", "TARGET": 0},
            "REWARDS.0.TARGET is 0: it must be greater than or equal to 1",
        ),
        (
            {"TYPE": "classifier", "OUTPUT": "score"},
            "REWARDS.0.OUTPUT is \"score\": it must be 'probability' or 'logit'",
        ),
        (REGEX | {"WEIGHT": "big"}, 'REWARDS.0.WEIGHT is "big": it must be a valid number'),
        (REGEX | {"WEIGHT": [[0, "a"]]}, 'REWARDS.0.WEIGHT.0.1 is "a": it must be a valid'),
        (
            {"TYPE": "python", "FUNCTION": "my_reward"},
            'REWARDS.0.FUNCTION is "my_reward": write module:function, for example '
            "my_rewards:praise",
        ),
        (
            REGEX | {"WEIGHT": [[0, 1, 2]]},
            "REWARDS.0.WEIGHT.0 is [0, 1, 2]: each point of WEIGHT is [step, weight]",
        ),
        (
            REGEX | {"WEIGHT": [[1]]},
            "REWARDS.0.WEIGHT.0 is [1]: each point of WEIGHT is [step, weight]",
        ),
        (
            REGEX | {"WEIGHT": [1]},
            "REWARDS.0.WEIGHT.0 is 1: each point of WEIGHT is [step, weight]",
        ),
        (REGEX | {"CLIP": [1]}, "REWARDS.0.CLIP is [1]: give two numbers, [low, high]"),
        (REGEX | {"CLIP": [1, 2, 3]}, "REWARDS.0.CLIP is [1, 2, 3]: give two numbers, [low, high]"),
        (REGEX | {"CLIP": 3}, "REWARDS.0.CLIP is 3: give two numbers, [low, high]"),
        (
            "regex",
            'REWARDS.0 is "regex": each reward is an object, for example {{"TYPE": "classifier"}}',
        ),
    ],
)
def test_a_wrong_reward_is_told_with_its_place(mistake, reward, message):
    types = ", ".join(kind.model_fields["type"].default for kind in REWARD_TYPES)
    message = message.format(types=types)
    assert mistake({"REWARDS": [reward]}).startswith(f"config.json: {message}")


def test_rewards_are_a_list_of_objects(mistake):
    assert mistake({"REWARDS": REGEX}) == (
        f"config.json: REWARDS is {json.dumps(REGEX)}: it must be a list, for example "
        '[{"TYPE": "classifier"}]'
    )


@pytest.mark.parametrize("value", ["", "  "])
@pytest.mark.parametrize("key", ["MODEL", "TRAIN_FILE", "EVAL_FILE", "CHAT_TEMPLATE", "OUTPUT_DIR"])
def test_a_name_that_is_empty(mistake, key, value):
    assert mistake({key: value}) == f"config.json: {key} is empty"


def test_an_address_without_its_scheme(mistake):
    assert mistake({"VLLM_SERVER": "localhost:8000"}) == (
        'config.json: VLLM_SERVER is "localhost:8000": write an address, for example '
        "http://localhost:8000"
    )


@pytest.mark.parametrize(
    ("patterns", "where"), [(3, "REWARDS.0.PATTERNS is 3"), (["a", 3], "REWARDS.0.PATTERNS.1 is 3")]
)
def test_wrong_patterns_are_told_once_and_by_the_names_of_the_config(mistake, patterns, where):
    message = mistake({"REWARDS": [REGEX | {"PATTERNS": patterns}]})
    assert message.count("PATTERNS") == 1
    assert message.startswith(f"config.json: {where}: ")


def test_several_mistakes_are_all_named(mistake):
    keys = {
        "BATCHSIZE": 3,
        "LRATE": "fast",
        "TOP_P": 2,
        "REWARDS": [{"TYPE": "regex"}, {"TYPE": "cosine", "MODEL": 7}],
    }
    told = mistake(keys).removeprefix("config.json: ").split("; ")
    assert [part.split(":")[0] for part in told] == [
        "REWARDS.0.PATTERNS is missing",
        "REWARDS.1.MODEL is 7",
        "TOP_P is 2",
        'LRATE is "fast"',
        "unknown key BATCHSIZE",
        "the nearest is BATCH_SIZE",
    ]


@pytest.mark.parametrize(
    "keys",
    [
        {"STEPS": "a\nb"},
        {"RESUME": "a\nb"},
        {"REWARDS": [{"TYPE": "a\nb"}]},
        {"REWARDS": [REGEX | {"NAME": "a\nb"}] * 2},
        {"REWARDS": [{"TYPE": "python", "FUNCTION": "a\nb"}]},
        {"a\nb": 3},
        {"REWARDS": [REGEX | {"a\nb": 3}]},
    ],
    ids=json.dumps,
)
def test_no_message_has_a_line_end(mistake, keys):
    message = mistake(keys)  # which looks for it
    assert "a\\nb" in message or "a b" in message


def test_no_message_has_a_line_end_of_an_override(mistake):
    assert mistake({}, "a\nb") == r"'a\nb' is not KEY=VALUE"


def test_no_message_has_a_line_end_of_a_path(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "a\nb.json", schema=RunConfig)
    assert "\n" not in str(caught.value)


def test_the_schema_allows_what_loads():
    """For editors: every key, strings for no number, one entry for each reward."""
    schema = json.loads(commands.schema())
    assert schema["properties"].keys() == {
        field.alias or key for key, field in Config.model_fields.items()
    }
    assert schema["properties"]["STEPS"]["default"] == 100
    assert schema["properties"]["LR_RULE"]["type"] == ["string", "object", "array"]
    assert schema["additionalProperties"] is False
    assert len(schema["properties"]["REWARDS"]["items"]["oneOf"]) == len(REWARD_TYPES)


def test_every_key_is_listed_once_with_its_default_and_meaning():
    parts = [*commands.sections().values()]
    of_run, of_rewards = parts[: -1 - len(REWARD_TYPES)], parts[-1 - len(REWARD_TYPES) :]
    parts = [[row for part in of_run for row in part], *of_rewards]
    for model, part in zip((RunConfig, Reward, *REWARD_TYPES), parts, strict=True):
        shared = Reward.model_fields.keys() if model in REWARD_TYPES else {"SCHEMA"}
        own = {k: f for k, f in model.model_fields.items() if k not in shared}
        assert sorted(key for key, *_ in part) == sorted(key.upper() for key in own)
        rows = {key: (default, meaning) for key, default, meaning in part}
        for key, field in own.items():
            if key != "type":
                assert field.description and field.description in rows[key.upper()][1], key
            if key == "REWARDS":
                default = '[{"TYPE": "classifier"}]'
            else:
                default = "required" if field.is_required() else json.dumps(field.default)
            assert rows[key.upper()][0] == default, key


@pytest.mark.parametrize(
    ("key", "names"), [("BASELINE", [*BASELINES]), ("SAMPLER", ["auto", *BACKENDS])]
)
def test_a_key_has_the_names_of_what_it_chooses(key, names):
    assert sorted(get_args(RunConfig.model_fields[key].annotation)) == sorted(names)


def test_spaces_around_the_equals_sign(mistake):
    assert mistake({}, "STEPS = 4") == "'STEPS = 4': leave out the spaces around ="


def test_the_nearest_key_of_a_reward_is_not_its_type(mistake):
    told = mistake({"REWARDS": [{"TYPE": "length", "MIN": 2, "PATTERNS": "x"}]})
    assert told.startswith("config.json: unknown key REWARDS.0.PATTERNS; the nearest is ")
    assert not told.endswith("TYPE")


@pytest.mark.parametrize(
    ("typed", "shown"), [("", "[]"), ("END", '["END"]'), ("\\n", '["\\n"]'), ("\n", '["\\n"]')]
)
def test_a_text_where_a_list_belongs_is_shown_as_one(mistake, typed, shown):
    """A shell passes \\n as two characters."""
    assert mistake({"STOP": typed}).endswith(f"it must be a valid list, such as {shown}")


def test_keys_are_listed_with_their_choices():
    text = " ".join(meaning for rows in commands.sections().values() for *_, meaning in rows)
    assert "(linear, constant)" in text and "(aim, clearml, comet_ml" in text
    assert "(tokens, words)" in text


@pytest.mark.parametrize(
    ("keys", "name", "value"),
    [
        ({"SEED": True}, "SEED", True),
        ({"STEPS": False}, "STEPS", False),
        ({"LRATE": True}, "LRATE", True),
        ({"MAXSEQ": True}, "MAXSEQ", True),
        ({"REWARDS": [{"TYPE": "length", "MAX": True}]}, "REWARDS.0: MAX", True),
        (
            {"REWARDS": [{"TYPE": "length", "MAX": 3, "WEIGHT": [[0, 1], [9, False]]}]},
            "REWARDS.0: WEIGHT",
            [[0, 1], [9, False]],
        ),
    ],
)
def test_true_is_no_number(mistake, keys, name, value):
    assert mistake(keys).endswith(f": {name} is {json.dumps(value)}: it must be a number")
    assert mistake({}, "SEED=true") == "the command line: SEED is true: it must be a number"
    assert RunConfig(SEED="1", BF16=True, LR_RULE="trust_region").SEED == 1
