"""Sampling from a policy: one protocol and the backends that meet it."""
