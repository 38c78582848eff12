"""Painted scans and pseudo-masks to a trained network: what segments a slice."""
