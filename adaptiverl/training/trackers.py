"""Samples as tables or text, for the trackers of accelerate that take them."""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from tabulate import tabulate

from adaptiverl.files.logs import Row
from adaptiverl.training.metrics import cell

ROWS = 8  # of a step
COLUMNS = ("step", "prompt", "completion", "reward")


def log_samples(accelerator: Accelerator, samples: Sequence[Row], step: int) -> None:
    """The first ROWS of `samples`; trackers that take numbers alone get nothing."""
    rows = [[row.get(name) for name in COLUMNS] for row in samples[:ROWS]]
    for tracker in accelerator.trackers if rows else ():
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
