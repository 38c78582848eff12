"""What every training runs on: the loop, checkpoints, optimizers, losses and devices."""
