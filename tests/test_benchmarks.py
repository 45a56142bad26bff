"""The example and the benchmarks with a known optimum or a reference of another program."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, in_this_process, read_jsonl

from examples.random_walks import END, RUNS, Graph, ShortestPath, pretrain, reinforce, score

sys.path.append(str(ROOT / "benchmarks"))  # whose files import each other by name

import lr_methods


def subclasses() -> list[type]:
    """The recurrent optimizers of benchmarks/lr_methods.py and their placebos."""
    kinds = [kind for kind in vars(lr_methods).values() if isinstance(kind, type)]
    return [kind for kind in kinds if issubclass(kind, lr_methods.Online)]


SMALL = {"seed": 3, "nodes": 6, "longest": 5, "edge": 0.3}


def brute_force(graph: Graph) -> dict[str, float]:
    """The optimality of each string of `longest` letters, from all walks that there are."""
    arriving: dict[str, int] = {}
    for size in range(2, graph.longest + 1):
        for walk in itertools.permutations(range(graph.nodes), size):
            if walk[-1] == 0 and all(graph.edges[a, b] for a, b in itertools.pairwise(walk)):
                start = graph.letters[walk[0]]
                arriving[start] = min(arriving.get(start, size), size)
    scores = {}
    for text in map("".join, itertools.product(graph.letters, repeat=graph.longest)):
        walk = text[: text.find("a") + 1]
        pairs = itertools.pairwise(map(graph.letters.index, walk))
        legal = len(walk) > 1 and all(graph.edges[a, b] for a, b in pairs)
        best = arriving.get(text[0], 0)
        scores[text] = legal * (graph.longest - len(walk)) / (graph.longest - best)
    return scores


def test_optimality_of_random_walks_is_that_of_all_walks():
    graph = Graph(**SMALL)
    expected = {text: value for text, value in brute_force(graph).items() if text[0] != "a"}
    assert {text: graph.optimality(text) for text in expected} == pytest.approx(expected)
    assert {0.0, 1.0} < set(expected.values()), "no detour: the graph shows too little"
    for walk in graph.walks(200):
        assert walk[-1] == "a" or len(walk) == graph.longest
        assert graph.optimality(walk) == pytest.approx(expected[walk.ljust(graph.longest, "b")])
    reward = ShortestPath(**SMALL)
    assert reward(["b", "c"], ["", "x?"]) == [0.0, 0.0]


def test_the_graphs_of_trlx():
    """`generate_random_walks(seed=1002)`: the first walks, and what its metric_fn says of them."""
    graph = Graph(1002)
    assert graph.walks(3) == ["oseotba", "qka", "jrmhnba"]
    said = {"oseotba": 0.5, "qka": 1.0, "qkinba": 0.571429, "rmhnba": 0.8, "bzza": 0.0, "b": 0.0}
    assert {walk: graph.optimality(walk) for walk in said} == pytest.approx(said, abs=1e-6)


def test_the_example_trains_on_the_optimality(tmp_path, monkeypatch):
    """Two steps of both runs of train.py: each sample's reward is the brute force's."""
    monkeypatch.chdir(ROOT)
    graph, first, run = Graph(**SMALL), tmp_path / "first", tmp_path / "run"
    pretrain(graph, first, layers=1, width=24, steps=60)
    before = score(graph, first)
    with in_this_process():
        trained = reinforce(
            graph, first, run, "STEPS=2", "BATCH_SIZE=64", "MAX_NEW_TOKENS=4", "SAMPLES_EVERY=1"
        )
    expected = brute_force(graph)
    rows = [row for name in RUNS for row in read_jsonl(run / name / "samples.jsonl")]
    assert len(rows) == 256
    started = json.loads((run / "sharpen/config.json").read_text())["MODEL"]
    assert Path(started) == run / "explore/final" and trained == run / "sharpen/final"
    for row in rows:
        walk = (row["prompt"] + row["completion"]).ljust(graph.longest, row["prompt"])
        assert row["reward"] == pytest.approx(expected[walk] if "a" in walk else 0.0)
        assert END not in row["completion"]
    assert 0 < before < 1 and 0 < score(graph, trained) <= 1
    assert json.loads((first / "prompts.json").read_text()) == [{"prompt": s} for s in "bcdef"]


def test_shares_of_the_gain_inside_trl():
    """The best mean constant is 100 %; a policy of NaN counts as the lowest score, collapsed."""
    from trl_rates import report

    def row(method: str, rate: float, seed: int, score: float | None, entropy: float = 3.0):
        return {
            "trainer": "RLOO", "task": "length", "method": method, "rate": rate, "seed": seed,
            "score": score, "entropy": entropy, "untrained": 0.2, "seconds": 1.0,
            "reward": score, "kl": None if score is None else 2.0,
        }  # fmt: skip

    rows = [
        row("constant", 1e-4, 0, 0.5), row("constant", 1e-4, 1, 0.7),
        row("constant", 1e-3, 0, 0.8), row("constant", 1e-3, 1, None),
        row("constant", 1e-1, 0, -3.0), row("trust_region", 1e-1, 0, 0.5, 0.05),
    ]  # fmt: skip
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report(rows).splitlines()
        if line.startswith(("| constant", "| trust_region"))
    ]
    assert [cell[:8] for cell in cells] == [
        ["trust_region", "0.1", "1", "0.500", "75%", "0.500", "2.0", "1"],
        ["constant", "0.1", "1", "-3.000", "-800%", "-3.000", "2.0", "1"],
        ["constant", "0.001", "2", "-1.100", "-325%", "0.800", "2.0", "1"],
        ["constant", "0.0001", "2", "0.600", "100%", "0.600", "2.0", "0"],
    ]


@pytest.mark.parametrize("rates", [[1e-7, 1.0]])
def test_the_share_of_the_optimum_is_counted_per_run(rates):
    from random_walks import report

    rows = [
        {
            "graph": graph, "rate": rate, "method": "ours", "optimality": found, "greedy": 1.0,
            "untrained": 0.2, "steps": 2, "seconds": 1.0, "wall": wall,
        }
        for rate in rates
        for graph, found, wall in ((0, 0.99, 60.0), (1, 0.98, 61.0))
    ]  # fmt: skip
    text = report(rows)
    assert "2 of 4 runs reach 0.99 of the optimum, 2 within 60 s." in text
    assert "| 1 of 2" in text and "0.985" in text


def test_the_time_to_a_quality_is_counted_to_its_first_ten_good_steps():
    """With TRL's sweep counted it has the seconds of all its rates; what never came took longer."""
    from time_to_quality import Watch, report

    watch = Watch("default", 0.0)
    assert not any(watch(0.9) for _ in range(9)), "nine are not ten"
    watch = Watch("default", 0.0)
    assert not any(watch(0.1) for _ in range(3))
    assert [watch(0.9) for _ in range(9)].index(True) == 8, "one of 0.1 and nine of 0.9 are 0.82"
    assert len(watch.times) == len(watch.rewards) == 12

    def row(side: str, rate: float | None, seed: int, seconds: float, reached: bool = True):
        return {
            "task": "default", "side": side, "rate": rate, "seed": seed, "level": 0.8,
            "reached": reached, "steps": 20 if reached else 100, "seconds": seconds,
            "times": [5.0, seconds], "rewards": [0.5, 0.9],
        }  # fmt: skip

    rows = []
    for seed in (0, 1, 2):
        rows += [row("ours", None, seed, 10.0), row("TRL", None, seed, 90.0, False)]
        rows += [row("TRL", 1e-4, seed, 40.0), row("TRL", 1e-3, seed, 20.0, reached=seed > 0)]
    lines = report(rows).splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert table[2:6] == [
        ["ours, as it is", "3 of 3", "10.0", "5.0", "20", "1.00"],
        ["TRL at its best swept rate (0.0001)", "3 of 3", "40.0", "5.0", "20", "4.00"],
        ["TRL, with the seconds of its sweep (2 rates)", "3 of 3", "60.0", "5.0", "20", "6.00"],
        ["TRL at its default rate", "0 of 3", "> 90.0", "5.0", "> 100", "> 9.00"],
    ]
    assert table[8] == ["ours, as it is", *["open"] * 5], "sparse"


