"""Tests the mathematics of REINFORCE against plain loops, hand derivations and exact gradients."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaptiverl.rl import reinforce
from adaptiverl.rl.reinforce import BASELINES, adapt_kl_coef, kl_per_token, token_weights

NAN = math.nan
property_test = settings(deadline=None, derandomize=True, database=None, max_examples=100)

# Multiples of 1/8: equal rewards differ from their mean by exactly 0.
eighths = st.integers(-80, 80).map(lambda n: n / 8)
maybe_missing = st.one_of(eighths, eighths, st.just(NAN))


@st.composite
def batches(draw) -> tuple[list[float], int]:
    """Rewards, some missing, and the number of completions of each prompt."""
    group_size = draw(st.integers(1, 4))
    size = group_size * draw(st.integers(1, 4))
    return draw(st.lists(maybe_missing, min_size=size, max_size=size)), group_size


def advantages(*arguments, **options) -> Tensor:
    """Without the weights."""
    return reinforce.advantages(*arguments, **options)[0]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def slow_advantages(
    rewards: list[float], baseline: str, group_size: int, ema: float | None, normalize: bool
) -> list[float]:
    """What `advantages` says it computes, one completion at a time."""
    present = [i for i in range(len(rewards)) if not math.isnan(rewards[i])]
    result = [0.0] * len(rewards)
    for i in present:
        if baseline == "none":
            base = 0.0
        elif baseline == "ema" and ema is not None:
            base = ema
        elif baseline == "rloo":
            others = [
                rewards[j]
                for j in present
                if j != i and (group_size == 1 or j // group_size == i // group_size)
            ]
            base = mean(others) if others else rewards[i]
        else:
            base = mean([rewards[j] for j in present])
        result[i] = rewards[i] - base
    if normalize and present:
        size = math.sqrt(mean([result[i] ** 2 for i in present]))
        result = [value / (size + 1e-4) for value in result]
    return result


def reinforce_loss(logprobs: Tensor, *arguments, **options) -> Tensor:
    """What training differentiates: weights known beforehand, times log-probabilities."""
    return -(token_weights(logprobs.detach(), *arguments, **options) * logprobs).sum()


def slow_loss(
    logprobs: Tensor,
    mask: list[list[int]],
    advantage: list[float],
    reference: list[list[float]] | None,
    kl_coef: float,
    estimator: str,
) -> Tensor:
    """−A log π and the penalty written out, one token at a time: autograd finds its gradient."""
    total = torch.zeros((), dtype=logprobs.dtype)
    for i in range(len(logprobs)):
        for t in range(len(logprobs[i])):
            if not mask[i][t]:
                continue
            total = total - advantage[i] * logprobs[i][t]
            if reference is not None and estimator == "k3":
                log_ratio = reference[i][t] - logprobs[i][t]
                total = total + kl_coef * (log_ratio.exp() - 1 - log_ratio)
    return total / len(logprobs)


# Against plain loops


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("baseline", "ema"),
    [("none", None), ("ema", None), ("ema", 0.625), ("batch", None), ("rloo", None)],
)
@property_test
@given(batch=batches())
def test_advantages_equal_a_plain_loop(batch, baseline, ema, normalize):
    rewards, group_size = batch
    ours = advantages(
        torch.tensor(rewards, dtype=torch.float64),
        baseline,
        group_size=group_size,
        ema=ema,
        normalize=normalize,
    )
    slow = slow_advantages(rewards, baseline, group_size, ema, normalize)
    assert ours.tolist() == pytest.approx(slow, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("with_reference", [False, True])
@property_test
@given(data=st.data())
def test_weights_are_the_gradient_of_a_plain_loop(data, estimator, with_reference):
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))

    def matrix(values: st.SearchStrategy) -> list[list]:
        row = st.lists(values, min_size=length, max_size=length)
        return data.draw(st.lists(row, min_size=rows, max_size=rows))

    logprobs = torch.tensor(matrix(st.floats(-4, 0)), dtype=torch.float64, requires_grad=True)
    reference = matrix(st.floats(-4, 0)) if with_reference else None
    mask = matrix(st.integers(0, 1))
    advantage = data.draw(st.lists(st.floats(-9, 9), min_size=rows, max_size=rows))
    kl_coef = data.draw(st.floats(0, 2))
    ours = token_weights(
        logprobs.detach(),
        torch.tensor(mask),
        torch.tensor(advantage, dtype=torch.float64),
        reference=torch.tensor(reference, dtype=torch.float64) if with_reference else None,
        kl_coef=kl_coef,
        estimator=estimator,
    )
    slow = slow_loss(logprobs, mask, advantage, reference, kl_coef, estimator)
    if slow.requires_grad:
        (gradient,) = torch.autograd.grad(slow, logprobs)
    else:  # everything is masked
        gradient = torch.zeros_like(logprobs)
    torch.testing.assert_close(ours, -gradient, rtol=1e-9, atol=1e-9)


# Rewards with nothing to compare


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("baseline", BASELINES)
def test_all_missing_rewards_give_zeros(baseline, normalize):
    result = advantages(torch.full((4,), NAN), baseline, group_size=2, ema=0.5, normalize=normalize)
    assert result.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("normalize", [False, True])
def test_the_only_present_reward_of_a_group_gives_zero(normalize):
    rewards = torch.tensor([7.0, NAN, NAN, 1.0, 3.0, NAN])
    result = advantages(rewards, "rloo", group_size=3, normalize=normalize)
    # 1 − 3 and 3 − 1; the deviation of 0, −2, 2 over the three present is √(8/3)
    scale = math.sqrt(8 / 3) + 1e-4 if normalize else 1.0
    assert result.tolist() == pytest.approx([0, 0, 0, -2 / scale, 2 / scale, 0], abs=1e-6)


@pytest.mark.parametrize("baseline", ["batch", "rloo"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_single_completion_gives_zero(baseline, normalize):
    assert advantages(torch.tensor([3.0]), baseline, normalize=normalize).tolist() == [0]


@pytest.mark.parametrize("group_size", [1, 2, 3])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 3.3, 100.1])
@pytest.mark.parametrize("baseline", ["ema", "batch", "rloo"])
@pytest.mark.parametrize("normalize", [False, True])
def test_equal_rewards_give_exactly_zero(baseline, reward, group_size, normalize):
    """In float32, as in training, where the mean of equal numbers may differ from them."""
    rewards = torch.full((12,), reward)
    options = {"group_size": group_size, "normalize": normalize}
    assert advantages(rewards, baseline, **options).tolist() == [0.0] * 12
    rewards[::4] = NAN
    assert advantages(rewards, baseline, **options).tolist() == [0.0] * 12


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_missing_reward_changes_nothing_for_others(baseline, normalize):
    """As if its completion had not been sampled."""
    arguments = {"ema": 0.5, "normalize": normalize}
    without = advantages(torch.tensor([1.0, 2.0, 4.0]), baseline, **arguments)
    given_missing = advantages(torch.tensor([1.0, NAN, 2.0, 4.0]), baseline, **arguments)
    assert given_missing[1] == 0
    torch.testing.assert_close(given_missing[[0, 2, 3]], without)


@pytest.mark.parametrize(
    ("rewards", "group_size", "share"),
    [
        ([1.0, 1.0, 0.0, 0.5], 2, 0.5),
        ([1.0, 1.0, 0.0, 0.0], 2, 1.0),
        ([1.0, 1.0, 0.0, 0.0], 1, 0.0),
        ([0.1, 0.1, 0.1], 1, 1.0),
        ([NAN, 1.0, NAN, NAN], 2, 1.0),
        ([NAN, 1.0, 1.0, NAN, 1.0, 2.0], 3, 0.5),
        ([1e30, -1e30], 2, 0.0),
    ],
)
def test_the_share_of_prompts_without_a_difference(rewards, group_size, share):
    assert reinforce.zero_std_share(torch.tensor(rewards), group_size) == share


@pytest.mark.parametrize(
    ("rewards", "baseline", "group_size", "compared", "informative"),
    [
        ([1.0, 1.0, 0.0, 0.0], "rloo", 2, True, False),
        ([1.0, 1.0, 0.0, 0.0], "batch", 2, True, True),
        ([1.0, NAN, NAN, 0.0], "rloo", 2, False, False),
        ([1.0, NAN, NAN, 0.0], "batch", 2, True, True),
        ([1.0, NAN, NAN, NAN], "batch", 2, False, False),
        ([1.0, 1.0], "none", 2, True, False),
        ([1.0], "none", 1, False, True),  # one completion per step: steps differ
        ([1.0], "ema", 1, False, True),
        ([NAN], "ema", 1, False, False),
        ([NAN, 2.0, NAN], "none", 1, False, True),
    ],
)
def test_what_rewards_can_teach(rewards, baseline, group_size, compared, informative):
    given = torch.tensor(rewards), baseline, group_size
    assert reinforce.are_compared(*given) == compared
    assert reinforce.is_informative(*given) == informative


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=f"one of {', '.join(BASELINES)}, not 'unheard of'"):
        advantages(torch.zeros(2), "unheard of")
    with pytest.raises(ValueError, match="not 'k2'"):
        kl_per_token(torch.zeros(2), torch.zeros(2), "k2")


# By hand, on a vocabulary of three tokens
#
# One prompt, p = softmax(z) = (1/2, 1/4, 1/4); the completions are the tokens a = 0, 1, 2, one
# each, with rewards 3, 0, 0. The loss is −1/3 Σ_a A_a log p_a, and ∂ log p_a / ∂z = onehot(a) − p,
# so its gradient is −1/3 Σ_a A_a (onehot(a) − p).
#   rloo: A = (3 − 0, 0 − 3/2, 0 − 3/2) sums to 0, p drops out: −1/3 (3, −3/2, −3/2).
#   none: A = (3, 0, 0): −1/3 · 3 · (1 − 1/2, −1/4, −1/4).
#   normalized rloo: the deviation of (3, −3/2, −3/2) is √((9 + 9/4 + 9/4) / 3) = 3/√2, so the
#   gradient is √2/3 (−1, 1/2, 1/2); 1e-4 / (3/√2), which is also added, is below 5e-5 of it.


@pytest.mark.parametrize(
    ("baseline", "normalize", "gradient"),
    [
        ("rloo", False, [-1.0, 0.5, 0.5]),
        ("none", False, [-0.5, 0.25, 0.25]),
        ("rloo", True, [-math.sqrt(2) / 3, math.sqrt(2) / 6, math.sqrt(2) / 6]),
    ],
)
def test_gradient_on_three_tokens_by_hand(baseline, normalize, gradient):
    logits = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64).log().requires_grad_()
    logprobs = logits.log_softmax(-1)[[0, 1, 2], None]
    rewards = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    advantage = advantages(rewards, baseline, group_size=3, normalize=normalize)
    reinforce_loss(logprobs, torch.ones(3, 1), advantage).backward()
    assert logits.grad.tolist() == pytest.approx(gradient, rel=5e-5)


def test_gradient_of_k3_by_hand():
    """With p as above, ref = (1/4, 1/2, 1/4), advantage 0, token 0, kl_coef 2.

    d k3 / d log p = 1 − ref/p = 1 − (1/4)/(1/2) = 1/2: the gradient is 2 · 1/2 (onehot(0) − p).
    """
    logits = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64).log().requires_grad_()
    reinforce_loss(
        logits.log_softmax(-1)[None, :1],
        torch.ones(1, 1),
        torch.zeros(1, dtype=torch.float64),
        reference=torch.tensor([[0.25]], dtype=torch.float64).log(),
        kl_coef=2.0,
        estimator="k3",
    ).backward()
    assert logits.grad.tolist() == pytest.approx([0.5, -0.25, -0.25], abs=1e-12)


# Unbiasedness: all completions of one or two of three tokens, of which 2 ends a completion

COMPLETIONS = [(2,), *product((0, 1), (0, 1, 2))]
MASK = torch.tensor([[1, len(y) - 1] for y in COMPLETIONS])
KL_COEF = 0.7


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def all_logprobs(logits: Tensor) -> Tensor:
    """[7, 2]: log-probability of each token of each completion; row 0 of `logits` [3, 3] is for
    the first token, row 1 + a for what follows the token a."""
    table = logits.log_softmax(-1)
    rows = [
        [table[0, y[0]], table[1 + y[0], y[1]] if y[1:] else table.new_zeros(())]
        for y in COMPLETIONS
    ]
    return torch.stack([torch.stack(row) for row in rows])


REWARDS = drawn(1, len(COMPLETIONS))
REFERENCE = all_logprobs(drawn(2, 3, 3))


def policy() -> Tensor:
    return drawn(3, 3, 3).requires_grad_()


def exact_gradient(kl_coef: float) -> Tensor:
    """Of E[R] − kl_coef · KL(π ‖ ref), by autograd on the sums over all completions."""
    logits = policy()
    whole = all_logprobs(logits).sum(-1)
    kl = (whole.exp() * (whole - REFERENCE.sum(-1))).sum()
    objective = (whole.exp() * REWARDS).sum() - kl_coef * kl
    return torch.autograd.grad(objective, logits)[0]


def penalised(logprobs: Tensor, estimator: str, kl_coef: float = KL_COEF) -> Tensor:
    """What is passed as reward: R − kl_coef Σₜ KLₜ, of each completion."""
    kl = kl_per_token(logprobs.detach(), REFERENCE, estimator)
    return REWARDS - kl_coef * (kl * MASK).sum(-1)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF])
def test_expected_gradient_is_exact(estimator, kl_coef):
    logits = policy()
    logprobs = all_logprobs(logits)
    probability = logprobs.detach().sum(-1).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    advantage = advantages(penalised(logprobs, estimator, kl_coef), "none")
    expected = sum(
        probability[i]
        * reinforce_loss(
            logprobs[i : i + 1],
            MASK[i : i + 1],
            advantage[i : i + 1],
            reference=REFERENCE[i : i + 1],
            kl_coef=kl_coef,
            estimator=estimator,
        )
        for i in range(len(COMPLETIONS))
    )
    gradient = -torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(gradient, exact_gradient(kl_coef), rtol=1e-10, atol=1e-12)


def expected_gradient_of_pairs(estimator: str, baseline: str, group_size: int) -> Tensor:
    """Of the loss of two independent completions, over all pairs."""
    logits = policy()
    logprobs = all_logprobs(logits)
    probability = logprobs.detach().sum(-1).exp()
    rewards = penalised(logprobs, estimator)
    expected = torch.zeros((), dtype=torch.float64)
    for i, j in product(range(len(COMPLETIONS)), repeat=2):
        loss = reinforce_loss(
            logprobs[[i, j]],
            MASK[[i, j]],
            advantages(rewards[[i, j]], baseline, group_size=group_size),
            reference=REFERENCE[[i, j]],
            kl_coef=KL_COEF,
            estimator=estimator,
        )
        expected = expected + probability[i] * probability[j] * loss
    return -torch.autograd.grad(expected, logits)[0]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("group_size", [1, 2])
def test_leave_one_out_leaves_the_expected_gradient(estimator, group_size):
    gradient = expected_gradient_of_pairs(estimator, "rloo", group_size)
    torch.testing.assert_close(gradient, exact_gradient(KL_COEF), rtol=1e-10, atol=1e-12)


def test_batch_mean_halves_the_expected_gradient_of_pairs():
    """Its bias: the baseline holds half of the completion's own reward."""
    gradient = expected_gradient_of_pairs("k1", "batch", 1)
    torch.testing.assert_close(gradient, exact_gradient(KL_COEF) / 2, rtol=1e-10, atol=1e-12)


