"""Three ways to sample, one distribution: exact probabilities, equal tokens, no wasted work."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from adaptiverl.rl.gpt2 import Cache, gelu, read_prompts
from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import Rollout, uniforms
from adaptiverl.rl.sampling.decode import Decoder
from adaptiverl.rl.sampling.generate import GenerateBackend
from adaptiverl.rl.sampling.graphs import Recorder, side_stream
from adaptiverl.rl.sampling.tokens import TokenSampler

EOS = 3
WAYS = ["generate", "decoder", "static"]


def small_gpt2(words: int, **config) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_positions": 96, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=words, **(sizes | config))).eval()


def tokens(**settings) -> TokenSampler:
    return TokenSampler(torch.tensor([EOS]), EOS, **settings)


def sampled(
    way: str | Decoder,
    lm,
    how: TokenSampler,
    prompts: list[list[int]],
    of: list[int],
    uniform: Tensor,
    **options,
) -> Rollout:
    """Completions of `prompts`, prompt of[i] for row i, by one of the ways, or a kept decoder.

    `options` are further ones of `Decoder`.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[EOS] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    inputs = ids, mask, torch.tensor(of), uniform
    if isinstance(way, Decoder):
        return way(*inputs)
    if way == "generate":
        return GenerateBackend(SimpleNamespace(base=lm, sharded=False), how)(*inputs)
    rows, length = uniform.shape
    sizes = {"rows": rows, "length": length, "width": width + length} | options
    if way == "static":
        sizes |= {"width": width + length + 5, "static": True}
    return Decoder(lm.transformer, lm.lm_head, how, **sizes)(*inputs)


PROMPTS, OF = [[0, 1, 2, 4, 1], [2], [4, 4]], [0, 0, 1, 2, 2, 2, 0, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("way", WAYS)
def test_completions_follow_their_exact_probabilities(way, temperature):
    """Chi-square over all completions of at most three of five words, for two prompts at once.

    The exact probabilities come from the library's model, one unpadded completion at a time.
    """
    lm, how, n = small_gpt2(5), tokens(temperature=temperature), 12_000
    prompts = PROMPTS[:2]
    rollout = sampled(way, lm, how, prompts, [0] * n + [1] * n, uniforms(0, 1, 2 * n, 3))
    counts = [Counter(map(tuple, part)) for part in (rollout.tokens()[:n], rollout.tokens()[n:])]
    others = [word for word in range(5) if word != EOS]
    possible = [(*head, EOS) for size in (0, 1) for head in product(others, repeat=size)]
    possible += [(*head, last) for head in product(others, repeat=2) for last in range(5)]
    for prompt, count in zip(prompts, counts, strict=True):
        assert set(count) <= set(possible)
        statistic, passed = 0.0, 0.0
        for completion in possible:
            ids = torch.tensor([[*prompt, *completion]])
            with torch.no_grad():
                table = (lm(ids).logits[0, len(prompt) - 1 :] / temperature).log_softmax(-1)
            logprob = sum(table[t, word].item() for t, word in enumerate(completion))
            expected = n * torch.tensor(logprob).exp().item()
            passed += expected
            statistic += (count[completion] - expected) ** 2 / expected
        assert passed == pytest.approx(n)
        assert statistic < 129.0, "the 99.9 % point of chi-square with 84 degrees of freedom"


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 0.5}])
@pytest.mark.parametrize("seed", range(5))
def test_all_ways_write_the_same(seed, settings):
    """EOS is one word of seven, so completions end at all times and slots move."""
    lm, uniform = small_gpt2(7, initializer_range=0.2), uniforms(seed, 1, len(OF), 40)
    theirs, *ours = (sampled(way, lm, tokens(**settings), PROMPTS, OF, uniform) for way in WAYS)
    assert len(set(map(len, theirs.tokens()))) > 1
    for own in ours:
        assert own.tokens() == theirs.tokens()
        assert torch.equal(own.completion_ids, theirs.completion_ids), "padding too"
        assert torch.equal(own.completion_mask, theirs.completion_mask)
        torch.testing.assert_close(own.logprobs, theirs.logprobs, rtol=0, atol=1e-5)


@contextmanager
def computed(lm) -> Iterator[list[tuple[int, int]]]:
    """The shapes [B, N] of the token ids that the model reads within this."""
    seen: list[tuple[int, int]] = []
    handle = lm.transformer.wte.register_forward_hook(
        lambda module, given, result: seen.append(tuple(given[0].shape))
    )
    yield seen
    handle.remove()


