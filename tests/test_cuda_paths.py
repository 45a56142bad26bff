"""What the CUDA paths rely on, as far as a CPU can show it; docs/cuda.md lists all of it.

Leaves out what only a card can show: tests/test_gpu_*.py.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_decode import EOS, OF, PROMPTS, WithGraphs, computed, small_gpt2
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adaptiverl.optim.mini import AdamMini
from adaptiverl.optim.update import LastUpdate, alignment
from adaptiverl.rl.head import token_logprobs
from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import Rollout, uniforms
from adaptiverl.rl.sampling.decode import Decoder
from adaptiverl.rl.sampling.static_cache import StaticCacheBackend, kernels_for
from adaptiverl.rl.sampling.tokens import TokenSampler
from adaptiverl.training import state


def backend(policy: Policy) -> StaticCacheBackend:
    """One that keeps its decoder, as on CUDA; only the graphs are missing."""
    return StaticCacheBackend(policy, TokenSampler(torch.tensor([EOS]), EOS), static=True)


def sample(ways: StaticCacheBackend) -> Rollout:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[EOS] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    with torch.no_grad():
        return ways(ids, mask, torch.tensor(OF), uniforms(0, 1, len(OF), 20))


@pytest.mark.parametrize(
    ("device", "there", "compilers", "kernels"),
    [
        ("cuda", ["triton"], ["clang"], True),
        ("cuda", ["triton"], [], False),
        ("cuda", [], ["gcc"], False),
        ("cpu", ["triton"], ["gcc"], False),
    ],
)
def test_kernels_need_cuda_triton_and_its_compiler(monkeypatch, device, there, compilers, kernels):
    stand_in = SimpleNamespace(__spec__=SimpleNamespace())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setitem(sys.modules, "triton", stand_in if "triton" in there else None)
    monkeypatch.setattr("shutil.which", lambda name: name in compilers or None)
    monkeypatch.setitem(sys.modules, "adaptiverl.rl.sampling.kernels", stand_in)
    found = kernels_for.__wrapped__(torch.device(device))
    assert found is (stand_in if kernels else None)


def with_lora() -> Policy:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    policy = Policy(get_peft_model(small_gpt2(7), lora))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return policy


def moved_weights(policy: Policy) -> None:
    """Not in place: what a graph reads is then no longer what the policy has."""
    for parameter in policy.parameters():
        parameter.data = 1.3 * parameter.data


def merged(policy: Policy) -> None:
    policy.lm.merge_adapter()


def without_adapter(policy: Policy) -> None:
    policy.lm.base_model.disable_adapter_layers()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's
@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: Policy(small_gpt2(7)), moved_weights),
        (with_lora, merged),
        (with_lora, without_adapter),
    ],
)
def test_a_kept_decoder_is_replaced_where_the_policy_is_put_together_otherwise(
    make: Callable[[], Policy], change: Callable[[Policy], None]
):
    policy = make()
    kept = backend(policy)
    sample(kept)
    decoder = kept.kept
    change(policy)
    torch.testing.assert_close(sample(kept).logprobs, sample(backend(policy)).logprobs)
    assert kept.kept is not decoder, "a graph of it would replay what was"


def test_a_kept_decoder_samples_from_the_reference_within_as_reference():
    torch.manual_seed(1)
    policy = Policy(small_gpt2(7), small_gpt2(7, initializer_range=0.5))
    kept = backend(policy)
    own = sample(kept).logprobs
    with policy.as_reference():
        theirs = sample(kept).logprobs
        assert torch.equal(theirs, sample(backend(policy)).logprobs)
    assert not torch.equal(own[:, 0], theirs[:, 0])
    assert torch.equal(sample(kept).logprobs, own)


def test_a_kept_decoder_is_replaced_where_the_precision_changes():
    policy = Policy(small_gpt2(7))
    kept = backend(policy)
    own, decoder = sample(kept).logprobs, kept.kept
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sample(kept).logprobs
        assert torch.equal(rounded, sample(backend(policy)).logprobs)
    assert not torch.equal(own[:, 0], rounded[:, 0])
    assert kept.kept is not decoder, "a graph of it would replay the other precision"


def test_a_step_in_place_keeps_the_decoder():
    """Or graphs would be captured at each step of a run."""
    policy = Policy(small_gpt2(7))
    kept = backend(policy)
    sample(kept)
    decoder = kept.kept
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.3)
    torch.testing.assert_close(sample(kept).logprobs, sample(backend(policy)).logprobs)
    assert kept.kept is decoder


@pytest.mark.parametrize(("rows", "first"), [(8, 8), (5, 8), (4, 4), (3, 4), (1, 1)])
def test_fewer_completions_than_there_is_room_for_begin_in_a_smaller_graph(rows, first):
    lm = small_gpt2(7)
    how = TokenSampler(torch.tensor([EOS]), EOS)
    decoder = Decoder(lm.transformer, lm.lm_head, how, rows=8, length=20, width=30, static=True)
    prompts = torch.tensor([[1, 2]]), torch.ones(1, 2).long(), torch.zeros(rows).long()
    with computed(lm) as shapes:
        decoder(*prompts, uniforms(0, 1, rows, 20))
    assert shapes[1] == (first, 1)


def test_nothing_that_a_graph_reads_or_writes_is_allocated_anew():
    """From the warm-up on, whatever the sizes of the calls: graphs have the addresses."""
    lm = small_gpt2(300)
    how = TokenSampler(torch.tensor([EOS]), EOS)
    decoder = WithGraphs(lm.transformer, lm.lm_head, how, rows=8, length=20, width=30)

    def addresses() -> list[int]:
        held = [x for x in vars(decoder).values() if isinstance(x, Tensor)]
        held += [decoder.projection.buffer, decoder.projection.weight]
        return [x.data_ptr() for x in (*held, *(slots.held for slots in decoder.caches))]

    before = addresses()
    assert len(before) > 10 and 0 not in before
    for rows, length, prompt in ((8, 20, 2), (3, 17, 1), (8, 20, 10)):
        prompts = torch.ones(1, prompt).long(), torch.ones(1, prompt).long()
        decoder(*prompts, torch.zeros(rows).long(), uniforms(0, 1, rows, length))
        assert addresses() == before


class Names(TorchDispatchMode):
    """The names of the operations within this."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_many_tokens_that_end_a_completion_are_compared_not_sorted():
    """`isin` sorts where there are ten or more, and then a CUDA device is waited for."""
    lm = small_gpt2(300)
    how = TokenSampler(torch.arange(20), EOS)
    decoder = Decoder(lm.transformer, lm.lm_head, how, rows=4, length=8, width=16, static=True)
    prompts = torch.tensor([[100, 200]]), torch.ones(1, 2).long(), torch.zeros(4).long()
    rollout = decoder(*prompts, uniforms(0, 1, 4, 8))
    assert torch.equal(rollout.completion_mask.bool(), how.live(rollout.completion_ids))
    decoder.time.fill_(1), decoder.column.fill_(2)
    with torch.inference_mode(), Names() as names:
        decoder._step(4)
    assert "isin" not in names.seen and "ne" in names.seen


