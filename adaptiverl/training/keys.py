"""What a config may say: the keys of config/schema.py, with the rewards and rules that there are.

Imports no torch, so that a mistake is told at once.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from adaptiverl.config.schema import LR_BOUNDS, Config
from adaptiverl.optim.constants import CONSTANTS
from adaptiverl.optim.rules import Rule, parse_rules
from rewards import AnyReward, ClassifierReward, check_rewards
from rewards.base import is_no_number

RULE_KEYS = ("LR_RULE", "REWARD_RULE", "MOMENTUM_RULE", "BETAS_RULE", "ALPHA_RULE", "WD_RULE")
READ_BY_RULES = {  # keys that only rules read, and which
    ("TRUST_REGION_KL", "TRUST_REGION_SCHEDULE"): "LR_RULE trust_region",
    ("MIN_LR", "MAX_LR"): "a rule of the rate",
    ("MIN_MOMENTUM", "MAX_MOMENTUM"): "a MOMENTUM_RULE, or REWARD_RULE trend",
    ("LOSS_BETA",): "a rule that smooths the loss",
    ("REWARD_BETA",): "a REWARD_RULE",
}
RENAMED_RULES = {"kl_target": "trust_region"}  # of earlier versions


class RunConfig(Config[AnyReward]):
    """The config of a run."""

    REWARDS: list[AnyReward] = Field(
        [ClassifierReward()], description=Config.model_fields["REWARDS"].description
    )

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if is_no_number(value, cls.model_fields[info.field_name or ""].annotation):
            raise PydanticCustomError("number_type", "it must be a number")
        return value

    @field_validator(*RULE_KEYS)
    @classmethod
    def _known_rules(cls, value: Any, info: ValidationInfo) -> Any:
        argument = (info.field_name or "").lower()
        text = value.replace(" ", "") if isinstance(value, str) else value
        for part in text if isinstance(text, list) else [text]:
            named = part.get("name") if isinstance(part, dict) else part
            for name in str(named).split("+"):
                if name in RENAMED_RULES:
                    raise ValueError(f"{name!r} is now {RENAMED_RULES[name]!r}")
        try:
            parse_rules(argument, text)
        except (TypeError, ValueError) as error:
            raise ValueError(str(error).removeprefix(f"{argument}: ")) from error
        return text

    def rules(self) -> list[Rule]:
        """All that are chosen, whatever they move."""
        return [rule for rule, _ in self._with_constants()]

    def _with_constants(self) -> Iterator[tuple[Rule, dict[str, float]]]:
        """The rules, each with the constants that it is given as an object."""
        for key in RULE_KEYS:
            yield from parse_rules(key.lower(), getattr(self, key))

    def cycles(self) -> dict[str, float]:
        """The steps of the first cycle of each rule that has one."""
        given: dict[str, Any] = {"cycle_length": CONSTANTS["cycle_length"].default}
        return {
            rule.name: (given | own)["cycle_length"]
            for rule, own in self._with_constants()
            if rule.reads_constant("cycle_length")
        }

    @property
    def uses_trust_region(self) -> bool:
        return any(rule.name == "trust_region" for rule in self.rules())

    @model_validator(mode="after")
    def _rewards_and_rules(self) -> "RunConfig":
        check_rewards(
            self.REWARDS,
            self.HELD_OUT,
            num_generations=self.NUM_GENERATIONS,
            evaluates=self.has_evaluation_prompts,
        )
        self._check_rate(any(rule.moves == "lr" for rule in self.rules()))
        adam = "adam" in self.OPTIM
        for key, has, why in (
            ("MOMENTUM_RULE", not adam, f"OPTIM {self.OPTIM} has no momentum"),
            ("MOMENTUM_RULE", self.MOMENTUM > 0, "MOMENTUM is 0"),
            ("BETAS_RULE", adam, f"OPTIM {self.OPTIM} has no betas"),
            ("ALPHA_RULE", self.OPTIM.endswith("rmsprop"), f"OPTIM {self.OPTIM} has no alpha"),
            ("WD_RULE", self.WEIGHT_DECAY > 0, "WEIGHT_DECAY is 0"),
        ):
            if getattr(self, key) != "none" and not has:
                raise ValueError(f"{key} has no effect: {why}")
        own = [constant for _, given in self._with_constants() for constant in given]
        if "trust_region_kl" in own and "TRUST_REGION_KL" in self.changed():
            raise ValueError("TRUST_REGION_KL is also given in LR_RULE, as trust_region_kl")
        for keys, needs in READ_BY_RULES.items():
            unread = [key for key in keys if not self._is_read(key, adam)]
            if unread := sorted(self.changed().intersection(unread)):
                raise ValueError(f"{', '.join(unread)} needs {needs}")
        return self

    def _is_read(self, key: str, adam: bool) -> bool:
        """Whether a chosen rule reads `key`; no rule moves a momentum that AdamW does not have."""
        rules = [rule for rule in self.rules() if not (rule.moves == "momentum" and adam)]
        if key in ("MIN_LR", "MAX_LR"):
            return any(rule.moves == "lr" for rule in rules)
        constant = "trust_region_kl" if key == "TRUST_REGION_SCHEDULE" else key.lower()
        return any(rule.reads_constant(constant) for rule in rules)

    def _check_rate(self, moved: bool) -> None:
        """LRATE must be within the bounds of the rules; no rule moves a rate of 0."""
        low, high = self.MIN_LR or LR_BOUNDS[0], self.MAX_LR or LR_BOUNDS[1]
        if low > high:
            raise ValueError(f"MIN_LR {low:g} is above MAX_LR, which is {high:g}")
        if self.LRATE == "auto":
            if not self.uses_trust_region:
                raise ValueError('LRATE "auto" needs LR_RULE trust_region, which finds the rate')
        elif moved and high < self.LRATE:
            raise ValueError(f"LRATE {self.LRATE:g} is above MAX_LR, which is {high:g}")
        elif moved and 0 < self.LRATE < low:
            raise ValueError(f"LRATE {self.LRATE:g} is below MIN_LR, which is {low:g}")
