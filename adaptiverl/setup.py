"""From the config's keys to the parts of a run; a user's mistakes are found here.

Each function raises UserError. What can be wrong without a model is looked at before one loads.
"""

import math
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from huggingface_hub import is_offline_mode
from torch.optim import Optimizer
from transformers import AutoConfig, PreTrainedTokenizerBase

from adaptiverl.optim.controller import Controller
from adaptiverl.optim.online import OnlineAdamW, OnlineRMSProp, OnlineSGD
from adaptiverl.rl.data import FORMATS, load_prompts
from adaptiverl.rl.policy import (
    Policy,
    Untargeted,
    adapter_config,
    fit_tokenizer,
    load_policy,
    load_tokenizer,
)
from adaptiverl.rl.vllm import Server
from adaptiverl.run import checkpoint
from adaptiverl.run.config import REWARD_KEYS, Config, UserError
from adaptiverl.run.hub import go_offline_without_it
from adaptiverl.run.reward_config import CosineReward
from adaptiverl.run.tracking import is_own
from rewards import CompositeReward, check_signature, make_reward
from rewards.balance import Scale

# Names that rewards are called with; a column of that name is not passed on.
RESERVED = {
    "prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state",
    "log_metric", "log_extra",
}  # fmt: skip


WITH_MODEL = ("classifier", "cosine", "local_judge")  # rewards that load one
SHIPPED = Config.model_fields["MODEL"].default


@contextmanager
def blame(key: str) -> Iterator[None]:
    """Turns what a library says of the value of `key` into the user's mistake."""
    try:
        yield
    except (ValueError, OSError, ImportError, sqlite3.Error) as error:
        raise UserError(f"{key}: {error}") from error


def found(model: str) -> str:
    """`model`; raises ValueError for a folder that is not there: the hub would be asked for it."""
    path = Path(model)
    local = model.startswith(("/", ".")) or (len(path.parts) > 1 and path.parent.exists())
    if local and not path.exists():
        raise ValueError(f"there is no folder {model}")
    return model


def hub(c: Config) -> None:
    """Looks whether the hub can be reached if anything in the config is to come from there."""
    names = [c.MODEL, c.TRAIN_FILE, c.EVAL_FILE]
    if Path(c.MODEL, "adapter_config.json").exists():
        names.append((adapter_config(c.MODEL) or {})["base_model_name_or_path"])
    for key in REWARD_KEYS:
        names += [spec.MODEL for spec in getattr(c, key) if spec.TYPE in WITH_MODEL]
    if any(name and not Path(name).exists() and Path(name).suffix not in FORMATS for name in names):
        go_offline_without_it()


def accelerator(c: Config) -> Accelerator:
    """The device, the processes and the precision."""
    if c.FP16 and not torch.cuda.is_available():
        raise UserError("FP16 needs a GPU, and there is none: use BF16 or neither")
    result = Accelerator(
        cpu=not torch.cuda.is_available(),  # said, or CPU processes do not find each other
        mixed_precision="bf16" if c.BF16 else "fp16" if c.FP16 else "no",
        log_with=c.TRACKERS or None,
        project_dir=Path(c.OUTPUT_DIR, "tensorboard"),
    )
    if result.distributed_type == DistributedType.FSDP and not result.is_fsdp2:
        raise UserError(
            "FSDP works in its second version alone: set fsdp_version: 2 in accelerate's config, "
            "as configs/accelerate/8-gpus-fsdp.yaml does"
        )
    return result


def own_rows(c: Config, processes: Accelerator) -> slice:
    """Which of a step's completions are this process's: all generations of some prompts."""
    prompts = c.BATCH_SIZE // c.NUM_GENERATIONS
    share, rest = divmod(prompts, processes.num_processes)
    if rest:
        raise UserError(
            f"BATCH_SIZE / NUM_GENERATIONS = {prompts} prompts a step cannot be shared by "
            f"{processes.num_processes} processes"
        )
    size = share * c.NUM_GENERATIONS
    return slice(processes.process_index * size, (processes.process_index + 1) * size)


def prompts(c: Config) -> tuple[Dataset, Dataset | None]:
    """The prompts to train on and those to evaluate on."""
    with blame("TRAIN_FILE"):
        train = load_prompts(c.TRAIN_FILE, c.PROMPT_COLUMN)
    if not c.EVAL_FILE:
        return train, None
    with blame("EVAL_FILE"):
        return train, load_prompts(c.EVAL_FILE, c.PROMPT_COLUMN, split="test")


