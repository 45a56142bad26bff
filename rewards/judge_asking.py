"""How a judge is asked: concurrently, within its limits, with retries, and each answer kept.

Every case is a request of its own; answers go to the cache as they come, so none is paid for twice.
What is asked, and what becomes of the answers, is judge.py's; one request is endpoint.py's.
"""

import asyncio
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

from rewards.base import Column, FatalJudgeError
from rewards.endpoint import Reply, ask, secret
from rewards.judge_account import Account, Hold, Outcome
from rewards.judge_cache import JudgeCache
from rewards.judge_limits import Budget, Gate, RateLimiter
from rewards.judge_prompt import JudgePrompt, token_count

log = logging.getLogger(__name__)
ANSWER_TOKENS = 10  # of one answer, about
LONG_WAIT = 10.0  # seconds: a server that asks for more is named in the log
GRACE = 1.0  # seconds that answers under way have left once the run is to stop


@dataclass
class Batch:
    """What one call of a judge has asked, and what came of it."""

    cache: JudgeCache
    account: Account
    under_way: dict[str, asyncio.Task] = field(default_factory=dict)  # tries, by key
    shared: set[str] = field(default_factory=set)  # keys that somebody else asked meanwhile
    calls: int = 0
    retries: int = 0
    cached: int = 0
    rejected: int = 0
    ended: bool = False  # nothing more is to be asked
    cost: float = 0.0
    warned: bool = False  # that a server asks for a long wait

    def has_answered(self) -> bool:
        """Whether the endpoint has answered before: then its address is right."""
        return self.cache.spent[0] > 0

    def counts(self, with_cost: bool) -> dict[str, float]:
        """What the call took."""
        counts = {"calls": self.calls, "retries": self.retries, "cached": self.cached}
        rejected = {"rejected": self.rejected} if self.rejected else {}
        return counts | rejected | ({"cost": self.cost} if with_cost else {})


