"""The optimizer's step in a run: skipped if a gradient is not finite, else with a measured KL."""

import math

from adaptiverl.rl.rollout import Rollout
from adaptiverl.training.build import Parts
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.metrics import Metrics
from adaptiverl.training.probe import UpdateKL


def update(
    c: RunConfig, parts: Parts, rollout: Rollout, seen: Metrics, informative: bool
) -> Metrics:
    """Lets loss, reward and gradient norm move hyperparameters, then steps; what the step did.

    `informative` says whether, within some prompt, rewards differ (rl/reinforce.py).
    """
    runtime, optimizer, progress = parts.runtime, parts.optimizer, parts.progress
    optimizer.observe(loss=seen["loss"], reward=seen["reward"], grad_norm=seen["grad_norm"])
    momentum = optimizer.betas[0] if optimizer.betas else optimizer.momentum
    result: Metrics = {"lr": optimizer.lr, "momentum": momentum or 0.0}
    if not math.isfinite(seen["grad_norm"]):
        progress.skipped += 1
        if runtime.accelerator.scaler:  # it skips the step by itself, and scales less from here on
            runtime.step(optimizer)
        optimizer.tick()
    elif optimizer.trust_region or optimizer.learned:
        probe = UpdateKL(
            runtime,
            parts.sampler.policy,
            rollout,
            first=parts.batches.rows.start,
            batch_size=c.BATCH_SIZE,
            precision=parts.precision,
        )
        runtime.step(optimizer, measure_kl=probe, min_kl=probe.min_kl, informative=informative)
        result |= _of_update(parts)
    else:
        runtime.step(optimizer)
    optimizer.zero_grad()
    return result | {"skipped": progress.skipped}


def _of_update(parts: Parts) -> Metrics:
    info, progress = parts.optimizer.info, parts.progress
    if info is None or (info.kl is None and info.scale):  # it was not measured
        return {}
    if not parts.optimizer.trust_region:
        return {"update_kl": info.kl}
    progress.updates_scaled += info.scale < 1
    return {
        "lr": info.lr,
        "update_kl": info.kl,
        "update_kl_target": info.target,
        "update_scale": info.scale,
        "update_signal_to_noise": round(info.signal_to_noise, 3),
        "updates_scaled": progress.updates_scaled,
    }