def last_step(c: Config, prompts: int) -> int:
    """Where STEPS or EPOCHS ends the run, whichever comes first."""
    if c.EPOCHS is None:
        return c.STEPS
    return min(c.STEPS, math.ceil(c.EPOCHS * prompts * c.NUM_GENERATIONS / c.BATCH_SIZE))


def max_prompt(c: Config) -> int | None:
    """How many tokens of a prompt fit before MAX_NEW_TOKENS; None if the model sets no limit."""
    with blame(f"MODEL {c.MODEL}"):
        adapter = adapter_config(found(c.MODEL))
        try:
            limits = AutoConfig.from_pretrained(_base(c, adapter) if adapter else c.MODEL)
        except OSError as error:
            if not is_offline_mode() or Path(c.MODEL).exists():
                raise
            hint = f"Without the hub, MODEL={SHIPPED} works: it comes with the program"
            raise OSError(f"{error} {hint}") from error
    positions = getattr(limits, "max_position_embeddings", None)
    if positions and c.MAXSEQ and positions < c.MAXSEQ:
        raise UserError(f"MAXSEQ {c.MAXSEQ} is beyond the {positions} positions of {c.MODEL}")
    longest = c.MAXSEQ or positions
    if longest and longest <= c.MAX_NEW_TOKENS:
        raise UserError(
            f"MAX_NEW_TOKENS {c.MAX_NEW_TOKENS} leaves no room for a prompt in the {longest} "
            f"positions of {c.MODEL}"
        )
    return longest and longest - c.MAX_NEW_TOKENS


def _base(c: Config, adapter: dict[str, Any]) -> str:
    """The model that `adapter`, which MODEL is, was trained on; its shape is not to be changed."""
    names = {"LORA_R": "r", "LORA_ALPHA": "lora_alpha", "LORA_TARGETS": "target_modules"}
    for key in [key for key in names if key in c.changed()]:
        given, has = getattr(c, key), adapter[names[key]]
        if given != has and not (key == "LORA_TARGETS" and set(given) == set(has)):
            raise UserError(
                f"{key} is {given}, but the adapter in MODEL {c.MODEL} has {has} and goes on as it "
                f"is: leave {key} out"
            )
    base = adapter["base_model_name_or_path"]
    try:
        return found(base)
    except ValueError as error:
        raise ValueError(f"{error}, on which its adapter was trained") from error


def output(c: Config) -> Path:
    """OUTPUT_DIR, which may not exist yet but must be possible."""
    path = Path(c.OUTPUT_DIR)
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"OUTPUT_DIR: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"OUTPUT_DIR: {nearest} cannot be written to")
    if (path / "config.json").exists() and not checkpoint.holds_run(path):
        raise UserError(f"OUTPUT_DIR: {path} has a config.json of its own: name another folder")
    return path


def rewards(
    c: Config, key: str, files: dict[str, Dataset], processes: Accelerator
) -> CompositeReward:
    """All of REWARDS or HELD_OUT; `files` are the prompts by the name of their source."""
    parts, specs = {}, getattr(c, key)
    for i, spec in enumerate(specs):
        with blame(f"{key}.{i}"):
            arguments = spec.arguments()
            if isinstance(spec, CosineReward):
                for source, rows in files.items():
                    if spec.COLUMN not in set(rows.column_names) - RESERVED:
                        raise ValueError(f"{source} has no column {spec.COLUMN!r} (COLUMN)")
            if spec.TYPE == "human" and processes.num_processes > 1:
                raise ValueError("people are asked by one training process, not by several")
            if spec.TYPE in WITH_MODEL:
                found(arguments["model"])
                arguments["device"] = processes.device
            parts[spec.name] = reward = make_reward(spec.TYPE, **arguments)
            if spec.TYPE == "python":
                for rows in files.values():
                    check_signature(reward, set(rows.column_names) - RESERVED)
    weights = {spec.name: spec.WEIGHT for spec in specs}
    scales = {spec.name: Scale(spec.NORMALIZE, spec.CLIP) for spec in specs}
    return CompositeReward(parts, weights, scales, reserved=is_own)


