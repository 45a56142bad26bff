"""From the config to the parts of a run: the model, its optimizer, and all that they need.

What the config names outside of the model is made by inputs.py. Each function raises ConfigError.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from datasets import Dataset
from torch import nn
from torch.optim import Optimizer
from transformers.utils import logging as transformers_logging

from adaptiverl.config.schema import ConfigError
from adaptiverl.optim.adaptive import AdaptiveOptimizer
from adaptiverl.optim.mini import AdamMini
from adaptiverl.optim.online import Online, OnlineAdamW, OnlineRMSProp, OnlineSGD
from adaptiverl.optim.online.dynamics import dynamics
from adaptiverl.rl.check import allowed_gap
from adaptiverl.rl.loading import LoraTargetsError, fit_tokenizer, load_policy, load_tokenizer
from adaptiverl.rl.sampling.sampler import Sampler
from adaptiverl.training import inputs, state
from adaptiverl.training.batches import Batches
from adaptiverl.training.best import Best
from adaptiverl.training.chats import check_chats, use_chat_template
from adaptiverl.training.checked import CheckedPolicy
from adaptiverl.training.doubts import doubts
from adaptiverl.training.guards import Guards
from adaptiverl.training.inputs import as_config_error
from adaptiverl.training.keys import RULE_KEYS, RunConfig
from adaptiverl.training.probe import Precision
from adaptiverl.training.reward_code import Sources, changed, sources, trains
from adaptiverl.training.runtime import Runtime
from adaptiverl.training.scoring import Scoring

# LRATE "auto"
AUTO_LR = {"adam_mini": 1e-3, "sgd": 0.1, "rmsprop": 1e-4, "adamw": 1e-4, "adamw_8bit": 1e-4}
OPTIMIZERS: dict[str, Any] = {
    "adam_mini": AdamMini,
    "sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW,
    "online_sgd": OnlineSGD, "online_rmsprop": OnlineRMSProp, "online_adamw": OnlineAdamW,
}  # fmt: skip
# Keys that are arguments of AdaptiveOptimizer, in lower case
ARGUMENTS = (
    *RULE_KEYS, "LOSS_BETA", "REWARD_BETA", "MIN_LR", "MAX_LR", "MIN_MOMENTUM", "MAX_MOMENTUM",
    "TRUST_REGION_KL", "TRUST_REGION_SCHEDULE",
)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Everything that one training process holds."""

    runtime: Runtime
    batches: Batches
    eval_prompts: Dataset | None
    last_step: int
    policy: nn.Module  # prepared for several processes; called for gradients
    sampler: Sampler  # of the policy itself
    checked: CheckedPolicy
    optimizer: AdaptiveOptimizer
    dynamics: Callable[[], list[dict[str, Any]]] | None  # of an online optimizer
    scoring: Scoring
    guards: Guards
    best: Best
    precision: Precision
    progress: state.Progress
    stateful: dict[str, state.Stateful]  # what a checkpoint holds
    prompts: dict[str, str]  # fingerprints of the rows, by the key that names them
    reward_code: Sources  # of `python` rewards
    resumed: Path | None  # the checkpoint that the run continues
    other_code: Sources  # those that have changed since the steps up to it

    @property
    def done(self) -> bool:
        """Whether no step is left, or the run has a reason to end early."""
        return self.progress.step >= self.last_step or self.best.why_stop is not None


