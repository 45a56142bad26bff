"""The vLLM server as seen from here: what it is sent and how its answer is read.

A stand-in for TRL's client; a real server needs a GPU.
"""

import pytest
import torch
import trl.generation.vllm_client
from conftest import read_jsonl

from adaptiverl.rl.loading import load_policy, load_tokenizer


class StandIn:
    """Samples greedily with the weights that it was sent, as the server would."""

    def __init__(self, base_url: str, connection_timeout: float):
        assert base_url == "http://127.0.0.1:8000"
        self.lm, self.updates, self.off_by = None, 0, 0.0
        self.stale = True
        type(self).last = self

    def init_communicator(self, device: torch.device) -> None:
        assert device == torch.device("cpu")

    def update_model_params(self, lm: torch.nn.Module) -> None:
        self.lm, self.updates, self.stale = lm, self.updates + 1, True

    def reset_prefix_cache(self) -> None:
        self.stale = False

    @torch.no_grad()
    def generate(self, prompts, *, temperature, top_k, top_p, max_tokens, generation_kwargs):
        assert (temperature, top_k, top_p) == (0.9, 0, 1.0)
        assert not self.stale, "its cache holds keys and values of the weights before"
        ends = generation_kwargs["stop_token_ids"]
        type(self).asked = generation_kwargs
        completions, logprobs = [], []
        for prompt in prompts:
            ids, measured = list(prompt), []
            for _ in range(max_tokens):
                table = (self.lm(torch.tensor([ids])).logits[0, -1] / temperature).log_softmax(-1)
                token = int(table.argmax())
                ids.append(token)
                measured.append([table[token].item() + self.off_by])
                if token in ends:
                    break
            completions.append(ids[len(prompt) :])
            logprobs.append(measured)
        return {"completion_ids": completions, "logprobs": logprobs}


@pytest.fixture
def keys(settings, monkeypatch):
    monkeypatch.setattr(trl.generation.vllm_client, "VLLMClient", StandIn)
    return settings | {"VLLM_SERVER": "http://127.0.0.1:8000", "TEMPERATURE": 0.9}


def test_a_run_samples_from_the_server_with_its_newest_weights(main, keys, tmp_path):
    keys |= {"BASELINE": "none"}  # greedy completions of a prompt are all the same
    assert main(keys | {"REPORT": False}) == 0
    assert StandIn.last.updates == 4  # the check, then each of three steps
    rows = read_jsonl(tmp_path / "run/samples.jsonl")
    assert len(rows) == 3 * 8
    metrics = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert metrics[-1]["kl"] != pytest.approx(0, abs=1e-5), "the weights have moved"
    policy = load_policy(keys["MODEL"], reference=False)
    first = rows[0]
    prompt = load_tokenizer(keys["MODEL"])(first["prompt"]).input_ids
    with torch.no_grad():
        logits = policy.lm(torch.tensor([prompt + first["completion_ids"]])).logits[0]
    table = (logits[len(prompt) - 1 : -1] / 0.9).log_softmax(-1)
    assert [row.argmax().item() for row in table] == first["completion_ids"]


def test_the_server_is_told_the_stop_strings(main, keys, tmp_path):
    """It looks for them in text with special tokens, as is done here. This one goes on behind."""
    keys |= {"BASELINE": "none", "STEPS": 1, "MAX_NEW_TOKENS": 6}
    assert main(keys) == 0
    assert StandIn.asked.keys() == {"stop_token_ids"}
    free = read_jsonl(tmp_path / "run/samples.jsonl")
    tokenizer = load_tokenizer(keys["MODEL"])
    stop = tokenizer.decode(free[0]["completion_ids"][2:4])
    assert main(keys | {"STOP": [stop]}) == 0
    assert StandIn.asked["stop"] == [stop] and StandIn.asked["skip_special_tokens"] is False
    cut = read_jsonl(tmp_path / "run/samples.jsonl")
    assert [len(row["completion_ids"]) for row in free] == [6] * 8
    assert cut[0]["completion"] == free[0]["completion"].split(stop)[0] != free[0]["completion"]
    for row, whole in zip(cut, free, strict=True):
        ids = whole["completion_ids"]
        ends = (n for n in range(1, 6) if stop in tokenizer.decode(ids[:n]))
        assert row["completion_ids"] == ids[: next(ends, 6)]
        assert len(row["logprobs"]) == len(row["completion_ids"])


def test_a_server_that_reports_other_logprobs_is_found_out(main, keys, capsys, monkeypatch):
    init = StandIn.__init__

    def off(self, *arguments, **options):
        init(self, *arguments, **options)
        self.off_by = 0.2

    monkeypatch.setattr(StandIn, "__init__", off)
    assert main(keys) == 2
    assert "the log-probabilities of the samples and of the loss differ" in capsys.readouterr().err


def test_no_vllm_is_one_line(main, settings, capsys):
    assert main(settings | {"VLLM_SERVER": "http://127.0.0.1:8000"}) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: VLLM_SERVER: ") and "is not installed" in said


def test_an_adapter_is_refused(main, settings, capsys):
    assert main(settings | {"VLLM_SERVER": "http://127.0.0.1:8000", "FULLTUNE": False}) == 2
    assert "VLLM_SERVER needs FULLTUNE" in capsys.readouterr().err
