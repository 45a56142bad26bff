"""Reward by a judge in this process: a causal LM, asked yes or no about each completion."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewards.messages import Text, joined, texts_of

TEMPLATE = "{rubric}\n\nText:\n{text}\n\nAnswer (yes or no):"


class LocalJudgeReward:
    """log P(yes) − log P(no) after `template`, which names {rubric} and {text}.

    `yes` and `no` are the answers as the model would go on with them, usually with a leading space;
    each may take several tokens. Long texts lose their beginning, the question does not.
    """

    def __init__(
        self,
        model: str,
        rubric: str,
        *,
        template: str = TEMPLATE,
        yes: str = " yes",
        no: str = " no",
        with_prompt: bool = True,
        batch_size: int = 16,
        device: str | torch.device | None = None,
    ):
        if "{rubric}" not in template or "{text}" not in template:
            raise ValueError("the template must name {rubric} and {text}")
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model.eval().to(device or "cpu")
        before, after = template.replace("{rubric}", rubric).split("{text}")
        self.before, self.after = self._ids(before), self._ids(after)
        self.answers = [self._ids(yes), self._ids(no)]
        if self.answers[0] == self.answers[1] or not all(self.answers):
            raise ValueError(f"{yes!r} and {no!r} are the same tokens to {model}, or none")
        self.with_prompt, self.batch_size = with_prompt, batch_size
        limit = getattr(self.model.config, "max_position_embeddings", None)
        used = len(self.before) + len(self.after) + max(map(len, self.answers))
        if limit and used >= limit:
            raise ValueError(f"the rubric leaves no room for a text in the {limit} positions")
        self.room = limit and limit - used

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns
    ) -> list[float | None]:
        texts = texts_of(completions)
        if self.with_prompt:
            texts = [joined(p, c) for p, c in zip(prompts, completions, strict=True)]
        result: list[float | None] = []
        for start in range(0, len(texts), self.batch_size):
            some = texts[start : start + self.batch_size]
            yes, no = (self._logprobs(some, answer) for answer in self.answers)
            result += (yes - no).tolist()
        return result

    @torch.no_grad()
    def _logprobs(self, texts: list[str], answer: list[int]) -> Tensor:
        """log P(answer) after each text; padded on the right, where nothing looks at it."""
        rows = []
        for text in texts:
            own = self._ids(text)
            own = own[-self.room :] if self.room else own
            rows.append([*self.before, *own, *self.after, *answer])
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        table = self.model(**inputs).logits.float().log_softmax(-1).cpu()
        places = torch.tensor(
            [[len(row) - len(answer) + k for k in range(len(answer))] for row in rows]
        )
        wanted = torch.tensor(answer).expand(len(rows), -1)
        before = table.gather(1, (places - 1)[..., None].expand(-1, -1, table.shape[-1]))
        return before.gather(-1, wanted[..., None])[..., 0].sum(-1)
