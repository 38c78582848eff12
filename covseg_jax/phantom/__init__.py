"""Studies that no patient has, with masks that are exact. NumPy only."""
