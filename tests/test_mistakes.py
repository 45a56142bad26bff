"""What train.py says of a user's mistakes: one line and status 2, before a model loads."""

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT


def told(status: int, stderr: str, settings: dict) -> str:
    """The mistake as the user reads it."""
    assert status == 2
    assert "Traceback" not in stderr
    assert not Path(settings["OUTPUT_DIR"]).exists()
    last = stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


@pytest.fixture
def mistake(main, settings, capsys, monkeypatch) -> Callable[..., str]:
    """What train.py, in this process, says of the settings with `keys` before it loads a model."""

    def mistake(keys: dict, *arguments: str) -> str:
        monkeypatch.setattr(
            "transformers.AutoModelForCausalLM.from_pretrained",
            lambda *_, **__: pytest.fail("a model was loaded"),
        )
        capsys.readouterr()
        status = main(settings | keys, *arguments)
        out, err = capsys.readouterr()
        assert out == ""
        return told(status, err, settings)

    return mistake


# Through the process


def test_a_missing_config_file(run, settings, tmp_path):
    path = tmp_path / "nowhere.json"
    result = run(path)
    assert told(result.returncode, result.stderr, settings) == (
        f"cannot read the config {path}: No such file or directory"
    )


def test_a_label_that_the_classifier_lacks(run, settings):
    """The last of the mistakes to be found: libraries have had their chance to write to stderr."""
    reward = {"TYPE": "classifier", "MODEL": "adaptiverl/assets/sentiment", "LABEL": "joy"}
    result = run(settings | {"REWARDS": [reward]})
    assert result.stdout == ""
    assert result.stderr == (
        "error: REWARDS.0: adaptiverl/assets/sentiment has no label 'joy', "
        "only negative, positive\n"
    )
    assert told(result.returncode, result.stderr, settings)


def test_a_model_of_the_hub_where_there_is_no_network(run, settings, tmp_path, monkeypatch):
    """Nothing is asked again and again, and what would work is said."""
    with socket.socket() as free:  # bound and not listening: connections are refused
        free.bind(("127.0.0.1", 0))
        hub = f"http://127.0.0.1:{free.getsockname()[1]}"
        for key, value in (("HF_ENDPOINT", hub), ("HF_HUB_OFFLINE", "0"), ("HF_HOME", tmp_path)):
            monkeypatch.setitem(ENVIRONMENT, key, str(value))
        result = run(settings | {"MODEL": "gpt2"})
    warning, error = result.stderr.splitlines()
    assert warning.startswith(f"WARNING: {hub} cannot be reached (")
    assert warning.endswith("): what was downloaded earlier is used")
    assert error.startswith("error: MODEL gpt2: ") and error.endswith(
        "Without the hub, MODEL=adaptiverl/assets/policy works: it comes with the program"
    )
    assert told(result.returncode, result.stderr, settings)


NOWHERE = '[{"TYPE": "python", "FUNCTION": "nowhere.rewards:mine"}]'


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("STEPS=ten", 'the command line: STEPS is "ten": it must be a '),
        ("TRAIN_FILE=nowhere.csv", f"TRAIN_FILE: there is no file nowhere.csv in {ROOT}\n"),
        (
            f"HELD_OUT={NOWHERE}",
            "HELD_OUT.0: FUNCTION nowhere.rewards:mine: there is no module 'nowhere' in the "
            f"working directory ({ROOT}), and none is installed\n",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_heavy_is_imported(override, message):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', 'config.json', {override!r}]\n"
        "try:\n"
        "    runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.stdout == "2 []\n"
    assert result.stderr.startswith(f"error: {message}")


# In this process


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which config? Type: python train.py config.json"),
        (["--dry-run"], "which config? Type: python train.py config.json"),
        (["STEPS=3"], "the config comes first: python train.py config.json STEPS=3"),
    ],
)
def test_a_command_without_a_config(words, message, capsys, monkeypatch):
    import train

    monkeypatch.setattr("sys.argv", ["train.py", *words])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_malformed_json(settings, tmp_path, capsys, monkeypatch):
    import train

    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings, indent=1).replace('",\n', '"\n', 1))
    monkeypatch.setattr("sys.argv", ["train.py", str(path)])
    with pytest.raises(SystemExit) as end:
        train.main()
    want = f"""{path}, line 3: unexpected '"' at column 2; is a comma missing before it?"""
    assert told(end.value.code, capsys.readouterr().err, settings) == want


