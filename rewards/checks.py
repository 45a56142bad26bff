"""Which rewards of a config contradict each other, or the way they are used."""

from collections.abc import Sequence

from rewards.base import Reward, Weight

# First parts of names in metrics.jsonl. Judges and people report under their own, as name/asked
TAKEN_NAMES = {"completions", "eval", "held_out", "rewards", "sampling", "seconds"}


def check_rewards(
    rewards: Sequence[Reward],
    held_out: Sequence[Reward] = (),
    *,
    num_generations: int = 1,
    evaluates: bool = False,
) -> None:
    """Raises ValueError that says what to change.

    `rewards` are trained on, `held_out` are only scored. `num_generations` is the number of
    completions of each prompt, and `evaluates` whether held-out prompts get one completion each.
    """
    if not rewards:
        raise ValueError("REWARDS is empty: name at least one reward")
    if all(_is_zero(reward.weight) for reward in rewards):
        raise ValueError("every WEIGHT is 0: nothing is rewarded")
    for i, reward in enumerate(held_out):
        if unread := reward.changed() & reward.training_keys:
            raise ValueError(f"HELD_OUT.{i}: {', '.join(sorted(unread))} is for REWARDS only")
    everything = [*rewards, *held_out]
    for reward in everything:
        if reward.counts and reward.name in TAKEN_NAMES:
            raise ValueError(f"NAME {reward.name} is taken: metrics of the run begin so")
        if reward.compares and num_generations == 1:
            raise ValueError(f"{reward.name} is PAIRWISE: NUM_GENERATIONS 1 has only one")
    for each in (rewards, held_out):
        names = [reward.name for reward in each]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two rewards are named {twice.pop()!r}: give one of them a NAME")
    if evaluates and all(reward.compares for reward in everything):
        raise ValueError(
            "EVAL_FILE has nothing to say: every reward is PAIRWISE and compares completions "
            "of one policy, so its mean is 0.5 for any policy; add a reward that scores "
            "(HELD_OUT is for that), or leave EVAL_FILE out"
        )
    if sum(reward.uses_terminal for reward in everything) > 1:
        raise ValueError("a terminal asks for one human reward: give the other WHERE web")


def _is_zero(weight: Weight) -> bool:
    """In all steps."""
    return not any(w for _, w in weight) if isinstance(weight, list) else weight == 0
