"""Metrics, evaluation protocols and the report."""
