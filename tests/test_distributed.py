"""Two CPU processes do what one does with the same global batch, agree, and resume exactly."""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, read_jsonl, without_clock
from safetensors.torch import load_file

# Every process writes down each step's metrics and learning rate; only the main one has a log.
SPY = """
import json, sys
sys.path.insert(0, {root!r})
from adaptiverl.program import Run
import train
record = Run.record
def spy(run, metrics, samples, log):
    with open({folder!r} + f"/rank{{run.accelerator.process_index}}.jsonl", "a") as file:
        group = {{k: v for k, v in run.optimizer.param_groups[0].items() if k != "params"}}
        state = [run.state.kl_coef, run.state.reward_ema]
        file.write(json.dumps([metrics, group, state], default=str) + "\\n")
    record(run, metrics, samples, log)
Run.record = spy
sys.exit(train.main())
"""


# accelerate spreads a model by FSDP on GPUs only; what it then does works on CPUs too.
SHARDED = """
import sys
sys.path.insert(0, {root!r})
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
import train
from adaptiverl import setup
from torch.distributed.fsdp import FSDPModule
from adaptiverl.program import Run
def keep_whole_gradients(model, sync, **_):
    assert sync, "gradients of the whole model would be kept"
FSDPModule.set_requires_gradient_sync = keep_whole_gradients
start = Run.start
def start_sharded(run):
    assert isinstance(run.policy, FSDPModule), "nothing was sharded: the test would show nothing"
    return start(run)
Run.start = start_sharded
accelerator = setup.accelerator
def sharding(config):
    result = accelerator(config)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )
    result.state._shared_state |= {{
        "distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin
    }}
    return result
setup.accelerator = sharding
sys.exit(train.main())
"""


# --standalone finds a port that is free, also while another suite runs.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


APART = """
import json, logging, math, sys
sys.path.insert(0, {root!r})
import torch
from adaptiverl import AdaptiveOptimizer, AdaptiveScheduler, OnlineAdamW
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
lines = []
class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage()[:17])
logging.getLogger("adaptiverl").addHandler(Lines())
lonely = []
for rule in ("none", "loss_decay"):
    one = AdaptiveOptimizer(torch.optim.SGD([torch.zeros(1)], lr=1.0), lr_rule=rule)
    if rank == 0:  # the other process makes no such call, and is not waited for
        one.step_loss(1.0)
        one.step_loss(1.0)
    lonely.append(one.lr)
rates = []
for face in ("optimizer", "scheduler"):
    base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    bare = dict(lr_rule="loss_decay", loss_k=1.0, reward_rule="kelly", memory=1e9, max_drift=1e9,
                mean_over_processes=True)
    one = (AdaptiveOptimizer if face == "optimizer" else AdaptiveScheduler)(base, **bare)
    for loss, reward in [(0.5 + rank, 1.0 * rank), (1.0, math.nan if rank else 2.0)]:
        one.controller.observe(loss=loss, reward=reward)
        one.controller.tick()
        rates.append(one.lr if face == "optimizer" else one.get_lr()[0])
online = OnlineAdamW([torch.nn.Parameter(torch.ones(9))], mean_over_processes=True)
for k in (1.0, 2.0):
    reward = math.nan if rank else k
    online.observe(loss=k + rank, reward=reward, kl=0.1 * (rank + k), kl_target=0.1)
with open({folder!r} + f"/apart{{rank}}.json", "w") as f:
    json.dump([rates, online.signals, lonely, lines], f)
torch.distributed.barrier()  # gloo aborts a process whose peer has gone
torch.distributed.destroy_process_group()
"""