def test_ended_completions_are_not_computed():
    lm, uniform = small_gpt2(7), uniforms(1, 1, len(OF), 40)
    rows = {}
    for way, round_to in (("decoder", 1), ("decoder", 2), ("static", 8)):
        with computed(lm) as shapes:
            again = sampled(way, lm, tokens(), PROMPTS, OF, uniform, round_to=round_to)
        # With room for 10 columns, which is less than 64
        assert shapes[0] == ((4, 10) if way == "static" else (3, 5)), "the prompts"
        assert {length for _, length in shapes[1:]} == {1}
        rows[way, round_to] = [size for size, _ in shapes[1:]]
        if round_to == 1:
            rollout = again
        assert again.tokens() == rollout.tokens()
    lengths = rollout.completion_mask.sum(-1)
    going_on = [int((lengths > t).sum()) for t in range(1, 40)]
    assert rows["decoder", 1] == [n for n in going_on if n]
    assert rows["decoder", 2] == [n + n % 2 for n in going_on if n]
    seen = rows["static", 8]
    assert seen[:15] == [8] * 15 and seen[15] < 8, "a look every 16 tokens"
    assert all(size in (8, 4, 2, 1) for size in seen)


def test_sampling_stops_when_every_completion_has_ended():
    lm = small_gpt2(7)
    with torch.no_grad():
        lm.transformer.ln_f.bias.copy_(50 * lm.lm_head.weight[EOS])  # EOS is certain
    with computed(lm) as shapes:
        rollout = sampled("decoder", lm, tokens(), PROMPTS, OF, uniforms(0, 1, 8, 40))
    assert rollout.tokens() == [[EOS]] * 8
    assert shapes == [(3, 5)], "the prompts alone"


class Forbid(TorchDispatchMode):
    """Fails on what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}
        return func(*args, **(kwargs or {}))


def test_a_static_step_never_waits_for_the_device():
    lm = small_gpt2(300)
    decoder = Decoder(lm.transformer, lm.lm_head, tokens(), rows=4, length=8, width=16, static=True)
    decoder(
        torch.tensor([[1, 2]]), torch.ones(1, 2).long(), torch.zeros(4).long(), uniforms(0, 1, 4, 8)
    )
    decoder.time.fill_(1), decoder.column.fill_(2)
    with torch.inference_mode(), Forbid():
        decoder._step(4)
    with pytest.raises(AssertionError), Forbid():
        decoder.live.sum().item()


class NewStorages(TorchDispatchMode):
    """Sizes of the results that lie in memory not seen before."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, object] = {}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, tuple | list) else [result]:
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in self.seen:
                self.seen[out.untyped_storage().data_ptr()] = out  # kept, or its place is reused
                self.sizes.append(out.numel())
        return result


def test_one_buffer_serves_all_tokens():
    """After the first token, no tensor of the size of the vocabulary is made."""
    words, rows = 4000, 8
    lm = small_gpt2(words)
    decoder = Decoder(lm.transformer, lm.lm_head, tokens(), rows=rows, length=8, width=16)
    prompts = torch.tensor([[1, 2]]), torch.ones(1, 2).long(), torch.zeros(rows).long()
    decoder(*prompts, uniforms(0, 1, rows, 8))
    decoder.time.fill_(1), decoder.column.fill_(2)
    with torch.inference_mode(), NewStorages() as new:
        new.seen = {x.untyped_storage().data_ptr(): x for x in (decoder.projection.buffer,)}
        known = [*lm.parameters(), *(slots.held for slots in decoder.caches)]
        new.seen |= {x.untyped_storage().data_ptr(): x for x in known}
        decoder._step(rows, 4)
    assert new.sizes and max(new.sizes) < words


def others() -> list:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    usual = {"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}
    gemma = Gemma2Config(**sizes, **heads, **usual, final_logit_softcapping=2.0, sliding_window=8)
    llama = LlamaConfig(**sizes, **heads, **usual)
    gptj = GPTJConfig(vocab_size=40, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=96)
    gptj.initializer_range = 0.3
    return [(Gemma2ForCausalLM, gemma), (LlamaForCausalLM, llama), (GPTJForCausalLM, gptj)]


@pytest.mark.parametrize(
    ("cls", "config"), others(), ids=lambda value: getattr(value, "__name__", "")
)
def test_other_models_are_sampled_and_measured_like_their_unpadded_selves(cls, config):
    torch.manual_seed(0)
    lm = cls(config).eval()
    # What the model would like to do in `generate` is not what REINFORCE is told was done.
    lm.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, top_k=2)
    policy = Policy(lm, temperature=0.8)
    assert (policy.gpt2, policy.plain_head) == (False, cls is not Gemma2ForCausalLM)
    how = tokens(temperature=0.8)
    rollout = sampled("generate", lm, how, PROMPTS, OF, uniforms(0, 1, len(OF), 20))
    assert lm.generation_config.repetition_penalty == 5.0
    check_against_library(policy, rollout)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's
