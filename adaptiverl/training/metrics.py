"""The numbers that a step leaves, and their lines on the console: functions without state.

Writing them to files is files/logs.py's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptiverl.files.console import printable
from adaptiverl.files.process import Stopwatch
from adaptiverl.rl.chat import Prompt, readable
from adaptiverl.rl.diversity import distinct, equal_pairs, repetition
from adaptiverl.rl.policy import Measured
from adaptiverl.rl.reinforce import zero_std_share
from adaptiverl.rl.rollout import Rollout
from adaptiverl.training.runtime import Runtime

Metrics = dict[str, Any]  # name → number, None where there is none
# What a run writes to metrics.jsonl and samples.jsonl, and first parts of such names
OWN_NAMES = {
    "completion", "completion_ids", "entropy", "frac_reward_zero_std", "grad_norm", "kl", "kl_coef",
    "kl_per_completion", "logprobs", "loss", "lr", "momentum", "prompt", "reward",
    "reward_fixed_scale", "reward_std", "skipped", "step", "tokens_per_second", "update_kl",
    "update_kl_target", "update_scale", "update_signal_to_noise", "updates_scaled",
}  # fmt: skip
OWN_PREFIXES = ("completions/", "eval/", "held_out/", "rewards/", "sampling/", "seconds/")


def is_own(name: str) -> bool:
    """Whether a run writes, or may write, something under this name: a reward may not."""
    return name in OWN_NAMES or name.startswith(OWN_PREFIXES)


def add_sums(sums: Tensor, loss: Tensor, measured: Measured, rollout: Rollout) -> Tensor:
    """`sums` with one more micro-batch of this process.

    [4]: loss, Σ entropy, Σ and max of |log π sampled − log π in the loss|.
    """
    gap = (rollout.logprobs - measured.logprobs.detach()).abs()
    added = torch.stack([loss.detach(), measured.entropy.sum(), gap.sum()])
    return torch.cat([sums[:3] + added, torch.maximum(sums[3], gap.max())[None]])


def reward_metrics(reward: Tensor, group_size: int) -> Metrics:
    """Of the rewards [B], NaN where missing; names are TRL's where TRL has one."""
    known = reward[~reward.isnan()]
    return {
        "reward": known.mean().item() if len(known) else None,
        "reward_std": known.std().item() if len(known) > 1 else None,
        "frac_reward_zero_std": zero_std_share(reward, group_size),
    }


def loss_metrics(sums: Tensor, lengths: Tensor, grad_norm: Tensor) -> Metrics:
    """Of the `sums` [processes, 4] of `add_sums`; `lengths` [B] are tokens per completion."""
    loss, entropy, gap, _ = sums.mean(0).tolist()
    tokens = lengths.sum().item() / len(sums)  # per process, as the sums are
    return {
        "loss": loss,
        "entropy": entropy / tokens,
        "sampling/sampling_logp_difference/mean": gap / tokens,
        "sampling/sampling_logp_difference/max": sums[:, 3].max().item(),
        "grad_norm": grad_norm.item(),
    }


def completion_metrics(
    runtime: Runtime,
    rollout: Rollout,
    prompts: Sequence[Prompt],
    truncated: Tensor,
    lengths: Tensor,
) -> Metrics:
    """Of all processes' completions; MAX_NEW_TOKENS ended those of this one in `truncated`."""
    cut, token_ids = runtime.gather(truncated), runtime.gather_objects(rollout.tokens())
    texts = runtime.gather_objects([readable(prompt) for prompt in prompts])
    within, across = equal_pairs(token_ids, texts)
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/clipped_ratio": cut.float().mean().item(),
        "completions/distinct_1": distinct(token_ids, 1),
        "completions/distinct_2": distinct(token_ids, 2),
        "completions/repetition": repetition(token_ids),
        "completions/equal_within_prompts": within,
        "completions/equal_across_prompts": across,
    }


