"""Files and grids: CT studies as they are read and written. NumPy only."""
