"""Two CPU processes do what one does with the same global batch."""

import socket
import sys
from pathlib import Path

import pytest
from conftest import read_jsonl


def torchrun() -> tuple[str, ...]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    return (*command, "--master_addr", "127.0.0.1", "--master_port", str(port))


def test_two_processes_give_the_losses_of_one(run, main, settings):
    out = Path(settings["OUTPUT_DIR"])
    keys = settings | {
        "STEPS": 4,
        "GRAD_ACCUM": 2,
        "KL_ESTIMATOR": "k3",
        "OPTIM": "sgd",  # AdamW's first steps turn rounding errors into whole steps
        "LRATE": 1e-2,
        "EVAL_FILE": settings["TRAIN_FILE"],
        "EVAL_EVERY": 2,
    }
    assert main(keys | {"OUTPUT_DIR": f"{out}-one"}) == 0
    result = run(keys | {"OUTPUT_DIR": f"{out}-two"}, launcher=torchrun())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Step 1 |") == 1, "one process writes"

    one, two = (read_jsonl(Path(f"{out}-{n}") / "metrics.jsonl") for n in ("one", "two"))
    assert [row["step"] for row in two] == [1, 2, 3, 4]
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"tokens_per_second"}:
            if not name.startswith("seconds/"):
                # abs: the loss is a small mean of terms around 50, A times eight log-probabilities
                assert right[name] == pytest.approx(left[name], rel=1e-4, abs=1e-4), name
    samples = [read_jsonl(Path(f"{out}-{n}") / "samples.jsonl") for n in ("one", "two")]
    for left, right in zip(*samples, strict=True):
        assert left["completion_ids"] == right["completion_ids"]


def test_prompts_that_cannot_be_shared_are_refused(run, settings):
    """Three prompts for two processes."""
    result = run(settings | {"BATCH_SIZE": 6, "NUM_GENERATIONS": 2}, launcher=torchrun())
    assert result.returncode != 0
    assert "3 prompts a step cannot be shared by 2 processes" in result.stderr
