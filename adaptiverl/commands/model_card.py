"""README.md of an exported model: what a run's folder says of it, by a jinja2 template."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import adaptiverl
from adaptiverl.commands.run_folder import Checkpoint, RunReader
from adaptiverl.files.console import counted
from adaptiverl.training.inputs import LORA
from adaptiverl.training.keys import RunConfig
from rewards import Reward

ROWS = 10  # of the table of the reward curve
CURVE = {  # columns of that table, by name in metrics.jsonl
    "reward": "reward",
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
    rows = [row for row in run.metrics() if row["step"] <= checkpoint.step]
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
        eval_data=c.EVAL_FILE and _public(c.EVAL_FILE),
        rewards=[_reward(reward) for reward in c.REWARDS],
        held_out=[_reward(reward) for reward in c.HELD_OUT],
        keys=_keys(c),
        heads=[title for key, title in CURVE.items() if any(key in row for row in rows)],
        curve=_curve(rows),
        evaluation=_evaluation(run, checkpoint),
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
    return {"name": reward.name, "meaning": meaning, "weight": own["WEIGHT"], "given": keys}


def _keys(c: RunConfig) -> dict[str, Any]:
    """How it was trained: the common keys, and all others that are not at their default."""
    own = c.model_dump(mode="json", by_alias=True)
    shown = {*ALWAYS, *c.changed(), *(() if c.FULLTUNE else LORA)} - ELSEWHERE
    return {key: value for key, value in own.items() if key in shown}


def _curve(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Means over ten parts of the run: the steps of each, and the columns of CURVE."""
    keys = [key for key in CURVE if any(key in row for row in rows)]
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
    return read | {"table": table(read["figures"], "github")}
