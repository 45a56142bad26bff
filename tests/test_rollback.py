"""A collapse: taken back, said, at most three times; killed in the middle of it, the same run."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_jsonl, without_clock
from safetensors.torch import load_file

from adaptiverl.commands.doctor import doctor
from adaptiverl.commands.explain import explain
from adaptiverl.files import checkpoint
from adaptiverl.files.logs import RunLog
from adaptiverl.rl.rollout import uniforms
from adaptiverl.training.collapse import sound_before
from adaptiverl.training.guards import Guards
from adaptiverl.training.keys import RunConfig

BANG = "def bang(completions, **_):\n    return [float(text.count('!')) for text in completions]\n"


@pytest.fixture
def spiked(settings):
    """Collapses in step 8, from an update a thousand times too large in step 7; not at a tenth."""
    weight = [[6, 1], [7, 1000], [8, 1]]
    return settings | {
        "REWARDS": [{"TYPE": "regex", "PATTERNS": "th", "WEIGHT": weight}],
        "OPTIM": "sgd",
        "LR_RULE": "none",
        "LRATE": 1e-2,
        "MAX_GRAD_NORM": 0,
        "NORMALIZE_ADVANTAGES": False,
        "STEPS": 10,
        "SAVE_EVERY": 2,
        "LOG_EVERY": 0,
        "RESUME": "auto",
    }


def events(settings: dict) -> list[dict]:
    return read_jsonl(Path(settings["OUTPUT_DIR"]) / "events.jsonl")


def rows(settings: dict) -> list[dict]:
    return read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")


def test_back_to_the_last_sound_checkpoint_and_on_from_there(main, spiked, caplog):
    """Step 6 was saved too shortly before the collapse to be sound."""
    assert main(spiked) == 0
    (event,) = events(spiked)
    assert (event["step"], event["kind"], event["action"]) == (8, "collapsed", "rollback")
    assert "Rolled back to step 4 (1 of at most 3 times)" in event["message"]
    assert "a tenth of the learning rate (0.001) and other random numbers" in event["message"]
    assert caplog.messages == [f"step 8: {event['message']}"]
    (change,) = read_jsonl(Path(spiked["OUTPUT_DIR"]) / "controller.jsonl")
    assert change == {
        "step": 5, "hyperparameter": "lr", "rule": "rollback", "signal": "collapse", "value": 8,
        "old": 1e-2, "new": pytest.approx(1e-3),
    }  # fmt: skip
    assert [row["step"] for row in rows(spiked)] == list(range(1, 11)), "each step once"
    assert [row["lr"] for row in rows(spiked)] == pytest.approx([1e-2] * 4 + [1e-3] * 6)
    out = Path(spiked["OUTPUT_DIR"])
    state = torch.load(out / "final" / "trainer.pt", weights_only=True)
    assert state["progress"]["rollbacks"] == 1
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3)


def test_what_was_taken_back_is_sampled_anew(main, spiked):
    out = Path(spiked["OUTPUT_DIR"])
    before = spiked | {"STEPS": 5, "OUTPUT_DIR": f"{out}-before"}
    assert main(spiked) == main(before) == 0
    again, first = (read_jsonl(Path(d) / "samples.jsonl") for d in (out, f"{out}-before"))

    def of(samples: list[dict], step: int) -> list:
        return [row["completion_ids"] for row in samples if row["step"] == step]

    assert of(again, 4) == of(first, 4)
    assert of(again, 5) != of(first, 5), "the same policy, other random numbers"
    prompts = [[row["prompt"] for row in samples if row["step"] == 5] for samples in (again, first)]
    assert prompts[0] == prompts[1]


def test_paths_of_the_config_are_found_after_a_reward_has_changed_the_working_directory(
    main, spiked, tmp_path, monkeypatch
):
    (tmp_path / "else").mkdir()
    (tmp_path / "moves.py").write_text(
        f"import os\ndef moves(completions, **_):\n    os.chdir({str(tmp_path / 'else')!r})\n"
        "    return list(map(len, completions))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    moves = {"TYPE": "python", "FUNCTION": "moves:moves", "WEIGHT": 0}
    keys = {"TRAIN_FILE": "prompts.json", "OUTPUT_DIR": "run"}
    assert main(spiked | keys | {"REWARDS": [*spiked["REWARDS"], moves]}) == 0
    (event,) = (row for row in read_jsonl(tmp_path / "run/events.jsonl") if row["kind"] != "warn")
    assert event["action"] == "rollback"
    assert (tmp_path / "run/final").is_dir() and not any((tmp_path / "else").iterdir())


def test_three_times_then_the_run_ends_with_the_cause(main, settings, capsys):
    """From a rate of 50 there is no checkpoint yet: back to the start, at most nine steps."""
    keys = settings | {"LRATE": 50, "LR_RULE": "none", "STEPS": 60, "LOG_EVERY": 0}
    keys |= {"REWARDS": settings["REWARDS"][:1]}
    assert main(keys) == 3
    found = events(keys)
    found = [event for event in found if event["action"] != "warn"]
    assert [event["action"] for event in found] == ["rollback"] * 3 + ["stop"]
    assert all(event["step"] <= 10 for event in found)
    rates = ["5", "0.5", "0.05"]
    for event, rate in zip(found, rates, strict=False):
        assert "LRATE or LR_RULE trust_region" in event["message"]
        assert "Rolled back to step 0" in event["message"]
        assert f"a tenth of the learning rate ({rate}) and" in event["message"]
    assert found[-1]["message"].endswith(
        "The run ends here, after 3 rollbacks. RESUME=auto would make the same steps again: change "
        f"that in a new run, with MODEL={keys['OUTPUT_DIR']}/step-000000 and another OUTPUT_DIR"
    )
    out = Path(keys["OUTPUT_DIR"])
    changes = read_jsonl(out / "controller.jsonl")
    assert [change["step"] for change in changes] == [1, 1, 1], "where it goes on"
    assert [change["value"] for change in changes] == [event["step"] for event in found[:3]]
    assert [change["old"] for change in changes] == pytest.approx([50, 5, 0.5])
    assert [change["new"] for change in changes] == pytest.approx([5, 0.5, 0.05])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"stopped after a collapse in step {found[-1]['step']}: the last sound checkpoint is "
        f"{out / 'step-000000'}"
    )
    assert not (out / "final").exists()
    first, last = found[0]["step"], found[3]["step"]
    assert "What moved lr:\n  rollback        × 0.001 in step 1: the policy had" in explain(out)
    text, _ = doctor(out)
    assert "the policy broke, 4 times: the learning rate was too large\n" in text
    assert f"evidence: first in step {first}: the policy" in text
    assert f"; last in step {last}; lr went from 50 to 0.05\n" in text


def test_a_reward_that_pays_for_one_sign_is_named_as_the_cause(
    main, settings, tmp_path, monkeypatch
):
    (tmp_path / "bangs.py").write_text(BANG)
    monkeypatch.syspath_prepend(tmp_path)
    keys = settings | {"REWARDS": [{"TYPE": "python", "FUNCTION": "bangs:bang"}], "KL_COEF": 0}
    keys |= {"MODEL": "adaptiverl/assets/policy", "BATCH_SIZE": 32, "MAX_NEW_TOKENS": 16}
    keys |= {"LRATE": 0.02, "LR_RULE": "none", "STEPS": 10, "LOG_EVERY": 0, "ON_COLLAPSE": "stop"}
    keys |= {"TRAIN_FILE": "data.json", "OPTIM": "adamw"}
    assert main(keys) == 3
    *_, event = events(keys)
    assert event["step"] <= 10 and event["kind"] == "collapsed" and event["action"] == "stop"
    assert "REWARDS pay for one text" in event["message"]
    assert "Change REWARDS, raise KL_COEF" in event["message"]
    assert rows(keys)[-1]["step"] == event["step"], "the step that shows it is kept"


def test_weights_that_are_not_finite_are_taken_back(main, settings):
    keys = settings | {"OPTIM": "sgd", "LR_RULE": "none", "LRATE": 1e38, "LOG_EVERY": 0}
    assert main(keys) == 3
    assert [event["kind"] for event in events(keys)] == ["nan"] * 4
    assert "log-probabilities are not finite (NaN)" in events(keys)[0]["message"]


@pytest.mark.parametrize("keys", [{}, {"LOAD_4BIT": True}], ids=["LoRA", "4 bits"])
def test_an_adapter_goes_back_to_the_start(run_parts, settings, keys):
    """Broken once, it is that of the untrained policy again, and trains on from there."""

    def break_once(parts):
        adapter = next(p for p in parts.policy.parameters() if p.requires_grad)
        with torch.no_grad():
            adapter.fill_(float("nan"))
        parts.progress.step = 1  # else MODEL would be at fault
        return parts

    assert run_parts(settings | keys | {"FULLTUNE": False}, break_once) == 0
    (event,) = events(settings)
    assert event["kind"] == "nan" and "Rolled back to step 0 (1 of" in event["message"]
    assert [row["step"] for row in rows(settings)] == [1, 2, 3]
    first, *_, last = (row["kl"] for row in rows(settings))
    assert first == pytest.approx(0, abs=1e-5) and abs(last) > 1e-5


def test_a_trust_region_is_halved_also_after_a_resume(run_parts, settings):
    """Broken once, in step 2, as by a fault of the machine."""
    sizes = []

    def break_once(parts):
        with torch.no_grad():
            parts.policy.lm.transformer.ln_f.bias.fill_(float("nan"))
        parts.progress.step = 1  # else MODEL would be at fault
        return parts

    def note(parts):
        sizes.append((parts.optimizer.trust_region.kl, parts.progress.rollbacks))
        return parts

    keys = settings | {"LR_RULE": "trust_region", "TRUST_REGION_KL": 0.008, "STEPS": 3}
    assert run_parts(keys, break_once) == 0
    (event,) = events(keys)
    assert "Rolled back to step 0 (1 of" in event["message"]
    assert "half of the trust region, TRUST_REGION_KL 0.004 and other" in event["message"]
    assert rows(keys)[0]["update_kl_target"] <= 0.004
    change = read_jsonl(Path(keys["OUTPUT_DIR"]) / "controller.jsonl")[0]
    assert (change["step"], change["rule"], change["value"]) == (1, "rollback", 2)
    assert [change[k] for k in ("hyperparameter", "old", "new")] == ["trust_region_kl", 8e-3, 4e-3]
    assert run_parts(keys | {"RESUME": "auto"}, note) == 0
    assert sizes == [(0.004, 1)]


KILLER = """
import os, signal, sys
sys.path[:0] = [{root!r}]
import shutil
from pathlib import Path
import torch
from accelerate import Accelerator
import train

