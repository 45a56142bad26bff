"""The rewards that a config can name: one class per TYPE, with its keys and what contradicts.

What they do is in rewards/; config.py holds all other keys.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

SENTIMENT = "adaptiverl/assets/sentiment"
PYTHON_NAME = r"^\w+(\.\w+)*:\w+$"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def changed(self) -> set[str]:
        """The keys that were given another value than their default."""
        fields = type(self).model_fields
        return {key for key in self.model_fields_set if getattr(self, key) != fields[key].default}


class JudgeExample(Strict):
    PROMPT: str
    COMPLETION: str
    SCORE: float


class Reward(Strict):
    NAME: str | None = Field(None, description="Name in the logs; TYPE if absent")
    WEIGHT: float | list[tuple[int, float]] = Field(
        1.0, description="Factor in the sum, or points [[step, weight], …] with lines between"
    )
    NORMALIZE: Literal["none", "zscore", "rank"] = Field(
        "none", description="By running mean and deviation, or by rank in the batch"
    )
    CLIP: tuple[float, float] | None = Field(None, description="Limits, after NORMALIZE")

    @model_validator(mode="after")
    def _possible(self) -> "Reward":
        if self.CLIP and not self.CLIP[0] < self.CLIP[1]:
            raise ValueError(f"the first of CLIP, {self.CLIP[0]:g}, is not below its second")
        if isinstance(self.WEIGHT, list):
            steps = [step for step, _ in self.WEIGHT]
            if not steps or sorted(set(steps)) != steps:
                raise ValueError("the points of WEIGHT, [[step, weight], …], need steps that rise")
        return self

    @property
    def name(self) -> str:
        return self.NAME or self.TYPE  # type: ignore[attr-defined]

    def arguments(self) -> dict[str, Any]:
        """What the reward itself is constructed with, lower-case."""
        own = self.model_dump(exclude={"TYPE", *Reward.model_fields})
        return {key.lower(): value for key, value in own.items()}


class RegexReward(Reward):
    """1 where the completion matches, else 0."""

    TYPE: Literal["regex"]
    PATTERNS: Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = (
        Field(
            description="One or several patterns", json_schema_extra={"type": ["array", "string"]}
        )
    )
    LITERAL: bool = Field(False, description="Patterns are plain substrings")
    MATCH: Literal["any", "all"] = Field("any", description="How many patterns must match")
    NEGATE: bool = Field(False, description="Reward the absence instead")
    IGNORE_CASE: bool = Field(False, description="Upper and lower case are the same")


class LengthReward(Reward):
    """1 at TARGET or inside MIN…MAX, falling linearly to 0 outside."""

    TYPE: Literal["length"]
    TARGET: int | None = Field(None, ge=1, description="Wanted length")
    MIN: int | None = Field(None, ge=0, description="Shortest wanted length")
    MAX: int | None = Field(None, ge=1, description="Longest wanted length")
    UNIT: Literal["tokens", "words"] = Field("tokens", description="What is counted")


class CosineReward(Reward):
    """Cosine similarity of sentence embeddings of the completion and a reference."""

    TYPE: Literal["cosine"]
    MODEL: str = Field("all-MiniLM-L6-v2", description="A sentence-transformers id or folder")
    COLUMN: str = Field("reference", description="Column that holds the reference text")


class ClassifierReward(Reward):
    """What a sequence classifier says of the completion, by the label's name."""

    TYPE: Literal["classifier"]
    MODEL: str = Field(SENTIMENT, description="A sequence classifier: hub id or folder")
    LABEL: str = Field("positive", description="Name of the label that is rewarded")
    OUTPUT: Literal["probability", "logit"] = Field("probability", description="What is returned")
    WITH_PROMPT: bool = Field(False, description="Classify prompt + completion")


