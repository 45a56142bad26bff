"""What a judge may take: requests and tokens per minute, answers and money in all.

The limiters of aiolimiter belong to one event loop, and each batch has its own, so the pace is kept
here.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import Future

from rewards.judge_account import Account, Hold
from rewards.judge_cache import JudgeCache

log = logging.getLogger(__name__)


class Gate:
    """At most `count` inside at a time, of all threads and their event loops; first come, first in.

    An evaluation scores its batches in threads of their own.
    """

    def __init__(self, count: int):
        self.free, self.waiting, self.lock = count, deque[Future](), threading.Lock()

    async def __aenter__(self) -> None:
        with self.lock:
            if self.free:
                self.free -= 1
                return
            turn: Future = Future()
            turn.set_running_or_notify_cancel()  # so that only `_leave` ends it
            self.waiting.append(turn)
        try:
            await asyncio.wrap_future(turn)
        except asyncio.CancelledError:
            with self.lock:
                if turn in self.waiting:
                    self.waiting.remove(turn)
                else:  # its turn came as it was cancelled
                    self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        with self.lock:
            self._leave()

    def _leave(self) -> None:
        if self.waiting:
            self.waiting.popleft().set_result(None)
        else:
            self.free += 1


class RateLimiter:
    """Requests and tokens per minute, spread evenly; None is no limit."""

    def __init__(self, requests: int | None, tokens: int | None):
        self.requests, self.tokens = requests, tokens
        self.free = 0.0  # when the next request may start
        self.lock = threading.Lock()

    async def acquire(self, tokens: float) -> None:
        """Waits until a request of so many tokens may start."""
        seconds = max(
            60 / self.requests if self.requests else 0.0,
            60 * tokens / self.tokens if self.tokens else 0.0,
        )
        with self.lock:
            now = time.monotonic()
            start = max(now, self.free)
            self.free = start + seconds
        await asyncio.sleep(start - now)


class Budget:
    """Answers and their cost at `prices`, per million tokens in and out; None is no limit.

    `name` is the judge's, for the warning.
    """

    def __init__(
        self,
        max_calls: int | None,
        max_cost: float | None,
        prices: tuple[float, float],
        name: str,
    ):
        self.max_calls, self.max_cost, self.prices = max_calls, max_cost, prices
        self.name, self.warned = name, False

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6

    def hold(self, account: Account, cache: JudgeCache, tokens: tuple[float, float]) -> Hold | None:
        """A hold on one more answer; None where the budget is spent, which is warned of once.

        Answers had count, and those that anybody in this process awaits, at what they cost so far.
        """
        with account.lock:
            calls, *spent = cache.spent
            usual = self.cost(*spent) / calls if calls else 0.0
            # By their text alone answers are too cheap where a model thinks before it answers
            awaited = [max(self.cost(*hold.tokens), usual) for hold in account.holds]
            calls, cost = calls + len(awaited), self.cost(*spent) + sum(awaited)
            over = []
            if self.max_calls is not None and calls >= self.max_calls:
                over.append(f"MAX_CALLS {self.max_calls}")
            if self.max_cost is not None and cost >= self.max_cost:
                over.append(f"MAX_COST {money(self.max_cost)}")
            if not over:
                account.holds.add(hold := Hold(tokens))
                return hold
        if not self.warned:
            self.warned = True
            paid = f" that cost {money(cost)}" if any(self.prices) else ""
            under_way = f" ({len(awaited)} of them under way)" if awaited else ""
            log.warning(
                f"the budget of the judge {self.name!r} is spent: {' and '.join(over)} is used up "
                f"by {calls} answers{paid}{under_way}. What is not in {cache.path} is missing from "
                f"here on; raise {' and '.join(limit.split()[0] for limit in over)} to go on asking"
            )
        return None


def money(amount: float) -> str:
    """At least two digits after the point, and three that say something: 40.00, 0.000432."""
    digits = 2 if amount >= 0.1 or amount <= 0 else 2 - math.floor(math.log10(amount))
    return f"{amount:.{digits}f}"
