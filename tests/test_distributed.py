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
from contextlib import closing
sys.path.insert(0, {root!r})
import train
from adaptiverl.commands.arguments import read_command
from adaptiverl.files.process import StopSignal
from adaptiverl.training.build import build
from adaptiverl.training.folder import RunFolder
class Spy(RunFolder):
    def record(self, metrics, samples):
        runtime, progress = self.parts.runtime, self.parts.progress
        with open({folder!r} + f"/rank{{runtime.rank}}.jsonl", "a") as file:
            group = self.parts.optimizer.param_groups[0]
            group = {{k: v for k, v in group.items() if k != "params"}}
            state = [progress.kl_coef, progress.reward_ema]
            file.write(json.dumps([metrics, group, state], default=str) + "\\n")
        super().record(metrics, samples)
config, _ = read_command()
parts = build(config)
stop = StopSignal()
with closing(Spy(config, parts)) as folder:
    folder.open()
    train.train(config, parts, folder, stop)
    sys.exit(folder.finish(stop))
"""


# accelerate spreads a model by FSDP on GPUs only; what it then does works on CPUs too.
SHARDED = """
import sys
sys.path.insert(0, {root!r})
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
import train
from adaptiverl.commands.arguments import read_command
from adaptiverl.training.build import build, make_accelerator
def keep_whole_gradients(model, sync, **_):
    assert sync, "gradients of the whole model would be kept"
FSDPModule.set_requires_gradient_sync = keep_whole_gradients
class Sharding(Accelerator):
    def __init__(self, **options):
        super().__init__(**options)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["GPT2Block"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        )
        self.state._shared_state |= {{
            "distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin
        }}
config, _ = read_command()
parts = build(config, make_accelerator(config, Sharding))
assert isinstance(parts.policy, FSDPModule), "nothing was sharded: the test would show nothing"
sys.exit(train.run(config, parts))
"""


# What torchrun does for two processes, without an import in each of them.
TWO_PROCESSES = (sys.executable, str(ROOT / "tests/launch.py"))
# --standalone finds a port that is free, also while another suite runs; the workers are forked.
TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
    "--run_path", "--start_method", "fork",
)  # fmt: skip


# A sharded policy measures a rollout, and differentiates two losses of it.
MEASURED = """
import sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from adaptiverl.rl.loading import load_policy, load_tokenizer
from adaptiverl.rl.rollout import uniforms
from adaptiverl.rl.sampling.sampler import Sampler
from adaptiverl.rl.sharded import run_gathered

torch.set_num_threads(1)
dist.init_process_group("gloo")
whole = load_policy({model!r}, sharded=True)
whole.requires_grad_(True)
sampler = Sampler(whole, load_tokenizer({model!r}))
rollout = sampler(["This", "The acting in this film"], uniforms(0, 1, 2, 6))
weights = torch.randn(rollout.logprobs.shape) * rollout.completion_mask
dist.broadcast(weights, 0)


def losses(policy):
    measured = policy(rollout.with_weights(weights))
    yield -measured.score
    ratio = (policy(rollout).logprobs - rollout.logprobs + 0.1).exp()
    yield -torch.minimum(ratio * weights, ratio.clamp(0.9, 1.1) * weights).sum()


