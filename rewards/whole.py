"""Loading a reward's model whole: no weight of it may be random."""

from typing import Any

SHOWN = 3  # names of missing weights


def load_whole(kind: Any, model: str, wanted: str) -> Any:
    """`model` as `kind`, one of transformers' Auto classes, in fp32 and eval mode.

    Raises ValueError, which asks for `wanted`, where its files lack weights: transformers would
    fill them with random numbers, and every score would be noise.
    """
    import torch

    loaded, info = kind.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ValueError(
            f"the files of {model} lack weights, which would be random: "
            f"{', '.join(missing[:SHOWN])}{more}. Name {wanted}"
        )
    return loaded.eval()
