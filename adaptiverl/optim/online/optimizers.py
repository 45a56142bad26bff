"""OnlineSGD, OnlineRMSProp, OnlineAdamW: torch's optimizers, each tensor's update scaled by a GRU.

One GRU, shared, with a hidden state for each tensor, sees how gradients agree with the updates
before them and scales what the tensor is about to do. Scales are centred: rules of the rate as a
whole come by wrapping it in AdaptiveOptimizer. The GRU is recurrent.py's; docs/online.md says how
its weights were made.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adaptiverl.optim.hyperparams import Scalar, clamp, numbers
from adaptiverl.optim.online import recurrent
from adaptiverl.optim.online.sample import Sample
from adaptiverl.optim.signals import State, smoothed
from adaptiverl.optim.update import PerTensorOptimizer, copyable

VERSION = 2  # of the state's "online"
FEATURES = 14
BETA = 0.9
_KEPT = ("names", "steps", "signals", "seen", "weights", "anchor", "hidden", "last")


class Online(PerTensorOptimizer, Optimizer):
    """What the three share: a mixin before one of torch's optimizers.

    params, …       as torch's optimizer takes them; named_parameters() gives the state its names
    weights         of the GRU: "trained" beforehand, the default, or None for a head of zeros, with
                    which nothing is scaled until it has learned
    learn           whether the GRU learns as it runs, by the one-step hypergradient; default True

    The log scale of a tensor is ln 2 · tanh(head · hidden), less its mean over all tensors.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *arguments: Any,
        weights: str | None = "trained",
        learn: bool = True,
        **keywords: Any,
    ):
        if weights not in ("trained", None):
            raise ValueError(f'weights is "trained" or None, not {weights!r}')
        if not isinstance(learn, bool):
            raise TypeError(f"learn is {learn!r}; it must be True or False")
        super().__init__(params, *arguments, **keywords)
        # Whoever scales gradients (GradScaler) must unscale them before they are looked at.
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            if group.get("foreach") and not group.get("capturable"):
                raise ValueError("foreach cannot take each tensor's rate: use fused or neither")
            if any(p.is_cuda for p in group["params"]) and not group.get("foreach"):
                group["fused" if "fused" in group else "capturable"] = True  # no synchronisation
        self.learns = learn
        self.learning = {"rate": recurrent.META_LR, "anchor_decay": recurrent.ANCHOR_DECAY}
        self.rates: dict[Tensor, Tensor] = {}  # of each tensor, in the last step
        self.steps = 0
        self.signals = [0.0] * 4  # of the whole run, for every tensor: KL, reward, loss, share done
        self.seen: dict[str, State] = {"loss": {}, "reward": {}}
        self.tensors = [p for group in self.param_groups for p in group["params"]]
        if not self.tensors:
            raise ValueError("none of its groups has a parameter")
        if any(p.is_complex() for p in self.tensors):
            raise ValueError("an online optimizer does not support complex parameters")
        self.device = self.tensors[0].device
        if {p.device for p in self.tensors} != {self.device}:
            raise ValueError("an online optimizer needs all of its tensors on one device")
        self.sample = Sample(self.tensors)
        self.place(recurrent.trained("tensors") if weights else recurrent.fresh(FEATURES))
        count = len(self.tensors)
        shapes = {
            "x": [FEATURES], "hidden": [recurrent.HIDDEN], "scale": [], "cosine": [],
            "size": [],  # smoothed norm of the gradient
            "weight": [self.sample.size],
        }  # fmt: skip
        self.last = {k: torch.zeros(count, *size, device=self.device) for k, size in shapes.items()}
        self.hidden = self.last["hidden"]
        depth = [i / max(count - 1, 1) - 0.5 for i in range(count)]
        size = [math.log(p.numel() + 1) / 10 - 1 for p in self.tensors]
        is_vector = [float(p.dim() < 2) for p in self.tensors]
        self._fixed = torch.tensor([depth, size, is_vector], device=self.device).t()  # [T, 3]
        signs = [-1.0 if g.get("maximize") else 1.0 for g in self.param_groups for _ in g["params"]]
        self._downhill = torch.tensor(signs, device=self.device)
        self._run = torch.zeros(5, device=self.device)
        self._trained = torch.ones(count, device=self.device)
        self._have_gradient = [True] * count

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle. As with torch's optimizers, hooks stay behind."""
        return copyable(self)

    @property
    def names(self) -> list[str]:
        """Of named_parameters, where the optimizer was given those; else their numbers."""
        names = [name for group in self.param_groups for name in group.get("param_names", [])]
        return names if len(names) == len(self.tensors) else [*map(str, range(len(self.tensors)))]

    def place(self, weights: recurrent.Weights) -> None:
        """Puts `weights` into the GRU, and what they decay to."""
        self.weights = {name: weight.to(self.device) for name, weight in weights.items()}
        self.anchor = dict(self.weights)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "tensors" in vars(self):  # torch's constructor adds groups too, before there are any
            raise ValueError("an online optimizer needs all of its tensors at the beginning")
        super().add_param_group(param_group)

    def observe(
        self,
        *,
        loss: Scalar = None,
        reward: Scalar = None,
        kl: Scalar = None,
        trust_region_kl: float | None = None,
        done: float | None = None,
    ) -> None:
        """Lets the GRU see the KL over its target, reward and loss against their means, and the
        share of the run that is done. What is not finite is ignored."""
        given = numbers(loss=loss, reward=reward, kl=kl)
        values = {name: x for name, x in given.items() if math.isfinite(x)}
        if trust_region_kl and values.get("kl", 0) > 0:
            self.signals[0] = clamp(math.log(values["kl"] / trust_region_kl) / 2, (-2.0, 2.0))
        for place, name in ((1, "reward"), (2, "loss")):
            if name in values:
                own = self.seen[name] = smoothed(self.seen[name], values[name], BETA)
                off = (values[name] - own["ema"]) / (own["mean_abs"] + 1e-8)
                self.signals[place] = clamp(off, (-2.0, 2.0))
        if done is not None:
            self.signals[3] = done - 0.5

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of torch's optimizer, with each tensor's rate times its scale."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._see_who_is_trained()
        gradient = self.sample([p.grad for p in self.tensors])
        weight = self.sample(self.tensors)
        # Read here and not after the step: whoever shrank the update (a trust region) has done so.
        update = self.last["weight"] - weight if self.steps else torch.zeros_like(weight)
        gain = (_cosine(gradient, update) * self._downhill).nan_to_num(0.0)
        if self.learns and self.steps:
            self.weights = recurrent.learn(
                self.weights, self.anchor, self.last["x"], self.last["hidden"],
                recurrent.centre(gain, self._trained), self._trained, **self.learning,
            )  # fmt: skip
        x = self.features(gradient, weight, update, gain)
        hidden = self.hidden
        scale, self.hidden = self.answer(x)
        self._take(scale.exp())
        self.last |= {"x": x, "hidden": hidden, "scale": scale, "weight": weight}
        self.steps += 1
        return loss

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log scales [T] and the next hidden states."""
        return recurrent.answer(self.weights, x, self.hidden, self._trained)

    def _see_who_is_trained(self) -> None:
        """Frozen tensors have no gradient. On a GPU the flags are set without waiting for it.

        Raises RuntimeError for sparse gradients.
        """
        now = [p.grad is not None for p in self.tensors]
        if any(p.grad is not None and p.grad.is_sparse for p in self.tensors):
            raise RuntimeError("an online optimizer does not support sparse gradients")
        for i, (was, has) in enumerate(zip(self._have_gradient, now, strict=True)):
            if was != has:
                self._trained[i].fill_(float(has))
        self._have_gradient = now

    def features(self, gradient: Tensor, weight: Tensor, update: Tensor, gain: Tensor) -> Tensor:
        """[T, FEATURES], none of which depends on the units of loss or reward."""
        size = gradient.norm(dim=1).nan_to_num(0.0, 0.0, 0.0)
        usual = self.last["size"].lerp(size, 1 - BETA) if self.steps else size
        cosine = self.last["cosine"].lerp(gain, 1 - BETA)
        self.last |= {"size": usual, "cosine": cosine}
        moved = update.norm(dim=1) / (weight.norm(dim=1) + 1e-8)
        run = (*self.signals, math.log1p(self.steps) / 5)
        for place, value in zip(self._run.unbind(), run, strict=True):
            place.fill_(value)  # an argument of the kernel: copying a list would synchronise
        own = [
            torch.tanh(10 * gain),
            torch.tanh(10 * cosine),
            torch.tanh(10 * recurrent.centre(cosine, self._trained)),
            ((size + 1e-12) / (usual + 1e-12)).log() / 2,
            (moved + 1e-6).log() / 4 + 1.75,
            self.last["scale"],
        ]
        return torch.cat([torch.stack(own, 1), self._fixed, self._run.expand(len(size), -1)], 1)

    def _take(self, scale: Tensor) -> None:
        """torch's step with a group for each tensor, at the group's rate times the tensor's scale.

        As tensors: nothing is fetched from the device. In double precision where the rate is a
        number, and in the rate's own where that is a tensor, so that a scale of 1 changes no bit.
        """
        groups, kind = self.param_groups, torch.float64 if self.device.type == "cpu" else None
        scales = scale.to(kind).unbind()
        whole = [group for group in groups for _ in group["params"]]
        rates = [group["lr"] for group in whole]
        self.rates = {
            p: scale * lr if isinstance(lr, float | int) else (scale * lr).to(lr.dtype)
            for p, scale, lr in zip(self.tensors, scales, rates, strict=True)
        }
        if all(group.get("fused") for group in groups) and self._fused():
            return
        self.param_groups = [
            {**group, "params": [p], "param_names": [""], "lr": rate}
            for (p, rate), group in zip(self.rates.items(), whole, strict=True)
        ]
        try:
            inspect.unwrap(self.torch_class.step)(self)
        finally:
            self.param_groups = groups

    def _fused(self) -> bool:
        """The same by torch's kernel alone, where that is known; whether it was."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """torch's, and under "online" the hidden states by parameter name and the GRU's weights."""
        online = {name: copy.copy(getattr(self, name)) for name in _KEPT}
        return super().state_dict() | {"online": {"version": VERSION} | online}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError if the state is of other parameters, or of another version."""
        state = dict(state_dict)
        self._check_moments(state)
        if online := state.pop("online", None):
            if online["version"] != VERSION:
                raise ValueError(
                    f"the state is of version {online['version']}, this program reads {VERSION}"
                )
            if online["names"] != self.names:
                pairs = zip([*online["names"], "none"], [*self.names, "none"], strict=False)
                was, now = next(pair for pair in pairs if pair[0] != pair[1])
                raise ValueError(f"the state is of other tensors: {was} there, {now} here")
            tensors = {
                own: recurrent.fitted(own, online[own], getattr(self, own))
                for own in ("weights", "anchor", "hidden", "last")
            }
            plain = {own: copy.copy(online[own]) for own in ("steps", "signals", "seen")}
            vars(self).update(tensors | plain)
        super().load_state_dict(state)

    def _check_moments(self, state: dict[str, Any]) -> None:
        """torch numbers parameters over all groups, and looks at no shape."""
        places = (i for group in state["param_groups"] for i in group["params"])
        for i, p in zip(places, self.tensors, strict=False):
            for name, moment in state["state"].get(i, {}).items():
                if isinstance(moment, Tensor) and moment.dim():
                    recurrent.fitted(f"{name} of {i}", moment, p)


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """Of each row; 0 where one has no length."""
    return (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1)).clamp(min=1e-30)


class OnlineSGD(Online, torch.optim.SGD):
    """torch.optim.SGD with its arguments; see Online."""

    torch_class = torch.optim.SGD


class OnlineRMSProp(Online, torch.optim.RMSprop):
    """torch.optim.RMSprop with its arguments; see Online."""

    torch_class = torch.optim.RMSprop


class OnlineAdamW(Online, torch.optim.AdamW):
    """torch.optim.AdamW with its arguments; see Online. `fused=True` is the fast one."""

    torch_class = torch.optim.AdamW

    def _fused(self) -> bool:
        """A group for each tensor costs more around the kernel than in it: 6 ms for GPT-2's 148."""
        if any(isinstance(beta, Tensor) for group in self.param_groups for beta in group["betas"]):
            return False
        for group in self.param_groups:
            parts: list[list[Tensor]] = [[] for _ in range(6)]  # weights, …, maxima, steps
            self._init_group(group, *parts)
            names = ("weight_decay", "eps", "amsgrad", "maximize")
            options = {name: group[name] for name in names}
            options |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
            if parts[5]:
                torch._foreach_add_(parts[5], 1)
            maxima = [[most] for most in parts[4]] or [[] for _ in parts[0]]
            for p, g, m, v, most, step in zip(*parts[:4], maxima, parts[5], strict=True):
                torch._fused_adamw_([p], [g], [m], [v], most, [step], lr=self.rates[p], **options)
        return True