# KL


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("seed", range(5))
def test_kl_per_token_is_unbiased(estimator, seed):
    ours, reference = drawn(seed, 50).log_softmax(-1), drawn(seed + 100, 50).log_softmax(-1)
    exact = sum(
        math.exp(p) * (p - q) for p, q in zip(ours.tolist(), reference.tolist(), strict=True)
    )
    estimate = (ours.exp() * kl_per_token(ours, reference, estimator)).sum().item()
    assert estimate == pytest.approx(exact, rel=1e-9)


@property_test
@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3_is_never_negative(logprob, reference):
    """Beyond float32's rounding of 1."""
    assert kl_per_token(torch.tensor(logprob), torch.tensor(reference), "k3") >= -1e-7


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_is_zero_at_equality(estimator):
    logprobs = -drawn(4, 3, 5).abs()
    assert kl_per_token(logprobs, logprobs.clone(), estimator).abs().max() == 0


def test_kl_values_by_hand():
    """π = 1/2, ref = 1/4: k1 = log 2, k3 = 1/2 − 1 + log 2."""
    ours, reference = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    assert kl_per_token(ours, reference).item() == pytest.approx(math.log(2))
    assert kl_per_token(ours, reference, "k3").item() == pytest.approx(math.log(2) - 0.5)


# Masks


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_masked_tokens_do_not_matter(estimator):
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    reference = -drawn(5, 3, 4).abs()
    logprobs = -drawn(6, 3, 4).abs()

    def loss_and_gradient(values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        values = values.clone().requires_grad_()
        loss = reinforce_loss(
            values, mask, drawn(7, 3), reference=targets, kl_coef=0.5, estimator=estimator
        )
        return loss.detach(), torch.autograd.grad(loss, values)[0]

    loss, gradient = loss_and_gradient(logprobs, reference)
    noise = 5 * drawn(8, 3, 4) * (1 - mask)
    other_loss, other_gradient = loss_and_gradient(logprobs + noise, reference - noise.abs())
    assert loss == other_loss
    assert torch.equal(gradient, other_gradient)
    assert torch.equal(gradient == 0, mask == 0)


# The KL coefficient


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (0.0, 0.9), (3.0, 0.95), (9.0, 1.05), (12.0, 1.1), (600.0, 1.1), (-600.0, 0.9)],
)
def test_adapt_kl_coef_golden_values(kl, factor):
    assert adapt_kl_coef(0.05, kl, target=6.0) == pytest.approx(0.05 * factor, rel=1e-12)


