"""Rollouts: positions, masks, temperature, micro-batches, and the distribution that is sampled."""

import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from adaptiverl.rl.check import check_logprobs, check_policy
from adaptiverl.rl.loading import load_policy, load_tokenizer
from adaptiverl.rl.policy import Policy
from adaptiverl.rl.reinforce import kl_per_token
from adaptiverl.rl.rollout import Rollout, uniforms
from adaptiverl.rl.sampling.sampler import Sampler, choose_backend, eos_ids
from adaptiverl.rl.sampling.static_cache import StaticCacheBackend
from adaptiverl.rl.sampling.tokens import BLOCK, inverse_cdf_sample_

TEXTS = ["This", "The acting in this film", "I watched it with my brother on a Sunday and"]


def pick(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Of rows of logits [n, V], kept."""
    return inverse_cdf_sample_(logits.t().clone(), uniform)[0]


@pytest.fixture(scope="module")
def sampler(tiny) -> Sampler:
    return Sampler(load_policy(str(tiny)), load_tokenizer(str(tiny)))


def unpadded_logprobs(sampler: Sampler, rollout: Rollout, row: int) -> list[float]:
    """The slow reference: one row, no padding, no mask, no positions, plain log_softmax."""
    own = rollout.prompt_of[row]
    prompt = rollout.prompt_ids[own][rollout.prompt_mask[own].bool()]
    completion = torch.tensor(rollout.tokens()[row])
    ids = torch.cat([prompt, completion])
    with torch.no_grad():
        logits = sampler.policy.lm(ids[None]).logits[0, len(prompt) - 1 : -1]
    table = (logits / sampler.policy.temperature).log_softmax(-1)
    return [table[t, token].item() for t, token in enumerate(completion)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_and_recomputed_logprobs_equal_an_unpadded_pass(sampler, temperature):
    policy = Policy(sampler.policy.lm, temperature=temperature)
    sampler = Sampler(policy, sampler.tokenizer)
    rollout = sampler(TEXTS, uniforms(0, 1, 3, 12))
    assert rollout.prompt_mask.sum(-1).tolist() == [
        len(sampler.tokenizer(text).input_ids) for text in TEXTS
    ]
    again = policy.logprobs(rollout)
    for row in range(3):
        want = unpadded_logprobs(sampler, rollout, row)
        assert rollout.logprobs[row].tolist()[: len(want)] == pytest.approx(want, abs=1e-4)
        assert again[row].tolist()[: len(want)] == pytest.approx(want, abs=1e-4)


def test_completion_ends_with_its_first_eos_which_counts(sampler, monkeypatch):
    """Pad is EOS too, and only the first one counts: here the third token of row 0 is called so."""
    rollout = sampler(TEXTS, uniforms(0, 2, 3, 6))
    free = rollout.tokens()
    ends = SimpleNamespace(eos_token_id=free[0][2])
    monkeypatch.setattr(sampler.policy.lm, "generation_config", ends)
    sampler = Sampler(sampler.policy, sampler.tokenizer)
    assert free[0][2] not in free[0][:2]
    ended = sampler(TEXTS, uniforms(0, 2, 3, 6))
    pad = sampler.tokenizer.pad_token_id
    assert ended.completion_mask[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert ended.completion_ids[0].tolist() == [*free[0][:3], pad, pad, pad]
    assert ended.logprobs[0, 3:].tolist() == [0.0] * 3
    assert torch.equal(ended.logprobs[0, :3], rollout.logprobs[0, :3])
    assert ended.tokens() == [free[0][:3], *free[1:]]
    again = sampler.policy.logprobs(ended)
    for row in (0, 1, 2):
        want = unpadded_logprobs(sampler, ended, row)
        assert again[row].tolist()[: len(want)] == pytest.approx(want, abs=1e-4)
    assert again[0, 3:].tolist() == [0.0] * 3


def test_dropout_is_off_in_sampling_and_in_the_loss(sampler):
    assert sampler.policy.lm.config.resid_pdrop == 0.1
    rollout = sampler(TEXTS, uniforms(0, 1, 3, 4))
    first, second = (sampler.policy.logprobs(rollout) for _ in range(2))
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


@cache
def uniforms_of_rows(count: int) -> torch.Tensor:
    return uniforms(3, 1, count, 1)[:, 0]


@pytest.mark.parametrize("words", [50, BLOCK, 3 * BLOCK + 11])
def test_pick_follows_exact_probabilities(words):
    """Chi-square over 200,000 draws, some outcomes of probability zero, over one block and more."""
    torch.manual_seed(0)
    logits = torch.randn(words)
    logits[::7] = -math.inf
    n = 200_000
    drawn = [  # in parts that stay in the processor's cache
        inverse_cdf_sample_(logits[:, None].repeat(1, len(part)), part)
        for part in uniforms_of_rows(n).split(1000)
    ]
    token, logprob = map(torch.cat, zip(*drawn, strict=True))
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[token], rtol=1e-5, atol=1e-5)
    counts = torch.bincount(token, minlength=words).double()
    expected = n * logits.double().softmax(-1)
    assert counts[::7].sum() == 0
    live = expected > 0
    statistic = ((counts - expected)[live] ** 2 / expected[live]).sum().item()
    freedom = int(live.sum()) - 1
    assert statistic < freedom + 3.1 * math.sqrt(2 * freedom) + 6, "beyond the 99.9 % point"


def test_pick_agrees_with_one_cumulative_sum_in_double_precision():
    """50,257 words: everywhere but within 1e-6 of where one word ends and the next begins."""
    torch.manual_seed(1)
    logits = 3 * torch.randn(50_257)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    uniform = torch.rand(64, dtype=torch.float64)
    want = torch.searchsorted(cumulative, uniform, right=True)
    edges = (cumulative[:, None] - uniform).abs().amin(0)
    got = pick(logits.expand(64, -1), uniform)
    assert (edges > 1e-6).sum() > 40
    assert torch.equal(got[edges > 1e-6], want[edges > 1e-6])


@pytest.mark.parametrize("words", [3, BLOCK + 3, 2 * BLOCK])
@pytest.mark.parametrize("where", [0, -1])
def test_pick_never_takes_an_impossible_token_at_the_edges(words, where):
    logits = torch.full((2, words), -math.inf)
    logits[:, where] = 5.0
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert pick(logits, ends).tolist() == [where % words] * 2
    two = torch.full((2, 3 * BLOCK), -math.inf)
    two[:, [7, 2 * BLOCK + 9]] = 0.0
    assert pick(two, ends).tolist() == [7, 2 * BLOCK + 9]


def test_top_k_and_top_p_restrict_what_is_sampled(sampler):
    base = sampler(TEXTS, uniforms(0, 1, 3, 12))
    greedy = Sampler(sampler.policy, sampler.tokenizer, top_k=1)(TEXTS, uniforms(0, 1, 3, 12))
    nucleus = Sampler(sampler.policy, sampler.tokenizer, top_p=1e-6)(TEXTS, uniforms(0, 1, 3, 12))
    assert greedy.tokens() == nucleus.tokens() != base.tokens()
    for row, text in enumerate(TEXTS):
        ids = sampler.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            likeliest = sampler.policy.lm(ids).logits[0, -1].argmax().item()
        assert greedy.completion_ids[row, 0] == likeliest
    want = unpadded_logprobs(sampler, greedy, 0)
    got = greedy.logprobs[0].tolist()[: len(want)]
    assert got == pytest.approx(want, abs=1e-4), "of the policy, not of what top-k leaves of it"


def test_random_numbers_follow_from_seed_and_step_alone():
    assert torch.equal(uniforms(1, 2, 4, 3), uniforms(1, 2, 4, 3))
    assert not torch.equal(uniforms(1, 2, 4, 3), uniforms(1, 3, 4, 3))
    assert not torch.equal(uniforms(1, 2, 4, 3), uniforms(2, 2, 4, 3))


def test_selected_rows_keep_their_prompts_and_weights_and_no_common_padding():
    rollout = Rollout(
        prompt_ids=torch.tensor([[0, 0, 1], [2, 3, 4], [0, 5, 6]]),
        prompt_mask=torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]]),
        prompt_of=torch.tensor([0, 1, 2, 2]),
        completion_ids=torch.tensor([[5, 6, 7], [8, 0, 0], [9, 9, 0], [4, 0, 0]]),
        completion_mask=torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]),
        logprobs=torch.arange(12.0).view(4, 3),
        weights=torch.arange(12.0).view(4, 3) + 0.5,
    )
    part = rollout.select(torch.tensor([3, 0]))
    assert part.completion_ids.tolist() == [[4, 0, 0], [5, 6, 7]]
    assert part.prompt_ids.tolist() == [[0, 1], [5, 6]]
    assert part.prompt_of.tolist() == [1, 0]
    assert part.logprobs.tolist() == [[9, 10, 11], [0, 1, 2]]
    assert part.weights.tolist() == [[9.5, 10.5, 11.5], [0.5, 1.5, 2.5]]
    two = rollout.select(torch.tensor([1, 3]))
    assert two.completion_ids.tolist() == [[8], [4]]
    assert two.weights.tolist() == [[3.5], [9.5]]


def test_micro_batches_hold_every_row_once_the_long_ones_together():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    ids = torch.zeros_like(mask)
    rollout = Rollout(ids, mask, torch.arange(5), ids, mask, ids.float())
    assert [rows.tolist() for rows in rollout.split_rows(3)] == [[1, 3], [4, 0], [2]]
    assert [rows.tolist() for rows in rollout.split_rows(1)] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_micro_batches_add_up_to_the_gradient_of_the_whole(sampler, count):
    texts = [text for text in TEXTS for _ in range(2)]
    rollout = sampler(texts, uniforms(0, 3, 6, 9))
    weights = torch.randn(rollout.logprobs.shape) * rollout.completion_mask
    policy = sampler.policy

    def gradient(count: int) -> torch.Tensor:
        policy.zero_grad()
        for batch in rollout.with_weights(weights).micro_batches(count):
            policy(batch).score.backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    torch.testing.assert_close(gradient(count), gradient(1), rtol=1e-3, atol=1e-4)
    reference = policy.reference_logprobs(rollout, count)
    torch.testing.assert_close(reference, policy.reference_logprobs(rollout), rtol=0, atol=1e-4)


def test_each_prompt_is_read_once(sampler):
    rollout = sampler([TEXTS[1], TEXTS[0], TEXTS[1], TEXTS[1]], uniforms(0, 1, 4, 3))
    assert rollout.prompt_of.tolist() == [0, 1, 0, 0]
    assert len(rollout.prompt_ids) == 2
    alone = sampler([TEXTS[1]], uniforms(0, 1, 4, 3)[2:3])
    assert rollout.tokens()[2] == alone.tokens()[0]


def test_long_prompts_lose_their_beginning(sampler):
    cut = Sampler(sampler.policy, sampler.tokenizer, max_prompt=3)
    rollout = cut(TEXTS, uniforms(0, 1, 3, 2))
    whole = sampler.tokenizer(TEXTS[2]).input_ids
    assert rollout.prompt_ids[2].tolist() == whole[-3:]


def test_the_smaller_last_part_of_an_evaluation_keeps_the_decoder(sampler):
    """As on CUDA, where making one captures graphs."""
    sampler = Sampler(sampler.policy, sampler.tokenizer)
    backend = StaticCacheBackend(sampler.policy, sampler.backend.token_sampler, static=True)
    sampler.backend = backend
    rollout = sampler(TEXTS, uniforms(0, 1, 3, 8))
    kept = backend.kept
    fewer = sampler(TEXTS[:2], uniforms(0, 1, 3, 8)[:2])
    assert kept and backend.kept is kept and fewer.tokens() == rollout.tokens()[:2]
    sampler(TEXTS * 2, uniforms(0, 1, 6, 8))
    assert backend.kept is not kept, "there was no room"
    assert backend.kept.rows == 6


def test_check_passes_what_is_right(sampler):
    assert check_policy(sampler.policy, sampler(TEXTS, uniforms(0, 1, 3, 8)), True) < 1e-4


def test_check_finds_a_model_that_ignores_positions(sampler):
    """Positions counted over padding too, as where nobody passes position_ids."""
    backend = sampler.backend
    sampler = Sampler(sampler.policy, sampler.tokenizer)

    def deaf(prompt_ids, prompt_mask, prompt_of, uniform):
        rollout = backend(prompt_ids, torch.ones_like(prompt_mask), prompt_of, uniform)
        rollout.prompt_mask = prompt_mask
        return rollout

    sampler.backend = deaf
    rollout = sampler(TEXTS, uniforms(0, 1, 3, 8))
    with pytest.raises(ValueError, match="only padded prompts are off"):
        check_policy(sampler.policy, rollout, True)


class Off(Policy):
    def logprobs(self, rollout):
        return super().logprobs(rollout) + 0.01 * rollout.completion_mask


def test_check_finds_a_loss_that_is_off(sampler):
    rollout = sampler(TEXTS, uniforms(0, 1, 3, 8))
    with pytest.raises(ValueError, match="all prompts are off"):
        check_policy(Off(sampler.policy.lm), rollout, True)


def test_check_finds_dropout(sampler):
    rollout = sampler(TEXTS, uniforms(0, 1, 3, 8))
    try:
        sampler.policy.lm.train()
        with pytest.raises(ValueError, match="dropout is on"):
            check_policy(sampler.policy, rollout, True)
    finally:
        sampler.policy.lm.eval()


def test_check_allows_rounding_on_average_where_arithmetic_is_not_exact():
    ones = torch.ones(1, 10)
    rollout = Rollout(ones, ones, torch.zeros(1).long(), ones, ones, ones)
    one_off = torch.zeros(1, 10)
    one_off[0, 3] = 0.4
    assert check_logprobs(
        one_off, 0 * ones, 0 * ones, rollout, sampler_matches_policy=False
    ) == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"up to 0.4 nats per token \(0.04 on average\)"):
        check_logprobs(one_off, 0 * ones, 0 * ones, rollout, sampler_matches_policy=True)
    with pytest.raises(ValueError, match=r"0\.06 on average"):
        check_logprobs(0.06 * ones, 0 * ones, 0 * ones, rollout, sampler_matches_policy=False)


def test_reference_stays_where_the_policy_began(tiny):
    sampler = Sampler(load_policy(str(tiny)), load_tokenizer(str(tiny)))
    rollout = sampler(TEXTS, uniforms(0, 1, 3, 4))
    before = sampler.policy.reference_logprobs(rollout)
    assert torch.allclose(before, rollout.logprobs, atol=1e-5)
    with torch.no_grad():
        for parameter in sampler.policy.parameters():
            parameter.mul_(1.1)
    assert torch.equal(sampler.policy.reference_logprobs(rollout), before)
    assert not torch.allclose(sampler.policy.logprobs(rollout), before, atol=1e-2)


def test_a_policy_without_reference_says_so(tiny):
    sampler = Sampler(load_policy(str(tiny), reference=False), load_tokenizer(str(tiny)))
    with pytest.raises(RuntimeError, match="without a reference"):
        sampler.policy.reference_logprobs(sampler(TEXTS[:1], uniforms(0, 1, 1, 2)))


def test_every_eos_of_a_chat_model_ends_a_completion(sampler, monkeypatch):
    monkeypatch.setattr(
        sampler.policy.lm, "generation_config", SimpleNamespace(eos_token_id=[7, 9])
    )
    ends = {7, 9, sampler.tokenizer.eos_token_id}
    assert set(eos_ids(sampler.policy, sampler.tokenizer).tolist()) == ends
    again = Sampler(sampler.policy, sampler.tokenizer)
    assert set(again.backend.token_sampler.eos_ids.tolist()) == ends


def test_loaded_weights_lie_in_memory_like_any_tensor(tiny, tmp_path):
    """Whichever file they come from: rounding may depend on it, and so would resuming exactly."""
    policy = load_policy(str(tiny))
    policy.save(tmp_path)
    again = load_policy(str(tiny), checkpoint=tmp_path)
    for lm in (policy.lm, again.lm, again._reference[0]):
        assert {parameter.data_ptr() % 64 for parameter in lm.parameters()} == {0}


@pytest.fixture(scope="module")
def far_below_zero(tmp_path_factory) -> str:
    """A folder with the embedded policy, but logits around −105, as the real GPT-2's are.

    Words gain 0.5 in each column and positions lose it, so the first states stay; the last states
    point away from that.
    """
    embedded, folder = ROOT / "adaptiverl/assets/policy", tmp_path_factory.mktemp("below")
    lm = load_policy(str(embedded), reference=False).lm
    with torch.no_grad():
        lm.transformer.wte.weight += 0.5
        lm.transformer.wpe.weight -= 0.5
        lm.transformer.ln_f.bias -= 105 / 0.5 / lm.config.n_embd
        assert -115 < lm(torch.tensor([[1, 2, 3]])).logits.mean() < -100
    lm.save_pretrained(folder)
    load_tokenizer(str(embedded)).save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("full", "way"),
    [
        (True, "decoder"),
        (True, "decoder as on CUDA"),
        (False, "decoder"),
        (False, "generate as on CUDA"),
    ],
)
def test_half_precision_does_not_round_logits(far_below_zero, products_of_cuda, dtype, full, way):
    """Numbers of bf16 are 0.5 apart at −105. The KL of the policy to itself stays below 0.001."""
    if "CUDA" in way:
        products_of_cuda()
    frozen = {} if full else {"compute_dtype": dtype}
    policy = load_policy(far_below_zero, full_tune=full, reference=False, **frozen)
    policy.gpt2 = way.startswith("decoder")
    sampler = Sampler(policy, load_tokenizer(far_below_zero))
    with torch.autocast("cpu", dtype):
        rollout = sampler(TEXTS[:2] * 8, uniforms(0, 1, 16, 6))
        check_policy(sampler.policy, rollout, False)
        measured = policy.logprobs(rollout)
        entropy = policy(rollout.with_weights(rollout.completion_mask.float())).entropy
    count, policy = rollout.completion_mask.sum(), policy.float()
    for other in (measured, policy.logprobs(rollout)):
        assert kl_per_token(rollout.logprobs, other, "k3").sum() / count < 3e-4
    exact = policy(rollout.with_weights(rollout.completion_mask.float())).entropy
    assert (entropy - exact).abs().sum() / count < 0.02


def test_check_holds_half_precision_against_a_pass_without_it(sampler, monkeypatch):
    forward, seen = sampler.policy.lm.forward, []
    monkeypatch.setattr(
        sampler.policy.lm,
        "forward",
        lambda **given: seen.append(torch.is_autocast_enabled("cpu")) or forward(**given),
    )
    with torch.autocast("cpu", torch.bfloat16):
        check_policy(sampler.policy, sampler(TEXTS, uniforms(0, 1, 3, 2)), False)
    assert seen == [False] * 3


def test_the_backend_is_chosen_by_name_and_by_what_the_policy_allows(sampler):
    draw = sampler.backend.token_sampler
    assert isinstance(sampler.backend, StaticCacheBackend)
    generate = choose_backend("generate", sampler.policy, draw)
    uniform = uniforms(0, 1, 3, 8)
    other = Sampler(sampler.policy, sampler.tokenizer, backend="generate")
    assert type(other.backend) is type(generate)
    assert other(TEXTS, uniform).tokens() == sampler(TEXTS, uniform).tokens()
    sharded = Policy(sampler.policy.lm, sharded=True)
    assert type(choose_backend("auto", sharded, draw)) is type(generate)
    with pytest.raises(ValueError, match="or a URL, not 'sglang'"):
        choose_backend("sglang", sampler.policy, draw)
    with pytest.raises(ValueError, match="static_cache samples from GPT-2 alone"):
        choose_backend("static_cache", sharded, draw)
