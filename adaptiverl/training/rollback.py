"""Takes a run that has collapsed back to where it was sound, as if it had been killed and resumed.

The parts are built anew from the checkpoint. Writing that checkpoint again, with the rollback in
it, is the moment at which the rollback has happened: a run that is killed before makes the steps
to the collapse again, and one that is killed later goes on from there.
"""

import gc
from contextlib import chdir

import torch

from adaptiverl.files import checkpoint
from adaptiverl.training import state
from adaptiverl.training.build import Parts, build, narrow
from adaptiverl.training.collapse import MAX_ROLLBACKS, Collapsed, sound_before
from adaptiverl.training.folder import RunFolder
from adaptiverl.training.keys import RunConfig

SLOWER = 0.1  # the factor on the rate, where no trust region could be smaller


def may_roll_back(c: RunConfig, folder: RunFolder) -> bool:
    return c.ON_COLLAPSE == "rollback" and folder.parts.progress.rollbacks < MAX_ROLLBACKS


def roll_back(c: RunConfig, folder: RunFolder, collapse: Collapsed) -> None:
    """Gives `folder` the parts of the last sound checkpoint, or of the start if there is none.

    The caller must hold no reference to the old parts: two policies may not fit on the device.
    """
    guards, count = folder.parts.guards, folder.parts.progress.rollbacks + 1
    target = state.among(c, folder.parts.runtime, sound_before(guards.sound_steps, collapse.step))
    accelerator = folder.release()
    accelerator.free_memory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    with chdir(c.here):  # a reward may have left it, and paths in the config begin there
        parts = build(c, accelerator, resume=lambda *_: target)
    known = parts.progress.rollbacks  # that the checkpoint has been through
    steps = [row["step"] for row in guards.events if row["action"] == "rollback"]
    for number, showed in enumerate([*steps, collapse.step][known:], known + 1):
        how = _make_smaller(parts, number, showed)
    parts.progress.rollbacks = count
    step = parts.progress.step
    parts.guards.events = guards.events
    parts.guards.event(
        collapse.step,
        collapse.kind,
        f"{collapse}. Rolled back to step {step} ({count} of at most {MAX_ROLLBACKS} times); it "
        f"goes on with {how} and other random numbers",
        "rollback",
    )
    folder.go_back(parts, target.name if target else checkpoint.step_name(0))


def _make_smaller(parts: Parts, number: int, step: int) -> str:
    """Halves the trust region, or divides the rate by ten, and records it; what it did, in words.

    For the rollback `number`, from 1, because of a collapse in `step`.
    """
    optimizer = parts.optimizer
    if region := optimizer.trust_region:
        name, old = "trust_region_kl", region.kl
        narrow(optimizer, number)
        new, how = region.kl, f"half of the trust region, TRUST_REGION_KL {region.kl:.3g}"
    else:
        name, old = "lr", optimizer.lr
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * SLOWER
        new, how = optimizer.lr, f"a tenth of the learning rate ({optimizer.lr:.3g})"
    change = {"step": parts.progress.step + 1, "hyperparameter": name, "rule": "rollback"}
    change |= {"signal": "collapse", "value": step, "old": old, "new": new}
    parts.progress.changes.append(change)
    return how