def test_an_unknown_key(mistake, tmp_path):
    want = "unknown key BATCHSIZE; the nearest is BATCH_SIZE"
    assert mistake({"BATCHSIZE": 8}) == f"{tmp_path / 'keys.json'}: {want}"
    assert mistake({}, "BATCHSIZE=8") == f"the command line: {want}"


def test_an_argument_that_is_not_key_value(mistake):
    assert mistake({}, "8") == "'8' is not KEY=VALUE"
    assert mistake({}, "=8") == "'=8' has no key before ="


def test_no_reward(mistake, tmp_path):
    want = f"{tmp_path / 'keys.json'}: REWARDS is empty: name at least one reward"
    assert mistake({"REWARDS": []}) == want


@pytest.mark.parametrize("key", ["TRAIN_FILE", "EVAL_FILE"])
def test_a_missing_prompt_file(mistake, key):
    assert mistake({key: "nowhere.json"}) == f"{key}: there is no file nowhere.json in {ROOT}"


@pytest.mark.parametrize("key", ["TRAIN_FILE", "EVAL_FILE"])
def test_an_empty_prompt_file(mistake, tmp_path, key):
    path = tmp_path / "empty.json"
    path.touch()
    assert mistake({key: str(path)}) == f"{key}: {path} is empty"


def test_malformed_prompts(mistake, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('[{"prompt": "This"')
    assert mistake({"TRAIN_FILE": str(path)}).startswith(
        f"TRAIN_FILE: {path} cannot be read as json: "
    )


def test_a_prompt_file_without_the_prompt_column(mistake, settings):
    assert mistake({"PROMPT_COLUMN": "text"}) == (
        f"TRAIN_FILE: {settings['TRAIN_FILE']} has no column 'text', only prompt, reference"
    )


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_maxseq_beyond_the_models_positions(mistake, settings, arguments):
    want = f"MAXSEQ 65 is beyond the 64 positions of {settings['MODEL']}"
    assert mistake({"MAXSEQ": 65}, *arguments) == want


@pytest.mark.parametrize("tokens", [64, 65])
def test_max_new_tokens_that_leave_no_room(mistake, settings, tokens):
    assert mistake({"MAX_NEW_TOKENS": tokens}) == (
        f"MAX_NEW_TOKENS {tokens} leaves no room for a prompt in the 64 positions "
        f"of {settings['MODEL']}"
    )


@pytest.mark.parametrize(
    "model",
    [
        "nobody/nothing",
        "not a hub id",
        "rewards",
    ],
)
def test_a_model_that_is_neither_folder_nor_hub_id(mistake, model):
    message = mistake({"MODEL": model})
    assert message.startswith("MODEL") and model in message


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            {"TYPE": "regex", "PATTERNS": ["a", "(b"]},
            "pattern '(b' is no regular expression: missing ), unterminated subpattern "
            "at position 0",
        ),
        (
            {"TYPE": "regex", "PATTERNS": []},
            "PATTERNS needs at least one pattern, none of them empty",
        ),
        (
            {"TYPE": "regex", "PATTERNS": ["a", ""]},
            "PATTERNS needs at least one pattern, none of them empty",
        ),
        ({"TYPE": "length"}, "length takes a TARGET, or a MIN, a MAX or both"),
        ({"TYPE": "length", "MIN": 9, "MAX": 3}, "MIN 9 is above MAX 3"),
        (
            {"TYPE": "python", "FUNCTION": "no_such_module:score"},
            "FUNCTION no_such_module:score: there is no module 'no_such_module' in the working "
            f"directory ({ROOT}), and none is installed",
        ),
        (
            {"TYPE": "python", "FUNCTION": "json:score"},
            f"module json ({json.__file__}) has no function score",
        ),
        (
            {"TYPE": "python", "FUNCTION": "json:__name__"},
            f"module json ({json.__file__}) has no function __name__",
        ),
        ({"TYPE": "cosine", "COLUMN": "answer"}, "{TRAIN_FILE} has no column 'answer' (COLUMN)"),
        (
            {"TYPE": "cosine", "COLUMN": "prompt"},
            "COLUMN prompt: prompts are no references, and no reward gets that column. Name the "
            "column that holds the references",
        ),
        (
            {"TYPE": "cosine", "COLUMN": "year"},
            "column 'year' of {TRAIN_FILE} (COLUMN) has 1999 in row 1 (counted from 0): "
            "a reference is a text",
        ),
    ],
)
def test_a_reward_that_cannot_be_made(mistake, settings, tmp_path, reward, message):
    """Told with the place of the reward among the others."""
    rows = [{"prompt": "a", "year": None}, {"prompt": "b", "year": 1999}]
    Path(settings["TRAIN_FILE"]).write_text(json.dumps(rows))
    rewards = [{"TYPE": "length", "NAME": "short", "MAX": 4}, reward]
    told = mistake({"REWARDS": rewards}).removeprefix(f"{tmp_path / 'keys.json'}: ")
    assert told == f"REWARDS.1: {message.format(**settings)}"


