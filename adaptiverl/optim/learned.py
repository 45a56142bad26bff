"""The rule "learned": the GRU of recurrent.py as the controller of the rate as a whole.

One row of features, one hidden state; its answer moves the rate's ratio, which leans back. Leaves
out who asks it and when: controller.py.
"""

import math
from typing import Any

import torch

from adaptiverl.optim import recurrent
from adaptiverl.optim.signals import Reading

FEATURES = 8
GAIN = 0.5  # of an answer, on the log of the ratio: at most log(2) / 2 a step
KEPT = 0.97  # of the log of the ratio, a step
FARTHEST = 100.0  # the largest ratio either way


class Learned:
    """Its features are clipped and free of units: KL over its target, loss, reward and gradient
    against what is usual for them, agreement of gradient and last update, now and smoothed."""

    def __init__(self) -> None:
        self.home = recurrent.trained("rate")
        self.weights = dict(self.home)
        self.hidden = torch.zeros(1, recurrent.HIDDEN)
        self.last: dict[str, torch.Tensor] | None = None  # x and hidden of the last answer
        self.steered = False  # whether a KL was seen since the last answer
        self.seen = [0.0] * 6  # kl, loss, reward, gradient, alignment, the same smoothed

    def observe(self, signal: str, reading: Reading) -> None:
        """A loss, reward or gradient norm, beside its past."""
        place = ("kl", "loss", "reward", "grad_norm").index(signal)
        if signal == "grad_norm":
            value = math.log((abs(reading.value) + 1e-12) / (reading.usual + 1e-12))
        else:
            value = (reading.value - reading.ema) / (reading.usual + 1e-8)
        self.seen[place] = min(max(value, -2.0), 2.0)

    def observe_kl(self, kl: float, target: float) -> None:
        """Of the last update, and what it was to be, in nats a token."""
        self.seen[0] = min(max(math.log(max(kl, 1e-12) / target) / 2, -2.0), 2.0)
        self.steered = True

    def observe_alignment(self, cosine: float) -> None:
        """Of the gradient and the update before it (trust_region.alignment): learns from it."""
        self.seen[4] = math.tanh(10 * cosine)
        self.seen[5] += 0.1 * (self.seen[4] - self.seen[5])
        if self.last:
            gain = torch.tensor([cosine])
            self.weights = recurrent.learn(
                self.weights, self.home, self.last["x"], self.last["hidden"], gain, centred=False
            )

    def ratio(self, old: float, step: int) -> float:
        """The ratio of the next step; the old one where no KL tells what the last one did."""
        if not self.steered:
            return old
        self.steered = False
        x = torch.tensor([[*self.seen, math.log(old) / 2, math.log1p(step) / 5]])
        hidden = self.hidden
        scale, self.hidden = recurrent.answer(self.weights, x, hidden, centred=False)
        self.last = {"x": x, "hidden": hidden}
        new = math.exp(KEPT * math.log(old) + GAIN * scale.item())
        return min(max(new, 1 / FARTHEST), FARTHEST)

    def state_dict(self) -> dict[str, Any]:
        names = ("weights", "home", "hidden", "last", "seen", "steered")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Its tensors stay on the CPU, wherever those of `state` are. Raises ValueError for shapes
        that are not its own."""
        own = self.state_dict() | {"last": {"x": torch.zeros(1, FEATURES), "hidden": self.hidden}}
        for name, like in own.items():
            value = state[name]
            if name in ("seen", "steered"):
                setattr(self, name, list(value) if name == "seen" else value)
            elif value is not None:
                recurrent.check_shapes(name, value, like)
                setattr(self, name, recurrent.moved(value, torch.device("cpu")))
            else:
                setattr(self, name, None)
