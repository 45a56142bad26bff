"""The program around the loop: config, checkpoints, logs. Knows no model and no algorithm."""
