"""A collapse: what ends or takes back a run, and which checkpoints came before it.

What a collapse is known by is guards.py's; going back is rollback.py's.
"""

COLLAPSES = {"collapsed", "kl beyond reason", "nan"}  # kinds of events
PROBATION = 3  # sound steps after a checkpoint before it counts as sound
MAX_ROLLBACKS = 3


class Collapsed(Exception):
    """The policy is broken, or writes one text; raised in all processes at once.

    `step` is the one that was not finished, or the last that was; `str()` has cause and remedy.
    """

    def __init__(self, step: int, kind: str, message: str):
        super().__init__(message)
        self.step, self.kind = step, kind


def sound_before(checkpoints: list[int], step: int) -> list[int]:
    """Those of the steps `checkpoints` that PROBATION steps before `step` have followed."""
    return [saved for saved in checkpoints if saved + PROBATION < step]
