"""Shortest paths in a random graph: a task whose optimum is known, from nothing to trained.

    python examples/random_walks.py [KEY=VALUE ...]

The random walks of CarperAI's trlx: 21 nodes, one letter each, with random edges; "a" is the goal.
A GPT-2 of 6 × 144 is pre-trained on walks that choose each edge at random, and end at the goal or
after ten nodes. Then train.py rewards walks by how near they are to the shortest, in two runs. The
first explores: a penalty keeps it near random walks. The second trains the first's model on hotter
samples, without the penalty, so that the shortest walk is also the one that is nearly always drawn.
The score is trlx's optimality, the mean over walks that are sampled from every start: 1 where all
are shortest.
"""

import json
import string
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from adaptiverl.commands.arguments import read_command
from adaptiverl.rl.loading import load_policy, load_tokenizer
from adaptiverl.rl.rollout import uniforms
from adaptiverl.rl.sampling.sampler import Sampler

NODES, LONGEST, WALKS, EDGE = 21, 10, 1000, 0.1
GOAL, END = 0, "|"
SETTINGS = {  # chosen on graphs from 100 on, as those of the two runs are
    "BATCH_SIZE": 160,
    "NUM_GENERATIONS": 8,
    "MAX_NEW_TOKENS": LONGEST - 1,
    "TRUST_REGION_KL": 0.008,
    "SAVE_EVERY": 0,
    "SAMPLES_EVERY": 0,
}
RUNS = {
    "explore": {"STEPS": 100, "KL_COEF": 0.05, "BASELINE": "batch"},
    "sharpen": {"STEPS": 50, "KL_COEF": 0, "TEMPERATURE": 1.5},
}
STEPS = sum(run["STEPS"] for run in RUNS.values())


class Graph:
    """The graph of trlx's `generate_random_walks` for the same seed, its walks and their score.

    Graphs from which a node cannot reach the goal within `longest` nodes are drawn again: there
    trlx's score of the best walk is 0 / 0. `shortest` is the number of nodes of each shortest path.
    """

    def __init__(self, seed: int, nodes: int = NODES, longest: int = LONGEST, edge: float = EDGE):
        self.arguments = {"seed": seed, "nodes": nodes, "longest": longest, "edge": edge}
        self.random, self.nodes, self.longest = np.random.RandomState(seed), nodes, longest
        self.letters = string.ascii_lowercase[:nodes]
        while True:
            self.edges = self.random.rand(nodes, nodes) > 1 - edge
            np.fill_diagonal(self.edges, False)
            if not self.edges.any(1).all():
                continue
            self.edges[GOAL] = np.arange(nodes) == GOAL
            self.shortest = np.where(np.arange(nodes) == GOAL, 1.0, np.inf)
            for _ in range(nodes):  # Bellman and Ford
                through = np.where(self.edges, self.shortest, np.inf).min(1) + 1
                self.shortest = np.minimum(self.shortest, through)
            if self.shortest.max() < longest:
                break

    @property
    def starts(self) -> list[str]:
        """All nodes but the goal, as prompts."""
        return [letter for node, letter in enumerate(self.letters) if node != GOAL]

    def walks(self, count: int = WALKS) -> list[str]:
        """Random walks from random starts, which end at the goal or after `longest` nodes."""
        return [self._walk() for _ in range(count)]

    def _walk(self) -> str:
        node = GOAL
        while node == GOAL:
            node = self.random.randint(self.nodes)
        walk = [node]
        while node != GOAL and len(walk) < self.longest:
            node = self.random.choice(np.nonzero(self.edges[node])[0])
            walk.append(node)
        return "".join(self.letters[node] for node in walk)

    def optimality(self, walk: str) -> float:
        """(longest − nodes to the goal) / (longest − nodes of the shortest path), 0 to 1.

        0 for a walk that takes an edge that is not there, or does not arrive.
        """
        nodes = [self.letters.find(letter) for letter in walk[: self.longest]]
        if -1 in nodes[: nodes.index(GOAL) if GOAL in nodes else None] or GOAL not in nodes:
            return 0.0
        steps = nodes[: nodes.index(GOAL) + 1]
        if not all(self.edges[a, b] for a, b in pairwise(steps)):
            return 0.0
        return float((self.longest - len(steps)) / (self.longest - self.shortest[steps[0]]))