class JudgeReward(Reward):
    """A chat model's score of the completion by a rubric, 0 to 1."""

    TYPE: Literal["judge"]
    MODEL: str = Field(description="Name of the model at the endpoint")
    RUBRIC: str = Field(min_length=1, description="What is to be judged, in words")
    LOW: float = Field(1.0, description="Worst score of the scale that is asked for")
    HIGH: float = Field(10.0, description="Best score of that scale")
    EXAMPLES: list[JudgeExample] = Field([], description="Judged texts to show the model")
    PAIRWISE: bool = Field(False, description="Compare completions of a prompt: share of wins")
    BASE_URL: str | None = Field(
        None, pattern="^https?://", description="OpenAI-compatible endpoint; OpenAI's if null"
    )
    KEY_ENV: str = Field(
        "OPENAI_API_KEY",
        description="Environment variable that holds the key; a server on this machine needs none",
    )
    STRUCTURED: bool = Field(True, description="Ask for JSON by response_format")
    CONCURRENCY: int = Field(16, ge=1, description="Requests at a time")
    REQUESTS_PER_MINUTE: int | None = Field(None, ge=1, description="Of all tries")
    TOKENS_PER_MINUTE: int | None = Field(None, ge=1, description="Of all tries")
    TIMEOUT: float = Field(30.0, gt=0, description="Seconds of one try, as a whole")
    RETRIES: int = Field(
        5, ge=0, description="Further tries after one that failed, at most 60 s after it"
    )
    CACHE: str = Field(
        "judge.sqlite",
        description="Where judgements and costs are kept: a file that several runs may share",
    )
    MAX_CALLS: int | None = Field(
        None, ge=0, description="Answers paid for, in all runs of this judge that share CACHE"
    )
    MAX_COST: float | None = Field(None, ge=0, description="Their cost at PRICES")
    PRICES: tuple[float, float] = Field((0, 0), description="Of 1e6 tokens, in and out")
    MAX_MISSING: float = Field(0.5, ge=0, le=1, description="Beyond this share a run pauses")

    @model_validator(mode="after")
    def _scored(self) -> "JudgeReward":
        if self.PAIRWISE and (scale := self.changed() & {"LOW", "HIGH", "EXAMPLES"}):
            raise ValueError(f"{', '.join(sorted(scale))} is for scores; PAIRWISE compares")
        return self

    def arguments(self) -> dict[str, Any]:
        own = super().arguments()
        own.pop("max_missing")
        own["name"] = self.name  # of its metrics
        own["examples"] = [{k.lower(): v for k, v in one.items()} for one in own["examples"]]
        return own


class LocalJudgeReward(Reward):
    """Log-odds of a causal LM's yes against its no, asked about the completion."""

    TYPE: Literal["local_judge"]
    MODEL: str = Field(description="A causal LM: hub id or folder")
    RUBRIC: str = Field(min_length=1, description="The question, in words")
    YES: str = Field(" yes", description="The answer that is rewarded, as the model would go on")
    NO: str = Field(" no", description="The other answer")
    WITH_PROMPT: bool = Field(True, description="Judge prompt + completion")


class HumanReward(Reward):
    """What people say of the completion: −1 to 1, missing where they skip it."""

    TYPE: Literal["human"]
    QUESTION: str = Field("Is this completion good?", description="What people are asked")
    SCALE: Literal["binary", "1-5"] = Field("binary", description="Their answers: − and +, or 1-5")
    WHERE: Literal["terminal", "web"] = Field("terminal", description="How they are asked")
    HOST: str = Field("127.0.0.1", description="Address that the web page is at")
    PORT: int = Field(8765, ge=0, lt=65536, description="Its port; 0: any that is free")
    TOKEN_ENV: str | None = Field(None, description="Variable with its token; null: random")
    LABELS: str = Field("labels.sqlite", description="Where labels are kept")
    TIMEOUT: float | None = Field(
        None, gt=0, description="Seconds to wait for a batch's labels; null: until all are there"
    )
    ASK: int | None = Field(None, ge=1, description="Of a batch, those most disputed; null: all")
    REWARD_MODEL: Literal["online"] | None = Field(
        None, description='"online": a head that learns from the labels fills in for the missing'
    )

    @model_validator(mode="after")
    def _seen(self) -> "HumanReward":
        if self.WHERE == "terminal" and (web := self.changed() & {"HOST", "PORT", "TOKEN_ENV"}):
            raise ValueError(f"{', '.join(sorted(web))} needs WHERE web")
        return self


class PythonReward(Reward):
    """Any function with TRL's reward signature."""

    TYPE: Literal["python"]
    FUNCTION: str = Field(pattern=PYTHON_NAME, description="my_module:my_reward")

    @property
    def name(self) -> str:
        return self.NAME or self.FUNCTION.split(":")[1]


AnyReward = Annotated[
    RegexReward
    | LengthReward
    | CosineReward
    | ClassifierReward
    | JudgeReward
    | LocalJudgeReward
    | HumanReward
    | PythonReward,
    Field(discriminator="TYPE"),
]

REWARD_KINDS = get_args(get_args(AnyReward)[0])
