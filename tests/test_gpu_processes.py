"""NCCL: one process with DDP and graphs, two on one card where NCCL allows it, two cards, FSDP."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, read_jsonl, without_clock
from gpu_parts import CARD, on_card

CARDS = torch.cuda.device_count()
# Both processes on the first card: a half of the batch each, and the gradient of the whole.
TWO = """
import os, sys, torch
import torch.distributed as dist
sys.path[:0] = [{tests!r}, {root!r}]
from gpu_parts import kept_backend, sample
from test_decode import small_gpt2
from adaptiverl.rl.policy import Policy
device, rank = ("cuda", int(os.environ["RANK"])) if {card!r} else ("cpu", int(os.environ["RANK"]))
if {card!r}:
    torch.cuda.set_device(0)
dist.init_process_group("nccl" if {card!r} else "gloo")
dist.all_reduce(torch.ones(1, device=device))
print("both are on one card", flush=True)
policy = Policy(small_gpt2(300).to(device))
rollout = sample(kept_backend(policy), device, rows=8)
weights = torch.ones_like(rollout.logprobs) * rollout.completion_mask
whole = rollout.with_weights(weights)
ours = [p for p in policy.parameters() if p.requires_grad]
expected = torch.autograd.grad(policy(whole).score, ours)
spread = torch.nn.parallel.DistributedDataParallel(policy, device_ids=[0] if {card!r} else None)
part = whole.select(torch.arange(4 * rank, 4 * rank + 4, device=device))
(2 * spread(part).score).backward()
for p, gradient in zip(ours, expected, strict=True):
    scale = gradient.abs().max().clamp(min=1e-3)
    torch.testing.assert_close(p.grad / scale, gradient / scale, rtol=1e-3, atol=1e-3)
dist.barrier()
dist.destroy_process_group()
"""


def torchrun(processes: int) -> tuple[str, ...]:
    return (sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", str(processes))  # fmt: skip


def same_as_alone(run, main, settings, launcher: tuple[str, ...], far: float) -> None:
    """Metrics of steps with plain SGD, whose small differences stay small."""
    out = Path(settings["OUTPUT_DIR"])
    keys = settings | {"STEPS": 4, "OPTIM": "sgd", "LRATE": 1e-2, "BATCH_SIZE": 16}
    assert main(keys | {"OUTPUT_DIR": f"{out}-alone"}) == 0
    result = run(keys | {"OUTPUT_DIR": f"{out}-spread"}, launcher=launcher)
    assert result.returncode == 0, result.stderr
    one, other = (read_jsonl(Path(f"{out}-{n}") / "metrics.jsonl") for n in ("alone", "spread"))
    assert len(one) == 4
    for left, right in zip(without_clock(one), without_clock(other), strict=True):
        assert right == pytest.approx(left, rel=far, abs=far)


@on_card("processes")
def test_one_process_under_torchrun_does_what_one_does_alone(run, main, settings):
    """With NCCL's threads beside the capture of graphs."""
    same_as_alone(run, main, settings, torchrun(1), 1e-3)


@on_card("processes")
def test_two_processes_on_one_card(tmp_path):
    script = tmp_path / "two.py"
    names = {"root": str(ROOT), "tests": str(ROOT / "tests"), "card": CARD}
    script.write_text(TWO.format(**names))
    done = subprocess.run(
        [*torchrun(2), str(script)],
        cwd=ROOT, env=ENVIRONMENT | {"NCCL_DEBUG": "WARN"}, text=True, capture_output=True,
        timeout=150,
    )  # fmt: skip
    said = done.stdout + done.stderr
    if "Duplicate GPU" in said and "both are on one card" not in said:
        pytest.skip("NCCL allows no two processes on one card")
    assert done.returncode == 0, said


@on_card("processes")
@pytest.mark.skipif(CARDS < 2 and "TRY_WITHOUT_CARD" not in os.environ, reason="needs two cards")
def test_two_cards_do_what_one_does(run, main, settings):
    same_as_alone(run, main, settings, torchrun(2), 1e-3)


@on_card("processes")
@pytest.mark.skipif(CARDS < 2, reason="FSDP needs two cards")
def test_two_cards_shard_by_fsdp(run, main, settings, tmp_path):
    text = (ROOT / "configs/accelerate/8-gpus-fsdp.yaml").read_text()
    config = tmp_path / "fsdp.yaml"
    config.write_text(
        text.replace("GPTJBlock", "GPT2Block").replace("processes: 8", "processes: 2")
    )
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config))
    same_as_alone(run, main, settings, launch, 1e-2)
