"""What a run says it could do to be faster: bf16 where the CPU has it and the model is large."""

from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import in_this_process

from adaptiverl.config.loading import load_config
from adaptiverl.training.advice import LARGE, bf16_advice, cpu_multiplies_bf16
from adaptiverl.training.build import build
from adaptiverl.training.dry_run import dry_run
from adaptiverl.training.keys import RunConfig

HAS = "this CPU has instructions for bf16, and the model has "


def parts(weights: int, device: str = "cpu") -> Any:
    weight = torch.nn.Parameter(torch.empty(weights, device="meta"))
    policy = SimpleNamespace(parameters=lambda: iter([weight]))
    runtime = SimpleNamespace(device=torch.device(device))
    return SimpleNamespace(runtime=runtime, sampler=SimpleNamespace(policy=policy))


@pytest.mark.parametrize(
    ("keys", "weights", "device", "has", "said"),
    [
        ({}, 124_000_000, "cpu", True, True),
        ({}, 124_000_000, "cpu", False, False),
        ({}, LARGE - 1, "cpu", True, False),
        ({}, 124_000_000, "cuda", True, False),
        ({"BF16": True}, 124_000_000, "cpu", True, False),
        ({"FULLTUNE": False}, 124_000_000, "cpu", True, True),
        ({"FULLTUNE": False, "LOAD_4BIT": True}, 124_000_000, "cpu", True, False),
    ],
)
def test_bf16_is_recommended_where_it_would_help(keys, weights, device, has, said):
    advice = bf16_advice(RunConfig.model_validate(keys), parts(weights, device), lambda: has)
    assert bool(advice) == said
    assert not said or (advice.startswith(f"{HAS}124 million") and "BF16=true" in advice)


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_either_of_two_instruction_sets_is_enough(monkeypatch, name):
    for each in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, each, lambda: False)
    assert not cpu_multiplies_bf16()
    monkeypatch.setattr(torch.cpu, name, lambda: True)
    assert cpu_multiplies_bf16()


def grown(parts):
    """The tiny policy with a weight beside it that is large and takes no memory."""
    spare = torch.nn.Parameter(torch.zeros(1).expand(LARGE), requires_grad=False)
    parts.sampler.policy.register_parameter("spare", spare)
    return parts


@pytest.mark.parametrize("has", [True, False])
def test_a_run_says_it_before_its_first_step_and_a_dry_run_at_its_end(
    run_parts, settings, tmp_path, monkeypatch, capsys, has
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert run_parts(settings | {"STEPS": 1}, grown) == 0
    out = capsys.readouterr().out
    assert (HAS in out) == has
    assert not has or out.index(HAS) < out.index("Step 1/1")
    config = load_config(tmp_path / "keys.json", schema=RunConfig)
    with in_this_process():
        built = grown(build(config))
        with closing(built.scoring):
            assert dry_run(config, built) == 0
    assert (HAS in capsys.readouterr().out) == has
