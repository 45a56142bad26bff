"""The configuration: what keys there are, and which of them contradict each other.

How a file becomes one is reading.py's. What needs a model or a device to be known (its positions,
FP16 on a CPU) is checked by setup.py.
`python -m adaptiverl.run.config > config.schema.json` writes the schema for editors.
"""

import difflib
import importlib.util
import json
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from adaptiverl.run.reward_config import AnyReward, ClassifierReward, Strict


class UserError(Exception):
    """A mistake in what the user gave: one line that says what is wrong, where, what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


REWARD_KEYS = ("REWARDS", "HELD_OUT")
LR_BOUNDS = (1e-9, 10.0)  # where MIN_LR and MAX_LR are null
RULE_NAMES = {
    "LR_RULE": (
        "loss_decay", "trend", "patience", "variance", "grad_norm", "cyclical", "cosine",
        "cosine_restart", "kl_target", "learned",
    ),
    "REWARD_RULE": ("trend", "kelly", "scaling", "variance"),
    "MOMENTUM_RULE": ("inverse", "exp", "relative", "normalized"),
    "BETAS_RULE": ("relative", "variance"),
    "ALPHA_RULE": ("stable",),
    "WD_RULE": ("trend",),
}  # fmt: skip
TRAINED = {"WEIGHT", "NORMALIZE", "CLIP", "MAX_MISSING"}  # of rewards that are trained on


class Config(Strict):
    """Keys of config.json. Strings are read as the type they stand for: "5e-5" is 5e-5."""

    SCHEMA: str | None = Field(None, alias="$schema", description="For editors; not read")

    MODEL: str = Field(
        "adaptiverl/assets/policy", description="Causal LM or LoRA adapter: hub id or folder"
    )
    FULLTUNE: bool = Field(True, description="Train all weights; false trains a LoRA adapter")
    LORA_R: int = Field(8, ge=1, description="Rank of the adapter")
    LORA_ALPHA: int = Field(16, ge=1, description="Scale of the adapter: LORA_ALPHA / LORA_R")
    LORA_TARGETS: list[str] | None = Field(None, description="What gets one; null: peft's choice")
    LOAD_4BIT: bool = Field(False, description="Freeze the model in NF4 (needs FULLTUNE false)")
    LOAD_8BIT: bool = Field(False, description="Freeze the model in int8 (needs FULLTUNE false)")
    FP16: bool = Field(False, description="fp16 autocast with a gradient scaler; needs a GPU")
    BF16: bool = Field(False, description="bf16 autocast")

    TRAIN_FILE: str = Field("data.json", description="Prompts: .json .jsonl .csv .parquet, hub id")
    EVAL_FILE: str | None = Field(None, description="Held-out prompts, sampled every EVAL_EVERY")
    PROMPT_COLUMN: str = Field("prompt", description="Column of the prompts")
    REWARDS: list[AnyReward] = Field(
        [ClassifierReward(TYPE="classifier")], description="What is rewarded, summed by WEIGHT"
    )
    HELD_OUT: list[AnyReward] = Field(
        [], description="Scored and logged like REWARDS, never trained on: shows what is gamed"
    )

    BATCH_SIZE: int = Field(32, ge=1, description="Completions a step, over all processes")
    NUM_GENERATIONS: int = Field(2, ge=1, description="Completions of each prompt")
    MAX_NEW_TOKENS: int = Field(32, ge=1, description="Longest completion")
    MAXSEQ: int | None = Field(None, ge=2, description="Most tokens of a text; null: all positions")
    TEMPERATURE: float = Field(1.0, gt=0, description="Of sampling and of the log-probabilities")
    TOP_K: int = Field(0, ge=0, description="Sample among the k likeliest; 0 is off")
    TOP_P: float = Field(1.0, gt=0, le=1, description="Sample in the nucleus of mass p; 1 is off")

    VLLM_SERVER: str | None = Field(
        None, pattern="^https?://", description="URL of a vLLM server that samples; null: here"
    )

    BASELINE: Literal["none", "ema", "batch", "rloo"] = Field(
        "rloo", description="What a reward is compared with"
    )
    NORMALIZE_ADVANTAGES: bool = Field(True, description="Divide by their standard deviation")
    KL_COEF: float = Field(0.05, ge=0, description="Penalty on KL to the start; 0: no reference")
    KL_ESTIMATOR: Literal["k1", "k3"] = Field("k1", description="Schulman's estimators")
    KL_TARGET: float | None = Field(None, gt=0, description="Nats a completion that KL_COEF seeks")

    OPTIM: Literal[
        "sgd", "rmsprop", "adamw", "adamw_8bit", "online_sgd", "online_rmsprop", "online_adamw"
    ] = Field("adamw", description="Optimizer; online_: each tensor's updates scaled by a GRU")
    LRATE: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        "auto", description='Learning rate to start from; "auto" leaves it to kl_target'
    )
    LR_RULE: str = Field("kl_target", description="What moves the rate; docs/rules.md has them all")
    REWARD_RULE: str = Field("none", description="What the reward does to the rate")
    MOMENTUM_RULE: str = Field("none", description="What moves the momentum of SGD and RMSprop")
    BETAS_RULE: str = Field("none", description="What moves AdamW's betas")
    ALPHA_RULE: str = Field("none", description="What moves RMSprop's alpha")
    WD_RULE: str = Field("none", description="What moves the weight decay")
    KL_STEP_TARGET: float = Field(
        0.004, gt=0, description="Nats a token that kl_target lets the first update move the policy"
    )
    KL_STEP_FALLS: bool = Field(True, description="KL_STEP_TARGET falls linearly over the run")
    MIN_LR: float | None = Field(None, gt=0, description="No rule goes below; 1e-9 if null")
    MAX_LR: float | None = Field(None, gt=0, description="No rule goes above; 10 if null")
    MIN_MOMENTUM: float = Field(0.0, ge=0, lt=1, description="No rule goes below")
    MAX_MOMENTUM: float = Field(0.999, ge=0, lt=1, description="No rule goes above")
    LOSS_BETA: float = Field(0.9, ge=0, lt=1, description="Smoothing of the loss that rules see")
    REWARD_BETA: float = Field(0.9, ge=0, lt=1, description="Smoothing of the reward they see")
    MOMENTUM: float = Field(0.9, ge=0, lt=1, description="SGD, RMSprop: momentum; AdamW: beta1")
    WEIGHT_DECAY: float = Field(0.0, ge=0, description="Weight decay")
    GRAD_ACCUM: int = Field(1, ge=1, description="Pieces a step's batch is computed in")
    MAX_GRAD_NORM: float = Field(1.0, ge=0, description="Gradient clipping; 0 is off")

    STEPS: int = Field(100, ge=1, description="Stop after so many steps")
    EPOCHS: int | None = Field(None, ge=1, description="Stop after so many passes over the prompts")
    SEED: int = Field(0, ge=0, lt=2**32, description="Of everything random")

    OUTPUT_DIR: str = Field("checkpoints", description="Where a run is written")
    RESUME: Literal["auto"] | None = Field(
        None, description='"auto" continues the run in OUTPUT_DIR; null starts anew'
    )
    SAVE_EVERY: int = Field(50, ge=0, description="Steps between checkpoints; 0: only the last")
    KEEP_CHECKPOINTS: int = Field(2, ge=0, description="How many step checkpoints stay; 0: all")
    LOG_EVERY: int = Field(10, ge=0, description="Steps between lines on the console")
    DYNAMICS_EVERY: int = Field(100, ge=0, description="online_: steps between reports; 0: never")
    EVAL_EVERY: int = Field(50, ge=0, description="Steps between evaluations on EVAL_FILE")
    SAMPLES_EVERY: int = Field(1, ge=0, description="Steps between entries in samples.jsonl")
    TRACKERS: list[Literal["tensorboard", "wandb"]] = Field([], description="Where else to log")

    @field_validator(*RULE_NAMES)
    @classmethod
    def _known_rules(cls, value: str, info: ValidationInfo) -> str:
        names = [name.strip() for name in value.split("+")]
        known = RULE_NAMES[info.field_name or ""]
        for name in names:
            if name not in (*known, "none"):
                near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise ValueError(f"there is no rule {name!r}; the nearest is {near!r}")
        return "+".join(names)

    @model_validator(mode="after")
    def _contradictions(self) -> "Config":
        given = self.changed()
        if self.FP16 and self.BF16:
            raise ValueError("FP16 and BF16 exclude each other; BF16 needs no gradient scaler")
        if self.LOAD_4BIT and self.LOAD_8BIT:
            raise ValueError("LOAD_4BIT and LOAD_8BIT exclude each other")
        if self.FULLTUNE and (self.LOAD_4BIT or self.LOAD_8BIT):
            raise ValueError("a quantised model cannot be fully tuned: FULLTUNE false is LoRA")
        if self.VLLM_SERVER and not self.FULLTUNE:
            raise ValueError("VLLM_SERVER needs FULLTUNE: adapters are not sent to the server")
        if not self.REWARDS:
            raise ValueError("REWARDS is empty: name at least one reward")
        if all(reward.WEIGHT == 0 for reward in self.REWARDS):
            raise ValueError("every WEIGHT is 0: nothing is rewarded")
        for i, reward in enumerate(self.HELD_OUT):
            if trained := reward.changed() & TRAINED:
                raise ValueError(f"HELD_OUT.{i}: {', '.join(sorted(trained))} is for REWARDS only")
        for rewards in (self.REWARDS, self.HELD_OUT):
            for reward in rewards:
                if getattr(reward, "PAIRWISE", False) and self.NUM_GENERATIONS == 1:
                    raise ValueError(f"{reward.name} is PAIRWISE: NUM_GENERATIONS 1 has only one")
            names = [reward.name for reward in rewards]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"two rewards are named {twice.pop()!r}: give one of them a NAME")
        if self.EVAL_FILE and all(
            getattr(r, "PAIRWISE", False) for r in (*self.REWARDS, *self.HELD_OUT)
        ):
            raise ValueError(
                "EVAL_FILE has nothing to say: every reward is PAIRWISE and compares completions "
                "of one policy, so its mean is 0.5 for any policy; add a reward that scores "
                "(HELD_OUT is for that), or leave EVAL_FILE out"
            )
        people = [r for rs in (self.REWARDS, self.HELD_OUT) for r in rs if r.TYPE == "human"]
        if sum(reward.WHERE == "terminal" for reward in people) > 1:
            raise ValueError("a terminal asks for one human reward: give the other WHERE web")
        if self.BATCH_SIZE % self.NUM_GENERATIONS:
            raise ValueError("BATCH_SIZE counts completions: a multiple of NUM_GENERATIONS")
        if self.BATCH_SIZE % self.GRAD_ACCUM:
            raise ValueError("BATCH_SIZE must be a multiple of GRAD_ACCUM")
        if self.MAXSEQ is not None and self.MAXSEQ <= self.MAX_NEW_TOKENS:
            raise ValueError("MAXSEQ leaves no room for a prompt before MAX_NEW_TOKENS")
        if self.BASELINE == "rloo" and self.BATCH_SIZE == 1:
            raise ValueError("BASELINE rloo compares completions: BATCH_SIZE 1 has only one")
        if self.MIN_MOMENTUM > self.MAX_MOMENTUM:
            raise ValueError("MIN_MOMENTUM is above MAX_MOMENTUM")
        low, high = self.MIN_LR or LR_BOUNDS[0], self.MAX_LR or LR_BOUNDS[1]
        if low > high:
            raise ValueError(f"MIN_LR {low:g} is above MAX_LR, which is {high:g}")
        ruled = self.LR_RULE != "none" or self.REWARD_RULE != "none"
        rate = self.LRATE or "auto"  # no rule moves a rate of 0
        if ruled and rate != "auto" and rate > high:
            raise ValueError(f"LRATE {rate:g} is above MAX_LR, which is {high:g}")
        if ruled and rate != "auto" and rate < low:
            raise ValueError(f"LRATE {rate:g} is below MIN_LR, which is {low:g}")
        by_kl = "kl_target" in self.LR_RULE.split("+")
        if not by_kl and self.LRATE == "auto":
            raise ValueError('LRATE "auto" needs LR_RULE kl_target, which finds the rate')
        adam = "adamw" in self.OPTIM
        for key, has in (
            ("MOMENTUM_RULE", not adam and self.MOMENTUM > 0),
            ("BETAS_RULE", adam),
            ("ALPHA_RULE", self.OPTIM.endswith("rmsprop")),
            ("WD_RULE", self.WEIGHT_DECAY > 0),
        ):
            if getattr(self, key) != "none" and not has:
                raise ValueError(f"{key} moves nothing that OPTIM {self.OPTIM} has as it is set")
        for keys, read, needs in self._readers(by_kl):
            if not read and (unread := given & set(keys)):
                raise ValueError(f"{', '.join(sorted(unread))} needs {needs}")
        for tracker in self.TRACKERS:
            if importlib.util.find_spec(tracker) is None:
                raise ValueError(f"TRACKERS: {tracker} is not installed: pip install {tracker}")
        return self

    def _readers(self, by_kl: bool) -> list[tuple[tuple[str, ...], bool, str]]:
        """Keys, whether something reads them, and what would: none may be ignored in silence."""
        loss_rules = {*self.LR_RULE.split("+"), *self.BETAS_RULE.split("+")}
        momentum = self.MOMENTUM_RULE != "none"
        rewarded = self.REWARD_RULE != "none"
        return [
            (("LORA_R", "LORA_ALPHA", "LORA_TARGETS"), not self.FULLTUNE, "FULLTUNE false"),
            (("KL_TARGET", "KL_ESTIMATOR"), self.KL_COEF > 0, "a KL_COEF above 0"),
            (("EVAL_EVERY",), not self.EVAL_EVERY or self.EVAL_FILE is not None, "an EVAL_FILE"),
            (("KL_STEP_TARGET", "KL_STEP_FALLS"), by_kl, "LR_RULE kl_target"),
            (("MIN_LR", "MAX_LR"), self.LR_RULE != "none" or rewarded, "a rule of the rate"),
            (
                ("MIN_MOMENTUM", "MAX_MOMENTUM"),
                momentum or ("trend" in self.REWARD_RULE.split("+") and "adamw" not in self.OPTIM),
                "a MOMENTUM_RULE, or REWARD_RULE trend",
            ),
            (
                ("LOSS_BETA",),
                bool(loss_rules & {"loss_decay", "trend", "relative"})
                or momentum
                or self.WD_RULE != "none",
                "a rule that smooths the loss",
            ),
            (("REWARD_BETA",), rewarded, "a REWARD_RULE"),
            (("DYNAMICS_EVERY",), self.OPTIM.startswith("online_"), "an online_ OPTIM"),
        ]


def schema() -> str:
    """The JSON schema of the config, as text."""
    return json.dumps(Config.model_json_schema(by_alias=True), indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
