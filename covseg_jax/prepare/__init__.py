"""Studies to prepared cases: lungs found, cut out and resampled to one grid. NumPy only."""
