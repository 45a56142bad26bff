"""The embedded policy, classifier, prompts and config: standard, small, and as good as they say."""

import gzip
import json
import math
import sys

import pytest
import torch
from conftest import ROOT
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from adaptiverl.config.loading import load_config
from adaptiverl.training.keys import RunConfig

ASSETS = ROOT / "adaptiverl" / "assets"
REVIEWS = ROOT.parent / "shared" / "data" / "imdb" / "val.jsonl.gz"
needs_reviews = pytest.mark.skipif(not REVIEWS.exists(), reason="needs the IMDB reviews")


@pytest.fixture(scope="module")
def policy():
    folder = ASSETS / "policy"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def reviews(count: int) -> list[dict]:
    """Held-out reviews, evenly spread, cleaned as the scripts do."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from reviews import clean

    with gzip.open(REVIEWS, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row | {"text": clean(row["text"])} for row in rows[:: len(rows) // count]]


def test_assets_fit_in_16_mb_and_are_safetensors():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


def test_policy_is_a_gpt2_of_one_to_four_million_weights(policy):
    model, tokenizer = policy
    assert model.config.model_type == "gpt2"
    assert 1e6 <= model.num_parameters() <= 4e6
    assert len(tokenizer) == model.config.vocab_size
    text = "Größe & naïve: “quotes” — 3½ stars!\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text, "byte-level: any text survives"


@pytest.mark.parametrize("folder", [ASSETS / "policy", ROOT / "benchmarks" / "policy-small"])
def test_a_policy_is_loaded_in_fp32_by_default(folder):
    """Trained in the type of its file, as by HF Trainer, fp16 weights become NaN."""
    for weight in AutoModelForCausalLM.from_pretrained(folder).parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weight.half().float()), "not the weights that were published"


@needs_reviews
def test_policy_predicts_held_out_reviews_as_well_as_its_readme_says(policy):
    model, tokenizer = policy
    total = count = 0.0
    for row in reviews(40):
        ids = torch.tensor([tokenizer(row["text"]).input_ids[:256]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert total / count < 4.5, f"perplexity {math.exp(total / count):.0f}"


@needs_reviews
def test_classifier_is_right_on_whole_reviews_and_on_spans():
    folder = ASSETS / "sentiment"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    positive = model.config.label2id["positive"]
    right = {512: 0, 32: 0}
    rows = reviews(200)
    for row in rows:
        for length in right:
            ids = torch.tensor([tokenizer(row["text"]).input_ids[:length]])
            with torch.no_grad():
                says = model(ids).logits.argmax().item() == positive
            right[length] += says == (row["label"] == "pos")
    assert right[512] / len(rows) > 0.8
    assert right[32] / len(rows) > 0.62


def test_prompts_are_all_different_and_fit(policy):
    _, tokenizer = policy
    rows = json.loads((ROOT / "data.json").read_text(encoding="utf-8"))
    config = load_config(ROOT / "config.json", schema=RunConfig)
    prompts = [row["prompt"] for row in rows]
    assert len(set(prompts)) == len(prompts) >= config.BATCH_SIZE
    assert all(row["reference"] for row in rows)
    longest = max(len(tokenizer(prompt).input_ids) for prompt in prompts)
    assert longest + config.MAX_NEW_TOKENS <= 256
