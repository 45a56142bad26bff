"""OnlineSGD, OnlineRMSProp, OnlineAdamW: torch's optimizers, each tensor's update scaled by a GRU.

One GRU, shared, with a hidden state for each tensor, sees how gradients agree with the updates
before them and scales what the tensor is about to do. Scales are centred: the rate as a whole is
the controller's. Leaves out the GRU (recurrent.py) and how its weights were made (docs/online.md).
"""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adaptiverl.optim import recurrent
from adaptiverl.optim.controller import Controller
from adaptiverl.optim.hyperparams import number
from adaptiverl.optim.sample import Sample

VERSION = 1  # of the state's "online"
FEATURES = 14
BETA = 0.9


class Online(Optimizer):
    """What the three share: a mixin before one of torch's optimizers.

    `weights` are the GRU's: "trained" beforehand, or None for a head of zeros, with which nothing
    is scaled until it has learned. `learn` says whether it learns while it runs. Further keywords
    are Controller's rules, all "none" unless given: they move the rate as a whole.
    """

    torch_class: type[Optimizer]

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
        own = inspect.signature(self.torch_class.__init__).parameters
        rules = {name: value for name, value in keywords.items() if name not in own}
        super().__init__(params, *arguments, **{k: v for k, v in keywords.items() if k in own})
        # Whoever scales gradients (GradScaler) must unscale them before they are looked at.
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            if group.get("foreach") and not group.get("capturable"):
                raise ValueError("foreach cannot take each tensor's rate: use fused or neither")
            if any(p.is_cuda for p in group["params"]) and not group.get("foreach"):
                group["fused" if "fused" in group else "capturable"] = True  # no synchronisation
        self.learns, self.learning = learn, {"rate": recurrent.META_LR, "kept": recurrent.HOME}
        self.controller = Controller(self, owns_lr=False, **rules)
        self.rates: dict[Tensor, Tensor] = {}  # of each tensor, in the last step
        self.steps = 0
        self.signals = [0.0] * 4  # of the whole run, for every tensor
        self.tensors = [p for group in self.param_groups for p in group["params"]]
        if not self.tensors:
            raise ValueError("none of its groups has a parameter")
        self.device = self.tensors[0].device
        if {p.device for p in self.tensors} != {self.device}:
            raise ValueError("an online optimizer needs all of its tensors on one device")
        self.sample = Sample(self.tensors)
        home = recurrent.trained("tensors") if weights else recurrent.fresh(FEATURES)
        self._place(home, home)
        self.hidden = torch.zeros(len(self.tensors), recurrent.HIDDEN, device=self.device)
        self.last = {
            "x": torch.zeros(len(self.tensors), FEATURES, device=self.device),
            "hidden": self.hidden,
            "scale": torch.zeros(len(self.tensors), device=self.device),
            "cosine": torch.zeros(len(self.tensors), device=self.device),
            "size": torch.zeros(len(self.tensors), device=self.device),  # usual gradient
            "weight": torch.zeros(len(self.tensors), self.sample.size, device=self.device),
        }
        self._fixed = self._what_never_changes()
        signs = [-1.0 if g.get("maximize") else 1.0 for g in self.param_groups for _ in g["params"]]
        self._downhill = torch.tensor(signs, device=self.device)
        self._run = torch.zeros(5, device=self.device)
        self._trained = torch.ones(len(self.tensors), device=self.device)
        self._have_gradient = [True] * len(self.tensors)
        self._told, self._flags = self._run.unbind(), self._trained.unbind()

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle. As with torch's optimizers, hooks stay behind."""
        own = (
            "learns", "learning", "controller", "rates", "steps", "signals", "tensors", "device",
            "sample", "weights", "home", "hidden", "last", "_fixed", "_downhill", "_run",
            "_trained", "_have_gradient", "_step_supports_amp_scaling",
        )  # fmt: skip
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_run" in state:  # else it is torch's, within load_state_dict
            self._told, self._flags = self._run.unbind(), self._trained.unbind()

    @property
    def names(self) -> list[str]:
        """Of named_parameters, where the optimizer was given those; else their numbers."""
        names = [name for group in self.param_groups for name in group.get("param_names", [])]
        return names if len(names) == len(self.tensors) else [*map(str, range(len(self.tensors)))]

    def _place(self, weights: recurrent.Weights, home: recurrent.Weights) -> None:
        self.weights = recurrent.moved(weights, self.device)
        self.home = recurrent.moved(home, self.device)

    def _what_never_changes(self) -> Tensor:
        """[T, 3]: depth, size, whether a vector."""
        count = len(self.tensors)
        depth = [i / max(count - 1, 1) - 0.5 for i in range(count)]
        size = [math.log(p.numel() + 1) / 10 - 1 for p in self.tensors]
        vector = [float(p.dim() < 2) for p in self.tensors]
        return torch.tensor([depth, size, vector], device=self.device).t()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "tensors"):
            raise ValueError("an online optimizer needs all of its tensors at the beginning")
        super().add_param_group(param_group)

    def observe(
        self,
        *,
        loss: float | Tensor | None = None,
        reward: float | Tensor | None = None,
        kl: float | Tensor | None = None,
        kl_target: float | None = None,
        done: float | None = None,
    ) -> None:
        """Lets the controller answer, and the GRU see: KL over its target, reward and loss against
        what is usual for them, and the share of the run that is done."""
        given = {"loss": loss, "reward": reward, "kl": kl}
        own = {name: number(x) for name, x in given.items() if x is not None}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.controller.ask_for_processes()  # their scales must not differ
        values = self.controller.observe(**own)
        if kl_target and values.get("kl", 0) > 0:
            self.signals[0] = min(max(math.log(values["kl"] / kl_target) / 2, -2.0), 2.0)
        for place, name in ((1, "reward"), (2, "loss")):
            if name in values:
                ema, usual = (self.controller.seen[name][k] for k in ("ema", "usual"))
                self.signals[place] = min(max((values[name] - ema) / (usual + 1e-8), -2.0), 2.0)
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
                self.weights, self.home, self.last["x"], self.last["hidden"],
                recurrent.centre(gain, self._trained), centred=True, among=self._trained,
                **self.learning,
            )  # fmt: skip
        x = self._features(gradient, weight, update, gain)
        hidden = self.hidden
        scale, self.hidden = self._answer(x)
        with self.controller.applied():
            self._take(scale.exp())
        self.controller.tick()
        self.last |= {"x": x, "hidden": hidden, "scale": scale, "weight": weight}
        self.steps += 1
        return loss

    def _answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log scales [T] and the next hidden states."""
        return recurrent.answer(self.weights, x, self.hidden, centred=True, among=self._trained)

    def _see_who_is_trained(self) -> None:
        """Frozen tensors have no gradient. On a GPU the flags are set without waiting for it."""
        now = [p.grad is not None for p in self.tensors]
        for flag, was, has in zip(self._flags, self._have_gradient, now, strict=True):
            if was != has:
                flag.fill_(float(has))
        self._have_gradient = now

    def _features(self, gradient: Tensor, weight: Tensor, update: Tensor, gain: Tensor) -> Tensor:
        """[T, FEATURES], none of which depends on the units of loss or reward."""
        size = gradient.norm(dim=1).nan_to_num(0.0, 0.0, 0.0)
        usual = self.last["size"].lerp(size, 1 - BETA) if self.steps else size
        cosine = self.last["cosine"].lerp(gain, 1 - BETA)
        self.last |= {"size": usual, "cosine": cosine}
        moved = update.norm(dim=1) / (weight.norm(dim=1) + 1e-8)
        for place, value in zip(
            self._told, (*self.signals, math.log1p(self.steps) / 5), strict=True
        ):
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
        number, so that a scale of 1 changes no bit.
        """
        groups, kind = self.param_groups, torch.float64 if self.device.type == "cpu" else None
        scales = scale.to(kind).unbind()
        whole = [group for group in groups for _ in group["params"]]
        self.rates = {
            p: scale * group["lr"]
            for p, scale, group in zip(self.tensors, scales, whole, strict=True)
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
        online = {
            "version": VERSION,
            "names": self.names,
            "steps": self.steps,
            "signals": list(self.signals),
            "weights": dict(self.weights),
            "home": dict(self.home),
            "hidden": self.hidden,
            "last": dict(self.last),
            "controller": self.controller.state_dict(),
        }
        return super().state_dict() | {"online": online}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError if the state is of other parameters, or of another version."""
        state = dict(state_dict)
        online = state.pop("online", None)
        if online is not None:
            if online["version"] != VERSION:
                raise ValueError(
                    f"the state is of version {online['version']}, this program reads {VERSION}"
                )
            if online["names"] != self.names:
                pairs = zip([*online["names"], "none"], [*self.names, "none"], strict=False)
                was, now = next(pair for pair in pairs if pair[0] != pair[1])
                raise ValueError(f"the state is of other tensors: {was} there, {now} here")
            for own in ("weights", "home", "hidden", "last"):
                recurrent.check_shapes(own, online[own], getattr(self, own))
        self._check_moments(state)
        super().load_state_dict(state)
        if online is not None:
            self.steps, self.signals = online["steps"], list(online["signals"])
            self._place(online["weights"], online["home"])
            self.hidden = recurrent.moved(online["hidden"], self.device)
            self.last = recurrent.moved(online["last"], self.device)
            self.controller.load_state_dict(online["controller"])

    def _check_moments(self, state: dict[str, Any]) -> None:
        """torch numbers parameters over all groups, and looks at no shape."""
        places = (i for group in state["param_groups"] for i in group["params"])
        for i, p in zip(places, self.tensors, strict=False):
            for name, moment in state["state"].get(i, {}).items():
                if isinstance(moment, Tensor) and moment.dim() and moment.shape != p.shape:
                    there, here = list(moment.shape), list(p.shape)
                    raise ValueError(
                        f"the state does not fit: {name} of {i} is {there} there and {here} here"
                    )


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
