"""Runs on a card: every precision and optimizer, kills, memory. The CPU's are in other files."""

import gc
import json
import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, around_steps, read_jsonl, without_clock
from gpu_parts import CARD, WHERE, on_card
from safetensors.torch import load_file
from test_config import EXAMPLE
from test_gpu_sampling import OPTIMIZERS
from test_online import net

from adaptiverl import AdaptiveOptimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # peft corrects it itself
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft's
]
# A run to the last bit: said before torch is imported
DETERMINISTIC = """
import os, sys
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
sys.path.insert(0, {root!r})
import torch
torch.use_deterministic_algorithms(True)
import train
sys.exit(train.main())
"""


def metrics(settings: dict) -> list[dict]:
    return read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")


@on_card("precisions")
@pytest.mark.parametrize(
    "keys",
    [
        {"BF16": True},
        {"FULLTUNE": False},
        {"FULLTUNE": False, "BF16": True},
        {"FULLTUNE": False, "LOAD_4BIT": True, "BF16": True},
        {"FULLTUNE": False, "LOAD_8BIT": True, "BF16": True},
        {"FP16": True},
        {"FP16": True, "FULLTUNE": False},
        {"FP16": True, "OPTIM": "adamw_8bit"},
        {"OPTIM": "adamw_8bit", "BF16": True},
    ],
    ids=lambda keys: "+".join(f"{key}={value}" for key, value in keys.items()),
)
def test_every_precision_trains_resumes_and_stays_near_its_start(main, settings, keys):
    if keys.get("FP16") and not CARD:
        pytest.skip("FP16 needs a card")
    keys = settings | keys | {"STEPS": 2, "SAVE_EVERY": 1}
    assert main(keys) == 0
    assert main(keys | {"STEPS": 6, "RESUME": "auto"}) == 0
    rows = metrics(settings)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["kl"] == pytest.approx(0, abs=0.02)
    skipped = rows[-1]["skipped"]
    assert skipped < (5 if keys.get("FP16") else 1), "the scale does not come down"
    norms = [row["grad_norm"] for row in rows if row["grad_norm"] is not None]  # it overflowed
    assert len(norms) == 6 - skipped and min(norms) > 0


@on_card("precisions")
def test_fp16_skips_a_step_that_overflows_and_its_scale_recovers(run_parts, settings):
    """From a scale of 2⁴⁰ gradients overflow; each skipped step halves it, until they do not."""
    if not CARD:
        pytest.skip("FP16 needs a card")
    scales = []

    def far_too_large(parts):
        scaler = parts.runtime.accelerator.scaler
        scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**40})  # made in the first step
        return around_steps(parts, lambda step: (step(), scales.append(scaler.get_scale())))

    keys = {"FP16": True, "STEPS": 40, "LR_RULE": "none", "LRATE": 1e-4}
    assert run_parts(settings | keys, far_too_large) == 0
    skipped = [row["skipped"] for row in metrics(settings)]
    assert skipped[:10] == [*range(1, 11)], "steps that should overflow did not"
    assert scales == [2.0 ** (40 - number) for number in skipped]
    assert skipped[-5:] == [skipped[-1]] * 5, "it goes on skipping"