@pytest.mark.parametrize("adapter", [False, True])
def test_gpt2_is_measured_like_its_unpadded_self(adapter):
    policy = Policy(small_gpt2(7))
    if adapter:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
        policy = Policy(get_peft_model(policy.lm, lora))
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    assert policy.gpt2 and policy.plain_head
    rollout = sampled("decoder", policy.base, tokens(), PROMPTS, OF, uniforms(0, 1, len(OF), 20))
    check_against_library(policy, rollout)


@pytest.mark.parametrize("padded", [True, False])
def test_backward_keeps_no_queries_keys_and_values_of_all_tokens(padded):
    """They are 3 D numbers per token; what is needed of them is copied, or the rest stays, too."""
    policy = Policy(small_gpt2(7))
    rollout = sampled("decoder", policy.base, tokens(), PROMPTS, OF, uniforms(0, 1, len(OF), 20))
    rows, length = rollout.completion_ids.shape
    if not padded:
        rollout.completion_mask = torch.ones_like(rollout.completion_mask)
    places, kept = rollout.prompt_ids.numel() + rows * (length - 1), set()
    needed = int(rollout.prompt_mask.sum() + rollout.completion_mask[:, 1:].sum())
    assert (needed < 0.9 * places) is padded
    with saved_tensors_hooks(lambda x: kept.add(x.untyped_storage().nbytes()) or x, lambda x: x):
        policy(rollout)
    width = 4 * policy.base.config.n_embd
    every = needed if padded else places
    assert {every * width, 4 * every * width} <= kept, "of layer norm, and of GELU"
    assert not {3 * every * width, 3 * places * width} & kept


def test_gelu_is_torchs():
    x = torch.cat([torch.linspace(-12, 12, 10_001), torch.tensor([0.0, 1e-30, 1e4, -1e4, 1e20])])
    want = torch.nn.functional.gelu(x, approximate="tanh")
    with torch.no_grad():
        torch.testing.assert_close(gelu(x), want, rtol=1e-6, atol=1e-6)


