"""What commands write: a file that is there whole or as it was, and known to be possible before."""

import os
from pathlib import Path

from adaptiverl.config.schema import ConfigError


def check_writable(path: Path, hint: str) -> None:
    """Raises ConfigError, with the `hint`, where `write_whole` could not write `path`."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        _beside(path).touch()
        _beside(path).unlink()
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): {hint}") from error


def write_whole(path: Path, text: str) -> None:
    """Raises OSError, which names `path`; it is then as it was before."""
    temporary = _beside(path)
    try:
        # a lone surrogate, which a model may write, is no UTF-8
        temporary.write_text(text, encoding="utf-8", errors="replace")
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A name in the same folder, which no other process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}")
