"""What the config names outside of the model: folders, prompts, rewards. Mistakes are found here.

Each function raises ConfigError, before the model loads.
"""

import json
import logging
import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from huggingface_hub import is_offline_mode
from safetensors import SafetensorError
from transformers import AutoConfig

import adaptiverl
from adaptiverl.config.schema import ConfigError
from adaptiverl.files import checkpoint
from adaptiverl.rl.chat import Prompt, given_prompt
from adaptiverl.rl.data import fingerprint, load_prompts, split_prompts
from adaptiverl.rl.formats import file_format
from adaptiverl.rl.loading import adapter_config, refuse_other_kinds
from adaptiverl.training.hub import go_offline_without_it
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.metrics import is_own
from adaptiverl.training.runtime import Runtime
from adaptiverl.training.scoring import RESERVED, own_settings
from rewards import CompositeReward

LORA = {"LORA_R": "r", "LORA_ALPHA": "lora_alpha", "LORA_TARGETS": "target_modules"}  # peft's names
ASSETS = "adaptiverl/assets/"  # what begins so is in the installed package, if not a folder here


@contextmanager
def as_config_error(key: str) -> Iterator[None]:
    """Turns what a library says of the value of `key` into the user's mistake."""
    try:
        yield
    except (ValueError, OSError, ImportError, sqlite3.Error) as error:
        raise ConfigError(f"{key}: {error}") from error
    except SafetensorError as error:
        raise ConfigError(
            f"{key}: a .safetensors file is damaged or cut short ({error}): get it anew"
        ) from error


def located(model: str) -> str:
    """`model`, or its place in the package; raises ValueError for a folder that does not exist.

    The hub would be asked for it.
    """
    path = place = Path(model)
    if model.startswith(ASSETS) and not path.exists():
        place = Path(adaptiverl.__file__).parents[1] / model
    local = (
        path.is_absolute()
        or model.startswith(("/", "."))
        or (len(path.parts) > 1 and path.parent.exists())
    )
    if (place / "metrics.jsonl").exists():
        raise ValueError(f"{model} is the folder of a run: name a model in it, {model}/final")
    if (local or place != path) and not place.exists():
        raise ValueError(f"there is no folder {model}")
    return model if place == path else str(place)


@contextmanager
def _from_hub(name: str, hint: str = "Give a folder, or connect to the hub once") -> Iterator[None]:
    """Says it plainly where the model `name` is neither a folder, nor cached, nor to be had."""
    try:
        yield
    except OSError as error:
        if not is_offline_mode() or Path(name).exists():
            raise
        raise OSError(
            f"there is no folder {name}, the cache of the Hugging Face hub does not have it, and "
            f"the hub cannot be reached. {hint}"
        ) from error


def use_hub(c: RunConfig) -> None:
    """Looks whether the hub can be reached if anything in the config is to come from there."""
    names = [c.MODEL, c.TRAIN_FILE, c.EVAL_FILE]
    if Path(c.MODEL, "adapter_config.json").exists():
        names.append((adapter_config(c.MODEL) or {})["base_model_name_or_path"])
    for reward in (*c.REWARDS, *c.HELD_OUT):
        names += [reward.model_dump(by_alias=False)["model"]] if reward.loads_model else []
    for name in filter(None, names):
        here = name.startswith(ASSETS) or Path(name).exists() or file_format(name)
        if not here:
            go_offline_without_it()
            break


def check_output_folder(c: RunConfig) -> None:
    """OUTPUT_DIR may not exist yet, but must be possible."""
    path = Path(c.OUTPUT_DIR)
    with as_config_error("OUTPUT_DIR"):  # a name that is too long
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
    if not nearest.exists():
        raise ConfigError(
            f"OUTPUT_DIR: {nearest} is a link to {nearest.readlink()}, which does not exist: make "
            "that folder, or name another one"
        )
    if not nearest.is_dir():
        raise ConfigError(f"OUTPUT_DIR: {nearest} is not a folder")
    try:  # what rights alone do not tell: a file system may be read-only, or full
        with TemporaryDirectory(prefix=".new-", dir=nearest):
            pass
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"OUTPUT_DIR: {nearest} cannot be written to: {why}") from error
    if (path / "config.json").exists() and not checkpoint.holds_run(path):
        raise ConfigError(f"OUTPUT_DIR: {path} has a config.json of its own: name another folder")


def prompt_files(c: RunConfig) -> tuple[Dataset, Dataset | None]:
    """The prompts to train on and those to evaluate on."""
    with as_config_error("TRAIN_FILE"):
        train = load_prompts(c.TRAIN_FILE, c.PROMPT_COLUMN)
    if c.EVAL_SPLIT:
        with as_config_error("EVAL_SPLIT"):
            return split_prompts(train, c.PROMPT_COLUMN, c.EVAL_SPLIT, c.SEED)
    if not c.EVAL_FILE:
        return train, None
    with as_config_error("EVAL_FILE"):
        return train, load_prompts(c.EVAL_FILE, c.PROMPT_COLUMN, split="test")


def check_names(c: RunConfig, files: Mapping[str, Dataset], runtime: Runtime) -> None:
    """Refuses a column that no reward could see, because rewards are called with its name.

    One named `completion` or `prompt` is only warned of: data sets for other trainers have them.
    """
    for source, rows in files.items():
        hidden = sorted(RESERVED.intersection(rows.column_names) - {c.PROMPT_COLUMN})
        allowed = [name for name in hidden if name in ("completion", "prompt")]
        if refused := [name for name in hidden if name not in allowed]:
            raise ConfigError(
                f"{source} has a column {refused[0]}, which no reward would see: rewards are "
                "called with that name. Give the column another one"
            )
        if runtime.is_main:
            for name in allowed:
                logging.warning(
                    "%s has a column %s: rewards do not see it, that name is taken", source, name
                )