def build(
    c: RunConfig,
    accelerator: Accelerator | None = None,
    resume: Callable[[RunConfig, Runtime], Path | None] = state.newest,
) -> Parts:
    """Makes all parts, from the checkpoint that `resume` finds, if any; checks them.

    `accelerator` is that of the config if it is None.
    """
    inputs.check_output_folder(c)
    runtime = Runtime(accelerator or make_accelerator(c))
    set_seed(c.SEED)
    transformers_logging.disable_progress_bar()
    rows = inputs.rows_of_process(c, runtime)
    inputs.use_hub(c)
    prompts, eval_prompts = inputs.prompt_files(c)
    files = {c.TRAIN_FILE: prompts}
    if c.EVAL_FILE and eval_prompts:  # those of an EVAL_SPLIT have the same columns
        files[c.EVAL_FILE] = eval_prompts
    inputs.check_names(c, files, runtime)
    last_step = inputs.last_step_of(c, len(prompts))
    for said in doubts(c, prompts, eval_prompts, last_step) if runtime.is_main else ():
        logging.warning(said)
    max_prompt = inputs.max_prompt_tokens(c)
    rewards, held_out = (
        inputs.make_rewards(c, key, files, runtime) for key in ("REWARDS", "HELD_OUT")
    )
    try_rules(c, last_step)
    marks = runtime.from_main(runtime.is_main and inputs.fingerprints(c, prompts, eval_prompts))
    code = runtime.from_main(sources(rewards, held_out))
    resumed = resume(c, runtime)
    if resumed:
        try:
            state.refuse_changes(resumed, c, marks, inputs.adapters_own(c))
        except ConfigError:
            if not state.is_untouched(resumed):
                raise
            resumed = None

    sampler = make_sampler(c, runtime, resumed, max_prompt, files)
    named = [(name, p) for name, p in sampler.policy.named_parameters() if p.requires_grad]
    base = base_optimizer(c, named, runtime.sharded)
    progress = state.Progress(kl_coef=c.KL_COEF)
    # Not the list's own `append`: a checkpoint brings another list
    optimizer = adaptive(c, base, last_step, record=lambda row: progress.changes.append(row))
    policy = runtime.prepare(sampler.policy, optimizer)
    rounded = c.BF16 or c.FP16 or c.LOAD_4BIT or c.LOAD_8BIT or bool(c.VLLM_SERVER)
    precision = Precision(not rounded, rounded and (runtime.sharded or c.LOAD_8BIT))
    guards = Guards(c, last_step, allowed_gap(not rounded), runtime.is_main)
    best = Best(c)
    scoring = Scoring(c, runtime, rewards, held_out, last_step)
    checked = CheckedPolicy(c, runtime, sampler, progress)
    stateful: dict[str, state.Stateful] = {
        "progress": progress,
        "guards": guards,
        "best": best,
        "rewards": rewards,
        "held_out": held_out,
        "optimizer": runtime.shards.ShardedOptimizer(policy, base) if runtime.sharded else base,
        **optimizer.parts,
        "random": state.RandomState(runtime),
    }
    if scaler := runtime.accelerator.scaler:
        stateful["scaler"] = scaler
    if resumed:
        state.restore(resumed, stateful, mapped=runtime.device.type != "cpu")
        # Loading has given `base` other groups, in which a rollback may have written another rate.
        optimizer.param_groups, optimizer.state = base.param_groups, base.state
    other_code = changed(resumed, code) if resumed and progress.step else {}
    narrow(optimizer, progress.rollbacks)
    checked.check_at_start(files, precision.sampler_matches_policy)
    parts = Parts(
        runtime=runtime,
        batches=Batches(c, prompts, rows, progress),
        eval_prompts=eval_prompts,
        last_step=last_step,
        policy=policy,
        sampler=sampler,
        checked=checked,
        optimizer=optimizer,
        dynamics=partial(dynamics, base) if isinstance(base, Online) else None,
        scoring=scoring,
        guards=guards,
        best=best,
        precision=precision,
        progress=progress,
        stateful=stateful,
        prompts=marks,
        reward_code=code,
        resumed=resumed,
        other_code=other_code,
    )
    if other_code and not parts.done:
        guards.forget_rewards()
        if trains(c, other_code):
            best.forget()
    return parts


def make_accelerator(c: RunConfig, kind: Callable[..., Accelerator] = Accelerator) -> Accelerator:
    """The device, the processes and the precision; `kind` is accelerate's class or a subclass."""
    if c.FP16 and not torch.cuda.is_available():
        raise ConfigError("FP16 needs a GPU, and there is none: use BF16 or neither")
    result = kind(
        # Said, or CPU processes do not find each other. Apple's GPUs have no float64, by which
        # tokens are drawn, so a Mac uses its CPU.
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if c.BF16 else "fp16" if c.FP16 else "no",
        log_with=c.TRACKERS or None,
        project_dir=c.output_dir / "tensorboard",
    )
    if result.distributed_type == DistributedType.FSDP and not result.is_fsdp2:
        raise ConfigError(
            "FSDP works in its second version alone: set fsdp_version: 2 in accelerate's config, "
            "as configs/accelerate/8-gpus-fsdp.yaml does"
        )
    return result


