"""Pseudo-masks to a trained network: what segments a slice."""