def test_the_entropy_of_a_head_with_a_bias_is_not_rounded_by_autocast(monkeypatch):
    """On CUDA autocast rounds what `mv` is given, and what it gives."""
    mv = torch.mv
    monkeypatch.setattr(torch, "mv", lambda a, b: mv(a.bfloat16(), b.bfloat16()))
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    with torch.no_grad():
        head.bias.normal_(100.3, 2.0)
    hidden, chosen = torch.randn(6, 8), torch.randint(50, (6,))
    _, _, entropy = token_logprobs(hidden, head, chosen, torch.ones(6))
    table = head(hidden).log_softmax(-1)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1), rtol=1e-3, atol=1e-3)


def test_the_direction_of_a_fused_step_is_known_without_fetching_its_number(monkeypatch):
    """torch keeps it on the device where AdamW is fused, a number for each of the tensors."""
    weights = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(5)]
    optimizer = torch.optim.AdamW(weights, lr=0.1, fused=True)
    for _ in range(2):
        for p in weights:
            p.grad = torch.randn_like(p)
        optimizer.step()
    update, fetched = LastUpdate(optimizer), []
    for name in ("__float__", "item", "tolist"):
        method = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda x, name=name, method=method: fetched.append(name) or method(x)
        )
    assert alignment(optimizer) is not None
    optimizer.step()
    update.rescale(0.5)
    assert fetched == ["tolist"], "the three sums of the alignment, together"


def file_behind(x: Tensor) -> str:
    """What /proc says of the memory that `x` is in; "" where that is no file's."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5) if line.count(" ") > 5 else (line.split()[0], "")
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= x.data_ptr() < high:
            return name.strip()
    raise AssertionError("it is in no memory")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_restored_optimizer_keeps_nothing_in_the_checkpoints_file(tmp_path):
    """On CUDA the file is mapped. Its moments go to the device, its numbers of steps do not."""
    weights = [torch.nn.Parameter(torch.ones(3))]
    optimizer = AdamMini(weights)
    weights[0].grad = torch.ones(3)
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "trainer.pt")
    loaded = SimpleNamespace(state_dict=dict, load_state_dict=optimizer.load_state_dict)
    state.restore(tmp_path, {"optimizer": loaded}, mapped=True)
    own = optimizer.state[weights[0]]
    assert own["step"] == 1
    assert "trainer.pt" not in file_behind(own["step"])
    assert "trainer.pt" in file_behind(own["exp_avg"]), "which here, on a CPU, nothing copies"
