"""Every key of config.json: its type, default and meaning, and which keys contradict each other.

How a file becomes a Config is loading.py's. What a reward or a rule may be is known to who makes
them: training/keys.py puts them in. What needs a model or a device to be known (its positions,
FP16 on a CPU) is checked by training/build.py.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError


class ConfigError(Exception):
    """A mistake in what the user gave: one line that says what is wrong, where, what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


RENAMED = {  # keys of earlier versions
    "KL_STEP_TARGET": "TRUST_REGION_KL",
    "KL_STEP_FALLS": 'TRUST_REGION_SCHEDULE, "linear" or "constant"',
    "KL_TARGET": "KL_COEF_TARGET",
}
LR_BOUNDS = (1e-9, 10.0)  # where MIN_LR and MAX_LR are null
# "trend+cosine", {"name": "trend", "up_factor": 1.1}, or a list of such
Rules = Annotated[Any, WithJsonSchema({"type": ["string", "object", "array"]})]
RewardT = TypeVar("RewardT", bound=BaseModel)


class Config(BaseModel, Generic[RewardT]):
    """Keys of config.json. Strings are read as the type they stand for: "5e-5" is 5e-5."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # Keys that a run may change when it is resumed
    free_keys: ClassVar[frozenset[str]] = frozenset({
        "$schema", "STEPS", "EPOCHS", "OUTPUT_DIR", "RESUME", "SAVE_EVERY", "KEEP_CHECKPOINTS",
        "LOG_EVERY", "REPORT", "DYNAMICS_EVERY", "EVAL_EVERY", "EVAL_FILE", "SAMPLES_EVERY",
        "TRACKERS", "SAMPLER", "VLLM_SERVER", "HELD_OUT", "ON_COLLAPSE", "STOP_PATIENCE", "STOP_KL",
        "STOP_REWARD",
    })  # fmt: skip

    # Where the run was started; a reward may make another folder the working directory
    _here: Path = PrivateAttr(default_factory=Path.cwd)

    SCHEMA: str | None = Field(None, alias="$schema", description="For editors; a run ignores it")

    MODEL: str = Field(
        "adaptiverl/assets/policy", description="Causal LM or LoRA adapter: hub id or folder"
    )
    FULLTUNE: bool = Field(True, description="Train all weights; false trains a LoRA adapter")
    LORA_R: int = Field(8, ge=1, description="Rank of the adapter; one in MODEL keeps its own")
    LORA_ALPHA: int = Field(16, ge=1, description="The adapter is scaled by LORA_ALPHA / LORA_R")
    LORA_TARGETS: Literal["all-linear"] | list[str] | None = Field(
        None,
        description='Names of the modules that get an adapter; "all-linear": all linear layers but '
        "the output; null: peft's default, which some architectures lack",
    )
    LOAD_4BIT: bool = Field(False, description="Freeze the model in NF4; needs FULLTUNE false")
    LOAD_8BIT: bool = Field(False, description="Freeze the model in int8; needs FULLTUNE false")
    FP16: bool = Field(False, description="fp16 autocast with a gradient scaler; needs a GPU")
    BF16: bool = Field(False, description="bf16 autocast")

    TRAIN_FILE: str = Field(
        "data.json", description="Prompts: .json, .jsonl, .csv or .parquet file, or hub id"
    )
    EVAL_FILE: str | None = Field(
        None, description="Prompts to evaluate on every EVAL_EVERY steps, never trained on"
    )
    EVAL_SPLIT: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Share of TRAIN_FILE's prompts that is evaluated on instead of trained on",
    )
    PROMPT_COLUMN: str = Field(
        "prompt",
        description="Column that holds the prompts: texts, or lists of messages, which the "
        "tokenizer's chat template makes text; a last answer in a column messages is left out",
    )
    SYSTEM: str | None = Field(
        None, description="System message put before lists of messages that have none"
    )
    CHAT_TEMPLATE: str | None = Field(
        None, description="File with a Jinja chat template; null: the tokenizer's own"
    )
    REWARDS: list[RewardT] = Field(description="What is rewarded: the sum of these by WEIGHT")
    HELD_OUT: list[RewardT] = Field(
        [], description="Rewards that are logged and never trained on: they show reward hacking"
    )

    BATCH_SIZE: int = Field(32, ge=1, description="Completions per step, over all processes")
    NUM_GENERATIONS: int = Field(2, ge=1, description="Completions per prompt")
    MAX_NEW_TOKENS: int = Field(32, ge=1, description="Most tokens of a completion")
    MAXSEQ: int | None = Field(
        None, ge=2, description="Most tokens of prompt and completion; null: the model's positions"
    )
    TEMPERATURE: float = Field(1.0, ge=0.01, description="Of sampling and of all log-probabilities")
    TOP_K: int = Field(0, ge=0, description="Sample among the k most likely tokens; 0: off")
    TOP_P: float = Field(1.0, gt=0, le=1, description="Sample in the nucleus of mass p; 1: off")
    STOP: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="Strings that end a completion, beside its end-of-text and end-of-turn tokens; "
        "rewards see the text before them, and tokens are trained on up to the one that completes "
        "the string, included",
    )
    SAMPLER: Literal["auto", "static_cache", "generate"] = Field(
        "auto", description="What samples here; auto: static_cache for GPT-2, else generate"
    )
    VLLM_SERVER: str | None = Field(
        None, pattern="^https?://", description="URL of a vLLM server that samples; null: none"
    )

    BASELINE: Literal["none", "ema", "batch", "rloo"] = Field(
        "rloo",
        description="Subtracted from a reward; rloo: the mean of the prompt's other completions, "
        "of the batch's if NUM_GENERATIONS is 1",
    )
    NORMALIZE_ADVANTAGES: bool = Field(
        True, description="Divide advantages by their root mean square + 1e-4"
    )
    KL_COEF: float = Field(
        0.05, ge=0, description="Penalty per nat of KL to the first policy; 0: no reference model"
    )
    KL_ESTIMATOR: Literal["k1", "k3"] = Field("k1", description="Estimator of that KL (Schulman)")
    KL_COEF_TARGET: float | None = Field(
        None, gt=0, description="Nats of KL per completion that KL_COEF is adapted to; null: fixed"
    )

    OPTIM: Literal[
        "adam_mini", "adamw", "adamw_8bit", "sgd", "rmsprop",
        "online_sgd", "online_rmsprop", "online_adamw",
    ] = Field(
        "adam_mini",
        description="Optimizer; adam_mini is AdamW with one second moment per tensor; in online_… "
        "a GRU scales the update of each tensor",
    )  # fmt: skip
    LRATE: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        "auto", description='Learning rate at the start; "auto" leaves it to the trust region'
    )
    LR_RULE: Rules = Field("trust_region", description="Moves the rate: rules of docs/rules.md")
    REWARD_RULE: Rules = Field("none", description="Moves the rate by the reward: docs/rules.md")
    MOMENTUM_RULE: Rules = Field(
        "none", description="Moves the momentum of SGD, RMSprop: docs/rules.md"
    )
    BETAS_RULE: Rules = Field("none", description="Moves AdamW's betas: docs/rules.md")
    ALPHA_RULE: Rules = Field("none", description="Moves RMSprop's alpha: docs/rules.md")
    WD_RULE: Rules = Field("none", description="Moves the weight decay: docs/rules.md")
    TRUST_REGION_KL: float | None = Field(
        None,
        gt=0,
        description="Nats per token by which an update may move the policy; null: 0.004, times "
        "60 / STEPS (at most 4) in a run of fewer than 60 steps",
    )
    TRUST_REGION_SCHEDULE: Literal["linear", "constant"] = Field(
        "linear", description="linear: TRUST_REGION_KL falls to 0 over the run"
    )
    MIN_LR: float | None = Field(
        None,
        gt=0,
        description="Lowest rate of all rules; an update that goes too far may be scaled down "
        "below it; null: 1e-9",
    )
    MAX_LR: float | None = Field(None, gt=0, description="Highest rate of all rules; null: 10")
    MIN_MOMENTUM: float = Field(0.0, ge=0, lt=1, description="Lowest momentum of all rules")
    MAX_MOMENTUM: float = Field(0.999, ge=0, lt=1, description="Highest momentum of all rules")
    LOSS_BETA: float = Field(0.9, ge=0, lt=1, description="EMA factor of the loss that rules read")
    REWARD_BETA: float = Field(0.9, ge=0, lt=1, description="EMA factor of the reward they read")
    MOMENTUM: float = Field(0.9, ge=0, lt=1, description="SGD, RMSprop: momentum; Adam: beta1")
    WEIGHT_DECAY: float = Field(0.0, ge=0, description="Weight decay")
    GRAD_ACCUM: int = Field(1, ge=1, description="Micro-batches per step")
    MAX_GRAD_NORM: float = Field(1.0, ge=0, description="Gradients are clipped to it; 0: off")

    STEPS: int = Field(100, ge=1, description="Number of steps")
    EPOCHS: int | None = Field(
        None, ge=1, description="Passes over the prompts, if they end sooner"
    )
    STOP_PATIENCE: int | None = Field(
        None, ge=1, description="Evaluations without a better eval/score that end the run"
    )
    STOP_KL: float | None = Field(
        None, gt=0, description="Nats of KL per completion, mean of ten steps, that end the run"
    )
    STOP_REWARD: float | None = Field(
        None,
        description="Reward, mean of ten steps, that ends the run; reward_fixed_scale where there "
        "is one",
    )
    ON_COLLAPSE: Literal["warn", "stop", "rollback"] = Field(
        "rollback",
        description="rollback: back to the last sound checkpoint, or to the start, with half of "
        "TRUST_REGION_KL (without it a tenth of the rate) and other random numbers, three times",
    )
    SEED: int = Field(0, ge=0, lt=2**32, description="Of all random numbers")

    OUTPUT_DIR: str = Field("checkpoints", description="Folder that a run is written to")
    RESUME: Literal["auto"] | None = Field(
        None, description='"auto" continues the run in OUTPUT_DIR; null starts a new one'
    )
    SAVE_EVERY: int = Field(50, ge=0, description="Steps between checkpoints; 0: only at the end")
    KEEP_CHECKPOINTS: int = Field(
        2,
        ge=0,
        description="How many step checkpoints are kept, beside those that a rollback may need, up "
        "to 5; 0: all",
    )
    LOG_EVERY: int = Field(10, ge=0, description="Steps between lines on the console; 0: none")
    DYNAMICS_EVERY: int = Field(100, ge=0, description="online_: steps between reports; 0: none")
    EVAL_EVERY: int = Field(50, ge=0, description="Steps between evaluations; 0: none")
    SAMPLES_EVERY: int = Field(1, ge=0, description="Steps between rows of samples.jsonl; 0: none")
    REPORT: bool = Field(
        True, description="Write report.html at the end, and progress.jsonl, which it shows"
    )
    TRACKERS: list[
        Literal[
            "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio",
            "wandb",
        ]
    ] = Field([], description="Trackers that also log, through accelerate")  # fmt: skip

    def changed(self) -> set[str]:
        """The keys that were given another value than their default."""
        fields = type(self).model_fields
        return {key for key in self.model_fields_set if getattr(self, key) != fields[key].default}

    @property
    def here(self) -> Path:
        """The working directory when the config was read: its relative paths begin there."""
        return self._here

    @property
    def output_dir(self) -> Path:
        """OUTPUT_DIR as an absolute path."""
        return self._here / self.OUTPUT_DIR

    @property
    def has_evaluation_prompts(self) -> bool:
        return self.EVAL_FILE is not None or self.EVAL_SPLIT > 0

    @field_validator("MODEL", "TRAIN_FILE", "EVAL_FILE", "CHAT_TEMPLATE", "OUTPUT_DIR")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise PydanticCustomError("empty", "it is empty")
        return value and os.path.expanduser(value)  # noqa: PTH111 (Path would drop a leading ./)

    @model_validator(mode="after")
    def _contradictions(self) -> "Config":
        if mistake := next(self._mistakes(), None):
            raise ValueError(mistake)
        return self

    def _mistakes(self) -> Iterator[str]:
        if self.FP16 and self.BF16:
            yield "FP16 and BF16 exclude each other; BF16 needs no gradient scaler"
        if self.LOAD_4BIT and self.LOAD_8BIT:
            yield "LOAD_4BIT and LOAD_8BIT exclude each other"
        if self.FULLTUNE and (self.LOAD_4BIT or self.LOAD_8BIT):
            yield "a quantised model cannot be fully tuned: FULLTUNE false is LoRA"
        if isinstance(self.LORA_TARGETS, list) and "all-linear" in self.LORA_TARGETS:
            yield 'LORA_TARGETS "all-linear" stands alone, without brackets: it is no module'
        if self.VLLM_SERVER and not self.FULLTUNE:
            yield "VLLM_SERVER needs FULLTUNE: adapters are not sent to the server"
        if self.BATCH_SIZE % self.NUM_GENERATIONS:
            yield (
                f"BATCH_SIZE {self.BATCH_SIZE} counts completions: it must be a multiple of "
                f"NUM_GENERATIONS {self.NUM_GENERATIONS}"
            )
        if self.BATCH_SIZE % self.GRAD_ACCUM:
            yield f"BATCH_SIZE {self.BATCH_SIZE} must be a multiple of GRAD_ACCUM {self.GRAD_ACCUM}"
        if self.MAXSEQ is not None and self.MAXSEQ <= self.MAX_NEW_TOKENS:
            yield "MAXSEQ leaves no room for a prompt before MAX_NEW_TOKENS"
        if self.BASELINE in ("rloo", "batch") and self.BATCH_SIZE == 1:
            yield f"BASELINE {self.BASELINE} compares completions: BATCH_SIZE 1 has only one"
        if self.EVAL_SPLIT > 0 and self.EVAL_FILE is not None:
            yield "EVAL_SPLIT and EVAL_FILE exclude each other: both name what to evaluate on"
        if self.MIN_MOMENTUM > self.MAX_MOMENTUM:
            yield "MIN_MOMENTUM is above MAX_MOMENTUM"
        for keys, read, needs in self._readers():
            if not read and (unread := self.changed() & keys):
                yield f"{', '.join(sorted(unread))} needs {needs}"
        for tracker in self.TRACKERS:
            if importlib.util.find_spec(tracker) is None:
                yield f"TRACKERS: {tracker} is not installed: pip install {tracker}"

    def _readers(self) -> list[tuple[set[str], bool, str]]:
        """Keys, whether something reads them, and what would: none may be ignored in silence."""
        evaluates = self.has_evaluation_prompts and self.EVAL_EVERY > 0
        return [
            ({"LORA_R", "LORA_ALPHA", "LORA_TARGETS"}, not self.FULLTUNE, "FULLTUNE false"),
            ({"KL_COEF_TARGET", "KL_ESTIMATOR"}, self.KL_COEF > 0, "a KL_COEF above 0"),
            (
                {"EVAL_EVERY"},
                evaluates or not self.EVAL_EVERY,
                "an EVAL_FILE or EVAL_SPLIT; EVAL_EVERY 0 evaluates nothing",
            ),
            ({"EVAL_SPLIT"}, evaluates or not self.EVAL_SPLIT, "an EVAL_EVERY above 0"),
            (
                {"STOP_PATIENCE"},
                evaluates,
                "evaluations: an EVAL_FILE or EVAL_SPLIT, and EVAL_EVERY",
            ),
            ({"STOP_KL"}, self.KL_COEF > 0, "a KL_COEF above 0: there is no KL to measure"),
            ({"SAMPLER"}, not self.VLLM_SERVER, "no VLLM_SERVER, which samples instead"),
            ({"DYNAMICS_EVERY"}, self.OPTIM.startswith("online_"), "an online_ OPTIM"),
        ]