def kl_metrics(kl: Tensor, lengths: Tensor, kl_coef: float) -> Metrics:
    """Of the KL penalty; `kl` [B] are nats per completion to the reference."""
    return {
        "kl": (kl.sum() / lengths.sum()).item(),  # per token, as TRL has it
        "kl_per_completion": kl.mean().item(),
        "kl_coef": kl_coef,
    }


def time_metrics(runtime: Runtime, clock: Stopwatch, tokens: float) -> Metrics:
    """Seconds by part of the step, the mean over processes, and completed tokens per second."""
    seconds = runtime.reduce(torch.tensor(list(clock.laps.values())), "mean")
    speed = {"tokens_per_second": round(tokens / sum(seconds), 1)}
    named = zip(clock.laps, seconds, strict=True)
    return speed | {f"seconds/{name}": round(lap, 4) for name, lap in named}


def interval_means(rows: Sequence[Metrics]) -> Metrics:
    """The last of `rows`, with the means over all of them of what is noise in a single step."""
    means = dict(rows[-1])
    for name in ("reward", "reward_fixed_scale", "loss", "kl"):
        known = [row[name] for row in rows if row.get(name) is not None]
        if known:
            means[name] = sum(known) / len(known)
    return means


def step_line(step: int, last_step: int, metrics: Mapping[str, Any]) -> str:
    """Step 50/100 | Reward: 0.82 | Loss: -0.3456 | LR: 3.2e-05 | Momentum: 0.912

    The mean of normalised rewards is always near 0: instead, their sum on a fixed scale is shown.
    """
    name, reward = "Reward", metrics["reward"]
    if "reward_fixed_scale" in metrics:
        name, reward = "Reward (fixed scale)", metrics["reward_fixed_scale"]
    line = (
        f"Step {step}/{last_step} | {name}: {_reward(reward)} | "
        f"Loss: {metrics['loss']:.4f} | LR: {metrics['lr']:.3g} | "
        f"Momentum: {metrics['momentum']:.3f}"
    )
    if "kl" in metrics:
        line += f" | KL: {round(metrics['kl'], 3) + 0.0:.3f}"  # + 0.0: never "-0.000"
    if "eval/reward" in metrics:
        line += f" | Eval reward: {_reward(metrics['eval/reward'])}"
    return line


def _reward(value: float | None) -> str:
    return "missing" if value is None else f"{value:.2f}"


def dynamics_lines(optimizer: str, step: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """[OnlineAdamW] Step 100 dynamics: and two lines per tensor."""
    lines = [f"[{optimizer}] Step {step} dynamics:"]
    for row in rows:
        head = {k: row[k] for k in ("grad_signal", "hidden_norm", "delta_scale")}
        shown = " | ".join(f"{k}={v:.4f}" for k, v in head.items())
        lines.append(f"  Tensor {row['tensor']} | {shown} | {row['name']}")
        rest = {k: v for k, v in row.items() if k not in (*head, "step", "tensor", "name")}
        if rest:
            small = {k: k.endswith("mean") and v >= 1e-6 for k, v in rest.items()}
            texts = [f"{k}={v:.6f}" if small[k] else f"{k}={v:.4g}" for k, v in rest.items()]
            lines.append("  " + " ".join(texts))
    return "\n".join(lines)


def cell(value: Any, width: int = 60) -> str:
    """A value on one line of a table."""
    if value is None:
        return "missing"
    text = _line(f"{value:.3f}" if isinstance(value, float) else str(value))
    return text if len(text) <= width else text[: width - 1] + "…"


def prompt_cell(prompt: Prompt, width: int = 60) -> str:
    """As `cell`; of a conversation the end, because all may begin with the same SYSTEM."""
    text = _line(readable(prompt))
    if isinstance(prompt, str) or len(text) <= width:
        return cell(text, width)
    return "…" + text[1 - width :]


def _line(text: str) -> str:
    return printable(" ".join(text.split()))
