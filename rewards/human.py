"""Reward by people: what the run samples is labelled on the terminal or on a web page.

Labels are kept as they are given, and a completion that has one is not asked again. Here stands
which completions of a batch are asked, how long the run waits, and what stands in for a label that
nobody gave.
"""

import asyncio
import importlib.util
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from rewards.base import Place, Reward, require
from rewards.label_queue import FrontEnd, LabelQueue, Question
from rewards.labels import Labels
from rewards.messages import Texts, encodable, texts_of, transcripts_of

if TYPE_CHECKING:  # numpy, which a config is validated without
    from rewards.head import RidgeHead

Column = Sequence[float | None]
AGREEMENT_WINDOW = 200  # labels that agreement is taken over


class HumanReward(Reward):
    """What people answer to QUESTION about the completion, −1 to 1; missing where they skip it.

    The caller waits for all that are asked, or TIMEOUT seconds: what has no label then is missing.
    With REWARD_MODEL "online" a head that learns from the labels fills in for the missing, from the
    20th label on. Starting it raises ValueError where people could not be asked.
    """

    external: ClassVar[bool] = True
    counts: ClassVar[frozenset[str]] = frozenset({"asked"})
    one_process: ClassVar[bool] = True
    free_keys: ClassVar[frozenset[str]] = frozenset({
        "TIMEOUT", "WHERE", "HOST", "PORT", "TOKEN_ENV", "LABELS"
    })  # fmt: skip

    type: Literal["human"] = "human"
    question: str = Field("Is this completion good?", description="What people are asked")
    scale: Literal["binary", "1-5"] = Field("binary", description="Their answers: − and +, or 1-5")
    where: Literal["terminal", "web"] = Field("terminal", description="How they are asked")
    host: str = Field("127.0.0.1", description="Address that the web page is at")
    port: int = Field(8765, ge=0, lt=65536, description="Its port; 0: any that is free")
    token_env: str | None = Field(None, description="Variable with its token; null: random")
    labels: Place = Field("labels.sqlite", description="Where labels are kept")
    timeout: float | None = Field(
        None, gt=0, description="Seconds to wait for a batch's labels; null: until all are there"
    )
    ask: int | None = Field(None, ge=1, description="Of a batch, those most disputed; null: all")
    reward_model: Literal["online"] | None = Field(
        None, description='"online": a head that learns from the labels fills in for the missing'
    )
    _labels: Labels
    _queue: LabelQueue
    _front_end: FrontEnd
    # The last labels of this run by key, beside the scores of the other rewards
    _compared: dict[str, tuple[float, dict[str, float]]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _page_keys(self) -> "HumanReward":
        if self.where == "terminal" and (web := self.changed() & {"HOST", "PORT", "TOKEN_ENV"}):
            raise ValueError(f"{', '.join(sorted(web))} needs WHERE web")
        return self

    def _load(self, device: Any) -> None:
        self._labels = Labels(self.labels, self.question, self.scale)
        with ExitStack() as unless_loaded:
            unless_loaded.callback(self._labels.close)
            self._show()
            unless_loaded.pop_all()

    def _show(self) -> None:
        """Makes the queue and what people see it by."""
        self._queue = LabelQueue(self._labels, self.scale)
        self._compared = {}
        if self.where == "terminal":
            if importlib.util.find_spec("termios") is None:  # on Windows
                raise ValueError(
                    'this system has no termios, which reads single keys; "WHERE": "web" needs none'
                )
            from rewards.terminal import Terminal

            self._front_end = Terminal(self._queue, self.question)
        else:
            require("web", "fastapi", "uvicorn")
            from rewards.web import Page  # a second to import

            self._front_end = Page(
                self._queue, self.question, self.agreement, self.host, self.port, self.token_env
            )

    @property
    def after_others(self) -> bool:
        return True

    @property
    def uses_terminal(self) -> bool:
        return self.where == "terminal"

    @property
    def queue(self) -> LabelQueue:
        """What is asked, and where answers are given; starts the reward."""
        self.start()
        return self._queue

    @property
    def front_end(self) -> FrontEnd:
        """The terminal or the page that shows the queue; starts the reward."""
        self.start()
        return self._front_end

    async def __call__(
        self,
        prompts: Texts,
        completions: Texts,
        *,
        scores: Mapping[str, Column] | None = None,
        log_metric: Callable[[str, float], Any] | None = None,
        log_extra: Callable[[str, list], Any] | None = None,
        trainer_state: Any = None,
        **columns: Any,
    ) -> Column:
        """Asks, waits, and fills in. Raises Interrupted once `interrupt` is called.

        A step that a resumed run repeats asks for the completions that it asked for before, and
        sees no label of a later step: its numbers are those of a run that was never ended.
        """
        from rewards.opinions import asking_order

        self.start()
        answers = [not isinstance(prompt, str) for prompt in prompts]
        prompts = encodable(transcripts_of(prompts))
        completions = encodable(texts_of(completions))
        keys = [self._labels.key(p, c) for p, c in zip(prompts, completions, strict=True)]
        others = dict(scores or {})
        batch, first, ended = self._labels.batch(getattr(trainer_state, "global_step", None), keys)
        head = self._head(first)
        opinions = list(others.values()) + ([head(completions)] if head else [])
        asked: dict[str, Question] = {}
        for i in asking_order(opinions, len(keys)):
            known = self._labels.find(keys[i], first) is not None
            if not known and (self.ask is None or len(asked) < self.ask):
                given = {name: x for name, col in others.items() if (x := col[i]) is not None}
                question = Question(keys[i], prompts[i], completions[i], given, answers[i])
                asked.setdefault(keys[i], question)
        if ended is None:
            left = [question for key, question in asked.items() if self._labels.find(key) is None]
            if left:
                self._front_end.start()
                await asyncio.to_thread(self._queue.ask, left, self.timeout)
            ended = self._labels.end(batch)

        found = [self._labels.find(key, ended if key in asked else first) for key in keys]
        result = [None if label is None else label[0] for label in found]
        for key, question in asked.items():
            label = self._labels.find(key, ended)
            if label and label[0] is not None:
                self._compared[key] = label[0], question.scores
        for key in list(self._compared)[:-AGREEMENT_WINDOW]:
            self._compared.pop(key, None)  # batches of an evaluation are scored at once
        sources = ["nobody" if x is None else "people" for x in result]
        if head := self._head(first, asked, ended):
            guesses = head(completions)
            sources = ["head" if x is None else "people" for x in result]
            result = [y if x is None else x for x, y in zip(result, guesses, strict=True)]
        if log_metric:
            self._report(log_metric, len(asked), found, head)
        if log_extra:
            default = self.name == self._default_name()
            log_extra("labelled_by" if default else f"{self.name}/labelled_by", sources)
        return result

    def _head(
        self, until: float, also: Collection[str] = (), ended: float = math.inf
    ) -> "RidgeHead | None":
        """Learned from the labels until then, and until `ended` of `also`; None of too few."""
        from rewards.head import MAX_LABELS, MIN_LABELS, RidgeHead

        if self.reward_model != "online":
            return None
        known = self._labels.learned(MAX_LABELS, until, also, ended)
        return RidgeHead(*zip(*known, strict=True)) if len(known) >= MIN_LABELS else None

    def agreement(self) -> dict[str, float]:
        """Of each other reward, over this run's last labels: see opinions.agreement."""
        from rewards.opinions import agreement

        last, result = list(self._compared.values()), {}
        for name in {name for _, scores in last for name in scores}:
            both = [(label, scores[name]) for label, scores in last if name in scores]
            share = agreement(*zip(*both, strict=True))
            if share is not None:
                result[name] = share
        return dict(sorted(result.items()))

    def _report(
        self, log: Callable[[str, float], Any], asked: int, found: list, head: "RidgeHead | None"
    ) -> None:
        log(f"{self.name}/asked", asked)
        labelled = [label for label in found if label and label[0] is not None]  # not skipped
        log(f"{self.name}/labelled", len(labelled) / len(found))
        for name, share in self.agreement().items():
            log(f"{self.name}/agreement/{name}", share)
        if head:
            log(f"{self.name}/head_error", head.error)
            log(f"{self.name}/head_error_of_mean", head.error_of_mean)
            log(f"{self.name}/head_slope", head.slope)

    def state_dict(self) -> dict[str, Any]:
        return {"compared": [[key, *each] for key, each in self._compared.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start()
        self._compared = {key: (label, scores) for key, label, scores in state["compared"]}

    def lost_labels(self) -> str | None:
        """What LABELS lacks of the labels that `load_state_dict` was given; None: nothing."""
        gone = sum(self._labels.find(key) is None for key in self._compared)
        if not gone:
            return None
        return (
            f"{self.name!r}: {gone} of the last {len(self._compared)} labels of this run are not "
            f"in its LABELS {self.labels}. Put their file back, or set LABELS to it, and resume "
            "again"
        )

    def interrupt(self) -> None:
        if self._started:
            self._queue.close()

    def close(self) -> None:
        if self._started:
            self._queue.close()
            self._front_end.close()
            self._labels.close()
