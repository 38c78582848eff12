"""Prepared cases to batches."""
