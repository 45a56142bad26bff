"""What a run writes, and how it is stopped from outside. Knows no model and no algorithm."""
