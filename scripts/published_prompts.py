"""Writes the prompts of configs/published/: beginnings of the texts of a data set.

    python -m scripts.published_prompts stanfordnlp/imdb lvwerra/gpt2-imdb 2 8 prompts.jsonl

The data set and the tokenizer come from the hub, or from a file and a folder.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from adaptiverl.rl.data import load_prompts
from adaptiverl.training.hub import go_offline_without_it

LEAST = 200  # characters of a text, as in TRL's notebook


def prompts(
    texts: Iterable[str], tokenizer: Any, low: int, high: int, half: bool = False
) -> Iterator[str]:
    """The first `low` to `high` tokens of each long text, a number drawn for each.

    With `half` the last tokens of its first half of words instead, as in RL4LMs.
    """
    draw = random.Random(0)
    for text in texts:
        if len(text) > LEAST:
            words = text.split(" ")
            ids = tokenizer.encode(" ".join(words[: len(words) // 2]) if half else text)
            size = draw.randint(low, high)
            yield tokenizer.decode(ids[-size:] if half else ids[:size])


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the prompts of configs/published/.")
    parser.add_argument("source", help="data set of the hub, or .json, .jsonl, .csv, .parquet file")
    parser.add_argument("tokenizer", help="model of the hub, or folder")
    parser.add_argument("low", type=int, help="fewest tokens of a prompt")
    parser.add_argument("high", type=int, help="most tokens of a prompt")
    parser.add_argument("output", type=Path, help="file to write, .jsonl")
    parser.add_argument("--column", default="text", help="that holds the texts")
    parser.add_argument("--rows", type=int, help="of the data set, drawn at random; default: all")
    parser.add_argument("--half", action="store_true", help="the end of the first half of a text")
    given = parser.parse_args()
    if not (Path(given.source).exists() and Path(given.tokenizer).exists()):
        go_offline_without_it()
    try:
        rows = load_prompts(given.source, given.column).shuffle(seed=0)
        tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    if given.rows:
        rows = rows.select(range(min(given.rows, len(rows))))
    made = prompts(rows[given.column], tokenizer, given.low, given.high, given.half)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with given.output.open("w", encoding="utf-8") as file:
        for prompt in made:
            file.write(json.dumps({"prompt": prompt}) + "\n")


if __name__ == "__main__":
    main()
