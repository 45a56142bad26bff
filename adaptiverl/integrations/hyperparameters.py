"""What stands for a torch optimizer before a Controller, where another library has the numbers."""

from typing import Any

from adaptiverl.optim.controller import Controller


class Hyperparameters:
    """One group of numbers, under the names that torch gives them."""

    def __init__(self, **group: Any):
        self.param_groups = [group]


def make_controller(numbers: Hyperparameters, **arguments: Any) -> Controller:
    """A Controller that writes the rate, too; its `arguments` are the rules and their constants.

    Raises ValueError for the rules that need a KL, trust_region and learned.
    """
    return Controller(numbers, owns_lr=True, **arguments)  # type: ignore[arg-type]
