"""The folder of a run, read: its config, its metrics, and which checkpoint to use.

Loads torch only to verify a checkpoint. Leaves out models and rewards, which are trained.py's.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import NamedTuple

from adaptiverl.commands.curves import mend_config, read_run, whole_rows
from adaptiverl.config.loading import load_config
from adaptiverl.config.schema import ConfigError
from adaptiverl.files.manifest import MANIFEST, read_manifest
from adaptiverl.training.keys import RunConfig


class Checkpoint(NamedTuple):
    """A folder with the run's weights after `step` steps."""

    path: Path
    step: int


class RunReader:
    """What the run in `path` left. Raises ConfigError where `path` holds no run."""

    def __init__(self, path: Path):
        self.path = path.resolve()
        if not self.path.is_dir():
            raise ConfigError(f"{path} is not a folder: name the OUTPUT_DIR of a run")
        if (self.path / "run_config.json").exists():
            raise ConfigError(
                f"{path} is a checkpoint: name the folder of its run, {self.path.parent}, and "
                f"choose the checkpoint by --checkpoint {_typed(self.path.name)}"
            )
        if not ((self.path / "metrics.jsonl").exists() or self.checkpoints()):
            raise ConfigError(f"{path} holds no run: name the OUTPUT_DIR of a run")
        config = self.path / "config.json"
        if not config.exists():
            mend = mend_config(self.path) or "put it back from a copy"
            raise ConfigError(f"{config} is missing, with the keys of the run; {mend}")
        # A tracker of the run need not be installed where its model is used
        self.config = load_config(config, ["TRACKERS=[]"], schema=RunConfig)

    @property
    def is_chat(self) -> bool:
        """Whether the run's prompts are conversations, by the first of its samples."""
        file = self.path / "samples.jsonl"
        if not file.exists():
            return False
        with file.open(encoding="utf-8") as lines:
            first = lines.readline()
        return bool(first) and isinstance(json.loads(first)["prompt"], list)

    def checkpoints(self) -> dict[str, int]:
        """The steps of all checkpoints by name, undamaged or not, in the order of the steps."""
        found = {}
        for name in ("step-*", "best", "final"):
            for manifest in self.path.glob(f"{name}/{MANIFEST}"):
                try:
                    found[manifest.parent.name] = read_manifest(manifest.parent).step
                except (OSError, ValueError) as error:
                    logging.warning("%s is damaged (%s: %s)", manifest.parent, MANIFEST, error)
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def choose(self, which: str | None = None) -> Checkpoint:
        """The checkpoint `which`: best, final or a step's number.

        None is best if there is one, else the newest that is undamaged; a run that has not
        finished, or whose newest checkpoint is damaged, is warned of. Raises ConfigError if
        `which` does not exist or is damaged, or if there is none.
        """
        steps = self.checkpoints()
        if not steps:
            if read_run(self.path).state != "running":
                raise ConfigError(f"{self.path} ended before it wrote a checkpoint: start it anew")
            wait = f"wait for SAVE_EVERY {every}, or " if (every := self.config.SAVE_EVERY) else ""
            raise ConfigError(
                f"{self.path} has no checkpoint yet: {wait}stop the run by Ctrl-C, which saves"
            )
        names = [name for name, step in steps.items() if which in (name, str(step))]
        if which and not names:
            known = ", ".join(dict.fromkeys(map(_typed, steps)))
            raise ConfigError(
                f"--checkpoint {which}: {self.path} has no such checkpoint; there is: {known}"
            )
        from adaptiverl.files import checkpoint  # imports torch

        if which:
            name = names[0]
            if wrong := checkpoint.damage(self.path / name):
                raise ConfigError(
                    f"{self.path / name} is damaged ({wrong}): choose another by --checkpoint"
                )
            return Checkpoint(self.path / name, steps[name])
        best = self.path / "best"
        wrong = checkpoint.damage(best) if best.is_dir() else None
        kind = "best" if "best" in steps and wrong is None else "newest"
        found = (best, steps["best"]) if kind == "best" else checkpoint.newest(self.path)
        if found is None:
            raise ConfigError(f"all checkpoints in {self.path} are damaged")
        if wrong:
            logging.warning(
                "%s is damaged (%s): using the newest checkpoint, %s", best, wrong, found[0].name
            )
        if "final" not in steps:
            logging.warning(
                "%s has not finished: using its %s checkpoint, %s", self.path, kind, found[0].name
            )
        return Checkpoint(*found)

    @contextmanager
    def as_started(self) -> Iterator[None]:
        """Within this, the working directory is the one where the run was started.

        Relative paths in the config and modules of python rewards are found from there. Where that
        folder is gone, as on another machine, it follows from a relative OUTPUT_DIR; else the
        working directory stays as it is.
        """
        here, place = Path.cwd(), self.path
        starts = whole_rows(place / "environment.jsonl")  # earlier versions wrote none
        output = Path(os.path.normpath(self.config.OUTPUT_DIR))
        if starts and Path(starts[-1]["directory"]).is_dir():
            here = Path(starts[-1]["directory"])
        elif not output.is_absolute() and place.parts[-len(output.parts) :] == output.parts:
            here = Path(*place.parts[: -len(output.parts)])
        with chdir(here):
            if str(here) not in sys.path:
                sys.path.append(str(here))
            yield


def _typed(name: str) -> str:
    """A checkpoint's name as --checkpoint takes it: best, final or the number of a step."""
    return str(int(name[5:])) if name.startswith("step-") else name
