"""The programs that are compared, each in a process that does one step for each line it reads.

It answers in JSON lines. `Worker`, at the end, is who asks.
"""

import importlib.util
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from sizes import ROOT, Size, synchronize
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_side import trl_config

STATUS = Path("/proc/self/status")  # Linux: what a process holds, and the most it held
PHASES = ("rollout", "reward", "reference", "update")
WARM_UP = 2  # turns of each worker that do not count
KL, RATE = 0.05, 1e-6
FOREVER = 10**6  # steps; the parent ends a worker by closing its stdin


def characters(completions: list[str], **_: Any) -> list[float]:
    """The reward of both."""
    return [len(text) / 100 for text in completions]


class Pace:
    """A worker's end of the pipe."""

    def __init__(self, device: str):
        self.device, self.start = device, 0.0
        self.replies = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print goes to stderr

    def ready(self) -> None:
        """Says that everything is loaded; the peak of memory counts from here."""
        self.reply(loaded=memory(self.device)["now"])
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif STATUS.exists():
            (STATUS.parent / "clear_refs").write_text("5")

    def wait(self) -> bool:
        """Until the parent wants a step; False if it wants no more."""
        line = sys.stdin.readline()
        self.start = time.perf_counter()
        return bool(line)

    def seconds(self) -> float:
        synchronize(self.device)
        return time.perf_counter() - self.start

    def done(self, seconds: float, laps: dict[str, float], length: float) -> None:
        """Answers with the step's seconds, those of PHASES in it, tokens a completion, memory."""
        phases = {"step": seconds} | laps | {"other": seconds - sum(laps.values())}
        self.reply(seconds=phases, length=length, peak=memory(self.device)["peak"])

    def reply(self, **values: Any) -> None:
        self.replies.write(json.dumps(values) + "\n")


