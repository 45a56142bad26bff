"""The doctor on runs with a known fault, and on sound ones: real runs of a tiny model.

    python -m benchmarks.doctor [--seed 0] [--only NAME] [--out benchmarks/doctor.json]

Writes what was named first, and all that was named. Thresholds were chosen on --seed 1000 and up.
"""

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MINE = "benchmarks.doctor_rewards:"
PROMPTS = [
    "This film", "I saw it", "The actors", "My brother and I", "It was", "The story of the film",
    "When the lights", "A comedy", "The director", "Nobody in", "One of the", "We watched",
]  # fmt: skip
BASE: dict[str, Any] = {
    "MODEL": "benchmarks/policy-small", "BATCH_SIZE": 16, "NUM_GENERATIONS": 4,
    "MAX_NEW_TOKENS": 32, "STEPS": 40, "SAVE_EVERY": 0, "LOG_EVERY": 0,
}  # fmt: skip


def python(name: str, **keys: Any) -> dict[str, Any]:
    return {"TYPE": "python", "FUNCTION": MINE + name, "NAME": name} | keys


SENTIMENT = {"TYPE": "classifier", "MODEL": "adaptiverl/assets/sentiment", "LABEL": "positive"}
LENGTH = {"TYPE": "length", "MIN": 8, "MAX": 16}
JUDGE = {
    "TYPE": "judge", "MODEL": "none", "RUBRIC": "How good is it?", "RETRIES": 0, "MAX_MISSING": 0.2,
    "BASE_URL": "http://127.0.0.1:9/v1",
}  # fmt: skip
FREE = {"LR_RULE": "none"}  # no trust region
WIDE = {"TRUST_REGION_KL": 0.5, "TRUST_REGION_SCHEDULE": "constant"}


@dataclass
class Fault:
    """A run's keys, and how its parts, its prompts, its process or its folder are broken."""

    expected: str  # the kind of the doctor's first finding
    keys: dict[str, Any]
    gradient: Callable[[Any, int], Any] | None = None  # (gradient, step) → gradient
    model: Callable[[Path], None] | None = None  # alters a copy of MODEL
    kill_at: int = 0
    folder: Callable[[Path], None] | None = None
    prompts: list[str] = field(default_factory=lambda: PROMPTS)


