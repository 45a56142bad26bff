"""Scales, weights over time, and who pulls how hard in a composite."""

import asyncio
import logging
import math
import statistics
import threading
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl, without_clock
from hypothesis import given
from hypothesis import strategies as st

from adaptiverl.rl.reinforce import BASELINES, advantages
from rewards import CompositeReward
from rewards.balance import (
    MEMORY,
    WARN_AFTER,
    Scale,
    correlations,
    filled,
    shares,
    weight_at,
)
from rewards.scores import as_list, as_tensor


def column(*scores: float | None) -> torch.Tensor:
    """[B]; None is missing."""
    return as_tensor([scores], len(scores))[:, 0]


def table(**columns: list[float | None]) -> torch.Tensor:
    """[B, R]"""
    return as_tensor(list(columns.values()), len(next(iter(columns.values()))))


def scaled(scale: Scale, scores: list[float | None], learn: bool = True) -> list[float | None]:
    return as_list(scale(column(*scores), learn))


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0.5, [0.5, 0.5, 0.5, 0.5]),
        ([(0, 1.0), (10, 0.0)], [1.0, 0.9, 0.5, 0.0]),
        ([(1, 2.0), (5, 2.0), (10, 4.0)], [2.0, 2.0, 2.0, 4.0]),
        ([(3, 7.0)], [7.0, 7.0, 7.0, 7.0]),
    ],
)
def test_weights_over_time(weight, expected):
    assert [weight_at(weight, step) for step in (0, 1, 5, 30)] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["zscore", "rank"])
def test_a_fixed_scale_is_that_of_the_first_batch_that_differs(kind):
    """So that an evaluation can be compared with one before, as what is trained on cannot."""
    scale = Scale(kind, clip=(-9, 9))
    before = scale.fixed(column(1.0, 3.0, None))
    assert as_list(before) == [-1, 1, None], "no batch was learned from: by itself"
    for batch in ([5.0, 5.0], [10.0, 14.0, None], [100.0, 300.0]):
        scaled(scale, batch)
    assert as_list(scale.fixed(column(10.0, 12.0, None, 16.0, 99.0))) == [-1, 0, None, 2, 9]
    moved = as_list(scale(column(10.0, 12.0), learn=False))
    assert moved != [-1, 0], "what is trained on has another scale by now"
    assert as_list(Scale("none", (0, 2)).fixed(column(1.0, 7.0))) == [1, 2]


def test_a_scale_of_an_earlier_version_stays_the_run_s():
    """Its state has the running moments alone."""
    scale = Scale("zscore", state={"weight": 20.0, "mean": 10.0, "square": 104.0})
    assert as_list(scale.fixed(column(10.0, 14.0))) == [0, 2]
    scaled(scale, [100.0, 300.0])
    assert as_list(scale.fixed(column(10.0, 14.0))) == [0, 2], "after it has gone on, too"


def test_a_measured_sum_has_the_last_weights_and_the_fixed_scale():
    composite = CompositeReward(
        {"raw": constant([]), "ranked": constant([])},
        weights={"raw": [(1, 0.0), (4, 2.0)]},
        scales={"ranked": Scale("rank")},
    )
    scores = table(raw=[1.0, 2.0, None, None], ranked=[0.0, 4.0, None, 0.0])
    assert as_list(composite.combine(scores, 1)) == pytest.approx([-0.5, 1.0, None, -0.5])
    told = composite.balance(scores, 1, 1)
    # Raw: 2 · (1, 2, their mean); ranked: (0 − 4/3, 4 − 4/3) over the deviation of 0, 4, 0.
    unit = math.sqrt(16 / 3 - 16 / 9)
    expected = [2 - 4 / 3 / unit, 4 + 8 / 3 / unit, None, 3 - 4 / 3 / unit]
    assert as_list(composite.measure(scores)) == pytest.approx(expected)
    assert told["reward_fixed_scale"] == pytest.approx(3.0), "the mean of the three"
    later = table(raw=[1.0], ranked=[4.0])
    assert as_list(composite.measure(later)) == pytest.approx([2 + 8 / 3 / unit])
    assert "reward_fixed_scale" not in CompositeReward({"raw": constant([])}).balance(
        table(raw=[1.0, 2.0]), 1, 1
    )


def test_ranks():
    assert scaled(Scale("rank"), [10, 1000, None, 10, 11]) == [-2 / 3, 1, None, -2 / 3, 1 / 3]
    assert scaled(Scale("rank"), [5.0]) == [0.0]
    assert scaled(Scale("rank"), [None]) == [None]


def test_zscores_of_the_first_batch_are_its_own():
    assert scaled(Scale("zscore"), [1.0, 3.0, None]) == [-1.0, 1.0, None]


