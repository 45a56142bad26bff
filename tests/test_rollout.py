"""Rollouts: positions, masks, temperature and the distribution that is sampled."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptiverl.rl.policy import Policy, load_policy, load_tokenizer
from adaptiverl.rl.rollout import Rollout, check_logprobs, pick, sample, token_logprobs, uniforms
from adaptiverl.rl.sampler import Sampler

TEXTS = ["This", "The acting in this film", "I watched it with my brother on a Sunday and"]


@pytest.fixture(scope="module")
def sampler(tiny) -> Sampler:
    return Sampler(load_policy(str(tiny)), load_tokenizer(str(tiny)))


def unpadded_logprobs(sampler: Sampler, rollout: Rollout, row: int) -> list[float]:
    """The slow reference: one row, no padding, no mask, no positions, plain log_softmax."""
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()]
    completion = torch.tensor(rollout.tokens()[row])
    ids = torch.cat([prompt, completion])
    with torch.no_grad():
        logits = sampler.policy.lm(ids[None]).logits[0, len(prompt) - 1 : -1]
    table = (logits / sampler.temperature).log_softmax(-1)
    return [table[t, token].item() for t, token in enumerate(completion)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_and_recomputed_logprobs_equal_an_unpadded_pass(sampler, temperature):
    sampler = Sampler(sampler.policy, sampler.tokenizer, temperature=temperature)
    rollout = sampler(TEXTS, uniforms(0, 1, 3, 12))
    assert rollout.prompt_mask.sum(-1).tolist() == [
        len(sampler.tokenizer(text).input_ids) for text in TEXTS
    ]
    again, _ = token_logprobs(sampler.policy, rollout, temperature)
    for row in range(3):
        want = unpadded_logprobs(sampler, rollout, row)
        assert rollout.logprobs[row].tolist()[: len(want)] == pytest.approx(want, abs=1e-4)
        assert again[row].tolist()[: len(want)] == pytest.approx(want, abs=1e-4)


def test_completion_ends_with_its_first_eos_which_counts(sampler):
    """Row 0 is forced to write EOS third: pad is EOS too, and only the first one counts."""
    eos = sampler.tokenizer.eos_token_id
    assert sampler.tokenizer.pad_token_id == eos
    calls = []

    def forward(ids, mask, keep, use_cache=False, cache=None):
        logits, cache = sampler.policy(ids, mask, keep, use_cache=use_cache, cache=cache)
        if use_cache:
            calls.append(mask.clone())
            if len(calls) == 3:
                logits[0, -1, eos] = 1e4
        return logits, cache

    batch = sampler.tokenizer(TEXTS, padding=True, return_tensors="pt")
    chance = uniforms(0, 2, 3, 6)
    rollout = sample(
        forward,
        batch.input_ids,
        batch.attention_mask,
        chance,
        eos_ids=torch.tensor([eos]),
        pad_id=eos,
    )
    assert rollout.completion_mask[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert rollout.completion_ids[0, 2:].tolist() == [eos] * 4
    assert rollout.logprobs[0, 3:].tolist() == [0.0] * 3
    assert len(rollout.tokens()[0]) == 3
    assert calls[-1][0, -2:].tolist() == [0, 0], "what follows an EOS is not attended to"
    again, entropy = token_logprobs(sampler.policy, rollout, 1.0)
    for row in (0, 1, 2):
        want = unpadded_logprobs(sampler, rollout, row)
        assert again[row].tolist()[: len(want)] == pytest.approx(want, abs=1e-4)
    assert again[0, 3:].tolist() == entropy[0, 3:].tolist() == [0.0] * 3


def test_sampling_stops_when_every_completion_has_ended():
    """Two tokens, the second is EOS and certain after the first."""

    def forward(ids, mask, keep, use_cache=False, cache=None):
        step = cache or 0
        likely = 0 if step == 0 else 1
        return torch.eye(2)[[likely] * len(ids)][:, None] * 1e4, step + 1

    ids = torch.zeros(2, 1, dtype=torch.long)
    rollout = sample(
        forward,
        ids,
        torch.ones_like(ids),
        uniforms(0, 0, 2, 50),
        eos_ids=torch.tensor([1]),
        pad_id=1,
    )
    assert rollout.tokens() == [[0, 1], [0, 1]]


def test_entropy_is_that_of_the_sampled_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])

    def forward(ids, mask, keep):
        return probabilities.log().expand(1, keep, 4), None

    one = torch.ones(1, 1, dtype=torch.long)
    rollout = Rollout(one, one, 2 * one, one, torch.zeros(1, 1))
    logprob, entropy = token_logprobs(forward, rollout)
    assert logprob.item() == pytest.approx(math.log(0.125))
    assert entropy.item() == pytest.approx(1.75 * math.log(2))  # ½·1 + ¼·2 + 2·⅛·3 bits


def test_dropout_is_off_in_sampling_and_in_the_loss(sampler):
    assert sampler.policy.lm.config.resid_pdrop == 0.1
    rollout = sampler(TEXTS, uniforms(0, 1, 3, 4))
    first, second = (token_logprobs(sampler.policy, rollout, 1.0)[0] for _ in range(2))
    assert torch.equal(first, second)


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=12), st.floats(0, 1, exclude_max=True))
def test_pick_inverts_the_cumulative_distribution(logits, uniform):
    weights = [math.exp(x) for x in logits]
    passed, want = 0.0, None
    for i, weight in enumerate(weights):
        passed += weight / sum(weights)
        if abs(passed - uniform) < 1e-9:
            return  # on the edge, rounding decides
        if want is None and passed > uniform:
            want = i
    got = pick(torch.tensor([logits], dtype=torch.float64), torch.tensor([uniform]).double())
    assert got.item() == want


def test_pick_follows_exact_probabilities():
    """Chi-square over 20,000 draws from 50 outcomes, some of probability zero."""
    torch.manual_seed(0)
    logits = torch.randn(50) * 2
    logits[::7] = -math.inf
    n = 20_000
    draws = pick(logits.expand(n, 50), uniforms(3, 1, n, 1)[:, 0])
    counts = torch.bincount(draws, minlength=50).double()
    expected = n * logits.double().softmax(-1)
    assert counts[::7].sum() == 0
    live = expected > 0
    statistic = ((counts - expected)[live] ** 2 / expected[live]).sum().item()
    assert statistic < 74.7  # the 99.9 % point of chi-square with 41 degrees of freedom


def test_pick_never_takes_an_impossible_token_at_the_edges():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]] * 2)
    assert pick(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 1]


def test_top_k_and_top_p_restrict_what_is_sampled(sampler):
    base = sampler(TEXTS, uniforms(0, 1, 3, 12))
    greedy = Sampler(sampler.policy, sampler.tokenizer, top_k=1)(TEXTS, uniforms(0, 1, 3, 12))
    nucleus = Sampler(sampler.policy, sampler.tokenizer, top_p=1e-6)(TEXTS, uniforms(0, 1, 3, 12))
    assert greedy.tokens() == nucleus.tokens() != base.tokens()
    batch = sampler.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits, _ = sampler.policy(batch.input_ids, batch.attention_mask, 1)
    assert greedy.completion_ids[:, 0].tolist() == logits[:, -1].argmax(-1).tolist()


def test_random_numbers_follow_from_seed_and_step_alone():
    assert torch.equal(uniforms(1, 2, 4, 3), uniforms(1, 2, 4, 3))
    assert not torch.equal(uniforms(1, 2, 4, 3), uniforms(1, 3, 4, 3))
    assert not torch.equal(uniforms(1, 2, 4, 3), uniforms(2, 2, 4, 3))


def test_part_keeps_rows_and_cuts_the_common_padding(sampler):
    one = torch.ones(2, 1, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
    rollout = Rollout(one, one, ids, mask, torch.zeros(2, 3))
    assert rollout.part(slice(1, 2)).completion_ids.tolist() == [[8]]
    assert rollout.part(slice(0, 2)).completion_ids.tolist() == ids.tolist()


def test_long_prompts_lose_their_beginning(sampler):
    cut = Sampler(sampler.policy, sampler.tokenizer, max_prompt=3)
    rollout = cut(TEXTS, uniforms(0, 1, 3, 2))
    whole = sampler.tokenizer(TEXTS[2]).input_ids
    assert rollout.prompt_ids[2].tolist() == whole[-3:]


def test_check_finds_a_model_that_ignores_positions(sampler):
    deaf = Policy(sampler.policy.lm)
    deaf.takes = deaf.takes - {"position_ids"}
    rollout = Sampler(deaf, sampler.tokenizer)(TEXTS, uniforms(0, 1, 3, 8))
    again = Policy(sampler.policy.lm)
    assert check_logprobs(again, sampler(TEXTS, uniforms(0, 1, 3, 8)), 1.0, exact=True) < 1e-4
    with pytest.raises(ValueError, match="only padded prompts are off"):
        check_logprobs(again, rollout, 1.0, exact=True)


def test_check_finds_dropout(sampler):
    rollout = sampler(TEXTS, uniforms(0, 1, 3, 8))
    try:
        sampler.policy.lm.train()
        with pytest.raises(ValueError, match="dropout is on"):
            check_logprobs(sampler.policy, rollout, 1.0, exact=True)
    finally:
        sampler.policy.lm.eval()


def test_reference_stays_where_the_policy_began(tiny):
    sampler = Sampler(load_policy(str(tiny)), load_tokenizer(str(tiny)))
    rollout = sampler(TEXTS, uniforms(0, 1, 3, 4))
    before = sampler.reference_logprobs(rollout)
    assert torch.allclose(before, rollout.logprobs, atol=1e-5)
    with torch.no_grad():
        for parameter in sampler.policy.parameters():
            parameter.mul_(1.1)
    assert torch.equal(sampler.reference_logprobs(rollout), before)
    assert not torch.allclose(token_logprobs(sampler.policy, rollout)[0], before, atol=1e-2)


def test_a_policy_without_reference_says_so(tiny):
    sampler = Sampler(load_policy(str(tiny), reference=False), load_tokenizer(str(tiny)))
    with pytest.raises(RuntimeError, match="without a reference"):
        sampler.reference_logprobs(sampler(TEXTS[:1], uniforms(0, 1, 1, 2)))


def test_every_eos_of_a_chat_model_ends_a_completion(sampler, monkeypatch):
    monkeypatch.setattr(
        sampler.policy.lm, "generation_config", SimpleNamespace(eos_token_id=[7, 9])
    )
    assert set(sampler.eos_ids().tolist()) == {7, 9, sampler.tokenizer.eos_token_id}
