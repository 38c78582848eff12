"""Scans to masks: the trained network, its thresholds and its export."""