def test_processes_that_see_different_signals_move_alike(start, settings, tmp_path):
    """A loss of 0.5 and 1.5 is one of 1; a reward that is NaN in one process is the other's."""
    script = tmp_path / "apart.py"
    script.write_text(APART.format(root=str(ROOT), folder=str(tmp_path)))
    process = start(settings, launcher=TORCHRUN, program=str(script))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    both = [json.loads((tmp_path / f"apart{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0][:2] == both[1][:2]
    first, signals, lonely, lines = both[0]
    assert lonely == [1.0, pytest.approx(0.9802, rel=1e-3)], "a call by one process does not hang"
    assert lines == ["several processes"], "once, and not of an optimizer without rules"
    assert both[1][2:] == [[1.0, 1.0], []]
    assert first[:2] == first[2:]
    # KL 0.25 over 0.1; reward 2 against 1.1, loss 2.5 against 1.6, over their usual 1.05 and 1.55
    assert signals == pytest.approx([math.log(2.5) / 2, 0.9 / 1.05, 0.9 / 1.55, 0.0])
    kelly = [1 + 0.2 * math.tanh(0.5), 1 + 0.2 * math.tanh(0.9 * 0.5 + 0.1 * 2)]
    assert first[0] == pytest.approx(kelly[0] / 2, rel=1e-6)
    assert first[1] == pytest.approx(kelly[0] * kelly[1] / 4, rel=1e-6)


@pytest.fixture
def keys(settings):
    return settings | {
        "STEPS": 4,
        "BATCH_SIZE": 16,  # the KL of an update is measured on four, two in each process
        "GRAD_ACCUM": 2,
        "KL_ESTIMATOR": "k3",
        "KL_TARGET": 0.5,
        "OPTIM": "sgd",  # AdamW's first steps turn rounding errors into whole steps
        "LRATE": 1e-2,
        "EVAL_FILE": settings["TRAIN_FILE"],
        "EVAL_EVERY": 2,
    }


def test_two_processes_give_the_losses_of_one(run, main, keys):
    out = Path(keys["OUTPUT_DIR"])
    assert main(keys | {"OUTPUT_DIR": f"{out}-one"}) == 0
    result = run(keys | {"OUTPUT_DIR": f"{out}-two"}, launcher=TORCHRUN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Step 1 |") == 1, "one process writes"

    one, two = (read_jsonl(Path(f"{out}-{n}") / "metrics.jsonl") for n in ("one", "two"))
    assert [row["step"] for row in two] == [1, 2, 3, 4]
    for left, right in zip(without_clock(one), without_clock(two), strict=True):
        assert left.keys() == right.keys()
        for name in left:
            # abs: the loss is a small mean of terms around 50, A times eight log-probabilities
            assert right[name] == pytest.approx(left[name], rel=1e-4, abs=1e-4), name
    samples = [read_jsonl(Path(f"{out}-{n}") / "samples.jsonl") for n in ("one", "two")]
    for left, right in zip(*samples, strict=True):
        assert left["completion_ids"] == right["completion_ids"]


def test_both_processes_have_the_same_metrics_and_hyperparameters(start, keys, tmp_path):
    """To the last bit, seconds included: what one of them adapts, the other adapts too."""
    spy = tmp_path / "spy.py"
    spy.write_text(SPY.format(root=str(ROOT), folder=str(tmp_path)))
    process = start(keys, "STEPS=6", launcher=TORCHRUN, program=str(spy))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    first, second = (read_jsonl(tmp_path / f"rank{rank}.jsonl") for rank in (0, 1))
    assert len(first) == 6
    assert first == second
    assert {"loss", "kl", "grad_norm", "lr", "seconds/update"} <= first[0][0].keys()


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_killed_in_the_middle_two_processes_resume_exactly(start, keys):
    """SIGKILL to both workers and their launcher, then the same command with RESUME."""
    out = Path(keys["OUTPUT_DIR"])
    keys |= {"STEPS": 30, "SAVE_EVERY": 3, "OPTIM": "adamw", "LRATE": 1e-3, "LOG_EVERY": 1}
    whole = start(keys | {"OUTPUT_DIR": f"{out}-whole"}, launcher=TORCHRUN)
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err

    killed = start(keys, launcher=TORCHRUN)
    for line in killed.stdout:
        if line.startswith("Step 8 |"):
            break
    for pid in (*children(killed.pid), killed.pid):
        os.kill(pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    reached = len(read_jsonl(out / "metrics.jsonl"))
    assert 8 <= reached < 30, "killed in the middle"

    resumed = start(keys, "RESUME=auto", launcher=TORCHRUN)
    _, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    rows = [read_jsonl(Path(f"{out}{name}") / "metrics.jsonl") for name in ("-whole", "")]
    for right, left in zip(without_clock(rows[1]), without_clock(rows[0]), strict=True):
        assert right == left
    weights = [Path(f"{out}{name}") / "final/model.safetensors" for name in ("-whole", "")]
    assert weights[1].read_bytes() == weights[0].read_bytes()


def test_a_sharded_policy_does_what_a_whole_one_does(run, main, keys, tmp_path):
    """FSDP on two CPU processes: losses, checkpoints, and exact resume from its own checkpoint."""
    out = Path(keys["OUTPUT_DIR"])
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED.format(root=str(ROOT)))
    keys |= {"SAVE_EVERY": 2, "GRAD_ACCUM": 2}
    assert main(keys | {"OUTPUT_DIR": f"{out}-one"}) == 0
    result = run(keys, launcher=TORCHRUN, program=str(script))
    assert result.returncode == 0, result.stderr
    one, two = (read_jsonl(folder / "metrics.jsonl") for folder in (Path(f"{out}-one"), out))
    for left, right in zip(without_clock(one), without_clock(two), strict=True):
        assert right == pytest.approx(left, rel=1e-3, abs=1e-3)
    shapes = []
    for folder in (Path(f"{out}-one"), out):
        weights = load_file(folder / "final/model.safetensors")
        shapes.append({name: weight.shape for name, weight in weights.items()})
    assert shapes[0] == shapes[1]

    final = (out / "final/model.safetensors").read_bytes()
    for later in ("final", "step-000004"):
        shutil.rmtree(out / later)
    result = run(keys, "RESUME=auto", launcher=TORCHRUN, program=str(script))
    assert result.returncode == 0, result.stderr
    assert without_clock(read_jsonl(out / "metrics.jsonl")) == without_clock(two)
    assert (out / "final/model.safetensors").read_bytes() == final


def test_prompts_that_cannot_be_shared_are_refused(run, settings):
    """Three prompts for two processes."""
    result = run(settings | {"BATCH_SIZE": 6, "NUM_GENERATIONS": 2}, launcher=TORCHRUN)
    assert result.returncode != 0
    assert "3 prompts a step cannot be shared by 2 processes" in result.stderr


@pytest.mark.parametrize("version", [1, 2])
def test_the_first_fsdp_is_refused(monkeypatch, settings, version):
    """Its layers are flat and know nothing of being kept gathered while a policy samples."""
    from accelerate.utils import DistributedType

    from adaptiverl import setup
    from adaptiverl.run.config import Config, UserError

    spread = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=version == 2)
    monkeypatch.setattr(setup, "Accelerator", lambda **_: spread)
    if version == 2:
        assert setup.accelerator(Config(**settings)) is spread
    else:
        with pytest.raises(UserError, match="set fsdp_version: 2 in accelerate's config"):
            setup.accelerator(Config(**settings))
