"""The Keras port walks as the torch library does: rates by losses and rewards, to 1e-6.

In a process of its own for each backend there is: Keras has one for as long as it is imported.
"""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT

from adaptiverl import AdaptiveScheduler
from adaptiverl.optim import rules
from adaptiverl.optim.controller import Controller

if importlib.util.find_spec("keras") is None:
    pytest.skip("keras is not installed", allow_module_level=True)

BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
        ),
    )
    for name in ("torch", "jax", "tensorflow")
]
RULES = {"lr_rule": "trend+variance+cosine", "reward_rule": "trend", "trend_window": 4,
         "trend_threshold": 1.0, "var_window": 4, "cycle_length": 12}  # fmt: skip
REWARDS = [k * 0.1 + (k % 2) * 0.01 for k in range(60)]
SCHEDULES = [
    ("cyclical", {"cycle_length": 7}),
    ("cosine", {"cycle_length": 7, "eta_min_scale": 0.1}),
    ("cosine_restart", {"cycle_length": 5, "cycle_mult": 1.5}),
    ([{"name": "cosine_restart", "cycle_length": 9}, "cyclical"], {"min_lr": 0.03}),
]
PROGRAM = """
import json, sys
import keras, numpy as np
from adaptiverl.integrations.keras import AdaptiveCallback, TimeSchedule

rules, rewards, schedules = json.load(sys.stdin)


class Watch(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.rates, self.losses = [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.rates.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))
        x, y = X[8 * batch : 8 * batch + 8], Y[8 * batch : 8 * batch + 8]
        self.losses.append(float(np.mean((np.asarray(self.model(x).tolist()) - y) ** 2)))


numbers = np.random.RandomState(0)
X, Y = numbers.randn(76, 3).astype("float32"), numbers.randn(76, 1).astype("float32")
Y[56:64] *= 5  # a batch of large losses
start = keras.initializers.Constant(3.0)
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer=start)])
model.compile(keras.optimizers.SGD(0.02), loss="mse")
given = iter(rewards)
watch = Watch()
adaptive = AdaptiveCallback(**rules, reward_fn=lambda batch: next(given))
history = model.fit(X, Y, batch_size=8, epochs=5, shuffle=False, verbose=0,
                    callbacks=[watch, adaptive])
walks = []
for rule, constants in schedules:
    schedule = TimeSchedule(0.1, rule, **constants)
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))
    walks.append([float(keras.ops.convert_to_numpy(twin(k))) for k in range(40)])
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile(keras.optimizers.SGD(TimeSchedule(0.1, "cosine", cycle_length=5)), loss="mse")
model.fit(X, Y, batch_size=8, epochs=1, verbose=0)
walks.append([float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))])
refused = ""
try:
    model.fit(X, Y, verbose=0, callbacks=[AdaptiveCallback("trend")])
except TypeError as error:
    refused = str(error)
print(json.dumps([watch.rates, watch.losses, history.history["learning_rate"], walks, refused]))
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_rates_are_those_of_the_torch_library(backend):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, text=True, capture_output=True,
        env=ENVIRONMENT | {"KERAS_BACKEND": backend}, input=json.dumps([RULES, REWARDS, SCHEDULES]),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rates, losses, logged, walks, refused = json.loads(result.stdout.splitlines()[-1])

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.02)
    moves: list[dict] = []
    scheduler = AdaptiveScheduler(optimizer, eta_min_scale=0.2, record=moves.append, **RULES)
    expected = []
    for loss, reward in zip(losses, REWARDS, strict=False):
        expected += scheduler.get_lr()
        optimizer.step()
        scheduler.step_loss(loss, reward)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert len(rates) == 50 and logged == pytest.approx([*expected[10::10], scheduler.get_lr()[0]])
    assert {move["rule"] for move in moves} == {"trend", "variance", "cosine", "reward trend"}

    for (rule, constants), found in zip(SCHEDULES, walks, strict=False):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        controller = Controller(optimizer, lr_rule=rule, **constants)
        walk = []
        for _ in range(40):
            walk.append(controller.rate(0.1))
            controller.tick()
        np.testing.assert_allclose(found, walk, rtol=1e-6)
    assert walks[-1] == pytest.approx([0.1]), "ten steps: down and back"
    assert "schedule" in refused.lower()


def test_what_is_refused(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    from adaptiverl.integrations.keras import HEIGHTS, AdaptiveCallback, TimeSchedule

    with pytest.raises(ValueError, match="there is no rule 'tend'"):
        AdaptiveCallback("tend")
    with pytest.raises(TypeError, match="momentum_rule: this callback moves the learning rate"):
        AdaptiveCallback(momentum_rule="inverse")
    with pytest.raises(ValueError, match="Keras shows a callback no gradient"):
        AdaptiveCallback("grad_norm")
    with pytest.raises(ValueError, match="trend reads the loss: use AdaptiveCallback"):
        TimeSchedule(0.1, "trend")
    with pytest.raises(ValueError, match="kelly reads the reward: use AdaptiveCallback"):
        TimeSchedule(0.1, reward_rule="kelly")
    with pytest.raises(ValueError, match=r"min_lr 1 is above max_lr 0\.1"):
        AdaptiveCallback("trend", min_lr=1.0, max_lr=0.1)
    for rule in (rule.name for rule in rules.RULES if rule.kind == "schedule"):
        if rule in HEIGHTS:
            assert 0 < float(TimeSchedule(0.1, rule)(3)) < 0.1
        else:
            with pytest.raises(ValueError, match=f"{rule} is not written .* use AdaptiveCallback"):
                TimeSchedule(0.1, rule)
    with pytest.raises(ValueError, match="is outside its bounds"):
        TimeSchedule(0.1, "cosine", max_lr=0.01)
