"""How it learns: optimizers, usable alone. Imports torch and nothing else of this project."""
