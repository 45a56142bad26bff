"""You will see a policy learn from labels in a file: what people said is replayed, nobody is asked.

    python examples/people.py [KEY=VALUE ...]

labels.jsonl says of 64 next words whether they are liked. They were labelled by hand for this
example. Of other words nobody has said anything: they are missing, neither for nor against.
The page that the run names is open for others to label on; the run waits for nobody.
"""

import json
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from adaptiverl.commands.arguments import read_command
from rewards.labels import Labels

ROOT = Path(__file__).parent.parent
FILE, QUESTION, SCALE = Path(__file__).with_name("labels.jsonl"), "Do you like it?", "binary"


def replay(source: Path, base: Path) -> int:
    """Writes the labels of `source` into `base`, where a human reward looks; how many they are."""
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    with closing(Labels(base, QUESTION, SCALE)) as labels:
        return sum(labels.add(r["prompt"], r["completion"], r["score"], "file") for r in rows)


def run(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of each step of a run in `folder`."""
    base, config = folder / "labels.sqlite", folder / "config.json"
    print(f"{replay(FILE, base)} labels")
    people = {
        "TYPE": "human", "QUESTION": QUESTION, "SCALE": SCALE, "LABELS": str(base),
        "WHERE": "web", "PORT": 0, "ASK": 1, "TIMEOUT": 0.01,
    }  # fmt: skip
    prompts = sorted({json.loads(line)["prompt"] for line in FILE.read_text("utf-8").splitlines()})
    (folder / "prompts.json").write_text(
        json.dumps([{"prompt": each} for each in prompts]), "utf-8"
    )
    keys = {
        "REWARDS": [people], "TRAIN_FILE": str(folder / "prompts.json"), "BATCH_SIZE": 48,
        "NUM_GENERATIONS": 16, "MAX_NEW_TOKENS": 1, "STEPS": 40, "SAVE_EVERY": 0,
        "OUTPUT_DIR": str(folder / "run"),
    }  # fmt: skip
    config.write_text(json.dumps(keys), "utf-8")
    command = read_command([str(config), *overrides])
    if status := train.main(command):
        raise SystemExit(status)
    lines = Path(command[0].OUTPUT_DIR, "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        rows = run(Path(scratch), *sys.argv[1:])
    for key in ("reward", "human/labelled"):
        first, last = (sum(row[key] for row in part) / len(part) for part in (rows[:5], rows[-5:]))
        print(f"{key}: {first:.2f} → {last:.2f}")
