"""What samples.jsonl says of a run, counted in one pass: lengths, prompts, how rewards differ."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby
from operator import itemgetter

from adaptiverl.commands.curves import Row, Run
from adaptiverl.rl.chat import readable

ALL_PROMPTS = 10_000  # that are told apart; a run with more has enough


@dataclass
class SampleFacts:
    """`count` completions, and what was seen in them."""

    count: int = 0
    steps: int = 0
    odd: list[int] = field(default_factory=list)  # lines without step, prompt or completion
    empty: int = 0  # of one token at most: only the end
    too_large: int = 0  # with scores, and without a reward: their sum is left out
    prompts: Counter[str] = field(default_factory=Counter)
    constant: Counter[str] = field(default_factory=Counter)  # steps in which a reward is the same
    correlations: dict[tuple[str, str], float] = field(default_factory=dict)  # within prompts
    inner: Counter[int] = field(default_factory=Counter)  # completions with this token before their
    # last: an end-of-text token there ended nothing


def facts_of(run: Run, end_ids: Sequence[int]) -> SampleFacts:
    """Of all rows of samples.jsonl; `end_ids` are tokens that should end a completion."""
    facts, names = SampleFacts(), [reward["NAME"] for reward in run.rewards]
    size = run.config.get("NUM_GENERATIONS", 1)
    pairs = {pair: _Correlation() for pair in combinations(names, 2)}
    for rows in steps_of(run, facts.odd):
        facts.steps += 1
        for row in rows:
            ids = row.get("completion_ids", [])
            facts.count += 1
            facts.empty += len(ids) <= 1
            scored = any(row.get(f"rewards/{name}") is not None for name in names)
            facts.too_large += scored and row.get("reward") is None
            facts.inner.update({token for token in end_ids if token in ids[:-1]})
            if len(facts.prompts) < ALL_PROMPTS:
                facts.prompts[readable(row["prompt"])] += 1
        columns = {name: [row.get(f"rewards/{name}") for row in rows] for name in names}
        for name, column in columns.items():
            known = {value for value in column if value is not None}
            facts.constant[name] += len(known) == 1 and len(column) > 1
        alike = size if size > 1 else len(rows)  # neighbours of one prompt, else the whole step
        parts = [slice(start, start + alike) for start in range(0, len(rows), alike)]
        for (a, b), pair in pairs.items():
            for part in parts:
                pair.add(columns[a][part], columns[b][part])
    facts.correlations = {names: pair.value() for names, pair in pairs.items()}
    return facts


def steps_of(run: Run, odd: list[int] | None = None) -> Iterator[list[Row]]:
    """The rows of samples.jsonl, step by step; `odd` is that of `Run.samples`."""
    for _, rows in groupby(run.samples(odd), key=itemgetter("step")):
        yield list(rows)


class _Correlation:
    """Of two rewards within prompts, gathered over a run."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)

    def add(self, a: Sequence[float | None], b: Sequence[float | None]) -> None:
        known = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        if len(known) < 2:
            return
        mean_a, mean_b = (sum(column) / len(known) for column in zip(*known, strict=True))
        for x, y in known:
            self.sums["aa"] += (x - mean_a) ** 2
            self.sums["bb"] += (y - mean_b) ** 2
            self.sums["ab"] += (x - mean_a) * (y - mean_b)

    def value(self) -> float:
        """0 where one of them never differs."""
        norm = math.sqrt(self.sums["aa"] * self.sums["bb"])
        return self.sums["ab"] / norm if norm else 0.0