def test_backward_keeps_gelus_input_and_makes_its_output_again(monkeypatch):
    lm, kept = small_gpt2(7), []
    init = saved_tensors_hooks.__init__

    def seen(self, pack, unpack):
        init(self, lambda x: kept.append(pack(x)) or kept[-1], unpack)

    monkeypatch.setattr(saved_tensors_hooks, "__init__", seen)
    ids = torch.ones(3, 5, dtype=torch.long)
    wide = ids.numel() * 4 * lm.config.n_embd
    with saved_tensors_hooks(lambda x: x, lambda x: x):
        caches = [Cache() for _ in lm.transformer.h]
        states = read_prompts(lm.transformer, ids, torch.ones_like(ids), caches)
    assert [isinstance(x, Tensor) and x.numel() for x in kept].count(wide) == lm.config.n_layer
    weight = lm.transformer.h[0].mlp.c_proj.weight
    (ours,) = torch.autograd.grad((states**2).sum(), weight)
    (theirs,) = torch.autograd.grad((lm.transformer(ids).last_hidden_state ** 2).sum(), weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def check_against_library(policy: Policy, rollout: Rollout) -> None:
    """Sampled and measured log-probabilities, entropy and gradients against the obvious way."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    weights = torch.randn(rollout.completion_mask.shape) * rollout.completion_mask
    fused, free = policy(rollout.with_weights(weights)), policy(rollout)
    assert not fused.logprobs.requires_grad and free.score is None
    assert not fused.entropy.requires_grad and not free.entropy.requires_grad
    measured = policy.logprobs(rollout)
    total, losses = torch.zeros(()), torch.zeros(())
    for row, completion in enumerate(rollout.tokens()):
        prompt = PROMPTS[OF[row]]
        logits = policy.lm(input_ids=torch.tensor([[*prompt, *completion]])).logits
        table = (logits[0, len(prompt) - 1 : -1] / policy.temperature).log_softmax(-1)
        n = len(completion)
        exact = table.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        for own in (rollout.logprobs, measured, fused.logprobs, free.logprobs):
            torch.testing.assert_close(own[row, :n], exact, rtol=1e-4, atol=1e-4)
            assert not own[row, n:].any()
        spread = -(table.exp() * table).sum(-1)
        for own in (fused.entropy, free.entropy):
            torch.testing.assert_close(own[row, :n], spread, rtol=1e-4, atol=1e-4)
            assert not own[row, n:].any()
        total = total + (weights[row, :n] * exact).sum()
        losses = losses + clipped(exact, rollout.logprobs[row, :n] - 0.1, weights[row, :n]).sum()
    torch.testing.assert_close(fused.score, total, rtol=1e-4, atol=1e-3)
    gradients_agree(trained, fused.score, total)
    # A loss that is no sum of known weights: its gradient goes through `logprobs`.
    loss = (clipped(free.logprobs, rollout.logprobs - 0.1, weights) * rollout.completion_mask).sum()
    torch.testing.assert_close(loss, losses, rtol=1e-4, atol=1e-3)
    gradients_agree(trained, loss, losses)


def clipped(logprobs: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """The clipped objective of PPO per token; at a ratio of e^0.1 about half are clipped."""
    ratio = (logprobs - old.detach()).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)


def gradients_agree(trained: list, ours: Tensor, theirs: Tensor) -> None:
    own = torch.autograd.grad(ours, trained)
    exact = torch.autograd.grad(theirs, trained, retain_graph=True)
    assert any(gradient.any() for gradient in exact)
    for one, other in zip(own, exact, strict=True):
        scale = max(1e-3, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale)


def test_under_autocast_sampling_and_measuring_agree_and_weights_stay_fp32():
    lm = small_gpt2(7)
    with torch.autocast("cpu", torch.bfloat16):
        first = sampled("decoder", lm, tokens(), PROMPTS, OF, uniforms(0, 1, len(OF), 20))
        policy = Policy(lm)
        gap = (policy.logprobs(first) - first.logprobs).abs()
    assert gap.max() < 0.1
    assert lm.transformer.h[0].mlp.c_fc.weight.dtype == torch.float32


def test_a_kept_decoder_samples_from_the_weights_as_they_are():
    """As on CUDA, where it is kept from step to step; under autocast its copies must follow."""
    lm, inputs = small_gpt2(7), SimpleNamespace()
    inputs.prompts = torch.tensor([[1, 2]]), torch.ones(1, 2).long(), torch.zeros(4).long()
    with torch.autocast("cpu", torch.bfloat16):
        kept = Decoder(lm.transformer, lm.lm_head, tokens(), rows=4, length=8, width=16)
        before = kept(*inputs.prompts, uniforms(0, 1, 4, 8))
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.mul_(1.3)
        after = kept(*inputs.prompts, uniforms(0, 1, 4, 8))
        fresh = Decoder(lm.transformer, lm.lm_head, tokens(), rows=4, length=8, width=16)
        assert torch.equal(after.logprobs, fresh(*inputs.prompts, uniforms(0, 1, 4, 8)).logprobs)
    assert not torch.equal(before.logprobs, after.logprobs)


class StandIn(Recorder):
    """What stands for a graph computes again, from the same tensors."""

    def _captured(self, action):
        action()  # the warm-up
        return SimpleNamespace(replay=action)


class WithGraphs(Decoder):
    """Takes each step, and the prompts, from a graph, as on CUDA."""

    def __init__(self, *given, **options) -> None:
        super().__init__(*given, **options, static=True)
        self.recorder = StandIn(self.row.device)
        if self.sizes:
            with torch.no_grad():
                self._capture_steps()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_warm_up_of_a_graph_stays_within_the_buffers(length):
    """On CUDA an index beyond them ends the process. The model has no position to spare."""
    lm = small_gpt2(7, n_positions=1 + length)
    sizes = {"rows": 8, "length": length, "width": 1 + length}
    decoder = WithGraphs(lm.transformer, lm.lm_head, tokens(), **sizes)
    prompts = torch.tensor([[1]]), torch.ones(1, 1).long(), torch.zeros(8).long()
    uniform = uniforms(0, 1, 8, length)
    theirs = sampled("generate", lm, tokens(), [[1]], [0] * 8, uniform)
    assert decoder(*prompts, uniform).tokens() == theirs.tokens()


def test_prompts_are_read_by_one_graph_for_each_rounded_shape():
    """A graph reads its own buffers: the prompts of this call, not of the one that it is from."""
    lm = small_gpt2(7, n_positions=256, initializer_range=0.2)
    sizes = {"rows": 64, "length": 20, "width": 212}
    decoder = WithGraphs(lm.transformer, lm.lm_head, tokens(), **sizes)
    calls = [
        (2, 3, (8, 64)),  # prompts, columns, their shape in a graph
        (9, 64, (16, 64)),
        (8, 5, (8, 64)),
        (30, 65, (32, 128)),
        (31, 128, (32, 128)),
        (33, 130, None),  # 64 × 192, too many for a graph
        (2, 192, (8, 192)),
        (3, 2, (8, 64)),
    ]
    for seed, (size, columns, _) in enumerate(calls):
        prompts = torch.randint(3, (size, columns), generator=torch.manual_seed(seed)).tolist()
        prompts[0] = prompts[0][: columns // 2 + 1]
        of, uniform = [row % size for row in range(33)], uniforms(seed, 1, 33, 20)
        own, theirs = (
            sampled(way, lm, tokens(), prompts, of, uniform) for way in (decoder, "generate")
        )
        assert own.tokens() == theirs.tokens()
        torch.testing.assert_close(own.logprobs, theirs.logprobs, rtol=0, atol=1e-5)
    assert list(decoder.prompt_graphs) == list(dict.fromkeys(s for *_, s in calls if s))


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_other_threads_may_use_the_device_while_a_graph_is_captured(monkeypatch):
    """CUDA's calls are recorded here, not made. All graphs share one pool of memory."""
    lm, modes = small_gpt2(7), []
    decoder = Decoder(lm.transformer, lm.lm_head, tokens(), rows=8, length=8, width=9, static=True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: MagicMock())
    side, graph = MagicMock(), MagicMock()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: side)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda g, **how: modes.append(how) or nullcontext())
    decoder._capture_steps()
    prompts = torch.tensor([[1]]), torch.ones(1, 1).long(), torch.zeros(8).long()
    decoder(*prompts, uniforms(0, 1, 8, 8))
    side_stream.cache_clear()
    mode = {"stream": side, "capture_error_mode": "thread_local"}
    assert modes == [mode | {"pool": None}] + [mode | {"pool": graph.pool()}] * 4
    assert sorted(decoder.graphs) == [1, 2, 4, 8] and list(decoder.prompt_graphs) == [(1, 1)]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_kept_decoder_completes_fewer_and_shorter_than_there_is_room_for(rows):
    lm = small_gpt2(7, initializer_range=0.2)
    decoder = Decoder(
        lm.transformer, lm.lm_head, tokens(), rows=8, length=40, width=60, static=True
    )
    full, ids, mask = uniforms(3, 1, 8, 40), torch.tensor([[1, 2]]), torch.ones(1, 2).long()
    for uniform in (full, full[:rows, :30], full):
        n = len(uniform)
        rollout = decoder(ids, mask, torch.zeros(n).long(), uniform)
        theirs = sampled("decoder", lm, tokens(), [[1, 2]], [0] * n, uniform)
        assert rollout.tokens() == theirs.tokens() and len(rollout) == n
        assert torch.equal(rollout.completion_mask, theirs.completion_mask)
        torch.testing.assert_close(rollout.logprobs, theirs.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.6}])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_show_in_the_log_probabilities_and_stop_no_device(
    way, settings, broken
):
    """300 words: more than a block of words, less than two."""
    lm = small_gpt2(300)
    with torch.no_grad():
        lm.transformer.ln_f.bias.fill_(broken)
    rollout = sampled(way, lm, tokens(**settings), PROMPTS, OF, uniforms(0, 1, len(OF), 4))
    assert rollout.logprobs[:, 0].isnan().all()
    assert rollout.completion_ids.min() >= 0 and rollout.completion_ids.max() < 300


def test_a_special_head_makes_no_logits_of_prompts():
    """Gemma2 caps its logits, so its own code makes them."""
    torch.manual_seed(0)
    (cls, config), *_ = others()
    policy, shapes = Policy(cls(config).eval()), []
    rollout = sampled("generate", policy.lm, tokens(), PROMPTS, OF, uniforms(0, 1, len(OF), 6))
    handle = policy.lm.lm_head.register_forward_hook(lambda *given: shapes.append(given[2].shape))
    policy.logprobs(rollout)
    handle.remove()
    rows, length = rollout.completion_ids.shape
    assert shapes == [(rows, length + 1, 40)]
