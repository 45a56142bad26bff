"""Checkpoints: a folder that is there whole or not at all, and the newest that is undamaged.

A checkpoint is written beside its place under a hidden name, every file is synced, a manifest with
their hashes is written last, and the folder is renamed. What it holds is training/state.py's.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch

from adaptiverl.files.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from adaptiverl.files.room import naming

log = logging.getLogger(__name__)
LOCK = ".lock"  # in a run's folder; the operating system frees it when the process ends
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # errors of file systems without locks
BEST, EVENTS = "best", "events.jsonl"
FILES = (
    "metrics.jsonl", "samples.jsonl", "controller.jsonl", "progress.jsonl", "dynamics.jsonl",
)  # fmt: skip
WRITTEN = (  # all that a run leaves in its folder
    *FILES, EVENTS, "config.json", "environment.jsonl", "evaluation.json", "lr_vs_reward.png",
    "report.html", "tensorboard", "step-*", "final", BEST, ".old-*", ".new-*",
)  # fmt: skip


def save(folder: Path, step: int, write: Callable[[Path], None]) -> None:
    """Makes `folder` the checkpoint of `step`, filled by `write(temporary_folder)`."""
    temporary = folder.with_name(f".new-{folder.name}")
    with naming(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        open_to_umask(temporary)
        files = {f.relative_to(temporary).as_posix(): _sha256(f) for f in _files(temporary)}
        write_manifest(temporary, Manifest(step, files))
        for path in [*_files(temporary), temporary]:
            _sync(path)
        replaced = folder.with_name(f".old-{folder.name}")
        if folder.exists():  # a longer run's final/; a kill between the renames leaves .old-, found
            folder.rename(replaced)
        temporary.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def open_to_umask(folder: Path) -> None:
    """Gives the files in `folder`, which was made here, the mode of any new file.

    Libraries write weights for their owner alone, whatever the umask.
    """
    mode = folder.stat().st_mode & 0o666
    for file in _files(folder):
        file.chmod(mode)


def newest(output_dir: Path, steps: Collection[int] | None = None) -> tuple[Path, int] | None:
    """The undamaged checkpoint of the highest step, and that step; warns of damaged ones.

    Only of one of `steps`, unless that is None. best/ may be of a step that was taken back since:
    a run does not go on from it.
    """
    found = [each for each in _found(output_dir) if steps is None or each[0] in steps]
    for step, _, folder in sorted(found, reverse=True):
        wrong = damage(folder)
        if wrong is None:
            return folder, step
        log.warning("%s is damaged (%s): not used", folder, wrong)
    return None


def to_resume(output_dir: Path) -> Path | str | None:
    """The checkpoint that a run goes on from: the newest, or best/ if no other is undamaged.

    None where there was none yet; words where there were some, and a run would begin again.
    """
    if found := newest(output_dir):
        return found[0]
    for best in (output_dir / BEST, output_dir / f".old-{BEST}"):
        if best.is_dir() and (wrong := damage(best) or _taken_back(best)) is None:
            log.warning("no other checkpoint in %s is undamaged: going on from best/", output_dir)
            return best
        if best.is_dir():
            log.warning("%s is not used: %s", best, wrong)
    anew = "To start anew leave RESUME out: what is there is then put aside, in earlier-001 or so"
    if any(path for name in ("step-*", "final", BEST, ".old-*") for path in output_dir.glob(name)):
        return f"all checkpoints in {output_dir} are damaged. {anew}"
    metrics = output_dir / FILES[0]
    steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    if steps > _save_every(output_dir) > 0:
        return f"the run in {output_dir} has {steps} steps and no checkpoint any more. {anew}"
    return None


def _taken_back(best: Path) -> str | None:
    """Why its step may be one that the run there has rolled back since; None if it has not."""
    events = best.parent / EVENTS
    step = read_manifest(best).step
    for line in events.read_text("utf-8").splitlines() if events.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
            row = json.loads(line)
            if row["action"] == "rollback" and row["step"] >= step:
                return f"its step {step} may have been taken back after step {row['step']}"
    return None


def _save_every(output_dir: Path) -> int:
    """SAVE_EVERY of the run there; 0 where that is not known."""
    try:
        return int(json.loads((output_dir / "config.json").read_text("utf-8"))["SAVE_EVERY"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _found(output_dir: Path) -> list[tuple[int, bool, Path]]:
    """Step, whether it is final/, and folder of each checkpoint but best/."""
    found = []
    for path in output_dir.glob(f"*/{MANIFEST}"):
        folder = path.parent
        if not folder.name.startswith(".new-") and folder.name.removeprefix(".old-") != BEST:
            try:
                found.append((read_manifest(folder).step, folder.name == "final", folder))
            except ValueError as error:
                log.warning("%s is damaged (%s: %s): not used", folder, MANIFEST, error)
    return found


def drop_after(output_dir: Path, step: int) -> None:
    """Removes the checkpoints of later steps than `step`, but best/; a kill leaves whole ones."""
    later = [each for each in _found(output_dir) if each[0] > step]
    for _, _, folder in sorted(later, reverse=True):
        hidden = folder.with_name(f".new-{folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)


def put_back(output_dir: Path) -> None:
    """Puts back what a kill left moved away: between the two renames of `save`."""
    for replaced in output_dir.glob(".old-*"):
        folder = replaced.with_name(replaced.name.removeprefix(".old-"))
        if folder.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(folder)


def lock(output_dir: Path) -> filelock.BaseFileLock:
    """Makes `output_dir` and keeps it for this process until `release()` or the process ends.

    Raises OSError where another process has it. Where a file system has no locks, it warns.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(output_dir / LOCK, fallback_to_soft=False)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout as error:
        raise OSError(f"another run is writing to {output_dir}") from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        log.warning(
            "%s is on a file system without locks (%s): see that no other run writes there",
            output_dir,
            error.strerror if isinstance(error, OSError) else error,
        )
    return held


