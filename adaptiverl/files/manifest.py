"""What a checkpoint says of itself: its step, and the digest of each of its files."""

import json
from pathlib import Path
from typing import NamedTuple

MANIFEST = "manifest.json"


class Manifest(NamedTuple):
    step: int
    files: dict[str, str]  # path in the checkpoint → SHA-256


def read_manifest(folder: Path) -> Manifest:
    """Of the checkpoint in `folder`. Raises OSError, and ValueError where it is damaged."""
    content = json.loads((folder / MANIFEST).read_text("utf-8"))
    found = content if isinstance(content, dict) else {}
    step, files = found.get("step"), found.get("files")
    if not isinstance(step, int) or not isinstance(files, dict):
        raise ValueError("it has no step, or no files")
    return Manifest(step, files)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest._asdict(), indent=2), "utf-8")
