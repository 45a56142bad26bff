"""Pre-trains the embedded policy: a byte-level BPE and a tiny GPT-2 on film reviews.

    python scripts/make_policy.py FOLDER_OR_imdb [--out adaptiverl/assets/policy]

Muon for the matrices inside the blocks, AdamW for the rest, a rate that stays flat and falls
over the last 40 %. Trains on train, watches val, reports test; weights are rounded to fp16
and stored in fp32, so that whoever loads them can train them.
Leaves out what a larger model would need: several devices, resuming, dropout.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import reviews
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

EOS = "<|endoftext|>"
PROMPTS = (
    "This movie",
    "I watched this film because",
    "The acting",
    "My wife and I",
    "The story is about",
    "I was expecting",
    "The director",
    "The first half of the film",
    "I have to say",
    "One of the",
)


def make_tokenizer(texts: list[str], vocab_size: int) -> GPT2TokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, min_frequency=2, special_tokens=[EOS])
    return GPT2TokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=EOS, eos_token=EOS, unk_token=EOS
    )


def pack(tokenizer: GPT2TokenizerFast, texts: list[str]) -> Tensor:
    """All reviews in one stream of ids, each followed by the end-of-text id."""
    rows = tokenizer(texts)["input_ids"]
    stream = np.concatenate([np.array([*row, tokenizer.eos_token_id]) for row in rows])
    return torch.from_numpy(stream)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps (Jordan et al. 2024).

    torch.optim.Muon takes those steps in bf16, which a CPU without bf16 units emulates: 3.4 s
    a step for this model instead of 0.1 s.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(buffer, group["momentum"])  # Nesterov
                tall = x.shape[0] > x.shape[1]
                x = x.T if tall else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.T if tall else x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x, alpha=-group["lr"] * max(1, p.shape[1] / p.shape[0]) ** 0.5)


def loss_of(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1]).logits  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, stream: Tensor, context: int, windows: int) -> float:
    """Mean nats per token over non-overlapping windows spread evenly over the stream."""
    starts = torch.linspace(0, len(stream) - context - 2, windows).long()
    model.eval()
    losses = [loss_of(model, rows(stream, part, context)).item() for part in starts.split(16)]
    model.train()
    return sum(losses) / len(losses)


def rows(stream: Tensor, starts: Tensor, context: int) -> Tensor:
    return stream[starts[:, None] + torch.arange(context + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--out", default="adaptiverl/assets/policy", type=Path)
    parser.add_argument("--tokens", type=float, default=10e6, help="tokens to train on")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    train_texts, _ = reviews.load(args.data, "train")
    tokenizer = make_tokenizer(train_texts, args.vocab)
    tokenizer.save_pretrained(args.out)
    streams = {"train": pack(tokenizer, train_texts)}
    streams |= {s: pack(tokenizer, reviews.load(args.data, s)[0]) for s in ("val", "test")}
    print({name: f"{len(stream) / 1e6:.2f} M tokens" for name, stream in streams.items()})

    config = GPT2Config(
        vocab_size=args.vocab,
        n_positions=args.context,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.width // 48,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        Muon(matrices, lr=2e-2, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]

    steps = int(args.tokens / (args.batch * args.context))
    flat = int(steps * 0.6)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda t: min(1.0, (t + 1) / 100, (steps - t) / (steps - flat))
        )
        for o in optimizers
    ]
    start = time.time()
    for step in range(steps):
        starts = torch.randint(0, len(streams["train"]) - args.context - 1, (args.batch,))
        for part in starts.split(4):  # small pieces: their logits stay in memory already mapped
            loss = loss_of(model, rows(streams["train"], part, args.context))
            (loss * len(part) / args.batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 20 == 0:
            print(f"{step}/{steps} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
        if step % 400 == 399:
            print(f"val {evaluate(model, streams['val'], args.context, 256):.4f}", flush=True)

    for split in ("val", "test"):
        nats = evaluate(model, streams[split], args.context, 2048)
        print(f"{split}: {nats:.4f} nats per token, perplexity {math.exp(nats):.1f}")
    sample(model, tokenizer)
    model.half().float().save_pretrained(args.out)  # the weights that were published


def sample(model: GPT2LMHeadModel, tokenizer: GPT2TokenizerFast) -> None:
    model.eval()
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=48,
            do_sample=True,
            temperature=0.7,
            top_k=0,
            pad_token_id=tokenizer.eos_token_id,
        )
        print("-", tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
