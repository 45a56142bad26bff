"""Reward by a judge in this process: a causal LM, asked yes or no about each completion."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from rewards.base import Column, Place, Reward
from rewards.messages import Texts, joined, texts_of, transcript
from rewards.whole import load_whole

TEMPLATE = "{rubric}\n\nText:\n{text}\n\nAnswer (yes or no):"


class LocalJudgeReward(Reward):
    """Log-odds of a causal LM's yes against its no, asked about the completion.

    log P(yes) − log P(no) after TEMPLATE. Each answer may take several tokens. Long texts lose
    their beginning, the question does not.
    """

    loads_model: ClassVar[bool] = True
    type: Literal["local_judge"] = "local_judge"
    model: Place = Field(description="A causal LM: hub id or folder")
    rubric: str = Field(min_length=1, description="The question, in words")
    template: str = Field(
        TEMPLATE,
        description="What is asked, with {rubric} and {text} in it; other braces stay as they are",
    )
    yes: str = Field(" yes", description="The answer that is rewarded, as the model would go on")
    no: str = Field(" no", description="The other answer")
    with_prompt: bool = Field(True, description="Judge prompt + completion")
    batch_size: int = Field(16, ge=1, description="Texts that are judged at once")
    _tokenizer: Any
    _lm: Any
    _before: list[int]
    _after: list[int]
    _answers: list[list[int]]
    _room: int | None

    @field_validator("template")
    @classmethod
    def _complete(cls, template: str) -> str:
        if "{rubric}" not in template or template.count("{text}") != 1:
            raise ValueError("the template must name {rubric}, and {text} once")
        return template

    def _load(self, device: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(self.model)
        wanted = "a causal language model, as GPT-2, Llama and Qwen are"
        self._lm = load_whole(AutoModelForCausalLM, self.model, wanted)
        self._lm.to(device or "cpu")
        parts = self.template.split("{text}")
        self._before, self._after = (self._ids(p.replace("{rubric}", self.rubric)) for p in parts)
        self._answers = [self._ids(self.yes), self._ids(self.no)]
        if self._answers[0] == self._answers[1] or not all(self._answers):
            raise ValueError(
                f"{self.yes!r} and {self.no!r} are the same tokens to {self.model}, or none"
            )
        limit = getattr(self._lm.config, "max_position_embeddings", None)
        used = len(self._before) + len(self._after) + max(map(len, self._answers))
        if limit and used >= limit:
            raise ValueError(f"the rubric leaves no room for a text in the {limit} positions")
        self._room = limit and limit - used

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def __call__(self, prompts: Texts, completions: Texts, **columns: Any) -> Column:
        self.start()
        texts = texts_of(completions)
        if self.with_prompt:
            texts = [joined(transcript(p), c) for p, c in zip(prompts, completions, strict=True)]
        result: Column = []
        for start in range(0, len(texts), self.batch_size):
            some = texts[start : start + self.batch_size]
            yes, no = (self._logprobs(some, answer) for answer in self._answers)
            result += (yes - no).tolist()
        return result

    def _logprobs(self, texts: list[str], answer: list[int]) -> Any:
        """log P(answer) after each text [B]; padded on the right, where nothing looks at it."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        rows = []
        for text in texts:
            own = self._ids(text)
            own = own[-self._room :] if self._room else own
            rows.append(torch.tensor([*self._before, *own, *self._after, *answer]))
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs = {name: tensor.to(self._lm.device) for name, tensor in inputs.items()}
        with torch.no_grad():
            table = self._lm(**inputs).logits.float().log_softmax(-1).cpu()  # [B, T, V]
        size = len(answer)
        before = [each[: len(row) - 1][-size:] for each, row in zip(table, rows, strict=True)]
        wanted = torch.tensor(answer).expand(len(rows), -1)
        return torch.stack(before).gather(-1, wanted[..., None])[..., 0].sum(-1)
