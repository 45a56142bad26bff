"""Reward by a sequence classifier: sentiment, toxicity, helpfulness."""

import logging
from typing import Any, ClassVar, Literal

from pydantic import Field

from rewards.base import Column, Place, Reward
from rewards.messages import Texts, joined, texts_of
from rewards.whole import load_whole

log = logging.getLogger(__name__)
SENTIMENT = "adaptiverl/assets/sentiment"


class ClassifierReward(Reward):
    """Probability, or logit, that a sequence classifier gives to the class named LABEL.

    By name, because the order of classes differs between models. The probability is a softmax over
    the classes, or a sigmoid where labels do not exclude each other (config's `problem_type`) or
    there is only one (usually LABEL_0). Blank texts are not judged: None. Long texts lose their
    beginning, which is furthest from what was written last; a warning says so once.
    """

    loads_model: ClassVar[bool] = True
    type: Literal["classifier"] = "classifier"
    model: Place = Field(SENTIMENT, description="A sequence classifier: hub id or folder")
    label: str = Field("positive", description="Name of the label that is rewarded")
    output: Literal["probability", "logit"] = Field("probability", description="What is returned")
    with_prompt: bool = Field(False, description="Classify prompt + completion")
    _index: int
    _tokenizer: Any
    _classifier: Any
    _max_length: int | None
    _is_sigmoid: bool
    _warned: bool = False

    def _load(self, device: Any) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        config = AutoConfig.from_pretrained(self.model)  # the label first: weights may be large
        names = config.id2label
        found = [i for i, name in names.items() if name == self.label]
        found = found or [i for i, name in names.items() if name.lower() == self.label.lower()]
        if len(found) != 1:
            has = f"{len(found)} labels" if found else "no label"
            raise ValueError(
                f"{self.model} has {has} {self.label!r}, only {', '.join(names.values())}"
            )
        self._index = found[0]
        one = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        self._is_sigmoid = one
        tokenizer = AutoTokenizer.from_pretrained(self.model, truncation_side="left")
        wanted = "a model that was trained to classify texts"
        model = load_whole(AutoModelForSequenceClassification, self.model, wanted)
        model.to(device or "cpu")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ValueError(
                f"the tokenizer of {self.model} has neither a pad nor an end-of-text token"
            )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        limits = [tokenizer.model_max_length, _positions(model)]
        self._max_length = min((n for n in limits if n and n < 10**9), default=None)
        self._tokenizer, self._classifier = tokenizer, model

    def __call__(self, prompts: Texts, completions: Texts, **columns: Any) -> Column:
        import torch

        self.start()
        texts = texts_of(completions)
        if self.with_prompt:
            texts = [
                joined(prompt, text) for prompt, text in zip(prompts, completions, strict=True)
            ]
        result: Column = [None] * len(texts)  # nothing written: nothing to judge
        rows = [i for i, text in enumerate(texts) if text.strip()]
        if not rows:
            return result
        batch = self._tokenizer(
            [texts[i] for i in rows],
            padding=True,
            truncation=self._max_length is not None,
            max_length=self._max_length,
            return_tensors="pt",
        ).to(self._classifier.device)
        self._warn_of_long([texts[i] for i in rows], batch["attention_mask"].sum(1).tolist())
        with torch.no_grad():
            scores = self._classifier(**batch).logits.float()  # [rows, classes]
        if self.output == "probability":
            scores = scores.sigmoid() if self._is_sigmoid else scores.softmax(-1)
        for i, value in zip(rows, scores[:, self._index].tolist(), strict=True):
            result[i] = value
        return result

    def _warn_of_long(self, texts: list[str], sizes: list[int]) -> None:
        """Says once that texts were cut; `sizes` are their tokens as the model reads them."""
        limit = self._max_length
        full = [text for text, size in zip(texts, sizes, strict=True) if size == limit]
        if self._warned or limit is None or not full:
            return
        whole = [len(ids) for ids in self._tokenizer(full, verbose=False)["input_ids"]]
        if long := [size for size in whole if size > limit]:
            self._warned = True
            prompt = ", and with them the prompt (WITH_PROMPT)" if self.with_prompt else ""
            log.warning(
                f"reward {self.name!r}: {len(long)} of {len(texts)} texts have more tokens than "
                f"the {limit} that {self.model} can read, the longest has {max(long)}: their "
                f"beginnings are left out{prompt}"
            )


def _positions(model: Any) -> int | None:
    """How many tokens the model can place, None if its config sets no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return limit - module.padding_idx - 1  # RoBERTa counts positions from behind its pad
    return limit
