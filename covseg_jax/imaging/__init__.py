"""CT studies and their geometry: NumPy only, never jax."""
