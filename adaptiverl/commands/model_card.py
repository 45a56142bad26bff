"""README.md of an exported model: what a run's folder says of it, by a jinja2 template."""

import json
import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import adaptiverl
from adaptiverl.commands.curves import Row, metric_rows
from adaptiverl.commands.run_folder import Checkpoint, RunReader
from adaptiverl.commands.run_prompts import prompts_of_run
from adaptiverl.config.schema import ConfigError
from adaptiverl.files.checkpoint import BEST
from adaptiverl.files.console import counted
from adaptiverl.training.inputs import LORA
from adaptiverl.training.keys import RunConfig
from rewards import PythonReward, Reward

ROWS = 10  # of the table of the reward curve
CURVE = {  # columns of that table, by name in metrics.jsonl
    "reward": "reward",
    "reward_fixed_scale": "reward, on a fixed scale",
    "kl_per_completion": "KL, nats per completion",
    "entropy": "entropy, nats per token",
    "completions/mean_length": "tokens",
}
# Keys that say where and how a run was kept, not how it was trained, and those shown elsewhere
ELSEWHERE = {
    "$schema", "MODEL", "OUTPUT_DIR", "RESUME", "SAVE_EVERY", "KEEP_CHECKPOINTS", "LOG_EVERY",
    "SAMPLES_EVERY", "TRACKERS", "REWARDS", "HELD_OUT", "TRAIN_FILE", "EVAL_FILE", "PROMPT_COLUMN",
}  # fmt: skip
# Keys of a reward that say what it scores, also where they are at their default
MEANT = {"MODEL", "LABEL", "OUTPUT", "COLUMN", "UNIT", "MATCH", "QUESTION", "SCALE"}
ALWAYS = (
    "FULLTUNE", "BATCH_SIZE", "NUM_GENERATIONS", "MAX_NEW_TOKENS", "TEMPERATURE", "BASELINE",
    "KL_COEF", "OPTIM", "LRATE", "LR_RULE", "SEED",
)  # fmt: skip


def model_card(
    run: RunReader, checkpoint: Checkpoint, *, name: str, base: str, adapter: bool
) -> str:
    """The card of the model of `checkpoint`, which is loaded as `name`.

    `base` is the model under its adapter, or MODEL; `adapter` says that it is an adapter of that.
    Folders of this machine are named without the path to them.
    """
    c = run.config
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["cell"] = _cell
    templates.filters["counted"] = counted
    templates.filters["literal"] = repr  # Python's, where JSON has half characters
    metrics = metric_rows(run.path / "metrics.jsonl")
    rows = [row for row in metrics if row["step"] <= checkpoint.step]
    keys = [key for key in CURVE if any(key in row for row in rows)]
    if "reward_fixed_scale" in keys:
        keys.remove("reward")  # the mean of normalised rewards is always near 0
    return templates.get_template("model_card.md.jinja").render(
        version=adaptiverl.__version__,
        c=c,
        name=name,
        title=Path(name).name,
        base=_public(c.MODEL),
        base_on_hub=None if Path(base).exists() else base,
        adapter=adapter,
        chat=run.is_chat,
        checkpoint=checkpoint,
        data=_public(c.TRAIN_FILE),
        evaluated_on=_evaluated_on(c, checkpoint),
        rewards=[_reward(reward) for reward in c.REWARDS],
        held_out=[_reward(reward) for reward in c.HELD_OUT],
        keys=_keys(c),
        heads=[CURVE[key] for key in keys],
        curve=_curve(rows, keys),
        evaluation=_evaluation(run, checkpoint),
        own_evaluation=next(
            (row.get("eval/reward") for row in rows if row["step"] == checkpoint.step), None
        ),
    )


def _public(place: str) -> str:
    """A hub id or a relative path as it is; of an absolute path the last part."""
    return Path(place).name if Path(place).is_absolute() else place