@dataclass
class Asker:
    """Asks one model at one endpoint; arguments are the keys of JudgeReward."""

    model: str
    prompt: JudgePrompt
    rate: RateLimiter
    budget: Budget
    key_env: str
    base_url: str | None
    gate: Gate  # of CONCURRENCY requests at a time
    timeout: float
    retries: int
    backoff: float
    max_wait: float
    trouble: str = ""  # what the last request that failed met
    stopped: bool = False  # whether the run is to stop: answers under way have GRACE
    chance: Random = field(default_factory=Random)  # its own: a run must not depend on a network

    async def answers(
        self, keys: Sequence[str], cases: Sequence[dict[str, str]], batch: Batch
    ) -> Column:
        """The answer to each case, under its key in the cache; None where there is none."""
        from openai import AsyncOpenAI

        missing = {
            key: case for key, case in zip(keys, cases, strict=True) if batch.cache.get(key) is None
        }
        batch.account.readable |= any(key not in missing for key in keys)
        async with AsyncOpenAI(
            api_key=secret(self.key_env, self.base_url),
            base_url=self.base_url,
            timeout=self.timeout,
            max_retries=0,  # ours, so that limits and budget count every try
        ) as client:

            async def one(key: str, case: dict[str, str]) -> None:
                while True:
                    async with self.gate:
                        if (other := batch.account.claim(key)) is None:
                            await self._claimed(client, key, case, batch)
                            return
                    outcome, trouble = await asyncio.wrap_future(other)
                    if outcome != "dropped":
                        break
                self.trouble = trouble or self.trouble
                batch.rejected += outcome == "rejected"
                if outcome == "answered":
                    batch.shared.add(key)

            tasks = [asyncio.ensure_future(one(key, case)) for key, case in missing.items()]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                with suppress(TimeoutError):  # what is under way is paid for: it is booked
                    async with asyncio.timeout(GRACE if self.stopped else self.timeout):
                        await asyncio.gather(*batch.under_way.values(), return_exceptions=True)
                batch.cached = sum(key not in missing or key in batch.shared for key in keys)
        in_all = set.intersection(*(set(case.values()) for case in missing.values() or [{}]))
        text = in_all and batch.has_answered()  # it may be what all have in common
        if batch.rejected and batch.rejected == len(set(keys)) and not text:
            hint = ". If the server has no response_format, set STRUCTURED false"
            raise FatalJudgeError(
                f"the judge rejects every request; the last: {self.trouble}"
                f"{hint * self.prompt.structured}"
            )
        return [batch.cache.get(key) for key in keys]

    async def _claimed(self, client: Any, key: str, case: dict[str, str], batch: Batch) -> None:
        """Asks for those who wait for the same, too; however it ends, they hear of it."""
        outcome: Outcome = "dropped"
        try:
            if batch.cache.get(key) is not None:  # it has come since
                outcome = "answered"
                batch.shared.add(key)
            else:
                outcome = await self._judge(client, key, case, batch)
        finally:
            trying, account = batch.under_way.get(key), batch.account
            if trying:  # this task was cancelled, and what is paid for may still come
                trying.add_done_callback(lambda _: account.settle(key, "dropped"))
            else:
                failed = outcome in ("failed", "rejected")
                account.settle(key, outcome, self.trouble if failed else "")

    async def _judge(self, client: Any, key: str, case: dict[str, str], batch: Batch) -> Outcome:
        """Asks until there is an answer that is kept, tries are used up, or the budget is.

        By hand, because tenacity would have to be told of the budget, of the batch's end and of the
        wait that the server asks for, which is all that there is to it.
        """
        request, account = self.prompt.request(self.model, case), batch.account
        about = token_count(request), ANSWER_TOKENS
        for attempt in range(self.retries + 1):
            hold = self.budget.hold(account, batch.cache, about)
            if hold is None:
                self.trouble = "its budget is spent"
                return "dropped"
            tried = await self._attempt(client, key, request, hold, batch)
            if tried is None:
                return "dropped"
            batch.retries += attempt > 0
            reply, answer = tried
            if answer is not None:
                return "answered"
            self.trouble = reply.fault or self._unreadable(reply.text)
            if reply.kind == "refused":
                batch.ended = True
                raise FatalJudgeError(self.trouble.replace("it answered", "the judge answers", 1))
            if reply.kind == "foreign" and not batch.has_answered():
                batch.ended = True
                raise FatalJudgeError(f"{self.trouble}: is BASE_URL right?")
            if reply.kind == "rejected":
                batch.rejected += 1
                return "rejected"
            if attempt < self.retries and not self._hopeless(reply, account):
                await asyncio.sleep(self._wait(attempt, reply, batch))
            if self._hopeless(reply, account):
                break
        if account.is_hopeless and account.first_time("hopeless"):
            log.warning(
                f"the judge {self.budget.name!r} has given no answer yet that can be read: such "
                f"answers are not asked for again; the last: {self.trouble}"
            )
        return "failed"

    async def _attempt(
        self, client: Any, key: str, request: dict[str, Any], hold: Hold, batch: Batch
    ) -> tuple[Reply, float | None] | None:
        """One try, which goes on where this task is cancelled; None: nothing is asked any more."""
        trying: asyncio.Task | None = None

        def ended(_: Any = None) -> None:
            batch.account.release(hold)
            batch.under_way.pop(key, None)

        try:
            await self.rate.acquire(hold.tokens[0])
            if batch.ended:
                return None
            trying = batch.under_way[key] = asyncio.ensure_future(
                self._try(client, key, request, hold, batch)
            )
            trying.add_done_callback(ended)
            return await asyncio.shield(trying)
        finally:
            if trying is None or trying.done():
                ended()

    def _hopeless(self, reply: Reply, account: Account) -> bool:
        return reply.kind == "answer" and account.is_hopeless

    def _unreadable(self, text: str) -> str:
        asked = self.prompt.structured
        change = "the server may ignore STRUCTURED;" if asked else "set STRUCTURED,"
        return (
            f"its answer was {text[:60]!r}, and nothing but {self.prompt.form} is read: {change} "
            "say so in RUBRIC, or choose another MODEL"
        )

    def _wait(self, attempt: int, reply: Reply, batch: Batch) -> float:
        """Seconds before the next try."""
        backoff = min(self.backoff * 2**attempt, 30.0) * self.chance.uniform(0.5, 1.0)
        wait = min(max(reply.wait, backoff), self.max_wait)
        if reply.wait > LONG_WAIT and not batch.warned:
            batch.warned = True
            log.warning(
                f"the judge asks for {reply.wait:.0f} s before it is asked again, and gets "
                f"{wait:.0f}: {self.trouble}"
            )
        return wait

    async def _try(
        self, client: Any, key: str, request: dict[str, Any], hold: Hold, batch: Batch
    ) -> tuple[Reply, float | None]:
        """One try; an answer is booked before anything else happens."""
        reply = await ask(client, request, self.timeout)
        if reply.kind != "answer":
            return reply, None
        answer, account = self.prompt.parse(reply.text), batch.account
        tokens_in, tokens_out = reply.tokens
        if None in reply.tokens and any(self.budget.prices) and account.first_time("estimated"):
            log.warning(
                f"the server of the judge {self.budget.name!r} does not say how many tokens it "
                "took: its cost is estimated, at four letters a token"
            )
        if tokens_in is None:
            tokens_in = math.ceil(hold.tokens[0])
        if tokens_out is None:
            tokens_out = max(ANSWER_TOKENS, math.ceil(len(reply.text) / 4))
        with account.lock:  # or the answer would count twice for a moment, as had and as awaited
            batch.cache.add(key, answer, tokens_in, tokens_out)
            account.release(hold)
        account.read(key, answer is not None)
        batch.calls += 1
        batch.cost += self.budget.cost(tokens_in, tokens_out)
        return reply, answer