def gradients(policy):
    for loss in losses(policy):
        policy.zero_grad()
        loss.backward()
        grads = [p.grad for p in policy.parameters()]
        yield [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


expected = [[g.clone() for g in grads] for grads in gradients(whole)]
logprobs = whole.logprobs(rollout)
for block in whole.lm.transformer.h:
    fully_shard(block, reshard_after_forward=True)
fully_shard(whole, reshard_after_forward=True)
for one, other in zip(gradients(whole), expected, strict=True):
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
for _ in range(2):
    measured = run_gathered(whole, lambda: whole.logprobs(rollout))
    torch.testing.assert_close(measured, logprobs, rtol=1e-4, atol=1e-5)
assert "gathered_work" not in vars(whole)
narrow = load_policy({model!r}, sharded=True)
fully_shard(narrow, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
seen = []
narrow.register_forward_pre_hook(lambda _, given: seen.append(given[0]))  # after that of FSDP
narrow(rollout.with_weights(weights))
assert seen[0].weights.dtype == seen[0].logprobs.dtype == torch.float32
dist.destroy_process_group()
"""


APART = """
import json, math, sys
sys.path.insert(0, {root!r})
import torch
from adaptiverl import (
    AdaptiveOptimizer, AdaptiveScheduler, OnlineAdamW, mean_over_processes
)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
lonely = []
for rule in ("none", "loss_decay"):
    one = AdaptiveOptimizer(torch.optim.SGD([torch.zeros(1)], lr=1.0), lr_rule=rule)
    if rank == 0:  # the other process makes no such call, and is not waited for
        one.step_loss(1.0)
        one.step_loss(1.0)
    lonely.append(one.lr)
rates = []
for front in ("optimizer", "scheduler"):
    base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    bare = dict(lr_rule="loss_decay", loss_k=1.0, reward_rule="kelly", memory=1e9, max_drift=1e9)
    one = (AdaptiveOptimizer if front == "optimizer" else AdaptiveScheduler)(base, **bare)
    for loss, reward in [(0.5 + rank, 1.0 * rank), (1.0, math.nan if rank else 2.0)]:
        one.controller.observe(**mean_over_processes(dict(loss=loss, reward=reward)))
        one.controller.tick()
        rates.append(one.lr if front == "optimizer" else one.get_lr()[0])
online = OnlineAdamW([torch.nn.Parameter(torch.ones(9))])
for k in (1.0, 2.0):
    reward = math.nan if rank else k
    own = dict(loss=k + rank, reward=reward, kl=0.1 * (rank + k))
    online.observe(trust_region_kl=0.1, **mean_over_processes(own))
with open({folder!r} + f"/apart{{rank}}.json", "w") as f:
    json.dump([rates, online.signals, lonely], f)
torch.distributed.barrier()  # gloo aborts a process whose peer has gone
torch.distributed.destroy_process_group()
"""


def test_processes_that_see_different_signals_move_alike(start, settings, tmp_path):
    """A loss of 0.5 and 1.5 is one of 1; a reward that is NaN in one process is the other's."""
    script = tmp_path / "apart.py"
    script.write_text(APART.format(root=str(ROOT), folder=str(tmp_path)))
    process = start(settings, launcher=TWO_PROCESSES, program=str(script))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    both = [json.loads((tmp_path / f"apart{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0][:2] == both[1][:2]
    first, signals, lonely = both[0]
    assert lonely == [1.0, pytest.approx(0.9802, rel=1e-3)], "a call by one process does not hang"
    assert both[1][2] == [1.0, 1.0]
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
        "KL_COEF_TARGET": 0.5,
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
    assert result.stdout.count("Step 1/4 |") == 1, "one process writes"

    one, two = (read_jsonl(Path(f"{out}-{n}") / "metrics.jsonl") for n in ("one", "two"))
    assert [row["step"] for row in two] == [1, 2, 3, 4]
    for left, right in zip(without_clock(one), without_clock(two), strict=True):
        assert left.keys() == right.keys()
        for name in left:
            # The loss is a small mean of terms around 50, A times eight log-probabilities, which
            # agree to 1e-5: the first update is scaled up tenfold, by a KL of two completions
            near = 5e-4 if name == "loss" else 1e-4
            assert right[name] == pytest.approx(left[name], rel=1e-4, abs=near), name
    samples = [read_jsonl(Path(f"{out}-{n}") / "samples.jsonl") for n in ("one", "two")]
    for left, right in zip(*samples, strict=True):
        assert left["completion_ids"] == right["completion_ids"]


def test_both_processes_have_the_same_metrics_and_hyperparameters(start, keys, tmp_path):
    """To the last bit, seconds included: what one of them adapts, the other adapts too."""
    spy = tmp_path / "spy.py"
    spy.write_text(SPY.format(root=str(ROOT), folder=str(tmp_path)))
    process = start(keys, "STEPS=6", launcher=TWO_PROCESSES, program=str(spy))
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
    keys |= {"STEPS": 15, "SAVE_EVERY": 3, "OPTIM": "adamw", "LRATE": 1e-3, "LOG_EVERY": 1}
    whole = start(keys | {"OUTPUT_DIR": f"{out}-whole"}, launcher=TWO_PROCESSES)
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err

    killed = start(keys, launcher=TWO_PROCESSES)
    for line in killed.stdout:
        if line.startswith("Step 5/15 |"):
            break
    for pid in (*children(killed.pid), killed.pid):
        os.kill(pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    reached = len(read_jsonl(out / "metrics.jsonl"))
    assert 5 <= reached < 15, "killed in the middle"

    resumed = start(keys, "RESUME=auto", launcher=TWO_PROCESSES)
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
    result = run(keys, launcher=TWO_PROCESSES, program=str(script))
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
    result = run(keys, "RESUME=auto", launcher=TWO_PROCESSES, program=str(script))
    assert result.returncode == 0, result.stderr
    assert without_clock(read_jsonl(out / "metrics.jsonl")) == without_clock(two)
    assert (out / "final/model.safetensors").read_bytes() == final


def test_fsdp_gives_the_gradient_of_any_loss_and_casts_no_tensor_of_a_rollout(start, tmp_path):
    """On two CPU processes, against the same policy before it is sharded."""
    script = tmp_path / "measured.py"
    model = ROOT / "adaptiverl/assets/policy"
    script.write_text(MEASURED.format(root=str(ROOT), model=str(model)))
    process = start({}, launcher=TWO_PROCESSES, program=str(script))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def test_prompts_that_cannot_be_shared_are_refused(run, settings):
    """Three prompts for two processes."""
    result = run(settings | {"BATCH_SIZE": 6, "NUM_GENERATIONS": 2}, launcher=TWO_PROCESSES)
    assert result.returncode != 0
    assert "3 prompts per step cannot be shared by 2 processes" in result.stderr


@pytest.mark.parametrize("version", [1, 2])
def test_the_first_fsdp_is_refused(settings, version):
    """Its layers are flat and know nothing of being kept gathered while a policy samples."""
    from accelerate.utils import DistributedType

    from adaptiverl.config.schema import ConfigError
    from adaptiverl.training.build import make_accelerator
    from adaptiverl.training.keys import RunConfig

    spread = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=version == 2)
    config = RunConfig.model_validate(settings)
    if version == 2:
        assert make_accelerator(config, lambda **_: spread) is spread
    else:
        with pytest.raises(ConfigError, match="set fsdp_version: 2 in accelerate's config"):
            make_accelerator(config, lambda **_: spread)
