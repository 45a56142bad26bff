"""`adaptiverl generate RUN`: completions by a run's model, with what each reward says of them.

With --base, beside those of the model before the training, from the same random numbers.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from datasets import Dataset
from torch import Tensor

from adaptiverl.commands.run_folder import RunReader
from adaptiverl.commands.trained import RunRewards, TrainedModel
from adaptiverl.config.schema import ConfigError
from adaptiverl.files.console import counted, printable
from adaptiverl.rl.chat import Prompt, given_prompt, readable
from adaptiverl.rl.data import load_prompts
from adaptiverl.rl.rollout import uniforms
from adaptiverl.training.batches import Batch, columns
from adaptiverl.training.inputs import as_config_error
from adaptiverl.training.metrics import cell

SHOWN = {"trained": "trained", "start": "before training"}


def main(given: Namespace, run: RunReader) -> int:
    """Answers the prompts of the command line, of --file or of stdin; the exit status."""
    if given.prompts and given.file:
        raise ConfigError("give prompts or --file, not both")
    checkpoint = run.choose(given.checkpoint)
    file = given.file and given.file.resolve()
    chat = not given.prompts and not file and sys.stdin is not None and sys.stdin.isatty()
    with run.as_started():
        prompts = None if chat else _prompts(run, given.prompts, file)
        model = TrainedModel(run.config, checkpoint, start=given.base)
        count = given.n or (1 if chat else 4)
        known = prompts or Dataset.from_dict(
            {run.config.PROMPT_COLUMN: [_as_prompt(run, "a line")]}
        )
        source = str(file) if file else "a prompt that is typed"
        several = count > 1
        with closing(RunRewards(model, known, source, given.all_rewards, several)) as rewards:
            after = counted(checkpoint.step, "step")
            print(f"model  {checkpoint.path}, after {after}", file=sys.stderr)
            for name, why in rewards.left_out.items():
                print(f"left out  {name}: {why}", file=sys.stderr)
            seed = run.config.SEED if given.seed is None else given.seed
            answer = Answers(model, rewards, count, seed, given.base)
            if prompts is None:
                _chat(run, answer)
                return 0
            size = max(1, run.config.BATCH_SIZE // count)
            for first in range(0, len(prompts), size):
                rows = list(range(first, min(first + size, len(prompts))))
                print(answer(columns(model.config, prompts, rows)), flush=True)
    return 0


def _prompts(run: RunReader, typed: list[str], file: Path | None) -> Dataset:
    column = run.config.PROMPT_COLUMN
    if file:
        with as_config_error("--file"):
            return load_prompts(str(file), column)
    # None: a process that was started without it
    data = b"" if typed or sys.stdin is None else sys.stdin.buffer.read()
    lines = typed or [line for line in _piped(data) if line]
    if not all(lines) or not lines:
        raise ConfigError("there is no prompt, or an empty one: give text to complete")
    for line in lines:
        _check(line)
    return Dataset.from_dict({column: [_as_prompt(run, line) for line in lines]})


def _piped(data: bytes) -> Iterator[str]:
    """The lines of stdin, which newlines alone end. Raises ConfigError where one is not UTF-8."""
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            yield line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"line {number} of the input is not UTF-8: {line!r}") from error


def _read_line() -> str:
    """A line that is typed. Raises ConfigError where it is not UTF-8."""
    try:
        return input("> ")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the prompt is not UTF-8: {error.reason} at byte {error.start}"
        ) from error


def _check(line: str) -> None:
    """Raises ConfigError for bytes that Python has let through as lone surrogates."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is not UTF-8: {line!a}") from error


def _as_prompt(run: RunReader, line: str) -> Prompt:
    """A line as the run's prompts are: text, or a conversation that the line begins."""
    return [{"role": "user", "content": line}] if run.is_chat else line


def _chat(run: RunReader, answer: "Answers") -> None:
    """Answers each line that is typed, until the end of input; a conversation goes on."""
    print("Type a prompt and Enter; Ctrl-D ends.", file=sys.stderr)
    said: list[dict[str, str]] = []
    while True:
        try:
            line = _read_line()
        except EOFError:
            print()
            return
        if not line.strip():
            continue
        _check(line)
        if not run.is_chat:
            print(answer({"prompt": [line]}), flush=True)
            continue
        turn = {"role": "user", "content": line}
        prompt = given_prompt([*said, turn], run.config.SYSTEM)
        if not answer.model.fits(prompt):
            prompt = given_prompt([turn], run.config.SYSTEM)
            if not answer.model.fits(prompt):
                print("This line does not fit the model's context: shorten it.", file=sys.stderr)
                continue
            print("The conversation is full: this line begins a new one.", file=sys.stderr)
            said = []
        print(answer({"prompt": [prompt]}), flush=True)
        said.append(turn)
        said.append({"role": "assistant", "content": answer.last})


class Answers:
    """Completes batches of prompts, `count` times each, and shows the completions as text.

    Each call takes other random numbers, which follow from `seed` and the number of the call.
    """

    def __init__(
        self, model: TrainedModel, rewards: RunRewards, count: int, seed: int, start: bool
    ):
        self.model, self.rewards, self.count, self.seed = model, rewards, count, seed
        self.who = list(SHOWN)[: 1 + start]
        self.calls = 0
        self.last = ""  # the trained model's first completion of the last call

    def __call__(self, prompts: Batch) -> str:
        """`prompts` has a row per prompt."""
        batch = {
            name: [value for value in column for _ in range(self.count)]
            for name, column in prompts.items()
        }
        rows, length = len(batch["prompt"]), self.model.config.MAX_NEW_TOKENS
        numbers = uniforms(self.seed, self.calls, rows, length)
        self.calls += 1
        texts, pending = [], []
        for who in self.who:
            rollout = self.model.sample(batch["prompt"], numbers, start=who == "start")
            texts.append(self.model.sampler.decode(rollout))
            pending.append(self.rewards.begin(batch, rollout, texts[-1]))
        self.last = texts[0][0]
        scores = self.rewards.wait(pending)
        total = self.rewards.total(scores, self.count)
        by_reward = self.rewards.columns(scores)

        def lines() -> Iterator[str]:
            for row in range(rows):
                if row % self.count == 0:
                    yield f"\n> {readable(batch['prompt'][row])}"
                for i, who in enumerate(self.who):
                    number = f"{row % self.count + 1}" + f", {SHOWN[who]}" * (len(self.who) > 1)
                    yield f"[{number}] {texts[i][row].strip()}"
                    at = i * rows + row
                    if by_reward:
                        scored = _scores(by_reward, at)
                        yield f"    {self.rewards.sum_name} {_shown(total[at])} (raw: {scored})"

        return printable("\n".join(lines()))


def _scores(by_reward: dict[str, Tensor], row: int) -> str:
    """`sentiment 0.93, length 0.41`, of one completion."""
    return ", ".join(
        f"{name.removeprefix('rewards/').replace('held_out/rewards/', 'held out: ')} "
        f"{_shown(column[row])}"
        for name, column in by_reward.items()
    )


def _shown(value: Tensor) -> str:
    return cell(None if value.isnan() else value.item())