def wrong_eos(folder: Path) -> None:
    """The tokenizer and the generation config end texts with a token that is never written."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token, number = max(tokenizer["model"]["vocab"].items(), key=lambda each: each[1])
    for name, key, value in (
        ("tokenizer_config.json", "eos_token", token),
        ("generation_config.json", "eos_token_id", number),
    ):
        keys = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(keys | {key: value}))


def tear(folder: Path) -> None:
    file = folder / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-150])


FAULTS: dict[str, Fault] = {
    "rate 1 without trust region": Fault(
        "rate too large", FREE | {"LRATE": 1.0, "REWARDS": [SENTIMENT]}
    ),
    "rate 0.03 without trust region": Fault(
        "rate too large", FREE | {"LRATE": 0.03, "REWARDS": [python("varied")]}
    ),
    "rate 1e-9 without trust region": Fault(
        "rate too small", FREE | {"LRATE": 1e-9, "REWARDS": [SENTIMENT]}
    ),
    "rate of 0": Fault("rate zero", FREE | {"LRATE": 0, "REWARDS": [SENTIMENT]}),
    "constant reward": Fault("dead reward", {"REWARDS": [python("constant")]}),
    "one of two rewards constant": Fault(
        "dead reward", {"REWARDS": [SENTIMENT, python("constant")]}
    ),
    "NaN for three of four": Fault("reward missing", {"REWARDS": [python("mostly_nan")]}),
    "reward raises": Fault("reward raises", {"REWARDS": [python("raises")]}),
    "hackable reward": Fault(
        "hacked",
        {"REWARDS": [python("the")], "HELD_OUT": [python("varied")], "KL_COEF": 0,
         "TRUST_REGION_KL": 0.05},
    ),
    "cut at 3 tokens": Fault("truncated", {"MAX_NEW_TOKENS": 3, "REWARDS": [SENTIMENT]}),
    "wrong end of text": Fault("wrong EOS", {"REWARDS": [SENTIMENT]}, model=wrong_eos),
    "the shortest text pays most": Fault(
        "empty completions",
        {"REWARDS": [python("short")], "KL_COEF": 0, "TRUST_REGION_KL": 0.2},
    ),
    "entropy collapse": Fault(
        "entropy collapse", WIDE | {"REWARDS": [python("the")], "KL_COEF": 0}
    ),
    "KL explosion": Fault("KL explodes", WIDE | {"REWARDS": [python("unlikely")],
                                                 "KL_COEF": 1e-6}),
    "KL_COEF 100": Fault("KL_COEF too large", {"KL_COEF": 100, "REWARDS": [SENTIMENT]}),
    "temperature 0.05": Fault("temperature", {"TEMPERATURE": 0.05, "REWARDS": [SENTIMENT]}),
    "batch of 2, one per prompt": Fault(
        "batch too small", {"BATCH_SIZE": 2, "NUM_GENERATIONS": 1, "REWARDS": [SENTIMENT]}
    ),
    "one reward 100 times as large": Fault(
        "one reward drowns", {"REWARDS": [SENTIMENT, python("huge")]}
    ),
    "two rewards in conflict": Fault(
        "conflict", {"REWARDS": [python("long"), python("short", WEIGHT=0.8)]}
    ),
    "gradient of 0": Fault(
        "gradient zero", {"REWARDS": [SENTIMENT]}, gradient=lambda g, step: g * 0
    ),
    "gradient NaN in each fourth step": Fault(
        "gradient not finite",
        {"REWARDS": [SENTIMENT]},
        gradient=lambda g, step: g * (float("nan") if step % 4 == 0 else 1.0),
    ),
    "prompts cut by MAXSEQ": Fault(
        "prompts cut", {"MAXSEQ": 34, "REWARDS": [SENTIMENT]},
        prompts=[f"{text} that we all know and saw again last night" for text in PROMPTS],
    ),
    "one prompt, again and again": Fault(
        "one prompt", {"REWARDS": [SENTIMENT]}, prompts=["This film"] * 12
    ),
    "killed half way": Fault("killed", {"REWARDS": [SENTIMENT], "SAVE_EVERY": 5}, kill_at=17),
    "disk full": Fault(
        "torn line", {"REWARDS": [SENTIMENT], "SAVE_EVERY": 5}, kill_at=12, folder=tear
    ),
    "judge that does not answer": Fault("judge", {"REWARDS": [JUDGE]}),
}  # fmt: skip

TASKS: dict[str, dict[str, Any]] = {
    "sentiment": {"REWARDS": [SENTIMENT]},
    "length": {"REWARDS": [LENGTH], "HELD_OUT": [python("varied")]},
    "word": {"REWARDS": [{"TYPE": "regex", "PATTERNS": r"\b(great|good|well|best|love)\b"}]},
    "variety": {"REWARDS": [python("varied")], "HELD_OUT": [SENTIMENT]},
    "two": {
        "REWARDS": [SENTIMENT | {"NORMALIZE": "zscore"}, LENGTH | {"NORMALIZE": "zscore"}],
        "HELD_OUT": [python("varied")],
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "without KL, pairs": {"KL_COEF": 0, "NUM_GENERATIONS": 2},
    "LoRA, temperature 0.7": {"FULLTUNE": False, "TEMPERATURE": 0.7},
    "rate 1e-4, no trust region": FREE | {"LRATE": 1e-4, "BASELINE": "batch"},
}
SOUND = {
    f"{task}, {setting}": Fault("", TASKS[task] | SETTINGS[setting])
    for task in TASKS
    for setting in SETTINGS
}


def run(fault: Fault, seed: int, folder: Path) -> None:
    """Makes the run in folder/run."""
    prompts, out = folder / "prompts.json", folder / "run"
    prompts.write_text(json.dumps([{"prompt": text} for text in fault.prompts]))
    keys = BASE | {"TRAIN_FILE": str(prompts), "OUTPUT_DIR": str(out), "SEED": seed} | fault.keys
    if any(reward["TYPE"] == "judge" for reward in keys["REWARDS"]):
        keys["REWARDS"] = [keys["REWARDS"][0] | {"CACHE": str(folder / "judge.sqlite")}]
    if fault.model:
        keys["MODEL"] = str(folder / "model")
        shutil.copytree(ROOT / BASE["MODEL"], folder / "model")
        fault.model(folder / "model")
    (folder / "config.json").write_text(json.dumps(keys))
    if fault.kill_at:
        killed(folder / "config.json", out / "metrics.jsonl", fault.kill_at)
    else:
        trained(folder / "config.json", fault.gradient)
    if fault.folder:
        fault.folder(out)


def trained(config: Path, gradient: Callable[[Any, int], Any] | None) -> None:
    """In this process."""
    from accelerate.state import AcceleratorState

    import train
    from adaptiverl.config.loading import load_config
    from adaptiverl.training.build import build
    from adaptiverl.training.keys import RunConfig

    c = load_config(config, schema=RunConfig)
    AcceleratorState._reset_state(reset_partial_state=True)
    parts = build(c)
    if gradient:
        for parameter in parts.policy.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda g: gradient(g, parts.progress.step))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with closing(parts.scoring):
        train.run(c, parts)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def killed(config: Path, metrics: Path, step: int) -> None:
    """In a process of its own, by SIGKILL once `step` is written down."""
    process = subprocess.Popen(
        [sys.executable, "train.py", str(config)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            process.send_signal(signal.SIGKILL)
        with_timeout(process)
    process.communicate()


def with_timeout(process: subprocess.Popen) -> None:
    try:
        process.wait(timeout=0.02)
    except subprocess.TimeoutExpired:
        return


def main() -> None:
    from adaptiverl.commands.curves import read_run
    from adaptiverl.commands.doctor import findings

    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--keep", type=Path, help="where the runs' folders stay, and are read again"
    )
    given = parser.parse_args()
    os.chdir(ROOT)
    logging.disable(logging.WARNING)
    rows = []
    for number, (name, fault) in enumerate((FAULTS | SOUND).items()):
        if given.only and given.only not in name:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = given.keep / str(number) if given.keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            out = folder / "run"
            if not (out / "metrics.jsonl").exists():  # or it was kept
                run(fault, given.seed + number, folder)
            named = [each.kind for each in findings(read_run(out))]
        right = named[:1] == [fault.expected] if fault.expected else not named
        rows.append({"run": name, "expected": fault.expected, "named": named, "right": right})
        print("  " if right else "XX", name, "|", fault.expected, "|", named, flush=True)
    for kind, own in (
        ("faults named", [row for row in rows if row["expected"]]),
        ("sound runs without alarm", [row for row in rows if not row["expected"]]),
    ):
        print(f"{sum(row['right'] for row in own)} of {len(own)} {kind}")
    if given.out:
        given.out.write_text(json.dumps({"seed": given.seed, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
