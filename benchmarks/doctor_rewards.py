"""Rewards of benchmarks/doctor.py: some that are sound, most that are not."""


def constant(completions, **_):
    return [1.0] * len(completions)


def mostly_nan(completions, **_):
    return [float(len(text)) if k % 4 == 0 else float("nan") for k, text in enumerate(completions)]


def raises(completions, trainer_state, **_):
    if trainer_state.global_step > 12:
        raise KeyError("score")
    return [float(len(text) % 7) for text in completions]


def the(completions, **_):
    """Pays for one word, however often it is said."""
    return [float(text.lower().count("the")) for text in completions]


def varied(completions, **_):
    """The share of different words."""
    words = [text.split() for text in completions]
    return [len(set(each)) / len(each) if each else 0.0 for each in words]


def long(completions, **_):
    return [len(text) / 100 for text in completions]


def short(completions, **_):
    return [-len(text) / 100 for text in completions]


def huge(completions, **_):
    return [100.0 * text.count("a") for text in completions]


def unlikely(completions, **_):
    """Pays for letters that the model hardly writes."""
    return [float(sum(letter in "zqxj" for letter in text)) for text in completions]
