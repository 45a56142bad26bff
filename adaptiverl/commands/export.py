"""`adaptiverl export RUN DIR`: the trained model in a folder that transformers or peft load alone.

The card is model_card.py's, merging is rl/merging.py's.
"""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HTTPError
from transformers import GenerationConfig

from adaptiverl.commands.model_card import model_card
from adaptiverl.commands.run_folder import RunReader
from adaptiverl.commands.trained import TrainedModel
from adaptiverl.commands.written import check_writable
from adaptiverl.config.schema import ConfigError
from adaptiverl.files.checkpoint import open_to_umask
from adaptiverl.files.console import counted
from adaptiverl.rl.merging import merged
from adaptiverl.rl.sampling.sampler import eos_ids
from adaptiverl.training.hub import go_offline_without_it
from adaptiverl.training.inputs import as_config_error, located


def main(given: Namespace, run: RunReader) -> int:
    """Writes the folder, and uploads it if asked to; the exit status."""
    folder, c = given.dir.absolute(), run.config
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{given.dir} exists and is not empty: name another folder")
    if given.merge and c.FULLTUNE:
        raise ConfigError("--merge: this run trained all weights, there is no adapter to merge")
    checkpoint = run.choose(given.checkpoint)
    if given.push:
        _refuse_without_hub(given.push)
    first = next(path for path in (folder, *folder.parents) if path.parent.exists())  # to be made
    check_writable(first / "README.md" if first.exists() else first, "name another folder")
    with run.as_started():
        adapter = not c.FULLTUNE and not given.merge
        base = _base(c.MODEL, checkpoint.path)
        if adapter and given.push and Path(base).exists():
            raise ConfigError(
                f"--push: the adapter's base is the folder {base}, which others do not have: "
                "use --merge"
            )
        model = TrainedModel(c, checkpoint)
        settings = generation_config(model)

        def write(where: Path) -> None:
            policy, tokenizer = model.sampler.policy, model.sampler.tokenizer
            if adapter:
                policy.save(where)
                _set_base(where, base)
                settings.save_pretrained(where)
            else:
                lm = merged(policy, checkpoint.path) if given.merge else policy.lm
                lm = lm.to(torch.bfloat16) if given.merge and c.BF16 else lm
                lm.generation_config = settings
                lm.save_pretrained(where)
            tokenizer.save_pretrained(where)
            name = given.push or str(given.dir)
            text = model_card(run, checkpoint, name=name, base=base, adapter=adapter)
            (where / "README.md").write_text(text, encoding="utf-8")

        with as_config_error(f"{given.dir}"):
            _write_whole(folder, write)
    kind = "an adapter" if adapter else "the model, adapter merged" if given.merge else "the model"
    after = counted(checkpoint.step, "step")
    print(f"exported {kind} of {checkpoint.path} (after {after}) to {given.dir}")
    if given.push:
        print(f"pushed to {_push(folder, given.push)}")
    return 0


def generation_config(model: TrainedModel) -> GenerationConfig:
    """What makes `generate` sample as the run did."""
    c, tokenizer = model.config, model.sampler.tokenizer
    ends = eos_ids(model.sampler.policy, tokenizer).unique().tolist()
    return GenerationConfig(
        do_sample=True,
        temperature=c.TEMPERATURE,
        top_k=c.TOP_K,
        top_p=c.TOP_P,
        max_new_tokens=c.MAX_NEW_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=c.STOP or None,
    )


def _base(model: str, checkpoint: Path) -> str:
    """The model under the adapter, or MODEL itself: a hub id, or the absolute path of a folder."""
    file = checkpoint / "adapter_config.json"
    if file.exists():
        model = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    try:
        model = located(model)
    except ValueError:  # of a run that trained all weights, and whose MODEL is gone
        return model
    return str(Path(model).resolve()) if Path(model).exists() else model


def _set_base(adapter: Path, base: str) -> None:
    """A relative path would be another folder to who loads the adapter elsewhere."""
    file = adapter / "adapter_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    text = json.dumps(config | {"base_model_name_or_path": base}, indent=2) + "\n"
    file.write_text(text, "utf-8")


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes `folder`, filled by `write(temporary_folder)`: all of it or nothing."""
    new = folder.with_name(f".new-{folder.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        write(new)
        open_to_umask(new)
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _refuse_without_hub(name: str) -> None:
    go_offline_without_it()
    if constants.is_offline_mode():
        raise ConfigError(
            f"--push {name}: {constants.ENDPOINT} cannot be reached, or HF_HUB_OFFLINE is set. "
            f"Export without --push; later, `hf upload {name} DIR` uploads the folder"
        )


def _push(folder: Path, name: str) -> str:
    """Uploads all files in one commit; the address."""
    api = HfApi()
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]
    try:
        repo = api.create_repo(name, exist_ok=True).repo_id
        api.create_commit(repo, files, commit_message="Upload model")
    except (HTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"--push {name}: {error}. {folder} is whole; `hf upload {name} {folder}` tries again"
        ) from error
    return f"{constants.ENDPOINT}/{name}"