@on_card("no synchronisation")
@pytest.mark.parametrize("optim", [name for name in OPTIMIZERS if name != "adamw_8bit"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_no_step_waits_for_the_device(optim, wrapped):
    """torch's own debug mode raises where a step would; wrapped, six rules move its rate."""
    model = net().to(WHERE)
    optimizer = OPTIMIZERS[optim]([*model.named_parameters()])
    if wrapped:
        optimizer = AdaptiveOptimizer(optimizer, "trend+variance+cosine", steps=10)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(16, 40, device=WHERE)).square().mean().backward()
        if wrapped:
            optimizer.observe(loss=1.0 / (step + 1), reward=float(step), grad_norm=1.0)
        if CARD:
            torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            if CARD:
                torch.cuda.set_sync_debug_mode("default")


@on_card("the first README's config")
def test_the_config_of_the_first_readme_trains(main, tmp_path, record_property):
    """As it stands, but for local random weights of GPT-2's size as "gpt2", and 60 of 1000 steps.

    Its words are those of the embedded tokenizer.
    """
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "adaptiverl/assets/policy")
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    sizes = {} if CARD else {"n_layer": 1, "n_embd": 48}
    folder, config = tmp_path / "gpt2", tmp_path / "config.json"
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **ends, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = EXAMPLE if CARD else EXAMPLE.replace('"FP16": "true"', '"FP16": "false"')
    config.write_text(re.sub(r'"MODEL": "gpt2"', f'"MODEL": {json.dumps(str(folder))}', text))
    number = 60 if CARD else 2
    assert main(config, f"STEPS={number}", f"OUTPUT_DIR={tmp_path / 'run'}") == 0
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert len(rows) == number and rows[-1]["skipped"] < number // 2
    laps = ("rollout", "reward", "reference", "update")
    last = [sum(row[f"seconds/{lap}"] for lap in laps) for row in rows[number // 2 :]]
    record_property("seconds per step", sorted(last)[len(last) // 2])


@on_card("kill and resume")
def test_killed_and_resumed_it_is_the_same_to_the_last_bit(start, settings, tmp_path):
    """With deterministic algorithms, beside a run that was never killed."""
    out = Path(settings["OUTPUT_DIR"])
    script = tmp_path / "deterministic.py"
    script.write_text(DETERMINISTIC.format(root=str(ROOT)))
    keys = settings | {"STEPS": 24, "SAVE_EVERY": 3, "LOG_EVERY": 1}

    whole = start(keys | {"OUTPUT_DIR": f"{out}-whole"}, program=str(script))
    _, err = whole.communicate(timeout=240)
    assert whole.returncode == 0, err
    killed = start(keys, program=str(script))
    for line in killed.stdout:
        if line.startswith("Step 8/24 |"):
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert 8 <= len(read_jsonl(out / "metrics.jsonl")) < 24, "killed in the middle"
    resumed = start(keys, "RESUME=auto", program=str(script))
    _, err = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, err

    rows = [read_jsonl(Path(f"{out}{name}") / "metrics.jsonl") for name in ("-whole", "")]
    assert without_clock(rows[0]) == without_clock(rows[1])
    weights = [Path(f"{out}{name}") / "final/model.safetensors" for name in ("-whole", "")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@on_card("kill and resume")
def test_without_deterministic_algorithms_two_runs_differ_by(main, settings, record_property):
    """The difference is stated, whatever it is: the kernels of backward may add in any order."""
    out = Path(settings["OUTPUT_DIR"])
    for name in ("one", "two"):
        assert main(settings | {"STEPS": 16, "OUTPUT_DIR": f"{out}-{name}"}) == 0
    one, two = (
        load_file(Path(f"{out}-{name}") / "final/model.safetensors") for name in ("one", "two")
    )
    largest = max((one[name] - two[name]).abs().max().item() for name in one)
    assert largest < float("inf")
    record_property("two runs, largest difference of a weight after 16 steps", largest)


@on_card("memory")
def test_memory_is_flat_over_300_steps(run_parts, settings, record_property):
    """Lengths vary, so the peak of 50 steps is compared; a MiB is less than one batch's logits."""
    peaks = []

    def watched(parts):
        def around(step):
            step()
            if CARD:
                peaks.append(torch.cuda.max_memory_allocated())
                torch.cuda.reset_peak_memory_stats()

        return around_steps(parts, around)

    assert run_parts(settings | {"STEPS": 300 if CARD else 3, "LOG_EVERY": 0}, watched) == 0
    if CARD:
        early, late = max(peaks[50:100]), max(peaks[250:])
        record_property(
            "growth of the peak from steps 50–100 to 250–300, MiB", (late - early) / 2**20
        )
        assert late <= early + 2**20


@on_card("memory")
def test_nothing_is_left_on_the_device_after_an_exception(run_parts, settings, record_property):
    """A second run that fails leaves what the first one left: the libraries' own workspaces."""

    class OnPurpose(Exception):
        pass

    def failing(parts):
        def around(step):
            step()
            raise OnPurpose

        return around_steps(parts, around)

    left = []
    for _ in range(2):
        with pytest.raises(OnPurpose):
            run_parts(settings, failing)
        gc.collect()
        left.append(torch.cuda.memory_allocated() if CARD else 0)
    record_property("left by the second exception, MiB", (left[1] - left[0]) / 2**20)
    assert left[1] <= left[0]
