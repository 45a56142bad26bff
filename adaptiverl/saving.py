"""What a checkpoint of a run holds, how a run goes on from one, exactly, and how it ends with one.

That a checkpoint is whole or not there at all is run/checkpoint.py's.
"""

import json
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list, gather_object

from adaptiverl.optim.trust_region import TrustRegion
from adaptiverl.run import checkpoint
from adaptiverl.run.config import REWARD_KEYS, Config, UserError
from adaptiverl.run.console import printable
from adaptiverl.run.process import Paused, StopSignal
from adaptiverl.run.tracking import RunLog

if TYPE_CHECKING:
    from adaptiverl.program import Run

# What may differ between a run and its continuation, and in each of its rewards.
FREE_KEYS = {
    "$schema", "STEPS", "EPOCHS", "OUTPUT_DIR", "RESUME", "SAVE_EVERY", "KEEP_CHECKPOINTS",
    "LOG_EVERY", "DYNAMICS_EVERY", "EVAL_EVERY", "EVAL_FILE", "SAMPLES_EVERY", "TRACKERS",
    "VLLM_SERVER", "HELD_OUT",
}  # fmt: skip
FREE_OF_REWARD = {
    "BASE_URL", "KEY_ENV", "CONCURRENCY", "REQUESTS_PER_MINUTE", "TOKENS_PER_MINUTE", "TIMEOUT",
    "RETRIES", "CACHE", "MAX_CALLS", "MAX_COST", "PRICES", "MAX_MISSING", "WHERE", "HOST", "PORT",
    "TOKEN_ENV", "LABELS",
}  # fmt: skip


@dataclass
class State:
    """What a run carries from step to step besides weights, optimizer and random generators."""

    step: int = 0
    kl_coef: float = 0.0
    reward_ema: float | None = None
    skipped: int = 0  # steps whose gradient was not finite
    braked: int = 0  # steps whose update was made smaller
    flat_steps: int = 0  # steps in a row in which no rewards that are compared differed
    warned: list[str] = field(default_factory=list)  # what guards.py has warned of


def save(run: "Run", log: RunLog | None, name: str | None = None) -> Path:
    """Writes the checkpoint `name` (`step-000012`) and returns where; by all processes at once."""
    run.refuse_broken_weights()
    folder = run.output / (name or f"step-{run.state.step:06d}")
    rng = gather_object([checkpoint.rng_state()])
    inner = run.optimizer.optimizer
    whole = run.shards.whole_state(run.policy, inner) if run.sharded else None
    if log:
        log.sync()
        checkpoint.save(folder, run.state.step, lambda where: _write(run, where, rng, whole))
        checkpoint.prune(run.output, run.config.KEEP_CHECKPOINTS, written=folder)
    run.accelerator.wait_for_everyone()
    return folder


def _write(run: "Run", folder: Path, rng: list, whole: tuple[dict, dict] | None) -> None:
    """Fills `folder`; `whole` are weights and optimizer state where each process has a shard."""
    weights, optimizer = whole or (None, run.optimizer.state_dict())
    run.sampler.policy.save(folder, weights)
    run.tokenizer.save_pretrained(folder)
    (folder / "run_config.json").write_text(run.config.model_dump_json(by_alias=True))
    scaler = run.accelerator.scaler
    state = {
        "state": asdict(run.state),
        "optimizer": optimizer,
        "scaler": scaler.state_dict() if scaler else None,
        "controller": run.controller.state_dict(),
        "region": asdict(run.region),
        "rewards": run.rewards.state_dict(),
        "held_out": run.scoring.held_out.state_dict(),
        "rng": rng,
    }
    torch.save(state, folder / "trainer.pt")


def newest(run: "Run") -> Path | None:
    """The checkpoint that RESUME goes on from; one process verifies it and tells the others."""
    found: list[Path | None] = [None]
    if run.config.RESUME and run.is_main and (checked := checkpoint.newest(run.output)):
        found = [checked[0]]
    return broadcast_object_list(found)[0]


def restore(run: "Run", folder: Path) -> None:
    """Continues from the checkpoint in `folder`; the policy was loaded from it already."""
    # Processes of a machine share a mapped file, and each copies what it needs to its device. On a
    # CPU nothing would be copied, and a run would go on upon a file that is to be pruned.
    mapped = run.accelerator.device.type != "cpu"
    file = folder / "trainer.pt"
    saved = torch.load(file, weights_only=True, map_location="cpu", mmap=mapped)
    run.state = State(**saved["state"])
    if run.sharded:
        run.shards.load_optimizer(run.policy, run.optimizer.optimizer, saved["optimizer"])
    else:
        run.optimizer.load_state_dict(saved["optimizer"])
    if run.accelerator.scaler:
        run.accelerator.scaler.load_state_dict(saved["scaler"])
    run.controller.load_state_dict(saved["controller"])
    run.region = TrustRegion(**saved["region"])
    run.rewards.load_state_dict(saved["rewards"])
    run.scoring.held_out.load_state_dict(saved["held_out"])
    own = run.accelerator.process_index
    checkpoint.set_rng_state(saved["rng"][own if own < len(saved["rng"]) else 0])


def refuse_changes(folder: Path, config: Config) -> None:
    """Raises UserError where a run that goes on from `folder` would be another one."""
    before = json.loads((folder / "run_config.json").read_text())
    now = json.loads(config.model_dump_json(by_alias=True))
    for keys in (before, now):
        for name in REWARD_KEYS:
            keys[name] = [
                {key: value for key, value in reward.items() if key not in FREE_OF_REWARD}
                for reward in keys.get(name, [])
            ]
    for key in now.keys() - FREE_KEYS:
        if before.get(key) != now[key]:
            raise UserError(
                f"RESUME: {key} was {before.get(key)} in {folder} and is {now[key]} now; a "
                f"resumed run goes on as it was. To go on otherwise, start a new run with "
                f"MODEL={folder} and another OUTPUT_DIR"
            )


def finish(run: "Run", stop: StopSignal, log: RunLog | None) -> int:
    """Saves what was reached and says so; the exit status, 128 + signal if one came."""
    stopped_by = run.stopped_by(stop)
    done = run.state.step >= run.last_step
    folder = save(run, log, "final" if done else None)
    step = run.state.step
    said = f"finished: {step} steps, the model is in {folder}"
    if not done:
        name = signal.Signals(stopped_by).name
        said = f"stopped by {name} after step {step}, saved in {folder}; RESUME=auto continues"
    if log:
        log.close()
        print(said)
    run.accelerator.end_training()
    return 0 if done else 128 + stopped_by


def pause(run: "Run", reason: Paused, stop: StopSignal, log: RunLog | None) -> int:
    """Saves the run as it was before the step that could not be finished; the exit status."""
    run.state.step -= 1
    folder = save(run, log)
    if log:
        log.close()
        print(
            f"paused before step {run.state.step + 1}: {printable(str(reason))}. Saved in "
            f"{folder}; RESUME=auto tries again",
            file=sys.stderr,
        )
    run.accelerator.end_training()
    return 128 + stop.number if stop.number else 3