@pytest.mark.parametrize("folder", ["/nowhere/model", "./nowhere", "adaptiverl/assets/polcy"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(mistake, folder):
    assert mistake({"MODEL": folder}) == f"MODEL {folder}: there is no folder {folder}"
    rewards = [{"TYPE": "classifier", "MODEL": folder}]
    assert mistake({"REWARDS": rewards}) == f"REWARDS.0: there is no folder {folder}"


def test_a_python_reward_that_is_no_python(mistake, tmp_path, monkeypatch):
    (tmp_path / "torn.py").write_text("def torn(completions, **_)\n    return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = mistake({"REWARDS": [{"TYPE": "python", "FUNCTION": "torn:torn"}]})
    assert message == f"REWARDS.0: {tmp_path / 'torn.py'}, line 1: expected ':'"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("open_at = {}['x']", "KeyError: 'x'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_python_reward_whose_module_raises(mistake, tmp_path, monkeypatch, line, why):
    (tmp_path / "raises.py").write_text(f"def fail():\n    {line}\n\nfail()\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = mistake({"REWARDS": [{"TYPE": "python", "FUNCTION": "raises:score"}]})
    assert message == f"REWARDS.0: {tmp_path / 'raises.py'}, line 2: {why}"


def test_the_line_is_the_users_where_a_library_raises(mistake, tmp_path, monkeypatch):
    (tmp_path / "asks.py").write_text("import json\n\nWORDS = json.loads('{')\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = mistake({"REWARDS": [{"TYPE": "python", "FUNCTION": "asks:score"}]})
    assert message.startswith(f"REWARDS.0: {tmp_path / 'asks.py'}, line 3: JSONDecodeError: Expect")


def test_a_rule_that_the_run_is_too_short_for_is_named_once(mistake):
    assert mistake({"BETAS_RULE": "relative"}) == (
        "BETAS_RULE relative moves nothing in the first 44 steps: Adam's bias correction takes "
        "beta1 as constant while beta1^t is above 0.01, and the run has 3"
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder of Linux")
@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_an_output_dir_that_cannot_be_written(mistake, arguments):
    """Not by root either, who has all rights."""
    message = mistake({"OUTPUT_DIR": "/proc/run"}, *arguments)
    assert message.startswith("OUTPUT_DIR: /proc cannot be written to: ")


def test_a_python_reward_that_cannot_be_called(mistake, tmp_path, monkeypatch):
    (tmp_path / "narrow.py").write_text(
        "def narrow(prompts, completions):\n    return []\n"
        "def wanting(completions, answer, **_):\n    return []\n"
        "class Made:\n    def __call__(self, completions):\n        return []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, why in (
        ("narrow", "got an unexpected keyword argument '"),
        ("Made", "got an unexpected keyword argument '"),
    ):
        message = mistake({"REWARDS": [{"TYPE": "python", "FUNCTION": f"narrow:{name}"}]})
        assert message.startswith(f"REWARDS.0: it cannot be called as rewards are, by name: {why}")
        assert message.endswith("columns of the prompts) and **columns")
    message = mistake({"REWARDS": [{"TYPE": "python", "FUNCTION": "narrow:wanting"}]})
    assert message.startswith("REWARDS.0: it needs the column answer, which ")


def test_a_python_reward_by_a_relative_name(mistake):
    rewards = [{"TYPE": "python", "FUNCTION": ".my_module:score"}]
    assert ".my_module" in mistake({"REWARDS": rewards})


def test_held_out_prompts_without_the_column_of_a_reward(mistake, tmp_path):
    path = tmp_path / "held_out.json"
    path.write_text('[{"prompt": "This"}]')
    message = mistake({"EVAL_FILE": str(path), "REWARDS": [{"TYPE": "cosine"}]})
    assert message == f"REWARDS.0: {path} has no column 'reference' (COLUMN)"


@pytest.mark.parametrize("key", ["TRAIN_FILE", "EVAL_FILE"])
@pytest.mark.parametrize(
    "name",
    ["prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"],
)
def test_a_column_that_no_reward_would_see(mistake, tmp_path, key, name):
    path = tmp_path / "own.json"
    path.write_text(json.dumps([{"prompt": "This", "reference": "film", name: "x"}]))
    assert mistake({key: str(path)}) == (
        f"{path} has a column {name}, which no reward would see: rewards are called with that "
        "name. Give the column another one"
    )


def test_an_output_dir_that_is_a_file(mistake, settings, tmp_path):
    path = tmp_path / "taken"
    path.touch()
    message = mistake({"OUTPUT_DIR": str(path)})
    assert message.startswith(f"OUTPUT_DIR: {path} ")


@pytest.mark.parametrize("below", ["", "run"])
def test_an_output_dir_that_is_a_link_to_nothing(mistake, tmp_path, below):
    (link := tmp_path / "link").symlink_to("gone")
    assert mistake({"OUTPUT_DIR": str(link / below)}) == (
        f"OUTPUT_DIR: {link} is a link to gone, which does not exist: make that folder, or name "
        "another one"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu(mistake):
    want = "FP16 needs a GPU, and there is none: use BF16 or neither"
    assert mistake({"FP16": True}) == want


# While it runs


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_of_what_a_reward_raises_only_its_own_frames_are_shown(
    settings, main, tmp_path, monkeypatch, caplog, kind
):
    (tmp_path / "mine.py").write_text(
        f"{kind} mine(completions, **_):\n    return lengths(completions)\n"
        "def lengths(texts):\n    return texts.length\n"
        f"{kind} short(completions, **_):\n    return [1.0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    keys = settings | {"REWARDS": [{"TYPE": "python", "FUNCTION": "mine:mine"}]}
    assert main(keys, "--dry-run") == 3
    (record,) = caplog.records
    shown = logging.Formatter().format(record).splitlines()
    files = [line.split(",")[0] for line in shown if line.startswith("  File ")]
    assert files == [f'  File "{tmp_path / "mine.py"}"'] * 2
    caplog.clear()
    assert main(keys | {"REWARDS": [{"TYPE": "python", "FUNCTION": "mine:short"}]}, "--dry-run")
    assert caplog.records == [], "the error that ends the run says it all"
