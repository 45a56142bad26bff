"""The rule "learned": the GRU of recurrent.py as the controller of the rate as a whole.

One row of features, one hidden state; its answer moves a factor on the rate, which mean-reverts.
"""

import logging
import math
from typing import Any

import torch

from adaptiverl.optim.hyperparams import clamp
from adaptiverl.optim.online import recurrent
from adaptiverl.optim.signals import State, smoothed

log = logging.getLogger(__name__)
FEATURES = 8
GAIN = 0.5  # of an answer, on the log of the ratio: at most log(2) / 2 per step
DECAY = 0.97  # of the log of the ratio, per step
MAX_RATIO = 100.0  # the largest ratio either way
SIGNALS = ("kl", "loss", "reward", "grad_norm")


class LearnedRate:
    """Keeps `ratio`, the factor on the rate that the GRU has found.

    Its features are clipped and free of units: KL over its target, loss, reward and gradient norm
    against their means, the alignment of gradient and last update, now and smoothed.
    """

    def __init__(self, loss_beta: float = 0.9, reward_beta: float = 0.9) -> None:
        self.ratio, self.time = 1.0, 0
        self.betas = {"loss": loss_beta, "reward": reward_beta, "grad_norm": 0.9}
        self.seen: dict[str, State] = {}
        self.place(recurrent.trained("rate"))
        self.hidden = torch.zeros(1, recurrent.HIDDEN)
        self.last: dict[str, torch.Tensor] | None = None  # x and hidden of the last answer
        self.measured = False  # whether a KL was observed since the last answer
        self.features = [0.0] * 6  # of SIGNALS, the alignment, the same smoothed

    def place(self, weights: recurrent.Weights) -> None:
        """Puts `weights` into the GRU, and what they decay to."""
        self.anchor, self.weights = weights, dict(weights)

    def observe(self, **signals: float | None) -> None:
        """A loss, reward or gradient norm; None and what is not finite are left out."""
        for name, x in signals.items():
            if x is None or not math.isfinite(x):
                continue
            before: State = self.seen.get(name, {})
            now = self.seen[name] = smoothed(before, x, self.betas[name])
            usual = (before or now)["mean_abs"]
            if name == "grad_norm":
                value = math.log((abs(x) + 1e-12) / (usual + 1e-12))
            else:
                value = (x - now["ema"]) / (usual + 1e-8)
            self.features[SIGNALS.index(name)] = clamp(value, (-2.0, 2.0))

    def observe_update(self, kl: float, target: float, cosine: float | None = None) -> None:
        """KL of the last update and its target, nats per token, and the `alignment` before it."""
        if math.isfinite(kl):
            self.features[0] = clamp(math.log(max(kl, 1e-12) / target) / 2, (-2.0, 2.0))
            self.measured = True
        if cosine is None or not math.isfinite(cosine):
            return
        self.features[4] = math.tanh(10 * cosine)
        self.features[5] += 0.1 * (self.features[4] - self.features[5])
        if self.last:
            gain = torch.tensor([cosine])
            self.weights = recurrent.learn(
                self.weights, self.anchor, self.last["x"], self.last["hidden"], gain
            )

    def tick(self) -> None:
        """One step has passed: a new ratio, or the old one while no KL is measured."""
        self.time += 1
        if self.time == 20 and not (self.measured or self.last):
            log.warning(
                "no KL was measured in 20 steps, so lr_rule learned moves nothing: give measure_kl"
            )
        if not self.measured:
            return
        self.measured = False
        x = torch.tensor([[*self.features, math.log(self.ratio) / 2, math.log1p(self.time) / 5]])
        self.last = {"x": x, "hidden": self.hidden}
        scale, self.hidden = recurrent.answer(self.weights, x, self.hidden)
        ratio = math.exp(DECAY * math.log(self.ratio) + GAIN * scale.item())
        self.ratio = clamp(ratio, (1 / MAX_RATIO, MAX_RATIO))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and tensors."""
        return {name: getattr(self, name) for name in (*_PLAIN, *_TENSORS)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Its tensors stay on the CPU, wherever those of `state` are. Raises ValueError for shapes
        that are not its own."""
        own = self.state_dict() | {"last": {"x": torch.zeros(1, FEATURES), "hidden": self.hidden}}
        for name in _TENSORS:
            value = state[name]
            setattr(self, name, None if value is None else recurrent.fitted(name, value, own[name]))
        for name in _PLAIN:
            setattr(self, name, type(own[name])(state[name]))


_PLAIN = ("ratio", "time", "seen", "measured", "features")
_TENSORS = ("weights", "anchor", "hidden", "last")
