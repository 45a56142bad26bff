"""Writes what pytest does down as it does it, a JSON line each, so that a crash loses nothing.

A plugin of pytest's that benchmarks/gpu.py asks for; the file is named by GPU_LINES.
"""

import json
import os
from pathlib import Path

import pytest


def say(**values: object) -> None:
    with Path(os.environ["GPU_LINES"]).open("a") as file:
        file.write(json.dumps(values) + "\n")


@pytest.hookimpl(trylast=True)  # after those that -m leaves out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        mark = item.get_closest_marker("gpu")
        if mark:
            item.user_properties.append(("item", mark.args[0]))
    if "GPU_COLLECT" in os.environ:
        say(parts=[[item.nodeid, dict(item.user_properties)["item"]] for item in items])


def pytest_runtest_logstart(nodeid: str) -> None:
    say(part=nodeid, outcome="started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        own = dict(report.user_properties)
        own.pop("item", None)
        if report.skipped and isinstance(report.longrepr, tuple):
            why = report.longrepr[2].removeprefix("Skipped: ")
        else:
            why = str(report.longrepr)[-1500:] if report.failed else ""
        say(
            part=report.nodeid,
            outcome=report.outcome,
            seconds=round(report.duration, 2),
            figures=own,
            why=why,
        )