def make_sampler(
    c: RunConfig,
    runtime: Runtime,
    checkpoint: Path | None,
    max_prompt: int | None,
    files: Mapping[str, Dataset] | None = None,
) -> Sampler:
    """The policy, with the weights of `checkpoint` if there is one, and what samples from it.

    `files` are prompts by the name of their source, which are first checked against the tokenizer.
    """
    if c.VLLM_SERVER and runtime.processes > 1:
        raise ConfigError("VLLM_SERVER works with one training process")
    with as_config_error(f"MODEL {c.MODEL}"):
        model = inputs.located(c.MODEL)
        tokenizer = load_tokenizer(model)
        use_chat_template(c, tokenizer)
        check_chats(c, tokenizer, files or {}, max_prompt)
        try:
            policy = load_policy(
                model,
                checkpoint=checkpoint,
                full_tune=c.FULLTUNE,
                quantize="4bit" if c.LOAD_4BIT else "8bit" if c.LOAD_8BIT else None,
                compute_dtype=torch.bfloat16 if c.BF16 else torch.float32,
                reference=c.KL_COEF > 0,
                device=runtime.device,
                lora={"r": c.LORA_R, "lora_alpha": c.LORA_ALPHA, "target_modules": c.LORA_TARGETS},
                temperature=c.TEMPERATURE,
                sharded=runtime.sharded,
            )
        except LoraTargetsError as error:
            raise ConfigError(f"LORA_TARGETS: {error}") from error
        fit_tokenizer(tokenizer, policy.base)
    with as_config_error("VLLM_SERVER" if c.VLLM_SERVER else "SAMPLER, STOP"):
        return Sampler(
            policy,
            tokenizer,
            max_prompt=max_prompt,
            top_k=c.TOP_K,
            top_p=c.TOP_P,
            backend=c.VLLM_SERVER or c.SAMPLER,
            stop=c.STOP,
        )


def base_optimizer(
    c: RunConfig, parameters: list[tuple[str, nn.Parameter]], sharded: bool = False
) -> Optimizer:
    """OPTIM, of named parameters; MOMENTUM is beta1 of AdamW and AdamMini."""
    kind, online = c.OPTIM.removeprefix("online_"), c.OPTIM.startswith("online_")
    if sharded and online:
        raise ConfigError(f"OPTIM {c.OPTIM} reads whole tensors, and FSDP has them in shards")
    named: list[Any] = parameters if online else [p for _, p in parameters]
    auto = max(c.MIN_LR or 0.0, min(AUTO_LR[kind], c.MAX_LR or math.inf))
    arguments: dict[str, Any] = {
        "lr": auto if c.LRATE == "auto" else c.LRATE,
        "weight_decay": c.WEIGHT_DECAY,
    }
    if kind in ("sgd", "rmsprop"):
        arguments["momentum"] = c.MOMENTUM
    else:
        arguments["betas"] = (c.MOMENTUM, 0.999)
    if kind == "adamw":  # one pass over the weights, a quarter of the time, no temporaries
        arguments["fused"] = True
    if kind == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # seconds to import

        return AdamW8bit(named, **arguments)
    return OPTIMIZERS[c.OPTIM](named, **arguments)


def adaptive(
    c: RunConfig, base: Optimizer, last_step: int, record: Callable[[dict[str, Any]], None] | None
) -> AdaptiveOptimizer:
    """`base` under the rules of the config; every process gives them the same signals."""
    arguments = {key.lower(): getattr(c, key) for key in ARGUMENTS}
    try:
        return AdaptiveOptimizer(base, steps=last_step, record=record, **arguments)
    except ValueError as error:  # of a beta that the run is too short for
        raise ConfigError(str(error).replace("betas_rule", "BETAS_RULE")) from error


def narrow(optimizer: AdaptiveOptimizer, rollbacks: int) -> None:
    """Halves the trust region, if there is one, for each rollback."""
    if optimizer.trust_region:
        optimizer.trust_region.kl = optimizer.kl * 0.5**rollbacks


def try_rules(c: RunConfig, last_step: int) -> None:
    """Tries the rules on a weight of their own, before the model is loaded."""
    kind = {"OPTIM": "adamw"} if c.OPTIM == "adamw_8bit" else {}
    weight = [("weight", nn.Parameter(torch.zeros(1)))]
    adaptive(c, base_optimizer(c.model_copy(update=kind), weight), last_step, record=None)
