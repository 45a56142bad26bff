"""The folder of a run: its lock, what each step appends to it, checkpoints, and how a run ends.

Single files are files/'s.
"""

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import filelock
import torch

from adaptiverl.commands.report import write_report
from adaptiverl.config.schema import ConfigError
from adaptiverl.files import checkpoint
from adaptiverl.files.console import printable
from adaptiverl.files.logs import Row, RunLog
from adaptiverl.files.process import Paused, StopSignal
from adaptiverl.training.build import Parts
from adaptiverl.training.inputs import as_config_error
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.metrics import Metrics, dynamics_lines, step_line
from adaptiverl.training.progress import progress_rows


class RunFolder:
    """OUTPUT_DIR; one process writes it, and all call the same methods together."""

    def __init__(self, c: RunConfig, parts: Parts):
        self.config, self.parts, self.path = c, parts, Path(c.OUTPUT_DIR)
        self.lock: filelock.BaseFileLock | None = None
        self.log: RunLog | None = None  # of the main process

    def open(self) -> None:
        """Takes the folder, puts an earlier run's files aside, and begins the logs."""
        c, parts, step = self.config, self.parts, self.parts.progress.step
        if parts.runtime.is_main:
            with as_config_error("OUTPUT_DIR"):
                self.lock = checkpoint.lock(self.path)
            if parts.resumed:
                print(f"resumed after step {step} from {parts.resumed}")
            else:
                if c.RESUME:
                    print(f"no checkpoint in {self.path} to resume from: starting a new run")
                checkpoint.set_aside(self.path)
            files = checkpoint.FILES if parts.dynamics else checkpoint.FILES[:-1]
            self.log = RunLog(self.path, step, parts.last_step, files)
            resolved = c.model_dump_json(by_alias=True, indent=2)
            (self.path / "config.json").write_text(resolved + "\n")
        parts.runtime.accelerator.wait_for_everyone()
        if c.TRACKERS:
            parts.runtime.accelerator.init_trackers("adaptiverl", config=_flat(c))
        if not parts.resumed:  # a checkpoint comes with what was written before it
            for kind, said in parts.checked.notes:
                self._event(kind, said, "warn")
            self._show_progress()

    def record(self, metrics: Metrics, samples: list[Row]) -> None:
        """Writes the step to the run's files and the trackers, and a line to the console."""
        c, step, last = self.config, self.parts.progress.step, self.parts.last_step
        number = {"step": step}
        changes = [change | number for change in self.parts.changes]
        self.parts.changes.clear()
        if log := self.log:
            if self.parts.dynamics and c.DYNAMICS_EVERY and step % c.DYNAMICS_EVERY == 0:
                rows = [number | row for row in self.parts.dynamics()]
                log.say(dynamics_lines(type(self.parts.optimizer.base).__name__, step, rows))
                log.write("dynamics.jsonl", rows)
            log.write("metrics.jsonl", [number | metrics])
            log.write("samples.jsonl", samples)
            log.write("controller.jsonl", changes)
            log.advance(metrics["reward"])
            if c.LOG_EVERY and (step in (1, last) or step % c.LOG_EVERY == 0):
                log.say(step_line(number | metrics))
        if c.TRACKERS:
            numbers = {name: value for name, value in metrics.items() if value is not None}
            self.parts.runtime.accelerator.log(numbers, step=step)
        self._show_progress()

    def _show_progress(self) -> None:
        rows = progress_rows(self.config, self.parts)
        if self.log:
            self.log.write("progress.jsonl", rows)

    def _event(self, kind: str, message: str, action: str) -> None:
        """A line of events.jsonl: what happened to the run, in words."""
        if self.log:
            row = {"step": self.parts.progress.step, "kind": kind}
            self.log.write("events.jsonl", [row | {"message": message, "action": action}])

    def save(self, name: str | None = None) -> Path:
        """Writes the checkpoint `name` (`step-000012`), and returns where."""
        parts, step = self.parts, self.parts.progress.step
        parts.checked.refuse_broken_weights(parts.policy)
        folder = self.path / (name or f"step-{step:06d}")
        state = {key: each.state_dict() for key, each in parts.stateful.items()}
        shards = parts.runtime.shards
        weights = shards.whole_weights(parts.policy) if shards else None
        if self.log:
            self.log.sync()

            def write(where: Path) -> None:
                parts.sampler.policy.save(where, weights)
                parts.sampler.tokenizer.save_pretrained(where)
                (where / "run_config.json").write_text(self.config.model_dump_json(by_alias=True))
                torch.save(state, where / "trainer.pt")

            checkpoint.save(folder, step, write)
            checkpoint.prune(self.path, self.config.KEEP_CHECKPOINTS, written=folder)
        parts.runtime.accelerator.wait_for_everyone()
        return folder

    def finish(self, stop: StopSignal) -> int:
        """Saves what was reached and says so; the exit status, 128 + signal if one came."""
        stopped_by = self.parts.runtime.largest(stop.number)
        step, done = self.parts.progress.step, self.parts.progress.step >= self.parts.last_step
        name = "" if done else signal.Signals(stopped_by).name
        if not done:
            self._event("stopped", f"stopped by {name} after step {step}", "stop")
        folder = self.save("final" if done else None)
        said = f"finished: {step} steps, the model is in {folder}"
        if not done:
            said = f"stopped by {name} after step {step}, saved in {folder}; RESUME=auto continues"
        self._end(said)
        return 0 if done else 128 + stopped_by

    def pause(self, reason: Paused, stop: StopSignal) -> int:
        """Saves the run as it was before the step that could not be finished; the exit status."""
        self.parts.progress.step -= 1
        self._event("paused", str(reason), "stop")
        folder = self.save()
        step = self.parts.progress.step + 1
        why = printable(str(reason))
        said = f"paused before step {step}: {why}. Saved in {folder}; RESUME=auto tries again"
        self._end(said, sys.stderr)
        return 128 + stop.number if stop.number else 3

    def fail(self, mistake: ConfigError) -> None:
        """Writes down why the run ends without a checkpoint."""
        self._event("failed", str(mistake), "stop")
        if self.log:
            self.log.close()
            self._report()

    def _end(self, said: str, where: Any = None) -> None:
        if self.log:
            self.log.close()
            self._report()
            print(said, file=where)
        self.parts.runtime.accelerator.end_training()

    def _report(self) -> None:
        """Writes report.html; a report that cannot be written must not end a run that is saved."""
        if self.config.REPORT:
            try:
                write_report(self.path)
            except Exception as error:
                logging.warning(
                    "%s was not written (%s: %s): `adaptiverl report %s` tries again",
                    self.path / "report.html",
                    type(error).__name__,
                    error,
                    self.path,
                )

    def close(self) -> None:
        """Gives back OUTPUT_DIR."""
        if self.log:
            self.log.close()
        if self.lock:
            self.lock.release()


def _flat(c: RunConfig) -> dict[str, Any]:
    """The config as trackers take it: numbers and strings."""
    values = c.model_dump(by_alias=True)
    return {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in values.items()}
