"""Prepared cases to batches: fed, painted and augmented."""
