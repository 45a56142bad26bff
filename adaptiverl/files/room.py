"""Files for which there is no room: which one it was, and what to do about it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit of files
UNKNOWN = 0  # torch says that it could not write, and not why


def cause(error: BaseException | None) -> int | None:
    """The errno of a full disk, quota or limit that led to `error`; UNKNOWN, or None of others."""
    if error is None:
        return None
    if isinstance(error, OSError) and error.errno in FULL:
        return error.errno
    told = {f"(os error {number})": number for number in FULL}  # safetensors' words
    told["PytorchStreamWriter failed writing"] = UNKNOWN
    found = next((number for text, number in told.items() if text in str(error)), None)
    return cause(error.__context__) if found is None else found


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within this, an error of a full disk names `path`: that of an open file names none."""
    try:
        yield
    except Exception as error:
        if (number := cause(error)) is None:
            raise
        why = os.strerror(number) if number else error
        raise OSError(f"{path} could not be written: {why}") from error


def remedy(error: BaseException) -> str:
    """What to do about an error that has a `cause`."""
    limit = "the limit on the size of a file: that of `ulimit -f`, or of the file system"
    if (number := cause(error)) == errno.EFBIG:
        return f"Raise {limit}"
    return f"Make room, or raise {limit}" if number == UNKNOWN else "Make room"
