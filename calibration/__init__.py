"""Calibration data, quantisation scales, and the search of the pruning budget."""
