"""Log-probabilities in chunks against whole logits: values, gradients, and what is never held."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaptiverl.rl.head import CHUNK, plain_logprobs, token_logprobs


class Largest(TorchDispatchMode):
    """The most elements that any result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, tuple | list) else [result]:
            if isinstance(out, Tensor):
                self.elements = max(self.elements, out.numel())
        return result


def problem(words: int, tokens: int, bias: bool) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(words + tokens)
    head = nn.Linear(24, words, bias=bias)
    with torch.no_grad():
        head.weight.mul_(6)
    hidden = torch.randn(tokens, 24, requires_grad=True)
    return hidden, head, torch.randint(words, (tokens,)), torch.randn(tokens)


def whole(hidden: Tensor, head: nn.Linear, tokens: Tensor, temperature: float):
    """The obvious way: all logits, in double precision."""
    bias = None if head.bias is None else head.bias.double()
    logits = nn.functional.linear(hidden.double(), head.weight.double(), bias) / temperature
    table = logits.log_softmax(-1)
    return table.gather(-1, tokens[:, None])[:, 0], -(table.exp() * table).sum(-1)


@pytest.mark.parametrize("tokens", [1, CHUNK, 2 * CHUNK + 17])
@pytest.mark.parametrize("words", [2, 255, 1003])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_those_of_whole_logits(words, tokens, bias, temperature):
    hidden, head, chosen, weights = problem(words, tokens, bias)
    score, logprobs, entropy = token_logprobs(hidden, head, chosen, weights, temperature)
    assert not logprobs.requires_grad and not entropy.requires_grad
    trained = [hidden, *head.parameters()]
    ours = torch.autograd.grad(-3 * score, trained)

    exact, exact_entropy = whole(hidden, head, chosen, temperature)
    exact_score = (weights.double() * exact).sum()
    theirs = torch.autograd.grad(-3 * exact_score, trained, retain_graph=True)
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(score.double(), exact_score, rtol=1e-4, atol=1e-3)
    for own, other in zip(ours, theirs, strict=True):
        scale = max(1, other.abs().max().item())  # rounding is relative to what was added up
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5 * scale)

    free, free_entropy = token_logprobs(hidden, head, chosen, None, temperature)[1:]
    assert torch.equal(free, logprobs) and torch.equal(free_entropy, entropy)
    assert free.requires_grad and not free_entropy.requires_grad
    loss, exact_loss = ((weights * values.exp() ** 0.1).sum() for values in (free, exact))
    ours = torch.autograd.grad(loss, trained)
    theirs = torch.autograd.grad(exact_loss, trained)
    for own, other in zip(ours, theirs, strict=True):
        scale = max(1, other.abs().max().item())
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5 * scale)
    plain = plain_logprobs(hidden, head, chosen, temperature)
    torch.testing.assert_close(plain, logprobs, rtol=0, atol=1e-6)
    assert not plain.requires_grad


def by_weights(hidden: Tensor, head: nn.Linear, chosen: Tensor, weights: Tensor) -> Tensor:
    return token_logprobs(hidden, head, chosen, weights)[0]


def by_logprobs(hidden: Tensor, head: nn.Linear, chosen: Tensor, weights: Tensor) -> Tensor:
    return (weights * token_logprobs(hidden, head, chosen)[1]).sum()


@pytest.mark.parametrize("score", [by_weights, by_logprobs])
def test_a_frozen_head_gets_no_gradient_and_hidden_states_the_same(score):
    hidden, head, chosen, weights = problem(300, 40, True)
    free = torch.autograd.grad(score(hidden, head, chosen, weights), hidden)
    head.requires_grad_(False)
    score(hidden, head, chosen, weights).backward()
    assert torch.equal(hidden.grad, free[0])
    assert head.weight.grad is None and head.bias.grad is None


def test_a_token_of_probability_zero_has_its_logprob_and_no_nan():
    """e^-200 is 0 in float32; its logarithm must not come from there."""
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [-200.0]]))
    hidden = torch.ones(1, 1, requires_grad=True)
    score, logprobs, entropy = token_logprobs(hidden, head, torch.tensor([1]), torch.ones(1))
    score.backward()
    assert (logprobs.item(), entropy.item()) == (-200.0, 0.0)
    assert hidden.grad.item() == -200.0
    assert head.weight.grad.tolist() == [[-1.0], [1.0]]


@pytest.mark.parametrize("score", [by_weights, by_logprobs])
def test_the_logits_of_all_tokens_are_never_held(score):
    words, tokens = 5000, 4 * CHUNK
    hidden, head, chosen, weights = problem(words, tokens, False)
    with Largest() as seen:
        score(hidden, head, chosen, weights).backward()
        plain_logprobs(hidden, head, chosen)
    assert seen.elements == words * CHUNK


def test_a_second_backward_pass_is_refused():
    hidden, head, chosen, weights = problem(50, 10, False)
    score = token_logprobs(hidden, head, chosen, weights)[0]
    score.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        score.backward()


def test_a_weight_that_changes_between_the_passes_is_refused():
    """Backward would compute other logits again than those of the forward pass."""
    hidden, head, chosen, weights = problem(50, 10, False)
    score = by_logprobs(hidden, head, chosen, weights)
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        score.backward()


def test_autocast_does_not_round_logits():
    hidden, head, chosen, weights = problem(1003, 400, True)
    with torch.autocast("cpu", torch.bfloat16):
        _, logprobs, entropy = token_logprobs(hidden, head, chosen, weights)
        _, free, _ = token_logprobs(hidden, head, chosen)
    assert torch.equal(free, logprobs)
    exact, exact_entropy = whole(hidden, head, chosen, 1.0)
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_on_cuda_autocast_rounds_what_is_multiplied_and_no_result(products_of_cuda, temperature):
    """What all words have in common, logits of 100 here, has no effect on gradient and entropy."""
    products_of_cuda()
    hidden, head, chosen, weights = problem(1003, 400, True)
    with torch.no_grad():
        head.weight.add_(1)
        hidden.add_(4)
        head.weight.copy_(head.weight.bfloat16())
        hidden.copy_((hidden / temperature).bfloat16().float() * temperature)
    with torch.autocast("cpu", torch.bfloat16):
        score, logprobs, entropy = token_logprobs(hidden, head, chosen, weights, temperature)
    score.backward()
    assert (logprobs.dtype, entropy.dtype, head.weight.grad.dtype) == (torch.float32,) * 3
    exact, exact_entropy = whole(hidden, head, chosen, temperature)
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=0.01)
    ours, hidden.grad = hidden.grad, None
    of_head, head.weight.grad = head.weight.grad, None
    (weights * exact).sum().backward()
    for own, right in ((ours, hidden.grad), (of_head, head.weight.grad)):
        torch.testing.assert_close(own, right, rtol=0, atol=0.01 * right.abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        free, _ = token_logprobs(hidden, head, chosen, None, temperature)[1:]
    (again,) = torch.autograd.grad((weights * free).sum(), hidden)  # after autocast has ended
    assert torch.equal(free, logprobs)
    torch.testing.assert_close(again, ours, rtol=1e-6, atol=1e-6)