@property_test
@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(0.01, 20))
def test_adapt_kl_coef_is_monotone(one, other, target):
    low, high = sorted((one, other))
    assert adapt_kl_coef(0.05, low, target) <= adapt_kl_coef(0.05, high, target)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("baseline", ["none", "batch", "rloo"])
def test_normalizing_scales_the_whole_gradient_and_turns_none_of_it(baseline, estimator):
    """Reward and KL alike: four completions of two tokens, one reward missing."""
    torch.manual_seed(0)
    start = torch.randn(4, 2) - 2
    reference, rewards = start + 0.5 * torch.randn(4, 2), torch.tensor([1.0, 3.0, NAN, 0.5])
    gradients, weights = [], []
    for normalize in (False, True):
        logprobs = start.clone().requires_grad_()
        penalty = 0.3 * kl_per_token(start, reference, estimator).sum(-1)
        advantage, weight = reinforce.advantages(rewards - penalty, baseline, normalize=normalize)
        loss = reinforce_loss(
            logprobs,
            torch.ones(4, 2),
            advantage,
            reference=reference,
            kl_coef=0.3 * weight,
            estimator=estimator,
        )
        loss.backward()
        gradients.append(logprobs.grad)
        weights.append(weight)
    assert weights[0].tolist() == [1, 1, 0, 1]
    assert torch.allclose(gradients[1], gradients[0] * weights[1][0])
    assert gradients[1][2].tolist() == [0, 0], "a missing reward moves nothing, KL included"
