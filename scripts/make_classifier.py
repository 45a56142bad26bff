"""Trains the embedded sentiment classifier: a tiny ModernBERT on spans of film reviews.

    python scripts/make_classifier.py FOLDER_OR_imdb [--out adaptiverl/assets/sentiment]

The policy is rewarded on a few dozen tokens, so the classifier learns on random spans of 12 to
256 tokens that carry their review's label. Trains on train, keeps the best epoch on val, reports
test, on whole reviews and on 32-token spans; weights are stored in fp16.
"""

import argparse
import math
import random
import time
from pathlib import Path

import reviews
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

PAD, UNK = "<pad>", "<unk>"
WHOLE = 512  # tokens of a review that are read


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer(lowercase=True)
    bpe.train_from_iterator(texts, vocab_size, min_frequency=2, special_tokens=[PAD, UNK])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=WHOLE,
        model_input_names=["input_ids", "attention_mask"],
    )


def batch(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < lengths).long()}


def span(row: list[int], length: int, rng: random.Random) -> list[int]:
    start = rng.randint(0, max(0, len(row) - length))
    return row[start : start + length]


@torch.no_grad()
def accuracy(model, rows: list[list[int]], labels: list[int]) -> float:
    """Share of right answers; rows are sorted by length so that little is padding."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    right = 0
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        guess = model(**batch([rows[i] for i in part])).logits.argmax(-1)
        right += (guess == torch.tensor([labels[i] for i in part])).sum().item()
    model.train()
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--out", default="adaptiverl/assets/sentiment", type=Path)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    data = {split: reviews.load(args.data, split) for split in ("train", "val", "test")}
    tokenizer = make_tokenizer(data["train"][0], args.vocab)
    tokenizer.save_pretrained(args.out)
    ids = {split: tokenizer(texts)["input_ids"] for split, (texts, _) in data.items()}
    whole = {split: [row[:WHOLE] for row in rows] for split, rows in ids.items()}
    spans = {split: [span(row, 32, rng) for row in rows] for split, rows in ids.items()}

    model = ModernBertForSequenceClassification(
        ModernBertConfig(
            vocab_size=args.vocab,
            hidden_size=args.width,
            intermediate_size=2 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            max_position_embeddings=WHOLE,
            global_attn_every_n_layers=1,
            classifier_pooling="mean",
            embedding_dropout=0.3,
            mlp_dropout=0.1,
            classifier_dropout=0.3,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            cls_token_id=None,
            sep_token_id=None,
            id2label={0: "negative", 1: "positive"},
            label2id={"negative": 0, "positive": 1},
        )
    )
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    rows, labels = ids["train"], data["train"][1]
    steps = args.epochs * (len(rows) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    best, start = 0.0, time.time()
    for epoch in range(args.epochs):
        order = rng.sample(range(len(rows)), len(rows))
        for first in range(0, len(order) - 63, 64):
            part = order[first : first + 64]
            length = round(math.exp(rng.uniform(math.log(12), math.log(256))))
            inputs = batch([span(rows[i], length, rng) for i in part])
            dropped = torch.rand(inputs["input_ids"].shape) < 0.1  # no word decides alone
            inputs["input_ids"] = inputs["input_ids"].masked_fill(dropped, 1)
            loss = F.cross_entropy(model(**inputs).logits, torch.tensor([labels[i] for i in part]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        scores = [accuracy(model, kind["val"], data["val"][1]) for kind in (whole, spans)]
        print(f"epoch {epoch} loss {loss:.3f} val {scores} {time.time() - start:.0f} s", flush=True)
        if sum(scores) > best:
            best = sum(scores)
            kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    model.load_state_dict(kept)
    model.half().save_pretrained(args.out)
    model.float()  # what is reported is what is stored
    for name, kind in (("whole reviews", whole), ("32-token spans", spans)):
        for split in ("val", "test"):
            print(f"{split}, {name}: {accuracy(model, kind[split], data[split][1]):.4f}")


if __name__ == "__main__":
    main()
