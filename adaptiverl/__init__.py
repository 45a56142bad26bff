"""AdaptiveRL: REINFORCE fine-tuning of language models, as a program and as small parts."""

__version__ = "0.1.0"