def memory(device: str) -> dict[str, int]:
    """Bytes this process holds now, and the most it held."""
    if device == "cuda":
        return {"now": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    if STATUS.exists():
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return {"now": now, "peak": peak}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return {"now": peak, "peak": peak}


def ours(size: Size, folder: Path, pace: Pace, scratch: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from adaptiverl.config.loading import load_config
    from adaptiverl.files.process import StopSignal
    from adaptiverl.training.build import build
    from adaptiverl.training.folder import RunFolder
    from adaptiverl.training.keys import RunConfig
    from train import train

    class Paced(RunFolder):
        def record(self, metrics, samples):
            super().record(metrics, samples)
            laps = {lap: metrics[f"seconds/{lap}"] for lap in PHASES if f"seconds/{lap}" in metrics}
            pace.done(pace.seconds(), laps, metrics["completions/mean_length"])
            if not pace.wait():
                stop.number = signal.SIGTERM

    config = {
        "MODEL": str(folder),
        "TRAIN_FILE": str(folder / "prompts.json"),
        "REWARDS": [{"TYPE": "python", "FUNCTION": "workers:characters"}],
        "BATCH_SIZE": size.batch,
        "NUM_GENERATIONS": size.group,
        "MAX_NEW_TOKENS": size.tokens,
        "NORMALIZE_ADVANTAGES": False,
        "KL_COEF": KL,
        "LRATE": RATE,
        "LR_RULE": "none",  # TRL has nothing like it
        "BF16": size.bf16,
        "STEPS": FOREVER,
        "OUTPUT_DIR": str(scratch / "run"),
        "SAVE_EVERY": 0,
        "SAMPLES_EVERY": 0,
        "LOG_EVERY": 0,
    }
    (scratch / "config.json").write_text(json.dumps(config))
    c = load_config(scratch / "config.json", schema=RunConfig)
    parts = build(c)
    stop = StopSignal(parts.scoring.interrupt)
    with closing(parts.scoring), closing(Paced(c, parts)) as run_folder:
        run_folder.open()
        pace.ready()
        if pace.wait():
            train(c, parts, run_folder, stop)


def trl(size: Size, folder: Path, pace: Pace, scratch: Path, **more: Any) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RLOOTrainer

    laps: dict[str, float] = {}

    class Paced(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seconds = pace.seconds()
            laps["update"] = seconds - laps.pop("inputs")
            pace.done(seconds, laps, trainer._metrics["train"]["completions/mean_length"][-1])
            laps.clear()
            control.should_training_stop = not pace.wait()

    config = trl_config(
        output_dir=str(scratch),
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=size.batch,
        num_generations=size.group,
        max_completion_length=size.tokens,
        temperature=1.0,
        beta=KL,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_steps=FOREVER,
        use_cpu=size.device == "cpu",
        bf16=size.bf16,
        disable_dropout=True,
        **more,
    )
    trainer = RLOOTrainer(
        model=str(folder),
        reward_funcs=characters,
        args=config,
        train_dataset=Dataset.from_list(json.loads((folder / "prompts.json").read_text())),
        callbacks=[Paced()],
    )

    def time_calls(method: str, lap: str) -> None:
        inner = getattr(trainer, method)

        def outer(*args, **kwargs):
            if lap == "reference" and torch.is_grad_enabled():  # the update's own call
                return inner(*args, **kwargs)
            start = pace.seconds()
            result = inner(*args, **kwargs)
            laps[lap] = laps.get(lap, 0.0) + pace.seconds() - start
            return result

        setattr(trainer, method, outer)

    time_calls("_prepare_inputs", "inputs")
    time_calls("_generate", "rollout")
    time_calls("_calculate_rewards", "reward")
    time_calls("_get_per_token_logps_and_entropies", "reference")
    pace.ready()
    if pace.wait():
        trainer.train()


def trl_with_vllm(size: Size, folder: Path, pace: Pace, scratch: Path) -> None:
    """vLLM in the same process, on the same card, with a share of its memory that leaves room."""
    trl(size, folder, pace, scratch, use_vllm=True, vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.2)  # fmt: skip


@torch.no_grad()
def generate(size: Size, folder: Path, pace: Pace, scratch: Path) -> None:
    dtype = torch.bfloat16 if size.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(size.device).eval()
    rows = json.loads((folder / "prompts.json").read_text())[: size.prompts]
    texts = [row["prompt"] for row in rows for _ in range(size.group)]
    ids = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt").input_ids
    ids, end = ids.to(size.device), model.generation_config.eos_token_id
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": size.tokens, "pad_token_id": end}
    pace.ready()
    while pace.wait():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **sampling)
        seconds = pace.seconds()
        ended = (out[:, size.prompt :] == end).int()
        length = (ended.cumsum(1) - ended == 0).sum(1).float().mean().item()
        pace.done(seconds, {"rollout": seconds}, length)


KINDS = {"ours": ours, "trl": trl, "generate": generate, "trl+vllm": trl_with_vllm}


def kinds(size: Size) -> list[str]:
    """The programs that can be compared: vLLM where it is installed, on a GPU."""
    has_vllm = size.device == "cuda" and importlib.util.find_spec("vllm") is not None
    return [kind for kind in KINDS if kind != "trl+vllm" or has_vllm]


def work(kind: str, path: Path) -> None:
    size = Size(**json.loads(path.read_text()))
    pace = Pace(size.device)
    with tempfile.TemporaryDirectory() as scratch:
        KINDS[kind](size, path.parent, pace, Path(scratch))


class Worker:
    """The parent's end: starts the process, waits until it has loaded, asks for steps.

    It ends when `stack` does.
    """

    def __init__(self, kind: str, folder: Path, device: str, stack: ExitStack):
        self.kind, self.steps = kind, list[dict]()
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, kind, str(folder / "size.json")],
            cwd=ROOT,
            env=os.environ | quiet | hidden,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        stack.callback(self.end)
        self.loaded = self._answer()["loaded"]

    def end(self) -> None:
        self.process.communicate()  # closes its stdin

    def turn(self, steps: int) -> None:
        """Some steps in a row: their mean, and the memory after the last."""
        assert self.process.stdin
        answers = []
        for _ in range(steps):
            self.process.stdin.write("step\n")
            answers.append(self._answer())
        phases = answers[0]["seconds"]
        mean = {name: statistics.mean(each["seconds"][name] for each in answers) for name in phases}
        self.steps.append(answers[-1] | {"seconds": mean})

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker {self.kind!r} ended; why is above")
        return json.loads(line)

    def summary(self) -> dict[str, Any]:
        """Medians after the warm-up, and memory in bytes."""
        steps = self.steps[WARM_UP:]
        seconds = {
            phase: statistics.median(step["seconds"][phase] for step in steps)
            for phase in steps[0]["seconds"]
        }
        peak = steps[-1]["peak"]
        return {
            "seconds": seconds,
            "length": statistics.mean(step["length"] for step in steps),
            "memory": {"increase": peak - self.loaded, "peak": peak},
            "steps": [step["seconds"] for step in steps],
        }


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
