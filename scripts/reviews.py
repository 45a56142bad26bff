"""Film reviews for the scripts beside this file: read, cleaned, one text and one label each.

Takes a folder with train/val/test.jsonl(.gz), one object a line with `text` and `label`
("pos"/"neg" or 1/0), or the hub's `imdb`, whose train split gives every tenth review to val.
"""

import gzip
import json
import re
from pathlib import Path


def clean(text: str) -> str:
    """The review as one line of plain text: no <br />, no runs of white space."""
    return re.sub(r"\s+", " ", text.replace("<br />", " ")).strip()


def load(source: str, split: str) -> tuple[list[str], list[int]]:
    """Texts and labels (1 is positive) of one of the splits train, val and test."""
    rows = _hub_rows(split) if source == "imdb" else _file_rows(Path(source), split)
    texts = [clean(row["text"]) for row in rows]
    return texts, [int(row["label"] in (1, "pos")) for row in rows]


def _file_rows(folder: Path, split: str) -> list[dict]:
    for name, opener in ((f"{split}.jsonl.gz", gzip.open), (f"{split}.jsonl", open)):
        if (folder / name).exists():
            with opener(folder / name, "rt", encoding="utf-8") as lines:
                return [json.loads(line) for line in lines]
    raise SystemExit(f"{folder} holds neither {split}.jsonl.gz nor {split}.jsonl")


def _hub_rows(split: str) -> list[dict]:
    from datasets import load_dataset

    if split == "test":
        return list(load_dataset("imdb", split="test"))
    rows = list(load_dataset("imdb", split="train"))
    return [row for i, row in enumerate(rows) if (i % 10 == 0) == (split == "val")]
