"""What a run carries from step to step, and how it is saved and restored by name.

That a checkpoint is whole or not there at all is files/checkpoint.py's.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from torch import Tensor
from torch.utils._pytree import tree_map_only

from adaptiverl.config.schema import ConfigError
from adaptiverl.files import checkpoint
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.runtime import Runtime
from rewards import REWARD_TYPES

PROMPTS = "prompts.json"  # in a checkpoint: fingerprints of the rows, by key
FREE_OF_REWARD = frozenset().union(*(kind.free_keys for kind in REWARD_TYPES))


class Stateful(Protocol):
    """What a checkpoint holds by a name. All processes call both methods together."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


@dataclass
class Progress:
    """The numbers of the algorithm that change from step to step."""

    step: int = 0
    kl_coef: float = 0.0
    reward_ema: float | None = None  # of BASELINE ema
    skipped: int = 0  # steps whose gradient was not finite
    updates_scaled: int = 0  # steps whose update was made smaller
    rollbacks: int = 0  # times that a collapse was taken back; numbers the random stream, too
    # Of hyperparameters, since the last step that was written down: a checkpoint has a rollback's
    changes: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state


class RandomState:
    """The global random generators of all processes."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    def state_dict(self) -> list[dict[str, Any]]:
        return self.runtime.gather_objects([checkpoint.rng_state()])

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        own = self.runtime.rank
        checkpoint.set_rng_state(states[own if own < len(states) else 0])


def restore(folder: Path, stateful: Mapping[str, Stateful], mapped: bool) -> None:
    """Continues from the checkpoint in `folder`; the policy was loaded from it already.

    `mapped`: processes share the file's memory, and each copies what it needs to its device. On a
    CPU nothing would be copied, and a run would go on upon a file that is pruned later; so would
    the numbers of steps, which optimizers leave on the CPU.
    """
    file = folder / "trainer.pt"
    saved = torch.load(file, weights_only=True, map_location="cpu", mmap=mapped)
    if mapped:
        saved = tree_map_only(Tensor, lambda x: x if x.dim() else x.clone(), saved)
    for name, each in stateful.items():
        each.load_state_dict(saved[name])


def newest(c: RunConfig, runtime: Runtime) -> Path | None:
    """The checkpoint that RESUME continues; one process verifies it and tells the others.

    Raises ConfigError where there were checkpoints, and none is left to go on from.
    """
    looks = c.RESUME and runtime.is_main
    found = runtime.from_main(checkpoint.to_resume(c.output_dir) if looks else None)
    if isinstance(found, str):
        raise ConfigError(f"RESUME: {found}")
    return found


def among(c: RunConfig, runtime: Runtime, steps: Collection[int]) -> Path | None:
    """The newest undamaged checkpoint of one of `steps`."""
    found = checkpoint.newest(c.output_dir, steps) if runtime.is_main else None
    return runtime.from_main(found and found[0])


def is_untouched(folder: Path) -> bool:
    """Whether the run that wrote the checkpoint in `folder` had made no step, nor taken one back.

    It has learned nothing, so that it may as well begin anew, as another run.
    """
    if folder.name != checkpoint.step_name(0):
        return False
    saved = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu", mmap=True)
    return saved["progress"]["rollbacks"] == 0


def refuse_changes(
    folder: Path, c: RunConfig, prompts: Mapping[str, str], adapters_own: Collection[str]
) -> None:
    """Raises ConfigError where a run that continues from `folder` would be another one.

    `prompts` are the fingerprints of its rows, by the key that names them. The keys
    `adapters_own` are those of the adapter in MODEL, whatever the config says.
    """
    before = _with_defaults(RunConfig, json.loads((folder / "run_config.json").read_text("utf-8")))
    now = json.loads(c.model_dump_json(by_alias=True))
    kinds = {kind.model_fields["type"].default: kind for kind in REWARD_TYPES}
    for keys in (before, now):
        for name in ("REWARDS", "HELD_OUT"):
            rewards = [_with_defaults(kinds[reward["TYPE"]], reward) for reward in keys[name]]
            keys[name] = [
                {key: value for key, value in reward.items() if key not in FREE_OF_REWARD}
                for reward in rewards
            ]
    compared = [key for key in now if key not in c.free_keys and key not in adapters_own]
    if said := [text for key in compared for text in _changes(key, before.get(key), now[key])]:
        raise ConfigError(
            f"RESUME: {'; '.join(said)}. A resumed run continues as it was. For another run, start "
            f"a new one with MODEL={folder} and another OUTPUT_DIR"
        )
    for key in changed_rows(folder, c, prompts):
        name = now[key] if key.endswith("FILE") else c.TRAIN_FILE
        also = ", or give the new ones another name" if key == "EVAL_FILE" else ""
        raise ConfigError(
            f"RESUME: {name} has other rows than when {folder} was written. A resumed run "
            f"continues as it was: put its rows back{also}. For another run, start a new one "
            f"with MODEL={folder} and another OUTPUT_DIR"
        )


def changed_rows(folder: Path, c: RunConfig, prompts: Mapping[str, str]) -> list[str]:
    """The keys of `prompts`, which are fingerprints, that the checkpoint has otherwise."""
    file = folder / PROMPTS  # earlier versions wrote none
    rows = json.loads(file.read_text("utf-8")) if file.exists() else {}
    before = json.loads((folder / "run_config.json").read_text("utf-8"))
    return [
        key
        for key in rows.keys() & prompts.keys()
        if rows[key] != prompts[key] and before[key] == getattr(c, key)  # EVAL_FILE may be another
    ]


def _changes(name: str, before: Any, now: Any) -> list[str]:
    """What differs, in words; of lists of rewards, and of rewards, the parts that do."""
    if before == now:
        return []
    if isinstance(now, dict) and isinstance(before, dict) and now.keys() == before.keys():
        pairs = [(f"{name}.{key}", before[key], now[key]) for key in now]
    elif name in ("REWARDS", "HELD_OUT") and len(before) == len(now):
        pairs = [(f"{name}.{i}", *both) for i, both in enumerate(zip(before, now, strict=True))]
    else:
        return [f"{name} was {before} and is {now} now"]
    return [text for pair in pairs for text in _changes(*pair)]


def _with_defaults(model: type[BaseModel], keys: dict[str, Any]) -> dict[str, Any]:
    """`keys`, as written, with those that the version that wrote them did not have."""
    defaults = {
        key.alias or name: to_jsonable_python(key.get_default(call_default_factory=True))
        for name, key in model.model_fields.items()
        if not key.is_required() and (key.alias or name) not in keys
    }
    return defaults | keys
