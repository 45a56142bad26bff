"""What accelerate's trackers get: the config, each step's numbers, samples where they take any.

A tracker that fails at the start is a mistake in the config. One that fails later gets nothing
more: the run's own files have everything.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tabulate import tabulate

from adaptiverl.config.schema import ConfigError
from adaptiverl.files.logs import Row
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.metrics import Metrics, cell

ROWS = 8  # of a step
COLUMNS = ("step", "prompt", "completion", "reward")


def start_trackers(accelerator: Accelerator, c: RunConfig) -> None:
    """Raises ConfigError where one cannot be used."""
    values = c.model_dump(by_alias=True, exclude={"SCHEMA"})
    flat = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in values.items()}
    try:
        accelerator.init_trackers("adaptiverl", config=flat)
    except Exception as error:  # of any library
        raise ConfigError(f"TRACKERS {', '.join(c.TRACKERS)}: {error}") from error


def log_step(
    accelerator: Accelerator, metrics: Metrics, samples: Sequence[Row], step: int
) -> Iterator[str]:
    """Gives all trackers the numbers, and those that take them the first ROWS of `samples`.

    Yields what is to be said of a tracker that failed, which is one no more.
    """
    numbers = {name: value for name, value in metrics.items() if value is not None}
    rows = [[row.get(name) for name in COLUMNS] for row in samples[:ROWS]]

    def tell(tracker: GeneralTracker) -> None:
        tracker.log(numbers, step=step)
        if rows:
            _log_samples(tracker, rows, step)

    return _each(accelerator, tell)


def end_trackers(accelerator: Accelerator) -> Iterator[str]:
    """Lets each tracker finish; yields what is to be said of one that failed."""
    yield from _each(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers.clear()


def _each(accelerator: Accelerator, act: Callable[[GeneralTracker], None]) -> Iterator[str]:
    for tracker in list(accelerator.trackers):
        try:
            act(tracker)
        except Exception as error:  # of any library: its server is gone, its disk is full, …
            accelerator.trackers.remove(tracker)
            why = str(error).strip() or type(error).__name__
            yield f"the tracker {tracker.name} failed and gets nothing more: {why}"


def _log_samples(tracker: GeneralTracker, rows: list[list[Any]], step: int) -> None:
    if hasattr(tracker, "log_table"):  # wandb, clearml
        tracker.log_table("samples", columns=list(COLUMNS), data=rows, step=step)
    elif tracker.name == "tensorboard":
        tracker.log({"samples": _markdown(rows)}, step=step)
    elif tracker.name == "trackio":
        import pandas
        import trackio

        table = trackio.Table(dataframe=pandas.DataFrame(rows, columns=list(COLUMNS)))
        tracker.log({"samples": table}, step=step)


def _markdown(rows: Sequence[Sequence[Any]]) -> str:
    """TensorBoard renders it; | would end a cell."""
    cells = [[cell(value, width=1000).replace("|", "\\|") for value in row] for row in rows]
    return tabulate(cells, COLUMNS, tablefmt="pipe", disable_numparse=True)
