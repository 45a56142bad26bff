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
from accelerate import Accelerator

from adaptiverl.commands.report import write_report
from adaptiverl.config.schema import ConfigError
from adaptiverl.files import checkpoint
from adaptiverl.files.console import counted, printable, say_at_once
from adaptiverl.files.logs import Row, RunLog
from adaptiverl.files.process import Paused, StopSignal, WaitEnded
from adaptiverl.training import resumed, reward_code, state
from adaptiverl.training.advice import bf16_advice, next_commands
from adaptiverl.training.build import Parts
from adaptiverl.training.collapse import Collapsed, sound_before
from adaptiverl.training.environment import add_environment
from adaptiverl.training.inputs import adapters_own, as_config_error
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.metrics import Metrics, dynamics_lines, interval_means, step_line
from adaptiverl.training.samples import progress_rows
from adaptiverl.training.trackers import end_trackers, log_step, start_trackers

PROGRESS = "progress.jsonl"


class RunFolder:
    """OUTPUT_DIR; one process writes it, and all call the same methods together."""

    def __init__(self, c: RunConfig, parts: Parts):
        self.config = c.model_copy(update=adapters_own(c))  # what is written down
        self.path = c.output_dir
        self.shown = Path(c.OUTPUT_DIR)  # on the console, as the user wrote it
        self._parts: Parts | None = parts
        self.lock: filelock.BaseFileLock | None = None
        self.log: RunLog | None = None  # of the main process
        # What RESUME=auto takes; `open` puts back one that a kill left moved away
        name = parts.resumed and parts.resumed.name.removeprefix(".old-")
        self.newest = self.shown / name if name else None
        self.interval: list[Metrics] = []  # steps since the last line on the console

    @property
    def parts(self) -> Parts:
        """Those that the run has now: a rollback replaces them."""
        assert self._parts is not None, "between `release` and `go_back`"
        return self._parts

    def open(self) -> None:
        """Takes the folder, puts an earlier run's files aside, and begins the logs."""
        c, parts, step = self.config, self.parts, self.parts.progress.step
        if parts.runtime.is_main:
            with as_config_error("OUTPUT_DIR"):
                self.lock = checkpoint.lock(self.path)
            checkpoint.put_back(self.path)
            if self.newest:
                print(f"resumed after step {step} from {self.newest}")
                if said := resumed.other_length(c, parts, self.newest.name):
                    print(said)
                if step >= c.STEPS:
                    print(f"nothing is left to do: it has {step} steps, and STEPS is {c.STEPS}")
            else:
                if c.RESUME:
                    what = f"no checkpoint in {self.shown} to resume from"
                    if (self.path / checkpoint.step_name(0)).exists():  # of another config
                        what = f"no step has been made in {self.shown}, and the config has changed"
                    print(f"{what}: starting a new run")
                checkpoint.set_aside(self.path)
                if advice := bf16_advice(c, parts):
                    print(advice)
            log = self._begin_logs()
            if self.newest:
                known = log.kept["metrics.jsonl"]
                for kind, said in resumed.warnings(c, parts, self.newest.name, known):
                    parts.guards.event(step, kind, said, "warn")
                self._write_events()
            if not (parts.resumed and parts.done):
                resolved = c.model_dump_json(by_alias=True, indent=2)
                (self.path / "config.json").write_text(resolved + "\n", "utf-8")
                add_environment(self.config, parts.runtime)
        parts.runtime.accelerator.wait_for_everyone()
        if parts.runtime.accelerator.log_with:
            start_trackers(parts.runtime.accelerator, c)
        if not parts.resumed:  # a checkpoint comes with what was written before it
            for kind, said in parts.checked.notes:
                parts.guards.note(step, kind, said, "warn")
            self._show_progress()

    def _begin_logs(self) -> RunLog:
        """Cuts the logs after the step that the run goes on from."""
        parts = self.parts
        shows = self.config.REPORT or (self.path / PROGRESS).exists()  # of before: it is cut, too
        used = {"dynamics.jsonl": parts.dynamics, PROGRESS: shows}
        files = [name for name in checkpoint.FILES if used.get(name, True)]
        self.log = RunLog(self.path, parts.progress.step, parts.last_step, files)
        self._write_events()
        return self.log

    def record(self, metrics: Metrics, samples: list[Row]) -> None:
        """Writes the step to the run's files and the trackers, and a line to the console."""
        c, step, last = self.config, self.parts.progress.step, self.parts.last_step
        number = {"step": step}
        changes = [change | number for change in self.parts.progress.changes]
        self.parts.progress.changes.clear()
        if log := self.log:
            if self.parts.dynamics and c.DYNAMICS_EVERY and step % c.DYNAMICS_EVERY == 0:
                rows = [number | row for row in self.parts.dynamics()]
                log.say(dynamics_lines(type(self.parts.optimizer.base).__name__, step, rows))
                log.write("dynamics.jsonl", rows)
            log.write("metrics.jsonl", [number | metrics])
            log.write("samples.jsonl", samples)
            log.write("controller.jsonl", changes)
            self._write_events()
            log.advance(metrics.get("reward_fixed_scale", metrics["reward"]))
        self.interval.append(metrics)
        due = c.LOG_EVERY and (step in (1, last) or step % c.LOG_EVERY == 0)
        if due and log:
            log.say(step_line(step, last, interval_means(self.interval)) + log.time_left())
        accelerator = self.parts.runtime.accelerator
        for failure in log_step(accelerator, metrics, samples if due else [], step):
            self.parts.guards.event(step, "tracker", failure, "warn")
            self._write_events()
        if due or not c.LOG_EVERY:
            self.interval.clear()
        self._show_progress()

    def _show_progress(self, ended: bool = False) -> None:
        rows = progress_rows(self.config, self.parts, ended)
        if self.log and rows:
            self.log.write(PROGRESS, rows)

    def save(self, name: str | None = None, evaluation: Metrics | None = None) -> Path:
        """Writes the checkpoint `name` (`step-000012`), and returns where, as the console says it.

        What `evaluation` says of it is written to best.json beside the weights.
        """
        parts, step = self.parts, self.parts.progress.step
        parts.checked.refuse_broken_weights(parts.policy)
        folder = self.path / (name or checkpoint.step_name(step))
        saved = {key: each.state_dict() for key, each in parts.stateful.items()}
        shards = parts.runtime.shards
        weights = shards.whole_weights(parts.policy) if shards else None
        if self.log:
            self.log.sync()

            def write(where: Path) -> None:
                parts.sampler.policy.save(where, weights)
                parts.sampler.tokenizer.save_pretrained(where)
                resolved = self.config.model_dump_json(by_alias=True)
                (where / "run_config.json").write_text(resolved, "utf-8")
                (where / state.PROMPTS).write_text(json.dumps(parts.prompts), "utf-8")
                marks = {name: code.fingerprint for name, code in parts.reward_code.items()}
                (where / reward_code.FILE).write_text(json.dumps(marks), "utf-8")
                torch.save(saved, where / "trainer.pt")
                if evaluation is not None:
                    shown = {k: v for k, v in evaluation.items() if k.startswith("eval/")}
                    text = json.dumps({"step": step} | shown, indent=2)
                    (where / "best.json").write_text(text, "utf-8")

            checkpoint.save(folder, step, write)
            spare = parts.guards.needed(step) if self.config.ON_COLLAPSE == "rollback" else ()
            checkpoint.prune(self.path, self.config.KEEP_CHECKPOINTS, folder, spare)
        parts.runtime.accelerator.wait_for_everyone()
        if name != checkpoint.BEST:
            self.newest = self.shown / folder.name
        return self.shown / folder.name

    def finish(self, stop: StopSignal) -> int:
        """Saves what was reached and says so; the exit status, 128 + signal if one came."""
        stopped_by = self.parts.runtime.largest(stop.number)
        step, why = self.parts.progress.step, self.parts.best.why_stop
        if not self.parts.done:
            said = self._stopped_event(stopped_by)
            self._end(f"{said}, saved in {self.save()}; RESUME=auto continues")
            return 128 + stopped_by
        said = f"finished: {counted(step, 'step')}, the"
        if why and step < self.parts.last_step:
            early = f"stopped early after step {step}, {why}"
            self._show_progress(ended=True)
            self._event("stopped early", early)
            said = f"{early}. The"
        said += f" model is in {self.save('final')}"
        self._end("\n".join([said, *self._best()]), follow=True)
        return 0

    def pause(self, reason: Paused, stop: StopSignal) -> int:
        """Saves the run as it was before the step that could not be finished; the exit status."""
        self.parts.progress.step -= 1
        stopped_by = self.parts.runtime.largest(stop.number)
        if stopped_by and isinstance(reason, WaitEnded):
            self._stopped_event(stopped_by)
        else:
            self._event("paused", str(reason))
        folder = self.save()
        step = self.parts.progress.step + 1
        why = printable(str(reason))
        said = f"paused before step {step}: {why}. Saved in {folder}; RESUME=auto tries again"
        self._end(said, sys.stderr)
        return 128 + stop.number if stop.number else 3

    def fail(self, mistake: ConfigError) -> None:
        """Writes down why the run ends without a checkpoint."""
        self._event("failed", str(mistake))
        if self.log:
            self.log.close()
            self._report()

    def _stopped_event(self, stopped_by: int) -> str:
        """That a signal stopped the run; in words."""
        name = signal.Signals(stopped_by).name
        said = f"stopped by {name} after step {self.parts.progress.step}"
        self._event("stopped", said)
        return said

    def _event(self, kind: str, message: str) -> None:
        """A line of events.jsonl on why the run ends; the console says it, too."""
        self.parts.guards.note(self.parts.progress.step, kind, message, "stop")
        self._write_events()

    def _write_events(self) -> None:
        if self.log:
            self.log.replace(checkpoint.EVENTS, self.parts.guards.events)

    def give_up(self, collapse: Collapsed) -> int:
        """Ends a run that has collapsed, with nothing saved of it; the exit status."""
        parts = self.parts
        times = parts.progress.rollbacks
        steps = [*sound_before(parts.guards.sound_steps, collapse.step), 0]
        sound = state.among(self.config, parts.runtime, steps)
        place = self.shown / sound.name if sound else None
        done = f"{collapse}. The run ends here" + (f", after {times} rollbacks" * (times > 0))
        model = f"MODEL={place}" if place else "the same MODEL"
        done += (
            ". RESUME=auto would make the same steps again: change that in a new run, with "
            f"{model} and another OUTPUT_DIR"
        )
        parts.guards.event(collapse.step, collapse.kind, done, "stop")
        self._write_events()
        where = f"the last sound checkpoint is {place}" if place else "there is no sound checkpoint"
        self._end(f"stopped after a collapse in step {collapse.step}: {where}", sys.stderr)
        return 3

    def release(self) -> Accelerator:
        """Lets go of the parts, so that their memory is free; what a new run needs of them."""
        accelerator = self.parts.runtime.accelerator
        self.parts.scoring.close()
        self._parts = None
        return accelerator

    def go_back(self, parts: Parts, name: str) -> None:
        """Makes `parts`, of an earlier step, those of the run, and `name` their checkpoint."""
        self._parts = parts
        self.interval.clear()
        if self.log:
            checkpoint.drop_after(self.path, parts.progress.step)
        self.save(name)
        if self.log:
            self.log.close()
            self._begin_logs()

    def _best(self) -> list[str]:
        """Which checkpoint was evaluated as the best, if any was."""
        file = self.path / checkpoint.BEST / "best.json"
        if not self.log or not file.exists():
            return []
        row = json.loads(file.read_text("utf-8"))
        score = f"eval/score {row['eval/score']:.3f}"
        place = self.shown / checkpoint.BEST
        return [f"best: step {row['step']} ({score}), the model is in {place}"]

    def interrupt(self) -> None:
        """Ends the waiting for people and judges, and says what comes; called by a signal."""
        if self.log:
            goes_on = f"RESUME=auto goes on from {self.newest}"
            then = goes_on if self.newest else "there is no checkpoint yet"
            said = "stopping: saves as soon as this step ends. A second signal ends the run at once"
            say_at_once(printable(f"{said}, unsaved; {then}"))
        if self._parts:
            self._parts.scoring.interrupt()

    def _end(self, said: str, where: Any = None, follow: bool = False) -> None:
        """The last words, `said`; with `follow` also what to do with the run."""
        if self.log:
            self.log.close()
            has_report = self._report()
            if follow:
                said = "\n".join([said, *next_commands(self.shown, has_report)])
            print(said, file=where)
        for failure in end_trackers(self.parts.runtime.accelerator):
            logging.warning("%s", failure)
        self.parts.runtime.accelerator.end_training()

    def _report(self) -> bool:
        """Writes report.html, and whether it is there: one that cannot be written must not end a
        run that is saved."""
        if not self.config.REPORT:
            return False
        try:
            write_report(self.path)
        except Exception as error:
            logging.warning(
                "%s was not written (%s: %s): `adaptiverl report %s` tries again",
                self.shown / "report.html",
                type(error).__name__,
                error,
                self.shown,
            )
            return False
        return True

    def close(self) -> None:
        """Gives back OUTPUT_DIR, and what rewards hold."""
        if self._parts:
            self._parts.scoring.close()
        if self.log:
            self.log.close()
        if self.lock:
            self.lock.release()