def test_both_sides_of_the_time_to_a_quality_have_the_same_rewards():
    """The noise too: the level is of the first, which is the same without it."""
    from time_to_quality import LEVELS, Noise, rewards_of

    for task in LEVELS:
        assert [each["TYPE"] for each in rewards_of(task, 1)][1:] == ["python"] * (task == "noisy")
    one, two = Noise(3), Noise(3)
    first, then = one([""] * 500, [""] * 500), one([""], [""])
    assert first + then == two([""] * 501, [""] * 501)
    assert abs(sum(first) / 500) < 0.1 and 0.2 < sum(x * x for x in first) / 500 < 0.3


@pytest.mark.parametrize("kind", [lr_methods.Method, lr_methods.InTrustRegion, *subclasses()])
def test_a_way_of_setting_the_rate_follows_the_reward_of_a_small_policy(kind):
    """As the benchmark calls it: a step within its KL, then what the step's reward was."""
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.zeros(4))
    method = kind([*weights], 1e-2, seed=0, steps=20)
    rewards = []
    for step in range(20):
        policy = (weights[0].mean(0) + weights[1]).log_softmax(-1)
        before = policy.detach()
        rewards.append(before.exp()[2].item())
        method.loss = -rewards[-1]
        (-policy.exp()[2]).backward()

        def kl(before: torch.Tensor = before) -> float:
            with torch.no_grad():
                now = (weights[0].mean(0) + weights[1]).log_softmax(-1)
                return (before.exp() * (before - now)).sum().item()

        method.step(step, kl)
        method.optimizer.zero_grad()
        method.after(step, rewards[-1])
    assert rewards[-1] > rewards[0] + 0.005
    assert method.next_rate > 0
