"""`adaptiverl evaluate RUN`: the trained model against the model before the training.

Both complete the same prompts from the same random numbers, so that their differences are paired.
"""

import json
import logging
import math
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tabulate import tabulate
from tqdm import tqdm

from adaptiverl.commands.curves import json_object
from adaptiverl.commands.paired import Estimate, compare, estimate
from adaptiverl.commands.run_folder import Checkpoint, RunReader
from adaptiverl.commands.run_prompts import prompts_of_run, to_evaluate
from adaptiverl.commands.trained import RunRewards, TrainedModel
from adaptiverl.commands.written import check_writable, write_whole
from adaptiverl.config.schema import ConfigError
from adaptiverl.files.console import counted
from adaptiverl.rl.data import fingerprint, indices_at
from adaptiverl.rl.diversity import distinct
from adaptiverl.rl.rollout import Rollout, uniforms
from adaptiverl.training.batches import columns
from adaptiverl.training.inputs import as_config_error, as_given
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.scoring import Scores
from adaptiverl.training.state import changed_rows

Figures = dict[str, dict[str, Any]]  # by name in metrics.jsonl: trained, start, difference, …
Missing = dict[str, dict[str, int]]  # scores that a reward did not give, by model
MODELS = ("trained", "start")


def main(given: Namespace, run: RunReader) -> int:
    """Prints a table and writes it as JSON, into the run's folder unless told otherwise."""
    checkpoint = run.choose(given.checkpoint)
    c = run.config
    to = given.json.resolve() if given.json else run.path / "evaluation.json"
    check_writable(to, "name another file by --json")
    seed = c.SEED if given.seed is None else given.seed
    with run.as_started():
        prompts, source = to_evaluate(c, given.prompts)
        rows = indices_at(0, given.n, len(prompts), seed)
        firsts: dict[str, int] = {}  # the first row of each prompt, which numbers its cluster
        texts = (as_given(each, c.SYSTEM) for each in prompts.select(rows)[c.PROMPT_COLUMN])
        clusters = [firsts.setdefault(text, row) for text, row in zip(texts, rows, strict=True)]
        counts, said_of_run = _of_run({*firsts}, c, checkpoint)
        changed = [] if given.prompts else _changed_rows(c, checkpoint.path, prompts)
        model = TrainedModel(c, checkpoint, start=True)
        all_rewards = given.all_rewards
        with closing(RunRewards(model, prompts, source, all_rewards, several=False)) as rewards:
            figures, missing = measure(model, rewards, prompts, rows, clusters, seed)
    about = {
        "checkpoint": checkpoint.path.name,
        "step": checkpoint.step,
        "prompts": Path(source).name if Path(source).is_absolute() else source,
        "completions": given.n,
        "different_prompts": len(firsts),
        **counts,
        "seed": seed,
        "left_out": rewards.left_out,
        "notes": [*changed, *rewards.notes],
        "missing": missing,
        "figures": figures,
    }
    said = f"{counted(given.n, 'completion')} of {counted(len(firsts), 'prompt')}"
    after = f"after {counted(checkpoint.step, 'step')}"
    print(f"{run.path.name}/{checkpoint.path.name}, {after}: {said} of {about['prompts']}")
    print(table(figures))
    print(f"trained on  {said_of_run}")
    for name, by in missing.items():
        who = ", ".join(f"{number} of {given.n} {model}" for model, number in by.items())
        print(f"missing   {name}: {who}")
    for name, why in rewards.left_out.items():
        print(f"left out  {name}: {why}")
    replaced = _completions_in(to)
    with as_config_error("--json" if given.json else "RUN"):
        write_whole(to, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    print(f"written to {to}" + (f", which had {counted(replaced, 'completion')}" * bool(replaced)))
    return 0


def _of_run(
    texts: set[str], c: RunConfig, checkpoint: Checkpoint
) -> tuple[dict[str, int | None], str]:
    """How many prompts of `texts` the run was trained and evaluated on; the first also in words."""
    names = ("prompts_trained_on", "prompts_evaluated_on")
    try:
        trained, evaluated = prompts_of_run(c, checkpoint)
    except ConfigError as error:
        return dict.fromkeys(names), f"not known: {error}"
    counts = len(texts & trained), len(texts & evaluated)
    said = f"{counts[0]} of {counted(len(texts), 'prompt')}"
    return dict(zip(names, counts, strict=True)), said


def _changed_rows(c: RunConfig, checkpoint: Path, prompts: Dataset) -> list[str]:
    """What is said, and warned of, where the run had other rows in the file of `prompts`."""
    key = "EVAL_FILE" if c.EVAL_FILE else "EVAL_SPLIT" if c.EVAL_SPLIT else "TRAIN_FILE"
    if not changed_rows(checkpoint, c, {key: fingerprint(prompts)}):
        return []
    said = (
        f"{c.EVAL_FILE or c.TRAIN_FILE} has other rows than when the run wrote {checkpoint}: these "
        "figures are not of the prompts that the run had"
    )
    logging.warning(said)
    return [said]


def measure(
    model: TrainedModel,
    rewards: RunRewards,
    prompts: Dataset,
    rows: list[int],
    clusters: Sequence[int],
    seed: int,
) -> tuple[Figures, Missing]:
    """All figures of completions of `rows` by each model; `clusters` number their prompts."""
    c, size = model.config, len(rows)
    numbers = uniforms(seed, 0, size, c.MAX_NEW_TOKENS)
    pending: dict[str, list] = {who: [] for who in MODELS}
    ids: dict[str, list[list[int]]] = {who: [] for who in MODELS}
    nats = dict.fromkeys(MODELS, 0.0)  # −log π₀ of all completions, at temperature 1
    kl = []
    for first in tqdm(range(0, size, c.BATCH_SIZE), disable=None, unit="batch"):
        part = slice(first, first + c.BATCH_SIZE)
        batch = columns(c, prompts, rows[part])
        for who in MODELS:
            rollout = model.sample(batch["prompt"], numbers[part], start=who == "start")
            texts = model.sampler.decode(rollout)
            pending[who].append(rewards.begin(batch, rollout, texts))
            ids[who] += rollout.tokens()
            nats[who] -= model.logprobs(rollout, start=True, temperature=1.0).double().sum().item()
            if who == "trained":
                kl.append(_kl(model, rollout))
    scores = rewards.wait(pending["trained"] + pending["start"])
    both = {rewards.sum_name: _total(rewards, scores, size)} if rewards.trained.names else {}
    parts = rewards.columns(scores)
    both |= parts
    both["completions/mean_length"] = torch.tensor(
        [len(each) for who in MODELS for each in ids[who]]
    )
    figures: dict[str, dict[str, Estimate]] = {}
    for name, column in both.items():
        trained, start = column.double().split(size)
        figures[name] = compare(trained, start, clusters)
    del figures["completions/mean_length"]["win_rate"]
    figures["kl_per_completion"] = {"trained": estimate(torch.cat(kl), clusters)}
    for n in (1, 2):
        figures[f"completions/distinct_{n}"] = {
            who: Estimate(distinct(ids[who], n), None) for who in MODELS
        }
    figures["perplexity_under_start"] = {
        who: Estimate(math.exp(nats[who] / sum(map(len, ids[who]))), None) for who in MODELS
    }
    lacking = {name: column.isnan().view(2, size).sum(1) for name, column in parts.items()}
    missing = {
        name: dict(zip(MODELS, numbers.tolist(), strict=True))
        for name, numbers in lacking.items()
        if numbers.any()
    }
    plain = {name: {k: v._asdict() for k, v in row.items()} for name, row in figures.items()}
    return plain, missing


def _total(rewards: RunRewards, scores: Scores, size: int) -> torch.Tensor:
    """[2 · size], in the order of `scores`; missing where only one of a pair misses a score."""
    pairs = torch.arange(2 * size).view(2, size).T.flatten()
    ordered = rewards.total(Scores(scores.trained[pairs], scores.held_out[pairs]), groups=2)
    total = torch.empty_like(ordered).index_copy_(0, pairs, ordered)
    lacks = scores.trained.isnan().view(2, size, -1)
    return total.masked_fill((lacks[0] ^ lacks[1]).any(-1).repeat(2), torch.nan)


def _kl(model: TrainedModel, rollout: Rollout) -> torch.Tensor:
    """log π − log π₀ of each completion [B], which estimates the KL without bias."""
    gap = model.logprobs(rollout) - model.logprobs(rollout, start=True)
    return gap.sum(-1).double().cpu()


def table(figures: Figures, style: str = "simple") -> str:
    """One row per figure: mean ± standard error of both, of their difference, and wins.

    `style` is tabulate's.
    """
    heads = ("trained", "start", "difference", "win_rate")
    rows = [
        [name, *(_shown(row.get(head), sign=head == "difference") for head in heads)]
        for name, row in figures.items()
    ]
    return tabulate(rows, ("", *heads[:3], "win rate"), tablefmt=style, disable_numparse=True)


def _shown(value: dict[str, float | None] | None, sign: bool) -> str:
    """`+0.292 ± 0.020`"""
    if value is None:
        return ""
    if value["mean"] is None:
        return "missing"
    mean = f"{value['mean']:+z.3f}" if sign else f"{value['mean']:z.3f}"
    return mean if value["se"] is None else f"{mean} ± {value['se']:.3f}"


def _completions_in(path: Path) -> int:
    """Those of an earlier evaluation in the same file."""
    found = json_object(path.read_text("utf-8", errors="replace")) if path.is_file() else None
    return (found or {}).get("completions", 0)