def test_zscores_run():
    """Against means weighted by hand."""
    batches = [[1.0, 3.0], [2.0, 8.0], [5.0, 5.0]]
    scale = Scale("zscore")
    for batch in batches:
        last = scaled(scale, batch)
    weights = [MEMORY**2, MEMORY, 1.0]
    mean = sum(w * statistics.mean(b) for w, b in zip(weights, batches, strict=True)) / sum(weights)
    square = sum(
        w * statistics.mean(x * x for x in b) for w, b in zip(weights, batches, strict=True)
    ) / sum(weights)
    assert last == pytest.approx([(5 - mean) / (square - mean**2) ** 0.5] * 2)
    before = dict(scale.state)
    assert scaled(scale, [5.0], learn=False) == pytest.approx(last[:1])
    assert scale.state == before, "evaluation teaches it nothing"


@given(st.floats(-1e6, 1e6), st.integers(2, 9), st.sampled_from(["zscore", "rank"]))
def test_equal_scores_are_zero_whatever_their_size(value, count, kind):
    assert scaled(Scale(kind), [value] * count) == [0.0] * count


@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=9),
    st.floats(0.01, 1000),
    st.floats(-100, 100),
)
def test_neither_units_nor_offsets_matter_to_ranks(scores, factor, offset):
    scores = [round(x, 3) for x in scores]
    moved = [factor * x + offset for x in scores]
    if len(set(moved)) == len(set(scores)):
        assert scaled(Scale("rank"), scores) == scaled(Scale("rank"), moved)


def test_clipping_comes_last():
    assert scaled(Scale("none", (-1, 2)), [-5, None, 1, 5]) == [-1, None, 1, 2]
    assert scaled(Scale("rank", (0, 0.5)), [1, 2, 3]) == [0, 0, 0.5]


def test_shares_of_the_variance():
    """Parts 1, −1 and 2, −2 of one group: the sum is 3, −3."""
    parts = table(a=[1.0, -1.0], b=[2.0, -2.0])
    assert shares(parts, 2).tolist() == pytest.approx([1 / 3, 2 / 3])
    against = table(a=[1.0, -1.0], b=[-3.0, 3.0])
    assert shares(against, 2).tolist() == pytest.approx([-0.5, 1.5])
    assert correlations(against, 2).tolist() == pytest.approx(torch.tensor([[1, -1], [-1, 1.0]]))
    level = table(a=[1.0, 1.0, 5.0, 5.0], b=[0.0, 2.0, 0.0, 2.0])
    assert shares(level, 2).tolist() == [0.0, 1.0], "what is the same in a group is baseline"
    assert shares(level, 1)[0].item() == pytest.approx(0.8), "groups of one: over the batch"
    assert shares(table(a=[1.0, 1.0]), 2).tolist() == [0.0]
    assert correlations(level, 2)[0, 1].isnan(), "one of them does not vary"


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=4, max_size=4))
def test_shares_sum_to_one(rows):
    parts = table(a=[a for a, _ in rows], b=[b for _, b in rows])
    total = shares(parts, 2).sum().item()
    assert total == pytest.approx(1.0) or total == 0.0


def constant(values):
    return lambda completions, **_: list(values)


def test_a_scaled_composite():
    composite = CompositeReward(
        {"small": constant([0, 1]), "large": constant([5000, 1000])},
        weights={"large": [(0, 1.0), (10, 0.0)]},
        scales={"large": Scale("zscore"), "small": Scale("none")},
    )
    scores = composite.score(["", ""], ["a", "b"])
    assert composite.combine(scores, step=5).tolist() == [0 + 0.5, 1 - 0.5]
    told = composite.balance(scores, 5, 2)
    assert told["rewards/large/share_raw"] > 0.99
    assert told["rewards/large/scaled"] == 0
    assert told["rewards/small/share"] + told["rewards/large/share"] == 0, "they cancel out"
    assert scores.tolist() == [[0, 5000], [1, 1000]], "raw scores stay raw"


def test_a_missing_component_counts_as_its_scaled_mean():
    composite = CompositeReward(
        {"a": constant([1.0, None, 3.0]), "b": constant([0.0, 10.0, None])},
        scales={"a": Scale("zscore")},
    )
    scores = composite.score([""] * 3, ["x"] * 3)
    assert composite.combine(scores, step=1).tolist() == [-1 + 0, 0 + 10, 1 + 5]


JUDGED = [1.0, 1.0, 1.0, None, 0.0, 0.0, 0.0, None]  # two prompts, of four completions each


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_missing_component_says_nothing_within_its_prompt(baseline, normalize):
    """Its completion is neither better nor worse than those of its prompt that were judged."""
    composite = CompositeReward({"judge": constant(JUDGED), "other": constant([0.0] * 8)})
    totals = composite.combine(composite.score([""] * 8, ["x"] * 8), 1, 4)
    assert totals.tolist() == [1.0] * 4 + [0.0] * 4
    result, _ = advantages(totals.float(), baseline, group_size=4, ema=0.25, normalize=normalize)
    assert result.view(2, 4).std(-1).tolist() == [0.0, 0.0]
    if baseline == "rloo":
        assert result.tolist() == [0.0] * 8


