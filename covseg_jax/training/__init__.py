"""Losses, sharded steps, checkpoints and the one training loop."""
