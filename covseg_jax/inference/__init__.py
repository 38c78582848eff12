"""Trained networks to pseudo-masks and NIfTI masks."""