def as_given(prompt: Prompt, system: str | None) -> str:
    """One text for all prompts of which the model is given the same, after `system`."""
    return json.dumps(given_prompt(prompt, system), sort_keys=True)


def fingerprints(c: RunConfig, train: Dataset, evaluated: Dataset | None) -> dict[str, str]:
    """What a checkpoint keeps of the rows, by the key that names them."""
    result = {"TRAIN_FILE": fingerprint(train)}
    if evaluated is not None:
        result["EVAL_SPLIT" if c.EVAL_SPLIT else "EVAL_FILE"] = fingerprint(evaluated)
    return result


def last_step_of(c: RunConfig, prompts: int) -> int:
    """Where STEPS or EPOCHS ends the run, whichever comes first."""
    if c.EPOCHS is None:
        return c.STEPS
    return min(c.STEPS, math.ceil(c.EPOCHS * prompts * c.NUM_GENERATIONS / c.BATCH_SIZE))


def rows_of_process(c: RunConfig, runtime: Runtime) -> slice:
    """Which of a step's completions are this process's: all generations of some prompts."""
    prompts = c.BATCH_SIZE // c.NUM_GENERATIONS
    share, rest = divmod(prompts, runtime.processes)
    if rest:
        raise ConfigError(
            f"BATCH_SIZE / NUM_GENERATIONS = {prompts} prompts per step cannot be shared by "
            f"{runtime.processes} processes"
        )
    size = share * c.NUM_GENERATIONS
    return slice(runtime.rank * size, (runtime.rank + 1) * size)


def max_prompt_tokens(c: RunConfig) -> int | None:
    """How many tokens of a prompt fit before MAX_NEW_TOKENS; None if the model sets no limit."""
    with as_config_error(f"MODEL {c.MODEL}"):
        model = located(c.MODEL)
        adapter = adapter_config(model)
        base = _base(c, adapter) if adapter else model
        shipped = RunConfig.model_fields["MODEL"].default
        hint = f"Without the hub, MODEL={shipped} works: it comes with the program"
        with _from_hub(base, hint):
            limits = AutoConfig.from_pretrained(base)
        refuse_other_kinds(limits)
    positions = getattr(limits, "max_position_embeddings", None)
    if positions and c.MAXSEQ and positions < c.MAXSEQ:
        raise ConfigError(f"MAXSEQ {c.MAXSEQ} is beyond the {positions} positions of {c.MODEL}")
    longest = c.MAXSEQ or positions
    if longest and longest <= c.MAX_NEW_TOKENS:
        raise ConfigError(
            f"MAX_NEW_TOKENS {c.MAX_NEW_TOKENS} leaves no room for a prompt in the {longest} "
            f"positions of {c.MODEL}"
        )
    return longest and longest - c.MAX_NEW_TOKENS


def _base(c: RunConfig, adapter: dict[str, Any]) -> str:
    """The model that the adapter in MODEL was trained on; the adapter's shape must not change."""
    for key in [key for key in LORA if key in c.changed()]:
        given, has = getattr(c, key), adapter[LORA[key]]
        if given != has and not (key == "LORA_TARGETS" and set(given) == set(has)):
            raise ConfigError(
                f"{key} is {given}, but the adapter in MODEL {c.MODEL} has {has} and keeps it: "
                f"leave {key} out"
            )
    try:
        return located(adapter["base_model_name_or_path"])
    except ValueError as error:
        raise ValueError(f"{error}, on which its adapter was trained") from error


def adapters_own(c: RunConfig) -> dict[str, Any]:
    """The keys of LoRA that the adapter in MODEL keeps; none where no adapter goes on."""
    adapter = None if c.FULLTUNE else adapter_config(located(c.MODEL))
    if not adapter or "r" not in adapter:  # of another kind, such as IA³
        return {}
    own = {key: adapter[name] for key, name in LORA.items()}
    targets = own["LORA_TARGETS"]  # a pattern, which is a text, the key cannot hold
    return own | {"LORA_TARGETS": None if isinstance(targets, str) else sorted(targets)}


def make_rewards(
    c: RunConfig, key: str, files: Mapping[str, Dataset], runtime: Runtime
) -> CompositeReward:
    """All of REWARDS or HELD_OUT, started; `files` are the prompts by the name of their source."""
    started = []
    for i, declared in enumerate(getattr(c, key)):
        with as_config_error(f"{key}.{i}"), own_settings():
            place = {"model": located(declared.model)} if declared.loads_model else {}
            reward = declared.model_copy(update=place)  # a config may be used for several runs
            for source, rows in files.items():
                if "self" in rows.column_names:
                    raise ValueError(f"{source} has a column self: no reward can take that name")
                columns = {n: rows[n] for n in rows.column_names if n not in RESERVED}
                reward.check_columns(columns, source)
            if reward.one_process and runtime.processes > 1:
                raise ValueError("people are asked by one training process, not by several")
            with _from_hub(place.get("model", "")):
                reward.start(runtime.device)
        started.append(reward)
    return CompositeReward(started, reserved=is_own)
