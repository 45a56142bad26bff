"""Reward by a sequence classifier: sentiment, toxicity, helpfulness."""

from collections.abc import Sequence
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rewards.messages import Text, joined, texts_of


class ClassifierReward:
    """Probability, or logit, that `model` gives to the class *named* `label`.

    By name, because the order of classes differs between models. The probability is a softmax over
    the classes, or a sigmoid where labels do not exclude each other (config's `problem_type`) or
    there is only one (usually LABEL_0). Blank texts are not judged: None. Long texts lose their
    beginning, which is furthest from what was written last.
    """

    def __init__(
        self,
        model: str,
        label: str,
        output: str = "probability",
        with_prompt: bool = False,
        device: str | torch.device | None = None,
    ):
        config = AutoConfig.from_pretrained(model)  # the label first: weights may be large
        names = {name.lower(): index for index, name in config.id2label.items()}
        if label.lower() not in names:
            labels = ", ".join(config.id2label.values())
            raise ValueError(f"{model} has no label {label!r}, only {labels}")
        self.index = names[label.lower()]
        self.output = output
        self.with_prompt = with_prompt
        self.tokenizer = AutoTokenizer.from_pretrained(model, truncation_side="left")
        self.model = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
        self.model.eval().to(device or "cpu")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token is None:
            raise ValueError(f"the tokenizer of {model} has neither a pad nor an end-of-text token")
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        limits = [self.tokenizer.model_max_length, _positions(self.model)]
        self.longest = min((n for n in limits if n and n < 10**9), default=None)
        one = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        self.probability = torch.sigmoid if one else partial(torch.softmax, dim=-1)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns
    ) -> list[float | None]:
        texts = texts_of(completions)
        if self.with_prompt:
            texts = [
                joined(prompt, text) for prompt, text in zip(prompts, completions, strict=True)
            ]
        result: list[float | None] = [None] * len(texts)  # nothing written: nothing to judge
        rows = [i for i, text in enumerate(texts) if text.strip()]
        if not rows:
            return result
        batch = self.tokenizer(
            [texts[i] for i in rows],
            padding=True,
            truncation=self.longest is not None,
            max_length=self.longest,
            return_tensors="pt",
        ).to(self.model.device)
        logits = self.model(**batch).logits.float()  # [rows, classes]
        if self.output == "probability":
            logits = self.probability(logits)
        for i, value in zip(rows, logits[:, self.index].tolist(), strict=True):
            result[i] = value
        return result


def _positions(model: torch.nn.Module) -> int | None:
    """How many tokens the model can place, None if its config sets no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return limit - module.padding_idx - 1  # RoBERTa counts positions from behind its pad
    return limit
