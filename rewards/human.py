"""Reward by people: what the run samples is labelled on the terminal or on a web page.

Labels are kept as they are given, and a completion that has one is not asked again. Which of a
batch are asked, for how long is waited, and what stands in for those that nobody labelled.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.balance import Scale
from rewards.desk import SCALES, Desk, Labeller, Question, agreement
from rewards.labels import Labels
from rewards.messages import Text, texts_of
from rewards.online import LAST, LEAST, OnlineHead

Column = Sequence[float | None]
AGREED_ON = 200  # labels that agreement is taken over


class HumanReward:
    """−1 to 1 by what people answer to `question`: bad or good, or 1 to 5; None if they skip.

    `where` is "terminal" or "web" (`host`, `port`, `token`: see web.py). The caller waits for all
    that are asked, or `timeout` seconds: what has no label then is missing. `ask` limits how many
    of a batch are asked to those on which the other rewards (`scores`) disagree most. With
    `reward_model` "online" a head that learns from the labels fills in for the missing, from the
    20th label on. Raises ValueError where people could not be asked.
    """

    after_others = True  # CompositeReward calls it with their scores

    def __init__(
        self,
        question: str = "Is this completion good?",
        *,
        scale: str = "binary",
        where: str = "terminal",
        host: str = "127.0.0.1",
        port: int = 8765,
        token_env: str | None = None,
        labels: str = "labels.sqlite",
        timeout: float | None = None,
        ask: int | None = None,
        reward_model: str | None = None,
    ):
        if scale not in SCALES:
            raise ValueError(f"the scale {scale!r} is not one of {', '.join(SCALES)}")
        if reward_model not in (None, "online"):
            raise ValueError(f'the reward model is "online" or none, not {reward_model!r}')
        self.timeout, self.limit, self.online = timeout, ask, reward_model == "online"
        self.labels = Labels(labels, question, scale)
        self.desk = Desk(self.labels, scale)
        # The last labels of this run, beside what the other rewards say
        self.compared: deque[tuple[float, dict[str, float]]] = deque(maxlen=AGREED_ON)
        self.labeller: Labeller
        if where == "terminal":
            from rewards.terminal import Terminal

            self.labeller = Terminal(self.desk, question)
        elif where == "web":
            from rewards.web import Page

            self.labeller = Page(self.desk, question, self.agreement, host, port, token_env)
        else:
            raise ValueError(f'where is "terminal" or "web", not {where!r}')

    async def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        scores: Mapping[str, Column] | None = None,
        log_metric: Callable[[str, float], Any] | None = None,
        log_extra: Callable[[str, list], Any] | None = None,
        **columns: Any,
    ) -> Column:
        """Asks, waits, and fills in. Raises Interrupted once `interrupt` is called."""
        prompts, completions = texts_of(prompts), texts_of(completions)
        keys = [self.labels.key(p, c) for p, c in zip(prompts, completions, strict=True)]
        others = dict(scores or {})
        head = self._head()
        opinions = list(others.values()) + ([head(completions)] if head else [])
        rows = [i for i in asking_order(opinions, len(keys)) if self.labels.find(keys[i]) is None]
        questions: dict[str, Question] = {}
        for i in rows:
            if self.limit is None or len(questions) < self.limit:
                said = {name: x for name, col in others.items() if (x := col[i]) is not None}
                question = Question(keys[i], prompts[i], completions[i], said)
                questions.setdefault(keys[i], question)
        if questions:
            self.labeller.start()
            await asyncio.to_thread(self.desk.ask, list(questions.values()), self.timeout)

        found = [self.labels.find(key) for key in keys]
        result = [None if label is None else label[0] for label in found]
        for key, question in questions.items():
            label = self.labels.find(key)
            if label and label[0] is not None:
                self.compared.append((label[0], question.scores))
        sources = ["nobody" if x is None else "people" for x in result]
        if head := self._head():
            guesses = head(completions)
            sources = ["head" if x is None else "people" for x in result]
            result = [y if x is None else x for x, y in zip(result, guesses, strict=True)]
        if log_metric:
            self._report(log_metric, len(questions), found, head)
        if log_extra:
            log_extra("labelled_by", sources)
        return result

    def _head(self) -> OnlineHead | None:
        """Learned from all labels that there are; None while they are too few."""
        known = self.labels.learned(LAST) if self.online else []
        return OnlineHead(*zip(*known, strict=True)) if len(known) >= LEAST else None

    def agreement(self) -> dict[str, float]:
        """Of each other reward, over this run's last labels: see desk.agreement."""
        last, result = list(self.compared), {}
        for name in {name for _, scores in last for name in scores}:
            both = [(label, scores[name]) for label, scores in last if name in scores]
            share = agreement(*zip(*both, strict=True))
            if share is not None:
                result[name] = share
        return dict(sorted(result.items()))

    def _report(
        self, log: Callable[[str, float], Any], asked: int, found: list, head: OnlineHead | None
    ) -> None:
        log("human/asked", asked)
        log("human/labelled", sum(label is not None for label in found) / len(found))
        for name, share in self.agreement().items():
            log(f"human/agreement/{name}", share)
        if head:
            log("human/head_error", head.error)
            log("human/head_error_of_mean", head.error_of_mean)
            log("human/head_slope", head.slope)

    def interrupt(self) -> None:
        """Ends all waiting: who waits gets Interrupted. May be called from a signal handler."""
        self.desk.close()

    def close(self) -> None:
        """Gives the terminal or the port back."""
        self.desk.close()
        self.labeller.close()


def asking_order(opinions: Sequence[Column], count: int) -> list[int]:
    """Rows 0 … count − 1, those first on which `opinions` disagree most.

    Disagreement is the variance of a row's ranks in each opinion, since scales differ. What fewer
    than two have an opinion of comes last, in the order of the batch.
    """
    ranks = [Scale("rank")(column, learn=False) for column in opinions]

    def disagreement(row: int) -> float:
        known = [x for column in ranks if (x := column[row]) is not None]
        mean = sum(known) / len(known) if known else 0.0
        if len(known) < 2:
            return -1.0
        return round(sum((x - mean) ** 2 for x in known) / len(known), 9)  # rounding is no order

    return sorted(range(count), key=disagreement, reverse=True)  # stable