@given(
    st.lists(st.none() | st.floats(-9, 9).map(lambda x: round(x, 3)), min_size=8, max_size=8),
    st.sampled_from([1, 2, 4, 8]),
)
def test_filling_changes_no_mean_of_a_group(scores, size):
    result = filled(column(*scores)[:, None], size)[:, 0].tolist()
    everything = [x for x in scores if x is not None]
    for start in range(0, 8, size):
        group = scores[start : start + size]
        known = [x for x in group if x is not None]
        mean = statistics.mean(known or everything or [0.0])
        for given_, x in zip(group, result[start : start + size], strict=True):
            assert x == (pytest.approx(mean) if given_ is None else given_)


def test_state_goes_on_where_it_was():
    def make():
        return CompositeReward({"a": constant([1.0, 2.0])}, scales={"a": Scale("zscore")})

    one, other = make(), make()
    one.combine(table(a=[1.0, 2.0]), step=1)
    other.load_state_dict(one.state_dict())
    later = table(a=[7.0, 9.0])
    assert one.combine(later, step=2).tolist() == other.combine(later, step=2).tolist()
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"a": [1.0, 1.0], "b": [0.0, 1.0]}, "reward 'a' is saturated: it gives all"),
        ({"a": [None, None], "b": [0.0, 1.0]}, "reward 'a' is missing: it gives no completion a"),
        ({"a": [0.0, 100.0], "b": [0.0, 1.0]}, "reward 'a' dominates: it makes 99%"),
        ({"a": [0.0, 1.0], "b": [1.1, 0.0]}, "rewards 'a' and 'b' conflict: their correlation is"),
    ],
)
def test_imbalance_is_said_once_after_twenty_steps(columns, said, caplog):
    caplog.set_level(logging.WARNING)
    composite = CompositeReward({name: constant(column) for name, column in columns.items()})
    scores = table(**columns)
    for step in range(3 * WARN_AFTER):
        composite.combine(scores, step)
        composite.balance(scores, step, 2)
        texts = [r.getMessage() for r in caplog.records if r.getMessage().startswith(said)]
        assert len(texts) == (step >= WARN_AFTER - 1)


def test_balanced_rewards_are_left_in_peace(caplog):
    composite = CompositeReward({"a": constant([]), "b": constant([])})
    scores = table(a=[0.0, 1.0, 0.0, 1.0], b=[0.0, 0.0, 1.0, 1.0])
    for step in range(30):
        composite.balance(scores, step, 4)
    assert not caplog.records


def test_async_rewards_run_while_something_else_is_computed():
    """The event is set only after `begin` has returned: one after the other would never end."""
    go_on = threading.Event()

    async def slow(completions, **_):
        while not go_on.is_set():
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)

    composite = CompositeReward({"sync": constant([2.0]), "slow": slow})
    rest = composite.begin([""], ["x"])
    go_on.set()
    assert rest().tolist() == [[2.0, 1.0]]


def test_scales_of_one_to_a_thousand_train_on_both(main, settings, tmp_path, monkeypatch):
    """Scores of 0 or 1 and of 0 or 1000. Raw, the large one has all of the advantages' variance; by
    zscore both have a share, and the log has the share before beside it. Resume is exact."""
    (tmp_path / "thousand.py").write_text(
        "def large(completions, **_):\n"
        "    return [1000.0 * ('th' in text) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = Path(settings["OUTPUT_DIR"])
    small = {"TYPE": "regex", "PATTERNS": "[aeiou]{2}"}
    large = {"TYPE": "python", "FUNCTION": "thousand:large"}
    keys = settings | {"STEPS": 6, "BATCH_SIZE": 16, "SAVE_EVERY": 3, "REWARDS": [small, large]}
    assert main(keys) == 0
    raw = read_jsonl(out / "metrics.jsonl")
    assert statistics.median(abs(row["rewards/regex/share"]) for row in raw) < 0.01
    assert "rewards/regex/share_raw" not in raw[0]

    normalized = keys | {"REWARDS": [r | {"NORMALIZE": "zscore"} for r in (small, large)]}
    assert main(normalized) == 0
    rows = read_jsonl(out / "metrics.jsonl")
    assert max(row["rewards/large/mean"] for row in rows) > 100, "it is a thousand times as large"
    assert statistics.median(abs(row["rewards/regex/share_raw"]) for row in rows) < 0.01
    assert 0.2 < statistics.median(row["rewards/regex/share"] for row in rows) < 0.8
    assert all(row["rewards/regex/share"] + row["rewards/large/share"] == pytest.approx(1)
               for row in rows)  # fmt: skip

    import shutil

    final = (out / "final/model.safetensors").read_bytes()
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "step-000006")
    assert main(normalized, "RESUME=auto") == 0
    assert without_clock(read_jsonl(out / "metrics.jsonl")) == without_clock(rows)
    assert (out / "final/model.safetensors").read_bytes() == final
