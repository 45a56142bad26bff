"""The best evaluation so far, and whether a run has gone far enough to end early.

Writing best/ is folder.py's.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

from adaptiverl.training.keys import RunConfig
from adaptiverl.training.metrics import Metrics

SMOOTHED = 10  # steps whose mean STOP_KL and STOP_REWARD are compared with


@dataclass
class Best:
    """Looks at each step's metrics; all processes see the same."""

    config: RunConfig
    best_step: int | None = None
    best_score: float | None = None  # eval/score: higher is better
    since: int = 0  # evaluations since then
    recent: dict[str, list[float]] = field(default_factory=dict)  # of the last SMOOTHED steps
    improved: bool = False  # by the last step; no state

    def look(self, step: int, metrics: Metrics) -> None:
        """An evaluation without a score is none."""
        now = {
            "reward": metrics.get("reward_fixed_scale", metrics.get("reward")),
            "kl_per_completion": metrics.get("kl_per_completion"),
        }
        for name, value in now.items():
            if value is not None:
                self.recent[name] = [*self.recent.get(name, []), value][-SMOOTHED:]
        score = metrics.get("eval/score")
        self.improved = score is not None and (self.best_score is None or score > self.best_score)
        if self.improved:
            self.best_step, self.best_score, self.since = step, score, 0
        elif score is not None:
            self.since += 1

    def forget(self) -> None:
        """Rewards are on another scale from here on: what comes is not compared with these."""
        self.best_step, self.best_score, self.since = None, None, 0
        self.recent.pop("reward", None)

    @property
    def why_stop(self) -> str | None:
        """The key that ends the run now, and its evidence; None if it goes on."""
        c = self.config
        reward, kl = self._mean("reward"), self._mean("kl_per_completion")
        if c.STOP_PATIENCE and self.since >= c.STOP_PATIENCE:
            return (
                f"STOP_PATIENCE: {self.since} evaluations without a better eval/score (reward less "
                f"KL penalty) than {self.best_score:.3f}, of step {self.best_step}"
            )
        if c.STOP_KL is not None and kl is not None and kl >= c.STOP_KL:
            return (
                f"STOP_KL: {kl:.2f} nats per completion, mean of {SMOOTHED} steps, have reached "
                f"{c.STOP_KL:g}"
            )
        if c.STOP_REWARD is not None and reward is not None and reward >= c.STOP_REWARD:
            return (
                f"STOP_REWARD: a reward of {reward:.3f}, mean of {SMOOTHED} steps, has reached "
                f"{c.STOP_REWARD:g}"
            )
        return None

    def _mean(self, name: str) -> float | None:
        values = self.recent.get(name, [])
        return sum(values) / SMOOTHED if len(values) == SMOOTHED else None

    def state_dict(self) -> dict[str, Any]:
        return {name: copy.copy(getattr(self, name)) for name in _KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _KEPT:
            setattr(self, name, state[name])


_KEPT = ("best_step", "best_score", "since", "recent")
