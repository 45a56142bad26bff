"""What a run was made with: versions, device, working directory, command; one row per start."""

import json
import platform
import sys
from datetime import datetime
from importlib.metadata import version

import torch

import adaptiverl
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.runtime import Runtime

FILE = "environment.jsonl"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets")


def add_environment(c: RunConfig, runtime: Runtime) -> None:
    """Appends a row to the file in the run's folder.

    Of the command line it has the words alone, and no variables of the environment.
    """
    device = runtime.device
    row = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": list(sys.argv),
        "directory": str(c.here),
        "adaptiverl": adaptiverl.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "processes": runtime.processes,
        "threads": torch.get_num_threads(),
    }
    with (c.output_dir / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