def _cell(value: Any) -> str:
    """A value in a cell of a Markdown table."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _reward(reward: Reward) -> dict[str, Any]:
    own = reward.model_dump(mode="json", by_alias=True)
    changed = reward.changed() - {"NAME", "WEIGHT", "TYPE"}
    given = {
        key: _public(own[key]) if key == "MODEL" else own[key]
        for key in own
        if key in changed | MEANT
    }
    keys = ", ".join(f"`{key}` {_cell(value)}" for key, value in given.items())
    meaning = " ".join((type(reward).__doc__ or "").split("\n\n")[0].split())
    if isinstance(reward, PythonReward):
        meaning = f"What the Python function or class `{reward.function}` returns."
    return {"name": reward.name, "meaning": meaning, "weight": own["WEIGHT"], "given": keys}


def _evaluated_on(c: RunConfig, checkpoint: Checkpoint) -> str | None:
    """Which prompts the run evaluated on, and how many of them it was trained on."""
    if not c.has_evaluation_prompts:
        return None
    if c.EVAL_FILE:
        said = f"Prompts of `{_public(c.EVAL_FILE)}` were evaluated on."
    else:
        said = f"The prompts that `EVAL_SPLIT` {c.EVAL_SPLIT:g} holds out were evaluated on."
    try:
        trained, evaluated = prompts_of_run(c, checkpoint)
    except ConfigError as error:
        what = "how many of the prompts that were evaluated on the model was trained on"
        logging.warning("the card does not say %s. %s", what, error)
        return f"{said} {_trained_on(None, 0)}"
    return f"{said} {_trained_on(len(evaluated & trained), len(evaluated))}"


def _trained_on(count: int | None, total: int) -> str:
    """A sentence on `count` of `total` different prompts; None where that is not known."""
    if count is None:
        return "How many of these prompts the model was trained on is not known."
    which = {0: "none of these prompts", total: "all of these prompts"}
    return f"The model was trained on {which.get(count, f'{count} of these {total} prompts')}."


def _chosen_on(count: int | None, total: int) -> str:
    """A sentence on best/ where `count` of `total` prompts chose it; None: it is not known."""
    if count is None:
        return "It is not known whether this checkpoint was chosen by its score on these prompts."
    which = "these prompts" if count == total else f"{count} of these {total} prompts"
    return f"This checkpoint was chosen by its score on {which}, so its figures are optimistic."


def _keys(c: RunConfig) -> dict[str, Any]:
    """How it was trained: the common keys, and all others that are not at their default."""
    own = c.model_dump(mode="json", by_alias=True)
    shown = {*ALWAYS, *c.changed(), *(() if c.FULLTUNE else LORA)} - ELSEWHERE
    return {key: value for key, value in own.items() if key in shown}


def _curve(rows: Sequence[Row], keys: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Means of `keys` over ten parts of the run: the steps of each, and its cells."""
    count = min(ROWS, len(rows))
    bounds = [len(rows) * i // count for i in range(count + 1)] if count else []
    result = []
    for first, last in pairwise(bounds):
        part = rows[first:last]
        steps = f"{part[0]['step']}–{part[-1]['step']}" if len(part) > 1 else f"{part[0]['step']}"
        cells = []
        for key in keys:
            known = [row[key] for row in part if row.get(key) is not None]
            cells.append(f"{sum(known) / len(known):z.3f}" if known else "missing")
        result.append((steps, cells))
    return result


def _evaluation(run: RunReader, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """evaluation.json, if it is of this step, with its figures as a Markdown table."""
    from adaptiverl.commands.evaluate import table

    file = run.path / "evaluation.json"
    if not file.exists():
        return None
    read = json.loads(file.read_text(encoding="utf-8"))
    if read["step"] != checkpoint.step:
        return None
    total = read["different_prompts"]
    # Earlier versions wrote neither of the two counts
    said = [_trained_on(read.get("prompts_trained_on"), total)]
    chosen = read.get("prompts_evaluated_on")
    if checkpoint.path.name == BEST and chosen != 0:
        said.append(_chosen_on(chosen, total))
    return read | {"prompts_seen": " ".join(said), "table": table(read["figures"], "github")}