def attempt(arguments, place):
    # In a process of its own, killed at the call number `place` after a rollback has begun.
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = None

    def begins(function):
        def call(*arguments, **options):
            nonlocal count
            count = 0
            return function(*arguments, **options)
        return call

    def deadly(function):
        def call(*arguments, **options):
            nonlocal count
            if count is not None:
                if count == place:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
            return function(*arguments, **options)
        return call

    Accelerator.free_memory = begins(Accelerator.free_memory)
    torch.save, os.fsync = deadly(torch.save), deadly(os.fsync)
    shutil.rmtree = deadly(shutil.rmtree)
    Path.rename, Path.replace = deadly(Path.rename), deadly(Path.replace)
    sys.argv = ["train.py", *arguments]
    status = train.main()
    sys.stdout.flush()
    os._exit(status)

config, folder, *places = sys.argv[1:]
assert attempt([config, f"OUTPUT_DIR={{folder}}/whole"], -1) == 0
for place in places:
    arguments = [config, f"OUTPUT_DIR={{folder}}/killed-{{place}}"]
    assert attempt(arguments, int(place)) == -signal.SIGKILL, place
    assert attempt(arguments, -1) == 0, place
"""


def test_killed_at_any_place_of_a_rollback_it_is_the_run_that_was_not(start, spiked, tmp_path):
    """SIGKILL while later checkpoints go, while the rolled-back one is written, and after."""
    killer = tmp_path / "killer.py"
    killer.write_text(KILLER.format(root=str(ROOT)))
    # 1 to 3 remove step 6, 8 to 24 replace step 4 (22 is between the renames), 26 the events
    places = ["0", "2", "9", "22", "24", "26"]
    process = start(spiked, str(tmp_path), *places, program=str(killer))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    whole = tmp_path / "whole"
    for name in ("events.jsonl", "controller.jsonl"):
        assert len(read_jsonl(whole / name)) == 1, "or the test would show nothing"
    for place in places:
        killed = tmp_path / f"killed-{place}"
        metrics = [without_clock(read_jsonl(each / "metrics.jsonl")) for each in (whole, killed)]
        assert metrics[0] == metrics[1], place
        for name in ("samples.jsonl", "events.jsonl", "controller.jsonl"):
            assert (whole / name).read_bytes() == (killed / name).read_bytes(), (place, name)
        one, other = (load_file(each / "final/model.safetensors") for each in (whole, killed))
        assert all(torch.equal(one[name], other[name]) for name in one), place


# Parts


def test_a_checkpoint_is_sound_when_steps_have_followed():
    assert sound_before([2, 4, 6], 8) == [2, 4]
    assert sound_before([2, 4, 6], 9) == [2, 4], "step 9 shows it, not that the three before are"
    assert sound_before([2, 4, 6], 10) == [2, 4, 6]
    guards = Guards(RunConfig(), last_step=100, allowed_gap=1e-3, sound_steps=[2, 4, 6])
    assert guards.needed(8) == {4, 6}
    assert guards.needed(4) == {2, 4, 6}
    guards.sound = False
    guards.checkpointed(8)
    assert guards.sound_steps == [2, 4, 6]


def test_the_update_that_broke_the_policy_is_not_gone_back_to(main, settings, caplog):
    """Saved in its own step, whose figures are those of the policy before it."""
    keys = {"LR_RULE": "none", "OPTIM": "adamw", "LRATE": 0.02, "SAVE_EVERY": 1, "STEPS": 6}
    keys |= {"MODEL": "adaptiverl/assets/policy", "MAX_NEW_TOKENS": 12}
    main(settings | keys | {"REWARDS": [{"TYPE": "length", "TARGET": 6}]})
    assert "Rolled back to step 0 (1 of at most 3 times)" in caplog.text


def test_prune_spares_what_a_rollback_needs(tmp_path):
    for step in (2, 4, 6, 8):
        checkpoint.save(tmp_path / f"step-{step:06d}", step, lambda folder: None)
    checkpoint.prune(tmp_path, 1, spare={4})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000008"]


def test_later_checkpoints_go_the_best_stays(tmp_path):
    for name, step in (("step-000002", 2), ("step-000004", 4), ("final", 4), ("best", 4)):
        checkpoint.save(tmp_path / name, step, lambda folder: None)
    checkpoint.drop_after(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-000002"]
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-000002", 2), "not best/"
    assert checkpoint.newest(tmp_path, {1, 3}) is None


def test_events_are_replaced_at_once_and_gone_where_there_are_none(tmp_path):
    log = RunLog(tmp_path, step=0, last_step=1)
    log.replace("events.jsonl", [{"step": 1}])
    log.replace("events.jsonl", [{"step": 1}, {"step": 1, "kind": "kl"}])
    assert read_jsonl(tmp_path / "events.jsonl") == [{"step": 1}, {"step": 1, "kind": "kl"}]
    log.replace("events.jsonl", [])
    assert not (tmp_path / "events.jsonl").exists()
    log.close()


def test_streams_of_random_numbers_differ_and_the_first_is_as_ever():
    assert torch.equal(uniforms(0, 1, 2, 3, stream=0), uniforms(0, 1, 2, 3))
    seen = [uniforms(0, 1, 2, 3, stream=k).tolist() for k in range(4)]
    assert all(seen[i] != seen[k] for i in range(4) for k in range(i))
