"""What slow rewards cost: judgements in parallel, and rewards that wait beside the reference pass.

    python benchmarks/slow_rewards.py        writes slow_rewards.json, prints a line each

1. 64 judgements by a server on loopback that takes 0.5 s for each, one at a time and 16 at a time.
2. A step of the default run with a coroutine reward that waits so many seconds, beside a step with
   one that does not wait, in turn: what the waiting adds, and how long the reference pass takes.
"""

import asyncio
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import train  # noqa: E402
from adaptiverl.config.loading import load_config  # noqa: E402
from adaptiverl.files.process import StopSignal  # noqa: E402
from adaptiverl.training.build import build  # noqa: E402
from adaptiverl.training.folder import RunFolder  # noqa: E402
from adaptiverl.training.keys import RunConfig  # noqa: E402
from rewards.judge import JudgeReward  # noqa: E402

LATENCY = 0.5
WAITS = {"0": 0.0, "0.05": 0.05, "0.1": 0.1, "0.5": 0.5}  # seconds, by the reward's name
PAIRS = 12


class Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(LATENCY)
        message = {"role": "assistant", "content": '{"score": 5}'}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
        body = json.dumps(reply | {"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def judgements(concurrency: int) -> float:
    """Seconds for 64."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["BENCHMARK_KEY"] = "none"
    with tempfile.TemporaryDirectory() as folder:
        judge = JudgeReward(
            model="m",
            rubric="Good?",
            base_url=f"http://127.0.0.1:{server.server_address[1]}/v1",
            key_env="BENCHMARK_KEY",
            cache=f"{folder}/judge.sqlite",
            concurrency=concurrency,
        )
        start = time.perf_counter()
        scores = asyncio.run(judge(["P"] * 64, [f"text {k}" for k in range(64)]))
        seconds = time.perf_counter() - start
    server.shutdown()
    server.server_close()
    assert scores == [4 / 9] * 64
    return seconds


def _waiting(seconds: float) -> Callable:
    async def reward(completions: list[str], **_: object) -> list[float]:
        await asyncio.sleep(seconds)
        return [len(text) / 100 for text in completions]

    return reward


waits_0, waits_005, waits_01, waits_05 = map(_waiting, WAITS.values())


def steps() -> dict[str, dict[str, float]]:
    """What each wait adds to a step, and the seconds of the reference pass."""
    stop = StopSignal()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:

        def runner(name: str) -> Callable[[], tuple[float, float]]:
            function = f"slow_rewards:waits_{name.replace('.', '')}"
            reward = json.dumps([{"TYPE": "python", "FUNCTION": function}])
            keys = [f"OUTPUT_DIR={folder}/{name}", "STEPS=1000000", "SAVE_EVERY=0", "LOG_EVERY=0"]
            overrides = [*keys, f"REWARDS={reward}"]
            c = load_config(HERE.parent / "config.json", overrides, schema=RunConfig)
            parts = build(c)
            stack.enter_context(closing(parts.scoring))
            run_folder = stack.enter_context(closing(RunFolder(c, parts)))
            run_folder.open()

            def one() -> tuple[float, float]:
                until = replace(parts, last_step=parts.progress.step + 1)
                start = time.perf_counter()
                train.train(c, until, run_folder, stop)
                seconds = time.perf_counter() - start
                last = (Path(folder) / name / "metrics.jsonl").read_text().splitlines()[-1]
                return seconds, json.loads(last)["seconds/reference"]

            return one

        runs = {name: runner(name) for name in WAITS}
        times = [{name: one() for name, one in runs.items()} for _ in range(PAIRS + 1)][1:]
    return {
        name: {
            "added": statistics.median(t[name][0] - t["0"][0] for t in times),
            "reference": statistics.median(t[name][1] for t in times),
        }
        for name in WAITS
    }


def main() -> None:
    one_by_one, together = judgements(1), judgements(16)
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": str(datetime.date.today()),
        "64 judgements, seconds": {"1": one_by_one, "16": together, "ratio": one_by_one / together},
        "seconds a wait adds to a step": steps(),
    }
    (HERE / "slow_rewards.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, result in results.items():
        print(name, result)


if __name__ == "__main__":
    main()