def server(c: Config, policy: Policy, processes: Accelerator) -> Server | None:
    """The vLLM server that samples, if one is named."""
    if not c.VLLM_SERVER:
        return None
    if processes.num_processes > 1:
        raise UserError("VLLM_SERVER works with one training process")
    with blame("VLLM_SERVER"):
        return Server(c.VLLM_SERVER, policy, processes.device)


AUTO = {"sgd": 0.1, "rmsprop": 1e-4, "adamw": 1e-4, "adamw_8bit": 1e-4}  # LRATE "auto"
OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW,
    "online_sgd": OnlineSGD, "online_rmsprop": OnlineRMSProp, "online_adamw": OnlineAdamW,
}  # fmt: skip


def optimizer(
    c: Config, parameters: list[tuple[str, torch.nn.Parameter]], sharded: bool = False
) -> Optimizer:
    """OPTIM, of named parameters; MOMENTUM is AdamW's beta1."""
    kind, online = c.OPTIM.removeprefix("online_"), c.OPTIM.startswith("online_")
    if sharded and online:
        raise UserError(f"OPTIM {c.OPTIM} looks at whole tensors, and FSDP has them in shards")
    named: list[Any] = parameters if online else [p for _, p in parameters]
    auto = max(c.MIN_LR or 0.0, min(AUTO[kind], c.MAX_LR or math.inf))
    common: dict[str, Any] = {"lr": auto if c.LRATE == "auto" else c.LRATE}
    common["weight_decay"] = c.WEIGHT_DECAY
    if online:  # its signals are those of all processes, in each
        common["mean_over_processes"] = False
    if kind in ("sgd", "rmsprop"):
        return OPTIMIZERS[c.OPTIM](named, momentum=c.MOMENTUM, **common)
    common["betas"] = (c.MOMENTUM, 0.999)
    if kind == "adamw":  # fused: one pass over the weights, a quarter of the time, no temporaries
        return OPTIMIZERS[c.OPTIM](named, fused=True, **common)
    from bitsandbytes.optim import AdamW8bit  # seconds to import

    return AdamW8bit(named, **common)


# Arguments of Controller that are keys
RULES = (
    "LR_RULE", "REWARD_RULE", "MOMENTUM_RULE", "BETAS_RULE", "ALPHA_RULE", "WD_RULE", "LOSS_BETA",
    "REWARD_BETA", "MIN_LR", "MAX_LR", "MIN_MOMENTUM", "MAX_MOMENTUM", "KL_STEP_TARGET",
)  # fmt: skip


def controller(c: Config, optimizer: Optimizer, last_step: int) -> Controller:
    """The rules that move the optimizer's hyperparameters; every process gives them the same."""
    given = {key.lower(): getattr(c, key) for key in RULES}
    steps = last_step if c.KL_STEP_FALLS else None
    with blame("BETAS_RULE"):
        return Controller(optimizer, steps=steps, mean_over_processes=False, **given)


def check_rules(c: Config, last_step: int) -> None:
    """Tries the rules on a weight of their own, before the model is loaded."""
    kind: dict[str, Any] = {"OPTIM": "adamw"} if c.OPTIM == "adamw_8bit" else {}
    kind |= {"KL_STEP_FALLS": True}  # so that the controller is told how long the run is
    own = optimizer(c.model_copy(update=kind), [("weight", torch.nn.Parameter(torch.zeros(1)))])
    controller(c.model_copy(update=kind), own, last_step)


def policy(
    c: Config, checkpoint: Path | None, device: torch.device
) -> tuple[PreTrainedTokenizerBase, Policy]:
    """The model, with the weights of `checkpoint` if there is one."""
    with blame(f"MODEL {c.MODEL}"):
        tokenizer = load_tokenizer(c.MODEL)
        try:
            result = load_policy(
                c.MODEL,
                checkpoint=checkpoint,
                full_tune=c.FULLTUNE,
                quantize="4bit" if c.LOAD_4BIT else "8bit" if c.LOAD_8BIT else None,
                compute_dtype=torch.bfloat16 if c.BF16 else torch.float32,
                reference=c.KL_COEF > 0,
                device=device,
                lora={"r": c.LORA_R, "lora_alpha": c.LORA_ALPHA, "target_modules": c.LORA_TARGETS},
            )
        except Untargeted as error:
            raise UserError(f"LORA_TARGETS: {error}") from error
        fit_tokenizer(tokenizer, result.base)
        return tokenizer, result
