"""Prepared cases to pseudo-masks: the 3D GAN that makes a COVID scan look healthy."""
