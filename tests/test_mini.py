"""AdamMini: one second moment per tensor."""

import io

import pytest
import torch

from adaptiverl import AdamMini


def reference(p, gradients, lr, beta1, beta2, eps, decay):
    """The formula of the docstring, a number at a time."""
    m, v, p = [0.0] * len(p), 0.0, list(p)
    for t, g in enumerate(gradients, 1):
        v = beta2 * v + (1 - beta2) * sum(x * x for x in g) / len(g)
        m = [beta1 * a + (1 - beta1) * x for a, x in zip(m, g, strict=True)]
        size = (v / (1 - beta2**t)) ** 0.5 + eps
        p = [a - lr * (b / (1 - beta1**t) / size + decay * a) for a, b in zip(p, m, strict=True)]
    return p


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_follows_its_formula(decay):
    chance = torch.Generator().manual_seed(0)
    start = torch.randn(3, 2, generator=chance, dtype=torch.float64)
    gradients = [torch.randn(3, 2, generator=chance, dtype=torch.float64) for _ in range(9)]
    p = torch.nn.Parameter(start.clone())
    optimizer = AdamMini([p], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=decay)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    flat = [gradient.flatten().tolist() for gradient in gradients]
    expected = reference(start.flatten().tolist(), flat, 0.1, 0.8, 0.95, 1e-3, decay)
    assert p.detach().flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_the_size_of_a_complex_tensor_is_that_of_its_numbers():
    """Numbers on the real axis move as real ones do, and a turned gradient turns the step."""
    gradients = [torch.tensor([3.0, -4.0]), torch.tensor([1.0, 2.0])]
    real = torch.nn.Parameter(torch.zeros(2))
    turned = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    for p, turn in ((real, 1), (turned, 1j)):
        optimizer = AdamMini([p], lr=0.1)
        for gradient in gradients:
            p.grad = gradient * turn
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        assert not optimizer.state[p]["exp_avg_sq"].is_complex()
    torch.testing.assert_close(turned.detach(), real.detach() * 1j)


def test_sparse_gradients_are_refused():
    net = torch.nn.Embedding(4, 2, sparse=True)
    net(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="AdamMini does not support sparse gradients"):
        AdamMini(net.parameters()).step()


def test_a_tensor_of_one_number_is_adamw():
    ours, theirs = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    mini = AdamMini([ours], lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for k in range(20):
        ours.grad, theirs.grad = torch.tensor([k - 7.0]), torch.tensor([k - 7.0])
        mini.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs)


def test_the_direction_within_a_tensor_is_that_of_its_gradient_and_its_length_is_not():
    one, other = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    one.grad, other.grad = torch.tensor([3e-6, 4e-6]), torch.tensor([30.0, 40.0])
    AdamMini([one, other], lr=1.0, eps=0.0, weight_decay=0.0).step()
    expected = -torch.tensor([3.0, 4.0]) / (25 / 2) ** 0.5
    torch.testing.assert_close(one.detach(), expected)
    torch.testing.assert_close(other.detach(), expected)


def test_it_goes_on_from_a_file_bit_for_bit():
    def made():
        p = torch.nn.Parameter(torch.ones(4))
        return p, AdamMini([p], lr=0.1)

    def step(p, optimizer, k):
        p.grad = torch.arange(4.0) - k
        optimizer.step()

    (p, whole), file = made(), io.BytesIO()
    for k in range(6):
        if k == 3:
            torch.save((p.detach(), whole.state_dict()), file)
        step(p, whole, k)
    q, resumed = made()
    file.seek(0)
    weight, state = torch.load(file, weights_only=True)
    q.data.copy_(weight)
    resumed.load_state_dict(state)
    for k in range(3, 6):
        step(q, resumed, k)
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0; it must be in"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"betas": (1.0, 0.9)}, r"betas are \(1.0, 0.9\); they must be two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas are \(0.9,\); they must be two numbers"),
        ({"betas": 0.9}, r"betas are 0.9; they must be two numbers"),
        ({"betas": ("a", 0.9)}, r"betas are \('a', 0.9\); they must be two numbers"),
        ({"lr": "x"}, r"lr is 'x'; it must be in \[0, inf\)"),
        ({"lr": float("inf")}, r"lr is inf; it must be in \[0, inf\)"),
        ({"eps": None}, "eps is None; it must be in"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdamMini([torch.nn.Parameter(torch.ones(1))], **arguments)


def test_the_state_of_adamw_is_refused():
    p = torch.nn.Parameter(torch.ones(4, 2))
    adamw = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    adamw.step()
    with pytest.raises(ValueError, match=r"no state of AdamMini: an exp_avg_sq has the shape \[4"):
        AdamMini([p]).load_state_dict(adamw.state_dict())
