"""What a judge may take: requests and tokens per minute, answers and money in all.

The limiters of aiolimiter belong to one event loop, and each batch has its own, so the pace is kept
here.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rewards.judge_cache import JudgeCache

log = logging.getLogger(__name__)


class RateLimiter:
    """Requests and tokens per minute, spread evenly; None is no limit."""

    def __init__(self, requests: int | None, tokens: int | None):
        self.requests, self.tokens = requests, tokens
        self.free = 0.0  # when the next request may start

    async def acquire(self, tokens: float) -> None:
        """Waits until a request of so many tokens may start."""
        seconds = max(
            60 / self.requests if self.requests else 0.0,
            60 * tokens / self.tokens if self.tokens else 0.0,
        )
        now = time.monotonic()
        start = max(now, self.free)
        self.free = start + seconds
        await asyncio.sleep(start - now)


class Budget:
    """Answers and their cost at `prices`, per million tokens in and out; None is no limit."""

    def __init__(self, max_calls: int | None, max_cost: float | None, prices: tuple[float, float]):
        self.max_calls, self.max_cost, self.prices = max_calls, max_cost, prices
        self.in_flight_cost: list[float] = []  # about, of each answer that is awaited
        self.warned = False

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6

    @contextmanager
    def in_flight(self, cost: float) -> Iterator[None]:
        """Counts one answer as awaited."""
        self.in_flight_cost.append(cost)
        try:
            yield
        finally:
            self.in_flight_cost.remove(cost)

    def is_spent(self, cache: JudgeCache, where: object) -> bool:
        """Whether answers had, and those that are awaited, use it up; warns of it once."""
        calls, *tokens = cache.spent
        cost = self.cost(*tokens)
        over = self.max_calls is not None and calls + len(self.in_flight_cost) >= self.max_calls
        over |= self.max_cost is not None and cost + sum(self.in_flight_cost) >= self.max_cost
        if over and not self.warned:
            self.warned = True
            log.warning(
                "the judge's budget is spent (%d calls, %.2f): what is not in %s is missing from "
                "here on",
                calls,
                cost,
                where,
            )
        return over
