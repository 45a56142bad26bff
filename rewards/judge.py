"""Reward by a judge: a chat model behind any OpenAI-compatible endpoint.

The declaration, and what scores become of its answers; how it is asked is judge_asking.py's. A
judgement that fails is missing (None), never 0. A judge in this process, without network:
local_judge.py.
"""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import permutations
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from rewards.base import KEYS, Column, Interrupted, Place, Reward, require
from rewards.endpoint import KEY_ENV, PATH, secret
from rewards.judge_account import account_of
from rewards.judge_asking import Asker, Batch
from rewards.judge_cache import JudgeCache
from rewards.judge_limits import Budget, Gate, RateLimiter, money
from rewards.judge_prompt import JudgePrompt
from rewards.messages import Texts, texts_of, transcripts_of


class JudgeExample(BaseModel):
    """A judged text that the judge is shown."""

    model_config = KEYS
    prompt: str
    completion: str
    score: float


class JudgeReward(Reward):
    """A chat model's score of the completion by a rubric, 0 to 1, or its share of wins.

    The model answers on the scale LOW to HIGH. PAIRWISE compares the completions of one prompt with
    each other, in both orders; ties count half, and a pair of which one order has no answer does
    not count. Retries follow a rate limit, a server's error, a lost connection or an answer that is
    not exactly what was asked for; waiting honours Retry-After, up to MAX_WAIT. A request that is
    rejected (400, 413, 422: a text that a filter stops, or one that is too long) is missing and not
    tried again; where all of a batch are, and where the key, model or address is wrong,
    FatalJudgeError is raised. Rate limits hold for all tries, MAX_CALLS and MAX_COST for all runs
    of the same model, address and rubric that share CACHE: beyond, completions are missing, and
    that is logged once. Rewards of one process that use the same judge count what all of them have
    under way, and ask nothing twice. (The last answer may cost more than was left, and other
    processes do not see what one has under way.) Where the server does not say how many tokens it
    took, they are estimated. What a call took is reported as the metrics NAME/calls, /retries,
    /cached and, with PRICES, /cost.
    """

    external: ClassVar[bool] = True
    counts: ClassVar[frozenset[str]] = frozenset({"calls", "retries", "cached", "rejected", "cost"})
    training_keys: ClassVar[frozenset[str]] = Reward.training_keys | {"MAX_MISSING"}
    free_keys: ClassVar[frozenset[str]] = frozenset({
        "BASE_URL", "KEY_ENV", "CONCURRENCY", "REQUESTS_PER_MINUTE", "TOKENS_PER_MINUTE", "TIMEOUT",
        "RETRIES", "BACKOFF", "MAX_WAIT", "CACHE", "MAX_CALLS", "MAX_COST", "PRICES", "MAX_MISSING",
    })  # fmt: skip

    type: Literal["judge"] = "judge"
    model: str = Field(description="Name of the model at the endpoint")
    rubric: str = Field(min_length=1, description="What is to be judged, in words")
    low: float = Field(1.0, description="Worst score of the scale that is asked for")
    high: float = Field(10.0, description="Best score of that scale")
    examples: list[JudgeExample] = Field([], description="Judged texts to show the model")
    pairwise: bool = Field(False, description="Compare completions of a prompt: share of wins")
    base_url: str | None = Field(
        None, pattern="^https?://", description="OpenAI-compatible endpoint; OpenAI's if null"
    )
    key_env: str = Field(
        KEY_ENV,
        description="Environment variable that holds the key; a server on this machine needs none",
    )
    structured: bool = Field(True, description="Ask for JSON by response_format")
    concurrency: int = Field(16, ge=1, description="Requests at a time")
    requests_per_minute: int | None = Field(None, ge=1, description="Of all tries")
    tokens_per_minute: int | None = Field(None, ge=1, description="Of all tries")
    timeout: float = Field(30.0, gt=0, description="Seconds of one try, as a whole")
    retries: int = Field(5, ge=0, description="Further tries after one that failed")
    backoff: float = Field(
        0.5, ge=0, description="Seconds before the second try, at most; doubled for each further"
    )
    max_wait: float = Field(
        60.0, ge=0, description="Most seconds between two tries, whatever the server asks for"
    )
    cache: Place = Field(
        "judge.sqlite",
        description="Where judgements and costs are kept: a file that several runs may share",
    )
    max_calls: int | None = Field(
        None, ge=0, description="Answers paid for, in all runs of this judge that share CACHE"
    )
    max_cost: float | None = Field(None, ge=0, description="Their cost at PRICES")
    prices: tuple[float, float] = Field((0, 0), description="Of 1e6 tokens, in and out")
    max_missing: float = Field(0.5, ge=0, le=1, description="Beyond this share a run pauses")
    _asker: Asker
    _totals: Counter  # of all calls
    _running: set[tuple[asyncio.AbstractEventLoop, asyncio.Task]]
    _stopped: bool = False

    @model_validator(mode="after")
    def _scale(self) -> "JudgeReward":
        if self.pairwise and (scale := self.changed() & {"LOW", "HIGH", "EXAMPLES"}):
            raise ValueError(f"{', '.join(sorted(scale))} is for scores; PAIRWISE compares")
        if not self.low < self.high:
            raise ValueError(f"the scale's LOW {self.low:g} is not below its HIGH {self.high:g}")
        if self.max_cost is not None and not any(self.prices):
            raise ValueError("MAX_COST needs the PRICES of a million tokens, in and out")
        if self.base_url and self.base_url.rstrip("/").endswith(PATH):
            raise ValueError(f"BASE_URL ends in {PATH}, which is added to it: leave that off")
        return self

    def _load(self, device: Any) -> None:
        require("judge", "openai")
        secret(self.key_env, self.base_url)  # raises where there is none
        JudgeCache(Path(self.cache), self._account).close()  # and where it is no such file
        self._asker = Asker(
            self.model,
            JudgePrompt(
                self.rubric, self.low, self.high, self._examples(), self.pairwise, self.structured
            ),
            RateLimiter(self.requests_per_minute, self.tokens_per_minute),
            Budget(self.max_calls, self.max_cost, self.prices, self.name),
            key_env=self.key_env,
            base_url=self.base_url,
            gate=Gate(self.concurrency),
            timeout=self.timeout,
            retries=self.retries,
            backoff=self.backoff,
            max_wait=self.max_wait,
        )
        self._totals, self._running = Counter(), set()

    @property
    def _account(self) -> str:
        return json.dumps([self.model, self.base_url, self.rubric])

    def _examples(self) -> list[dict[str, Any]]:
        return [example.model_dump(by_alias=False) for example in self.examples]

    @property
    def trouble(self) -> str:
        """What the last request that failed met; empty if none has."""
        return self._asker.trouble if self._started else ""

    @property
    def compares(self) -> bool:
        return self.pairwise

    def why_pause(self, missing: float) -> str | None:
        if missing <= self.max_missing:
            return None
        return (
            f"{missing:.0%} of the judgements of {self.name!r} are missing, more than its "
            f"MAX_MISSING of {self.max_missing:.0%}; the last: {self.trouble or 'unknown here'}"
        )

    async def __call__(
        self,
        prompts: Texts,
        completions: Texts,
        *,
        log_metric: Callable[[str, float], Any] | None = None,
        **columns: Any,
    ) -> Column:
        """One request for each different completion that the cache does not have.

        Raises FatalJudgeError, and Interrupted once `interrupt` is called.
        """
        self.start()
        prompts, completions = transcripts_of(prompts), texts_of(completions)
        path = Path(self.cache).resolve()
        with self._interruptible(), closing(JudgeCache(path, self._account)) as cache:
            batch = Batch(cache, account_of(path, self._account))
            try:
                if self.pairwise:
                    result = await self._compare(prompts, completions, batch)
                else:
                    texts = zip(prompts, completions, strict=True)
                    found = await self._answers([{"prompt": p, "text": c} for p, c in texts], batch)
                    span = self.high - self.low
                    result = [None if x is None else (x - self.low) / span for x in found]
            finally:
                counts = batch.counts(with_cost=any(self.prices))
                self._totals.update(counts)
        if log_metric:
            for what, value in counts.items():
                log_metric(f"{self.name}/{what}", value)
        return result

    def interrupt(self) -> None:
        self._stopped = True
        if not self._started:
            return
        self._asker.stopped = True
        for loop, task in list(self._running):
            with suppress(RuntimeError):  # its loop has just ended
                loop.call_soon_threadsafe(task.cancel)

    def close(self) -> None:
        """Ends all waiting, and prints what was asked and where the answers are."""
        self.interrupt()
        if self._started and self._totals:
            counts = ", ".join(
                f"cost {money(value)}" if what == "cost" else f"{value} {what}"
                for what, value in self._totals.items()
            )
            print(f"{self.name}: {counts}; judgements are kept in {Path(self.cache).resolve()}")

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        task = asyncio.current_task()
        assert task, "called in a task, as every coroutine is"
        here = (asyncio.get_running_loop(), task)
        self._running.add(here)
        try:
            if self._stopped:
                raise Interrupted("stopped while a judge was asked")
            yield
        except asyncio.CancelledError:
            if not self._stopped:
                raise
            raise Interrupted("stopped while a judge was asked") from None
        finally:
            self._running.discard(here)

    async def _compare(
        self, prompts: Sequence[str], completions: Sequence[str], batch: Batch
    ) -> Column:
        groups: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(row)
        pairs = [pair for rows in groups.values() for pair in permutations(rows, 2)]
        cases = [{"prompt": prompts[a], "A": completions[a], "B": completions[b]} for a, b in pairs]
        points: list[list[float]] = [[] for _ in prompts]
        won = dict(zip(pairs, await self._answers(cases, batch), strict=True))
        for (a, b), first in won.items():
            # One order alone would count that the judge prefers a place, not a text
            if first is not None and won[b, a] is not None:
                points[a].append(first)
                points[b].append(1 - first)
        return [sum(own) / len(own) if own else None for own in points]

    async def _answers(self, cases: list[dict[str, str]], batch: Batch) -> Column:
        return await self._asker.answers([self._key(case) for case in cases], cases, batch)

    def _key(self, case: dict[str, str]) -> str:
        scale = [self.low, self.high, self._examples()]
        asked = json.dumps([self.model, self.base_url, self.rubric, *scale, case], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()