def holds_run(output_dir: Path) -> bool:
    """Whether a run was written there."""
    return (output_dir / FILES[0]).exists() or any(output_dir.glob(f"*/{MANIFEST}"))


def set_aside(output_dir: Path) -> None:
    """Moves what an earlier run wrote in `output_dir` into earlier-001, -002, …

    Other files stay: labels, judgements and the folders of other runs may be beside it.
    """
    if holds_run(output_dir):
        place = _earlier(output_dir)
        for path in [path for name in WRITTEN for path in output_dir.glob(name)]:
            path.rename(place / path.name)
        log.warning("%s held an earlier run: it is now in %s", output_dir, place)


def set_best_aside(output_dir: Path) -> Path | None:
    """Moves best/ alone into the next of earlier-001, -002, …; where it is now, if there is one."""
    best = output_dir / BEST
    return best.rename(_earlier(output_dir) / BEST) if best.exists() else None


def _earlier(output_dir: Path) -> Path:
    """Makes the next of earlier-001, -002, …"""
    taken = [int(path.name[8:]) for path in output_dir.glob("earlier-[0-9][0-9][0-9]")]
    place = output_dir / f"earlier-{max(taken, default=0) + 1:03d}"
    place.mkdir()
    return place


def prune(
    output_dir: Path, keep: int, written: Path | None = None, spare: Collection[int] = ()
) -> None:
    """Removes unfinished checkpoints, and all step checkpoints but the newest `keep`; 0 keeps all.

    The newest undamaged one always stays, and so do those of the steps `spare`. `written` is known
    to be undamaged: it is not read again.
    """
    for leftover in output_dir.glob(".new-*"):
        shutil.rmtree(leftover)
    steps = sorted(output_dir.glob("step-*"), key=lambda path: (len(path.name), path.name))
    steps = steps[::-1]  # the newest first
    whole = next((path for path in steps if path == written or damage(path) is None), None)
    for folder in steps[keep:] if keep else []:
        if folder != whole and folder.name not in map(step_name, spare):
            shutil.rmtree(folder)


def step_name(step: int) -> str:
    """The folder of a step's checkpoint: step-000012."""
    return f"step-{step:06d}"


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`; None if it is whole."""
    try:
        files = read_manifest(folder).files
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} has changed"
    return None


def rng_state() -> dict[str, Any]:
    """The state of every global random generator, in plain numbers and tensors."""
    numpy: Any = np.random.get_state()  # (kind, keys, …)
    return {
        "python": random.getstate(),
        "numpy": (numpy[0], numpy[1].tolist(), *numpy[2:]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot, and orders renames by itself
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows writes
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
