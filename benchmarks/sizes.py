"""What the benchmarks of speed run: models and work, and the least time a machine could take."""

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
)

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Size:
    """A GPT-2 and the work of one step; its completions are groups of `group` on one prompt."""

    name: str
    layers: int
    width: int
    heads: int
    vocab: int
    batch: int = 64
    tokens: int = 32
    prompt: int = 16
    group: int = 4
    positions: int = 256
    device: str = "cpu"
    bf16: bool = False

    @property
    def prompts(self) -> int:
        return self.batch // self.group

    @property
    def weights(self) -> int:
        return 12 * self.layers * self.width**2 + self.vocab * self.width

    @property
    def precision(self) -> int:
        """Bytes of a number."""
        return 2 if self.bf16 else 4

    def __str__(self) -> str:
        kind = f"{'bf16' if self.bf16 else 'fp32'}, {'CPU' if self.device == 'cpu' else 'GPU'}"
        return (
            f"{self.name} ({self.layers} × {self.width}, V = {self.vocab:,}): {self.batch} "
            f"completions of {self.tokens} tokens, {self.group} a prompt of {self.prompt}; {kind}"
        )


def sizes(device: str) -> dict[str, Size]:
    gpt2 = Size("gpt2", 12, 768, 12, 50257, positions=1024)
    if device == "cuda":
        gpt2 = replace(gpt2, batch=64, tokens=64, prompt=64)
    embedded, wide = Size("embedded", 4, 192, 4, 4096), Size("4x128", 4, 128, 4, 50257)
    found = [embedded, wide, gpt2]
    if device == "cpu":
        return {size.name: size for size in (*found, replace(gpt2, name="gpt2-bf16", bf16=True))}
    return {size.name: replace(size, device=device, bf16=True) for size in found}


@dataclass(frozen=True)
class Machine:
    flops: float  # a second, in a large matrix product
    bandwidth: float  # bytes a second, read by a large sum


def floor(size: Size, machine: Machine) -> dict[str, float]:
    """Seconds of a step at the machine's peak, each distinct prompt computed once.

    A token takes 24 L D² FLOPs in the layers' weights, 4 L D for each position it attends to, and
    2 V D where its logits are needed. Sampling is the prompts' FLOPs, then for each further token
    these FLOPs or the reading of weights and cache, whichever takes longer. The reference is the
    same FLOPs at once; the update is three times these, forward and two products backward; what
    the optimizer reads and writes is left out.

    With L = D = V = 1, a prompt of 1 and 2 tokens sampled: the prompt is 24 + 4 + 2 = 30, the
    first token 24 + 4·2 + 2 = 34; it reads (12 + 1) weights and 2·2 keys and values, 17 numbers.

    >>> from math import inf
    >>> tiny = Size("tiny", 1, 1, 1, vocab=1, batch=1, tokens=2, prompt=1, group=1)
    >>> floor(tiny, Machine(flops=1, bandwidth=inf))
    {'rollout': 64.0, 'reference': 64.0, 'update': 192.0, 'step': 320.0}
    >>> floor(tiny, Machine(flops=inf, bandwidth=1))["rollout"]
    68.0
    """
    layers, attention = 24 * size.layers * size.width**2, 4 * size.layers * size.width
    head = 2 * size.vocab * size.width
    prompt = size.prompt * layers + attention * size.prompt * (size.prompt + 1) / 2 + head
    prefill = size.prompts * prompt / machine.flops
    products, rollout = prefill, prefill
    for fed in range(1, size.tokens):  # the last token sampled is fed to nothing
        flops = size.batch * (layers + head + attention * (size.prompt + fed))
        cached = size.prompts * size.prompt + size.batch * fed
        read = size.precision * (size.weights + 2 * size.layers * size.width * cached)
        products += flops / machine.flops
        rollout += max(flops / machine.flops, read / machine.bandwidth)
    parts = {"rollout": rollout, "reference": products, "update": 3 * products}
    return parts | {"step": sum(parts.values())}


def memory_estimate(size: Size) -> int:
    """Bytes over the loaded models: fp32 gradients and AdamW's two moments; activations.

    Activations are what backward reads in each layer, 12 D a token: the inputs of two layer norms
    and three products (5 D), q, k, v (3 D) and GELU's input (4 D), of which its output follows.
    Logits are left out, as they can be formed in pieces; so is the cache, 2 D a token and gone by
    then.
    """
    tokens = size.prompts * size.prompt + size.batch * size.tokens
    return 3 * 4 * size.weights + 12 * size.layers * size.width * tokens * size.precision


def measure(device: str, bf16: bool) -> Machine:
    side, length = (2048, 2**26) if device == "cpu" else (8192, 2**30)
    dtype = torch.bfloat16 if bf16 else torch.float32
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    numbers = torch.ones(length, device=device)
    return Machine(
        flops=2 * side**3 / fastest(lambda: matrix @ matrix, device),
        bandwidth=4 * length / fastest(numbers.sum, device),
    )


def fastest(action: Callable[[], object], device: str) -> float:
    seconds = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def build(size: Size, gpt2_tokenizer: Path, folder: Path) -> None:
    """Writes into `folder` what its workers read: model, prompts.json and size.json."""
    if size.name == "embedded":
        source = ROOT / "adaptiverl" / "assets" / "policy"
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
    else:
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=size.layers,
            n_embd=size.width,
            n_head=size.heads,
            n_positions=size.positions,
            vocab_size=size.vocab,
            bos_token_id=size.vocab - 1,
            eos_token_id=size.vocab - 1,
        )
        model, tokenizer = GPT2LMHeadModel(config).eval(), smaller(gpt2_tokenizer, size.vocab)
    prompts = random_prompts(tokenizer, size.prompt)
    with torch.no_grad():
        logits = model(torch.tensor(tokenizer(prompts[:16]).input_ids)).logits
    end = int(logits.mean((0, 1)).argmin())  # so that completions hardly ever end early
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "prompts.json").write_text(json.dumps([{"prompt": prompt} for prompt in prompts]))
    (folder / "size.json").write_text(json.dumps(asdict(size)))


def smaller(folder: Path, vocab: int) -> PreTrainedTokenizerBase:
    """GPT-2's tokenizer with its first merges only: `vocab` tokens in all."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines[: vocab - 257]]  # 256 bytes and one special
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    kept = {token: i for token, i in ids.items() if i < vocab - 1} | {"<|endoftext|>": vocab - 1}
    return GPT2Tokenizer(vocab=kept, merges=merges)


def random_prompts(tokenizer: PreTrainedTokenizerBase, length: int, count: int = 256) -> list[str]:
    """Texts of exactly `length` tokens, each of them a word."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    words = [" " + token[1:] for token in tokens if re.fullmatch("Ġ[a-z]{2,}", token)]
    words = [word for word in words if len(tokenizer(word).input_ids) == 1]
    chance = random.Random(0)
    prompts = ["".join(chance.choices(words, k=length)) for _ in range(count)]
    assert all(len(ids) == length for ids in tokenizer(prompts).input_ids)
    return prompts