class ShortestPath:
    """The reward of train.py, and of TRL's trainers: the optimality of prompt and completion."""

    __name__ = "optimality"  # by which TRL logs it

    def __init__(self, **arguments: Any):
        self.graph = Graph(**arguments)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return [self.graph.optimality(p + c) for p, c in zip(prompts, completions, strict=True)]


def make_tokenizer(letters: str) -> PreTrainedTokenizerFast:
    """A token for each letter, and END."""
    model = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters + END)}))
    model.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=END, pad_token=END)


def pretrain(
    graph: Graph, folder: Path, layers: int = 6, width: int = 144, steps: int = 150
) -> None:
    """Writes a GPT-2 that has learned the graph's random walks, its tokenizer and the prompts."""
    tokenizer = make_tokenizer(graph.letters)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=width, n_layer=layers,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    ends = [walk + END if walk[-1] == graph.letters[GOAL] else walk for walk in graph.walks()]
    data = tokenizer(ends, padding=True, padding_side="right", return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for _ in range(steps):
        rows = torch.randint(len(ends), (32,))
        ids, mask = data.input_ids[rows], data.attention_mask[rows].bool()
        logits = model(ids[:, :-1]).logits
        F.cross_entropy(logits[mask[:, 1:]], ids[:, 1:][mask[:, 1:]]).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": start} for start in graph.starts]
    (folder / "prompts.json").write_text(json.dumps(rows), "utf-8")


def reinforce(graph: Graph, model: Path, output: Path, *overrides: str) -> Path:
    """What `python train.py CONFIG KEY=VALUE …` does, for both of RUNS; the trained model."""
    output.mkdir()
    keys = SETTINGS | {
        "TRAIN_FILE": str(model / "prompts.json"),
        "REWARDS": [
            {
                "TYPE": "python",
                "FUNCTION": "examples.random_walks:ShortestPath",
                "ARGS": graph.arguments,
            }
        ],
    }
    for name, own in RUNS.items():
        folder = {"MODEL": str(model), "OUTPUT_DIR": str(output / name)}
        config = output / f"{name}.json"
        config.write_text(json.dumps(keys | own | folder, indent=2), "utf-8")
        if status := train.main(read_command([str(config), *overrides])):
            raise SystemExit(status)
        model = output / name / "final"
    return model


@torch.no_grad()
def score(graph: Graph, model: Path, each: int = 50, greedy: bool = False) -> float:
    """Mean optimality of `each` walks from every start, sampled at temperature 1 or greedy."""
    sampler = Sampler(
        load_policy(str(model), reference=False),
        load_tokenizer(str(model)),
        top_k=1 if greedy else 0,
    )
    prompts = graph.starts * (1 if greedy else each)
    rollout = sampler(prompts, uniforms(10**6, 0, len(prompts), graph.longest - 1))
    walks = [p + c for p, c in zip(prompts, sampler.decode(rollout), strict=True)]
    return float(np.mean([graph.optimality(walk) for walk in walks]))


def main() -> None:
    graph = Graph(101)
    with tempfile.TemporaryDirectory() as scratch:
        first, output = Path(scratch, "first"), Path(scratch, "run")
        pretrain(graph, first)
        trained = reinforce(graph, first, output, *sys.argv[1:])
        for how, greedy in (("sampled", False), ("greedy", True)):
            before, after = (score(graph, model, greedy=greedy) for model in (first, trained))
            print(f"{how} walks: optimality {before:.3f} → {after:.3f}, optimum 1.000")


if __name__ == "__main__":
    main()
