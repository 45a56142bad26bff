"""--dry-run: one batch is sampled, rewarded and differentiated; nothing is trained or written."""

import torch
from tabulate import tabulate

from adaptiverl.files.process import Stopwatch, peak_memory
from adaptiverl.training.advice import bf16_advice
from adaptiverl.training.build import Parts
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.metrics import cell, prompt_cell
from adaptiverl.training.scoring import columns_of
from rewards.scores import as_list


def dry_run(c: RunConfig, parts: Parts) -> int:
    """Prints the batch, the trainable parameters, memory and seconds; the exit status."""
    runtime, sampler, scoring = parts.runtime, parts.sampler, parts.scoring
    rows = parts.batches.rows
    clock, batch = Stopwatch(), parts.batches.at(1)
    rollout = parts.checked.sample(batch["prompt"], parts.batches.uniforms(1))
    completions = sampler.decode(rollout)
    clock.lap("rollout")
    scores = scoring.wait(scoring.begin(batch, rollout, completions, 1)).trained
    clock.lap("reward")
    if c.KL_COEF:
        runtime.no_grad(sampler.policy.reference_logprobs, rollout, c.GRAD_ACCUM)
    clock.lap("reference")
    ones = torch.ones_like(rollout.logprobs)
    for part in rollout.with_weights(ones / len(rollout)).micro_batches(c.GRAD_ACCUM):
        runtime.accelerator.backward(-parts.policy(part).score)
    clock.lap("update")
    if not runtime.is_main:
        return 0
    columns = columns_of(scores[rows], scoring.rewards.names)
    total = as_list(scoring.rewards.combine(scores, 1, c.NUM_GENERATIONS)[rows])
    shown = {"completion": completions} | columns | {"reward": total}
    cells = {"prompt": [prompt_cell(each) for each in batch["prompt"]]}
    cells |= {name: [cell(value) for value in column] for name, column in shown.items()}
    print(tabulate(cells, headers="keys", tablefmt="plain", disable_numparse=True))
    counts = [(p.numel(), p.requires_grad) for p in parts.policy.parameters()]
    every, trained = sum(n for n, _ in counts), sum(n for n, grad in counts if grad)
    print(f"trainable parameters  {trained:,} of {every:,} ({trained / every:.1%})")
    print(f"peak memory           {peak_memory() / 2**30:.2f} GiB")
    laps = ", ".join(f"{name} {lap:.2f}" for name, lap in clock.laps.items())
    print(f"seconds per step      {sum(clock.laps.values()):.2f} ({laps})")
    if advice := bf16_advice(c, parts):
        print(advice)
    print("dry run: nothing was trained")
    return 0
