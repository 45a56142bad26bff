"""Adapters to other people's trainers, imported by who uses them."""
