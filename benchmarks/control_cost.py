"""What adaptive control costs: of a training step, and of an optimizer's step.

    python benchmarks/control_cost.py        writes control_cost.json, prints a line each

1. A step of the default run, with 32 completions and with 8, and the trust region's share of it:
   the optimizer's step less that of the AdamMini inside, so the pass over an eighth of the
   completions, the alignment and the scaling.
2. A step of fused AdamW on GPT-2's 148 tensors, bare and inside AdaptiveOptimizer with rules for
   rate, betas and weight decay, in turn: the wrapper's overhead. And one without rules.
3. The same beside OnlineAdamW, fused too, which learns as it goes.
Medians; of the second, of pairs of neighbours.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from adaptiverl import AdaptiveOptimizer, OnlineAdamW  # noqa: E402
from adaptiverl.config.loading import load_config  # noqa: E402
from adaptiverl.files.process import StopSignal  # noqa: E402
from adaptiverl.training.build import build  # noqa: E402
from adaptiverl.training.folder import RunFolder  # noqa: E402
from adaptiverl.training.keys import RunConfig  # noqa: E402


def ratio(one: Callable[[], float], other: Callable[[], float], pairs: int) -> dict[str, float]:
    """Seconds of both and the median of other / one; the first pair does not count."""
    times = [(one(), other()) for _ in range(pairs + 1)][1:]
    return {
        "seconds": statistics.median(a for a, _ in times),
        "with_it": statistics.median(b for _, b in times),
        "ratio": statistics.median(b / a for a, b in times),
        "pairs": pairs,
    }


def training_step(steps: int, batch: int) -> dict[str, float]:
    """The default run's, with `batch` completions.

    Two runs would write different texts, so the parts of one are timed.
    """
    spent: list[float] = []

    def timed(optimizer: torch.optim.Optimizer, sign: int) -> None:
        def add(at: int) -> None:
            spent[-1] += at * sign * time.perf_counter()

        optimizer.register_step_pre_hook(lambda *_: add(-1))
        optimizer.register_step_post_hook(lambda *_: add(1))

    with tempfile.TemporaryDirectory() as place:
        keys = [f"OUTPUT_DIR={place}", "STEPS=100", "SAVE_EVERY=0", "LOG_EVERY=0"]
        keys.append(f"BATCH_SIZE={batch}")
        config = load_config(ROOT / "config.json", keys, schema=RunConfig)
        parts, stop = build(config), StopSignal()
        timed(parts.optimizer, 1)
        timed(parts.optimizer.base, -1)
        seconds = []
        with closing(RunFolder(config, parts)) as folder:
            folder.open()
            for step in range(1, steps + 1):
                spent.append(0.0)
                start = time.perf_counter()
                train.train(config, replace(parts, last_step=step), folder, stop)
                seconds.append(time.perf_counter() - start)
    share = [part / whole for part, whole in zip(spent, seconds, strict=True)]
    return {
        "seconds": statistics.median(seconds),
        "of which control": statistics.median(spent),
        "share": statistics.median(share),
        "share of the first step": share[0],
        "steps": steps,
    }


def optimizer_step(pairs: int, online: bool = False, **rules: str) -> dict[str, float]:
    """On GPT-2 124M."""
    model = GPT2LMHeadModel(GPT2Config())
    for p in model.parameters():
        p.grad = torch.randn_like(p)

    def stepper(wrap: bool) -> Callable[[], float]:
        kind = OnlineAdamW if online and wrap else torch.optim.AdamW
        optimizer = kind(model.parameters(), lr=1e-6, fused=True)
        if wrap and not online:
            optimizer = AdaptiveOptimizer(optimizer, **rules)  # type: ignore[arg-type]

        def one() -> float:
            start = time.perf_counter()
            if wrap and rules:
                optimizer.step_loss(1.0)  # type: ignore[attr-defined]
                optimizer.step_reward(1.0)  # type: ignore[attr-defined]
            optimizer.step()
            return time.perf_counter() - start

        return one

    return ratio(stepper(False), stepper(True), pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    args = parser.parse_args()
    rules = {"lr_rule": "trend+variance+patience", "betas_rule": "relative+variance"}
    rules |= {"wd_rule": "trend", "reward_rule": "trend"}
    results = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "training step": training_step(args.pairs, 32),
        "training step, batch 8": training_step(args.pairs, 8),
        "fused AdamW, rules": optimizer_step(args.pairs, **rules),
        "fused AdamW, no rule": optimizer_step(args.pairs),
        "fused OnlineAdamW": optimizer_step(args.pairs, online=True),
    }
    (Path(__file__).with_suffix(".json")).write_text(json.dumps(results, indent=2) + "\n")
    for name, result in results.items():
        print(name, result)


if __name__ == "__main__":
    main()
